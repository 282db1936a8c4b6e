"""The sets of one place, newest first: a backup folder here, or one elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lib.backup_set.age import SUFFIX, CopyKeys, could_hold
from lib.backup_set.manifest import BackupFile, Manifest, read_manifest
from lib.backup_set.offsite import folders_of, manifests, read_there
from lib.backup_set.offsite_store import NO_KEYS, OffsiteStore, open_offsite
from lib.backup_set.sets import is_complete, manifest_paths, safety_copies, with_purpose
from lib.errors import BackupDamaged, BadFile, MissingData


@dataclass(frozen=True)
class Shelf:
    """What `where` holds: each set and whether its files are in place with their sizes; manifests that do not read."""

    where: str
    sets: list[tuple[Manifest, bool]]
    unreadable: list[str]


def shelf_at(url: str, folder: Path, keys: CopyKeys = NO_KEYS) -> Shelf:
    """The sets at a URL, or without one in `folder`; raises like `open_offsite` and `shelf_there`."""
    return shelf_there(open_offsite(url, keys)) if url else shelf_here(folder)


def shelf_here(folder: Path) -> Shelf:
    """The sets in a backup folder."""
    sets, unreadable, safety = [], [], safety_copies(folder)
    for path in manifest_paths(folder):
        try:
            manifest = with_purpose(read_manifest(path), safety)
            sets.append((manifest, is_complete(manifest)))
        except (BackupDamaged, BadFile):
            unreadable.append(str(path))
    return Shelf(str(folder), sets, unreadable)


def shelf_there(store: OffsiteStore) -> Shelf:
    """The sets elsewhere; raises MissingData where there is none."""
    sizes: dict[str, dict[str, int]] = {}
    sets, unreadable = [], []
    for name in manifests(store):
        try:
            manifest, _ = read_there(store, name)
        except (BackupDamaged, BadFile, MissingData):
            unreadable.append(f"{store.shown}/{name}")
            continue
        for folder in folders_of(manifest.files):
            sizes.setdefault(folder, store.sizes(folder))
        there = {file: size for found in sizes.values() for file, size in found.items()}
        sets.append((manifest, all(_is_there(file, there) for file in manifest.files)))
    return Shelf(store.shown, sets, unreadable)


def _is_there(file: BackupFile, there: dict[str, int]) -> bool:
    """Whether a file of its size is there, as it is or encrypted."""
    return there.get(file.name) == file.size or could_hold(there.get(file.name + SUFFIX), file.size)
