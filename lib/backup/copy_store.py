"""A folder elsewhere, through fsspec: its address, and list, read, write; each failure is one of our errors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from lib.backup.age import SUFFIX, CopyKeys, decrypt, identities, key_in, passphrase, require_key
from lib.backup.manifest import MAX_BYTES, BackupFile
from lib.errors import (
    AccessRefused,
    BackupDamaged,
    MigrationError,
    MissingData,
    StoreFailed,
    StoreUnreachable,
    UsageProblem,
)
from lib.files import PARTIAL, private_dir, private_file, sync_dir
from lib.journal import STAMP

FILE, SFTP, S3 = "file", "sftp", "s3"
# Scheme: the module that speaks it, the package that brings it.
_LIBRARIES = {
    FILE: ("fsspec", "fsspec"),
    SFTP: ("paramiko", "paramiko"),
    S3: ("s3fs", "s3fs"),
    "gs": ("gcsfs", "gcsfs"),
    "az": ("adlfs", "adlfs"),
    "abfs": ("adlfs", "adlfs"),
    "abfss": ("adlfs", "adlfs"),
}
_AZURE = {"az", "abfs", "abfss"}
_FORMS = "s3://bucket/folder, gs://bucket/folder, az://container/folder, sftp://user@host/folder, or a local folder"
_MASK = "***"


@dataclass(frozen=True)
class OffsiteAddress:
    """A folder elsewhere. `url` and `password` are never to be shown; `shown` and `clean()` are for that."""

    scheme: str
    shown: str
    url: str = field(repr=False)
    host: str = ""
    port: int | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    path: str = ""

    @property
    def has_folders(self) -> bool:
        """Whether a file grows under its name there; in an object store it appears when it is whole."""
        return self.scheme in {FILE, SFTP}

    def clean(self, text: str) -> str:
        """The text without the password, however it is written."""
        for secret in {self.password, unquote(self.password or "")} - {None, ""}:
            text = text.replace(str(secret), _MASK)
        return text

    def require_package(self) -> None:
        """Raise UsageProblem where what speaks this scheme is not installed."""
        module, package = _LIBRARIES[self.scheme]
        for name, brings in (("fsspec", "fsspec"), (module, package)):
            if importlib.util.find_spec(name) is None:
                raise UsageProblem(
                    f"{self.scheme}:// needs the Python package '{brings}', which is not installed here",
                    next_step=f"pip install {brings}   (all of them: pip install -r requirements-offsite.txt)",
                )


def is_url(word: str) -> bool:
    """Whether a FILE argument is a URL."""
    return "://" in word


def offsite_address(text: str) -> OffsiteAddress:
    """Take a URL or the path of a local folder apart; raises UsageProblem, which shows no part that may be secret."""
    if not is_url(text):
        if ":" in text.partition("/")[0]:  # as scp, rsync, restic and rclone write it; or a slash is missing
            raise _unusable(
                "a word with ':' before its first slash is neither a URL nor plainly a local folder (./a:b is)"
            )
        return _local(Path(text))
    scheme = text.partition("://")[0].lower()
    if scheme not in _LIBRARIES:
        name = f"{scheme}://" if re.fullmatch(r"[a-z0-9+.-]{1,20}", scheme) else "this URL"
        raise _unusable(f"{name} is not a place that backups are uploaded to")
    if "?" in text or "#" in text:
        raise _unusable(f"a {scheme}:// URL ends with its folder: no '?' and no '#', and no key behind them")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # its text would show a piece of the URL
        raise _unusable(f"the port in the {scheme}:// URL is no number") from None
    if scheme == FILE:
        if parts.netloc not in {"", "localhost"}:
            raise _unusable("file:// has three slashes before the folder: file:///mnt/folder")
        return _local(Path(unquote(parts.path)))
    if not parts.hostname:
        raise _unusable(f"the {scheme}:// URL names no {'host' if scheme == SFTP else 'bucket'}")
    return _sftp(text, parts, port) if scheme == SFTP else _objects(scheme, text, parts)


def _unusable(message: str) -> UsageProblem:
    return UsageProblem(message, next_step=f"name {_FORMS}")


def _local(folder: Path) -> OffsiteAddress:
    path = str(folder.expanduser().absolute())
    try:
        Path(path).resolve()
    except (OSError, RuntimeError):  # Python 3.13 no longer raises for a loop
        raise _unusable("the folder is behind a link that leads to itself") from None
    return OffsiteAddress(FILE, path, path, path=path)


def _sftp(text: str, parts: SplitResult, port: int | None) -> OffsiteAddress:
    path = unquote(parts.path).rstrip("/") or "/"
    login = f"{parts.username}{f':{_MASK}' if parts.password else ''}@" if parts.username else ""
    place = f"{parts.hostname}:{port}" if port else parts.hostname
    return OffsiteAddress(
        SFTP,
        f"sftp://{login}{place}{parts.path.rstrip('/')}",
        text,
        host=parts.hostname or "",
        port=port,
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        path=path,
    )


def _objects(scheme: str, text: str, parts: SplitResult) -> OffsiteAddress:
    if parts.password or ("@" in parts.netloc and scheme not in _AZURE):
        raise _unusable(f"a {scheme}:// URL holds no login: it comes from the environment, see the README")
    return OffsiteAddress(scheme, text.rstrip("/"), text.rstrip("/"))


# The libraries' own families of errors, by name so that none has to be imported.
_REFUSED = {
    "PermissionError",
    "AuthenticationException",  # paramiko
    "BadHostKeyException",
    "NoCredentialsError",  # botocore
    "PartialCredentialsError",
    "ClientAuthenticationError",  # azure.core
    "DefaultCredentialsError",  # google.auth
    "RefreshError",
}
_UNREACHABLE = {
    "ConnectionError",
    "TimeoutError",
    "gaierror",
    "EndpointConnectionError",  # botocore
    "HTTPClientError",
    "ClientConnectionError",  # aiohttp
    "ServiceRequestError",  # azure.core
    "TransportError",  # google.auth
    "NoValidConnectionsError",  # paramiko
}


def trouble(address: OffsiteAddress, what: str, error: Exception) -> MigrationError:
    """The library's error as one of ours, without a password."""
    families = {one.__name__ for one in type(error).__mro__}
    text = address.clean(" ".join(str(error).split())) or type(error).__name__
    message = f"{what}: {text}"
    if "not found in known_hosts" in text:
        return AccessRefused(f"{what}: the host's key is not known here", next_step=_look_at_key(address))
    if "BadHostKeyException" in families:
        return AccessRefused(
            f"{what}: the host's key is not the one in ~/.ssh/known_hosts: another machine may stand in between",
            next_step=_look_at_key(address),
        )
    if isinstance(error, FileNotFoundError):
        return MissingData(message, next_step="see whether the bucket, container or folder is spelled right")
    if families & _REFUSED:
        return AccessRefused(
            message,
            next_step="give the login in the environment, with rights to list, read and write: see the README",
        )
    if families & _UNREACHABLE:
        return StoreUnreachable(message, next_step="check host, port and network")
    return StoreFailed(message)


