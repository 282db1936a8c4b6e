"""Check backups that exist, here or elsewhere, as far as this machine can; upload those that verify."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from shlex import quote

from lib.backup import copies
from lib.backup.age import SUFFIX, CopyKeys, require_encryption
from lib.backup.archive import peek_facts
from lib.backup.automem_contents import describe, require_uncut
from lib.backup.automem_files import automem_files, is_automems
from lib.backup.catalog import Deployment, find_set, latest, manifest_paths, newest_full, safety_copies, with_purpose
from lib.backup.collection import CollectionVerification, verify_collection
from lib.backup.copy_store import OffsiteStore, is_url, open_offsite
from lib.backup.graph import GraphVerification, verify_graph
from lib.backup.manifest import CHECKED, GRAPH_DIR, GraphComponent, Manifest, NewerFormat, read_manifest
from lib.clients.falkordb.rdb import is_rdb
from lib.clients.falkordb.scratch import Engine
from lib.concurrency import ProgressBar
from lib.errors import AccessRefused, BackupDamaged, BadFile, MigrationError, MissingData, UsageProblem, did_you_mean
from lib.files import lock_targets, private_dir, sync_dir
from lib.journal import STAMP, STAMP_FORMAT

_GZIP = b"\x1f\x8b"
RDB, ARCHIVE, SNAPSHOT, MANIFEST, AUTOMEM = "rdb", "archive", "snapshot", "manifest", "AutoMem's"
LATEST = "latest"
_SET_FILE = re.compile(rf".+_({STAMP})\.[a-z.]+")


@dataclass(frozen=True)
class FileVerification:
    """The verification level of a file. `fault` is empty if nothing is wrong with it."""

    path: Path | str
    level: str
    note: str = ""
    fault: str = ""


def kind_of(path: Path) -> str:
    """The kind of a FILE by its content; a folder has one only if it holds AutoMem's own backups. Raises BadFile."""
    if path.is_dir() and automem_files(path):
        return AUTOMEM
    head = _head(path)
    if is_rdb(path):
        return RDB
    if is_automems(path):
        return AUTOMEM
    if head.startswith(_GZIP):
        peek_facts(path)
        return ARCHIVE
    if head.lstrip().startswith(b"{"):
        return MANIFEST
    if head[257:262] == b"ustar" or path.suffix == ".snapshot":
        return SNAPSHOT
    raise BadFile(f"{path} is no backup: neither an RDB, nor a qdrant_snapshot_*.tar.gz, nor a backup_*.json")


def _head(path: Path) -> bytes:
    """The first bytes of the file. Raises BadFile if there are none."""
    try:
        if path.is_dir() or not path.exists():
            folder = path.parent if path.name == LATEST else path
            has_copies = any(folder.glob("backup_*.json*"))
            step = f"name the newest set there by its URL: {folder.absolute().as_uri()}/{LATEST}" if has_copies else ""
            what = "is a folder, a file is needed" if path.is_dir() else "does not exist"
            raise BadFile(f"{path} {what}", next_step=step)
        if not path.is_file():  # it may never bring anything, and could be read only once
            raise BadFile(f"{path} is a pipe or a device, a file is needed", next_step="save it as a file")
        with path.open("rb") as stream:
            head = stream.read(512)
    except PermissionError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}", next_step=f"ls -l {quote(str(path))}") from error
    if not head:
        raise BadFile(f"{path} is empty")
    return head


def verify_named(
    folder: Path, word: str, engines: list[Engine], owner: Deployment | None = None
) -> list[FileVerification]:
    """Verify the sets that `--check` names, or AutoMem's own backups. Damage is reported as the fault of its file."""
    path = Path(word)
    if not ((path.is_dir() or (path.is_file() and os.access(path, os.R_OK))) and (automems := automem_files(path))):
        return [one for path in _named_manifests(folder, word, owner) for one in _verify_set(path, engines)]
    found = []
    for source in automems:
        try:
            held, signs = describe(source)
            require_uncut(source, signs)
            found.append(FileVerification(source.display, CHECKED, f"AutoMem's own backup, not loaded: {held}"))
        except BackupDamaged as error:
            found.append(FileVerification(source.display, "damaged", fault=str(error)))
    return found


def _place(word: str, folder: Path) -> str:
    """The URL of an encrypted copy here (with or without its suffix), or the path of a stamp's set; else the word."""
    plain = word.removesuffix(SUFFIX)
    if not is_url(word) and os.access(plain + SUFFIX, os.R_OK) and not os.access(plain, os.F_OK):
        return Path(plain).absolute().as_uri()
    if not re.fullmatch("[0-9_]+", word) or Path(word).exists():
        return word
    path = folder / f"backup_{word}.json"
    if not path.exists():
        known = [one.stem.removeprefix("backup_") for one in manifest_paths(folder)]
        raise MissingData(
            f"no backup set {word} in {folder}{did_you_mean(word, known)}",
            next_step="python scripts/backup_automem.py --list",
        )
    return str(path)


