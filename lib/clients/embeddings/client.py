"""One embeddings endpoint through the openai package, or a model in this process: paced, retried, answers checked."""

from __future__ import annotations

import atexit
import importlib.util
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from lib import dimensions
from lib.clients.embeddings import answers
from lib.clients.embeddings.answers import AGAIN, Answer, BadInput, Transient
from lib.clients.embeddings.rate_limits import Pacer, RateLimited, estimated_tokens, rate_limits
from lib.concurrency import Cancelled
from lib.dimensions import LOCAL, OLLAMA, OPENAI, SETTING_NAMES, VOYAGE, EmbeddingSpec, facts_of, takes_dimensions
from lib.errors import ProviderRefused, UsageProblem, one_line
from lib.network import INSTALL_SOCKS, PROXIES, Unbounded, httpx_hooks, is_this_machine, joined, trust_step

if TYPE_CHECKING:
    import openai
    from fastembed import TextEmbedding

# Azure takes the key in another header (https://learn.microsoft.com/azure/ai-services/openai/reference#authentication).
_AZURE_HOSTS = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")
# Voyage takes `output_dimension` (https://docs.voyageai.com/reference/embeddings-api).
_VOYAGE_HOST = "api.voyageai.com"
OLLAMA_INPUTS = 16  # texts of one request: Ollama computes one after the other, and answers when all are done
# The most bytes of an answer per number and around the numbers, and the most time-outs that one answer may take.
_BYTES_A_NUMBER, _HEAD_BYTES, _TIMES = 64, 1 << 20, 3


class Provider:
    """Requests to one endpoint with one key, for one model and size. Thread-safe. `name` holds no secret."""

    def __init__(self, spec: EmbeddingSpec, api_key: str, timeout_seconds: float) -> None:
        if not api_key.isascii() or any(character.isspace() for character in api_key):
            text = f"{SETTING_NAMES[spec.provider].key} holds a space, a line break or a letter that no key has"
            raise UsageProblem(text, next_step="set it again")
        self._spec = spec
        self.name = f"{spec.model}{dimensions.similar_model(spec.model)} at {dimensions.public_url(spec.base_url)}"
        self._key = api_key
        self._base_url, self._timeout = spec.base_url.strip() or dimensions.OPENAI_BASE_URL, timeout_seconds
        # AutoMem's OLLAMA_TIMEOUT is for one text.
        self._read_timeout = timeout_seconds * (OLLAMA_INPUTS if spec.provider == OLLAMA else 1)
        self._openai: openai.OpenAI | None = None
        self._opening = threading.Lock()
        # base64 is decoded here: a JSON list of numbers costs 30 to 60 times the CPU.
        self._options: dict[str, Any] = {"model": spec.model, "encoding_format": "base64"}
        self._extra: dict[str, object] = {}
        if spec.provider == VOYAGE or urlsplit(self._base_url).hostname == _VOYAGE_HOST:
            self._extra["output_dimension"] = spec.size
        elif spec.provider == OPENAI and spec.size != facts_of(spec.model).native and takes_dimensions(spec.model):
            self._options["dimensions"] = spec.size

    def client(self) -> openai.OpenAI:
        """The package's client, created on the first call: importing the package takes half a second."""
        with self._opening:
            if self._openai is None:
                import openai

                parts = urlsplit(self._base_url)
                azure = (parts.hostname or "").endswith(_AZURE_HOSTS)
                self._openai = openai.OpenAI(
                    api_key=self._key or "none",
                    base_url=urlunsplit(parts._replace(query="", fragment="")),
                    default_query=dict(parse_qsl(parts.query)),
                    default_headers={"api-key": self._key} if azure else None,
                    timeout=openai.Timeout(self._timeout, read=self._read_timeout),
                    http_client=self._http_client(),
                    max_retries=0,  # the package's own retries know neither quota codes nor the other workers
                )
            return self._openai

    def _http_client(self) -> Any:
        import openai

        try:
            # No proxy leads to this machine. A redirect would carry the texts and Azure's key elsewhere.
            return openai.DefaultHttpxClient(
                trust_env=not is_this_machine(self._base_url),
                verify=_http_package().create_ssl_context(),  # which reads SSL_CERT_FILE, for this machine, too
                follow_redirects=False,
                event_hooks=httpx_hooks(_HEAD_BYTES, _TIMES * self._read_timeout),
            )
        except ImportError as error:
            raise UsageProblem(
                f"{PROXIES} names a SOCKS proxy, which needs other Python packages",
                next_step=f"{INSTALL_SOCKS} socksio\nor unset the variable",
            ) from error

    def send(self, texts: Sequence[str]) -> tuple[Mapping[str, str], bytes]:
        """Headers and body of a 200. Raises RateLimited, Transient, BadInput or ProviderRefused for any other."""
        import openai

        http = _http_package()
        try:
            # In extra_body the texts replace `input` unchecked; otherwise the package walks through all of them.
            with self.client().embeddings.with_streaming_response.create(
                input="", extra_body={"input": list(texts), **self._extra}, **self._options
            ) as raw:
                limit = _HEAD_BYTES + len(texts) * self._spec.size * _BYTES_A_NUMBER
                return raw.headers, joined(raw.iter_bytes(), limit, _TIMES * self._read_timeout)
        except Unbounded as error:
            raise Transient(str(error)) from error
        except (http.TimeoutException, openai.APITimeoutError) as error:
            raise Transient("no answer in time") from error
        except openai.APIStatusError as error:
            # Its own text may hold the key: it is not chained.
            raise self._error(texts, error.status_code, error.response.headers, error.body) from None
        except (http.HTTPError, openai.APIConnectionError) as error:
            text = answers.redacted(str(error.__cause__ or error), self._key)
            if "CERTIFICATE_VERIFY_FAILED" in text:
                step = trust_step("SSL_CERT_FILE", whose="its certificate, or a proxy's,")
                raise ProviderRefused(f"{self.name}: TLS failed: {text}", next_step=f"{step},\n{AGAIN}") from None
            raise Transient(text or "no connection") from None

    def opened(self, texts: Sequence[str], headers: Mapping[str, str], content: bytes) -> dict[str, object]:
        """The JSON of a 200. Raises BadAnswer, and the errors of `send` if it holds an error after all."""
        body = answers.parsed(content)
        # Some proxies wrap an error of the model's host into a 200, some of them next to `"data": null`.
        if "data" not in body or (body.get("error") and not body["data"]):
            error_body = body.get("error")
            code = error_body.get("code") if isinstance(error_body, dict) else None
            raise self._error(texts, code if isinstance(code, int) and code >= 400 else 200, headers, body)
        return body

    def close(self) -> None:
        """Close the connections."""
        if self._openai is not None:
            self._openai.close()

    def _error(self, texts: Sequence[str], status: int, headers: Mapping[str, str], body: object) -> Exception:
        ours: dict[str, Any] = {"secret": self._key, "provider": self.name, "spec": self._spec}
        return answers.refusal_error(status, headers, body, sent_tokens=estimated_tokens(texts), **ours)


