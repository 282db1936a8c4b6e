"""What the FILE arguments of a restore mean: told from their content, at most one file for each store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from lib.backup_set.manifest import CollectionHalf, GraphHalf, Manifest, read_manifest
from lib.backup_set.sets import Deployment, broken_manifests, find_set, latest
from lib.errors import BadFile
from lib.steps.drill import ARCHIVE, MANIFEST, RDB, kind_of


@dataclass
class Wanted:
    """The files to restore, with their halves of a manifest where one names them."""

    rdb: Path | None = None
    archive: Path | None = None
    graph_half: GraphHalf | None = None
    collection_half: CollectionHalf | None = None
    notes: list[str] = field(default_factory=list)
    bare: bool = False  # the archive is none, but a snapshot as Qdrant's own API gives it


def read_wanted(words: list[str], folder: Path, owner: Deployment) -> Wanted:
    """Sort the FILE arguments; raises BadFile for one that is missing, empty, a folder or of an unknown kind."""
    wanted = Wanted()
    for word in words:
        if word == "latest":
            _take_set(wanted, latest(folder, owner))
            continue
        path = Path(word)
        kind = kind_of(path)
        if kind == MANIFEST:
            _take_set(wanted, read_manifest(path))
        elif kind == RDB:
            _take_rdb(wanted, path, _half_of(folder, path, "graph", wanted))
        elif kind == ARCHIVE:
            _take_archive(wanted, path, _half_of(folder, path, "collection", wanted))
        else:
            _take_archive(wanted, path, None)
            wanted.bare = True
    return wanted


def _half_of(folder: Path, path: Path, name: str, wanted: Wanted) -> GraphHalf | CollectionHalf | None:
    manifest = find_set(folder, path)
    for broken in [] if manifest else broken_manifests(folder, path):
        wanted.notes.append(
            f"{broken.name}, which may be the manifest of {path.name}, is damaged: the file is verified by its own"
            f" checksum alone.  What is wrong says:  python scripts/backup_automem.py --check {quote(str(broken))}"
        )
    return getattr(manifest, name) if manifest else None


def _take_set(wanted: Wanted, manifest: Manifest) -> None:
    if manifest.graph:
        _take_rdb(wanted, manifest.file_of(manifest.graph), manifest.graph)
    if manifest.collection:
        _take_archive(wanted, manifest.file_of(manifest.collection), manifest.collection)


def _take_rdb(wanted: Wanted, path: Path, half: GraphHalf | CollectionHalf | None) -> None:
    if wanted.rdb:
        raise BadFile(f"{path} and {wanted.rdb} are both of the graph", next_step="name one of them")
    wanted.rdb = path
    wanted.graph_half = half if isinstance(half, GraphHalf) else None


def _take_archive(wanted: Wanted, path: Path, half: GraphHalf | CollectionHalf | None) -> None:
    if wanted.archive:
        raise BadFile(f"{path} and {wanted.archive} are both of the collection", next_step="name one of them")
    wanted.archive = path
    wanted.collection_half = half if isinstance(half, CollectionHalf) else None
