"""The re-embedding, its dry run and `--only-missing` as sequences. Killed at any point and started again, it resumes.

assess and plan (`assess.assess`, before this) > embed > stage > guard and cutover > catch up > verify > report
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lib.backup import phases
from lib.backup.collection import stamp_of
from lib.backup.manifest import Manifest
from lib.backup.points import TemporaryIdTable, existing_points
from lib.clients.embeddings.cache import Missing, TextRow
from lib.clients.embeddings.client import CONTROL_TEXT
from lib.clients.embeddings.pricing import Expected
from lib.clients.embeddings.worker_pool import EmbedProgress, embed_few, embed_missing
from lib.clients.qdrant.collection import CollectionState, exists, get_state, set_metadata
from lib.clients.qdrant.points import Point, delete_points, preflight_write, retrieve, scroll
from lib.clients.qdrant.transport import QdrantError
from lib.dimensions import SETTING_NAMES, is_model_of
from lib.errors import GuardRefused, StoreUnreachable, UsageProblem
from lib.journal import Journal, start_journal
from lib.reembed import assess, embed, staging
from lib.reembed.context import Context, close_others, mark_fresh, may_mix_models, must_forget, progress_of, reached
from lib.reembed.cutover import Cutover, cut_over
from lib.reembed.embed import EmbeddingRunner, catch_up, embed_texts, embed_uncached
from lib.reembed.plan import scan_graph, usually_spelled
from lib.reembed.quality import save_before
from lib.reembed.report import Finished, absent_by, make_report
from lib.reembed.sync import SyncOutcome, missing_of, repair_vectors, saved_row, sync_collection, texts_to_embed
from lib.verify.compare import OTHER_MODEL, REPLACE_ALL

_PAGE = 256


def reembed(
    ctx: Context,
    assessment: assess.Assessment,
    runner: EmbeddingRunner,
    announce: Callable[[str], None],
    write_report: Callable[[Mapping[str, Any]], list[Path]],
) -> tuple[Finished, list[Path]]:
    """Replace the collection by one with vectors of `ctx.spec`. Returns what was done, and the report's files.

    Backups may be taken until the cutover begins. `announce` gets the commands that undo a delete, right before it.
    Raises GuardRefused if no verified backup protects the collection: before anything is paid for, and again before
    the delete.
    """
    manifest = assess.require_protection(ctx, assessment.journal, assessment.live)
    with ExitStack() as held:
        resumed_after_delete = reached(assessment.journal, phases.DELETING)
        if resumed_after_delete:  # a backup would take an incomplete collection
            held.enter_context(ctx.store_lock())
        _embed(ctx, runner)
        journal = _begin(ctx, assessment.journal, manifest)
        held.enter_context(_progress_named(ctx, journal))
        undo = journal.undo or assess.undo_of(_undo_set(ctx, manifest), named=bool(ctx.reason))
        _stage(ctx, journal, assessment, runner)
        if not resumed_after_delete:
            held.enter_context(ctx.store_lock())
        cutover = cut_over(ctx, journal, assessment, manifest, announce)
        done = _fill_and_verify(ctx, journal, runner, cutover, undo)
    if resumed_after_delete:  # this start measured only its own part
        done = done._replace(absent_seconds=absent_by(journal), absent_at_most=True)
    files = write_report(make_report(ctx, journal, done))
    runner.paid.sums.settled_by = journal.run_id  # a run that is killed before this writes its report again
    runner.paid.save()
    journal.close("done")
    mark_fresh(ctx.cache, None)  # last: a resumed run would pay again
    return done, files


@contextmanager
def _progress_named(ctx: Context, journal: Journal) -> Iterator[None]:
    """Add to an error of a server, from the delete on, how far the run came, and how to resume."""
    try:
        yield
    except (StoreUnreachable, QdrantError) as error:
        if journal.has_reached(phases.DELETING):
            error.args = (f"{error}\n'{ctx.collection}': {progress_of(journal)}",)
            error.next_step += f"\nto resume:\n{ctx.again}"
        raise


def _fill_and_verify(ctx: Context, journal: Journal, runner: EmbeddingRunner, cutover: Cutover, undo: str) -> Finished:
    """Fill the new collection, catch up with what was written meanwhile, verify every point, and clean up."""
    added, complete_at = 0, cutover.complete_at
    with suppress(QdrantError):  # it takes room; the end reports it
        phases.delete_sent(ctx.qdrant, journal)
    if complete_at is None:
        first = staging.fill(ctx, journal)
        added, complete_at = first.outcome.added, first.complete_at
    else:
        staging.restore_aliases(ctx, journal)
    removed = 0
    # The points are read first: what AutoMem wrote into both stores in between would be undone.
    with TemporaryIdTable() as touched, existing_points(ctx.qdrant, ctx.collection) as existing:
        scan = catch_up(ctx, runner, journal)
        last = staging.fill(ctx, journal, touched, existing)
        # AutoMem may have removed memories with their old points alone, also before an earlier start ended.
        if cutover.absent_since is not None or journal.has_reached(phases.DELETING):
            removed = remove_orphans(ctx, get_state(ctx.qdrant, ctx.collection), few=assess.LOST_FEW)
        compare_only = touched if cutover.sample_suffices else None
        repaired = staging.verify_points(ctx, ctx.collection, last.outcome, exclusive=False, touched=compare_only)
    stamped = staging.stamp(ctx.spec)
    set_metadata(ctx.qdrant, ctx.collection, stamped)
    journal.append(phases.VERIFIED, points=added + last.outcome.added, stamp=stamped)
    phases.delete_sent(ctx.qdrant, journal)
    if staging.has_staged(ctx, journal):
        staging.drop_staged(ctx, journal)
        phases.snapshot_file(ctx.folder, ctx.staged).unlink(missing_ok=True)
    return Finished(
        scan=scan,
        outcome=last.outcome,
        points=ctx.cache.memory_count() - last.outcome.unembedded - len(last.outcome.rejected),
        paid=runner.paid,
        method=cutover.method,
        absent_seconds=0.0 if cutover.absent_since is None else complete_at - cutover.absent_since,
        aliases_taken=last.aliases_taken,
        indexed=last.indexed,
        repaired=repaired,
        removed=removed,
        undo=journal.undo or undo,
    )


def only_stage(ctx: Context, assessment: assess.Assessment, runner: EmbeddingRunner) -> CollectionState | None:
    """Build and verify the staged collection (`--no-switch`). Returns None if the live one is the result already."""
    if assessment.live.state is None:  # before anything is paid for
        raise UsageProblem(
            f"there is no live collection '{ctx.collection}': --no-switch has nothing to wait for",
            next_step="python scripts/reembed_embeddings.py",
        )
    _embed(ctx, runner)
    live = assess.find_live(ctx, assessment.journal)
    if live.kind == assess.ADOPT:
        if assessment.journal is None:
            mark_fresh(ctx.cache, None)
        return None
    journal = _begin(ctx, assessment.journal, None)
    return staging.stage(ctx, journal, assessment, live.state or assessment.live.state, runner)


def _embed(ctx: Context, runner: EmbeddingRunner) -> None:
    """Embed every text of the plan that has no vector in the cache; with `--fresh`, drop the earlier vectors first.

    The provider must answer before that: if it refuses the key, nothing that was paid for is dropped.
    """
    _require_write_access(ctx)
    if must_forget(ctx):
        runner.paid.pay(embed_few(runner.client, [CONTROL_TEXT], runner.report_waiting)[1].tokens)
        ctx.cache.forget_planned()
        mark_fresh(ctx.cache, ctx.spec)
    embed_uncached(ctx, runner)


def _require_write_access(ctx: Context) -> None:
    """Raise AccessRefused, before anything is paid for, if the key of Qdrant may only read."""
    with suppress(QdrantError):  # while a run is resumed, the collection may be missing
        preflight_write(ctx.qdrant, ctx.collection)


def _begin(ctx: Context, journal: Journal | None, manifest: Manifest | None) -> Journal:
    """Close the runs with other settings; return this run's journal, a new one if none is resumed."""
    close_others(ctx)
    facts = {"spec": phases.spec_as_json(ctx.spec), "manifest": manifest.name if manifest else None, "again": ctx.again}
    return journal or start_journal(ctx.folder, phases.COMMAND, ctx.targets, **facts)


