"""Files that are whole or absent: atomic writes, private folders, free space, the machine-wide lock."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shlex import quote
from types import ModuleType
from typing import IO

from lib.errors import LockHeld, MigrationError, UsageProblem, one_line

PARTIAL = ".partial"
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}  # the answers of CIFS and FUSE, among others
_NO_MODES = "\n(if its file system has no permissions, as exFAT: mount it with umask=077)"
_CHUNK = 1 << 20
_LARGEST = 64 << 20  # a journal, a report or a manifest
_HOLDER_LENGTH = 200
_LOCK_POLL_SECONDS = 0.2


def private_dir(path: Path, *, shared: bool = False) -> Path:
    """Make `path` (0700) if it is missing, and check that files can be written there.

    Unless `shared`, a folder where other users may write is refused, since these scripts act on what they find in it.
    A shared folder holds copies, which are verified when they are read. Raises UsageProblem.
    """
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not shared:
            require_own(path)
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        next_step = "name another folder with --backup-dir (or AUTOMEM_BACKUP_DIR)"
        if isinstance(error, PermissionError):
            next_step = _another_folder(path, "make this one yours:\nsudo chown $(id -un)")
        if error.errno == errno.EROFS:
            next_step += f"\nto restore a backup set of this one, name its manifest: {path}/backup_*.json"
        raise UsageProblem(f"cannot write to the folder {path}: {error.strerror}", next_step=next_step) from error
    return path


def require_readable(folder: Path) -> None:
    """Raise UsageProblem if this user may not list the folder, if it exists: `glob` would find nothing in it."""
    try:
        os.scandir(folder).close()
    except PermissionError as error:
        why = f"cannot read the folder {folder}: {error.strerror}"
        raise UsageProblem(why, next_step=_another_folder(folder)) from error
    except OSError:  # it is missing, or no folder
        pass


def _another_folder(path: Path, remedy: str = "make this one yours:\nsudo chown -R $(id -un)", else_: str = "") -> str:
    return f"name another folder with --backup-dir, or {remedy} {quote(str(path))}{else_}"


def require_own(path: Path) -> None:
    """Raise UsageProblem if the folder belongs to a user who is not trusted, or if others may write there.

    For commands that act on its content without writing there. A folder of the user's own that holds nothing yet, such
    as `backups/` of a new clone, is closed to others (0700).
    """
    state = path.stat()
    is_empty = all(one.name == "README.md" or one.name.startswith(".") for one in path.iterdir())
    if state.st_uid == os.geteuid() and state.st_mode & 0o077 and is_empty:
        with contextlib.suppress(PermissionError):  # on vfat and exFAT the options of the mount decide
            path.chmod(0o700)
        state = path.stat()
    if state.st_uid not in trusted_owners():
        text = f"the folder {path} belongs to another user (uid {state.st_uid}), who could replace what is in it"
        raise UsageProblem(text, next_step=_another_folder(path))
    # A group with the user's own number holds that user alone on most Linux systems (umask 002).
    group = 0 if state.st_gid == state.st_uid else stat.S_IWGRP
    if state.st_mode & (stat.S_IWOTH | group):
        text = f"others may write into the folder {path}: they could forge or replace what is in it"
        raise UsageProblem(text, next_step=_another_folder(path, "close this one to others:\nchmod -R go-w", _NO_MODES))


def replaceable_by_others(state: os.stat_result) -> bool:
    """Whether another user could remove or replace files in a folder with this state."""
    others_write = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return state.st_uid not in {0, os.geteuid()} or bool(others_write and not state.st_mode & stat.S_ISVTX)


def trusted_owners() -> set[int]:
    """Return the ids of this user, of root, and of the owner of this checkout, whose code runs anyway."""
    return {os.geteuid(), 0, Path(__file__).stat().st_uid}


def private_file(path: Path) -> None:
    """Make an empty file (0600) if it is missing; close an existing file to others.

    Raises UsageProblem for a link, for anything but a regular file, and for a file of a user who is not trusted.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
            raise
        raise _foreign_file(path) from error
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise _foreign_file(path)
        if state.st_uid not in trusted_owners():
            step = "if it is yours, as one copied from another machine, become its owner:"
            raise _foreign_file(path, f"{step}\nsudo chown {os.geteuid()} {quote(str(path))}")
        if state.st_mode & 0o077:
            with contextlib.suppress(PermissionError):  # see `require_own`
                os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def _foreign_file(path: Path, step: str = "") -> UsageProblem:
    usual = f"look at it, then remove it, or name another folder with --backup-dir:\nls -l {quote(str(path))}"
    problem = f"{path} is a link, a device, a folder or another user's file: nothing is written through it"
    return UsageProblem(problem, next_step=step or usual)


