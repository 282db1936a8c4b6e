"""One backup: both components or neither, and the manifest last. First it cleans up after killed runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice
from pathlib import Path

from lib.backup.archive import read_archive
from lib.backup.catalog import claim_stamp, remove_unfinished
from lib.backup.collection import CollectionSource, take_collection
from lib.backup.graph import GraphSource, take_graph
from lib.backup.manifest import BACKUP, SAFETY, CollectionComponent, Drift, GraphComponent, Manifest, write_manifest
from lib.backup.phases import AWAITED, remove_named_snapshots, removed, report_snapshots
from lib.backup.points import TemporaryIdTable, as_id, ids_for_points, orphan_ids
from lib.clients.falkordb.connection import require_graph
from lib.clients.falkordb.scratch import Engine
from lib.clients.falkordb.swap import memory_used
from lib.clients.qdrant.collection import get_state
from lib.concurrency import BackgroundTask, ProgressBar
from lib.errors import AccessRefused
from lib.files import private_dir, require_room
from lib.journal import Journal, open_journals, start_journal

_EXAMPLES = 20
_RDB_SHARE = 4  # assumed: an RDB took 1/5 to 1/20 of the server's memory on 4.16.3 and 4.22.1
_LEAST_BYTES = 64 << 20  # that a backup needs; a full disk is also noticed while writing
COMMAND = "backup"


def require_sources(graph: GraphSource | None, collection: CollectionSource | None) -> None:
    """Raise MissingData if the graph or the collection does not exist, before anything is written."""
    if graph:
        require_graph(graph.conn, graph.graph)
    if collection:
        get_state(collection.qdrant, collection.collection)


def take_backup(
    graph: GraphSource | None,
    collection: CollectionSource | None,
    engines: list[Engine],
    journal: Journal,
    bar: ProgressBar,
    *,
    verify: bool = True,
    purpose: str = BACKUP,
) -> Manifest:
    """Back up what is given into the journal's folder, both components or neither; the manifest last.

    Raises MissingData, BackupDamaged.
    """
    folder, need = private_dir(journal.folder), _LEAST_BYTES
    if graph:
        with suppress(AccessRefused):
            need += memory_used(graph.conn) // _RDB_SHARE
    if collection:
        state = get_state(collection.qdrant, collection.collection)
        need += state.points * state.size * 4
    require_room(folder, need, "the backup may need", ", or name another folder with --backup-dir")
    stamp, created = claim_stamp(journal)
    try:
        with TemporaryIdTable() as graph_ids, TemporaryIdTable() as point_ids:
            of_graph = of_collection = None
            if graph:
                of_graph = partial(
                    take_graph, graph, folder, stamp, engines, ids=graph_ids, verify=verify, at_once=purpose == SAFETY
                )
            if collection:
                of_collection = partial(take_collection, collection, stamp, journal, verify=verify, ids=point_ids)
            saved = _save(of_graph, of_collection, bar)
            drift = _drift(graph_ids, point_ids, graph, folder, saved[1])
        return write_manifest(folder, Manifest(stamp, created, *saved, drift, purpose=purpose))
    except BaseException:
        remove_unfinished(journal)  # both or neither
        raise


def _save(
    graph: Callable[..., GraphComponent] | None, collection: Callable[..., CollectionComponent] | None, bar: ProgressBar
) -> tuple[GraphComponent | None, CollectionComponent | None]:
    """Save the graph in the background, and the collection as soon as the graph's state is fixed.

    So the points of its memories exist when the collection's ids are read. The main thread saves the collection: it
    writes the journal, and after a signal deletes the server's snapshot.
    """

    def save_graph(task: BackgroundTask[GraphComponent]) -> GraphComponent:
        assert graph
        with bars:
            return graph(progress=task.moving(progress_of_graph), stop=task.stop)

    def save_collection(task: BackgroundTask[GraphComponent] | None) -> CollectionComponent | None:
        if collection is None:
            return None
        with bar("collection", None, "bytes") as progress:
            if task is None:
                return collection(progress=progress)
            return collection(progress=task.watching(progress), before_ids=task.wait_begun)

    if graph is None:
        return None, save_collection(None)
    bars = ExitStack()
    progress_of_graph = bars.enter_context(bar("graph", None, "bytes"))  # by this thread: so it is the first bar
    with BackgroundTask(save_graph) as task:
        saved = save_collection(task)
        return task.result(), saved


def _drift(
    graph_ids: TemporaryIdTable,
    point_ids: TemporaryIdTable,
    graph: GraphSource | None,
    folder: Path,
    collection_component: CollectionComponent | None,
) -> Drift | None:
    """Compare the ids in the files; if no engine loaded the graph's file, those of the live graph."""
    if graph is None or collection_component is None:
        return None
    if not graph_ids.complete:
        graph_ids.fill(ids_for_points(graph.conn, graph.graph))
    if not point_ids.complete:
        path = folder / collection_component.file.name
        read_archive(path, on_ids=lambda ids: point_ids.fill(map(as_id, ids)))
    missing, orphans = _only_in(graph_ids, point_ids), _only_in(point_ids, graph_ids)
    return Drift(missing[0], orphans[0], missing[1], orphans[1])


def _only_in(one: TemporaryIdTable, other: TemporaryIdTable) -> tuple[int, list[str]]:
    """How many ids of `one` are not in `other`, and the first of them."""
    found = orphan_ids(one, other.payloads)
    examples = [str(identity) for identity in islice(found, _EXAMPLES)]
    return len(examples) + sum(1 for _ in found), examples


def run_backup(
    graph: GraphSource | None,
    collection: CollectionSource | None,
    folder: Path,
    targets: list[str],
    engines: list[Engine],
    bar: ProgressBar,
    *,
    verify: bool = True,
    notice: Callable[[str], None] = lambda _text: None,
) -> Manifest:
    """Take a set under the target's lock. Raises like `take_backup`; the journal stays open if something is left.

    `notice` gets the snapshots that killed runs may have left on the server.
    """
    # Killed backups, and runs of other commands that left only a snapshot.
    killed = [one for one in open_journals(folder, targets) if one.command == COMMAND or one.phase == AWAITED]
    left = [one for one in killed if not clean_up_backup(collection, one)]
    journal = start_journal(folder, COMMAND, targets)
    try:
        manifest = take_backup(graph, collection, engines, journal, bar, verify=verify)
    except BaseException as error:
        remove_unfinished(journal)  # again: a third Ctrl-C may have stopped the first attempt
        if isinstance(error, KeyboardInterrupt) and collection:
            remove_named_snapshots(collection, journal)  # again: the interrupt may have stopped the first attempt
        if removed(journal):
            journal.close("failed, nothing left")
        raise
    if removed(journal):
        journal.close(manifest.name)
    if collection:
        report_snapshots(collection, left, notice)
    return manifest


def clean_up_backup(collection: CollectionSource | None, journal: Journal) -> bool:
    """Remove what a killed run left of its backup, here and on the server. Returns whether surely nothing is left."""
    only_snapshots = journal.command == COMMAND or journal.phase == AWAITED  # another restore may have left more
    remove_unfinished(journal)
    if collection:
        remove_named_snapshots(collection, journal)
    clean = removed(journal)
    if clean and only_snapshots:
        journal.close("cleaned up by the next run")
    return clean
