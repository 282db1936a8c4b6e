"""The re-embedding as a sequence. Killed at any point and started again, it resumes from its journal.

assess and plan (`assess.assess`, before this) > embed > stage > guard and cutover > catch up > verify > report
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lib.backup.manifest import Manifest
from lib.backup.phases import (
    COMMAND,
    DELETING,
    VERIFIED,
    last_migration,
    restored_since,
    spec_as_json,
)
from lib.backup.points import TemporaryIdTable
from lib.clients.qdrant.collection import CollectionState, exists, get_state, set_metadata
from lib.errors import UsageProblem
from lib.journal import Journal, start_journal
from lib.reembed.assess import (
    ABSENT,
    ADOPT,
    REPLACE,
    Assessment,
    find_live,
    require_protection,
    require_whole_graph,
)
from lib.reembed.context import Context, mark_fresh, must_forget, reached
from lib.reembed.cutover import Cutover, cut_over, snapshot_file
from lib.reembed.embed import EmbeddingRunner, EmbeddingTotals, catch_up, embed_uncached
from lib.reembed.guard import undo_of
from lib.reembed.quality import save_before
from lib.reembed.report import Finished, make_report
from lib.reembed.resume import close_others
from lib.reembed.staging import (
    drop_staged,
    fill,
    has_staged,
    restore_aliases,
    stage,
    stamp,
    verified_staged,
    verify_points,
)
from lib.reembed.sync import payloads_now, remove_orphans


def reembed(
    ctx: Context,
    assessment: Assessment,
    runner: EmbeddingRunner,
    paid: EmbeddingTotals,
    announce: Callable[[str], None],
    write_report: Callable[[Mapping[str, Any]], list[Path]],
) -> tuple[Finished, list[Path]]:
    """Replace the collection by one with vectors of `ctx.spec`. Returns what was done, and the report's files.

    Backups may be taken until the cutover begins. `announce` gets the commands that undo a delete, right before it.
    Raises GuardRefused if no verified backup protects the collection: before anything is paid for, and again before
    the delete.
    """
    manifest = require_protection(ctx, assessment.journal, assessment.live)
    with ExitStack() as held:
        resumed_after_delete = reached(assessment.journal, DELETING)
        if resumed_after_delete:  # a backup would take an incomplete collection
            held.enter_context(ctx.store_lock())
        _embed(ctx, runner, paid)
        journal = _begin(ctx, assessment.journal, manifest)
        undo = journal.undo or undo_of(_undo_set(ctx, manifest), named=bool(ctx.reason))
        _stage(ctx, journal, assessment, runner, paid)
        if not resumed_after_delete:
            held.enter_context(ctx.store_lock())
        cutover = cut_over(ctx, journal, assessment, manifest, announce)
        done = _fill_and_verify(ctx, journal, runner, paid, cutover, undo)
    report = make_report(ctx, journal, done, resumed_after_delete=resumed_after_delete)
    return done, _close(journal, paid, write_report(report))


def _fill_and_verify(
    ctx: Context, journal: Journal, runner: EmbeddingRunner, paid: EmbeddingTotals, cutover: Cutover, undo: str
) -> Finished:
    """Fill the new collection, catch up with what was written meanwhile, verify every point, and clean up."""
    added, complete_at = 0, cutover.complete_at
    if complete_at is None:
        first = fill(ctx, journal)
        added, complete_at = first.outcome.added, first.complete_at
    else:
        restore_aliases(ctx, journal)
    scan = catch_up(runner, ctx.graph, ctx.cache, ctx.bar, paid, payloads_now(ctx, journal))
    with TemporaryIdTable() as touched:
        last = fill(ctx, journal, touched)
        removed = _remove_orphans(ctx, cutover)
        compare_only = touched if cutover.sample_suffices else None
        repaired = verify_points(ctx, ctx.collection, last.outcome, exclusive=False, touched=compare_only)
    _clean_up(ctx, journal, added + last.outcome.added)
    return Finished(
        scan=scan,
        outcome=last.outcome,
        points=ctx.cache.memory_count() - last.outcome.unembedded - len(last.outcome.rejected),
        paid=paid,
        method=cutover.method,
        absent_seconds=cutover.absent_seconds(complete_at),
        aliases_taken=last.aliases_taken,
        indexed=last.indexed,
        repaired=repaired,
        removed=removed,
        undo=journal.undo or undo,
    )


def only_stage(
    ctx: Context, assessment: Assessment, runner: EmbeddingRunner, paid: EmbeddingTotals
) -> CollectionState | None:
    """Build and verify the staged collection (`--no-switch`). Returns None if the live one is the result already."""
    _embed(ctx, runner, paid)
    journal = _begin(ctx, assessment.journal, None)
    live = find_live(ctx, journal)
    if live.kind == ADOPT:
        return None
    if live.state is None:
        raise UsageProblem(
            f"there is no live collection '{ctx.collection}': --no-switch has nothing to wait for",
            next_step="python scripts/reembed_embeddings.py",
        )
    return stage(ctx, journal, assessment, live.state, runner, paid)


def _embed(ctx: Context, runner: EmbeddingRunner, paid: EmbeddingTotals) -> None:
    """Embed every text of the plan that has no vector in the cache; with `--fresh`, drop the earlier vectors first.

    The provider must answer before that: if it refuses the key, nothing that was paid for is dropped.
    """
    if must_forget(ctx):
        paid.pay(runner.client.embed(["hello"]).tokens)
        ctx.cache.forget_planned()
        mark_fresh(ctx)
    embed_uncached(runner, ctx.cache, ctx.bar, paid)


def _begin(ctx: Context, journal: Journal | None, manifest: Manifest | None) -> Journal:
    """Close the runs with other settings; return this run's journal, a new one if none is resumed."""
    close_others(ctx)
    if journal:
        return journal
    facts = {"spec": spec_as_json(ctx.spec), "manifest": manifest.name if manifest else None}
    return start_journal(ctx.folder, COMMAND, ctx.targets, **facts, again=ctx.again)


