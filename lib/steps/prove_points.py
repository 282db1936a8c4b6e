"""Is every memory in the collection, with the vector that was bought for it?"""

from __future__ import annotations

from collections.abc import Iterable

from lib.errors import VerificationFailed
from lib.shown import listed
from lib.steps.memories import memories_now
from lib.steps.mend import mend_vectors
from lib.steps.migration import Migration
from lib.steps.pages import pages
from lib.steps.payloads import PointId
from lib.steps.present import points_present, surplus_ids

_EXAMPLES, _PAGE = 3, 256


def prove_points(run: Migration, collection: str, rejected: Iterable[PointId], *, own: bool) -> int:
    """Every planned id is there, every vector equals the spool's; how many vectors had to be renewed.

    `rejected`: rows that the server does not take. `own`: nobody else writes to the collection, so that no other id
    may be there, and each vector is the plan's. What the old service wrote to a live one is renewed, and compared
    again. Raises VerificationFailed.
    """
    missing, surplus = _ids(run, collection, set(rejected))
    if not own:  # with its memory the running AutoMem removes the point
        missing = sorted(memories_now(run.graph.conn, run.graph.graph, [missing]), key=str)
    if missing or (own and surplus):
        one, what = (missing, "missing") if missing else (surplus, "not in the plan")
        some = listed(one[:_EXAMPLES])
        raise VerificationFailed(
            f"{len(one)} point(s) of '{collection}' are {what}, such as {some}",
            next_step="python scripts/reembed_embeddings.py   (goes on from the spool)",
        )
    qdrant, spool, spec = run.target.qdrant, run.spool, run.spec
    mended = mend_vectors(qdrant, collection, spool, spec, run.bar, planned=own)
    if mended and mend_vectors(qdrant, collection, spool, spec, run.bar, planned=own):
        raise VerificationFailed(
            f"points of '{collection}' keep changing to other vectors: something else writes to it",
            next_step="stop AutoMem, then python scripts/reembed_embeddings.py   (goes on from the spool)",
        )
    return mended


def _ids(run: Migration, collection: str, rejected: set[PointId]) -> tuple[list[PointId], list[PointId]]:
    """Planned ids with a vector that are not there; ids there that no plan has."""
    missing: list[PointId] = []
    with points_present(run.target.qdrant, collection, payload=False) as present:
        for rows in pages(run.spool.memories(), _PAGE):
            known = run.spool.known([row.key for row in rows])
            wanted = [row.point_id for row in rows if row.key in known and row.point_id not in rejected]
            there = present.payloads(wanted)
            missing += [one for one in wanted if one not in there]
        surplus = list(surplus_ids(present, lambda ids: set(run.spool.memories_of(ids))))
    return missing, surplus
