"""Copies of backup sets elsewhere: uploaded (the manifest last, each file read back), listed, fetched."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from lib.backup.age import SUFFIX, CopyKeys, could_hold, encrypt, key_in, new_key, passphrase, recipients
from lib.backup.automem_files import listed_files
from lib.backup.catalog import OUTGOING, PIN, is_complete, pinned_sets, read_sets
from lib.backup.copy_store import FILE, KEY_FILE, NO_KEYS, OffsiteStore, offsite_address, open_offsite
from lib.backup.manifest import BackupFile, Manifest, parse_manifest
from lib.concurrency import Progress, ProgressBar
from lib.errors import AccessRefused, BackupDamaged, BadFile, MigrationError, MissingData, StoreFailed, UsageProblem
from lib.files import PassThrough, atomic_writer, lock_targets, private_dir, require_room, sha256_file, write_atomic
from lib.journal import STAMP

MANIFEST_NAME = re.compile(rf"backup_{STAMP}\.json")
_SPARE = 16 << 20


@dataclass(frozen=True)
class Uploaded:
    """A set that is complete at `url` (as it may be printed): the files and bytes that were sent, and that were there.

    `same_disk`: the copy is lost with the disk of the set here.
    """

    url: str
    manifest: str
    sent: int
    sent_bytes: int
    there: int
    same_disk: bool = False
    encrypted: bool = False


def upload(url: str, manifest: Manifest, bar: ProgressBar, keys: CopyKeys = NO_KEYS) -> Uploaded:
    """Upload a set, its manifest last. Each file is read back and compared; what is there already is not sent again.

    Raises MigrationError if anything fails: then no manifest of the set is there, and no other file was changed. Raises
    BackupDamaged if a file here differs from the manifest, UsageProblem for a name that could not be fetched back.
    """
    address = offsite_address(url)
    files = [*manifest.files, _file_here(manifest.path, manifest.name)]
    for file in manifest.files:
        require_fetchable(file.name)
        path = manifest.path.parent / file.name
        if not path.is_file() or _file_here(path, file.name) != file:
            raise BackupDamaged(
                f"{path} is not what its manifest says: nothing was uploaded",
                next_step="take a new backup:\npython scripts/backup_automem.py",
            )
    try:
        with _copy_lock(manifest, address.shown):
            store = open_offsite(url, keys)
            if keys.encrypt:
                sent = _send_encrypted(store, manifest, files, bar)
            else:
                sent = _send_all(store, manifest.path.parent, files, bar)
    except MigrationError as error:
        raise MigrationError(
            f"the backup did not arrive: {error}\nthe set is whole here: {manifest.path}",
            next_step=f"{error.next_step}\n{upload_command(manifest.path, address.shown)}".strip(),
        ) from error
    size, there = sum(file.size for file in sent), max(0, len(files) - len(sent))
    same_disk = address.scheme == FILE and Path(address.path).stat().st_dev == manifest.path.stat().st_dev
    return Uploaded(address.shown, manifest.name, len(sent), size, there, same_disk, keys.encrypt)


def upload_new(
    url: str | None, manifest: Manifest, bar: ProgressBar, keys: CopyKeys, say: Callable[[str], None]
) -> Uploaded | None:
    """Upload a new set if a URL is given, after `say` was given the command that resumes the upload."""
    if url is None:
        return None
    resume = upload_command(manifest.path, offsite_address(url).shown)
    say(f"backup set: {manifest.path}\nif its upload stops: {resume}")
    return upload(url, manifest, bar, keys)


def _copy_lock(manifest: Manifest, shown: str) -> AbstractContextManager[None]:
    """Return the lock of one copy: what is being uploaded is not deleted."""
    return lock_targets([f"{manifest.name} at {shown}"])


def delete_copy(store: OffsiteStore, manifest: Manifest) -> None:
    """Delete a set at the place of copies, plain or encrypted, its manifest first. A set without one is none.

    Raises LockHeld while this machine uploads the set, and AccessRefused.
    """
    with _copy_lock(manifest, store.shown):
        existing = _sizes(store, manifest.files)
        names = (manifest.name, *(file.name for file in manifest.files), KEY_FILE.format(stamp=manifest.stamp))
        for one in (spelled for name in names for spelled in (name, name + SUFFIX)):
            if one in existing:
                store.delete(one)


def require_elsewhere(url: str, folder: Path) -> None:
    """Raise UsageProblem if the URL is the backup folder or inside it: the set would count as its own copy."""
    address = offsite_address(url)
    if address.scheme == FILE and Path(address.path).resolve().is_relative_to(folder.resolve()):
        raise UsageProblem(
            f"{address.shown} is in the backup folder {folder}: that is no copy elsewhere",
            next_step="name a folder outside of it, on another disk, or a URL",
        )


def _send_all(store: OffsiteStore, folder: Path, files: list[BackupFile], bar: ProgressBar) -> list[BackupFile]:
    """Send the files of `folder` in their order, the manifest last. Returns those that were sent."""
    there = _sizes(store, files)
    if all(there.get(file.name) == file.size for file in files):
        with bar("manifest there", files[-1].size, "bytes") as progress:
            # It is sent last: if it is there, the files were complete there.
            if store.holds(files[-1], files[-1].name, progress):
                return []
    *data, last = files
    sent = [file for file in data if _send(store, file, folder, bar, there)]
    now = _sizes(store, files)
    for file in data:  # an object store replaces without a word what another machine wrote at the same time
        if now.get(file.name) != file.size:
            raise _occupied(store, file.name)
    return [*sent, last] if _send(store, last, folder, bar, there) else sent


def _sizes(store: OffsiteStore, files: Sequence[BackupFile]) -> dict[str, int]:
    """The bytes of every file in the folders of these files, and next to their manifest."""
    folders = {"", *(file.name.rpartition("/")[0] for file in files)}
    return {name: size for one in folders for name, size in store.sizes(one).items()}


def _send_encrypted(
    store: OffsiteStore, manifest: Manifest, files: list[BackupFile], bar: ProgressBar
) -> list[BackupFile]:
    """Send the set's files encrypted, the manifest last. Returns those that were sent.

    They are encrypted into a folder here, which is removed when the copy is complete: encrypting a file twice gives
    different bytes, and a resumed upload must compare what is there.
    """
    there = _sizes(store, files)
    if all(could_hold(there.get(file.name + SUFFIX), file.size) for file in files):
        # Without a key to decrypt the manifest there, only its size is compared.
        if store.keys.decrypt and store.read(manifest.name) != manifest.path.read_bytes():
            raise _occupied(store, manifest.name + SUFFIX)
        return []
    recipient = "passphrase"  # a folder per set and recipients
    if store.keys.recipients:
        public_keys = " ".join(sorted(map(str, recipients(store.keys))))
        recipient = hashlib.sha256(public_keys.encode()).hexdigest()[:12]
    folder = private_dir(manifest.path.parent / OUTGOING) / f"{manifest.stamp}_{recipient}"
    with lock_targets([f"upload of {manifest.path.absolute()}"]):
        encrypted = _encrypted(manifest, files, folder, store.keys, bar)
        sent = _send_all(store, folder, encrypted, bar)
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # another upload's files
            folder.parent.rmdir()
    return sent


def _occupied(store: OffsiteStore, name: str) -> BadFile:
    return BadFile(
        f"{store.shown}/{name} is not the file that is to be sent",
        next_step="if another machine uploads there, name another folder; if none does, remove that file there",
    )


def _require_free(store: OffsiteStore, name: str) -> None:
    """Raise BadFile if the file exists: another machine may have uploaded a set of the same second meanwhile."""
    if store.size_of(name) is not None:
        raise _occupied(store, name)


def _encrypted(
    manifest: Manifest, files: list[BackupFile], folder: Path, keys: CopyKeys, bar: ProgressBar
) -> list[BackupFile]:
    """Encrypt the set's files into `folder`, the manifest last. What an earlier upload encrypted is used again."""
    need = sum(file.size for file in files if not (folder / f"{file.name}{SUFFIX}").exists())
    require_room(folder, need + _SPARE, "the encrypted set needs")
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
    """The public key that a set is encrypted for: that of an earlier upload, else a new one. `path` is its key file."""
    words = passphrase(keys)
    if path.exists():
        with contextlib.suppress(AccessRefused):
            return key_in(path.read_bytes(), words)[0].to_public()
        shutil.rmtree(path.parent)  # the passphrase was changed since
    public_key, key_file = new_key(words)
    private_dir(path.parent)
    write_atomic(path, key_file)
    return public_key