def _http_package() -> Any:
    """Return httpx, or what the package openai uses instead: an error while a body is read is of that package."""
    import openai

    return importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])


class LocalModel:
    """One model on this machine, with the methods of Provider. Thread-safe.

    `models_dir` is the folder of downloaded models; fastembed downloads a model that is not in it. Raises UsageProblem
    if the package is not installed.
    """

    def __init__(self, spec: EmbeddingSpec, models_dir: Path) -> None:
        if importlib.util.find_spec("fastembed") is None:
            text = f"{spec.model} runs on this machine with the Python package 'fastembed', which is not installed here"
            raise UsageProblem(text, next_step="python -m pip install -r requirements-local.txt")
        self.name = f"{spec.model} on this machine"
        self._spec, self._models_dir = spec, models_dir
        self._model: TextEmbedding | None = None
        # One batch at a time: the model itself uses every core.
        self._running = threading.Lock()
        self._ended = False

    def client(self) -> TextEmbedding:
        """The loaded model: the first call loads it. Raises UsageProblem if it cannot be loaded or downloaded."""
        with self._running:
            if self._model is None:
                self._model = self._load()
                atexit.register(self._end)
            return self._model

    def send(self, texts: Sequence[str]) -> tuple[Mapping[str, str], Any]:
        """No headers, and the vectors of the texts. Raises ProviderRefused if the model fails, Cancelled at the end."""
        model = self.client()
        with self._running:
            if self._ended:
                raise Cancelled
            try:
                return {}, list(model.embed(list(texts)))
            except Exception as error:  # see _load
                raise ProviderRefused(
                    f"{self.name} failed: {one_line(str(error))}",
                    next_step="free some memory, or use --batch-size 1; if that does not help, move the model's folder"
                    f" away, so that it is downloaded again:\nls {quote(str(self._models_dir))}\n{AGAIN}",
                ) from error

    def opened(self, _texts: Sequence[str], _headers: Mapping[str, str], rows: Any) -> dict[str, Any]:
        """The vectors in the form of an answer of OpenAI's API. They cost no tokens."""
        return {"data": [{"embedding": row} for row in rows]}

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None

    def _end(self) -> None:
        """Wait for the batch that is computed, and begin no other: onnxruntime aborts a process that ends meanwhile."""
        self._ended = True
        self._running.acquire()

    def _load(self) -> TextEmbedding:
        try:
            from fastembed import TextEmbedding
            from loguru import logger

            logger.disable("fastembed")  # it logs what is reported as an error here

            self._models_dir.mkdir(parents=True, exist_ok=True)
            return TextEmbedding(model_name=self._spec.model, cache_dir=str(self._models_dir))
        except Exception as error:  # onnxruntime and tokenizers raise classes that share no other base
            raise UsageProblem(
                f"{self._spec.model} could not be loaded from {self._models_dir}, nor downloaded into it:"
                f" {one_line(str(error))}",
                next_step="connect to the network, or name the folder into which AutoMem downloaded the model:\n"
                "export AUTOMEM_MODELS_DIR=...\nthen run the same command again",
            ) from error


