"""Find out what exists under the collection's name, what is to be done with it, and which backup protects it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from lib.backup.archive import peek_facts
from lib.backup.catalog import newest_with
from lib.backup.collection import STAMP_KEY
from lib.backup.manifest import Manifest, check_file
from lib.backup.phases import (
    CREATED,
    DELETED,
    DELETING,
    RESTORING_STAGED,
    STAGED_RESTORED,
    kept_the_size,
)
from lib.backup.points import existing_points
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
from lib.dimensions import is_model_of
from lib.errors import BackupDamaged, BadFile, GuardRefused, MissingData, StoreFailed
from lib.journal import Journal
from lib.reembed.context import Context, must_forget, reached
from lib.reembed.guard import MAX_AGE_HOURS, GuardedCollection, require_backup
from lib.reembed.plan import Plan, only_live_ids, room_needed, scan_graph, textless_points, whole_plan
from lib.reembed.resume import accepted_backup, refuse_foreign_staged, refuse_other_stores
from lib.reembed.sync import missing_of, payloads_now
from lib.verify.compare import vectors_agree

# Nothing exists; this migration's result, or an empty collection of the right size; the collection to replace; one
# that answers with errors only.
ABSENT, ADOPT, REPLACE, FAILED = "absent", "adopt", "replace", "failed"
# If the graph lost more than this during the run, something is wrong with it: the run stops.
_LOST_SHARE, _LOST_FEW = 0.01, 10
# The server continues a restore whose client was killed.
_RESTORE_RUNS, _RESTORE_SECONDS = {"restoring", "failed", "unavailable"}, 60.0


class Live(NamedTuple):
    """What exists under the collection's name: ABSENT, ADOPT, REPLACE or FAILED, and its state if it can be read."""

    kind: str
    state: CollectionState | None


@dataclass(frozen=True)
class Assessment:
    """What a run found before its first write. `journal` is that of the unfinished run to resume.

    `in_place`: no staged collection is built. `textless`: points that leave the collection though their memory exists,
    because neither has a text. `unlike`: the backup whose settings the collection, which is empty, does not have.
    """

    plan: Plan
    live: Live
    journal: Journal | None
    in_place: bool
    textless: list[str]
    unlike: str

    @property
    def room(self) -> int:
        """Bytes that the Qdrant server needs in addition to the live collection."""
        return room_needed(self.plan.scan, self.plan.spec)


def assess(ctx: Context, journal: Journal | None, *, repair: bool = False) -> Assessment:
    """Read the graph into the plan and find the state of the collection. Nothing is changed on a server.

    `repair`: the collection is to be synced with the graph (`--only-missing`), not replaced.
    """
    require_graph(ctx.graph.conn, ctx.graph.graph, ctx.graph.address)
    scan = scan_graph(ctx.graph, ctx.cache, ctx.spec, ctx.bar, payloads_now(ctx, journal))
    live = find_live(ctx, journal)
    state, in_place = live.state, ctx.in_place
    if not (repair or in_place):
        refuse_foreign_staged(ctx)
    if state is not None:  # a cluster's snapshots hold one node each, so nothing is staged there
        in_place = in_place or topology(ctx.qdrant, state.name).peers > 1
    if scan.own_text == 0 and (state.points if state else not _was_empty(ctx, journal)):
        raise MissingData(
            f"graph '{ctx.graph.graph}' holds no memory that can be embedded ({scan.memories} Memory nodes):"
            f" '{ctx.collection}' is not changed"
        )
    missing = ctx.cache.text_total() if must_forget(ctx) else ctx.cache.missing_total()
    backup = None
    if state is None or state.points == 0:
        backup = newest_with(ctx.folder, ctx.collection, ctx.qdrant.display)
    if state is None:
        settings = journaled_settings(journal) or (settings_of(backup)["settings"] if backup else None)
        if settings:
            refuse_foreign(settings)
        return Assessment(whole_plan(scan, missing, ctx.spec, None, None, []), live, journal, in_place, [], "")
    refuse_foreign(state.raw)
    unlike = _unlike(backup, state) if state.points == 0 and journal is None else ""
    if repair:
        live = Live(ADOPT, state)
        if not kept_the_size(ctx.folder, ctx.targets, ctx.spec):
            with existing_points(ctx.qdrant, state.name) as existing:
                missing = missing_of(ctx.cache, existing)
    with (
        existing_points(ctx.qdrant, state.name, payload=False) as existing,
        only_live_ids(existing, ctx.cache, ctx.graph) as only_live,
    ):
        textless = [] if repair else textless_points(only_live, ctx.graph)
        plan = whole_plan(scan, missing, ctx.spec, state, only_live, textless)
    return Assessment(plan, live, journal, in_place, textless, unlike)


def _was_empty(ctx: Context, journal: Journal | None) -> bool:
    """Return whether the collection that this run deleted had no point, so that recreating it empty loses nothing."""
    points = (journaled_settings(journal) or {}).get("points_count")
    # Both: the embedding cache, which holds the saved payloads, can be lost.
    return reached(journal, DELETING) and not points and ctx.cache.saved_count() == 0


def journaled_settings(journal: Journal | None) -> dict[str, Any] | None:
    """Return the live collection's raw info from before its delete, or from when the staged one was created."""
    return (journal.fact("settings") or journal.fact("staged_like")) if journal else None


