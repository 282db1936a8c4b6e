"""Find out what exists under the collection's name, what is to be done with it, and which backup protects it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from lib.backup import phases
from lib.backup.archive import peek_facts, read_archive
from lib.backup.catalog import backup_sets, newest_with
from lib.backup.collection import stamp_of
from lib.backup.manifest import CHECKED, VERIFICATION_LEVELS, CollectionComponent, Manifest, check_file
from lib.backup.points import TemporaryIdTable, as_id, existing_points
from lib.clients.embeddings.cache import Missing
from lib.clients.embeddings.cache_file import chunks
from lib.clients.embeddings.pricing import price_of
from lib.clients.falkordb.connection import require_graph
from lib.clients.qdrant import collection as collections
from lib.clients.qdrant.cluster import topology
from lib.clients.qdrant.collection import CollectionState
from lib.clients.qdrant.points import PointId, scroll
from lib.clients.qdrant.snapshots import wait_restored
from lib.dimensions import UNKNOWN_MODEL, EmbeddingSpec, is_model_of, model_settings
from lib.errors import BackupDamaged, BadFile, GuardRefused, MissingData, StoreFailed
from lib.journal import Journal
from lib.network import same_server
from lib.reembed import context
from lib.reembed.context import Context, accepted_backup, may_mix_models, must_forget, reached
from lib.reembed.plan import Scan, memories_now, only_live_ids, scan_graph
from lib.reembed.sync import missing_of
from lib.verify.compare import ONLY_MISSING, different_vectors

# Nothing exists; this migration's result, or an empty collection of the right size; the collection to replace; one
# that answers with errors only.
ABSENT, ADOPT, REPLACE, FAILED = "absent", "adopt", "replace", "failed"
_LOST_SHARE, LOST_FEW = 0.01, 10  # a run stops if the graph lost more since its plan
_RESTORE_RUNS, _RESTORE_SECONDS = {"restoring", "failed", "unavailable"}, 60.0  # also without its client
_EXAMPLES, _PAGE, _FIRST = 20, 500, 64
MAX_AGE_HOURS = 24.0
# The server refuses writes with less than 64 MiB free; log files and segment pages of 32 MiB each (1.11.3, 1.18.3).
_FIXED_BYTES = 320 << 20
_ORPHAN_SHARE = 0.01  # more than this are removed only with a verified backup
_SAME_SHARE = 0.9  # a day's new memories are fewer; another deployment has other ids


class Live(NamedTuple):
    """What exists under the collection's name: ABSENT, ADOPT, REPLACE or FAILED, and its state if it can be read."""

    kind: str
    state: CollectionState | None


@dataclass(frozen=True)
class Assessment:
    """What a run found before its first write, and what it will do. `journal` is that of the unfinished run to resume.

    `missing` texts must be embedded. `in_place`: no staged collection is built. `only_live` is the number of points
    without a memory; `textless` are those that leave the collection though their memory exists, because neither has a
    text. `unlike`: the backup whose settings the collection, which is empty, does not have. `repair`: the run is
    `--only-missing`.
    """

    scan: Scan
    missing: Missing
    spec: EmbeddingSpec
    live: Live
    journal: Journal | None
    in_place: bool
    only_live: int = 0
    only_live_examples: Sequence[str] = ()
    textless: Sequence[str] = ()
    unlike: str = ""
    repair: bool = False

    @property
    def price(self) -> float | None:
        """In US dollars; None for a model without a known price."""
        return price_of(self.missing.tokens, self.spec.model, self.spec.provider)

    @property
    def cached(self) -> int:
        """Memories that need no embedding: cached, or with the text of another one."""
        return self.scan.usable - self.missing.texts

    @property
    def room(self) -> int:
        """Bytes that the Qdrant server needs in addition to the live collection.

        Four times the points (the staged collection, its snapshot, the copies restored from it), and a fixed amount.
        """
        return round(4 * self.scan.usable * self.scan.point_bytes(self.spec.size)) + _FIXED_BYTES

    @property
    def disk_peak(self) -> int:
        """The most bytes that the server needs: for both collections, the new one's snapshot, the copy of that."""
        live = self.live.state
        return self.room + (round(live.points * self.scan.point_bytes(live.size)) if live else 0)


