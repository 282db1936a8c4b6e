"""The backup sets of a folder: claim a time for a new one, find, delete."""

from __future__ import annotations

import contextlib
import filecmp
import fnmatch
import os
import shutil
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from shlex import quote

from lib.backup.manifest import COLLECTION_DIR, FULL, GRAPH_DIR, SAFETY, Manifest, read_manifest
from lib.errors import BackupDamaged, BadFile, LockHeld, MissingData, UsageProblem
from lib.files import PARTIAL, lock_targets, sync_dir
from lib.journal import STAMP_FORMAT, Journal, journals, open_journals
from lib.network import same_server

CACHE_DIR, REPORT_DIR = "embeddings", "reports"
PIN = ".pinned"  # `backup_<stamp>.pinned`, an empty file next to the manifest: no cleanup deletes the set
OUTGOING = "outgoing"  # encrypted files of sets that are not completely uploaded yet
_STEM = len("backup_20261126_220840")
_NAMED = 3  # sets that an error lists
_RESTORE = "python scripts/restore_from_backup.py"


def claim_stamp(journal: Journal) -> tuple[str, str]:
    """Claim a second (UTC) that no set and no unfinished run has, in the journal; returns stamp and ISO time."""
    folder = journal.folder
    while True:
        with contextlib.suppress(LockHeld), lock_targets([f"stamps of {folder.resolve()}"]):
            now = datetime.now(timezone.utc).replace(microsecond=0)
            stamp = now.strftime(STAMP_FORMAT)
            claimed = {_claimed(one) for one in open_journals(folder)}
            if stamp not in claimed and not _files_below(folder, f"*_{stamp}.*"):
                journal.append("backup begun", stamp=stamp)
                return stamp, now.isoformat()
        time.sleep(0.2)


def _files_below(folder: Path, pattern: str) -> set[Path]:
    """The files below a folder. Those of other runs may vanish meanwhile: `rglob` would end with an error."""
    return {Path(place, name) for place, _, names in os.walk(folder) for name in fnmatch.filter(names, pattern)}


def _claimed(journal: Journal) -> str:
    """The stamp that the run claimed. A re-embedding records its model under the same name, as a dict."""
    stamp = journal.fact("stamp")
    return stamp if isinstance(stamp, str) else ""


def remove_unfinished(journal: Journal) -> None:
    """Remove the files of the run's own set, unless a manifest names them."""
    folder, stamp = journal.folder, _claimed(journal)
    if not stamp:
        return
    found = _files_below(folder, f"*_{stamp}.*{PARTIAL}")
    if not (folder / f"backup_{stamp}.json").exists():
        for pattern in (f"{GRAPH_DIR}/*_{stamp}.rdb", f"{COLLECTION_DIR}/*_{stamp}.tar.gz"):  # none of AutoMem's own
            found |= set(folder.glob(pattern))
    for path in found:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Deployment:
    """A graph and a collection by address and name. The sets of several may be in one backup folder."""

    graph_server: str
    graph: str
    collection_server: str
    collection: str

    def owns(self, manifest: Manifest) -> bool:
        """Whether every component of the set was taken here."""
        own = [(self.graph_server, self.graph), (self.collection_server, self.collection)]
        return all(_is_among(store, own) for store in manifest.stores)


def _is_among(store: tuple[str, str], stores: Iterable[tuple[str, str]]) -> bool:
    address, name = store
    return any(name == other and same_server(address, server) for server, other in stores)


def manifest_paths(folder: Path) -> list[Path]:
    """The files that are named as manifests, newest first, without copies that are equal to the manifest of their time.

    A program that synchronizes the folder makes such copies, as `backup_<stamp> (conflicted copy).json`.
    """
    paths = folder.glob("backup_[0-9]*_[0-9]*.json")
    newest_first = sorted(paths, key=lambda path: (path.stem[:_STEM], -len(path.stem)), reverse=True)
    return [path for path in newest_first if not _is_equal_copy(path)]


def _is_equal_copy(path: Path) -> bool:
    original = path.with_name(f"{path.stem[:_STEM]}.json")
    if path == original:
        return False
    with contextlib.suppress(OSError):  # it is reported as a manifest that cannot be read
        return filecmp.cmp(path, original, shallow=False)
    return False


def backup_sets(folder: Path) -> list[Manifest]:
    """The sets that can be read, newest first; `--check all` reports the others."""
    return read_sets(folder)[0]


def read_sets(folder: Path) -> tuple[list[Manifest], list[Path]]:
    """Return the sets, newest first, and the manifests that cannot be read."""
    found, unreadable, safety = [], [], safety_copies(folder)
    for path in manifest_paths(folder):
        try:
            found.append(with_purpose(read_manifest(path), safety))
        except (BackupDamaged, BadFile):
            unreadable.append(path)
    return found, unreadable