def settings_of(manifest: Manifest) -> dict[str, Any]:
    """Return the collection's settings and aliases from a backup."""
    assert manifest.collection is not None
    facts = peek_facts(manifest.file_of(manifest.collection))
    settings = {"config": facts["config"], "payload_schema": facts["payload_schema"]}
    return {"settings": settings, "aliases": manifest.collection.aliases}


def _unlike(backup: Manifest | None, empty: CollectionState) -> str:
    """Return the name of the backup if it has points and other settings than the collection, which is empty now."""
    if backup is not None and backup.collection is not None and backup.collection.points:
        with suppress(BackupDamaged, BadFile):
            alike = same_settings(settings_of(backup)["settings"], empty.raw, but_size=True)
            return "" if alike else backup.name
    return ""


def find_live(ctx: Context, journal: Journal | None) -> Live:
    """Find what exists under the collection's name now."""
    qdrant, name = ctx.qdrant, ctx.collection
    if reached(journal, RESTORING_STAGED) and health(qdrant, name) in _RESTORE_RUNS:
        with suppress(StoreFailed):  # then it is deleted
            wait_restored(qdrant, name, _RESTORE_SECONDS)
    if not exists(qdrant, name):
        refuse_other_stores(ctx)
        return Live(ABSENT, None)
    if is_failed(qdrant, name):
        return Live(FAILED, None)
    state = get_state(qdrant, name)
    if state.points == 0:
        refuse_other_stores(ctx)
    return Live(ADOPT if _is_result(ctx, journal, state) else REPLACE, state)


def _is_result(ctx: Context, journal: Journal | None, state: CollectionState) -> bool:
    """Return whether the collection is what this migration makes, or empty and as it would make it."""
    if state.size != ctx.spec.size:
        return False
    # One that AutoMem recreated has AutoMem's settings, and may hold a new memory.
    settings = journaled_settings(journal)
    alike = settings is None or same_settings(settings, state.raw, but_size=True)
    if reached(journal, CREATED) or reached(journal, STAGED_RESTORED):
        return True
    if state.points == 0 and not reached(journal, DELETING) and alike:
        return True
    return alike and not must_forget(ctx) and vectors_agree(ctx.qdrant, state, ctx.cache, ctx.spec)


def missing_if_current(ctx: Context, assessment: Assessment) -> Missing | None:
    """Return the texts that the collection lacks if it has this model and size already; None if it must be embedded.

    Also None if a run would pay for nothing more than for those: it costs nothing and repairs what differs.
    """
    live = assessment.live.state
    stamp = live.metadata.get(STAMP_KEY) if live else None
    if live is None or not isinstance(stamp, dict) or assessment.journal is not None or not live.points:
        return None
    if live.size != ctx.spec.size or not is_model_of(stamp, ctx.spec):
        return None
    with existing_points(ctx.qdrant, live.name) as existing:
        missing = missing_of(ctx.cache, existing)
    return missing if assessment.plan.texts > missing.texts else None


def require_protection(ctx: Context, journal: Journal | None, live: Live) -> Manifest | None:
    """Return the backup that brings back the old collection, None if nothing is lost. Raises GuardRefused.

    The guard is asked if a collection is to be replaced. A run that has deleted the collection before returns to the
    backup that it had then, never to a later one of its own incomplete result.
    """
    if live.kind == FAILED and not reached(journal, DELETING):
        raise GuardRefused(
            f"Collection '{ctx.collection}' has failed: it answers with errors only and cannot be read",
            next_step="restore a backup first:\npython scripts/restore_from_backup.py latest",
        )
    accepted = _ask_guard(ctx, journal, live.state) if live.kind == REPLACE and live.state else None
    if accepted or reached(journal, DELETING):
        return accepted or accepted_backup(ctx, journal)
    return None if live.kind == ADOPT else newest_with(ctx.folder, ctx.collection, ctx.qdrant.display)


def _ask_guard(ctx: Context, journal: Journal | None, state: CollectionState) -> Manifest | None:
    """Return the backup that the guard accepts; None if there is nothing to lose."""
    if state.points == 0:
        return None
    with (
        existing_points(ctx.qdrant, state.name, payload=False) as live,
        only_live_ids(live, ctx.cache, ctx.graph) as only_live,
    ):
        if reached(journal, DELETED) and not len(only_live) and _is_recent(ctx, journal):
            return None  # recreated meanwhile, every id of it in the graph: its payloads are saved
        guarded = GuardedCollection(ctx.qdrant.display, state, live, only_live)
        return require_backup(ctx.folder, guarded, ctx.spec.size)


def _is_recent(ctx: Context, journal: Journal | None) -> bool:
    """Return whether the delete was within a day, and the backup that it relied on is unchanged."""
    backup = accepted_backup(ctx, journal)
    if journal is None or journal.age_hours > MAX_AGE_HOURS or backup is None or backup.collection is None:
        return False
    try:
        check_file(backup.file_of(backup.collection), backup.collection.file)
    except BackupDamaged:
        return False
    return True


def require_whole_graph(ctx: Context, assessment: Assessment, usable: int) -> None:
    """Raise MissingData, before the delete, if the graph lost memories since the plan: it has `usable` ones now."""
    planned = assessment.plan.scan.own_text
    lost = planned - usable
    if lost <= 0 or (usable and lost <= max(_LOST_FEW, _LOST_SHARE * planned)):
        return
    raise MissingData(
        f"graph '{ctx.graph.graph}' lost {lost} of {planned} memories since the plan was made:"
        f" '{ctx.collection}' is not changed",
        next_step="look at the graph; if this is intended, run the same command again (nothing is paid for twice)",
    )
