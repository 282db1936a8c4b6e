"""What only the points hold must outlive the collection: their payloads, kept in the spool before the delete."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson

from lib.embedding.kept_points import KeptPoint
from lib.embedding.spool import Spool
from lib.steps.memories import Payloads
from lib.steps.payloads import PointId, standing_payload
from lib.steps.phases import DELETING
from lib.steps.progress import Progress
from lib.vectors.points import Point, retrieve, scroll
from lib.vectors.refusals import QdrantError
from lib.vectors.transport import Qdrant

if TYPE_CHECKING:
    from lib.steps.migration import Migration


def _row(point: Point) -> KeptPoint:
    vector = None if point.vector is None else point.vector.astype("<f4").tobytes()
    return KeptPoint(point.id, orjson.dumps(point.payload or {}), vector)


def keep_payloads(
    qdrant: Qdrant,
    collection: str,
    spool: Spool,
    *,
    first: bool = True,
    add: bool = False,
    progress: Progress | None = None,
) -> int:
    """Keep every live point's payload (fsynced); the `first` reading of a migration forgets those of earlier ones.

    With `add` it is laid over what was kept: for a run that goes on after the delete. What stands there then was
    made anew, what was kept before the delete is all that is left of the old points, and no key that only they held
    is lost.
    """
    if first and not add:
        spool.clear_kept()
    count = 0
    for page in scroll(qdrant, collection, payload=True):
        spool.keep_points(_laid_over(page, spool) if add else [_row(point) for point in page])
        count += len(page)
        if progress:
            progress(len(page))
    return count


def _laid_over(points: list[Point], spool: Spool) -> list[KeptPoint]:
    """The points with what was kept of them before, where they lack it."""
    rows = spool.kept([point.id for point in points])
    before = {one: orjson.loads(row.payload) for one, row in rows.items()}
    laid = []
    for point in points:
        payload = standing_payload(point.payload or {}, before.get(point.id), whole=True)
        laid.append(_row(replace(point, payload=dict(payload or {}))))
    return laid


def payloads_now(run: Migration) -> Payloads:
    """Look payloads up by id: the live points', and once this run has deleted the collection those that it kept."""

    def look_up(ids: Sequence[PointId]) -> dict[PointId, dict[str, Any]]:
        found: dict[PointId, dict[str, Any]] = {}
        if run.reached(DELETING):
            found = {one: orjson.loads(row.payload) for one, row in run.spool.kept(ids).items()}
        with suppress(QdrantError):  # missing, or being restored
            live = retrieve(run.target.qdrant, run.target.collection, ids, payload=True)
            found |= {point.id: point.payload for point in live if point.payload}
        return found

    return look_up


def keep_whole(points: list[Point], spool: Spool) -> None:
    """Keep these points, vectors and all, before they are removed as surplus."""
    spool.keep_points([_row(point) for point in points])
