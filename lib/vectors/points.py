"""Points of a collection: read in order, counted, deleted, given another payload."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.errors import UsageProblem
from lib.vectors.address import collection_path
from lib.vectors.refusals import QdrantError
from lib.vectors.transport import Qdrant

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
