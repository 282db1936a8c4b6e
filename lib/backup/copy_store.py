"""A folder elsewhere, through fsspec: its address; list, read and write files. Raises only our own errors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from lib.backup.age import SUFFIX, CopyKeys, decrypt, identities, key_in, passphrase, require_key
from lib.backup.manifest import MAX_BYTES, BackupFile
from lib.concurrency import Progress, steps_of
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
_AZURE = dict.fromkeys(("az", "abfs", "abfss"), "adlfs")
# That a scheme needs besides fsspec.
_PACKAGES = {FILE: "fsspec", SFTP: "paramiko", S3: "s3fs", "gs": "gcsfs", **_AZURE}
_MASK = "***"


@dataclass(frozen=True)
class OffsiteAddress:
    """A folder elsewhere. `url` and `password` must not be printed; `shown` and `clean()` are for that."""

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
        """Whether a file grows under its name there. In an object store it appears when it is complete."""
        return self.scheme in {FILE, SFTP}

    def clean(self, text: str) -> str:
        """Mask the password in a text, in both of its spellings."""
        for secret in {self.password, unquote(self.password or "")} - {None, ""}:
            text = text.replace(str(secret), _MASK)
        return text


def is_url(word: str) -> bool:
    """Whether a FILE argument is a URL."""
    return "://" in word


def offsite_address(text: str) -> OffsiteAddress:
    """Parse a URL or the path of a local folder. Raises UsageProblem, which shows no part that may be secret."""
    if not is_url(text):
        if ":" in text.partition("/")[0]:  # as scp, rsync, restic and rclone write it; or a slash is missing
            place = "the place of the copies has a ':' before its first slash"
            raise _unusable(f"{place}, so it is neither a URL nor a local folder")
        return _local(Path(text))
    scheme = text.partition("://")[0].lower()
    if scheme not in _PACKAGES:
        name = f"{scheme}://" if re.fullmatch(r"[a-z0-9+.-]{1,20}", scheme) else "this URL"
        raise _unusable(f"copies of backups cannot be at {name}")
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
    return _remote(scheme, text, parts, port)


def _remote(scheme: str, text: str, parts: SplitResult, port: int | None) -> OffsiteAddress:
    if not parts.hostname:
        raise _unusable(f"the {scheme}:// URL names no {'host' if scheme == SFTP else 'bucket'}")
    if scheme != SFTP:
        # az://container@account.host/folder is a form of Azure's own; any other '@' ends a login.
        if parts.password or ("@" in parts.netloc and scheme not in _AZURE):
            raise _unusable(f"a {scheme}:// URL holds no login: it comes from the environment, see docs/operations.md")
        return OffsiteAddress(scheme, text.rstrip("/"), text.rstrip("/"))
    host = parts.hostname
    login = f"{parts.username}{f':{_MASK}' if parts.password else ''}@" if parts.username else ""
    shown = f"[{host}]" if ":" in host else host
    return OffsiteAddress(
        SFTP,
        f"sftp://{login}{shown}{f':{port}' if port else ''}{parts.path.rstrip('/')}",
        text,
        host=host,
        port=port,
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        path=unquote(parts.path).rstrip("/") or "/",
    )


def _unusable(message: str) -> UsageProblem:
    forms = "s3://bucket/folder, gs://bucket/folder, az://container/folder, sftp://user@host/folder, or a local folder"
    return UsageProblem(message, next_step=f"name {forms} (./a:b if it has a ':')")


def _local(folder: Path) -> OffsiteAddress:
    path = str(folder.expanduser().absolute())
    try:
        Path(path).resolve()
    except (OSError, RuntimeError):  # Python 3.13 no longer raises for a loop
        raise _unusable("the folder is behind a link that leads to itself") from None
    return OffsiteAddress(FILE, path, path, path=path)


# Classes of errors of Python, paramiko, botocore, aiohttp, azure.core and google.auth: none has to be imported.
_REFUSED = {"PermissionError", "AuthenticationException", "BadHostKeyException", "NoCredentialsError"}
_REFUSED |= {"PartialCredentialsError", "ClientAuthenticationError", "DefaultCredentialsError", "RefreshError"}
_UNREACHABLE = {"ConnectionError", "TimeoutError", "gaierror", "NoValidConnectionsError", "EndpointConnectionError"}
_UNREACHABLE |= {"HTTPClientError", "ClientConnectionError", "ServiceRequestError", "TransportError"}


@contextlib.contextmanager
def _translated(address: OffsiteAddress, what: str) -> Iterator[None]:
    """Turn the errors of libraries in the block, which does `what` there, into ours, worded without a password."""
    try:
        yield
    except MigrationError:
        raise
    except Exception as error:  # botocore, aiohttp, azure, google.auth and paramiko share no base
        classes = {one.__name__ for one in type(error).__mro__}
        text = address.clean(" ".join(str(error).split())).removeprefix("[Errno None] ") or type(error).__name__
        key = "not known here" if "not found in known_hosts" in text else ""
        if not key and "BadHostKeyException" in classes:
            key = "not the one in ~/.ssh/known_hosts: another machine may answer there"
        kind: type[MigrationError] = StoreFailed
        step = "check that place, then run the same command again"
        if key:
            port = f"-p {address.port} " if address.port else ""
            kind, text = AccessRefused, f"the host's key is {key}"
            step = f"compare the key that this shows with the host's own:\nssh {port}{address.host}"
        elif isinstance(error, FileNotFoundError):
            kind, step = MissingData, "check the spelling of the bucket, container or folder"
        elif classes & _REFUSED:
            kind = AccessRefused
            login = "give the login in the environment, with rights to list, read and write: see docs/operations.md"
            step = f"look at the rights there:\nls -l {quote(address.shown)}" if address.scheme == FILE else login
        elif classes & _UNREACHABLE:
            kind, step = StoreUnreachable, "check the host, the port and the network, then run the same command again"
        raise kind(f"cannot {what} {address.shown}: {text}", next_step=step) from error


NO_KEYS = CopyKeys()
KEY_FILE = "backup_{stamp}.key"  # in the set's folder, encrypted with the passphrase
_STAMP_IN_NAME = re.compile(rf"{STAMP}(?=\.[a-z.]+$)")
_CHUNK, _BLOCK = 1 << 20, 8 << 20
_PARTS = 9000  # S3 takes 10,000
_PROBE, _PROBE_BYTES = ".automem-probe", b"backup_automem.py asks whether it may write here\n"


class OffsiteStore:
    """An opened folder elsewhere. Every name is relative to it, with slashes."""

    def __init__(self, address: OffsiteAddress, fs: Any, root: str, keys: CopyKeys) -> None:
        self.address, self.shown, self.keys = address, address.shown, keys
        self._fs, self._root = fs, root.rstrip("/")
        self._opened: dict[str, list[Any]] = {}  # private keys by the name of the set's key file

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The files directly in `folder` with their bytes; empty if there is no such folder."""
        with _translated(self.address, "list"):
            try:
                found = self._fs.ls(self._path(folder).rstrip("/"), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        prefix = f"{folder}/" if folder else ""
        files = [one for one in found if one["type"] != "directory"]
        return {prefix + one["name"].rpartition("/")[2]: int(one["size"]) for one in files}

    def size_of(self, name: str) -> int | None:
        """The bytes of a file, or None if it does not exist."""
        with _translated(self.address, "look at"):
            self._fs.invalidate_cache()
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file, at most a MiB at a time. Raises MissingData if it does not exist."""
        with _translated(self.address, "read"):
            stream = self._fs.open(self._path(name), "rb", block_size=_BLOCK)
            try:
                while data := bytes(stream.read(_CHUNK)):
                    yield data
            finally:
                with contextlib.suppress(Exception):  # a broken connection cannot be closed properly
                    stream.close()

    def copy_out(self, name: str, write: Callable[[bytes], object]) -> None:
        """Give `write` a set's file, decrypted. Raises MissingData, UsageProblem without a key, and like `decrypt`."""
        encrypted = name + SUFFIX
        if self.size_of(encrypted) is None:
            for data in self.chunks(name):
                write(data)
            return
        shown = f"{self.shown}/{encrypted}"
        require_key(self.keys, shown)
        # The operator's own keys, and the key of the file's set, by the passphrase.
        private_keys = identities(self.keys) if self.keys.identity else []
        stamp = _STAMP_IN_NAME.search(name)
        if self.keys.passphrase_file and stamp:
            key_file = f"{KEY_FILE.format(stamp=stamp[0])}{SUFFIX}"
            if key_file not in self._opened and self.size_of(key_file) is not None:
                self._opened[key_file] = key_in(self.read(key_file), passphrase(self.keys))
            private_keys += self._opened.get(key_file, [])
        decrypt(self.chunks(encrypted), write, private_keys, shown)

    def read(self, name: str) -> bytes:
        """Read a whole manifest or key file. Raises like `copy_out`, and BackupDamaged for one that is too large."""
        found = bytearray()

        def write(data: bytes) -> None:
            found.extend(data)
            if len(found) > MAX_BYTES:
                raise BackupDamaged(f"{self.shown}/{name} is too large for a manifest")

        self.copy_out(name, write)
        return bytes(found)

    def holds(self, file: BackupFile, name: str, progress: Progress) -> bool:
        """Whether the bytes stored as `name` are the file's, read back in full."""
        digest, size = hashlib.sha256(), 0
        for data in self.chunks(name):
            digest.update(data)
            size += len(data)
            progress(len(data))
        return (size, digest.hexdigest()) == (file.size, file.sha256)

    def send(self, source: Path, name: str, progress: Progress) -> str:
        """Write a file. Returns the name under which it can be read back; `publish` gives it its own."""
        from fsspec.callbacks import Callback

        stored = name + PARTIAL if self.address.has_folders else name
        path, is_local = self._path(stored), self.address.scheme == FILE
        step = steps_of(progress)
        callback = Callback(hooks={"progress": lambda _size, value, **_: step(value)})
        options = {"chunksize": max(_BLOCK, source.stat().st_size // _PARTS)} if self.address.scheme == S3 else {}
        with _translated(self.address, "write to"):
            self._make_folder(path.rpartition("/")[0])
            if is_local:  # closed to others before the first byte is in it
                Path(path).unlink(missing_ok=True)
                private_file(Path(path))
            self._fs.put_file(str(source), path, callback=callback, **options)
            if is_local:
                with Path(path).open("rb") as stream:
                    os.fsync(stream.fileno())
        return stored

    def _make_folder(self, path: str) -> None:
        if self.address.scheme == FILE:
            private_dir(Path(path), shared=True)
        elif self.address.has_folders:
            self._fs.makedirs(path or "/", exist_ok=True, mode=0o700)

    def publish(self, stored: str, name: str) -> None:
        """Give what `send` wrote its own name."""
        if stored != name:
            with _translated(self.address, "write to"):
                self._fs.mv(self._path(stored), self._path(name))
            if self.address.scheme == FILE:
                sync_dir(Path(self._path(name)).parent)

    def remove(self, name: str) -> None:
        """Remove a file that this run wrote, if that is allowed."""
        with contextlib.suppress(MigrationError):
            self.delete(name)

    def delete(self, name: str) -> None:
        """Delete a file, so that a power cut does not bring it back. Raises AccessRefused, MissingData."""
        with _translated(self.address, "delete in"):
            self._fs.rm_file(self._path(name))
            if self.address.scheme == FILE:
                sync_dir(Path(self._path(name)).parent)

    def verify_writable(self) -> None:
        """Write a small file, read it back and delete it. Keys that may not delete are accepted."""
        if self.address.scheme == FILE:
            try:
                private_dir(Path(self._root), shared=True)
            except UsageProblem as error:
                step = f"upload into another folder, or check this one:\nls -ld {quote(self._root)}"
                raise UsageProblem(str(error), next_step=step) from error
            return
        path = self._path(_PROBE)
        with _translated(self.address, "write to"):
            self._make_folder(self._root)
            self._fs.pipe_file(path, _PROBE_BYTES)
        # Another run may have deleted it.
        with _translated(self.address, "read back from"), contextlib.suppress(FileNotFoundError):
            self._fs.cat_file(path)
        self.remove(_PROBE)


def open_offsite(url: str, keys: CopyKeys = NO_KEYS) -> OffsiteStore:
    """Open a URL or local folder; `keys` decrypt what is encrypted there.

    Raises UsageProblem for a URL of another kind or a missing package, AccessRefused, StoreUnreachable.
    """
    address = offsite_address(url)
    for package in ("fsspec", _PACKAGES[address.scheme]):
        if importlib.util.find_spec(package) is None:
            raise UsageProblem(
                f"{address.scheme}:// needs the Python package '{package}', which is not installed here",
                next_step=f"python -m pip install {package}\nor, for every kind of place:\n"
                "python -m pip install -r requirements-offsite.txt",
            )
    # The libraries log warnings and tracebacks of what is raised here as an error of ours.
    logging.getLogger().addHandler(logging.NullHandler())
    with _translated(address, "open"):
        if address.scheme == SFTP:
            login = {"port": address.port, "username": address.username, "password": address.password}
            given = {name: one for name, one in login.items() if one}
            return OffsiteStore(address, _known_host_sftp()(address.host, **given), address.path, keys)
        if address.scheme == FILE:
            from fsspec.implementations.local import LocalFileSystem

            if (path := Path(address.path)).is_file():
                raise UsageProblem(f"{path} is a file, a folder is needed", next_step=f"name its folder: {path.parent}")
            return OffsiteStore(address, LocalFileSystem(), address.path, keys)
        from fsspec.core import url_to_fs

        # For S3: parts of 8 MiB in memory at once.
        options = {"max_concurrency": 4} if address.scheme == S3 else {}
        fs, root = url_to_fs(address.url, use_listings_cache=False, skip_instance_cache=True, **options)
        return OffsiteStore(address, fs, str(root), keys)


_CONNECT_SECONDS, _SILENT_SECONDS = 30.0, 120.0  # of SFTP
_IN_FLIGHT = 64  # requests of 32 KiB: 2 MiB on their way


def _known_host_sftp() -> type[Any]:
    """Return fsspec's SFTP for known hosts only, which notices a silent server and reads ahead.

    fsspec's own accepts any host key: a machine in between would get the password and the backup. The login is the
    URL's, else the keys of the agent or in `~/.ssh/id_*`.
    """
    import paramiko
    from fsspec.implementations.sftp import SFTPFileSystem

    class KnownHostSFTP(SFTPFileSystem):  # type: ignore[misc]  # fsspec has no types
        cachable = False

        def _connect(self) -> None:
            self.client = paramiko.SSHClient()
            self.client.load_system_host_keys()
            self.client.set_missing_host_key_policy(paramiko.RejectPolicy())
            limits = dict.fromkeys(("timeout", "banner_timeout", "auth_timeout"), _CONNECT_SECONDS)
            self.client.connect(self.host, **{**limits, **self.ssh_kwargs})
            self.ftp = self.client.open_sftp()
            if channel := self.ftp.get_channel():
                channel.settimeout(_SILENT_SECONDS)

        def put_file(self, lpath: str, rpath: str, callback: Any = None, **_: Any) -> None:
            self.ftp.open(rpath, "w").close()
            with contextlib.suppress(OSError):  # some servers let nobody change modes
                self.ftp.chmod(rpath, 0o600)
            report = callback.absolute_update if callback else lambda _done: None
            self.ftp.put(lpath, rpath, callback=lambda done, _total: report(done))  # it compares sizes at the end

        def mv(self, old: str, new: str, **_: Any) -> None:
            self.ftp.rename(old, new)  # fails if `new` exists; fsspec's replaces it

        def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> Any:
            stream = self.ftp.open(path, mode, bufsize=block_size or -1)
            if mode == "rb":
                stream.prefetch(max_concurrent_requests=_IN_FLIGHT)
            return stream

    return KnownHostSFTP
