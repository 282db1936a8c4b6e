"""Build the new collection while the live one serves, fill either of them, and verify the points of either."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from lib.backup.collection import STAMP_KEY
from lib.backup.phases import DELETING, DROPPING_STAGED, READ, RESTORING_STAGED, STAGED, STAGING
from lib.backup.points import TemporaryIdTable, existing_points
from lib.clients.embeddings.cache_file import chunks
from lib.clients.qdrant import collection as collections
from lib.clients.qdrant.collection import CollectionState, get_state
from lib.clients.qdrant.points import PointId, retrieve
from lib.clients.qdrant.snapshots import delete_with_snapshots
from lib.clients.qdrant.transport import QdrantError, is_disk_full
from lib.concurrency import BackgroundTask, CancelToken
from lib.dimensions import EmbeddingSpec, provider_fact
from lib.errors import StoreFailed, VerificationFailed, listed
from lib.journal import Journal
from lib.reembed.assess import Assessment, journaled_settings, require_whole_graph
from lib.reembed.context import Context, refuse_foreign_staged, unplanned_ids
from lib.reembed.embed import FEW_TEXTS, MOST_ROUNDS, EmbeddingRunner, catch_up
from lib.reembed.plan import memories_now
from lib.reembed.sync import SyncOutcome, repair_vectors, save_payloads, sync_collection, was_recreated
from lib.verify.compare import different_vectors

INDEX_SECONDS = 3600.0
_EXAMPLES, _PAGE = 3, 256
_SAMPLE = 200  # random points of a copy whose original was compared
_RESUME = "run the same command again: it resumes from the embedding cache"
T = TypeVar("T")


def stamp(spec: EmbeddingSpec) -> dict[str, Any]:
    """Return the metadata that records a collection's model; servers before 1.16 ignore it."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {STAMP_KEY: {"model": spec.model, "size": spec.size, "at": now, **provider_fact(spec.provider)}}


def stage(
    ctx: Context,
    journal: Journal,
    assessment: Assessment,
    live: CollectionState,
    runner: EmbeddingRunner,
    *,
    meanwhile: Callable[[], None] = lambda: None,
) -> CollectionState:
    """Create or resume the staged collection, fill and verify it. The `live` one is only read.

    Catching up and filling repeat until a round embeds fewer than 100 texts. While the server builds the index, every
    point is verified, then `meanwhile` is called. Raises StoreFailed if the server's disk is full (the staged
    collection is dropped), MissingData if the graph lost memories since the plan.
    """
    with staged_dropped_if_full(ctx, journal, assessment.room):
        _create_staged(ctx, journal, live)
        for _ in range(MOST_ROUNDS):
            before = runner.paid.texts
            scan = catch_up(ctx, runner, journal)
            require_whole_graph(ctx, assessment, scan.own_text)
            journal.append(READ, kept=save_payloads(ctx, journal, live.points))
            with ctx.bar("stage", ctx.cache.memory_count(), "points") as progress:
                outcome = sync_collection(ctx, ctx.staged, progress, whole=True, copied_from=ctx.staged)
            if runner.paid.texts - before < FEW_TEXTS:
                break
        changed = _begin_indexing(ctx, journal) or outcome.wrote
        with BackgroundTask(lambda task: _wait_for_index(ctx, ctx.staged, task.stop, changed=changed)) as indexing:
            repaired = verify_points(ctx, ctx.staged, outcome, exclusive=True)
            meanwhile()
            indexing.result()
        if repaired:
            _wait_for_index(ctx, ctx.staged, changed=True)
        state = get_state(ctx.qdrant, ctx.staged)
    _require_optimizer(ctx, state)
    journal.append(STAGED, points=state.points, proved=True)
    return state


def _create_staged(ctx: Context, journal: Journal, live: CollectionState) -> None:
    """Announce and create the staged collection; an earlier start's is kept if it has the same settings."""
    refuse_foreign_staged(ctx)
    like, aliases = settings_and_aliases(ctx, journal, live)
    same = has_staged(ctx, journal) and collections.same_settings(journal.fact("staged_like"), like)
    condition = collections.health(ctx.qdrant, ctx.staged)
    if condition != "missing" and not (condition == "live" and same and _was_created_like(ctx, like)):
        delete_with_snapshots(ctx.qdrant, ctx.staged)
    facts = {"staged_collection": ctx.staged, "staged_like": like, "aliases": aliases}
    journal.append(STAGING, **facts, snapshot=None, proved=False)
    if collections.exists(ctx.qdrant, ctx.staged):
        collections.put_indexes(ctx.qdrant, ctx.staged, like.get("payload_schema") or {})
    else:
        # One index of all points takes the server less time than indexes of parts, which it builds and merges.
        collections.create_like(ctx.qdrant, ctx.staged, like, ctx.spec.size, stamp(ctx.spec), indexed=False)


