"""Both stores into one backup set, or neither: files first, the manifest last."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote

from lib.backup_set.archive import read_archive
from lib.backup_set.manifest import BACKUP, CollectionHalf, Drift, GraphHalf, Manifest, write_manifest
from lib.backup_set.unfinished import claim_stamp, remove_unfinished
from lib.errors import AccessRefused, MigrationError
from lib.files import free_bytes, private_dir
from lib.graph.client import require_graph
from lib.graph.engine import Engine
from lib.graph.preflight import memory_used
from lib.journal import Journal
from lib.steps.beside import Beside
from lib.steps.pair_drift import PairIds
from lib.steps.progress import ProgressBar
from lib.steps.take_collection import CollectionSource, take_collection
from lib.steps.take_graph import GraphSource, take_graph
from lib.vectors.collection import get_state

_PACKED = 4  # an RDB takes a fifth to a twentieth of the server's memory, as seen on 4.16.3 and 4.22.1
_ROOM = 64 << 20  # what the files need at the very least; a full disk is also noticed while writing


def require_sources(graph: GraphSource | None, collection: CollectionSource | None) -> None:
    """Raise MissingData where what is to be read is absent: asked before anything is written."""
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
    """Take what is given and write the manifest; raises with nothing left under a final name.

    Raises MissingData where a source is absent, BackupDamaged where a file does not prove.
    """
    private_dir(folder)
    _check_room(folder, graph, collection)
    stamp, created = claim_stamp(folder, journal)
    try:
        with PairIds() as ids:
            taking = _Taking(folder, stamp, engines, journal, bar, ids, verify)
            halves = taking.halves(graph, collection)
            drift = _drift(ids, graph, folder, halves[1])
        return write_manifest(folder, Manifest(stamp, created, *halves, drift, purpose=purpose))
    except BaseException:
        remove_unfinished(folder, journal)  # both or neither
        raise


def _check_room(folder: Path, graph: GraphSource | None, collection: CollectionSource | None) -> None:
    need = _ROOM
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


@dataclass(frozen=True)
class _Taking:
    """The halves of one set."""

    folder: Path
    stamp: str
    engines: list[Engine]
    journal: Journal
    bar: ProgressBar
    ids: PairIds
    verify: bool

    def halves(
        self, graph: GraphSource | None, collection: CollectionSource | None
    ) -> tuple[GraphHalf | None, CollectionHalf | None]:
        """What is given; both at the same time, the collection from the moment on that the graph's is fixed.

        So what the graph's file holds was in the collection when its ids were read. The collection is the main
        thread's: it journals, and undoes on the server what a signal breaks off.
        """
        if graph is None:
            return None, self._collection(collection) if collection else None
        if collection is None:
            return self._graph(graph), None
        with Beside(partial(self._graph, graph)) as beside:
            beside.wait_begun()
            collection_half = self._collection(collection, beside)
            return beside.result(), collection_half

    def _graph(self, source: GraphSource, beside: Beside[GraphHalf] | None = None) -> GraphHalf:
        with self.bar("graph", None, "bytes") as progress:
            return take_graph(
                source,
                self.folder,
                self.stamp,
                self.engines,
                verify=self.verify,
                progress=beside.moving(progress) if beside else progress,
                stop=beside.stop if beside else None,
                on_loaded=partial(self.ids.read_graph, graph=source.graph),
            )

    def _collection(
        self, source: CollectionSource, beside: Beside[GraphHalf] | None = None
    ) -> CollectionHalf:
        with self.bar("collection", None, "bytes") as progress:
            return take_collection(
                source,
                self.folder,
                self.stamp,
                self.journal,
                verify=self.verify,
                progress=beside.watching(progress) if beside else progress,
                on_ids=self.ids.take_points,
            )


def _drift(
    ids: PairIds, graph: GraphSource | None, folder: Path, collection_half: CollectionHalf | None
) -> Drift | None:
    """Of what the files hold; where the graph's was not opened for a proof, of the live graph."""
    if graph is None or collection_half is None:
        return None
    if not ids.has_graph:
        ids.read_graph(graph.conn, graph.graph)
    if not ids.has_points:
        read_archive(folder / collection_half.file.name, on_ids=ids.take_points)
    return ids.drift()