def upload_command(path: Path, url: str) -> str:
    """The command that uploads an existing set."""
    return f"python scripts/backup_automem.py --check {quote(str(path))} --upload {quote(url)}"


def _file_here(path: Path, name: str) -> BackupFile:
    return BackupFile(name, path.stat().st_size, sha256_file(path))


def _send(store: OffsiteStore, file: BackupFile, folder: Path, bar: ProgressBar, there: dict[str, int]) -> bool:
    """Send one file and read it back. Returns False if it is there already. Never replaces another file."""
    if file.name in there:
        with bar(f"read back {file.name}", file.size, "bytes") as progress:
            if there[file.name] == file.size and store.holds(file, file.name, progress):
                return False
        raise _occupied(store, file.name)
    _require_free(store, file.name)
    with bar(f"upload {file.name}", file.size, "bytes") as progress:
        stored = store.send(folder / file.name, file.name, progress)
    try:
        with bar(f"read back {file.name}", file.size, "bytes") as progress:
            if not store.holds(file, stored, progress):
                raise StoreFailed(
                    f"{store.shown}/{file.name} reads back as something else than what was sent",
                    next_step="check that disk or server, then run the same command again",
                )
    except MigrationError:  # S3's own checksums refuse to read changed bytes
        store.remove(stored)
        raise
    if stored != file.name:
        _require_free(store, file.name)
    store.publish(stored, file.name)
    return True