def _undo_set(ctx: Context, manifest: Manifest | None) -> Manifest | None:
    """Return the backup set that undoes this run; None if a later migration's result was deleted."""
    last = phases.last_migration(ctx.folder, ctx.targets)
    if manifest is None or manifest.collection is None or last is None or not last.has_reached(phases.VERIFIED):
        return manifest
    if exists(ctx.qdrant, ctx.collection) or phases.restored_since(last):
        return manifest
    return manifest if manifest.collection.size == (last.fact("spec") or {}).get("size") else None


def _stage(ctx: Context, journal: Journal, assessment: assess.Assessment, runner: EmbeddingRunner) -> None:
    """Build the staged collection, or with `--in-place` only catch up. Then search the old collection, to compare."""
    live = assess.find_live(ctx, journal)
    if live.kind == assess.REPLACE and live.state is not None and not assessment.in_place:
        search = partial(save_before, ctx, journal)
        staging.stage(ctx, journal, assessment, live.state, runner, meanwhile=search)
    elif live.kind != assess.ABSENT or staging.verified_staged(ctx, journal) is None:
        scan = catch_up(ctx, runner, journal)
        if live.kind == assess.REPLACE:
            assess.require_whole_graph(ctx, assessment, scan.own_text)
            save_before(ctx, journal)