class NotRegular(OSError):
    """A pipe, a device, a folder, or a file larger than expected: reading it may never end."""


def read_regular(path: Path, limit: int) -> tuple[bytes, os.stat_result]:
    """Return the content and the state of a regular file of at most `limit` bytes. Raises NotRegular, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            why = os.strerror(errno.EISDIR) if stat.S_ISDIR(state.st_mode) else "is not a regular file"
            raise NotRegular(errno.EINVAL, why)
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            data = stream.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise NotRegular(errno.EFBIG, f"is larger than {limit >> 10} KiB")
    return data, state


def readable_bytes(path: Path) -> bytes:
    """Return the content of a small file of the backup folder, which may have been copied from elsewhere.

    Raises UsageProblem if it is not a regular file, is too large, or cannot be opened by this user.
    """
    try:
        return read_regular(path, _LARGEST)[0]
    except NotRegular:
        raise UsageProblem(
            f"{path} was not written by these scripts: it is not a regular file, or too large for one",
            next_step="find out where it comes from, then move it out of the backup folder:\n"
            f"mv {quote(str(path))} /tmp/",
        ) from None
    except PermissionError as error:
        text = f"cannot write to the folder {path.parent}: {path.name}: {error.strerror}"
        raise UsageProblem(text, next_step=_another_folder(path.parent)) from error


def free_bytes(path: Path) -> int:
    """Return the bytes free for this user on the disk of `path`, or of its nearest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_room(folder: Path, need: int, what: str, or_else: str = "") -> None:
    """Raise MigrationError if fewer than `need` bytes are free for `what`, such as "the set needs"."""
    free = free_bytes(folder)
    if free < need:
        step = f"free some room there{or_else}:\ndf -h {quote(str(folder))}"
        raise MigrationError(f"{folder} has {free >> 20} MiB free, {what} {need >> 20} MiB", next_step=step)


