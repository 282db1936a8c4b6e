"""Strict mode: batch sizes, query limits and rate limits, as 1.18.3 answers them.

https://qdrant.tech/documentation/guides/administration/#strict-mode
"""

from __future__ import annotations

import math
import time
from typing import Any

from lib.sandbox.qdrant_server.collection import Collection
from lib.sandbox.qdrant_server.errors import Refusal, bad_request

MINUTE = 60.0


def check_write(collection: Collection, points: int) -> None:
    """Refusal (400, 429) for a write of `points` points that strict mode forbids."""
    strict = _strict(collection)
    largest = strict.get("upsert_max_batchsize")
    if largest is not None and points > largest:
        raise bad_request(_too_many(points, largest, "upsert limit"))
    _spend(collection, "Write", strict.get("write_rate_limit"), points)


def check_read(collection: Collection, request: dict[str, Any]) -> None:
    """Refusal (400, 429) for a read that strict mode forbids."""
    strict = _strict(collection)
    asked, largest = request.get("limit"), strict.get("max_query_limit")
    if largest is not None and asked is not None and asked > largest:
        raise bad_request(_too_many(asked, largest, "limit"))
    _spend(collection, "Read", strict.get("read_rate_limit"), 1)


def _strict(collection: Collection) -> dict[str, Any]:
    strict: dict[str, Any] = collection.config.get("strict_mode_config", {})
    return strict if strict.get("enabled") else {}


def _too_many(asked: int, largest: int, what: str) -> str:
    advice = f'Help: Reduce the "{what}" parameter to or below {largest}.'
    return f'Limit exceeded {asked} > {largest} for "{what}". {advice}'


def _spend(collection: Collection, kind: str, per_minute: int | None, cost: int) -> None:
    if per_minute is None:
        return
    refused = f"Rate limiting exceeded: {kind} rate limit exceeded"
    if cost > per_minute:
        raise Refusal(
            429, f"{refused}, request larger than rate limiter capacity, please try to split your request"
        )
    with collection.lock:
        at_first = per_minute - 1 if kind == "Write" else per_minute  # as seen: the creation has spent one
        tokens, then = collection.rate_tokens.get(kind, (float(at_first), time.monotonic()))
        now = time.monotonic()
        tokens = min(per_minute, tokens + (now - then) * per_minute / MINUTE)
        if tokens < cost:
            seconds = math.ceil((cost - tokens) * MINUTE / per_minute)
            said = f"Operation requires {cost} tokens but only {tokens:.1f} were available. Retry after {seconds}s"
            raise Refusal(429, f"{refused}: {said}", headers={"retry-after": str(seconds)})
        collection.rate_tokens[kind] = (tokens - cost, now)
