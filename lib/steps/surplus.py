"""Points that no memory has: removed with care, kept in the spool before."""

from __future__ import annotations

from lib.errors import GuardRefused, MissingData
from lib.steps.guard import Wanted, fitting_backup
from lib.steps.keep import keep_whole
from lib.steps.memories import memories_now, usually_spelled
from lib.steps.migration import Migration
from lib.steps.payloads import PointId
from lib.steps.plan import only_live_ids
from lib.steps.present import points_present
from lib.vectors.collection import CollectionState
from lib.vectors.points import delete_points, retrieve

_SHARE = 0.01


def remove_surplus(run: Migration, state: CollectionState) -> int:
    """Remove points that no memory has: asked by id after the point was read; how many went.

    Raises MissingData for an empty graph, GuardRefused where more than 1% would go without a proved backup.
    """
    with only_live_ids(run.target.qdrant, state.name, run.spool, run.graph) as surplus:
        if not len(surplus):
            return 0
        if run.spool.memory_count() == 0:
            raise MissingData(
                f"graph '{run.graph.graph}' holds no embeddable memory: nothing is removed from '{state.name}'",
                next_step="check FALKORDB_GRAPH and FALKORDB_HOST",
            )
        if len(surplus) > _SHARE * state.points:
            with points_present(run.target.qdrant, state.name, payload=False) as live:
                found = fitting_backup(run.folder, Wanted(run.target.qdrant.display, state, live, surplus))
            if isinstance(found, str):
                raise GuardRefused(
                    f"{len(surplus)} of the {state.points} points of '{state.name}' have no memory in the graph;"
                    f" so many are not removed without a proved backup: {found}",
                    next_step=f"python scripts/backup_automem.py\n{run.again}",
                )
        there = memories_now(run.graph.conn, run.graph.graph, surplus.ids())
        return sum(_remove_page(run, state.name, page, there) for page in surplus.ids())


def _remove_page(run: Migration, collection: str, ids: list[PointId], known: set[PointId]) -> int:
    """Remove the points of `ids` but those of `known` memories, and of memories that were stored since."""
    points = retrieve(run.target.qdrant, collection, ids, payload=True, vector=True)
    there = known | usually_spelled(run.graph.conn, run.graph.graph, ids)
    gone = [point for point in points if point.id not in there]
    keep_whole(gone, run.spool)
    delete_points(run.target.qdrant, collection, [point.id for point in gone])
    return len(gone)
