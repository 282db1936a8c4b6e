"""Backup sets elsewhere: uploaded, the manifest last, each file read back; listed, and fetched."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from lib.backup.age import SUFFIX, CopyKeys, could_hold, encrypt, key_in, new_key, passphrase, recipients
from lib.backup.catalog import OUTGOING, is_complete, manifest_paths, safety_copies, with_purpose
from lib.backup.copy_store import (
    FILE,
    KEY_FILE,
    NO_KEYS,
    OffsiteStore,
    Progress,
    offsite_address,
    open_offsite,
)
from lib.backup.manifest import BackupFile, Manifest, parse_manifest, read_manifest
from lib.errors import (
    AccessRefused,
    BackupDamaged,
    BadFile,
    MigrationError,
    MissingData,
    StoreFailed,
    UsageProblem,
)
from lib.files import (
    atomic_writer,
    free_bytes,
    lock_targets,
    private_dir,
    sha256_file,
    sync_dir,
    write_atomic,
)
from lib.journal import STAMP

Bar = Callable[[str, "int | None", str], AbstractContextManager[Progress]]
MANIFEST_NAME = re.compile(rf"backup_{STAMP}\.json")
_SPARE = 16 << 20


class NotArrived(MigrationError):
    """The set is whole here, and not there."""


@dataclass(frozen=True)
class Uploaded:
    """A set that is whole at `url` (as it may be shown): how many files and bytes were sent, how many were there.

    `same_disk`: the copy is lost with the disk that the set here is on. `encrypted`: its files are `.age` files there.
    """

    url: str
    manifest: str
    sent: int
    sent_bytes: int
    there: int
    same_disk: bool = False
    encrypted: bool = False


def upload(url: str, manifest: Manifest, bar: Bar, keys: CopyKeys = NO_KEYS) -> Uploaded:
    """Bring a set there, manifest last, each file read back and compared; what is there already is not sent again.

    With `keys` that encrypt, what is sent are its files encrypted.

    Raises NotArrived where anything is not as it should be: then no manifest of the set is there, and no file of
    another's was touched. Raises BackupDamaged where a file here is not what the manifest says, UsageProblem for a
    name that could not be fetched back.
    """
    assert manifest.path is not None
    shown = offsite_address(url).shown
    files = [*manifest.files, _file_here(manifest.path, manifest.name)]
    for file in manifest.files:
        require_fetchable(file.name)
        _require_whole(manifest.path.parent / file.name, file)
    try:
        store = open_offsite(url, keys)
        if keys.encrypt:
            sent = _bring_encrypted(store, manifest, files, bar)
        else:
            sent = _bring_all(store, manifest.path.parent, files, bar)
    except MigrationError as error:
        raise NotArrived(
            f"the backup did not arrive: {error}\nthe set is whole here: {manifest.path}",
            next_step=f"{error.next_step}\n{again(manifest.path, shown)}".strip(),
        ) from error
    size, there = sum(file.size for file in sent), max(0, len(files) - len(sent))
    return Uploaded(
        shown, manifest.name, len(sent), size, there, _on_same_disk(url, manifest.path), keys.encrypt
    )


def require_elsewhere(url: str, folder: Path) -> None:
    """Raise UsageProblem where the URL is the backup folder or one in it: the set would pass for its own copy."""
    address = offsite_address(url)
    if address.scheme == FILE and Path(address.path).resolve().is_relative_to(folder.resolve()):
        raise UsageProblem(
            f"{address.shown} is in the backup folder {folder}: that is no copy elsewhere",
            next_step="name a folder outside of it, on another disk, or a URL",
        )


def _on_same_disk(url: str, path: Path) -> bool:
    address = offsite_address(url)
    return address.scheme == FILE and Path(address.path).stat().st_dev == path.stat().st_dev


def _bring_all(store: OffsiteStore, here: Path, files: list[BackupFile], bar: Bar) -> list[BackupFile]:
    """Bring the files of the folder `here` in their order, the manifest last; those that were sent."""
    there = _sizes(store, files)
    if all(there.get(file.name) == file.size for file in files):
        with bar("manifest there", files[-1].size, "bytes") as progress:
            if store.holds(
                files[-1], files[-1].name, progress
            ):  # it proves that the files once were whole there
                return []
    return [file for file in files if _bring(store, file, here, bar, there)]


def _sizes(store: OffsiteStore, files: list[BackupFile]) -> dict[str, int]:
    """What there is in the folders of these files, with its bytes."""
    return {name: size for one in {"", *folders_of(files)} for name, size in store.sizes(one).items()}


def _bring_encrypted(
    store: OffsiteStore, manifest: Manifest, files: list[BackupFile], bar: Bar
) -> list[BackupFile]:
    """Bring the set's files encrypted, the manifest last; those that were sent.

    They are encrypted into a folder here, where they stay until the set is whole there: a file encrypted twice is not
    the same twice, and what is there must be compared when an upload goes on.
    """
    assert manifest.path is not None
    there = _sizes(store, files)
    if all(could_hold(there.get(file.name + SUFFIX), file.size) for file in files):
        _require_same_manifest(store, manifest)
        return []
    folder = private_dir(manifest.path.parent / OUTGOING) / _outgoing_name(manifest, store.keys)
    with lock_targets([f"upload of {manifest.path.absolute()}"]):
        encrypted = _encrypted(manifest, files, folder, store.keys, bar)
        sent = _bring_all(store, folder, encrypted, bar)
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # another upload's files
            folder.parent.rmdir()
    return sent


def _require_same_manifest(store: OffsiteStore, manifest: Manifest) -> None:
    """Raise BadFile if the manifest there is another one; without a key to decrypt it its size alone is known."""
    assert manifest.path is not None
    if store.keys.decrypt and store.read(manifest.name) != manifest.path.read_bytes():
        raise BadFile(
            f"{store.shown}/{manifest.name}{SUFFIX} is another file",
            next_step="name another folder, or see what that file is and remove it there",
        )


def _outgoing_name(manifest: Manifest, keys: CopyKeys) -> str:
    """One folder for each set and whom its copy is encrypted for."""
    if not keys.recipients:
        return f"{manifest.stamp}_passphrase"
    whom = sorted(map(str, recipients(keys)))
    return f"{manifest.stamp}_{hashlib.sha256(' '.join(whom).encode()).hexdigest()[:12]}"


def _encrypted(
    manifest: Manifest, files: list[BackupFile], folder: Path, keys: CopyKeys, bar: Bar
) -> list[BackupFile]:
    """The set's files encrypted in `folder`, the manifest last; what an earlier upload encrypted is used again."""
    assert manifest.path is not None
    need = sum(file.size for file in files if not (folder / f"{file.name}{SUFFIX}").exists()) + _SPARE
    if free_bytes(folder) < need:
        raise MigrationError(
            f"{folder} has {free_bytes(folder) >> 20} MiB free, the encrypted set needs {need >> 20} MiB until it is"
            " uploaded",
            next_step=f"df -h {quote(str(folder.parent.parent))}   then free some room",
        )
    names = [file.name for file in files]
    public_keys = recipients(keys) if keys.recipients else []
    if not public_keys:
        key_file = KEY_FILE.format(stamp=manifest.stamp)
        public_keys, names = [_set_key(folder / f"{key_file}{SUFFIX}", keys)], [key_file, *names]
    for file in files:
        target = private_dir((folder / file.name).parent) / f"{Path(file.name).name}{SUFFIX}"
        if not target.exists():
            with bar(f"encrypt {file.name}", file.size, "bytes") as progress:
                encrypt(manifest.path.parent / file.name, target, public_keys)
                progress(file.size)
    return [_file_here(folder / f"{name}{SUFFIX}", f"{name}{SUFFIX}") for name in names]