def manifests(store: OffsiteStore) -> list[str]:
    """The names of the manifests there, newest first. Raises MissingData if there is none."""
    names = {name.removesuffix(SUFFIX) for name in store.sizes()}
    found = sorted(filter(MANIFEST_NAME.fullmatch, names), reverse=True)
    if not found:
        raise MissingData(f"no backup at {store.shown}", next_step="check the spelling of the bucket and the folder")
    return found


def read_there(store: OffsiteStore, name: str) -> tuple[Manifest, bytes]:
    """Read a manifest there. Returns it and its bytes. Raises MissingData, BackupDamaged, BadFile."""
    data = store.read(name)
    return parse_manifest(data, Path(name)), data


def fetch(store: OffsiteStore, name: str, folder: Path, bar: ProgressBar) -> Path:
    """Fetch a set into `folder`, its manifest last; returns the manifest's path here.

    A file gets its name only after its checksum was compared. Complete files that are here already are not fetched
    again, other files are never replaced. Raises BackupDamaged, BadFile, MissingData, MigrationError.
    """
    manifest, data = read_there(store, name)  # which refuses names of files that lead out of the folder
    path = private_dir(folder) / manifest.name
    missing = _missing(manifest, data, folder)
    need = sum(file.size for file in missing) + _SPARE if missing else 0
    require_room(folder, need, "the set needs", ", or name another folder with --backup-dir")
    for file in missing:
        private_dir((folder / file.name).parent)
        with bar(f"fetch {file.name}", file.size, "bytes") as progress:
            _receive(store, file, folder / file.name, progress)
    if not path.exists():
        write_atomic(path, data)
    return path


