"""The whole restore: every file proved first, both rehearsed, a safety backup, then the switches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from lib.automem_api import AutoMemApi, health
from lib.backup_set.manifest import Manifest
from lib.errors import MigrationError, StoreFailed, UsageProblem
from lib.graph.client import list_graphs
from lib.graph.engine import Engine
from lib.graph.read import schema
from lib.journal import Journal, open_journals, start_journal
from lib.steps import restore_collection as collections
from lib.steps import restore_graph as graphs
from lib.steps.progress import ProgressBar
from lib.steps.restore_files import Wanted
from lib.steps.take_collection import CollectionSource
from lib.steps.take_graph import GraphSource
from lib.steps.take_pair import take_backup
from lib.vectors.collection import exists, is_dead

COMMAND = "restore"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Site:
    """Where a restore happens: opened stores (None: not needed), the backup folder, the engines, AutoMem's API."""

    graph: GraphSource | None
    collection: CollectionSource | None
    folder: Path
    targets: list[str]
    engines: list[Engine]
    api: AutoMemApi
    bar: ProgressBar
    say: Say


@dataclass(frozen=True)
class Options:
    """The operator's choices."""

    safety: bool = True
    force_version: bool = False
    while_running: bool = False


@dataclass
class Proved:
    """The files, proved; the graph's stays loaded while the restore runs."""

    graph: graphs.LoadedBackup | None = None
    collection: collections.CollectionBackup | None = None


@dataclass
class Restored:
    """What was done: the safety backup, and where late writes to the old graph went."""

    safety: Manifest | None = None
    late_writes: Path | None = None
    notes: list[str] = field(default_factory=list)


def prove_files(site: Site, wanted: Wanted, stack: ExitStack, options: Options) -> Proved:
    """Prove every file before any store is touched. Raises BackupDamaged, NoEngine, StoreFailed."""
    proved = Proved()
    if wanted.archive:
        assert site.collection is not None
        site.say(f"proving {wanted.archive}")
        proved.collection = collections.open_backup(wanted.archive, wanted.collection_half)
        collections.check_version(proved.collection, site.collection.qdrant, force=options.force_version)
    if wanted.rdb:
        assert site.graph is not None
        site.say(f"proving {wanted.rdb}: loading it into a scratch FalkorDB")
        opened = graphs.open_backup(wanted.rdb, site.graph, site.engines, wanted.graph_half)
        proved.graph = stack.enter_context(opened)
        graphs.require_loaded(proved.graph)
    return proved


def require_quiet(site: Site, backup: graphs.LoadedBackup, options: Options) -> None:
    """Refuse the graph while AutoMem answers: its caches would write values under wrong names.

    With `while_running` it goes on only where labels, relationship types and property keys are the same, in order.
    """
    assert site.graph is not None
    if health(site.api) is None:
        return
    if not options.while_running:
        raise UsageProblem(
            f"AutoMem is running ({site.api.url} answers): after the graph is replaced its caches would write"
            " values under wrong names",
            next_step="stop it, not the stores:  docker compose stop flask-api\nthen run the same command again,"
            " and start it afterwards:  docker compose up -d --force-recreate flask-api",
        )
    if site.graph.graph not in list_graphs(site.graph.conn):
        return
    live, kept = schema(site.graph.conn, site.graph.graph), backup.proof.schema
    assert kept is not None
    for name in ("labels", "relationship_types", "property_keys"):
        if getattr(live, name) != getattr(kept, name):
            raise UsageProblem(
                f"--while-running is not safe here: the {name.replace('_', ' ')} of the live graph and of the backup"
                " differ, and a running AutoMem knows them by number",
                next_step="stop AutoMem (docker compose stop flask-api) and run this without --while-running",
            )


def settle(site: Site, proved: Proved | None = None) -> list[str]:
    """Put in order what a killed restore of this target left; the rehearsal it proved is kept for this run."""
    done = []
    for journal in open_journals(site.folder):
        if journal.command != COMMAND or journal.targets != site.targets:
            continue
        if site.graph:
            done += graphs.settle_graph(site.graph, journal)
        if site.collection:
            backup = proved.collection if proved else None
            done += collections.settle_collection(
                site.collection.qdrant, site.collection.collection, journal, backup
            )
        journal.close("settled by the next restore")
    return done


