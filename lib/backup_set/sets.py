"""The sets on disk: finding, listing, and deleting the old ones whole."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lib.addresses import same_server
from lib.backup_set.manifest import CHECKED, PROOF_LEVELS, Manifest, read_manifest
from lib.errors import BackupDamaged, BadFile, MissingData, UsageProblem
from lib.files import sync_dir
from lib.journal import Journal, read_journal

GRAPH_DIR, COLLECTION_DIR, SPOOL_DIR = "falkordb", "qdrant", "embeddings"


@dataclass(frozen=True)
class Deployment:
    """Whose sets: the graph and the collection by address and name. Several may share one backup folder."""

    graph_server: str
    graph: str
    collection_server: str
    collection: str

    def owns(self, manifest: Manifest) -> bool:
        """Whether every half of the set was taken here."""
        graph, collection = manifest.graph, manifest.collection
        return (graph is None or self._is(graph.graph, graph.server, self.graph, self.graph_server)) and (
            collection is None
            or self._is(collection.collection, collection.server, self.collection, self.collection_server)
        )

    @staticmethod
    def _is(name: str, server: dict[str, str], own_name: str, own_server: str) -> bool:
        return name == own_name and same_server(server["address"], own_server)


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


def latest(folder: Path, owner: Deployment) -> Manifest:
    """The newest set of this deployment.

    Raises MissingData where there is none, BackupDamaged where a newer manifest does not read: never an older set
    in silence.
    """
    for path in manifest_paths(folder):
        manifest = read_manifest(path)
        if owner.owns(manifest):
            return manifest
    raise MissingData(
        f"no backup in {folder} is of graph '{owner.graph}' or collection '{owner.collection}' at these addresses",
        next_step="python scripts/backup_automem.py   or name the file:  python scripts/backup_automem.py --list",
    )


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


def broken_manifests(folder: Path, path: Path) -> list[Path]:
    """Manifests that do not read and may be of `path`: of the same time, or with its name in them."""
    found = []
    paths = {*manifest_paths(folder), *manifest_paths(path.absolute().parent.parent)}
    for one in sorted(paths):
        stamp = one.stem.removeprefix("backup_")
        try:
            read_manifest(one)
        except (BackupDamaged, BadFile):
            if stamp in path.name or path.name.encode() in one.read_bytes():
                found.append(one)
    return found


def is_complete(manifest: Manifest) -> bool:
    """Whether every file of the set is in place with its size."""
    files = [(manifest.file_of(half), half.file.size) for half in manifest.halves]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def _proved(manifest: Manifest) -> bool:
    return is_complete(manifest) and PROOF_LEVELS.index(manifest.proof) >= PROOF_LEVELS.index(CHECKED)


def to_delete(folder: Path, keep: int, owner: Deployment, spared: Collection[str]) -> list[Manifest]:
    """This deployment's sets beyond the newest `keep`: never its newest proved pair nor a name in `spared`."""
    if keep < 1:
        raise UsageProblem("--keep must be at least 1", next_step="--cleanup --keep 3")
    sets = [one for one in all_sets(folder) if owner.owns(one)]
    newest = next((one.name for one in sets if _proved(one) and one.graph and one.collection), None)
    newest = newest or next((one.name for one in sets if _proved(one)), None)
    return [one for one in sets[keep:] if one.name != newest and one.name not in spared]


def named_in_journals(folder: Path, owner: Deployment, targets: list[str]) -> set[str]:
    """The sets that a run may still need.

    All that an open journal names anywhere, and those that the newest finished re-embedding of these targets names,
    until a newer proved set of the collection is there.
    """
    journals = [one for path in sorted(folder.glob("journal_*.jsonl")) if (one := read_journal(path))]
    finished = [one for one in journals if one.command == "reembed" and one.targets == targets]
    named = {name for one in journals if one.is_open for name in _manifests(one)}
    last = _manifests(finished[-1]) if finished else set()
    newer = (one.name for one in all_sets(folder) if owner.owns(one) and one.collection and _proved(one))
    return named | (last if last and next(newer, "") <= max(last) else set())


def _manifests(journal: Journal) -> set[str]:
    return {str(entry["manifest"]) for entry in journal.entries if entry.get("manifest")}


def delete_set(manifest: Manifest) -> None:
    """Delete a set whole: the manifest first, so that no set is ever left with a missing file."""
    assert manifest.path is not None
    manifest.path.unlink(missing_ok=True)
    sync_dir(manifest.path.parent)
    for half in manifest.halves:
        manifest.file_of(half).unlink(missing_ok=True)