def _set_key(path: Path, keys: CopyKeys) -> Any:
    """The public key that a set is encrypted for, its key file written to `path`: that of an earlier upload, or new."""
    words = passphrase(keys)
    if path.exists():
        with contextlib.suppress(AccessRefused):
            return key_in(path.read_bytes(), words)[0].to_public()
        shutil.rmtree(path.parent)  # the passphrase was changed since
    public_key, key_file = new_key(words)
    private_dir(path.parent)
    write_atomic(path, key_file)
    return public_key


def again(path: Path, url: str) -> str:
    """The command that uploads an existing set."""
    return f"python scripts/backup_automem.py --check {quote(str(path))} --upload {quote(url)}"


def folders_of(files: Iterable[BackupFile]) -> list[str]:
    """The folders, relative to the set's own, in which its files lie."""
    return sorted({file.name.rpartition("/")[0] for file in files})


def _file_here(path: Path, name: str) -> BackupFile:
    return BackupFile(name, path.stat().st_size, sha256_file(path))


def _require_whole(path: Path, file: BackupFile) -> None:
    if not path.is_file() or _file_here(path, file.name) != file:
        raise BackupDamaged(
            f"{path} is not what its manifest says: nothing was uploaded",
            next_step="python scripts/backup_automem.py   takes a new backup",
        )