def assess(ctx: Context, journal: Journal | None, *, repair: bool = False) -> Assessment:
    """Read the graph into the plan, find the collection's state; change nothing. `repair`: synced, not replaced."""
    require_graph(ctx.graph.conn, ctx.graph.graph)
    scan = scan_graph(ctx, journal)
    live = find_live(ctx, journal)
    _require_saved_payloads(ctx, journal, live)
    state, in_place = live.state, ctx.in_place
    if not (repair or in_place):
        context.refuse_foreign_staged(ctx)
    if state is not None:  # a cluster's snapshots hold one node each, so nothing is staged there
        in_place = in_place or topology(ctx.qdrant, state.name).peers > 1
    # Nothing is lost if this run deleted a collection without points. The cache is asked, too, but it can be lost.
    points = (journaled_settings(journal) or {}).get("points_count")
    was_empty = reached(journal, phases.DELETING) and not points and ctx.cache.saved_count() == 0
    if scan.own_text == 0 and (state.points if state else not was_empty):
        raise MissingData(
            f"graph '{ctx.graph.graph}' holds no memory that can be embedded ({scan.memories} Memory nodes):"
            f" '{ctx.collection}' is not changed"
        )
    missing = ctx.cache.text_total() if must_forget(ctx) else ctx.cache.missing_total()
    backup = None if state and state.points else newest_with(ctx.folder, ctx.collection, ctx.qdrant.display)
    if state is None:
        settings = journaled_settings(journal) or (settings_of(backup)["settings"] if backup else None)
        if settings:
            collections.refuse_foreign(settings)
        return Assessment(scan, missing, ctx.spec, live, journal, in_place, repair=repair)
    collections.refuse_foreign(state.raw)
    if repair:
        live = Live(ADOPT, state)
        if not may_mix_models(ctx):
            with existing_points(ctx.qdrant, state.name) as existing:
                missing = missing_of(ctx.cache, existing)
    unlike = _unlike(backup, state) if backup and journal is None else ""
    with existing_points(ctx.qdrant, state.name, payload=False) as existing, only_live_ids(ctx, existing) as only_live:
        textless = sorted(map(str, memories_now(ctx.graph, only_live.ids())))
        orphans = (str(one) for page in only_live.ids() for one in page)
        examples = list(islice((one for one in orphans if one not in textless), _EXAMPLES))
        count = len(only_live) - len(textless)
    leaving = [] if repair else textless
    return Assessment(scan, missing, ctx.spec, live, journal, in_place, count, examples, leaving, unlike, repair)


@contextmanager
def orphan_points(
    ctx: Context, state: CollectionState, few: int = 0
) -> Iterator[tuple[TemporaryIdTable, set[PointId]]]:
    """The ids of the points without an embeddable memory, and those of them that stay, because their memory exists.

    The graph is asked after the points were read. Raises MissingData for an empty graph, GuardRefused if more than
    `few`, and more than 1% of the points, would be removed without a verified backup.
    """
    with existing_points(ctx.qdrant, state.name, payload=False) as live, only_live_ids(ctx, live) as only_live:
        if len(only_live) and ctx.cache.memory_count() == 0:
            raise MissingData(
                f"graph '{ctx.graph.graph}' holds no embeddable memory: nothing is removed from '{state.name}'"
            )
        memories = memories_now(ctx.graph, only_live.ids())
        count = len(only_live) - len(memories)
        if count > max(few, _ORPHAN_SHARE * state.points):
            found = find_backup(ctx.folder, GuardedCollection(ctx.qdrant.display, state, live, only_live))
            if isinstance(found, str):
                raise GuardRefused(
                    f"{count} of the {state.points} points of '{state.name}' have no memory in the graph;"
                    f" so many are not removed without a verified backup: {found}",
                    next_step=f"python scripts/backup_automem.py\n{ctx.again}",
                )
        yield only_live, memories


def require_removable(ctx: Context, state: CollectionState) -> None:
    """Raise like `orphan_points`; change nothing."""
    with orphan_points(ctx, state):
        pass


def _require_saved_payloads(ctx: Context, journal: Journal | None, live: Live) -> None:
    """Raise GuardRefused if what this run saved of the deleted points is lost, and no undo restored them."""
    kept = (journal.fact("kept") or 0) if journal and journal.has_reached(phases.DELETING) else 0
    held = live.state.points if live.state and live.kind == REPLACE else 0
    if journal and 2 * max(held, ctx.cache.saved_count()) < kept:
        raise GuardRefused(
            f"what only the points of '{ctx.collection}' held is lost: {ctx.cache.path} had {kept} payloads, which were"
            " saved before the collection was deleted, and has them no more",
            next_step="if that file was moved away and can be read, move it back, then run the same command again;\n"
            f"if not, undo the run, then run the same command again:\n{journal.undo}",
        )


def journaled_settings(journal: Journal | None) -> dict[str, Any] | None:
    """Return the live collection's raw info from before its delete, or from when the staged one was created."""
    return (journal.fact("settings") or journal.fact("staged_like")) if journal else None


def settings_of(manifest: Manifest) -> dict[str, Any]:
    """Return the collection's settings and aliases from a backup."""
    assert manifest.collection is not None
    facts = peek_facts(manifest.file_of(manifest.collection))
    settings = {"config": facts["config"], "payload_schema": facts["payload_schema"]}
    return {"settings": settings, "aliases": manifest.collection.aliases}


