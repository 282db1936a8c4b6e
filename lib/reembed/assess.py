"""What stands under the collection's name, what is to be done with it, and the backup that this asks for."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lib.backup.catalog import newest_with
from lib.backup.collection import STAMP_KEY
from lib.backup.existing_points import existing_points
from lib.backup.graph import check_file
from lib.backup.last_migration import CREATED, DELETED, DELETING, PLACED, PLACING, kept_the_size
from lib.backup.manifest import Manifest
from lib.clients.embeddings.cache import Missing
from lib.clients.falkordb.connection import require_graph
from lib.clients.qdrant.cluster import topology
from lib.clients.qdrant.collection import (
    CollectionState,
    exists,
    get_state,
    health,
    is_failed,
    refuse_foreign,
    same_settings,
)
from lib.clients.qdrant.restoring import wait_restored
from lib.dimensions import same_model
from lib.errors import BackupDamaged, BadFile, GuardRefused, MissingData, StoreFailed
from lib.reembed.embed import PaidLog
from lib.reembed.guard import MAX_AGE_HOURS, Wanted, require_backup
from lib.reembed.migration import Migration
from lib.reembed.plan import Plan, only_live_ids, room_needed, scan_graph, textless_points, whole_plan
from lib.reembed.resume import manifest_of, refuse_stranger, refuse_stranger_staged
from lib.reembed.sync import missing_of, payloads_now
from lib.verify.vectors import vectors_agree

Found = tuple[str, CollectionState | None]  # the kind of the situation, and the live collection
ABSENT, ADOPT, REPLACE, DEAD = "absent", "adopt", "replace", "dead"
# A graph that lost more than this while texts were bought is a fault to look at, not a change to follow.
_LOST_SHARE, _LOST_FEW = 0.01, 10
# A restore that the server goes on with though its client was killed.
_UNDER_WAY, _UNDER_WAY_SECONDS = {"restoring", "failed", "unavailable"}, 60.0


def look(run: Migration, *, repair: bool = False) -> tuple[Plan, str, CollectionState | None]:
    """Read the graph into the plan and look at the live collection; nothing is changed on a server.

    `repair`: what stands there is to be brought level with the graph, not to be made anew.
    """
    require_graph(run.graph.conn, run.graph.graph, run.graph.address)
    scan = scan_graph(run.graph, run.cache, run.spec, run.bar, payloads_now(run))
    run.odd = [] if repair else scan.odd  # their points are left alone then
    run.planned, run.room = scan.own_text, room_needed(scan, run.spec)
    if not repair:
        run.bought.log = PaidLog(run.cache, run.spec, run.journal.run_id if run.journal else None)
    kind, state = situation(run)
    if not (repair or run.in_place):
        refuse_stranger_staged(run.folder, run.targets, run.target.qdrant, run.staged)
    if state is not None:  # a snapshot of one node would not be the collection
        run.in_place |= topology(run.target.qdrant, state.name).peers > 1
    if scan.own_text == 0 and (state.points if state else not _was_empty(run)):
        raise MissingData(
            f"graph '{run.graph.graph}' holds no memory that can be embedded ({scan.memories} Memory nodes):"
            f" '{run.target.collection}' is not touched",
            next_step="check FALKORDB_GRAPH, FALKORDB_HOST and FALKORDB_PORT with --show-config",
        )
    missing = run.cache.text_total() if run.fresh else run.cache.missing_total()
    if state is None:
        _refuse_foreign_settings(run)
        return whole_plan(scan, missing, run.spec, None, None, []), kind, None
    refuse_foreign(state.raw)
    if state.points == 0 and not run.journal:
        run.unlike = _backup_unlike(run, state)
    if repair:
        kind = ADOPT
        if not kept_the_size(run.folder, run.targets, run.spec):
            with existing_points(run.target.qdrant, state.name) as existing:
                missing = missing_of(run.cache, existing)
    with only_live_ids(run.target.qdrant, state.name, run.cache, run.graph) as only_live:
        run.textless = [] if repair else textless_points(only_live, run.graph)
        return whole_plan(scan, missing, run.spec, state, only_live, run.textless), kind, state


def _was_empty(run: Migration) -> bool:
    """Whether the collection that this run deleted held no point, so that recreating it empty loses nothing."""
    points = (journaled_settings(run) or {}).get("points_count")
    # Both: the embedding cache, which holds the kept payloads, can be lost.
    return run.reached(DELETING) and not points and run.cache.saved_count() == 0


def journaled_settings(run: Migration) -> dict[str, Any] | None:
    """The live collection as the run's journal has it: as it was deleted, or as it was when the staged one was made."""
    journal = run.journal
    return (journal.fact("settings") or journal.fact("staged_like")) if journal else None


def _refuse_foreign_settings(run: Migration) -> None:
    """Raise UsageProblem where the collection that is gone, as the run's journal or a backup has it, was foreign."""
    settings = journaled_settings(run)
    manifest = newest_with(run.folder, run.target.collection, run.target.qdrant.display)
    if not settings and manifest:
        settings = settings_of(manifest)["settings"]
    if settings:
        refuse_foreign(settings)


