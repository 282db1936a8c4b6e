"""Answers of an embeddings provider: vectors, checked; and the exception for each refusal (wait, split, or stop)."""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pybase64

from lib.clients.embeddings.rate_limits import RateLimited, rate_limits, retry_after
from lib.dimensions import OLLAMA, SETTING_NAMES, VOYAGE, EmbeddingSpec, facts_of
from lib.errors import ProviderRefused, UsageProblem

# 429s and 403s with these codes never pass by waiting (https://platform.openai.com/docs/guides/error-codes).
QUOTA_CODES = {"insufficient_quota", "credit_balance_exhausted", "organization_usage_limit_exceeded"}
QUOTA_CODES |= {"organization_spend_limit_exceeded", "project_spend_limit_exceeded"}
QUOTA_CODES |= {"billing_hard_limit_reached", "billing_not_active"}
RETRIED_STATUSES = {408, 409}  # and every 5xx
SPLIT_STATUSES = {400, 413, 422}  # one text, or their number or size, is not acceptable
# Voyage's 429 has no code, only a sentence. An account without a payment method has 3 requests a minute.
_BILLING = re.compile(r"\b(billing|payment|credits?)\b", re.IGNORECASE)
SETTING_PARAMS = {"model", "dimensions", "encoding_format"}
MESSAGE_LENGTH = 300

AGAIN = "then run the same command again: it resumes from the embedding cache, nothing is paid for twice"
FloatArray = npt.NDArray[np.float32]
NORM_TOLERANCE = 0.01


class Transient(Exception):
    """408, 409, 5xx (`status`), or no answer at all (None)."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class BadInput(Exception):
    """The batch, or a text in it, is not acceptable: split it, never send it again as it is."""


class BadAnswer(BadInput):
    """An answer that does not fit the request (count, not a number, length): nothing of it is used."""


class WrongWidth(UsageProblem):
    """The model makes vectors of another size than VECTOR_SIZE."""


def refusal_error(
    status: int,
    headers: Mapping[str, str],
    body: object,
    *,
    secret: str,
    sent_tokens: int,
    provider: str,
    spec: EmbeddingSpec,
) -> Exception:
    """The exception to raise for an error answer. No message shows `secret`, the API key."""
    # OpenAI's `{"error": {...}}`, its inside, or another server's error body.
    inside = body["error"] if isinstance(body, dict) and isinstance(body.get("error"), (dict, str)) else body
    fields = inside if isinstance(inside, dict) else {"message": inside}
    found = [*map(fields.get, ("code", "type", "param")), fields.get("message") or fields.get("detail")]
    code, kind, param, message = (redacted(str(value or ""), secret) for value in found)
    name = f"{status} {code or kind}".strip()
    text = f"{name}: {message}" if message else name
    billing = spec.provider == VOYAGE and status == 429 and _BILLING.search(message)
    if status == 402 or billing or code in QUOTA_CODES or kind in QUOTA_CODES:
        step = f"add credit or raise the spending limit at the provider,\n{AGAIN}"
        return ProviderRefused(f"{provider} refused: {text}", next_step=step)
    if status == 429:
        limits = rate_limits(headers)
        if limits and limits.tokens and sent_tokens > limits.tokens.limit:
            return BadInput(text)  # larger than the whole bucket: waiting would not help
        return RateLimited(text, retry_after(headers), limits)
    if status in RETRIED_STATUSES or status >= 500:
        return Transient(text, status)
    if status in SPLIT_STATUSES and param not in SETTING_PARAMS and "model" not in code:
        return BadInput(text)
    shown = name if status == 401 else text  # the text of a 401 may quote the key
    return ProviderRefused(f"{provider} refused: {shown}", next_step=f"{_step(status, spec)},\n{AGAIN}")


def _step(status: int, spec: EmbeddingSpec) -> str:
    """What the operator can do about a refusal with this status."""
    names = SETTING_NAMES[spec.provider]
    if status == 404 and spec.provider == OLLAMA:
        return f"on the Ollama server:\nollama pull {spec.model}\nor check {names.model} and {names.endpoint}"
    if 300 <= status < 400 and names.endpoint:
        return f"{names.endpoint} is redirected, and keys are not sent on: set it to the address of the API itself"
    if status == 401 or (status == 403 and not names.key):
        return f"check {' and '.join(filter(None, (names.key, names.endpoint)))}"
    if status == 403:
        return "the key lacks the permission for this model: grant it or use another key"
    return f"check {names.model}, VECTOR_SIZE and {names.endpoint}"


def context_limit(text: str) -> int | None:
    """The most tokens of one text, if a refusal names it ("maximum context length is 8192 tokens"), or None."""
    found = re.search(r"maximum context length (?:is|of) (\d[\d,]*)", text, re.IGNORECASE)
    return int(found[1].replace(",", "")) if found else None


def redacted(text: str, secret: str) -> str:
    """One short line without the key, or anything that looks like a key, masked or not."""
    if secret:
        text = text.replace(secret, "***")
    text = re.sub(r"\b(?:sk|pk|pa|rk)-[\w*.-]{4,}", "***", text)
    text = re.sub(r"(?i)bearer\s+\S+", "Bearer ***", text)
    return " ".join(text.split())[:MESSAGE_LENGTH]


@dataclass(frozen=True)
class Answer:
    """`vectors` (n, size) float32 in the order of the texts, each of length 1; `tokens` as billed."""

    vectors: FloatArray
    tokens: int


def parsed(content: bytes) -> dict[str, object]:
    """The answer's JSON object. Raises BadAnswer."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        try:
            body = json.loads(content)  # accepts NaN, which servers written in Python may send
        except (ValueError, RecursionError) as error:
            raise BadAnswer("the answer is not JSON") from error
    if not isinstance(body, dict):
        raise BadAnswer("the answer is not a JSON object")
    return body