@dataclass(frozen=True)
class Tried:
    """One real batch: size and speed of its answer, what is left to embed, and how long that would take."""

    size: int
    texts: int
    tokens: int
    seconds: float
    note: str
    left: Missing
    expected: Expected | None = None


def try_one_batch(ctx: Context, runner: EmbeddingRunner, *, repair: bool) -> Tried:
    """Embed one real batch. It is stored in the embedding cache, so that it is not paid for again.

    If the client's size is not the plan's (see `sample_spec`), the vectors are thrown away. A text that the provider
    refuses is found, and left out. `repair`: the texts are those that `--only-missing` would embed, see `assess`.
    """
    texts: Iterable[TextRow] = ctx.cache.missing_texts(ctx.spec)
    count_missing: Callable[[], Missing] = ctx.cache.missing_total
    with ExitStack() as held:
        if repair and not may_mix_models(ctx):
            existing = held.enter_context(existing_points(ctx.qdrant, ctx.collection))
            texts, count_missing = texts_to_embed(ctx.cache, existing), partial(missing_of, ctx.cache, existing)
        first = list(islice(texts, runner.batch_size))
        size = runner.client.spec.size
        if not first:
            note = "every text is in the embedding cache already"
            if repair:
                note = "no point needs a new vector, or its text is in the embedding cache already"
            return Tried(ctx.spec.size, 0, 0, 0.0, note, count_missing())
        runner.require_affordable(sum(row.tokens for row in first))
        stored = size == ctx.spec.size
        if stored:
            embed.require_cached_model(ctx, runner)
            ctx.cache.require_room(len(first), size)
        note = "stored in the embedding cache" if stored else f"sampled at the model's own {size}d, not stored"
        store = ctx.cache.put_vectors if stored else lambda _vectors: None
        with runner.paid.recording(stored=stored) as record:

            def report(now: EmbedProgress) -> None:
                record(now)
                runner.report_waiting(now)

            done = embed_missing(runner.client, first, store, workers=1, batch_size=runner.batch_size, progress=report)
        if done.refused:
            note += f"; {len(done.refused)} refused: {done.refused[0].label} ({done.refused[0].reason})"
        left = count_missing()
    seconds = runner.client.request_seconds or 0.0
    return Tried(size, done.embedded, done.tokens, seconds, note, left, runner.expected(left))