def is_whole_here(store: OffsiteStore, name: str, folder: Path) -> bool:
    """Whether the set is in `folder` already, byte for byte. Raises BadFile if another file has one of its names."""
    manifest, data = read_there(store, name)
    return not _missing(manifest, data, folder) and (folder / manifest.name).exists()


def _missing(manifest: Manifest, data: bytes, folder: Path) -> list[BackupFile]:
    """The files of the set that are not in `folder`. Raises BadFile if another file has one of its names."""
    path, missing = folder / manifest.name, []
    if path.exists() and path.read_bytes() != data:
        raise _another(path)
    for file in manifest.files:
        path = folder / file.name
        if not path.exists():
            missing.append(file)
        elif not path.is_file() or _file_here(path, file.name) != file:
            raise _another(path)
    return missing


def _another(path: Path) -> BadFile:
    return BadFile(
        f"{path} is here already, and differs from the one of the set to fetch",
        next_step="fetch into another folder with --backup-dir",
    )


def require_fetchable(name: str) -> None:
    """Raise UsageProblem for a file's name that leaves its folder, or is not the same on every system."""
    if not all(part not in {"", ".", ".."} and "\\" not in part and part.isprintable() for part in name.split("/")):
        raise UsageProblem(
            f"{name!r} cannot be fetched back from a copy: a part of its name is '.' or '..', or holds a backslash or"
            " a character that cannot be printed; nothing was uploaded",
            next_step="back up without --upload and copy the files yourself, or give the graph another name",
        )


def _receive(store: OffsiteStore, file: BackupFile, path: Path, progress: Progress) -> None:
    wrong = BackupDamaged(
        f"{store.shown}/{file.name} is not what its manifest says",
        next_step=f"use another set:\npython scripts/backup_automem.py --list {quote(store.shown)}",
    )
    digest = hashlib.sha256()
    with atomic_writer(path) as stream:
        out = PassThrough(stream, digest.update, lambda data: progress(len(data)))

        def write(data: bytes) -> None:
            if out.size + len(data) > file.size:  # it may never end
                raise wrong
            out.write(data)

        store.copy_out(file.name, write)
        if (out.size, digest.hexdigest()) != (file.size, file.sha256):
            raise wrong


@dataclass(frozen=True)
class Catalog:
    """The sets in a folder or at a URL, each with whether its files exist with their sizes; unreadable manifests.

    `pinned`: names of manifests. `automem`: the backups by AutoMem's own scripts, which are not sets.
    """

    where: str
    sets: list[tuple[Manifest, bool]]
    unreadable: list[str]
    pinned: frozenset[str] = frozenset()
    automem: tuple[Path, ...] = ()


def catalog_at(url: str, folder: Path, keys: CopyKeys = NO_KEYS) -> Catalog:
    """The sets at a URL, or without one in `folder`. Raises like `open_offsite` and `manifests`.

    A manifest that is encrypted for another key counts as unreadable. Raises AccessRefused if all of them are.
    """
    if not url:
        sets, damaged = read_sets(folder)
        automem = tuple(one.path for one in listed_files(folder))
        pinned = pinned_sets(path.name for path in folder.glob(f"*{PIN}"))
        rows = [(one, is_complete(one)) for one in sets]
        return Catalog(str(folder), rows, list(map(str, damaged)), pinned, automem)
    store, found, unreadable = open_offsite(url, keys), list[Manifest](), list[str]()
    refused: AccessRefused | None = None
    for name in manifests(store):
        try:
            found.append(read_there(store, name)[0])
        except (AccessRefused, BackupDamaged, BadFile, MissingData) as error:
            unreadable.append(f"{store.shown}/{name}")
            refused = error if isinstance(error, AccessRefused) else refused
    if refused and not found:
        raise refused
    there = _sizes(store, [file for manifest in found for file in manifest.files])

    def is_there(file: BackupFile) -> bool:
        return there.get(file.name) == file.size or could_hold(there.get(file.name + SUFFIX), file.size)

    return Catalog(store.shown, [(one, all(map(is_there, one.files))) for one in found], unreadable, pinned_sets(there))
