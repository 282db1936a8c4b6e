"""Points written in batches that every Qdrant server takes; rows that it refuses are singled out."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.vectors.address import collection_path
from lib.vectors.body import Parts
from lib.vectors.points import PointId
from lib.vectors.refusals import NoAnswer, QdrantError
from lib.vectors.transport import Qdrant, encode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BATCH_POINTS = 256
# The server takes 32 MiB, and answers 400 above (seen on 1.11.3 and 1.18.3).
BATCH_BYTES = 30 * 1024 * 1024

# "Limit exceeded 11 > 10 for "upsert limit". Help: ..." of strict mode (Qdrant 1.13 and later).
_UPSERT_LIMIT = re.compile(r'Limit exceeded \d+ > (\d+) for "upsert limit"')
_OF_THE_ROWS = (400, 422)


@dataclass(frozen=True)
class Rejected:
    """A row that is not in the collection, and why."""

    id: PointId
    reason: str


@dataclass(frozen=True)
class _Row:
    id: PointId
    json: bytes


def upsert(
    q: Qdrant,
    name: str,
    ids: Sequence[PointId],
    vectors: NDArray[np.float32],
    payloads: Sequence[dict[str, Any]],
    *,
    batch_points: int = BATCH_POINTS,
) -> list[Rejected]:
    """Write points and wait until they are in; returns the rows that the server, or JSON, does not take.

    `vectors` is (n, dims) float32, one row per id and payload. A batch is not atomic: its other rows are in.
    Raises QdrantError for what no single row is to blame for: wrong dims, a full disk, a limit of the collection.
    """
    rows: list[_Row] = []
    rejected: list[Rejected] = []
    for row in _rows(ids, vectors, payloads):
        (rows if isinstance(row, _Row) else rejected).append(row)  # type: ignore[arg-type]
    path = collection_path(name, "points")
    todo = list(_batches(rows, batch_points))[::-1]
    while todo:
        batch = todo.pop()
        try:
            _put(q, path, batch)
        except NoAnswer:
            preflight_write(q, name)  # a refusal from the headers hangs a large body: say it if it is that
            raise
        except QdrantError as error:
            if len(batch) == 1 and error.status in _OF_THE_ROWS and not _of_the_collection(error):
                rejected.append(Rejected(batch[0].id, error.text))
            else:
                todo += _split(batch, error)[::-1]
    return rejected


def preflight_write(q: Qdrant, name: str) -> None:
    """Raise AccessRefused unless points may be written: a small request that needs the same right."""
    body = {"points": [str(uuid.uuid4())]}  # the delete of a point that nobody has
    q.json("POST", collection_path(name, "points", "delete"), body, params={"wait": "true"}, retry=True)


def _rows(
    ids: Sequence[PointId], vectors: NDArray[np.float32], payloads: Sequence[dict[str, Any]]
) -> Iterator[_Row | Rejected]:
    import numpy as np
    import orjson

    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    finite = np.asarray(np.isfinite(vectors).all(axis=1), dtype=np.bool_)
    for index, (point_id, payload) in enumerate(zip(ids, payloads, strict=True)):
        if not finite[index]:
            yield Rejected(point_id, "its vector holds a number that is not finite")
            continue
        try:
            json = encode({"id": point_id, "vector": vectors[index], "payload": payload})
        except orjson.JSONEncodeError as error:
            yield Rejected(point_id, f"its payload is not JSON: {error}")
            continue
        if len(json) < BATCH_BYTES:
            yield _Row(point_id, json)
        else:
            yield Rejected(point_id, f"its {len(json)} bytes are more than one request may hold")


def _batches(rows: Sequence[_Row], points: int) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    size = 0
    for row in rows:
        if batch and (len(batch) == points or size + len(row.json) >= BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row.json) + 1
    if batch:
        yield batch


def _put(q: Qdrant, path: str, batch: Sequence[_Row]) -> None:
    rows = [part for row in batch for part in (b",", row.json)]
    q.json("PUT", path, Parts([b'{"points":[', *rows[1:], b"]}"]), params={"wait": "true"}, retry=True)


def _split(batch: list[_Row], error: QdrantError) -> list[list[_Row]]:
    """Smaller batches to send instead of a refused one; raises `error` where smaller ones would fail too."""
    allowed = _UPSERT_LIMIT.search(error.text)
    if allowed and 0 < int(allowed[1]) < len(batch):
        return list(_batches(batch, int(allowed[1])))
    # 429 without Retry-After: the request is larger than the rate limit. 413: a proxy's limit.
    too_large = error.status == 413 or (error.status == 429 and not error.waitable)
    if len(batch) == 1 or not (too_large or error.status in _OF_THE_ROWS) or _of_the_collection(error):
        raise error
    half = len(batch) // 2
    return [batch[:half], batch[half:]]


def _of_the_collection(error: QdrantError) -> bool:
    """Whether every row would be refused alike: all share their dims, and strict mode says "Help"."""
    return "Vector dimension error" in error.text or "Help:" in error.text
