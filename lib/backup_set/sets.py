"""The sets on disk: finding, listing, and deleting the old ones whole."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from lib.addresses import same_server
from lib.backup_set.manifest import FULL, SAFETY, Manifest, read_manifest
from lib.errors import BackupDamaged, BadFile, MissingData, UsageProblem
from lib.files import readable_bytes, sync_dir
from lib.journal import Journal, read_journal

SPOOL_DIR = "embeddings"
OUTGOING = "outgoing"  # encrypted files of sets whose copy is not whole elsewhere yet
_NAMED = 3


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
    found, safety = [], safety_copies(folder)
    for path in manifest_paths(folder):
        try:
            found.append(with_purpose(read_manifest(path), safety))
        except (BackupDamaged, BadFile):
            continue
    return found


def safety_copies(folder: Path) -> set[str]:
    """The sets that restores took of what they replaced, as their journals say: older manifests do not."""
    journals = (read_journal(path) for path in folder.glob("journal_*_restore.jsonl"))
    return {name for one in journals if one for name in manifests_named(one)}


def manifests_named(journal: Journal) -> set[str]:
    """The manifests that a run took or relied on, by name."""
    return {str(entry["manifest"]) for entry in journal.entries if entry.get("manifest")}


def with_purpose(manifest: Manifest, safety: Collection[str]) -> Manifest:
    """The manifest; marked as a safety copy if its name is in `safety`."""
    return replace(manifest, purpose=SAFETY) if manifest.name in safety else manifest


def latest(folder: Path, owner: Deployment | None) -> Manifest:
    """The newest full set of this deployment (None: of anybody) that is no safety copy.

    Raises MissingData where there is none, BackupDamaged where a newer manifest does not read: never an older set
    in silence.
    """
    safety = safety_copies(folder)
    found = (with_purpose(read_manifest(path), safety) for path in manifest_paths(folder))
    return newest_full(found, owner, str(folder))


def newest_full(manifests: Iterable[Manifest], owner: Deployment | None, where: str) -> Manifest:
    """The first of `manifests` that is a full set of `owner` (None: of anybody) and no safety copy.

    Raises MissingData, naming the halves and safety copies: these are taken only by name. Raises UsageProblem where
    the first is dated in the future: it need not be the newest.
    """
    others = []
    for manifest in manifests:
        if owner and not owner.owns(manifest):
            continue
        if manifest.kind == FULL:
            _require_past(manifest, where)
            return manifest
        others.append(f"{manifest.name} ({manifest.kind})")
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise MissingData(
            f"no full backup in {where}: `latest` takes neither one half alone nor a safety copy of a restore. There"
            f" are: {', '.join(others[:_NAMED])}{more}",
            next_step=f"name one: python scripts/restore_from_backup.py {quote(f'{where}/{others[0].split()[0]}')}",
        )
    whose = (
        f" is of graph '{owner.graph}' or collection '{owner.collection}' at these addresses" if owner else ""
    )
    raise MissingData(
        f"no backup in {where}{whose}",
        next_step="python scripts/backup_automem.py   or name the file:  python scripts/backup_automem.py --list",
    )


def _require_past(manifest: Manifest, where: str) -> None:
    if manifest.is_from_future:
        raise UsageProblem(
            f"{manifest.name} is dated {-manifest.age_hours:.0f} hours in the future: a clock was or is wrong, and it"
            " cannot be told which set is the newest",
            next_step="date -u   (is this clock right?)   then name the set:  python scripts/restore_from_backup.py"
            f" {quote(f'{where}/{manifest.name}')}",
        )


def dated_later(manifest: Manifest) -> list[Manifest]:
    """The sets beside this new one that are of the same stores and dated later: a clock went back."""
    assert manifest.path is not None
    owner = _owner(manifest)
    others = [one for one in all_sets(manifest.path.parent) if one.stamp > manifest.stamp]
    return [
        one
        for one in others
        if any(
            theirs[1] == ours[1] and same_server(theirs[0], ours[0])
            for theirs in _owner(one)
            for ours in owner
        )
    ]


def _owner(manifest: Manifest) -> list[tuple[str, str]]:
    graph, collection = manifest.graph, manifest.collection
    named = [(graph.server["address"], graph.graph)] if graph else []
    return named + ([(collection.server["address"], collection.collection)] if collection else [])


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
            if stamp in path.name or path.name.encode() in readable_bytes(one):
                found.append(one)
    return found


def is_complete(manifest: Manifest) -> bool:
    """Whether every file of the set is in place with its size."""
    files = [(manifest.file_of(half), half.file.size) for half in manifest.halves]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def delete_set(manifest: Manifest) -> None:
    """Delete a set whole: the manifest first, so that no set is ever left with a missing file."""
    assert manifest.path is not None
    manifest.path.unlink(missing_ok=True)
    sync_dir(manifest.path.parent)
    for half in manifest.halves:
        manifest.file_of(half).unlink(missing_ok=True)
    for folder in (manifest.path.parent / OUTGOING).glob(f"{manifest.stamp}_*"):
        shutil.rmtree(folder)
