"""Rate limits of one key: what the headers announce, and when the next request may leave, shared by all workers.

If the server announces its limits, requests leave as fast as its buckets refill, and hardly one is refused. If it does
not, the number of requests in flight adapts: halved by a refusal, growing with success.
"""

from __future__ import annotations

import email.utils
import math
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lib.concurrency import Cancelled

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+")
_LONGEST_RESET = 3e6  # seconds, a month: some gateways send a time since 1970 instead of a duration


@dataclass(frozen=True)
class BucketState:
    """One limit as the server sees it: `remaining` of `limit`, full again in `reset_seconds`."""

    limit: float
    remaining: float
    reset_seconds: float

    @property
    def refill(self) -> float | None:
        """Units per second, or None if the numbers are too small to tell. Never limit/60: it may be per day."""
        used = self.limit - self.remaining
        known = used > 0 and self.reset_seconds >= 0.05  # the reset is rounded to milliseconds
        return used / self.reset_seconds if known else None


@dataclass(frozen=True)
class RateLimits:
    """Both limits, as far as they are announced."""

    requests: BucketState | None
    tokens: BucketState | None


class RateLimited(Exception):
    """A 429 that passes: `wait_seconds` and `limits` from its headers, or None."""

    def __init__(self, message: str, wait_seconds: float | None, limits: RateLimits | None) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds
        self.limits = limits


def rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """The `x-ratelimit-*` headers, or None if the server sends none."""
    requests, tokens = _bucket(headers, "requests"), _bucket(headers, "tokens")
    return RateLimits(requests, tokens) if requests or tokens else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `retry-after` (seconds or a date), or None."""
    milliseconds, text = _number(headers.get("retry-after-ms")), headers.get("retry-after")
    if milliseconds is not None:
        return milliseconds / 1000
    seconds = duration_seconds(text)
    date = email.utils.parsedate_tz(text) if text and seconds is None else None
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else seconds


def duration_seconds(text: str | None) -> float | None:
    """Seconds from `12ms`, `1s`, `6m0s` or a bare number; None for any other text."""
    if text and _WHOLE.fullmatch(text.strip()):
        return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    return _number(text)


def _bucket(headers: Mapping[str, str], kind: str) -> BucketState | None:
    limit = _number(headers.get(f"x-ratelimit-limit-{kind}"))
    remaining = _number(headers.get(f"x-ratelimit-remaining-{kind}"))
    reset = duration_seconds(headers.get(f"x-ratelimit-reset-{kind}"))
    known = reset if reset and reset < _LONGEST_RESET else 0.0
    return None if not limit or remaining is None else BucketState(limit, remaining, known)


def _number(text: str | None) -> float | None:
    try:
        found = float(text) if text else None
    except ValueError:
        return None
    return found if found is not None and 0 <= found < math.inf else None


def estimated_tokens(texts: Sequence[str]) -> int:
    """What the rate limiter counts: about a quarter of the characters, not the real tokens."""
    return sum(math.ceil(len(text) / 4) for text in texts)


POLL_SECONDS = 0.1  # how soon a waiting worker notices a stop
SLOW_DOWN = 0.85  # of the announced rate, after a refusal: another process may use the same key
SLOWEST = 0.1
RECOVER_PER_SECOND = 0.03
FIRST_WAIT_SECONDS = 1.0  # after a refusal without a retry-after header, or with one of 0
LONGEST_WAIT_SECONDS = 30.0


class _Bucket:
    """Our estimate of one of the server's buckets; unlimited until an answer describes it."""

    def __init__(self) -> None:
        self.capacity = math.inf
        self.level = math.inf
        self.rate: float | None = None  # units per second
        self._seen = 0.0

    def refill(self, now: float, share: float) -> None:
        if self.rate is not None:
            self.level = min(self.capacity, self.level + (now - self._seen) * self.rate * share)
        self._seen = now

    def learn(self, state: BucketState, in_flight: float) -> None:
        """Take over the server's numbers, less the requests that it may not have counted yet."""
        left = state.remaining - in_flight
        # Without a known rate only answers raise the level. With one, an answer that arrives late must not raise it.
        self.level = left if self.rate is None else min(self.level, left)
        self.capacity = state.limit
        self.rate = state.refill or self.rate

    def delay(self, wanted: float, share: float, *, awaited: bool) -> float:
        """Seconds until `wanted` units are available, or the bucket is full if `wanted` exceeds it.

        `awaited`: an answer will come, which raises the level. Without it and a rate, only a request can find out.
        """
        lacking = min(wanted, self.capacity) - self.level
        if lacking <= 0:
            return 0.0
        return lacking / (self.rate * share) if self.rate else POLL_SECONDS * awaited