def _was_created_like(ctx: Context, like: dict[str, Any]) -> bool:
    """Return whether the staged collection still has the settings that it was created with, but maybe no index yet."""
    raw = get_state(ctx.qdrant, ctx.staged).raw
    optimizers = {**raw["config"]["optimizer_config"]}
    optimizers["indexing_threshold"] = like["config"]["optimizer_config"].get("indexing_threshold")
    config = {**raw["config"], "optimizer_config": optimizers}
    schema = like.get("payload_schema")
    return collections.same_settings(like, {"config": config, "payload_schema": schema}, but_size=True)


def _begin_indexing(ctx: Context, journal: Journal) -> bool:
    """Let the server build the index of the staged collection as that of the live one. Returns False if it does."""
    threshold = collections.indexing_threshold(journal.fact("staged_like"))
    begun = collections.indexing_threshold(get_state(ctx.qdrant, ctx.staged).raw) == threshold
    if not begun:  # it would begin again
        collections.set_indexing_threshold(ctx.qdrant, ctx.staged, threshold)
    return not begun


def settings_and_aliases(ctx: Context, journal: Journal, live: CollectionState) -> tuple[dict[str, Any], list[str]]:
    """Return the live collection's raw info and aliases; if it was recreated, the old settings and both's aliases."""
    aliases = collections.aliases_of(ctx.qdrant, ctx.collection)
    if not was_recreated(journal, live.points):
        return live.raw, sorted(aliases)
    return journaled_settings(journal) or live.raw, sorted({*aliases, *(journal.fact("aliases") or [])})


def _wait_for_index(ctx: Context, collection: str, stop: CancelToken | None = None, *, changed: bool) -> bool:
    """Wait until the index is built, at most an hour. Returns whether it is. Raises Cancelled if `stop` is set.

    `changed`: the server may not have noticed yet that the index must be built.
    """
    state = get_state(ctx.qdrant, collection)
    if changed or not state.optimized:
        with ctx.bar("wait for the index", None, ""):
            state = collections.wait_green(ctx.qdrant, collection, INDEX_SECONDS, stop)
    return state.optimized


def _require_optimizer(ctx: Context, staged: CollectionState) -> None:
    """Raise StoreFailed if the server failed to build the index: it would fail under the live name, too."""
    if not staged.optimizer_ok:
        raise StoreFailed(
            f"the Qdrant server cannot build the index of '{staged.name}' ({staged.status}): {staged.optimizer_status}"
            f"\n'{ctx.collection}' is unchanged",
            next_step="look at Qdrant's log, and restart Qdrant when the cause is gone:\n"
            "docker compose restart qdrant\nthen run the same command again: nothing is paid for twice",
        )


def has_staged(ctx: Context, journal: Journal) -> bool:
    """Return whether the staged collection, if one exists, was made by this run."""
    return bool(journal.fact("staged_collection") == ctx.staged)


def verified_staged(ctx: Context, journal: Journal) -> str | None:
    """Return the staged collection's name if it exists, was made by this run and is verified."""
    if not (has_staged(ctx, journal) and journal.has_reached(STAGED) and journal.fact("proved")):
        return None
    return ctx.staged if collections.health(ctx.qdrant, ctx.staged) == "live" else None


def require_same_settings(ctx: Context, journal: Journal) -> None:
    """Raise StoreFailed if the settings of the live (if recreated: the old) collection changed since the staging."""
    live = get_state(ctx.qdrant, ctx.collection)
    if was_recreated(journal, live.points) or collections.same_settings(journal.fact("staged_like"), live.raw):
        return
    raise StoreFailed(
        f"the settings of '{live.name}' changed after '{ctx.staged}' was created with them: nothing is replaced",
        next_step="run the same command again: it stages the collection again, and nothing is paid for twice",
    )


def drop_staged(ctx: Context, journal: Journal) -> None:
    """Delete the staged collection of this run, its snapshot files first."""
    journal.append(DROPPING_STAGED, snapshot=None, proved=False)
    delete_with_snapshots(ctx.qdrant, ctx.staged)


@contextmanager
def staged_dropped_if_full(ctx: Context, journal: Journal, room: int) -> Iterator[None]:
    """If the disk fills before the delete, drop the staged collection and raise StoreFailed. `room`: bytes needed."""
    try:
        yield
    except QdrantError as error:
        if not is_disk_full(error):
            raise
        drop_staged(ctx, journal)
        raise StoreFailed(
            f"the Qdrant server's disk is full: {error.text}\n'{ctx.collection}' is unchanged,"
            f" '{ctx.staged}' was removed again; about {room / 2**20:,.0f} MiB are needed in addition to the live"
            " collection",
            next_step="make room on the server, then run the same command again: nothing is paid for twice;\n"
            "or, with less room, delete the old collection first:\npython scripts/reembed_embeddings.py --in-place",
        ) from error


