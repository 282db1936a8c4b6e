"""One embeddings endpoint through the openai package: paced, retried on named conditions, every answer checked."""

from __future__ import annotations

import binascii
import json
import random
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import numpy as np
import numpy.typing as npt
import orjson
import pybase64

from lib.clients.embeddings.rate_limits import Pacer, Stopped, estimated_tokens
from lib.clients.embeddings.refusals import (
    AGAIN,
    BadAnswer,
    BadIndices,
    BadInput,
    RateLimited,
    RateLimits,
    Transient,
    WrongWidth,
    judged,
    rate_limits,
    redacted,
    refusal_of,
)
from lib.dimensions import OPENAI_BASE_URL, EmbeddingSpec, native_size, public_url, takes_dimensions
from lib.errors import ProviderRefused, UsageProblem
from lib.network import Unbounded, httpx_hooks, is_this_machine, joined

if TYPE_CHECKING:
    import openai

FloatArray = npt.NDArray[np.float32]
NORM_TOLERANCE = 0.01


@dataclass(frozen=True)
class Answer:
    """`vectors` (n, size) float32 in the order of the texts, each of length 1; `tokens` as billed."""

    vectors: FloatArray
    tokens: int
    limits: RateLimits | None = None


def parsed(content: bytes) -> dict[str, object]:
    """The answer's JSON object. Raises BadAnswer."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        try:
            body = json.loads(content)  # takes the NaN that servers written in Python may send
        except (ValueError, RecursionError) as error:
            raise BadAnswer("the answer is not JSON") from error
    if not isinstance(body, dict):
        raise BadAnswer("the answer is not a JSON object")
    return body


def read_answer(
    body: dict[str, object], count: int, spec: EmbeddingSpec, limits: RateLimits | None
) -> Answer:
    """The checked vectors for `count` texts. Raises BadAnswer, or WrongWidth for another size than `spec`'s."""
    data = body.get("data")
    if not isinstance(data, list) or len(data) != count:
        raise BadAnswer(
            f"{len(data) if isinstance(data, list) else 'no'} vectors came back for {count} texts"
        )
    indices = _indices(data)
    vectors = np.empty((count, spec.size), dtype=np.float32)
    while data:
        item = data.pop()  # the answer's text shrinks while the vectors grow
        vectors[indices.pop()] = _row(item.get("embedding"), spec)
    return Answer(_unit(vectors, spec), billed_tokens(body), limits)


def _indices(data: list[Any]) -> list[int]:
    """The index of each vector. Raises BadIndices if it does not follow from the answer which vector is which text's.

    Without any index the order is that of the texts. One that is missing among others is the one that is left:
    encoders that omit zeros leave out the 0 (protobuf's JSON, as Gemini's endpoint sends it).
    """
    if not all(isinstance(item, dict) for item in data):
        raise BadAnswer("a vector that is no JSON object")
    given = [item.get("index") for item in data]
    if all(index is None for index in given):
        return list(range(len(data)))
    left = set(range(len(data))) - {index for index in given if type(index) is int}
    if given.count(None) == 1 and len(left) == 1:
        given[given.index(None)] = left.pop()
    if not all(type(index) is int for index in given) or set(given) != set(range(len(data))):
        raise BadIndices("the answer's indices do not say which vector is which text's")
    return [int(index) for index in given if index is not None]


def _row(embedding: object, spec: EmbeddingSpec) -> FloatArray:
    try:
        if isinstance(embedding, str):
            row = np.frombuffer(pybase64.b64decode(embedding, validate=True), dtype="<f4")
        else:  # a server that ignores base64; None stands for NaN in JSON
            row = np.asarray(embedding, dtype=np.float32)
    except (ValueError, TypeError, OverflowError, binascii.Error) as error:
        raise BadAnswer("a vector that is neither base64 nor a list of numbers") from error
    if row.ndim != 1 or len(row) == 0:
        raise BadAnswer("a vector that is not a list of numbers")
    if len(row) != spec.size:
        raise WrongWidth(
            f"{spec.model} answered with {len(row)}d vectors, VECTOR_SIZE is {spec.size}",
            next_step=f"export VECTOR_SIZE={len(row)}   or name a model that makes {spec.size}d with EMBEDDING_MODEL",
        )
    return row


