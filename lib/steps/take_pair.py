"""Both stores into one backup set, or neither: files first, the manifest last."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lib.backup_set.archive import read_archive
from lib.backup_set.manifest import CollectionHalf, Drift, GraphHalf, Manifest, write_manifest
from lib.backup_set.unfinished import claim_stamp, remove_unfinished
from lib.errors import MigrationError
from lib.files import free_bytes, private_dir
from lib.graph.client import require_graph
from lib.graph.engine import Engine
from lib.graph.read import iter_memories
from lib.journal import Journal
from lib.steps.memories import unusable
from lib.steps.payloads import PointId, point_id
from lib.steps.present import IdTable, as_id, as_text
from lib.steps.progress import ProgressBar
from lib.steps.take_collection import CollectionSource, take_collection
from lib.steps.take_graph import GraphSource, take_graph
from lib.vectors.collection import get_state

_EXAMPLES = 20
_PAGE = 500
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
    try:
        graph_half = _graph(graph, folder, stamp, engines, bar, verify=verify)
        collection_half = _collection(collection, folder, stamp, journal, bar, verify=verify)
        drift = _drift(graph, folder, collection_half)
        return write_manifest(folder, Manifest(stamp, created, graph_half, collection_half, drift))
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


def _graph(
    source: GraphSource | None,
    folder: Path,
    stamp: str,
    engines: list[Engine],
    bar: ProgressBar,
    *,
    verify: bool,
) -> GraphHalf | None:
    if source is None:
        return None
    with bar("graph", None, "bytes") as progress:
        return take_graph(source, folder, stamp, engines, verify=verify, progress=progress)


def _collection(
    source: CollectionSource | None,
    folder: Path,
    stamp: str,
    journal: Journal,
    bar: ProgressBar,
    *,
    verify: bool,
) -> CollectionHalf | None:
    if source is None:
        return None
    with bar("collection", None, "bytes") as progress:
        return take_collection(source, folder, stamp, journal, verify=verify, progress=progress)


def _drift(graph: GraphSource | None, folder: Path, half: CollectionHalf | None) -> Drift | None:
    """Ids on one side only: memories without a point, points without a memory."""
    if graph is None or half is None:
        return None
    with IdTable() as points, IdTable() as seen:
        read_archive(
            folder / half.file.name, on_ids=lambda ids: points.put((as_id(one), None) for one in ids)
        )
        missing: set[PointId] = set()
        for page in _pages(point_ids(graph)):
            present = points.payloads(page).keys()
            seen.put((one, None) for one in present)
            missing |= set(page) - present
        left: list[str] = []
        for page in points.ids():
            known = seen.payloads(page).keys()
            left += [as_text(one) for one in page if one not in known][: _EXAMPLES - len(left)]
        examples = sorted(map(as_text, missing))[:_EXAMPLES]
        return Drift(len(missing), len(points) - len(seen), examples, left)


def point_ids(graph: GraphSource) -> Iterator[PointId]:
    """The ids of the memories that should have a point."""
    for node in iter_memories(graph.conn, graph.graph):
        identity = point_id(node.properties.get("id"))
        if identity is not None and not unusable(node.properties):
            yield identity


def _pages(ids: Iterator[PointId]) -> Iterator[list[PointId]]:
    while page := list(islice(ids, _PAGE)):
        yield page
