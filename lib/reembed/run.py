"""The whole re-embedding, from a bought plan to a proved collection, killed anywhere and gone on with."""

from __future__ import annotations

from functools import partial

from lib.backup.last_migration import (
    COMMAND,
    DELETING,
    PLACING,
    VERIFIED,
    last_migration,
    restored_since,
    spec_as_json,
)
from lib.backup.manifest import Manifest
from lib.clients.qdrant.collection import CollectionState, exists, get_state, put_fan_out, set_metadata
from lib.errors import UsageProblem
from lib.journal import start_journal
from lib.reembed.assess import ABSENT, ADOPT, REPLACE, require_whole_graph, situation
from lib.reembed.cutover import Callbacks, exchange, file_of, standing_staged
from lib.reembed.embed import EmbeddingRunner, catch_up
from lib.reembed.migration import Migration, journal_of
from lib.reembed.quality import save_before
from lib.reembed.recreate import Filled, fill, stamp
from lib.reembed.report import make_report
from lib.reembed.resume import give_up_others
from lib.reembed.staging import drop_staged, stage, verify_points, with_room
from lib.reembed.sync import payloads_now, remove_orphans

_FRESH = "fresh since"


def is_fresh(run: Migration) -> bool:
    """Whether `--fresh` was begun by an earlier start of this migration: what was bought since then counts."""
    return run.cache.get_meta(_FRESH) == _fresh_mark(run)


def forget_paid(run: Migration, runner: EmbeddingRunner) -> None:
    """`--fresh`: drop the vectors of the plan's texts, so that they are bought anew, once.

    The provider must answer first: with a refused key nothing that was paid for is thrown away.
    """
    run.bought.pay(runner.client.embed(["hello"]).tokens)
    run.cache.forget_planned()
    run.cache.set_meta(_FRESH, _fresh_mark(run))
    run.fresh = False


def _fresh_mark(run: Migration) -> str:
    spec = spec_as_json(run.spec)
    return f"{spec['endpoint']} {spec['model']} {spec['size']}"


def begin(run: Migration, first: Manifest | None, callbacks: Callbacks) -> None:
    """Open the journal, or go on with it; runs of other settings are given up. `first` protected the plan."""
    give_up_others(run.folder, run.targets, run.spec, run.target.qdrant)
    if run.journal is None:
        facts = {"spec": spec_as_json(run.spec), "manifest": first.name if first else None}
        facts["again"] = run.again
        run.journal = start_journal(run.folder, COMMAND, run.targets, **facts)
    run.undo = run.journal.undo or callbacks.undo_of(_undo_set(run, first))


def _undo_set(run: Migration, first: Manifest | None) -> Manifest | None:
    """The set that brings back what was there before this run; None if the newest one is older than that.

    If somebody deleted the collection, it may have been the result of a later migration than the set.
    """
    last = last_migration(run.folder, run.targets)
    if first is None or first.collection is None or last is None or not last.has_reached(VERIFIED):
        return first
    made = (last.fact("spec") or {}).get("size")
    gone = not exists(run.target.qdrant, run.target.collection)
    return None if gone and first.collection.size != made and not restored_since(run.folder, last) else first


def only_stage(run: Migration, runner: EmbeddingRunner) -> CollectionState | None:
    """`--no-switch`: the staged collection, proved; None where the live one is this migration's result already."""
    kind, live = situation(run)
    if kind == ADOPT:
        return None
    if live is None:
        raise UsageProblem(
            f"there is no collection '{run.target.collection}' to stand beside: --no-switch has nothing to wait for",
            next_step="python scripts/reembed_embeddings.py",
        )
    return stage(run, runner, live)


def migrate(run: Migration, runner: EmbeddingRunner, first: Manifest | None, callbacks: Callbacks) -> Filled:
    """Stage, exchange (or adopt) the collection, catch up, prove it, clean up, report.

    The guard is asked again right before the delete, and what it accepts then is what the journal names and
    `voice` is told the way back to.
    """
    kind, live = situation(run)
    went_on_after_delete = run.reached(DELETING)
    if kind == REPLACE and live is not None and not run.in_place:
        stage(run, runner, live)
    elif kind != ABSENT or standing_staged(run) is None:
        scan = catch_up(runner, run.graph, run.cache, run.bar, run.bought, payloads_now(run))
        if kind == REPLACE:
            require_whole_graph(run, scan.own_text)
    if kind == REPLACE:
        save_before(run.target.qdrant, run.target.collection, run.cache, journal_of(run))
    began = exchange(run, first, callbacks)
    filled = _fill(run)
    if began is not None and not run.absent_seconds:
        run.absent_seconds = filled.whole_at - began
    scan = catch_up(runner, run.graph, run.cache, run.bar, run.bought, payloads_now(run))
    run.odd = scan.odd
    late = _fill(run)
    late.outcome.added += filled.outcome.added
    if (
        began is not None
    ):  # a memory that went after the last sync took no point of the new collection with it
        run.removed = remove_orphans(run, get_state(run.target.qdrant, run.target.collection))
    rejected = [one.id for one in late.outcome.rejected]
    run.mended = verify_points(run, run.target.collection, rejected, own=False)
    _tidy(run, late)
    run.report = callbacks.report(
        make_report(run, scan, late.outcome, went_on_after_delete=went_on_after_delete)
    )
    _end(run)
    return late


def _fill(run: Migration) -> Filled:
    return with_room(run, partial(_filled, run))


def _filled(run: Migration) -> Filled:
    filled = fill(
        run.target,
        run.cache,
        run.cache.memory_count(),
        run.bar,
        journal_of(run).fact("aliases") or [],
        whole=run.reached(DELETING) or run.reached(PLACING),
        copied_from=standing_staged(run),
    )
    settings = journal_of(run).fact("settings")
    if settings:
        put_fan_out(run.target.qdrant, run.target.collection, settings["config"])
    run.aliases_taken, run.indexed = filled.aliases_taken, filled.indexed
    return filled


def _tidy(run: Migration, filled: Filled) -> None:
    """Stamp, note, and remove what was staged: the snapshot's files first, then the collection."""
    journal, stamped = journal_of(run), stamp(run.spec)
    set_metadata(run.target.qdrant, run.target.collection, stamped)
    run.cache.set_meta(_FRESH, "")
    journal.append(VERIFIED, points=filled.outcome.added, stamp=stamped)
    if run.has_staged:
        drop_staged(run)
        file_of(run).unlink(missing_ok=True)


def _end(run: Migration) -> None:
    """The report is written; a run killed before its journal is closed writes it again."""
    if run.bought.log:
        run.bought.log.settle(journal_of(run).run_id)
    journal_of(run).close("done")