def _unit(vectors: FloatArray, spec: EmbeddingSpec) -> FloatArray:
    """Check the lengths; OpenAI's models answer with length 1, others may not and are scaled."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    if not np.isfinite(norms).all():
        raise BadAnswer("a vector with values that are not numbers")
    off = np.abs(norms - 1) > NORM_TOLERANCE
    if not off.any():
        return vectors
    if native_size(spec.model) is not None or (norms < 1e-6).any():
        raise BadAnswer(f"a vector of length {norms[off][0]:.3g} instead of 1")
    return np.asarray(vectors / norms[:, None], dtype=np.float32)


def billed_tokens(body: dict[str, object]) -> int:
    """The tokens that an answer is billed for, whether or not its vectors are of use; 0 if it names none."""
    usage = body.get("usage")
    billed = usage.get("total_tokens") or usage.get("prompt_tokens") if isinstance(usage, dict) else 0
    return max(0, billed) if isinstance(billed, int) else 0  # a negative one would pay for others


# Azure's own header for a key (https://learn.microsoft.com/azure/ai-services/openai/reference#authentication).
_AZURE_HOSTS = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")
_VOYAGE_HOST = (
    "api.voyageai.com"  # takes `output_dimension` (https://docs.voyageai.com/reference/embeddings-api)
)


# An answer is at most so large (a number as text, and what is around the numbers), and takes so many time-outs.
_BYTES_A_NUMBER, _HEAD_BYTES, _TIMES = 64, 1 << 20, 3


class Provider:
    """One key at one endpoint, for one model and size. Thread-safe; `name` is fit to be shown."""

    def __init__(self, spec: EmbeddingSpec, api_key: str, timeout_seconds: float) -> None:
        if not api_key.isascii() or any(character.isspace() for character in api_key):
            raise UsageProblem(
                "OPENAI_API_KEY holds a space, a line break or a letter that no key has",
                next_step="set it again",
            )
        self._size = spec.size
        self.name = f"{spec.model} at {public_url(spec.base_url)}"
        self._key = api_key
        self._base_url, self._timeout = spec.base_url.strip() or OPENAI_BASE_URL, timeout_seconds
        self._made: openai.OpenAI | None = None
        self._making = threading.Lock()
        # base64, decoded here: a list of numbers costs 30 to 60 times the CPU.
        self._options: dict[str, Any] = {"model": spec.model, "encoding_format": "base64"}
        self._beside: dict[str, object] = {}
        if takes_dimensions(spec.model) and spec.size != native_size(spec.model):
            self._options["dimensions"] = spec.size
        if urlsplit(self._base_url).hostname == _VOYAGE_HOST:
            self._beside["output_dimension"] = spec.size

    def prepare(self) -> None:
        """Have the package ready, so that its import is no part of a request's time."""
        self._client()

    def _client(self) -> openai.OpenAI:
        """The package's client, made when something is to be sent: importing it costs half a second."""
        with self._making:
            if self._made is None:
                import openai

                parts = urlsplit(self._base_url)
                azure = (parts.hostname or "").endswith(_AZURE_HOSTS)
                self._made = openai.OpenAI(
                    api_key=self._key or "none",
                    base_url=urlunsplit(parts._replace(query="", fragment="")),
                    default_query=dict(parse_qsl(parts.query)),
                    default_headers={"api-key": self._key} if azure else None,
                    timeout=self._timeout,
                    # No proxy leads to this machine; texts and Azure's key would go along to where a redirect points.
                    http_client=openai.DefaultHttpxClient(
                        trust_env=not is_this_machine(self._base_url),
                        follow_redirects=False,
                        event_hooks=httpx_hooks(_HEAD_BYTES, _TIMES * self._timeout),
                    ),
                    max_retries=0,  # the package's own retries know neither quota codes nor the other workers
                )
            return self._made

    def send(self, texts: Sequence[str]) -> tuple[Mapping[str, str], bytes]:
        """Headers and body of a 200.

        Raises RateLimited, Transient, BadInput or ProviderRefused for any other (lib/clients/embeddings/refusals.py).
        """
        import openai

        # httpx, or what the package has in its place: what breaks within a body comes as its error.
        http = import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
        try:
            # As extra_body the texts replace `input` unlooked at; else the package walks through every one of them.
            with self._client().embeddings.with_streaming_response.create(
                input="", extra_body={"input": list(texts), **self._beside}, **self._options
            ) as raw:
                limit = _HEAD_BYTES + len(texts) * self._size * _BYTES_A_NUMBER
                return raw.headers, joined(raw.iter_bytes(), limit, _TIMES * self._timeout)
        except Unbounded as error:
            raise Transient(str(error)) from error
        except http.TimeoutException as error:
            raise Transient("no answer in time") from error
        except http.HTTPError as error:
            raise Transient(redacted(str(error), self._key) or "the connection broke") from None
        except openai.APIStatusError as error:
            # Its own text may hold the key: it is not chained.
            raise self._judged(texts, error.status_code, error.response.headers, error.body) from None
        except openai.APITimeoutError as error:
            raise Transient("no answer in time") from error
        except openai.APIConnectionError as error:
            raise Transient(redacted(str(error.__cause__ or error), self._key) or "no connection") from None

    def opened(self, texts: Sequence[str], headers: Mapping[str, str], content: bytes) -> dict[str, object]:
        """The JSON of a 200. Raises BadAnswer, and as `send` where it holds an error after all."""
        body = parsed(content)
        if "data" not in body:  # some proxies wrap an error of the model's host into a 200
            error_body = body.get("error")
            code = error_body.get("code") if isinstance(error_body, dict) else None
            raise self._judged(texts, code if isinstance(code, int) and code >= 400 else 200, headers, body)
        return body

    def close(self) -> None:
        """Close the connections."""
        if self._made is not None:
            self._made.close()

    def _judged(
        self, texts: Sequence[str], status: int, headers: Mapping[str, str], body: object
    ) -> Exception:
        return judged(refusal_of(status, headers, body, self._key), estimated_tokens(texts), self.name)