def _bring(store: OffsiteStore, file: BackupFile, folder: Path, bar: Bar, there: dict[str, int]) -> bool:
    """Send one file and read it back; False where it is there already. Never replaces another file."""
    if file.name in there:
        with bar(f"read back {file.name}", file.size, "bytes") as progress:
            if there[file.name] == file.size and store.holds(file, file.name, progress):
                return False
        raise BadFile(
            f"{store.shown}/{file.name} is another file",
            next_step="name another folder, or see what that file is and remove it there",
        )
    with bar(f"upload {file.name}", file.size, "bytes") as progress:
        name = store.send(folder / file.name, file.name, progress)
    try:
        with bar(f"read back {file.name}", file.size, "bytes") as progress:
            if not store.holds(file, name, progress):
                raise StoreFailed(
                    f"{store.shown}/{file.name} reads back as something else than what was sent"
                )
    except MigrationError:  # S3's own checksums refuse the reading where the bytes are others
        store.remove(name)
        raise
    store.keep(name, file.name)
    return True


def manifests(store: OffsiteStore) -> list[str]:
    """The names of the manifests there, newest first; raises MissingData where there is nothing at all."""
    names = {name.removesuffix(SUFFIX) for name in store.sizes()}
    found = sorted(filter(MANIFEST_NAME.fullmatch, names), reverse=True)
    if not found:
        raise MissingData(
            f"no backup at {store.shown}", next_step="see whether the bucket and the folder are spelled right"
        )
    return found


def read_there(store: OffsiteStore, name: str) -> tuple[Manifest, bytes]:
    """A manifest there, and its bytes; raises MissingData, BackupDamaged, BadFile."""
    data = store.read(name)
    return parse_manifest(data, Path(name)), data


def fetch(store: OffsiteStore, name: str, folder: Path, bar: Bar) -> Path:
    """Bring a set into `folder`, its manifest last; returns the manifest's path here.

    Every byte is compared with the manifest's checksum before it bears a name here. Whole files that are here already
    are not fetched again, others are never replaced. Raises BackupDamaged, BadFile, MissingData, MigrationError.
    """
    manifest, data = read_there(store, name)
    for file in manifest.files:
        _require_safe(store, file.name)
    path = private_dir(folder) / manifest.name
    if path.exists() and path.read_bytes() != data:
        raise _another(path)
    missing = [file for file in manifest.files if not _is_here(folder / file.name, file)]
    need = sum(file.size for file in missing) + _SPARE
    if missing and free_bytes(folder) < need:
        raise MigrationError(
            f"{folder} has {free_bytes(folder) >> 20} MiB free, the set needs {need >> 20} MiB",
            next_step=f"df -h {quote(str(folder))}   then free some room, or name another folder with --backup-dir",
        )
    for file in missing:
        private_dir((folder / file.name).parent)
        with bar(f"fetch {file.name}", file.size, "bytes") as progress:
            _receive(store, file, folder / file.name, progress)
    if not path.exists():
        write_atomic(path, data)
    return path


def is_whole_here(store: OffsiteStore, name: str, folder: Path) -> bool:
    """Whether the set is in `folder` already, byte for byte. Raises BadFile for another file of one of its names."""
    manifest, data = read_there(store, name)
    path = folder / manifest.name
    if path.exists() and path.read_bytes() != data:
        raise _another(path)
    # Each is looked at, for the sake of what it raises.
    here = [_is_here(folder / file.name, file) for file in manifest.files]
    return path.exists() and all(here)