def _unlike(backup: Manifest, empty: CollectionState) -> str:
    """Return the name of the backup if it has points and other settings than the collection, which is empty now."""
    if backup.collection is not None and backup.collection.points:
        with suppress(BackupDamaged, BadFile):
            if not collections.same_settings(settings_of(backup)["settings"], empty.raw, but_size=True):
                return backup.name
    return ""


def find_live(ctx: Context, journal: Journal | None) -> Live:
    """Find what exists under the collection's name now."""
    qdrant, name = ctx.qdrant, ctx.collection
    if reached(journal, phases.RESTORING_STAGED) and collections.health(qdrant, name) in _RESTORE_RUNS:
        with suppress(StoreFailed):  # then it is deleted
            wait_restored(qdrant, name, _RESTORE_SECONDS)
    if not collections.exists(qdrant, name):
        context.refuse_other_stores(ctx)
        return Live(ABSENT, None)
    if collections.health(qdrant, name) == "failed":
        return Live(FAILED, None)
    state = collections.get_state(qdrant, name)
    if state.points == 0:
        context.refuse_other_stores(ctx)
    return Live(ADOPT if _is_result(ctx, journal, state) else REPLACE, state)


def _is_result(ctx: Context, journal: Journal | None, state: CollectionState) -> bool:
    """Return whether the collection is what this migration makes, or empty and as it would make it."""
    if state.size != ctx.spec.size:
        return False
    # One that AutoMem recreated has AutoMem's settings, and may hold a new memory.
    settings = journaled_settings(journal)
    alike = settings is None or collections.same_settings(settings, state.raw, but_size=True)
    if reached(journal, phases.CREATED, phases.STAGED_RESTORED):
        return True
    if state.points == 0 and not reached(journal, phases.DELETING) and alike:
        return True
    if not alike or must_forget(ctx):
        return False
    # An earlier run made it if the first points have the cache's vectors.
    page = next(scroll(ctx.qdrant, state.name, payload=["content"], vector=True, page=_FIRST))
    known, wrong = different_vectors(page, ctx.cache, ctx.spec, state)
    return known > 0 and not wrong


def missing_if_current(ctx: Context, assessment: Assessment) -> Missing | None:
    """Return the texts that the collection lacks if it has this model and size already; None if it must be embedded.

    Also None if a run would pay for nothing more than for those: it costs nothing and repairs what differs.
    """
    live = assessment.live.state
    if live is None or assessment.journal is not None or not live.points:
        return None
    if live.size != ctx.spec.size or not is_model_of(stamp_of(live.raw["config"]), ctx.spec):
        return None
    with existing_points(ctx.qdrant, live.name) as existing:
        missing = missing_of(ctx.cache, existing)
    return missing if assessment.missing.texts > missing.texts else None


def require_protection(ctx: Context, journal: Journal | None, live: Live) -> Manifest | None:
    """Return the backup that brings back the old collection, None if nothing is lost. Raises GuardRefused.

    The guard is asked if a collection is to be replaced. A run that has deleted the collection before returns to the
    backup that it had then, never to a later one, which has its incomplete result.
    """
    if live.kind == FAILED and not reached(journal, phases.DELETING):
        raise GuardRefused(
            f"Collection '{ctx.collection}' has failed: it answers with errors only and cannot be read",
            next_step="restore a backup first:\npython scripts/restore_from_backup.py latest",
        )
    accepted, state = None, live.state
    if live.kind == REPLACE and state and state.points:
        with existing_points(ctx.qdrant, state.name, payload=False) as ids, only_live_ids(ctx, ids) as only_live:
            # Recreated after the delete, every id of it in the graph: its payloads are saved.
            if not (reached(journal, phases.DELETED) and not len(only_live) and _is_recent(ctx, journal)):
                guarded = GuardedCollection(ctx.qdrant.display, state, ids, only_live)
                accepted = require_backup(ctx.folder, guarded, ctx.spec.size)
    if accepted or reached(journal, phases.DELETING):
        return accepted or accepted_backup(ctx, journal)
    return None if live.kind == ADOPT else newest_with(ctx.folder, ctx.collection, ctx.qdrant.display)


def _is_recent(ctx: Context, journal: Journal | None) -> bool:
    """Return whether the delete was within a day, and the backup that it relied on is unchanged."""
    backup = accepted_backup(ctx, journal)
    if journal is None or journal.age_hours > MAX_AGE_HOURS or backup is None or backup.collection is None:
        return False
    with suppress(BackupDamaged):
        check_file(backup.file_of(backup.collection), backup.collection.file)
        return True
    return False