FIRST_CONTACT_SECONDS = 60.0  # an endpoint that never answered yet is given up sooner
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0
FAILURES_BEFORE_SPLIT = 5
CONTROL_TEXT = "hello"


class EmbeddingClient:
    """Embeds texts with one model at one size. Thread-safe; the workers of a run share one.

    Args:
        spec: endpoint ("" for OpenAI's), model and size.
        api_key: never shown, in no message and no repr; raises UsageProblem where it cannot be one.
        timeout_seconds: of one request.
        max_wait_seconds: of rate limits, or of failures, before the run gives up.
    """

    def __init__(
        self,
        spec: EmbeddingSpec,
        api_key: str,
        *,
        timeout_seconds: float = 60.0,
        max_wait_seconds: float = 600.0,
    ) -> None:
        self.spec = spec
        self.pacer = Pacer(max_wait_seconds)
        self._provider = Provider(spec, api_key, timeout_seconds)
        self._max_wait = max_wait_seconds
        self.request_seconds: float | None = None  # what the first good answer took
        self._last_answer: float | None = None
        self.billed_tokens = 0  # of every answer of the provider, those included that are of no use
        # One answer at a time: more would share the interpreter's lock anyway, and each takes four times its size.
        self._decoding = threading.Lock()

    @property
    def provider(self) -> str:
        """Model and endpoint, to be shown."""
        return self._provider.name

    def answered_since(self, moment: float) -> bool:
        """Whether good vectors came after `moment` (monotonic seconds)."""
        return self._last_answer is not None and self._last_answer >= moment

    def embed(self, texts: Sequence[str], *, stop: threading.Event | None = None) -> Answer:
        """Vectors of `texts` (at most 2,048, none blank), in their order.

        Raises:
            ProviderRefused: key, permission, quota, or no good answer for `max_wait_seconds`.
            WrongWidth: the model makes another size.
            BadInput: the batch is to be split, or its only text refused.
            Stopped: `stop` was set while the request waited.
        """
        import backoff

        stop = stop or threading.Event()
        started = time.monotonic()

        def waits() -> Generator[float, Any, None]:
            return self._waits(stop, started)

        retried = backoff.on_exception(waits, (RateLimited, Transient), jitter=None, logger=None)(
            self._attempt
        )
        try:
            answer: Answer = retried(list(texts), stop)
        except (RateLimited, Transient) as error:
            if stop.is_set():
                raise Stopped from error
            raise self._given_up(error, started) from error
        return answer

    def close(self) -> None:
        """Close the connections."""
        self._provider.close()

    def _attempt(self, texts: list[str], stop: threading.Event) -> Answer:
        tokens = estimated_tokens(texts)
        self._provider.prepare()
        self.pacer.acquire(tokens, stop)
        began = time.monotonic()
        try:
            headers, content = self._provider.send(texts)
            limits = rate_limits(headers)
            with self._decoding:
                body = self._provider.opened(texts, headers, content)
                self.billed_tokens += billed_tokens(body)
                answer = read_answer(body, len(texts), self.spec, limits)
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
        """Raise ProviderRefused where several different texts got one and the same vector: nothing could be found."""
        if len(set(texts)) > 2 and bool((answer.vectors == answer.vectors[0]).all()):
            raise ProviderRefused(
                f"{self.provider} answers every text with the same vector",
                next_step="check EMBEDDING_MODEL and OPENAI_BASE_URL, then run the same command again",
            )

    def _waits(self, stop: threading.Event, started: float) -> Generator[float, Any, None]:
        """Pauses between tries, for backoff. It waits here itself, so that a stop ends the wait at once.

        A rate limit needs no pause of its own: the pacer's gate holds every worker. Ends, and with it the tries,
        where waiting is no use any more.
        """
        failures = 0
        error = yield 0.0
        while not self._hopeless(error, started, failures):
            if isinstance(error, Transient):
                failures += 1
                longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**failures)
                stop.wait(random.uniform(longest / 2, longest))
            if stop.is_set():
                return
            error = yield 0.0

    def _hopeless(self, error: Exception, started: float, failures: int) -> bool:
        now, last = time.monotonic(), self._last_answer
        if isinstance(error, RateLimited):
            too_long = (error.wait_seconds or 0.0) > self._max_wait
            return too_long or now - max(started, last or started) >= self._max_wait
        if self._split_instead(error, started, failures):
            return True
        patience = self._max_wait if last is not None else min(FIRST_CONTACT_SECONDS, self._max_wait)
        return now - started >= patience

    def _split_instead(self, error: Exception, started: float, failures: int) -> bool:
        # Some servers answer 500 to a text they cannot take. While others are served, it is the batch.
        if getattr(error, "status", None) != 500 or failures < FAILURES_BEFORE_SPLIT:
            return False
        return self.answered_since(started) or self._takes_a_word()

    def _takes_a_word(self) -> bool:
        try:
            self._attempt([CONTROL_TEXT], threading.Event())
        except (RateLimited, Transient, BadInput):
            return False
        return True

    def _given_up(self, error: Exception, started: float) -> Exception:
        seconds = time.monotonic() - started
        if isinstance(error, RateLimited):
            return ProviderRefused(
                f"Rate limit exceeded during re-embedding ({self.provider}, for {seconds:.0f} s: {error})",
                next_step=f"wait for off-peak hours, raise the provider's limits, or lower --batch-size; {AGAIN}",
            )
        if self._split_instead(error, started, FAILURES_BEFORE_SPLIT) and seconds < self._max_wait:
            return BadInput(str(error))
        return ProviderRefused(
            f"{self.provider} gave no good answer for {seconds:.0f} s: {error}",
            next_step=f"check OPENAI_BASE_URL, the network and the provider's status page, {AGAIN}",
        )
