"""A folder elsewhere, through fsspec: list, read, write, each failure told as one of ours.

Object stores show an object when it is whole. Where a file grows under its name (local folders, SFTP) it is
`<name>.partial` until it was read back.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from lib.backup_set.age import SUFFIX, CopyKeys, decrypt, identities, key_in, passphrase, require_key
from lib.backup_set.manifest import MAX_BYTES, BackupFile
from lib.backup_set.offsite_address import FILE, S3, SFTP, OffsiteAddress, offsite_address
from lib.backup_set.offsite_trouble import trouble
from lib.errors import BackupDamaged, MigrationError, UsageProblem
from lib.files import PARTIAL, private_dir, private_file, sync_dir

Progress = Callable[[int], None]
NO_KEYS = CopyKeys()
STAMP_IN_NAME = re.compile(r"\d{8}_\d{6}(?=\.[a-z.]+$)")
KEY_FILE = "backup_{stamp}.key"  # in the set's folder, encrypted with the passphrase
_CHUNK = 1 << 20
_BLOCK = 8 << 20
_PARTS = 9000  # S3 takes 10,000
_PROBE, _PROBE_BYTES = ".automem-probe", b"backup_automem.py asks whether it may write here\n"
_LOUD = (
    "paramiko",
    "fsspec",
    "s3fs",
    "gcsfs",
    "adlfs",
    "azure",
    "google",
    "botocore",
    "aiobotocore",
    "asyncio",
)


class OffsiteStore:
    """One opened place; every name is relative to its folder, with slashes."""

    def __init__(self, address: OffsiteAddress, fs: Any, root: str, keys: CopyKeys) -> None:
        self.address = address
        self.keys = keys
        self._fs = fs
        self._root = root.rstrip("/")
        self._opened: dict[str, list[Any]] = {}  # private keys by the name of the set's key file

    @property
    def shown(self) -> str:
        """Its URL as it may be printed."""
        return self.address.shown

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The files right in `folder` with their bytes; empty where there is no such folder."""
        path = self._path(folder).rstrip("/")
        with self._asking("list"):
            try:
                found = self._fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        prefix = f"{folder}/" if folder else ""
        files = [one for one in found if one["type"] != "directory"]
        return {prefix + one["name"].rpartition("/")[2]: int(one["size"]) for one in files}

    def size_of(self, name: str) -> int | None:
        """Its bytes, None where it is not there."""
        with self._asking("look at"):
            self._fs.invalidate_cache()
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, at most a MiB at a time. Raises MissingData where it is not there."""
        with self._asking("read"):
            stream = self._fs.open(self._path(name), "rb", block_size=_BLOCK)
        try:
            while True:
                with self._asking("read"):
                    data = bytes(stream.read(_CHUNK))
                if not data:
                    return
                yield data
        finally:
            with contextlib.suppress(Exception):  # a broken connection cannot be closed politely
                stream.close()

    def copy_out(self, name: str, write: Callable[[bytes], object]) -> None:
        """Give `write` the bytes of a file of a set, decrypted if it is encrypted (`<name>.age`).

        Raises MissingData, BackupDamaged, UsageProblem without a key, AccessRefused if none fits, and what `write`
        raises.
        """
        encrypted = name + SUFFIX
        if self.size_of(encrypted) is None:
            for data in self.chunks(name):
                write(data)
            return
        shown = f"{self.shown}/{encrypted}"
        require_key(self.keys, shown)
        decrypt(self.chunks(encrypted), write, self._private_keys(name), shown)

    def _private_keys(self, name: str) -> list[Any]:
        """The keys that may decrypt a file: the operator's own, or that of the file's set, by the passphrase."""
        found = identities(self.keys) if self.keys.identity else []
        stamp = STAMP_IN_NAME.search(name)
        if self.keys.passphrase_file and stamp:
            key_file = f"{KEY_FILE.format(stamp=stamp[0])}{SUFFIX}"
            if key_file not in self._opened and self.size_of(key_file) is not None:
                self._opened[key_file] = key_in(self._whole(key_file), passphrase(self.keys))
            found += self._opened.get(key_file, [])
        return found

    def read(self, name: str) -> bytes:
        """A manifest whole; raises BackupDamaged if it is larger than any."""
        found = bytearray()

        def write(data: bytes) -> None:
            found.extend(data)
            if len(found) > MAX_BYTES:
                raise BackupDamaged(f"{self.shown}/{name} is too large for a manifest")

        self.copy_out(name, write)
        return bytes(found)

    def _whole(self, name: str) -> bytes:
        found = bytearray()
        for data in self.chunks(name):
            found += data
            if len(found) > MAX_BYTES:
                break
        return bytes(found)

    def holds(self, file: BackupFile, name: str, progress: Progress) -> bool:
        """Whether the bytes under `name` are the file's, read back in full."""
        digest, size = hashlib.sha256(), 0
        for data in self.chunks(name):
            digest.update(data)
            size += len(data)
            progress(len(data))
        return (size, digest.hexdigest()) == (file.size, file.sha256)

    def send(self, source: Path, name: str, progress: Progress) -> str:
        """Write a file; the name under which it can be read back now, `keep` gives it its own."""
        there = name + PARTIAL if self.address.has_folders else name
        with self._asking("write to"):
            self._make_folder(self._path(there).rpartition("/")[0])
            self._put(source, self._path(there), progress)
        return there

    def _make_folder(self, path: str) -> None:
        if self.address.scheme == FILE:
            private_dir(Path(path), shared=True)
        elif self.address.has_folders:
            self._fs.makedirs(path or "/", exist_ok=True)

    def _put(self, source: Path, path: str, progress: Progress) -> None:
        from fsspec.callbacks import Callback

        class Told(Callback):  # type: ignore[misc]  # fsspec has no types
            seen = 0

            def call(self, *_: Any, **__: Any) -> None:
                progress(self.value - self.seen)
                self.seen = self.value

        options = {}
        if self.address.scheme == S3:
            options["chunksize"] = max(_BLOCK, source.stat().st_size // _PARTS)
        if self.address.scheme == FILE:  # closed to others before the first byte is in it
            Path(path).unlink(missing_ok=True)
            private_file(Path(path))
        self._fs.put_file(str(source), path, callback=Told(), **options)
        if self.address.scheme == FILE:
            _sync_file(Path(path))

    def keep(self, there: str, name: str) -> None:
        """What `send` wrote gets its own name."""
        if there != name:
            with self._asking("write to"):
                self._fs.mv(self._path(there), self._path(name))
            if self.address.scheme == FILE:
                sync_dir(Path(self._path(name)).parent)

    def remove(self, name: str) -> None:
        """Remove a file that this run wrote; where that is not allowed it stays."""
        with contextlib.suppress(MigrationError), self._asking("delete in"):
            self._fs.rm_file(self._path(name))

    def prove_writable(self) -> None:
        """Write a small file, read it back, delete it; raises like every call. Keys that may not delete are fine."""
        if self.address.scheme == FILE:
            try:
                private_dir(Path(self._root), shared=True)
            except UsageProblem as error:
                raise UsageProblem(
                    str(error), next_step=f"ls -ld {quote(str(self._root))}   or upload into another folder"
                ) from error
            return
        path = self._path(_PROBE)
        with self._asking("write to"):
            self._make_folder(self._root)
            self._fs.pipe_file(path, _PROBE_BYTES)
        with self._asking("read back from"), contextlib.suppress(FileNotFoundError):  # another run's delete
            self._fs.cat_file(path)
        self.remove(_PROBE)

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except MigrationError:
            raise
        except Exception as error:  # botocore, aiohttp, azure, google.auth and paramiko share no base
            raise trouble(self.address, f"cannot {what} {self.shown}", error) from error


def _sync_file(path: Path) -> None:
    """Its bytes survive a power cut."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def open_offsite(url: str, keys: CopyKeys = NO_KEYS) -> OffsiteStore:
    """Open a URL or local folder; `keys` decrypt what is encrypted there.

    Raises UsageProblem for one that is none of ours or needs a package that is missing, AccessRefused,
    StoreUnreachable.
    """
    address = offsite_address(url)
    address.require_package()
    for name in _LOUD:  # their warnings and tracebacks are told as errors here, by us
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        fs, root = _open(address)
    except Exception as error:  # botocore, aiohttp, azure, google.auth and paramiko share no base
        raise trouble(address, f"cannot open {address.shown}", error) from error
    return OffsiteStore(address, fs, root, keys)


def _open(address: OffsiteAddress) -> tuple[Any, str]:
    if address.scheme == SFTP:
        from lib.backup_set.offsite_sftp import KnownHostSFTP

        login = {"port": address.port, "username": address.username, "password": address.password}
        return KnownHostSFTP(address.host, **{name: one for name, one in login.items() if one}), address.path
    if address.scheme == FILE:
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(), address.path
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if address.scheme == S3:
        options["max_concurrency"] = 4  # parts of 8 MiB in memory at once
    fs, root = url_to_fs(address.url, **options)
    return fs, str(root)
