"""One backup: both components or neither, and the manifest last. First it cleans up after killed runs."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote
from types import TracebackType

import redis

from lib.backup.archive import read_archive
from lib.backup.catalog import claim_stamp, remove_unfinished
from lib.backup.collection import CollectionSource, take_collection
from lib.backup.existing_points import as_text, pages, temporary_room
from lib.backup.graph import GraphSource, take_graph
from lib.backup.manifest import BACKUP, CollectionComponent, Drift, GraphComponent, Manifest, write_manifest
from lib.backup.payloads import PointId, point_id, unusable
from lib.backup.server_snapshots import AWAITED, by_node, remove_late, remove_own, removed
from lib.clients.falkordb.connection import require_graph
from lib.clients.falkordb.queries import iter_memories
from lib.clients.falkordb.scratch import Engine
from lib.clients.falkordb.swap import memory_used
from lib.clients.qdrant.collection import get_state
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import BackgroundTask, ProgressBar
from lib.errors import AccessRefused, MigrationError, UsageProblem
from lib.files import free_bytes, private_dir
from lib.journal import Journal, open_journals, start_journal

_EXAMPLES = 20
_PAGE = 2000
_GRAPH, _POINTS = "graph_ids", "point_ids"


def ids_for_points(conn: redis.Redis, graph: str) -> Iterator[PointId]:
    """The ids of the memories that should have a point."""
    for node in iter_memories(conn, graph, keys=("id", "content")):
        identity = point_id(node.properties.get("id"))
        if identity is not None and not unusable(node.properties):
            yield identity


class PairIds:
    """The ids of both halves in SQLite's own temporary file, gone when closed; each half may tell from its thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        with temporary_room():
            for table in (_GRAPH, _POINTS):
                self._db.execute(f"CREATE TABLE {table} (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def __enter__(self) -> PairIds:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def read_graph(self, conn: redis.Redis, graph: str) -> None:
        """Take the graph's ids, once: of several sources the first counts."""
        self._put(_GRAPH, map(as_text, ids_for_points(conn, graph)))

    def take_points(self, ids: Iterable[str]) -> None:
        """Take the collection's ids, one text each."""
        self._put(_POINTS, ids)

    @property
    def has_graph(self) -> bool:
        """Whether the graph's ids are here."""
        return _GRAPH in self._told

    @property
    def has_points(self) -> bool:
        """Whether the collection's ids are here."""
        return _POINTS in self._told

    def drift(self) -> Drift:
        """Memories without a point, points without a memory, with examples."""
        missing, left = self._only(_GRAPH, _POINTS), self._only(_POINTS, _GRAPH)
        return Drift(missing[0], left[0], missing[1], left[1])

    def _put(self, table: str, ids: Iterable[str]) -> None:
        for page in pages(((one,) for one in ids), _PAGE):
            with self._lock, temporary_room():
                self._db.execute("BEGIN")
                self._db.executemany(f"INSERT OR IGNORE INTO {table} VALUES (?)", page)  # noqa: S608 - a constant
                self._db.execute("COMMIT")
        self._told.add(table)

    def _only(self, table: str, other: str) -> tuple[int, list[str]]:
        where = f"FROM {table} t WHERE NOT EXISTS (SELECT 1 FROM {other} o WHERE o.id = t.id)"  # noqa: S608 - constants
        with temporary_room():
            number = int(self._db.execute(f"SELECT count(*) {where}").fetchone()[0])
            rows = self._db.execute(f"SELECT t.id {where} ORDER BY t.id LIMIT {_EXAMPLES}").fetchall()
        return number, [text for (text,) in rows]


_PACKED = 4  # an RDB has a fifth to a twentieth of the server's memory, as seen on 4.16.3 and 4.22.1
_LEAST_BYTES = 64 << 20  # that a backup needs; a full disk is also noticed while writing


def require_sources(graph: GraphSource | None, collection: CollectionSource | None) -> None:
    """Raise MissingData if the graph or the collection does not exist, before anything is written."""
    if graph:
        require_graph(graph.conn, graph.graph, graph.address)
    if collection:
        get_state(collection.qdrant, collection.collection)


def take_backup(
    graph: GraphSource | None,
    collection: CollectionSource | None,
    folder: Path,
    engines: list[Engine],
    journal: Journal,
    bar: ProgressBar,
    *,
    verify: bool = True,
    purpose: str = BACKUP,
) -> Manifest:
    """Back up what is given and write the manifest. After an error no file of the set exists.

    Raises MissingData if the graph or the collection does not exist, BackupDamaged if a file does not verify.
    """
    private_dir(folder)
    _check_room(folder, graph, collection)
    stamp, created = claim_stamp(folder, journal)
    try:
        with PairIds() as ids:
            saved = _save(graph, collection, folder, stamp, engines, journal, bar, ids, verify=verify)
            drift = _drift(ids, graph, folder, saved[1])
        return write_manifest(folder, Manifest(stamp, created, *saved, drift, purpose=purpose))
    except BaseException:
        remove_unfinished(folder, journal)  # both or neither
        raise


def _check_room(folder: Path, graph: GraphSource | None, collection: CollectionSource | None) -> None:
    need = _LEAST_BYTES
    if graph:
        with suppress(AccessRefused):
            need += memory_used(graph.conn) // _PACKED
    if collection:
        state = get_state(collection.qdrant, collection.collection)
        need += state.points * state.size * 4
    free = free_bytes(folder)
    if free < need:
        raise MigrationError(
            f"{folder} has {free >> 20} MiB free, the backup may need {need >> 20} MiB",
            next_step=f"df -h {quote(str(folder))}   then free some room, or name another folder with --backup-dir",
        )


def _save(
    graph: GraphSource | None,
    collection: CollectionSource | None,
    folder: Path,
    stamp: str,
    engines: list[Engine],
    journal: Journal,
    bar: ProgressBar,
    ids: PairIds,
    *,
    verify: bool,
) -> tuple[GraphComponent | None, CollectionComponent | None]:
    """Save the graph in the background, and the collection as soon as the graph's state is fixed.

    The main thread saves the collection: it writes the journal, and after a signal deletes the snapshot on the server.
    """

    def save_graph(task: BackgroundTask[GraphComponent]) -> GraphComponent:
        assert graph
        read_ids = partial(ids.read_graph, graph=graph.graph)
        take = partial(take_graph, graph, folder, stamp, engines, verify=verify, on_loaded=read_ids)
        with bar("graph", None, "bytes") as progress:
            return take(progress=task.moving(progress), stop=task.stop)

    def save_collection(task: BackgroundTask[GraphComponent] | None) -> CollectionComponent | None:
        if collection is None:
            return None
        take = partial(
            take_collection, collection, folder, stamp, journal, verify=verify, on_ids=ids.take_points
        )
        with bar("collection", None, "bytes") as progress:
            return take(progress=task.watching(progress) if task else progress)

    if graph is None:
        return None, save_collection(None)
    with BackgroundTask(save_graph) as task:
        task.wait_begun()  # so that what the graph's file holds was in the collection when its ids are read
        saved = save_collection(task)
        return task.result(), saved


def _drift(
    ids: PairIds, graph: GraphSource | None, folder: Path, collection_component: CollectionComponent | None
) -> Drift | None:
    """Compare the ids in the files; if no engine loaded the graph's file, those of the live graph."""
    if graph is None or collection_component is None:
        return None
    if not ids.has_graph:
        ids.read_graph(graph.conn, graph.graph)
    if not ids.has_points:
        read_archive(folder / collection_component.file.name, on_ids=ids.take_points)
    return ids.drift()


COMMAND = "backup"


def run_backup(
    graph: GraphSource | None,
    collection: CollectionSource | None,
    folder: Path,
    targets: list[str],
    engines: list[Engine],
    bar: ProgressBar,
    *,
    verify: bool = True,
) -> Manifest:
    """Take a set under the target's lock; raises like `take_backup`, with the journal open where a rest remains."""
    pending = _left_open(folder, targets)
    left = [one for one in pending if not clean_up_backup(folder, collection, one, pending)]
    journal = start_journal(folder, COMMAND, targets)
    try:
        manifest = take_backup(graph, collection, folder, engines, journal, bar, verify=verify)
    except BaseException as error:
        remove_unfinished(folder, journal)  # once more: a third Ctrl-C may have ended the first time
        if isinstance(error, KeyboardInterrupt) and collection:
            _remove(collection, journal, pending)  # once more: it may have come into the first time
        if removed(journal):
            journal.close("failed, nothing left")
        raise
    if removed(journal):
        journal.close(manifest.name)
    if collection:
        clean_up_late(collection, left)
    return manifest


def _left_open(folder: Path, targets: list[str]) -> list[Journal]:
    """Killed backups, and runs of other commands of which a snapshot alone is left: of these targets, oldest first."""
    here = (one for one in open_journals(folder) if one.targets == targets)
    return [one for one in here if one.command == COMMAND or one.phase == AWAITED]


def clean_up_backup(
    folder: Path, collection: CollectionSource | None, journal: Journal, pending: Sequence[Journal] = ()
) -> bool:
    """Remove what a killed run left of its backup, here and on the server; whether surely nothing is left now."""
    remove_unfinished(folder, journal)
    whole = journal.command == COMMAND or journal.phase == AWAITED  # a restore may have left more
    clean = removed(journal) or (collection is not None and _remove(collection, journal, pending))
    if clean and whole:
        journal.close("cleaned up by the next run")
    return clean


def clean_up_late(collection: CollectionSource, left: Sequence[Journal]) -> None:
    """Once more at the end of a run: by now the server may have ended what killed runs asked it for.

    Closes the journals of which nothing can come any more; the others stay open for the run after this one.
    """
    for journal in left:
        gone = [remove_late(*one) for one in _on_each_node(collection, journal, left)]
        if all(gone):
            journal.close("cleaned up by the next run")


def _remove(collection: CollectionSource, journal: Journal, pending: Sequence[Journal]) -> bool:
    for one in _on_each_node(collection, journal, pending):
        remove_own(*one)
    return removed(journal)


def _on_each_node(
    collection: CollectionSource, journal: Journal, pending: Sequence[Journal]
) -> Iterator[tuple[Qdrant, Journal, list[Journal]]]:
    """Each node that the run had make a snapshot, with what its journal and the others say of that node.

    Raises UsageProblem where the node is not listed any more: only the operator knows how to ask it.
    """
    clients = {one.display: one for one in (collection.qdrant, *collection.nodes)}
    for node, mine in by_node(journal):
        if removed(mine):
            continue
        if node is not None and node not in clients:
            raise UsageProblem(
                f"a killed run ({journal.run_id}) may have left a snapshot on the Qdrant node {node}, which "
                "QDRANT_NODE_URLS does not list now",
                next_step=f"list it again; or, if it is gone for good, delete {journal.path}",
            )
        others = [theirs for one in pending for about, theirs in by_node(one) if about == node]
        yield (clients[node] if node else collection.qdrant), mine, others
