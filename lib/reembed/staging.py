"""Build the new collection beside the live one, and verify the points of either."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from lib.backup.existing_points import existing_points, orphan_ids, pages
from lib.backup.last_migration import DELETING, READ, STAGED, STAGING, TIDYING
from lib.backup.payloads import PointId
from lib.clients.qdrant.collection import (
    CollectionState,
    aliases_of,
    create_like,
    exists,
    get_state,
    health,
    put_indexes,
    same_settings,
    wait_green,
)
from lib.clients.qdrant.points import delete_points
from lib.clients.qdrant.restoring import drop_temporary
from lib.clients.qdrant.transport import QdrantError, is_disk_full
from lib.errors import StoreFailed, VerificationFailed, listed
from lib.reembed.assess import journaled_settings, require_whole_graph
from lib.reembed.embed import FEW_CONTENTS, MOST_ROUNDS, EmbeddingRunner, catch_up
from lib.reembed.migration import Migration, journal_of
from lib.reembed.plan import memories_now
from lib.reembed.recreate import INDEX_SECONDS, made_anew, save_live, stamp
from lib.reembed.resume import refuse_stranger_staged
from lib.reembed.sync import SyncOutcome, payloads_now, sync_collection
from lib.verify.vectors import repair_vectors

_EXAMPLES, _PAGE = 3, 256


def verify_points(run: Migration, collection: str, rejected: Iterable[PointId], *, own: bool) -> int:
    """Every planned id is there, every vector equals the embedding cache's; how many vectors had to be renewed.

    `rejected`: rows that the server does not take. `own`: nobody else writes to the collection, so that no other id
    may be there, and each vector is the plan's. What the old service wrote to a live one is renewed, and compared
    again. Raises VerificationFailed.
    """
    missing, orphans = _ids(run, collection, set(rejected))
    if not own:  # with its memory the running AutoMem removes the point
        missing = sorted(memories_now(run.graph.conn, run.graph.graph, [missing]), key=str)
    if missing or (own and orphans):
        one, what = (missing, "missing") if missing else (orphans, "not in the plan")
        some = listed(one[:_EXAMPLES])
        raise VerificationFailed(
            f"{len(one)} point(s) of '{collection}' are {what}, such as {some}",
            next_step="python scripts/reembed_embeddings.py   (goes on from the embedding cache)",
        )
    qdrant, cache, spec = run.target.qdrant, run.cache, run.spec
    mended = repair_vectors(qdrant, collection, cache, spec, run.bar, planned=own)
    if mended and repair_vectors(qdrant, collection, cache, spec, run.bar, planned=own):
        raise VerificationFailed(
            f"points of '{collection}' keep changing to other vectors: something else writes to it",
            next_step="stop AutoMem, then python scripts/reembed_embeddings.py   (goes on from the embedding cache)",
        )
    return mended


def _ids(run: Migration, collection: str, rejected: set[PointId]) -> tuple[list[PointId], list[PointId]]:
    """Planned ids with a vector that are not there; ids there that no plan has."""
    missing: list[PointId] = []
    with existing_points(run.target.qdrant, collection, payload=False) as existing:
        for rows in pages(run.cache.memories(), _PAGE):
            known = run.cache.known([row.key for row in rows])
            wanted = [row.point_id for row in rows if row.key in known and row.point_id not in rejected]
            there = existing.payloads(wanted)
            missing += [one for one in wanted if one not in there]
        orphans = list(orphan_ids(existing, lambda ids: set(run.cache.memories_of(ids))))
    return missing, orphans


T = TypeVar("T")

_FEW_POINTS = 1000  # fewer say nothing of the rate


def stage(run: Migration, runner: EmbeddingRunner, live: CollectionState) -> CollectionState:
    """Make the staged collection, or go on with it, and prove it; the live one, which is `live`, is only read.

    Catching up and syncing repeat until a round buys fewer than 100 contents. Raises StoreFailed where the server's
    disk is full (the staged collection is removed again), MissingData where the graph lost memories meanwhile.
    """
    journal = journal_of(run)
    with room_kept(run):
        _begin(run, live)
        for _ in range(MOST_ROUNDS):
            before = run.bought.texts
            scan = catch_up(runner, run.graph, run.cache, run.bar, run.bought, payloads_now(run))
            require_whole_graph(run, scan.own_text)
            count = save_live(run.target, run.cache, journal, run.bar, live.points)
            journal.append(READ, kept=count)
            outcome = _sync(run)
            if run.bought.texts - before < FEW_CONTENTS:
                break
        verify_points(run, run.staged, [one.id for one in outcome.rejected], own=True)
        state = get_state(run.target.qdrant, run.staged)
    rate = {"upsert_rate": run.upsert_rate} if run.upsert_rate else {}
    journal.append(STAGED, points=state.points, proved=True, **rate)
    return state


def _begin(run: Migration, live: CollectionState) -> None:
    """Announce and create; what an earlier start made is gone on with where the live one's settings are the same."""
    refuse_stranger_staged(run.folder, run.targets, run.target.qdrant, run.staged)
    qdrant, journal = run.target.qdrant, journal_of(run)
    anew = run.reached(DELETING) or made_anew(run.cache, journal, live.points)
    like = (journaled_settings(run) if anew else None) or live.raw
    standing = health(qdrant, run.staged)
    same = run.has_staged and same_settings(journal.fact("staged_like"), like)
    if standing != "missing" and not (standing == "live" and same):
        drop_temporary(qdrant, run.staged)
    aliases = {*(journal.fact("aliases") or () if anew else ()), *aliases_of(qdrant, run.target.collection)}
    journal.append(
        STAGING,
        staged_collection=run.staged,
        staged_like=like,
        aliases=sorted(aliases),
        snapshot=None,
        proved=False,
    )
    if not exists(qdrant, run.staged):
        create_like(qdrant, run.staged, like, run.spec.size, metadata=stamp(run.spec))
    else:
        put_indexes(qdrant, run.staged, like.get("payload_schema") or {})