def _undo_set(ctx: Context, manifest: Manifest | None) -> Manifest | None:
    """Return the backup set that undoes this run; None if a later migration's result was deleted."""
    last = last_migration(ctx.folder, ctx.targets)
    if manifest is None or manifest.collection is None or last is None or not last.has_reached(VERIFIED):
        return manifest
    if exists(ctx.qdrant, ctx.collection) or restored_since(ctx.folder, last):
        return manifest
    return manifest if manifest.collection.size == (last.fact("spec") or {}).get("size") else None


def _stage(
    ctx: Context, journal: Journal, assessment: Assessment, runner: EmbeddingRunner, paid: EmbeddingTotals
) -> None:
    """Build the staged collection, or with `--in-place` only catch up. Then search the old collection, to compare."""
    live = find_live(ctx, journal)
    if live.kind == REPLACE and live.state is not None and not assessment.in_place:
        stage(ctx, journal, assessment, live.state, runner, paid)
    elif live.kind != ABSENT or verified_staged(ctx, journal) is None:
        scan = catch_up(runner, ctx.graph, ctx.cache, ctx.bar, paid, payloads_now(ctx, journal))
        if live.kind == REPLACE:
            require_whole_graph(ctx, assessment, scan.own_text)
    if live.kind == REPLACE:
        save_before(ctx.qdrant, ctx.collection, ctx.cache, journal)


def _clean_up(ctx: Context, journal: Journal, added: int) -> None:
    """Record the model in the collection and the journal; remove what was staged."""
    stamped = stamp(ctx.spec)
    set_metadata(ctx.qdrant, ctx.collection, stamped)
    mark_fresh(ctx, done=True)
    journal.append(VERIFIED, points=added, stamp=stamped)
    if has_staged(ctx, journal):
        drop_staged(ctx, journal)
        snapshot_file(ctx.folder, ctx.staged).unlink(missing_ok=True)


def _remove_orphans(ctx: Context, cutover: Cutover) -> int:
    """Remove points without a memory: AutoMem may have removed a memory and its point in the old collection alone."""
    if cutover.absent_since is None:  # nothing was replaced
        return 0
    return remove_orphans(ctx, get_state(ctx.qdrant, ctx.collection))


def _close(journal: Journal, paid: EmbeddingTotals, report: list[Path]) -> list[Path]:
    """Close the run. If it is killed before this, the resumed run writes its report again."""
    paid.log.mark_reported(journal.run_id)
    journal.close("done")
    return report