def safety_copies(folder: Path) -> set[str]:
    """The names of the sets that restores took of what they replaced. Older manifests do not record that."""
    return {name for one in journals(folder, "restore") for name in manifests_named(one)}


def manifests_named(journal: Journal) -> set[str]:
    """The names of the manifests that a run wrote or relied on."""
    return {str(entry["manifest"]) for entry in journal.entries if entry.get("manifest")}


def with_purpose(manifest: Manifest, safety: Collection[str]) -> Manifest:
    """Mark the manifest as a safety copy if its name is in `safety`."""
    return replace(manifest, purpose=SAFETY) if manifest.name in safety else manifest


def latest(folder: Path, owner: Deployment | None, command: str = _RESTORE) -> Manifest:
    """The newest full set of `owner`, see `newest_full`. Raises BackupDamaged if a newer manifest cannot be read."""
    safety = safety_copies(folder)
    found = (with_purpose(read_manifest(path), safety) for path in manifest_paths(folder))
    return newest_full(found, owner, str(folder), command)


def newest_full(
    manifests: Iterable[Manifest], owner: Deployment | None, where: str, command: str = _RESTORE
) -> Manifest:
    """The first of `manifests` that is a full set of `owner` (None: of any deployment) and no safety copy.

    `where` is the folder or URL of the sets, `command` what the operator runs on one of them. Raises MissingData if
    there is none, and UsageProblem if it is dated in the future (it need not be the newest) or was taken after a store
    was lost.
    """
    others = list[str]()
    for manifest in manifests:
        name = manifest.name
        if owner and not owner.owns(manifest):
            continue
        if manifest.kind != FULL:
            others.append(f"{name} ({manifest.kind})")
        elif manifest.is_from_future:
            step = f"compare this clock with the right time:\ndate -u\nthen name the set:\n{command}"
            raise UsageProblem(
                f"{name} is dated {-manifest.age_hours:.0f} hours in the future: a clock was or is wrong, and"
                " which set is the newest is not known",
                next_step=f"{step} {quote(f'{where}/{name}')}",
            )
        elif manifest.lost_store:
            step = f"name the set to restore:\npython scripts/backup_automem.py --list {quote(where)}"
            message = f"{name}, the newest set, may have been taken after a loss: {manifest.lost_store}"
            raise UsageProblem(message, next_step=step)
        else:
            return manifest
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise MissingData(
            f"no full backup set in {where}, which `latest` needs; there are: {', '.join(others[:_NAMED])}{more}",
            next_step=f"name one:\n{command} {quote(f'{where}/{others[0].split()[0]}')}",
        )
    whose = f" is of graph '{owner.graph}' or collection '{owner.collection}' on these servers" if owner else ""
    step = "name a file, or another folder with --backup-dir; this lists the sets:"
    raise MissingData(f"no backup in {where}{whose}", next_step=f"{step}\npython scripts/backup_automem.py --list")


def newest_with(folder: Path, collection: str, server: str) -> Manifest | None:
    """The newest complete set that holds this collection of this server."""
    found = (one for one in backup_sets(folder) if one.collection and is_complete(one))
    return next((one for one in found if _is_among((server, collection), one.stores[-1:])), None)


def find_set(folder: Path, path: Path) -> Manifest | None:
    """The set that names `path` as one of its files, in `folder` or in the file's own backup folder."""
    for manifest in [*backup_sets(folder), *backup_sets(path.absolute().parent.parent)]:
        if any(manifest.file_of(component).resolve() == path.resolve() for component in manifest.components):
            return manifest
    return None


def pinned_sets(names: Iterable[str]) -> frozenset[str]:
    """The names of the manifests whose pin is among these names of files."""
    return frozenset(f"{name.removesuffix(PIN)}.json" for name in names if name.endswith(PIN))


def is_complete(manifest: Manifest) -> bool:
    """Whether every file of the set exists with its size."""
    files = [(manifest.file_of(component), component.file.size) for component in manifest.components]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def delete_set(manifest: Manifest) -> None:
    """Delete a set, its manifest first, so that no set with a missing file remains after a crash."""
    for copy in filter(_is_equal_copy, manifest.path.parent.glob(f"{manifest.path.stem}*.json")):
        copy.unlink()  # without its original it would be reported as damaged
    manifest.path.unlink(missing_ok=True)
    sync_dir(manifest.path.parent)
    for component in manifest.components:
        manifest.file_of(component).unlink(missing_ok=True)
    for folder in (manifest.path.parent / OUTGOING).glob(f"{manifest.stamp}_*"):
        shutil.rmtree(folder)