def sync_dir(path: Path) -> None:
    """Make a rename in the folder `path` survive a power cut, if its file system can sync a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """Write a file (0600) as `<path>.partial`, renamed to `path` if the block succeeds, and removed if it fails."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)  # left by a killed run; it may be a link, or readable by others
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync_dir(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    with atomic_writer(path) as stream:
        stream.write(data)


class PassThrough:
    """A binary stream that counts its bytes, and hands each piece to every sink, such as `hashlib.sha256().update`."""

    def __init__(self, stream: IO[bytes], *sinks: Callable[[bytes], object]) -> None:
        self.size = 0
        self._stream = stream
        self._sinks = sinks

    def read(self, size: int = -1, /) -> bytes:
        """Read from the stream."""
        piece = self._stream.read(size)
        self._pass(piece)
        return piece

    def readinto(self, buffer: memoryview, /) -> int:
        """Read from the stream into `buffer`."""
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def write(self, piece: bytes, /) -> int:
        """Write to the stream."""
        self._pass(piece)
        return self._stream.write(piece)

    def _pass(self, piece: bytes) -> None:
        self.size += len(piece)
        for sink in self._sinks:
            sink(piece)


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _require_lock_folder(folder: Path) -> None:
    """Raise UsageProblem if another user could remove a held lock file: then two runs could hold the lock."""
    state = folder.resolve().lstat()
    if not stat.S_ISDIR(state.st_mode) or replaceable_by_others(state):
        raise UsageProblem(
            f"no lock in {folder} would hold: it belongs to uid {state.st_uid} with mode {state.st_mode & 0o7777:o},"
            " so others may remove what is in it",
            next_step=f"sudo chown root {quote(str(folder))} && sudo chmod 1777 {quote(str(folder))}",
        )


def _open_lock_file(path: Path) -> IO[bytes]:
    """Open or make the lock file so that every user of the machine can lock it. Raises UsageProblem for other files.

    In a sticky folder Linux refuses O_CREAT on another user's file (fs.protected_regular), so an existing file is
    opened without it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        os.fchmod(descriptor, 0o666)
    except FileExistsError:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise _bad_lock_file(path, str(error.strerror)) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _bad_lock_file(path, "it is not a regular file") from None
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UsageProblem(
            f"no lock can be made in {path.parent}: {error.strerror}. The runs on a machine hold locks there",
            next_step=f"make {path.parent} writable; if a container's file system is read-only, mount a tmpfs there",
        ) from error
    return os.fdopen(descriptor, "rb")


def _bad_lock_file(path: Path, why: str) -> UsageProblem:
    shown = quote(str(path))
    step = f"look at it, then remove it:\nls -l {shown}\nsudo rm -r {shown}"
    return UsageProblem(f"{path} cannot be locked ({why}): these scripts did not make it", next_step=step)


def _portalocker() -> ModuleType:
    """Import portalocker. It asks for the folder of temporary files: a full disk has none, and no lock needs it."""
    try:
        import portalocker
    except FileNotFoundError:
        tempfile.tempdir = "/tmp"  # noqa: S108 - nothing is written there
        try:
            import portalocker
        finally:
            tempfile.tempdir = None
    return portalocker


def _lock(stream: IO[bytes], path: Path, *, alone: bool = True) -> None:
    """Lock the file `path`. Raises portalocker's AlreadyLocked, and UsageProblem if its file system has no locks."""
    portalocker = _portalocker()
    kind = portalocker.LOCK_EX if alone else portalocker.LOCK_SH
    try:
        portalocker.lock(stream, kind | portalocker.LOCK_NB)
    except portalocker.AlreadyLocked:
        raise
    except portalocker.LockException as error:
        text = f"the file system of {path.parent} cannot lock files ({getattr(error.__cause__, 'strerror', error)})"
        step = f"use a folder on a local disk (--backup-dir names the backups'):\ndf -T {quote(str(path.parent))}"
        raise UsageProblem(text, next_step=step) from error


def _lock_file(path: Path) -> IO[bytes]:
    """Lock `path`. If a cleaner of /tmp removed it meanwhile, make it again. Raises like `_lock`."""
    while True:
        stream = _open_lock_file(path)
        try:
            _lock(stream, path)
            with contextlib.suppress(OSError):
                os.utime(path)  # cleaners remove old files
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                    return stream
        except BaseException:
            stream.close()
            raise
        stream.close()


def _holder_of(path: Path) -> str:
    """Return who holds a lock as its file says, in brackets; "" if it does not. Any user may write into the file."""
    try:
        text = path.read_bytes()[:_HOLDER_LENGTH].decode(errors="replace")
    except OSError:
        return ""
    return f" ({one_line(text)})" if text.strip() else ""


@contextlib.contextmanager
def lock_targets(
    names: Sequence[str],
    folder: Path = Path("/tmp"),  # noqa: S108 - shared on purpose
    *,
    kind: str = "",
    holder: str = "",
    wait: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold a lock on each of these targets (addresses with names) during the block; it ends with the process.

    Raises LockHeld if another run on this machine holds one, whatever its user and checkout. Locks of different `kind`
    do not exclude each other. `holder` (command, process, start) is reported to a run that finds the lock held.
    `wait` makes this one wait instead of raising LockHeld; it is called once, with a message.
    """
    portalocker = _portalocker()
    folder.mkdir(parents=True, exist_ok=True)
    _require_lock_folder(folder)
    with contextlib.ExitStack() as held:
        for name in sorted(set(names)):
            path = folder / f"automem-migration-{hashlib.sha256((kind + name).encode()).hexdigest()[:24]}.lock"
            waiting = False
            while True:
                try:
                    stream = held.enter_context(_lock_file(path))
                    break
                except portalocker.AlreadyLocked as error:
                    message = f"another run is working on {name}{_holder_of(path)}"
                    if wait is None:
                        raise LockHeld(message) from error
                if not waiting:
                    wait(f"{message}: waiting until it has ended")
                waiting = True
                time.sleep(_LOCK_POLL_SECONDS)
            with contextlib.suppress(OSError):  # the disk is full: --cleanup and --prune-spool must work nevertheless
                os.ftruncate(stream.fileno(), 0)
                os.pwrite(stream.fileno(), holder.encode(), 0)
        yield


class UsedFile:
    """Declares to other processes that a file is in use: by many at a time, or by one alone.

    `path` is a lock file for it, made if missing: a lock on the used file itself could undo those that SQLite holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        private_file(path)
        self._stream = os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "rb")
        try:
            self._lock(alone=False)
        except BaseException:
            self._stream.close()
            raise

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Use the file alone during the block. Raises LockHeld."""
        self._lock(alone=True)
        try:
            yield
        finally:
            self._lock(alone=False)

    def _lock(self, *, alone: bool) -> None:
        try:
            _lock(self._stream, self._path, alone=alone)
        except _portalocker().AlreadyLocked as error:
            raise LockHeld(f"another run uses {self._path.with_suffix('')} right now") from error

    def close(self) -> None:
        """Release the file."""
        self._stream.close()