def require_same_settings(run: Migration) -> None:
    """Raise StoreFailed where the live collection's settings changed since the staged one was made like it.

    Unless somebody made the live one anew: the settings of the old one count then.
    """
    journal, live = journal_of(run), get_state(run.target.qdrant, run.target.collection)
    if run.reached(DELETING) or made_anew(run.cache, journal, live.points):
        return
    if not same_settings(journal.fact("staged_like"), live.raw):
        raise StoreFailed(
            f"the settings of '{live.name}' changed while '{run.staged}' was made like it: nothing is replaced",
            next_step="run the same command again: it stages anew, and nothing is bought twice",
        )


def _sync(run: Migration) -> SyncOutcome:
    """Nobody else writes to the staged collection: what the plan does not have leaves it."""
    qdrant, began = run.target.qdrant, time.monotonic()
    with run.bar("stage", run.cache.memory_count(), "points") as progress:
        outcome = sync_collection(
            qdrant, run.staged, run.cache, whole=True, copied_from=run.staged, progress=progress
        )
    if outcome.added >= _FEW_POINTS:
        run.upsert_rate = outcome.added / (time.monotonic() - began)
    with existing_points(qdrant, run.staged, payload=False) as existing:
        delete_points(
            qdrant, run.staged, list(orphan_ids(existing, lambda ids: set(run.cache.memories_of(ids))))
        )
    if outcome.wrote or not get_state(qdrant, run.staged).optimized:
        with run.bar("wait for the index", None, ""):
            run.indexed = wait_green(qdrant, run.staged, INDEX_SECONDS).optimized
    return outcome


@contextmanager
def room_kept(run: Migration) -> Iterator[None]:
    """A disk that fills before the delete: the staged collection goes again, the live one is untouched."""
    try:
        yield
    except QdrantError as error:
        if not is_disk_full(error):
            raise
        drop_staged(run)
        room = run.room / 2**20
        raise StoreFailed(
            f"the Qdrant server's disk is full: {error.text}\n'{run.target.collection}' is untouched,"
            f" '{run.staged}' was removed again; about {room:,.0f} MiB are needed beside the live collection",
            next_step="make room on the server, then run the same command again (nothing is bought twice), or\n"
            "python scripts/reembed_embeddings.py --in-place   (needs less: the old collection goes first)",
        ) from error


def with_room(run: Migration, work: Callable[[], T]) -> T:
    """What `work` gives, after the delete; on a full disk the staged collection makes room: the cache has all of it.

    Raises StoreFailed where that is not enough.
    """
    while True:
        try:
            return work()
        except QdrantError as error:
            if not is_disk_full(error):
                raise
            if not run.has_staged or health(run.target.qdrant, run.staged) == "missing":
                raise StoreFailed(
                    f"the Qdrant server's disk is full: {error.text}\n'{run.target.collection}' is at the new size"
                    " already, but not whole; the embedding cache holds every vector that was bought",
                    next_step="make room on the server (1.11 must be restarted then, to forget that its disk was full)"
                    " and run the same command again: it goes on from the embedding cache",
                ) from error
        drop_staged(run)


def drop_staged(run: Migration) -> None:
    """Delete the staged collection of this run, its snapshot files first."""
    journal_of(run).append(TIDYING, snapshot=None, proved=False)
    drop_temporary(run.target.qdrant, run.staged)