def _look_at_key(address: OffsiteAddress) -> str:
    port = f"-p {address.port} " if address.port else ""
    return f"ssh {port}{address.host}   shows its key, to be compared with the host's own"


Progress = Callable[[int], None]
NO_KEYS = CopyKeys()
STAMP_IN_NAME = re.compile(rf"{STAMP}(?=\.[a-z.]+$)")
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
            _pour(self.chunks(name), write)
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
                self._opened[key_file] = key_in(
                    self._whole(key_file, partial(_pour, self.chunks(key_file))), passphrase(self.keys)
                )
            found += self._opened.get(key_file, [])
        return found

    def read(self, name: str) -> bytes:
        """A manifest whole; raises BackupDamaged if it is larger than any."""
        return self._whole(name, partial(self.copy_out, name))

    def _whole(self, name: str, copy: Callable[[Callable[[bytes], object]], None]) -> bytes:
        found = bytearray()

        def write(data: bytes) -> None:
            found.extend(data)
            if len(found) > MAX_BYTES:
                raise BackupDamaged(f"{self.shown}/{name} is too large for a manifest")

        copy(write)
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

    def verify_writable(self) -> None:
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


def _pour(pieces: Iterable[bytes], write: Callable[[bytes], object]) -> None:
    for data in pieces:
        write(data)


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
        from lib.backup.copy_sftp import KnownHostSFTP

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
