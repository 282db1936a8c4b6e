"""Refusals and rate-limit headers of an embeddings provider: wait, split the batch, or stop."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from lib.errors import ProviderRefused, UsageProblem

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+")


@dataclass(frozen=True)
class BucketState:
    """One limit as the server sees it: `remaining` of `limit`, full again in `reset_seconds`."""

    limit: float
    remaining: float
    reset_seconds: float

    @property
    def refill(self) -> float | None:
        """Units a second, or None where the numbers are too small to tell.

        Never limit/60: small accounts have their request limit per day.
        """
        used = self.limit - self.remaining
        if used <= 0 or self.reset_seconds < 0.05:  # the reset is rounded to milliseconds
            return None
        return used / self.reset_seconds


@dataclass(frozen=True)
class RateLimits:
    """Both limits, as far as they are announced."""

    requests: BucketState | None
    tokens: BucketState | None


def rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """The `x-ratelimit-*` headers, or None where the server sends none."""
    requests, tokens = _bucket(headers, "requests"), _bucket(headers, "tokens")
    return RateLimits(requests, tokens) if requests or tokens else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `retry-after` (seconds or a date), or None."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = duration_seconds(text)
    if seconds is not None or not text:
        return seconds
    date = email.utils.parsedate_tz(text)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


def duration_seconds(text: str | None) -> float | None:
    """Seconds from `12ms`, `1s`, `6m0s` or a bare number; None where it is none of these."""
    if not text:
        return None
    if _WHOLE.fullmatch(text.strip()):
        return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    return _number(text)


def _bucket(headers: Mapping[str, str], kind: str) -> BucketState | None:
    limit = _number(headers.get(f"x-ratelimit-limit-{kind}"))
    remaining = _number(headers.get(f"x-ratelimit-remaining-{kind}"))
    reset = duration_seconds(headers.get(f"x-ratelimit-reset-{kind}"))
    if not limit or limit <= 0 or remaining is None:
        return None
    return BucketState(limit, remaining, reset or 0.0)


def _number(text: str | None) -> float | None:
    try:
        found = float(text) if text else None
    except ValueError:
        return None
    return found if found is not None and 0 <= found < float("inf") else None


# 429s and 403s with these codes never pass by waiting (https://platform.openai.com/docs/guides/error-codes).
QUOTA_CODES = frozenset(
    [
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_usage_limit_exceeded",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "billing_hard_limit_reached",
        "billing_not_active",
    ]
)
RETRIED_STATUSES = frozenset([408, 409])  # and every 5xx
SPLIT_STATUSES = frozenset([400, 413, 422])  # one text, or the number or size of them, is not acceptable
SETTING_PARAMS = frozenset(["model", "dimensions", "encoding_format"])
MESSAGE_LENGTH = 300

AGAIN = "then run the same command again: it goes on from the embedding cache, nothing is paid for twice"


class RateLimited(Exception):
    """A 429 that passes: `wait_seconds` and `limits` as the server said, or None."""

    def __init__(self, message: str, wait_seconds: float | None, limits: RateLimits | None) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds
        self.limits = limits


class Transient(Exception):
    """408, 409, 5xx (`status`), or no answer at all (None)."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class BadInput(Exception):
    """The batch, or a row in it, is not acceptable: split it, never send it again as it is."""


class BadAnswer(BadInput):
    """An answer that does not fit the question (count, indices, not a number, length): nothing of it is used."""


class BadIndices(ProviderRefused):
    """An answer whose vectors cannot be assigned to the texts: splitting the batch does not help."""

    def __init__(self, message: str) -> None:
        step = f"use an endpoint that numbers its vectors, or --batch-size 1 (one text a request); {AGAIN}"
        super().__init__(message, next_step=step)


class WrongWidth(UsageProblem):
    """The model makes vectors of another size than VECTOR_SIZE."""


@dataclass(frozen=True)
class Refusal:
    """An error answer: its status, headers, and what its body names."""

    status: int
    headers: Mapping[str, str]
    code: str = ""
    kind: str = ""
    param: str = ""
    message: str = ""


def refusal_of(status: int, headers: Mapping[str, str], body: object, secret: str) -> Refusal:
    """Read an error body: OpenAI's `{"error": {...}}`, its inside, or whatever a compatible server writes."""
    if isinstance(body, dict) and isinstance(body.get("error"), (dict, str)):
        body = body["error"]
    fields = body if isinstance(body, dict) else {"message": body}
    texts = {
        name: redacted(str(fields.get(name) or ""), secret) for name in ("code", "type", "param", "message")
    }
    if not texts["message"]:
        texts["message"] = redacted(str(fields.get("detail") or ""), secret)
    return Refusal(status, headers, texts["code"], texts["type"], texts["param"], texts["message"])


def context_limit(text: str) -> int | None:
    """The most tokens of one text, if a refusal says it ("maximum context length is 8192 tokens"); else None."""
    found = re.search(r"maximum context length (?:is|of) (\d[\d,]*)", text, re.IGNORECASE)
    return int(found[1].replace(",", "")) if found else None


def redacted(text: str, secret: str) -> str:
    """One short line without the key, nor anything that looks like one, masked or not."""
    if secret:
        text = text.replace(secret, "***")
    text = re.sub(r"\b(?:sk|pk|pa|rk)-[\w*.-]{4,}", "***", text)
    text = re.sub(r"(?i)bearer\s+\S+", "Bearer ***", text)
    return " ".join(text.split())[:MESSAGE_LENGTH]


def judged(refusal: Refusal, sent_tokens: int, provider: str) -> Exception:
    """The exception to raise for an error answer; `provider` names model and endpoint to the operator."""
    status = refusal.status
    said = f"{status} {refusal.code or refusal.kind}".strip()
    told = f"{said}: {refusal.message}" if refusal.message else said
    if status == 402 or refusal.code in QUOTA_CODES or refusal.kind in QUOTA_CODES:
        step = f"add credit or raise the spending limit at the provider, {AGAIN}"
        return ProviderRefused(f"{provider} refused: {told}", next_step=step)
    if status == 429:
        limits = rate_limits(refusal.headers)
        if limits and limits.tokens and sent_tokens > limits.tokens.limit:
            return BadInput(told)  # larger than the whole bucket: waiting would not help
        return RateLimited(told, retry_after(refusal.headers), limits)
    if status in RETRIED_STATUSES or status >= 500:
        return Transient(told, status)
    if status in SPLIT_STATUSES and refusal.param not in SETTING_PARAMS and "model" not in refusal.code:
        return BadInput(told)
    return ProviderRefused(
        f"{provider} refused: {said if status == 401 else told}", next_step=_next_step(status)
    )


def _next_step(status: int) -> str:
    if status == 401:
        return f"check OPENAI_API_KEY and OPENAI_BASE_URL, {AGAIN}"
    if status == 403:
        return f"the key lacks the permission for this model: grant it or use another key, {AGAIN}"
    return f"check EMBEDDING_MODEL, VECTOR_SIZE and OPENAI_BASE_URL, {AGAIN}"
