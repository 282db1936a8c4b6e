"""When the next request may leave: buckets fed by the answers' headers, shared by all workers.

Where the server announces its limits, requests leave as fast as its own buckets refill and hardly one is
refused. Where it does not, the number of requests in flight adapts: halved by a refusal, growing with success.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lib.clients.embeddings.refusals import BucketState, RateLimited, RateLimits

POLL_SECONDS = 0.1  # how soon a waiting worker sees that it should stop
SLOW_DOWN = 0.85  # of the announced rate, after a refusal: another process may share the key
SLOWEST = 0.1
RECOVER_PER_SECOND = 0.03
FIRST_WAIT_SECONDS = 1.0  # after a refusal that does not say how long
LONGEST_WAIT_SECONDS = 30.0


class Stopped(Exception):
    """The caller asked to stop while a request waited for its turn."""


@dataclass(frozen=True)
class PaceCounts:
    """Requests sent and refused by a rate limit so far; seconds until the gate opens (0: open)."""

    requests: int
    rate_limited: int
    waiting_seconds: float


def estimated_tokens(texts: Sequence[str]) -> int:
    """What the limiter counts: about a quarter of the characters, not the real tokens."""
    return sum(math.ceil(len(text) / 4) for text in texts)


class _Bucket:
    """Our picture of one of the server's buckets; unlimited until an answer describes it."""

    def __init__(self) -> None:
        self.capacity = math.inf
        self.level = math.inf
        self._rate: float | None = None
        self._seen = 0.0

    def refill(self, now: float, share: float) -> None:
        if self._rate is not None:
            self.level = min(self.capacity, self.level + (now - self._seen) * self._rate * share)
        self._seen = now

    def learn(self, state: BucketState, in_flight: float) -> None:
        """Believe the server, less what it may not have seen yet."""
        left = state.remaining - in_flight
        # Without a rate only the answers raise the level; with one, an answer that was overtaken must not.
        self.level = left if self._rate is None else min(self.level, left)
        self.capacity = state.limit
        self._rate = state.refill or self._rate

    def rate_and_level(self) -> tuple[float, float] | None:
        """Units a second and units left; None where no answer has told."""
        return (self._rate, self.level) if self._rate else None

    def delay(self, wanted: float, share: float) -> float:
        """Seconds until `wanted` is there; what exceeds the whole bucket waits for a full one."""
        lacking = min(wanted, self.capacity) - self.level
        if lacking <= 0:
            return 0.0
        return lacking / (self._rate * share) if self._rate else POLL_SECONDS


class Pacer:
    """The turnstile in front of one key's requests. Thread-safe.

    Every `acquire` is answered by exactly one of `answered`, `refused` and `failed`. A turn that is more than
    `longest_wait_seconds` away is not waited for.
    """

    def __init__(
        self, longest_wait_seconds: float = 600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._longest_wait = longest_wait_seconds
        self._clock = clock
        self._changed = threading.Condition()
        self._requests, self._tokens = _Bucket(), _Bucket()
        self._in_flight = 0
        self._tokens_in_flight = 0
        self._probed = False  # one request goes ahead alone and brings the first headers
        self._headers_seen = False
        self._concurrency = math.inf
        self._gate = self._cut_at = -math.inf
        self._share, self._share_at = 1.0, clock()
        self._in_a_row = 0
        self._sent = self._rate_limited = 0

    @property
    def token_limit(self) -> float:
        """Tokens that fit the server's bucket at all; infinite where it announces none."""
        return self._tokens.capacity

    def counts(self) -> PaceCounts:
        """What happened so far."""
        with self._changed:
            return PaceCounts(self._sent, self._rate_limited, max(0.0, self._gate - self._clock()))

    def buckets(self) -> list[tuple[float, float] | None]:
        """(refill a second, what is left now) of the request and the token limit; None where that is not known."""
        with self._changed:
            return [bucket.rate_and_level() for bucket in (self._requests, self._tokens)]

    def acquire(self, tokens: int, stop: threading.Event) -> None:
        """Wait for the turn of a request of `tokens` estimated tokens. Raises Stopped, and RateLimited."""
        with self._changed:
            while True:
                if stop.is_set():
                    raise Stopped
                delay = self._delay(tokens)
                if delay <= 0:
                    break
                if delay > self._longest_wait:
                    raise RateLimited(f"its limits allow the next request in {delay:.0f} s", delay, None)
                self._changed.wait(min(delay, POLL_SECONDS))
            self._requests.level -= 1
            self._tokens.level -= tokens
            self._in_flight += 1
            self._tokens_in_flight += tokens
            self._sent += 1

    def answered(self, tokens: int, limits: RateLimits | None) -> None:
        """The server took the request; `limits` are its headers."""
        with self._changed:
            self._land(tokens)
            self._probed = True
            self._in_a_row = 0
            self._concurrency += 1 / self._concurrency
            self._learn(limits)

    def refused(self, tokens: int, wait_seconds: float | None, limits: RateLimits | None) -> None:
        """A rate limit: a gate holds everyone for the time the server names, and up to a tenth more."""
        with self._changed:
            now = self._clock()
            in_flight = self._in_flight
            self._refund(tokens)
            self._learn(limits)
            self._rate_limited += 1
            if wait_seconds is None:
                wait_seconds = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**self._in_a_row)
            if now - self._cut_at >= 1.0:  # a burst of refusals is one event
                self._cut_at = now
                self._in_a_row = min(self._in_a_row + 1, 10)
                self._share = max(SLOWEST, self._share * SLOW_DOWN)
                if not self._headers_seen:
                    self._concurrency = max(1.0, min(self._concurrency, in_flight) / 2)
            self._gate = max(self._gate, now + wait_seconds * (1 + random.uniform(0, 0.1)))

    def failed(self, tokens: int) -> None:
        """No answer, or one that says nothing about limits."""
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
        return max(self._requests.delay(1, self._share), self._tokens.delay(tokens, self._share))

    def _learn(self, limits: RateLimits | None) -> None:
        if limits is None:
            return
        self._headers_seen = True
        if limits.requests:
            self._requests.learn(limits.requests, self._in_flight)
        if limits.tokens:
            self._tokens.learn(limits.tokens, self._tokens_in_flight)

    def _refund(self, tokens: int) -> None:
        self._requests.level += 1
        self._tokens.level += tokens
        self._land(tokens)

    def _land(self, tokens: int) -> None:
        self._in_flight -= 1
        self._tokens_in_flight -= tokens
        self._changed.notify_all()
