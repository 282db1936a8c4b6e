"""The provider behind the openai package: one request, its answer as JSON, every refusal by its meaning."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from lib.addresses import is_this_machine
from lib.dimensions import EmbeddingSpec, native_size, takes_dimensions
from lib.embedding.answers import parsed
from lib.embedding.endpoint import OPENAI_BASE_URL, public_url
from lib.embedding.pacing import estimated_tokens
from lib.embedding.refusals import Transient, judged, redacted, refusal_of
from lib.errors import UsageProblem
from lib.http_policy import Unbounded, httpx_hooks, joined

if TYPE_CHECKING:
    import openai

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

        Raises RateLimited, Transient, BadInput or ProviderRefused for any other (lib/embedding/refusals.py).
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
