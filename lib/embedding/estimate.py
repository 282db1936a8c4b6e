"""How long a purchase will take, from the first request as it was measured and the limits as the server told them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lib.embedding.pacing import Pacer


@dataclass(frozen=True)
class Expected:
    """Seconds that the rest will take, and what sets the pace."""

    seconds: float
    paced_by: str

    @property
    def text(self) -> str:
        """For people."""
        minutes, seconds = divmod(math.ceil(self.seconds), 60)
        return f"{f'{minutes} min ' if minutes else ''}{seconds} s, paced by {self.paced_by}"


def expected(
    pacer: Pacer, request_seconds: float, texts: int, tokens: int, *, workers: int, batch_size: int
) -> Expected:
    """For `texts` of `tokens` in all, by so many workers; `request_seconds` is what one full request took."""
    requests = math.ceil(texts / batch_size)
    rounds = math.ceil(requests / workers)
    found = [Expected(rounds * request_seconds, f"{workers} workers, {request_seconds:.2f} s a request")]
    for name, wanted, bucket in zip(("requests", "tokens"), (requests, tokens), pacer.buckets(), strict=True):
        if bucket is not None:
            rate, level = bucket
            seconds = max(0.0, wanted - level) / rate
            found.append(Expected(seconds, f"the provider's limit of {rate * 60:,.0f} {name} a minute"))
    return max(found, key=lambda one: one.seconds)
