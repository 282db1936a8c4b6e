"""The sets on disk: finding, listing, and deleting the old ones whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lib.addresses import same_server
from lib.backup_set.manifest import CHECKED, PROOF_LEVELS, Manifest, read_manifest
from lib.errors import BackupDamaged, BadFile, MissingData, UsageProblem
from lib.files import sync_dir

GRAPH_DIR, COLLECTION_DIR, SPOOL_DIR = "falkordb", "qdrant", "embeddings"


def manifest_paths(folder: Path) -> list[Path]:
    """Every file that is named as a manifest, newest first."""
    return sorted(folder.glob("backup_[0-9]*_[0-9]*.json"), reverse=True)


def all_sets(folder: Path) -> list[Manifest]:
    """Every set whose manifest reads, newest first; broken manifests are passed over (see `--check all`)."""
    found = []
    for path in manifest_paths(folder):
        try:
            found.append(read_manifest(path))
        except (BackupDamaged, BadFile):
            continue
    return found


def latest(folder: Path) -> Manifest:
    """The newest set; raises MissingData where there is none, BackupDamaged where its manifest does not read."""
    for path in manifest_paths(folder):
        return read_manifest(path)  # never an older set in silence
    raise MissingData(f"no backup in {folder}", next_step="python scripts/backup_automem.py")


def newest_with(folder: Path, collection: str, server: str) -> Manifest | None:
    """The newest whole set that holds this collection of this server."""
    for manifest in all_sets(folder):
        half = manifest.collection
        here = half and half.collection == collection and same_server(half.server["address"], server)
        if here and is_complete(manifest):
            return manifest
    return None


def find_set(folder: Path, path: Path) -> Manifest | None:
    """The set that names `path` as one of its files: in `folder`, or beside the file itself."""
    for manifest in [*all_sets(folder), *all_sets(path.absolute().parent.parent)]:
        if any(manifest.file_of(half).resolve() == path.resolve() for half in manifest.halves):
            return manifest
    return None


def is_complete(manifest: Manifest) -> bool:
    """Whether every file of the set is in place with its size."""
    files = [(manifest.file_of(half), half.file.size) for half in manifest.halves]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def _proved(manifest: Manifest) -> bool:
    return is_complete(manifest) and PROOF_LEVELS.index(manifest.proof) >= PROOF_LEVELS.index(CHECKED)


def to_delete(folder: Path, keep: int, named: Iterable[str]) -> list[Manifest]:
    """The sets beyond the newest `keep`: never the newest proved pair nor one whose name is in `named`."""
    if keep < 1:
        raise UsageProblem("--keep must be at least 1", next_step="--cleanup --keep 3")
    sets, spared = all_sets(folder), set(named)
    newest = next((one.name for one in sets if _proved(one) and one.graph and one.collection), None)
    newest = newest or next((one.name for one in sets if _proved(one)), None)
    return [one for one in sets[keep:] if one.name != newest and one.name not in spared]


def delete_set(manifest: Manifest) -> None:
    """Delete a set whole: the manifest first, so that no set is ever left with a missing file."""
    assert manifest.path is not None
    manifest.path.unlink(missing_ok=True)
    sync_dir(manifest.path.parent)
    for half in manifest.halves:
        manifest.file_of(half).unlink(missing_ok=True)
