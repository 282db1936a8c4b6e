"""Rate limits as OpenAI enforces and announces them: two buckets that refill continuously, and their headers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

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