def read_answer(body: dict[str, object], count: int, spec: EmbeddingSpec) -> Answer:
    """Check and decode the vectors for `count` texts. Raises BadAnswer, ProviderRefused, WrongWidth."""
    data = body.get("data")
    if not isinstance(data, list) or len(data) != count:
        raise BadAnswer(f"{len(data) if isinstance(data, list) else 'no'} vectors came back for {count} texts")
    indices = _indices(data)
    vectors = np.empty((count, spec.size), dtype=np.float32)
    while data:
        item = data.pop()  # frees the text of each vector while the array fills
        vectors[indices.pop()] = _row(item.get("embedding"), spec)
    return Answer(_unit(vectors, spec), billed_tokens(body))


def _indices(data: list[Any]) -> list[int]:
    """The index of the text of each vector; without any index the order is that of the texts.

    If one index alone is missing, it is the one that is left: encoders that omit zeros leave out the 0 (protobuf's
    JSON, as Gemini's endpoint sends it). Raises ProviderRefused if they cannot be assigned: to split does not help.
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
        step = f"use an endpoint that numbers its vectors, or --batch-size 1 (one text per request),\n{AGAIN}"
        raise ProviderRefused("the answer's indices do not say which vector is which text's", next_step=step)
    return [int(index) for index in given if index is not None]


def _row(embedding: object, spec: EmbeddingSpec) -> FloatArray:
    try:
        if isinstance(embedding, str):
            row = np.frombuffer(pybase64.b64decode(embedding, validate=True), dtype="<f4")
        else:  # from a server that ignores base64; None represents NaN in JSON
            row = np.asarray(embedding, dtype=np.float32)
    except (ValueError, TypeError, OverflowError, binascii.Error) as error:
        raise BadAnswer("a vector that is neither base64 nor a list of numbers") from error
    if row.ndim != 1 or len(row) == 0:
        raise BadAnswer("a vector that is not a list of numbers")
    if len(row) != spec.size:
        or_else = f"or set {SETTING_NAMES[spec.provider].model} to a model that makes {spec.size}d"
        text = f"{spec.model} answered with {len(row)}d vectors, VECTOR_SIZE is {spec.size}"
        raise WrongWidth(text, next_step=f"export VECTOR_SIZE={len(row)}\n{or_else}")
    return row


def _unit(vectors: FloatArray, spec: EmbeddingSpec) -> FloatArray:
    """Check the lengths. OpenAI's and Voyage's models answer with length 1; other vectors are scaled to it."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    if not np.isfinite(norms).all():
        raise BadAnswer("a vector with values that are not numbers")
    off = np.abs(norms - 1) > NORM_TOLERANCE
    if not off.any():
        return vectors
    if facts_of(spec.model).unit or (norms < 1e-6).any():
        raise BadAnswer(f"a vector of length {norms[off][0]:.3g} instead of 1")
    return np.asarray(vectors / norms[:, None], dtype=np.float32)


def billed_tokens(body: dict[str, object]) -> int:
    """The tokens that an answer is billed for, whether or not its vectors can be used; 0 if it names none."""
    usage = body.get("usage")
    billed = usage.get("total_tokens") or usage.get("prompt_tokens") if isinstance(usage, dict) else 0
    return max(0, billed) if isinstance(billed, int) else 0  # a negative number would lower the sum
