"""Both stores into one backup set, or neither: files first, the manifest last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.backup_set.archive import read_archive
from lib.backup_set.manifest import CollectionHalf, Drift, GraphHalf, Manifest, write_manifest
from lib.backup_set.unfinished import claim_stamp, remove_unfinished
from lib.errors import MigrationError
from lib.files import free_bytes, private_dir
from lib.graph.client import require_graph
from lib.graph.engine import Engine
from lib.journal import Journal
from lib.steps.beside import Beside
from lib.steps.pair_drift import PairIds
from lib.steps.progress import ProgressBar
from lib.steps.take_collection import CollectionSource, take_collection
from lib.steps.take_graph import GraphSource, take_graph
from lib.vectors.collection import get_state

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
) -> Manifest:
    """Take what is given and write the manifest; raises with nothing left under a final name.

    Raises MissingData where a source is absent, BackupDamaged where a file does not prove.
    """
    private_dir(folder)
    _check_room(folder, collection)
    stamp, created = claim_stamp(folder, journal)

    def take_the_graph(source: GraphSource, beside: Beside[GraphHalf] | None) -> GraphHalf:
        with bar("graph", None, "bytes") as progress:
            told, stop = (beside.moving(progress), beside.stop) if beside else (progress, None)
            return take_graph(source, folder, stamp, engines, verify=verify, progress=told, stop=stop)

    def take_the_collection(source: CollectionSource, beside: Beside[GraphHalf] | None) -> CollectionHalf:
        with bar("collection", None, "bytes") as progress:
            told = beside.watching(progress) if beside else progress
            return take_collection(source, folder, stamp, journal, verify=verify, progress=told)

    try:
        with PairIds() as ids:
            halves: tuple[GraphHalf | None, CollectionHalf | None]
            if graph and collection:
                halves = _both(partial(take_the_graph, graph), partial(take_the_collection, collection))
            else:
                halves = (
                    take_the_graph(graph, None) if graph else None,
                    take_the_collection(collection, None) if collection else None,
                )
            drift = _drift(ids, graph, folder, halves[1])
        return write_manifest(folder, Manifest(stamp, created, *halves, drift))
    except BaseException:
        remove_unfinished(folder, journal)  # both or neither
        raise


def _check_room(folder: Path, collection: CollectionSource | None) -> None:
    need = _ROOM
    if collection:
        state = get_state(collection.qdrant, collection.collection)
        need += state.points * state.size * 4
    free = free_bytes(folder)
    if free < need:
        raise MigrationError(
            f"{folder} has {free >> 20} MiB free, the backup may need {need >> 20} MiB",
            next_step=f"df -h {folder}   then free some room, or name another folder with --backup-dir",
        )


def _both(
    take_the_graph: Callable[[Beside[GraphHalf]], GraphHalf],
    take_the_collection: Callable[[Beside[GraphHalf]], CollectionHalf],
) -> tuple[GraphHalf, CollectionHalf]:
    """Both at the same time: the collection from the moment on that the graph's is fixed, never before it.

    So what the graph's file holds was in the collection when its ids were read. The collection is the main thread's:
    it journals, and undoes on the server what a signal breaks off.
    """
    with Beside(take_the_graph) as graph:
        graph.wait_begun()
        collection_half = take_the_collection(graph)
        return graph.result(), collection_half


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