FIRST_CONTACT_SECONDS = 60.0  # the time limit for an endpoint that has never answered
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0
FAILURES_BEFORE_SPLIT = 5
CONTROL_TEXT = "hello"


class EmbeddingClient:
    """Embeds texts with one model at one size. Thread-safe; the workers of a run share one.

    `timeout_seconds` is for one request, `max_wait_seconds` for rate limits, or for failures, before the run gives up.
    `models_dir` is the folder of the models of the provider `local`. No message and no repr shows `api_key`.
    Raises UsageProblem if it cannot be a key, or if a local model has no package.
    """

    def __init__(
        self,
        spec: EmbeddingSpec,
        api_key: str,
        *,
        timeout_seconds: float = 60.0,
        max_wait_seconds: float = 600.0,
        models_dir: Path | None = None,
    ) -> None:
        self.spec = spec
        self.pacer = Pacer(max_wait_seconds)
        self._provider: Provider | LocalModel
        if spec.provider == LOCAL:
            assert models_dir is not None
            self._provider = LocalModel(spec, models_dir)
        else:
            self._provider = Provider(spec, api_key, timeout_seconds)
        self.provider = self._provider.name
        self._max_wait = max_wait_seconds
        self.request_seconds: float | None = None  # duration of the first good request
        self._last_answer: float | None = None
        self.billed_tokens = 0  # of all answers, including those that cannot be used
        # Called before each request, with its tokens and those of all in flight; what it raises ends it.
        self.require_affordable: Callable[[int], None] = lambda _tokens: None
        self._in_flight: dict[int, int] = {}  # tokens by thread; changed together with `billed_tokens`
        # One answer at a time: more would share the interpreter's lock anyway, and each takes four times its size.
        # It is also held while tokens are counted.
        self._decoding = threading.Lock()

    def answered_since(self, moment: float) -> bool:
        """Whether good vectors arrived after `moment` (monotonic seconds)."""
        return self._last_answer is not None and self._last_answer >= moment

    def embed(self, texts: Sequence[str], *, tokens: int | None = None, stop: threading.Event | None = None) -> Answer:
        """Vectors of `texts` (no more than the provider takes, none blank), in their order.

        `tokens`: how many the texts have; default: an estimate.
        Raises ProviderRefused (key, permission, quota, no good answer for `max_wait_seconds`), WrongWidth if the model
        makes another size, BadInput (split the batch; one text is not accepted), Cancelled if `stop` was set.
        """
        import backoff

        stop = stop or threading.Event()
        tokens = estimated_tokens(texts) if tokens is None else tokens
        started, failures = time.monotonic(), 0
        pauses = backoff.expo(factor=2 * FIRST_PAUSE_SECONDS, max_value=LONGEST_PAUSE_SECONDS)
        next(pauses)  # backoff's generators begin with an empty value
        while True:
            try:
                return self._attempt(list(texts), tokens, stop)
            except (RateLimited, Transient) as error:
                failures += isinstance(error, Transient)
                final = None if stop.is_set() else self._final_error(error, started, failures)
                if final:
                    raise final from error
                if isinstance(error, Transient):  # the pacer itself delays what a rate limit refused
                    longest = next(pauses)
                    stop.wait(random.uniform(longest / 2, longest))
                if stop.is_set():
                    raise Cancelled from error

    def close(self) -> None:
        """Close the connections."""
        self._provider.close()

    def _attempt(self, texts: list[str], billed: int, stop: threading.Event) -> Answer:
        self._provider.client()  # loads the package or the model, which is no part of the request's duration
        with self._decoding:
            self.require_affordable(sum(self._in_flight.values()) + billed)
            self._in_flight[threading.get_ident()] = billed
        try:
            return self._send(texts, stop)
        finally:
            with self._decoding:
                self._in_flight.pop(threading.get_ident(), None)

    def _send(self, texts: list[str], stop: threading.Event) -> Answer:
        tokens = estimated_tokens(texts)
        self.pacer.acquire(tokens, stop)
        began = time.monotonic()
        try:
            headers, content = self._provider.send(texts)
            limits = rate_limits(headers)
            with self._decoding:
                body = self._provider.opened(texts, headers, content)
                self._in_flight.pop(threading.get_ident())
                self.billed_tokens += answers.billed_tokens(body)
                answer = answers.read_answer(body, len(texts), self.spec)
            self._refuse_one_for_all(texts, answer)
        except BadInput:
            self.pacer.answered(tokens, None)
            raise
        except RateLimited as error:
            self.pacer.refused(tokens, error.wait_seconds, error.limits)
            raise
        except BaseException:
            self.pacer.failed(tokens)
            raise
        self.pacer.answered(tokens, limits)
        self._last_answer = time.monotonic()
        self.request_seconds = self.request_seconds or self._last_answer - began
        return answer

    def _refuse_one_for_all(self, texts: list[str], answer: Answer) -> None:
        """Raise ProviderRefused if different texts got the same vector: a search could find nothing."""
        if len(set(texts)) > 2 and bool((answer.vectors == answer.vectors[0]).all()):
            names = SETTING_NAMES[self.spec.provider]
            step = f"check {names.model} and {names.endpoint}, then run the same command again"
            raise ProviderRefused(f"{self.provider} answers every text with the same vector", next_step=step)

    def _final_error(self, error: RateLimited | Transient, started: float, failures: int) -> Exception | None:
        """The exception that ends the tries, or None to try again. `failures` counts Transient ones."""
        now = time.monotonic()
        seconds = now - started
        if isinstance(error, RateLimited):
            waited, wait = now - max(started, self._last_answer or started), error.wait_seconds or 0.0
            if wait <= self._max_wait and waited < self._max_wait:
                return None
            allowed = f" (the next request is allowed in {wait:,.0f} s)" if wait > self._max_wait else ""
            return ProviderRefused(
                f"Rate limit exceeded during re-embedding ({self.provider}, for {seconds:.0f} s: {error}){allowed}",
                next_step=f"wait for off-peak hours, raise the provider's limits, or lower --batch-size,\n{AGAIN}",
            )
        first_contact = self._last_answer is None
        timeout = min(FIRST_CONTACT_SECONDS, self._max_wait) if first_contact else self._max_wait
        if seconds < timeout and failures < FAILURES_BEFORE_SPLIT:
            return None
        # Some servers answer 500 to a text that they cannot take. If others are served, the batch is the cause.
        split = error.status == 500 and seconds < self._max_wait
        if split and (self.answered_since(started) or self._takes_a_word()):
            return BadInput(str(error))
        if seconds < timeout:
            return None
        look = ", the network and the provider's status page"
        if self.spec.provider == OLLAMA:
            look = ", and that Ollama runs there (ollama serve)"
        step = f"check {SETTING_NAMES[self.spec.provider].endpoint}{look},\n{AGAIN}"
        return ProviderRefused(f"{self.provider} gave no good answer for {seconds:.0f} s: {error}", next_step=step)

    def _takes_a_word(self) -> bool:
        try:
            self._attempt([CONTROL_TEXT], 1, threading.Event())
        except (RateLimited, Transient, BadInput):
            return False
        return True