def _named_manifests(folder: Path, word: str, owner: Deployment | None) -> list[Path]:
    """The manifests that `--check` names: all, the latest, one, or that of a file. Raises MissingData, BadFile."""
    if word == LATEST and not Path(word).exists():
        return [latest(folder, owner, "python scripts/backup_automem.py --check").path]
    path, paths = Path(word), manifest_paths(folder)
    if word == "all":
        if not paths:
            raise MissingData(f"no backup in {folder}", next_step="python scripts/backup_automem.py")
        return paths
    found = find_set(folder, path)
    if path.is_file() and path in manifest_paths(path.parent):
        return [path]
    if found:
        return [found.path]
    if kind_of(path) == MANIFEST:
        return [path]
    raise BadFile(
        f"{path} belongs to no backup set in {folder}: there is no manifest to verify it against",
        next_step="name the backup folder of its set with --backup-dir",
    )


def _verify_set(path: Path, engines: list[Engine]) -> list[FileVerification]:
    try:
        manifest = read_manifest(path)
        _compare_times(manifest)
    except NewerFormat as error:
        return [FileVerification(path, "unknown", fault=str(error))]
    except (BackupDamaged, BadFile) as error:
        return [FileVerification(path, "damaged", fault=str(error))]
    checked = []
    found: GraphVerification | CollectionVerification
    for component in manifest.components:
        file = manifest.file_of(component)
        try:
            if isinstance(component, GraphComponent):
                found = verify_graph(file, component, engines)
            else:
                found = verify_collection(file, component=component)
            checked.append(FileVerification(file, found.level, found.note))
        except MigrationError as error:
            level = "damaged" if isinstance(error, BackupDamaged) else "unknown"
            checked.append(FileVerification(file, level, fault=str(error)))
    return checked


def _compare_times(manifest: Manifest) -> None:
    """Raise BackupDamaged unless the set was created at the time of its stamp."""
    created, stamp = datetime.fromisoformat(manifest.created).astimezone(timezone.utc), manifest.stamp
    if f"{created:{STAMP_FORMAT}}" != stamp:
        raise BackupDamaged(f"{manifest.path} was edited: its stamp is {stamp}, but created is {manifest.created}")


def _named(url: str) -> tuple[str, str, str]:
    """The folder of a URL, the manifest's name (LATEST, or "" for all), and a file of that set (or "")."""
    parent, _, last = url.rstrip("/").removesuffix(SUFFIX).rpartition("/")
    if last == LATEST or copies.MANIFEST_NAME.fullmatch(last):
        return parent, last, ""
    if found := _SET_FILE.fullmatch(last):
        folder, _, within = parent.rpartition("/")
        return folder, f"backup_{found[1]}.json", f"{within}/{last}"
    return url, "", ""


def require_upload_url(url: str, folder: Path, keys: CopyKeys, *, graph: str = "", write: bool = True) -> str:
    """Raise if sets of `folder` could not be uploaded to the URL and fetched back; returns the URL without secrets.

    `graph` is the one that will be backed up. With `write`, a small file is written there, read back and deleted.
    """
    copies.require_elsewhere(url, folder)
    _, named, _ = _named(url)
    if named:
        last = url.rstrip("/").rpartition("/")[2]
        raise UsageProblem(
            f"a folder '{last}' is read as the name of a backup in the folder above it: sets in it would not be found",
            next_step="name a folder that is called otherwise",
        )
    if graph:
        copies.require_fetchable(f"{GRAPH_DIR}/{graph}.rdb")
    if keys.encrypt:
        require_encryption(keys)
    store = open_offsite(url)
    if write:
        store.verify_writable()
    else:
        store.sizes()
    return store.shown