class Pacer:
    """Decides when each request may leave. Thread-safe.

    After each `acquire` comes exactly one call of `answered`, `refused` or `failed`. It raises RateLimited instead of
    waiting for longer than `longest_wait_seconds`.
    """

    def __init__(self, longest_wait_seconds: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_wait, self._clock = longest_wait_seconds, clock
        self._changed = threading.Condition()
        self._requests, self._tokens = _Bucket(), _Bucket()
        self._in_flight = self._tokens_in_flight = 0
        self._probed = False  # the first request is sent alone and brings the first headers
        self._headers_seen = False
        self._concurrency = math.inf
        self._gate = self._cut_at = -math.inf
        self._share, self._share_at = 1.0, clock()
        self._in_a_row = 0
        self.requests = self.rate_limited = 0  # sent so far, and refused by a rate limit

    @property
    def token_limit(self) -> float:
        """Tokens in a full bucket of the server; infinite if it announces none."""
        return self._tokens.capacity

    def waiting_seconds(self) -> float:
        """Seconds for which a rate limit still delays all requests; 0 if it does not, or if `acquire` gives up."""
        with self._changed:
            delay = self._gate - self._clock()
            return delay if 0 < delay <= self._longest_wait else 0.0

    def buckets(self) -> list[tuple[float, float] | None]:
        """(units per second, units left) of the request limit and of the token limit; None if not known."""
        with self._changed:
            return [(one.rate, one.level) if one.rate else None for one in (self._requests, self._tokens)]

    def acquire(self, tokens: int, stop: threading.Event) -> None:
        """Wait until a request of `tokens` estimated tokens may leave. Raises Cancelled, RateLimited."""
        with self._changed:
            while not stop.is_set() and (delay := self._delay(tokens)) > 0:
                if delay > self._longest_wait:
                    raise RateLimited("its limits delay all requests", delay, None)
                self._changed.wait(min(delay, POLL_SECONDS))
            if stop.is_set():
                raise Cancelled
            self._requests.level -= 1
            self._tokens.level -= tokens
            self._in_flight += 1
            self._tokens_in_flight += tokens
            self.requests += 1

    def answered(self, tokens: int, limits: RateLimits | None) -> None:
        """Note a request that the server accepted, with the limits from its headers."""
        with self._changed:
            self._land(tokens)
            self._probed = True
            self._in_a_row = 0
            self._concurrency += 1 / self._concurrency
            self._learn(limits)

    def refused(self, tokens: int, wait_seconds: float | None, limits: RateLimits | None) -> None:
        """Note a 429: all requests are held for the time that the server names, and up to a tenth or 30 s more."""
        with self._changed:
            now = self._clock()
            in_flight = self._in_flight
            self._refund(tokens)
            self._learn(limits)
            self.rate_limited += 1
            if not wait_seconds:
                wait_seconds = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**self._in_a_row)
            if now - self._cut_at >= 1.0:  # a burst of refusals counts once
                self._cut_at = now
                self._in_a_row = min(self._in_a_row + 1, 10)
                self._share = max(SLOWEST, self._share * SLOW_DOWN)
                if not self._headers_seen:
                    self._concurrency = max(1.0, min(self._concurrency, in_flight) / 2)
            spread = random.uniform(0, min(wait_seconds / 10, LONGEST_WAIT_SECONDS))
            self._gate = max(self._gate, now + wait_seconds + spread)

    def failed(self, tokens: int) -> None:
        """Note a request without an answer, or with an error other than 429."""
        with self._changed:
            self._refund(tokens)

    def _delay(self, tokens: int) -> float:
        now = self._clock()
        if now < self._gate:
            return self._gate - now
        if self._in_flight >= (self._concurrency if self._probed else 1):
            return POLL_SECONDS
        self._share = min(1.0, self._share + (now - self._share_at) * RECOVER_PER_SECOND)
        self._share_at = now
        self._requests.refill(now, self._share)
        self._tokens.refill(now, self._share)
        awaited = self._in_flight > 0
        wanted = ((self._requests, 1), (self._tokens, tokens))
        return max(bucket.delay(units, self._share, awaited=awaited) for bucket, units in wanted)

    def _learn(self, limits: RateLimits | None) -> None:
        self._headers_seen |= limits is not None
        if limits and limits.requests:
            self._requests.learn(limits.requests, self._in_flight)
        if limits and limits.tokens:
            self._tokens.learn(limits.tokens, self._tokens_in_flight)

    def _refund(self, tokens: int) -> None:
        self._requests.level += 1
        self._tokens.level += tokens
        self._land(tokens)

    def _land(self, tokens: int) -> None:
        self._in_flight -= 1
        self._tokens_in_flight -= tokens
        self._changed.notify_all()