class Synced(NamedTuple):
    """What `--only-missing` did: points written, vectors repaired, orphan points removed."""

    outcome: SyncOutcome
    repaired: int
    removed: int


def only_missing(ctx: Context, runner: EmbeddingRunner) -> Synced:
    """Add missing points, update those whose content or payload differs from the graph's, remove orphans with care.

    If AutoMem may have written vectors of another model (see `may_mix_models`), every vector is compared, and texts
    without a vector in the cache are embedded again.
    """
    state = get_state(ctx.qdrant, ctx.collection)
    compare_all = may_mix_models(ctx)
    _require_write_access(ctx)
    assess.require_removable(ctx, state)  # again before the removal; a refusal comes before anything is paid for
    if not compare_all:
        _require_same_model(ctx, runner, state)
    with existing_points(ctx.qdrant, state.name) as existing:
        missing = missing_of(ctx.cache, existing)
        runner.require_affordable(missing.tokens)
        embed_texts(ctx, runner, texts_to_embed(ctx.cache, existing), missing)
    # The points are read first: what AutoMem wrote into both stores in between would be undone, too.
    with ctx.store_lock(), existing_points(ctx.qdrant, state.name) as existing:
        # What AutoMem changed or deleted meanwhile is not written back: with an old plan and a full cache it would be.
        scan_graph(ctx, None, title="read graph again")
        with ctx.bar("sync", None, "points") as progress:
            outcome = sync_collection(ctx, state.name, progress, existing=existing)
        repaired = 0
        if compare_all:
            embed_uncached(ctx, runner)
            repaired = repair_vectors(ctx, state.name)
            ctx.cache.set_meta(OTHER_MODEL, "")
        return Synced(outcome, repaired, remove_orphans(ctx, state))


def _require_same_model(ctx: Context, runner: EmbeddingRunner, state: CollectionState) -> None:
    """Embed three unchanged points' contents again. Raises GuardRefused if a cosine is under 0.99: another model."""
    points = list[Point]()
    for page in scroll(ctx.qdrant, state.name, payload=["content"], vector=True, page=_PAGE):
        rows = ctx.cache.memories_of([point.id for point in page])
        for point in page:
            content = (point.payload or {}).get("content")
            if point.vector is not None and point.id in rows and content == rows[point.id].content:
                points.append(point)
        if len(points) >= embed.SAMPLES:
            break
    points = points[: embed.SAMPLES]
    if not points and state.points:
        raise GuardRefused(
            f"no point of '{state.name}' holds its memory's content: the model of its vectors cannot be checked",
            next_step=f"replace all vectors:\n{REPLACE_ALL}",
        )
    # With the right stamp a re-embed finds the collection up to date.
    fresh = " --fresh" if is_model_of(stamp_of(state.raw["config"]), ctx.spec) else ""
    setting = SETTING_NAMES[ctx.spec.provider].model
    embed.require_made_by(
        runner,
        f"the vectors in '{state.name}'",
        {str(point.id): str((point.payload or {})["content"]) for point in points},
        [point.vector for point in points if point.vector is not None],
        next_step=f"set {setting} to the model that made them, or replace all vectors:\n{REPLACE_ALL}{fresh}",
    )


def remove_orphans(ctx: Context, state: CollectionState, few: int = 0) -> int:
    """Remove the points that have no memory in the graph; each is saved in the cache first. Returns how many.

    `few`, and what it raises: see `orphan_points`.
    """
    removed = 0
    with assess.orphan_points(ctx, state, few) as (without_memory, memories):
        for ids in without_memory.ids():
            points = retrieve(ctx.qdrant, state.name, ids, payload=True, vector=True)
            staying = memories | usually_spelled(ctx.graph, ids)  # also memories that were stored since
            orphans = [point for point in points if point.id not in staying]
            ctx.cache.save_points([saved_row(point) for point in orphans])
            delete_points(ctx.qdrant, state.name, [point.id for point in orphans])
            removed += len(orphans)
    return removed