def _backup_unlike(run: Migration, empty: CollectionState) -> str:
    """The newest backup of this collection, by name, if it held points and the now empty one has other settings."""
    manifest = newest_with(run.folder, run.target.collection, run.target.qdrant.display)
    if manifest is None or manifest.collection is None or not manifest.collection.points:
        return ""
    with suppress(BackupDamaged, BadFile):
        before = settings_of(manifest)["settings"]
        return "" if same_settings(before, empty.raw, but_size=True) else manifest.name
    return ""


def settings_of(manifest: Manifest) -> dict[str, Any]:
    """The collection's settings and aliases from a backup, where the collection itself is gone."""
    from lib.backup.archive import peek_facts

    assert manifest.collection is not None
    facts = peek_facts(manifest.file_of(manifest.collection))
    settings = {"config": facts["config"], "payload_schema": facts["payload_schema"]}
    return {"settings": settings, "aliases": manifest.collection.aliases}


def situation(run: Migration) -> tuple[str, CollectionState | None]:
    """What stands there: nothing, something dead, this migration's own result, or what is to be replaced."""
    target = run.target
    if run.reached(PLACING) and health(target.qdrant, target.collection) in _UNDER_WAY:
        with suppress(StoreFailed):  # dead in the end: the run deletes it
            wait_restored(target.qdrant, target.collection, _UNDER_WAY_SECONDS)
    if not exists(target.qdrant, target.collection):
        refuse_stranger(run.folder, run.targets)
        return ABSENT, None
    if is_failed(target.qdrant, target.collection):
        return DEAD, None
    state = get_state(target.qdrant, target.collection)
    if state.points == 0:
        refuse_stranger(run.folder, run.targets)
    if state.size != run.spec.size:
        return REPLACE, state
    # What AutoMem made anew has its own settings, and may hold its first memories.
    settings = journaled_settings(run)
    alike = settings is None or same_settings(settings, state.raw, but_size=True)
    fresh = state.points == 0 and not run.reached(DELETING) and alike
    if run.reached(CREATED) or run.reached(PLACED) or fresh:
        return ADOPT, state
    if not run.fresh and alike and vectors_agree(target.qdrant, state, run.cache, run.spec):
        return ADOPT, state
    return REPLACE, state


def lacking_of_made(run: Migration, plan: Plan, live: CollectionState | None) -> Missing | None:
    """The texts that the collection lacks, if it is stamped with this model and size; None if it must be embedded.

    Also None where nothing would be bought that its points have already: then the run costs nothing extra, and
    repairs what differs.
    """
    stamp = live.metadata.get(STAMP_KEY) if live else None
    if live is None or not isinstance(stamp, dict) or run.journal is not None or not live.points:
        return None
    if live.size != run.spec.size or not same_model(stamp.get("model"), run.spec.model):
        return None
    with existing_points(run.target.qdrant, live.name) as existing:
        lacking = missing_of(run.cache, existing)
    return lacking if plan.texts > lacking.texts else None


def protection(run: Migration, kind: str, live: CollectionState | None) -> Manifest | None:
    """The backup that this run goes back to; the guard is asked where something is to be replaced.

    A run that deleted the collection earlier goes back to what it had then, never to a later backup of its own
    half-filled result. Raises GuardRefused.
    """
    if kind == DEAD and not run.reached(DELETING):
        raise GuardRefused(
            f"Collection '{run.target.collection}' is dead: it answers with errors only and cannot be read",
            next_step="put a backup back first: python scripts/restore_from_backup.py latest",
        )
    accepted = _guard(run, live) if kind == REPLACE and live is not None else None
    if accepted or run.reached(DELETING):
        return accepted or manifest_of(run.folder, run.journal)
    if kind == ADOPT:
        return None
    return newest_with(run.folder, run.target.collection, run.target.qdrant.display)


def _guard(run: Migration, state: CollectionState) -> Manifest | None:
    """The set that the guard accepts; None where nothing is at stake."""
    if state.points == 0:
        return None
    with (
        existing_points(run.target.qdrant, state.name, payload=False) as live,
        only_live_ids(run.target.qdrant, state.name, run.cache, run.graph) as only_live,
    ):
        if run.reached(DELETED) and not len(only_live) and _is_recent(run):
            return None  # made anew meanwhile, every id of it in the graph: its payloads are kept
        wanted = Wanted(run.target.qdrant.display, state, live, only_live)
        return require_backup(run.folder, wanted, run.spec.size)


def _is_recent(run: Migration) -> bool:
    """Whether the run that deleted the collection is of today, and the backup it relied on is still in place."""
    assert run.journal is not None
    manifest = manifest_of(run.folder, run.journal)
    if run.journal.age_hours > MAX_AGE_HOURS or manifest is None or manifest.collection is None:
        return False
    try:
        check_file(manifest.file_of(manifest.collection), manifest.collection.file)
    except BackupDamaged:
        return False
    return True


def require_whole_graph(run: Migration, usable: int) -> None:
    """Raise MissingData, before the delete, where the graph lost memories since the plan was shown."""
    lost = run.planned - usable
    if lost <= 0 or (usable and lost <= max(_LOST_FEW, _LOST_SHARE * run.planned)):
        return
    raise MissingData(
        f"graph '{run.graph.graph}' lost {lost} of {run.planned} memories since the plan was made:"
        f" '{run.target.collection}' is not touched",
        next_step="look at the graph; if this is meant, run the same command again (nothing is bought twice)",
    )
