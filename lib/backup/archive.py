"""`qdrant_snapshot_*.tar.gz`: the server's own snapshots, the raw configuration and the expected ids."""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import orjson

from lib.concurrency import BackgroundWriter
from lib.errors import BackupDamaged, BadFile
from lib.files import atomic_writer

_CHUNK = 1 << 20
SnapshotReader = Callable[[IO[bytes]], object]


@dataclass(frozen=True)
class SnapshotMember:
    """A snapshot as a server made it: its name, bytes, and sha256 in hex."""

    name: str
    size: int
    sha256: str


def expected_snapshots(facts: Mapping[str, Any]) -> tuple[SnapshotMember, ...]:
    """The snapshots that a `collection.json` promises, in their order. Raises ValueError where it is not whole."""
    try:
        return tuple(
            SnapshotMember(str(one["snapshot_name"]), int(one["snapshot_size"]), str(one["snapshot_sha256"]))
            for one in facts.get("nodes") or [facts]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{error} of a snapshot") from error


def together(snapshots: Sequence[SnapshotMember]) -> SnapshotMember:
    """What stands for all of them: itself, or without a name the sum of bytes and a sha256 over their sha256s."""
    if len(snapshots) == 1:
        return snapshots[0]
    digests = "".join(one.sha256 for one in snapshots)
    return SnapshotMember(
        "", sum(one.size for one in snapshots), hashlib.sha256(digests.encode()).hexdigest()
    )


@dataclass(frozen=True)
class ArchiveFacts:
    """What an archive says of itself: `collection.json`, and each snapshot's name, bytes and sha256 as read."""

    facts: dict[str, Any]
    snapshots: tuple[SnapshotMember, ...]
    ids: int

    @property
    def snapshot_name(self) -> str:
        """The snapshot's name; empty where there are several."""
        return together(self.snapshots).name

    @property
    def snapshot_size(self) -> int:
        """Bytes of all snapshots."""
        return together(self.snapshots).size

    @property
    def snapshot_sha256(self) -> str:
        """The snapshot's sha256, or one over those of several (see `together`)."""
        return together(self.snapshots).sha256


class _HashingReader:
    """A readable that hashes what passes and can be drained to its end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        while self.read(_CHUNK):
            pass


def read_snapshot(name: str, stream: IO[bytes], on_snapshot: SnapshotReader | None) -> SnapshotMember:
    """Read a snapshot to its end; `on_snapshot` sees its bytes first."""
    reader = _HashingReader(stream)
    if on_snapshot:
        on_snapshot(cast("IO[bytes]", reader))
    reader.drain()
    return SnapshotMember(name, reader.size, reader.sha256.hexdigest())


FACTS, SNAPSHOT, IDS = "collection.json", "snapshot/", "ids.txt"
_BLOCK = 512
_FACTS_LIMIT = 64 << 20
_LINE_LIMIT = 128  # an id is a UUID or a number
_NAME_LIMIT = 64 << 10
_EXTENDED = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
_PROMISES = {"collection", "config", "snapshot_size", "snapshot_sha256", "promised_ids"}
_ANOTHER = "use another backup:  python scripts/backup_automem.py --list"


class _HashingFile:
    """A file that counts and hashes what is written through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()


class ArchiveWriter:
    """Writes tar members whose bytes arrive by push: `begin`, `write` ..., `end`."""

    def __init__(self, stream: IO[bytes]) -> None:
        from lib.backup.gzip_blocks import GzipBlocks

        self._out = _HashingFile(stream)
        self._gzip = GzipBlocks(cast("IO[bytes]", self._out))
        self._background = BackgroundWriter(self._gzip.write)
        self._left = self._size = 0

    def begin(self, name: str, size: int) -> None:
        """Start a member of exactly `size` bytes."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o600
        self._left = self._size = size
        self._background.write(info.tobuf(format=tarfile.PAX_FORMAT))

    def write(self, data: bytes) -> None:
        """More bytes of the member."""
        self._left -= len(data)
        if self._left < 0:
            raise BackupDamaged("the server sent more bytes of the snapshot than it announced")
        self._background.write(data)

    def end(self) -> None:
        """The member is whole; raises BackupDamaged where bytes are missing."""
        if self._left:
            raise BackupDamaged(f"the server sent {self._left} bytes of the snapshot too few")
        self._background.write(b"\0" * (-self._size % _BLOCK))

    def add(self, name: str, stream: IO[bytes], size: int) -> None:
        """A whole member from a file."""
        self.begin(name, size)
        while chunk := stream.read(_CHUNK):
            self.write(chunk)
        self.end()

    def finish(self) -> tuple[int, str]:
        """Close the archive; its size in bytes and its sha256 in hex."""
        self._background.write(b"\0" * (2 * _BLOCK))
        self._background.finish()
        self._gzip.close()
        return self._out.size, self._out.sha256.hexdigest()

    def close(self) -> None:
        """End what an error left undone; after `finish` there is nothing."""
        self._background.close()


@contextmanager
def archive_writer(path: Path) -> Iterator[ArchiveWriter]:
    """An archive that appears under `path` only when it is whole."""
    with atomic_writer(path) as stream, contextlib.closing(ArchiveWriter(stream)) as writer:
        yield writer


class _BoundedHeader(tarfile.TarInfo):
    """A header whose extension (a long name, PAX fields) is refused if it is larger than any of a backup.

    tarfile reads an extension whole into memory: one of 3 GB deflates to less than 2 MB.
    """

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > _NAME_LIMIT:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tarfile_)  # type: ignore[misc,no-any-return]  # not in the stubs


IdsReader = Callable[[Iterator[str]], object]


def _damage() -> tuple[type[Exception], ...]:
    """What reading a damaged gzip or tar raises."""
    from isal import igzip, isal_zlib

    return EOFError, tarfile.TarError, igzip.BadGzipFile, cast("type[Exception]", isal_zlib.IsalError)


def _opened(plain: object) -> tarfile.TarFile:
    return tarfile.open(fileobj=cast("IO[bytes]", plain), mode="r|", bufsize=_CHUNK, tarinfo=_BoundedHeader)


@contextmanager
def _members(path: Path) -> Iterator[tarfile.TarFile]:
    from isal import igzip_threaded  # inflates the next piece while this one is used

    try:
        with (
            igzip_threaded.open(path, "rb") as plain,
            _opened(plain) as tar,
        ):
            yield tar
            while plain.read(_CHUNK):  # the gzip trailer holds its own checksum
                pass
    except _damage() as error:
        raise BackupDamaged(f"{path} is damaged: {error}", next_step=_ANOTHER) from error


def read_archive(
    path: Path,
    on_snapshot: SnapshotReader | None = None,
    on_ids: IdsReader | None = None,
    *,
    only: str | None = None,
) -> ArchiveFacts:
    """Read an archive to its end; the callbacks see each snapshot's bytes and the ids as they pass.

    `only` names the one snapshot that `on_snapshot` is to see.

    Raises BackupDamaged where a member is missing, cut, foreign, or not as `collection.json` promises.
    """
    facts: dict[str, Any] | None = None
    found: list[SnapshotMember] = []
    ids = -1
    with _members(path) as tar:
        for member in tar:
            # A sparse member could claim any size without holding it; ours never are.
            stream = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if stream is None:
                raise BackupDamaged(f"{path} holds a member that no backup has: {member.name!r}")
            if member.name == FACTS and facts is None and member.size < _FACTS_LIMIT:
                facts = _read_facts(path, stream)
            elif member.name.startswith(SNAPSHOT) and ids < 0 and len(found) < _snapshots_of(facts):
                name = member.name.removeprefix(SNAPSHOT)
                found.append(read_snapshot(name, stream, on_snapshot if only in {None, name} else None))
            elif member.name == IDS and found and ids < 0:
                assert facts is not None  # there is no snapshot before it
                ids = _read_ids(path, stream, on_ids, facts["promised_ids"])
            else:
                raise BackupDamaged(f"{path} holds a member that no backup has: {member.name!r}")
    if facts is None or len(found) < _snapshots_of(facts) or ids < 0:
        raise BackupDamaged(f"{path} is not whole: collection.json, a snapshot or ids.txt is missing")
    return ArchiveFacts(facts, tuple(found), ids)


def _snapshots_of(facts: dict[str, Any] | None) -> int:
    """How many snapshots the archive must hold; none may come before `collection.json`."""
    return 0 if facts is None else len(facts.get("nodes") or "1")


def _read_facts(path: Path, stream: IO[bytes]) -> dict[str, Any]:
    try:
        facts = orjson.loads(stream.read())
    except ValueError as error:
        raise BackupDamaged(f"{path}: its {FACTS} cannot be read: {error}") from error
    if not isinstance(facts, dict) or not facts.keys() >= _PROMISES:
        raise _foreign(path)
    if not isinstance(facts.get("nodes", []), list) or not _are_plain(facts):
        raise BackupDamaged(f"{path}: its {FACTS} is not whole")
    return facts


def _are_plain(facts: dict[str, Any]) -> bool:
    """Whether what messages and commands show of it are a number, and words that move nothing."""
    server = facts.get("server") or {}
    words = [
        facts["collection"],
        facts.get("model") or "",
        *(server.values() if isinstance(server, dict) else [1]),
    ]
    return type(facts["promised_ids"]) is int and all(
        isinstance(one, str) and one.isprintable() for one in words
    )


def _foreign(path: Path) -> BadFile:
    return BadFile(f"{path} is a tar.gz, but not one that backup_automem.py wrote", next_step=_ANOTHER)


def _read_ids(path: Path, stream: IO[bytes], on_ids: IdsReader | None, expected: object) -> int:
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        while line := stream.readline(_LINE_LIMIT):
            count += 1
            if not line.strip().isascii() or len(line) == _LINE_LIMIT:
                raise BackupDamaged(f"{path}: line {count} of its {IDS} is no id")
            if isinstance(expected, int) and count > expected:
                raise BackupDamaged(
                    f"{path}: its {IDS} has more than the {expected} ids that its {FACTS} says"
                )
            yield line.decode("ascii").strip()

    walk = lines()
    if on_ids:
        on_ids(walk)
    for _ in walk:
        pass
    return count


def peek_facts(path: Path) -> dict[str, Any]:
    """`collection.json` alone, the first member.

    Raises BackupDamaged where the file cannot be read so far, BadFile where it is another's tar.gz.
    """
    from isal import igzip

    try:
        with (
            igzip.open(path, "rb") as plain,
            _opened(plain) as tar,
        ):
            member = tar.next()
            stream = tar.extractfile(member) if member and member.name == FACTS and member.isreg() else None
            if stream is not None and member is not None and member.size < _FACTS_LIMIT:
                return _read_facts(path, stream)
    except _damage() as error:
        raise BackupDamaged(f"{path} is damaged: {error}", next_step=_ANOTHER) from error
    raise _foreign(path)