def fetched(
    word: str, folder: Path, owner: Deployment, engines: Callable[[], list[Engine]], bar: ProgressBar, keys: CopyKeys
) -> str:
    """Return the path here of what a FILE argument names by URL (it is fetched) or by a stamp; any other word as it is.

    The URL is that of a manifest, of a file of a set, or of a folder followed by `/latest`. The set is verified before
    it is moved into `folder`. Raises like `fetch`, and BadFile for another URL.
    """
    word = _place(word, folder)
    if not is_url(word):
        return word
    place, named, file = _named(word)
    store = open_offsite(place, keys)
    if not named:
        raise BadFile(
            f"{store.shown} names no backup: it must end with backup_*.json, a file of a set, or {LATEST}",
            next_step=f"python scripts/backup_automem.py --list {quote(store.shown)}",
        )
    name = _newest(store, owner, folder) if named == LATEST else named
    with lock_targets([f"fetching into {folder.absolute()}"]):
        path = folder / name
        if not copies.is_whole_here(store, name, folder):
            path = copies.fetch(store, name, private_dir(folder) / "quarantine", bar)
            path = _verified(path, folder, engines(), store.shown)
    if file and file not in {one.name for one in read_manifest(path).files}:
        raise BadFile(
            f"{store.shown}/{file} is no file of the set {name}",
            next_step=f"python scripts/restore_from_backup.py {quote(f'{store.shown}/{name}')}",
        )
    return str(folder / file if file else path)


def _verified(path: Path, folder: Path, engines: list[Engine], shown: str) -> Path:
    """Verify a fetched set and move it into `folder`; returns its manifest there. A damaged set is removed."""
    for one in _verify_set(path, engines):
        if one.fault:
            shutil.rmtree(path.parent)
            raise BackupDamaged(
                f"the set that was fetched does not verify, and was removed: {one.fault}",
                next_step=f"use another set of the copies:\npython scripts/backup_automem.py --list {quote(shown)}",
            )
    for name in [*(file.name for file in read_manifest(path).files), path.name]:
        target = folder / name
        private_dir(target.parent)
        (path.parent / name).replace(target)  # a file that is there already is the same, see `is_whole_here`
        sync_dir(target.parent)
    shutil.rmtree(path.parent)
    return folder / path.name


def _newest(store: OffsiteStore, owner: Deployment | None, folder: Path) -> str:
    """The name of the manifest that `latest` means there. Raises like `newest_full` and `read_there`."""
    safety = safety_copies(folder)
    found = (with_purpose(copies.read_there(store, name)[0], safety) for name in copies.manifests(store))
    return newest_full(found, owner, store.shown).name


def _verify_copies(
    url: str, folder: Path, engines: list[Engine], bar: ProgressBar, keys: CopyKeys
) -> list[FileVerification]:
    """Fetch the sets of a URL into `folder` one after the other, verify and remove each.

    The URL is that of a folder or of one set in it. A set that is damaged, incomplete, or encrypted for another key is
    reported by a fault. Raises MissingData if there is no set, AccessRefused if no key fits any.
    """
    place, named, _ = _named(url)
    store = open_offsite(place, keys)
    names = [named] if named else copies.manifests(store)
    if named == LATEST:
        names = [_newest(store, None, folder)]
    checked, refused = list[FileVerification](), list[AccessRefused]()
    here = private_dir(folder) / "drill"
    for name in names:
        with lock_targets([f"drill in {folder.absolute()}"]):
            shutil.rmtree(here, ignore_errors=True)  # what a killed check left
            try:
                found = _verify_set(copies.fetch(store, name, here, bar), engines)
            except (BackupDamaged, BadFile, MissingData) as error:
                found = [FileVerification(here / name, "damaged", fault=str(error))]
            except AccessRefused as error:
                refused.append(error)
                found = [FileVerification(here / name, "unknown", fault=str(error))]
            finally:
                shutil.rmtree(here, ignore_errors=True)
        for one in found:  # named as the files there, not as their copies here
            path, fault = (text.replace(str(here), store.shown) for text in (str(one.path), one.fault))
            checked.append(dataclasses.replace(one, path=path, fault=fault))
    if len(refused) == len(names):
        raise refused[0]
    return checked


def verify_and_upload(
    folder: Path, owner: Deployment, word: str, url: str | None, engines: list[Engine], bar: ProgressBar, keys: CopyKeys
) -> tuple[list[FileVerification], list[copies.Uploaded] | None]:
    """Verify the sets that `--check` names, here or elsewhere; upload those without a fault to `url`, oldest first."""
    word = _place(word, folder)
    if is_url(word):
        if url:
            raise UsageProblem(
                "--upload is for sets that are here, --check names some that are elsewhere",
                next_step="python scripts/backup_automem.py --check all --upload URL",
            )
        return _verify_copies(word, folder, engines, bar, keys), None
    if not url:
        return verify_named(folder, word, engines, owner), None
    require_upload_url(url, folder, keys)
    checked = {path: _verify_set(path, engines) for path in _named_manifests(folder, word, owner)}
    files = [one for found in checked.values() for one in found]
    sound = sorted(path for path, found in checked.items() if not any(one.fault for one in found))
    return files, [copies.upload(url, read_manifest(path), bar, keys) for path in sound]