def require_whole_graph(ctx: Context, assessment: Assessment, usable: int) -> None:
    """Raise MissingData, before the delete, if the graph lost memories since the plan: it has `usable` ones now."""
    planned = assessment.scan.own_text
    lost = planned - usable
    if lost <= 0 or (usable and lost <= max(LOST_FEW, _LOST_SHARE * planned)):
        return
    raise MissingData(
        f"graph '{ctx.graph.graph}' lost {lost} of {planned} memories since the plan was made:"
        f" '{ctx.collection}' is not changed",
        next_step="look at the graph; if this is intended, run the same command again (nothing is paid for twice)",
    )


@dataclass(frozen=True)
class GuardedCollection:
    """What a backup must hold: the server's address, the collection, all its ids, and those without a memory."""

    server: str
    state: CollectionState
    live: TemporaryIdTable
    only_live: TemporaryIdTable


def require_backup(folder: Path, guarded: GuardedCollection, configured: int) -> Manifest:
    """Return the newest backup set that protects the collection. Raises GuardRefused with the reason why none does."""
    found = find_backup(folder, guarded)
    if isinstance(found, Manifest):
        return found
    state = guarded.state
    how = "with different dimension" if state.size != configured else "and would be replaced"
    raise GuardRefused(
        f"Collection '{state.name}' already exists {how}\n"
        f"({state.size}d, {state.points} points; VECTOR_SIZE is {configured}d).\n"
        f"It is not changed without a verified backup: {found}",
        next_step="python scripts/backup_automem.py\npython scripts/reembed_embeddings.py",
    )


def find_backup(folder: Path, guarded: GuardedCollection) -> Manifest | str:
    """Return the newest backup set that protects the collection, or why the newest one does not."""
    why = ""
    for manifest in backup_sets(folder):
        fault = _fault(manifest, guarded)
        if fault is None:
            return manifest
        why = why or f"the newest, {manifest.name}, {fault}"
    return why or f"there is none in {folder}"


def _fault(manifest: Manifest, guarded: GuardedCollection) -> str | None:
    """Return why this set does not protect the collection, or None."""
    component = manifest.collection
    if component is None:
        return "holds no collection"
    if fault := _fault_in_manifest(manifest, component, guarded):
        return fault
    live = alone = 0  # how many of the live ids, and of those without a memory, the archive is expected to hold

    def count(ids: Iterator[str]) -> None:
        nonlocal live, alone
        for page in chunks(map(as_id, ids), _PAGE):
            live += len(guarded.live.payloads(page))
            alone += len(guarded.only_live.payloads(page))

    try:
        path = manifest.file_of(component)
        check_file(path, component.file)
        read_archive(path, on_ids=count)
    except BackupDamaged as error:
        return str(error)
    if live < _SAME_SHARE * len(guarded.live):
        return f"holds only {live} of the collection's {len(guarded.live)} points: it is of other data, or too old"
    missing = len(guarded.only_live) - alone
    return f"does not hold points that are in the collection alone: {missing}" if missing else None


def _fault_in_manifest(manifest: Manifest, component: CollectionComponent, guarded: GuardedCollection) -> str | None:
    server = component.server["address"]
    if component.collection != guarded.state.name or not same_server(server, guarded.server):
        return f"is of '{component.collection}' on {server}"
    if component.size != guarded.state.size:
        return f"is of {component.size}d vectors"
    if manifest.age_hours > MAX_AGE_HOURS:
        return f"is {manifest.age_hours:.0f} hours old (at most {MAX_AGE_HOURS:.0f})"
    if manifest.is_from_future:
        return f"is dated {-manifest.age_hours:.0f} hours in the future"
    if VERIFICATION_LEVELS.index(component.proof) < VERIFICATION_LEVELS.index(CHECKED):
        return "was never verified (--no-verify)"
    return None


def undo_of(manifest: Manifest | None, *, named: bool) -> str:
    """Return the commands that restore this backup's collection. `named`: they set EMBEDDING_PROVIDER in any case."""
    if manifest is None or manifest.collection is None:
        return "  (none: no collection was replaced)"
    component = manifest.collection
    file = quote(str(manifest.file_of(component)))
    lines = [f"  python scripts/restore_from_backup.py {file}", f"  export VECTOR_SIZE={component.size}"]
    if component.model == UNKNOWN_MODEL:
        # With the new vectors' model --only-missing would mix two models.
        lines += [
            "  # The backup does not record the model of the old vectors. Set it, then add newer memories:",
            "  # export EMBEDDING_MODEL=...",
            f"  # {ONLY_MISSING}",
        ]
    else:
        settings = model_settings(component.provider, component.model, named=named)
        lines += [*(f"  export {name}={quote(value)}" for name, value in settings.items()), f"  {ONLY_MISSING}"]
    return "\n".join(lines)