def accept(path: Path, folder: Path) -> Path:
    """Move a fetched set, whose manifest is `path`, into `folder`, the manifest last; returns its path there.

    What is there already is the same (see `is_whole_here`) and is replaced by it.
    """
    manifest = read_manifest(path)
    for name in [*(file.name for file in manifest.files), manifest.name]:
        target = folder / name
        private_dir(target.parent)
        (path.parent / name).replace(target)
        sync_dir(target.parent)
    return folder / manifest.name


def require_fetchable(name: str) -> None:
    """Raise UsageProblem for a file's name that `fetch` would refuse: asked before anything is uploaded."""
    if not _is_plain(name):
        raise UsageProblem(
            f"{name!r} cannot be fetched back from a copy: a part of its name is '.' or '..', or holds a backslash or"
            " a character that cannot be printed; nothing was uploaded",
            next_step="back up without --upload and copy the files yourself, or give the graph another name",
        )


def _is_plain(name: str) -> bool:
    """Whether a file's name stays in its folder, and is the same on every system."""
    return all(
        part not in {"", ".", ".."} and "\\" not in part and part.isprintable() for part in name.split("/")
    )


def _require_safe(store: OffsiteStore, name: str) -> None:
    """A manifest from elsewhere names files in here: never one outside of the folder."""
    if not _is_plain(name):
        raise BadFile(f"the manifest at {store.shown} names a file that no backup has: {name!r}")


def _is_here(path: Path, file: BackupFile) -> bool:
    if not path.exists():
        return False
    if not path.is_file() or _file_here(path, file.name) != file:
        raise _another(path)
    return True


def _another(path: Path) -> BadFile:
    return BadFile(
        f"{path} is here already, and is not the one of the set to fetch",
        next_step="fetch into another folder with --backup-dir",
    )


def _receive(store: OffsiteStore, file: BackupFile, path: Path, progress: Progress) -> None:
    digest, size = hashlib.sha256(), 0

    def wrong() -> BackupDamaged:
        return BackupDamaged(
            f"{store.shown}/{file.name} is not what its manifest says ({size} of {file.size} bytes)",
            next_step=f"use another set: python scripts/backup_automem.py --list {quote(store.shown)}",
        )

    with atomic_writer(path) as stream:

        def write(data: bytes) -> None:
            nonlocal size
            size += len(data)
            if size > file.size:  # it may never end
                raise wrong()
            stream.write(data)
            digest.update(data)
            progress(len(data))

        store.copy_out(file.name, write)
        if (size, digest.hexdigest()) != (file.size, file.sha256):
            raise wrong()


@dataclass(frozen=True)
class Catalog:
    """What `where` holds: each set and whether its files are in place with their sizes; manifests that do not read."""

    where: str
    sets: list[tuple[Manifest, bool]]
    unreadable: list[str]


def catalog_at(url: str, folder: Path, keys: CopyKeys = NO_KEYS) -> Catalog:
    """The sets at a URL, or without one in `folder`; raises like `open_offsite` and `remote_catalog`."""
    return remote_catalog(open_offsite(url, keys)) if url else local_catalog(folder)


def local_catalog(folder: Path) -> Catalog:
    """The sets in a backup folder."""
    sets, unreadable, safety = [], [], safety_copies(folder)
    for path in manifest_paths(folder):
        try:
            manifest = with_purpose(read_manifest(path), safety)
            sets.append((manifest, is_complete(manifest)))
        except (BackupDamaged, BadFile):
            unreadable.append(str(path))
    return Catalog(str(folder), sets, unreadable)


def remote_catalog(store: OffsiteStore) -> Catalog:
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
    return Catalog(store.shown, sets, unreadable)


def _is_there(file: BackupFile, there: dict[str, int]) -> bool:
    """Whether a file of its size is there, as it is or encrypted."""
    return there.get(file.name) == file.size or could_hold(there.get(file.name + SUFFIX), file.size)