def with_room(ctx: Context, journal: Journal, work: Callable[[], T]) -> T:
    """Return the result of `work`. On a full disk, after the delete, drop the staged collection and repeat it.

    Raises StoreFailed if that does not make enough room. The cache has every vector of the staged collection.
    """
    while True:
        try:
            return work()
        except QdrantError as error:
            if not is_disk_full(error):
                raise
            if not has_staged(ctx, journal) or collections.health(ctx.qdrant, ctx.staged) == "missing":
                raise StoreFailed(
                    f"the Qdrant server's disk is full: {error.text}\n'{ctx.collection}' has the new size"
                    " already, but is not complete; the embedding cache holds every vector that was paid for",
                    next_step="make room on the server, then run the same command again: it resumes from the embedding"
                    " cache\nif it has room and still reports this: docs/worst-day.md",
                ) from error
        drop_staged(ctx, journal)


class Filled(NamedTuple):
    """What filling did; aliases that others took; whether the index is built; monotonic time of the last write."""

    outcome: SyncOutcome
    aliases_taken: list[str]
    indexed: bool
    complete_at: float


def fill(
    ctx: Context,
    journal: Journal,
    touched: TemporaryIdTable | None = None,
    existing: TemporaryIdTable | None = None,
) -> Filled:
    """Write what the plan adds and changes, restore aliases, wait for the index. Both tables: see `sync_collection`."""
    name = ctx.collection

    def work() -> Filled:
        with ctx.bar("upsert", ctx.cache.memory_count(), "points") as progress:
            outcome = sync_collection(
                ctx,
                name,
                progress,
                whole=journal.has_reached(DELETING, RESTORING_STAGED),
                copied_from=verified_staged(ctx, journal),
                touched=touched,
                existing=existing,
            )
        complete_at = time.monotonic()
        aliases_taken = restore_aliases(ctx, journal)
        indexed = _wait_for_index(ctx, name, changed=outcome.wrote)
        if settings := journal.fact("settings"):
            collections.put_fan_out(ctx.qdrant, name, settings["config"])
        return Filled(outcome, aliases_taken, indexed, complete_at)

    return with_room(ctx, journal, work)


def restore_aliases(ctx: Context, journal: Journal) -> list[str]:
    """Give the collection the aliases that the old one had. Returns those that another collection has taken."""
    return collections.restore_aliases(ctx.qdrant, ctx.collection, journal.fact("aliases") or [])


def verify_points(
    ctx: Context, collection: str, outcome: SyncOutcome, *, exclusive: bool, touched: TemporaryIdTable | None = None
) -> int:
    """Verify that every planned id exists and every vector equals the cache's. Returns how many vectors it repaired.

    Ids that the `outcome` of filling rejected are left out. `exclusive`: nobody else writes to the collection, so no
    other id may exist, and each vector must be the plan's. In a live one, vectors that AutoMem wrote with the old
    model are repaired and compared again. `touched`: the other points are copies of compared ones, so that a random
    sample of them is compared, and all points only if a vector differs. Raises VerificationFailed.
    """
    missing, orphans = _different_ids(ctx, collection, {one.id for one in outcome.rejected})
    if not exclusive:  # AutoMem removes a point with its memory
        missing = sorted(memories_now(ctx.graph, [missing]), key=str)
    if missing or (exclusive and orphans):
        wrong, what = (missing, "missing") if missing else (orphans, "not in the plan")
        raise VerificationFailed(
            f"points of '{collection}' are {what}: {len(wrong)}, such as {listed(wrong[:_EXAMPLES])}", next_step=_RESUME
        )
    if touched is not None and _sample_agrees(ctx, collection, touched):
        return 0
    repaired = repair_vectors(ctx, collection, planned=exclusive)
    if repaired and repair_vectors(ctx, collection, planned=exclusive):
        raise VerificationFailed(
            f"vectors of '{collection}' keep changing: something else writes to it",
            next_step=f"stop AutoMem, then {_RESUME}",
        )
    return repaired


def _sample_agrees(ctx: Context, collection: str, touched: TemporaryIdTable) -> bool:
    """Compare the vectors of all `touched` points and of 200 random ones. Returns whether all equal the cache's."""
    state = get_state(ctx.qdrant, collection)
    if 2 * len(touched) > state.points:  # reading all in order is faster
        return False
    sample = ctx.cache.random_ids(_SAMPLE)
    compared = 0
    with ctx.bar("compare a sample", len(touched) + len(sample), "points") as progress:
        for ids in chain([sample], touched.ids()):
            points = retrieve(ctx.qdrant, collection, ids, payload=["content"], vector=True)
            known, wrong = different_vectors(points, ctx.cache, ctx.spec, state)
            if wrong:
                return False
            compared += known
            progress(len(ids))
    return compared > 0


def _different_ids(ctx: Context, collection: str, rejected: set[PointId]) -> tuple[list[PointId], list[PointId]]:
    """Return the planned ids with a vector that do not exist, and the existing ids that are not planned."""
    missing: list[PointId] = []
    with existing_points(ctx.qdrant, collection, payload=False) as existing:
        for rows in chunks(ctx.cache.memories(), _PAGE):
            known = ctx.cache.known([row.key for row in rows])
            wanted = [row.point_id for row in rows if row.key in known and row.point_id not in rejected]
            found = existing.payloads(wanted)
            missing += [one for one in wanted if one not in found]
        return missing, list(unplanned_ids(ctx.cache, existing))
