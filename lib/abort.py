"""`--abort`: give up unfinished runs. Removes what their journals name, then closes the journals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lib.backup import phases
from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource
from lib.backup.run import clean_up_backup
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.qdrant.collection import CollectionState, exists, get_state, health
from lib.clients.qdrant.transport import Qdrant
from lib.console import Console
from lib.errors import DONE, GuardRefused, MigrationError
from lib.files import require_own
from lib.journal import Journal, names_in, open_journals
from lib.restore import collection as collections
from lib.restore.graph import clean_up_graph
from lib.restore.run import COMMAND as RESTORE

if TYPE_CHECKING:
    from lib.config import Config

ABORTED = "aborted by the operator"


@dataclass
class Aborted:
    """The runs that were given up, what was removed, and what remains."""

    runs: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def abort_reembed(qdrant: Qdrant, cache: EmbeddingCache, folder: Path, targets: list[str]) -> Aborted:
    """Give up the re-embeddings and spot checks of these stores. Raises GuardRefused before anything is removed."""
    from lib.reembed.context import mark_fresh  # imports numpy, which a backup does not load
    from lib.reembed.quality import SPOT_CHECK, remove_plan

    name, done = names_in(targets)[-1], Aborted()
    journals = open_journals(folder, targets, phases.COMMAND, SPOT_CHECK)
    for journal in journals:
        _require_new_collection(qdrant, name, journal)
    for journal in journals:
        done.removed += phases.remove_staged(qdrant, journal)
        remove_plan(cache, journal)
        journal.close(ABORTED)
        done.runs.append(journal.run_id)
    if journals:
        mark_fresh(cache, None)  # the next --fresh pays again
        done.left += [_live(qdrant, name), "the vectors that were paid for stay in the embedding cache"]
    return done


def abort_restore(graph: GraphSource, collection: CollectionSource, folder: Path, targets: list[str]) -> Aborted:
    """Give up the restores of these stores. Raises GuardRefused before anything is removed."""
    qdrant, name, done = collection.qdrant, collection.collection, Aborted()
    journals = open_journals(folder, targets, RESTORE)
    for journal in journals:
        if collections.is_absent(journal) and not ((state := _state(qdrant, name)) and state.points):
            raise _refused(name, journal, "the same restore again")
    for journal in journals:
        aliases = collections.aliases_taken_off(journal)
        clean_up_backup(collection, journal)
        done.removed += collections.clean_up_collection(collection, journal)
        left = phases.snapshot_deletions(collection, journal)
        done.left += [f"perhaps a snapshot of that run on the server; delete it: {one}" for one in left]
        done.removed += clean_up_graph(graph, journal)
        if aliases:
            done.left.append(f"aliases that the restore removed: {', '.join(aliases)}")
        if journal.fact("manifest"):
            done.left.append(f"the safety backup: {folder / str(journal.fact('manifest'))}")
        if journal.is_open:
            journal.close(ABORTED)
            done.runs.append(journal.run_id)
    if journals:
        done.left.append(_live(qdrant, name))
    return done


def _live(qdrant: Qdrant, name: str) -> str:
    """The collection as it is now. The runs are given up already, so an error is part of what is reported."""
    try:
        if not exists(qdrant, name):
            return f"there is no collection '{name}'"
        state = get_state(qdrant, name)
    except MigrationError as error:
        return f"collection '{name}', which cannot be read now: {error}"
    return f"collection '{name}' as it is now: {state.points:,} points of {state.size}d"


def _state(qdrant: Qdrant, name: str) -> CollectionState | None:
    """The collection's state; None if there is none that can be used. Raises QdrantError if that is not known now."""
    return get_state(qdrant, name) if health(qdrant, name) in {"live", "unavailable"} else None


def _require_new_collection(qdrant: Qdrant, name: str, journal: Journal) -> None:
    """Raise GuardRefused if the run deleted the collection, and no collection of at least its size has replaced it."""
    if not journal.has_reached(phases.DELETING):
        return
    if state := _state(qdrant, name):
        if journal.has_reached(phases.STAGED_RESTORED, phases.VERIFIED):
            return
        before = journal.fact("settings") or {}
        size = before.get("config", {}).get("params", {}).get("vectors", {}).get("size")
        if state.points and state.size == size and state.points >= (before.get("points_count") or 0):
            return
    raise _refused(name, journal, "python scripts/reembed_embeddings.py")


def _refused(name: str, journal: Journal, again: str) -> GuardRefused:
    return GuardRefused(
        f"run {journal.run_id} deleted the collection '{name}', and no complete one has replaced it:"
        " nothing was removed",
        next_step=f"finish the run:\n{journal.fact('again') or again}\nor undo it:\n{journal.undo}",
    )


def abort(config: Config, console: Console, command: str) -> int:
    """Give up the unfinished runs of `command` ("reembed" or "restore") on these stores, and report them."""
    from lib import connect

    folder, targets = config.backup_dir, config.targets()
    if folder.is_dir():  # its journals decide what is removed from the servers
        require_own(folder)
    collection = connect.open_collection(config)
    if command == "restore":
        done = abort_restore(connect.open_graph(config), collection, folder, targets)
    else:
        with connect.open_cache(config) as cache:
            done = abort_reembed(collection.qdrant, cache, folder, targets)
    lines = [f"aborted: run {one}" for one in done.runs] or ["no unfinished run of these stores: nothing to abort"]
    lines += [f"removed: {one}" for one in done.removed] + [f"left: {one}" for one in done.left]
    console.result(dataclasses.asdict(done), "\n".join(lines))
    return DONE
