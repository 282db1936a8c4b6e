"""Points: read in order, counted, compared, written in batches that every server takes, deleted."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.clients.qdrant.transport import NoAnswer, Parts, Qdrant, QdrantError, collection_path, encode
from lib.errors import UsageProblem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PointId = str | int  # a lower-case hyphenated UUID, or an unsigned integer

PAGE = 1000
PAGE_OF_IDS = 5000  # alone they cost hardly more than the request
PAGE_WITH_VECTORS = 256  # larger pages of vectors are read more slowly
DELETE_BATCH = 1000

# "Limit exceeded 100 > 2 for "limit". Help: ..." of strict mode (Qdrant 1.13 and later).
_PAGE_LIMIT = re.compile(r'Limit exceeded \d+ > (\d+) for "limit"')


@dataclass(frozen=True, eq=False)
class Point:
    """One point; `payload` and `vector` ((dims,) float32) are None where they were not asked for, or absent."""

    id: PointId
    payload: dict[str, Any] | None
    vector: NDArray[np.float32] | None


def scroll(
    q: Qdrant,
    name: str,
    *,
    payload: bool | list[str] = False,
    vector: bool = False,
    page: int | None = None,
) -> Iterator[list[Point]]:
    """All points in the order of their ids, page by page, until the server names no next one.

    `payload` may list the keys wanted. Pages shrink to what strict mode allows. Raises NotFound, QdrantError.
    """
    path = collection_path(name, "points", "scroll")
    limit = page or (PAGE_WITH_VECTORS if vector else PAGE if payload else PAGE_OF_IDS)
    body: dict[str, Any] = {"with_payload": payload, "with_vector": vector}
    while True:
        try:
            result = q.json("POST", path, {**body, "limit": limit}, retry=True)
        except QdrantError as error:
            limit = _smaller(error, limit)
            continue
        offset, points = result["next_page_offset"], _points(result.pop("points"))
        yield points
        if offset is None:
            return
        body["offset"] = offset


def retrieve(
    q: Qdrant,
    name: str,
    ids: Sequence[PointId],
    *,
    payload: bool | list[str] = False,
    vector: bool = False,
) -> list[Point]:
    """The points of these ids, in no promised order; ids that the collection does not hold are left out."""
    path = collection_path(name, "points")
    batch = PAGE_WITH_VECTORS if vector else PAGE
    found: list[Point] = []
    for start in range(0, len(ids), batch):
        body = {"ids": list(ids[start : start + batch]), "with_payload": payload, "with_vector": vector}
        found += _points(q.json("POST", path, body, retry=True))
    return found


def raw_points(q: Qdrant, name: str, ids: Sequence[PointId]) -> dict[PointId, tuple[Any, Any]]:
    """Payload and vectors of these points as the server's JSON has them, named vectors and sparse ones included."""
    path = collection_path(name, "points")
    found: dict[PointId, tuple[Any, Any]] = {}
    for start in range(0, len(ids), PAGE_WITH_VECTORS):
        body = {
            "ids": list(ids[start : start + PAGE_WITH_VECTORS]),
            "with_payload": True,
            "with_vector": True,
        }
        for raw in q.json("POST", path, body, retry=True):
            found[raw["id"]] = (raw.get("payload"), raw.get("vector"))
    return found


def count(q: Qdrant, name: str, *, exact: bool = True) -> int:
    """How many points the collection holds. Raises NotFound, QdrantError."""
    return int(
        q.json("POST", collection_path(name, "points", "count"), {"exact": exact}, retry=True)["count"]
    )


def delete_points(q: Qdrant, name: str, ids: Sequence[PointId]) -> None:
    """Delete the points of these ids, and return when it is done; unknown ids are passed over."""
    path = collection_path(name, "points", "delete")
    for start in range(0, len(ids), DELETE_BATCH):
        body = {"points": list(ids[start : start + DELETE_BATCH])}
        q.json("POST", path, body, params={"wait": "true"}, retry=True)


def overwrite_payload(q: Qdrant, name: str, point_id: PointId, payload: dict[str, Any]) -> None:
    """Replace the whole payload of one point, its vector kept, and return when it is done."""
    body = {"payload": payload, "points": [point_id]}
    q.json("PUT", collection_path(name, "points", "payload"), body, params={"wait": "true"}, retry=True)


def _smaller(error: QdrantError, limit: int) -> int:
    allowed = _PAGE_LIMIT.search(error.text) if error.status == 400 else None
    if allowed is None or not 0 < int(allowed[1]) < limit:
        raise error
    return int(allowed[1])


def _points(raws: list[dict[str, Any]]) -> list[Point]:
    """The points in their order. A vector from JSON takes eight times its array's room: each goes as it is read."""
    raws.reverse()
    return [_point(raws.pop()) for _ in range(len(raws))]


def _point(raw: dict[str, Any]) -> Point:
    vector = raw.get("vector")
    if isinstance(vector, dict):
        if any(name and isinstance(one, list) for name, one in vector.items()):
            raise UsageProblem("the collection has named vectors; AutoMem keeps one unnamed vector per point")
        vector = vector.get("")  # an unnamed vector with sparse vectors besides
    if vector is None:
        return Point(raw["id"], raw.get("payload"), None)
    import numpy as np  # 0.1 s, spared where ids and payloads alone are read

    return Point(raw["id"], raw.get("payload"), np.array(vector, dtype=np.float32))


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
