"""What an answer's headers say about rate limits (https://platform.openai.com/docs/guides/rate-limits)."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

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