def restore(site: Site, proved: Proved, undo: Callable[[Manifest | None], str], options: Options) -> Restored:
    """Rehearse, back up what is there, switch. Raises with the stores as they were, or says how to go on."""
    result = Restored()
    result.notes += settle(site, proved)
    journal = start_journal(site.folder, COMMAND, site.targets)
    payload, temporary = _rehearse(site, proved, journal)
    back = ""
    try:
        if options.safety:
            result.safety = _safety_backup(site, proved, journal)
            journal.append("safety backup", manifest=result.safety.name if result.safety else None)
        back = undo(result.safety)
        site.say(f"\nswitching now. To undo:\n{back}\nTo go on after a crash: the same command again.\n")
        if proved.collection and site.collection and temporary:
            _switch_collection(site.collection, proved.collection, temporary, journal, site.bar, back)
    except BaseException as error:
        if _abandon(site, temporary, journal) or not isinstance(error, MigrationError):
            raise
        raise StoreFailed(
            f"the collection is not in place: {error}; its rehearsal {temporary} stands whole on the server",
            next_step=f"run the same command again, it goes on from the rehearsal; or undo:\n{back}",
        ) from error
    if temporary and site.collection:
        collections.drop_temporary(site.collection.qdrant, temporary)
    if proved.graph and site.graph and payload is not None:
        _switch_graph(site, proved.graph, payload, journal, back, options, result)
    _supersede(site, proved)
    journal.close("done")
    return result


def _rehearse(site: Site, proved: Proved, journal: Journal) -> tuple[bytes | None, str | None]:
    payload = temporary = None
    if proved.graph and site.graph:
        site.say("the target proves that it takes the graph, under a throw-away name")
        payload = graphs.rehearse(proved.graph, site.graph, journal)
    if proved.collection and site.collection:
        size = proved.collection.proof.archive.snapshot_size
        with site.bar("rehearse the collection", size, "bytes") as progress:
            qdrant, name = site.collection.qdrant, site.collection.collection
            temporary = collections.rehearse(proved.collection, qdrant, name, journal, progress)
    return payload, temporary


def _safety_backup(site: Site, proved: Proved, journal: Journal) -> Manifest | None:
    """Back up what is about to be replaced; what is absent needs none, what is dead is lost already."""
    graph = site.graph if proved.graph else None
    collection = site.collection if proved.collection else None
    if graph and graph.graph not in list_graphs(graph.conn):
        graph = None
    if collection and not exists(collection.qdrant, collection.collection):
        collection = None
    if collection and is_dead(collection.qdrant, collection.collection):
        site.say(f"'{collection.collection}' is dead and cannot be read: nothing of it can be backed up")
        collection = None
    if graph is None and collection is None:
        return None
    site.say("safety backup of what is there now")
    return take_backup(graph, collection, site.folder, site.engines, journal, site.bar)


def _switch_collection(
    source: CollectionSource,
    backup: collections.CollectionBackup,
    temporary: str,
    journal: Journal,
    bar: ProgressBar,
    undo: str,
) -> None:
    with bar("restore the collection", None, "bytes") as progress:
        collections.replace_live(
            backup, source.qdrant, source.collection, temporary, journal, progress, undo=undo
        )


def _switch_graph(
    site: Site,
    backup: graphs.LoadedBackup,
    payload: bytes,
    journal: Journal,
    undo: str,
    options: Options,
    result: Restored,
) -> None:
    assert site.graph is not None
    quiet = not options.while_running
    old = graphs.switch_graph(backup, site.graph, payload, journal, undo=undo, quiet=quiet)
    if old is None:
        return
    half = result.safety.graph if result.safety else None
    result.late_writes = graphs.retire_old(site.graph, old, half, site.folder, journal)


def _abandon(site: Site, temporary: str | None, journal: Journal) -> bool:
    """Before the delete nothing has changed: clean up, True. After it the rehearsal is what the next run uses."""
    if journal.has_reached(collections.SWITCHING) and not journal.has_reached(collections.SWITCHED):
        return False
    if site.collection and temporary:
        collections.drop_temporary(site.collection.qdrant, temporary)
    journal.close("failed, nothing changed")
    return True


def _supersede(site: Site, proved: Proved) -> None:
    """An unfinished re-embedding ends here: the collection that it was making is not the one that stands now."""
    for journal in open_journals(site.folder):
        if journal.command == "reembed" and journal.targets == site.targets and proved.collection:
            journal.close("superseded by a restore")
