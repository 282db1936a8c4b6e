"""`qdrant_snapshot_*.tar.gz`: the server's own snapshots, the raw configuration and the expected ids.

It is written as gzip members of about a megabyte, each deflated or stored: vectors hardly shrink by deflate, and
storing them is as fast as the transfer.
"""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import orjson

from lib.concurrency import BackgroundWriter
from lib.errors import BackupDamaged, BadFile, one_line
from lib.files import PassThrough, atomic_writer

FACTS, SNAPSHOT, IDS = "collection.json", "snapshot/", "ids.txt"
_CHUNK = 1 << 20
_FACTS_LIMIT, _NAME_LIMIT = 64 << 20, 64 << 10
_LINE_LIMIT = 128  # an id is a UUID or a number
_AGAIN = "run the backup again"
_EXTENDED = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE}
_EXTENDED.add(tarfile.SOLARIS_XHDTYPE)
_REQUIRED = {"collection", "config", "snapshot_size", "snapshot_sha256", "promised_ids"}

SnapshotReader = Callable[[IO[bytes]], object]
IdsReader = Callable[[Iterator[str]], object]
BLOCK_BYTES, _TRIED_BYTES = 1 << 20, 1 << 16
_LEVEL, _WORTH = 1, 0.85  # deflate brings random floats to 0.92, and takes four times as long as storing them
_PADDING_BYTES = 1024  # the end of a tar; it needs no separate gzip member
_GZIP = 31  # zlib's name for a gzip header and trailer around the deflated bytes


@dataclass(frozen=True)
class SnapshotMember:
    """A snapshot as a server made it: its name, bytes, and sha256 in hex."""

    name: str
    size: int
    sha256: str


def combined(snapshots: Sequence[SnapshotMember]) -> SnapshotMember:
    """The only snapshot; of several the sum of bytes and a sha256 over their sha256s, without a name."""
    if len(snapshots) == 1:
        return snapshots[0]
    digests = "".join(one.sha256 for one in snapshots)
    return SnapshotMember("", sum(one.size for one in snapshots), hashlib.sha256(digests.encode()).hexdigest())


@dataclass(frozen=True)
class ArchiveFacts:
    """What was read: `collection.json`, the snapshots, the number of ids; `sha256` of an archive's whole file."""

    facts: dict[str, Any]
    snapshots: tuple[SnapshotMember, ...]
    ids: int
    sha256: str = field(default="", compare=False)

    @property
    def snapshot(self) -> SnapshotMember:
        """All snapshots as one, see `combined`."""
        return combined(self.snapshots)


class _Snapshot(msgspec.Struct):
    snapshot_name: str
    snapshot_size: int
    snapshot_sha256: str


class _Server(msgspec.Struct):
    version: str
    address: str = ""


class _Params(msgspec.Struct):
    vectors: dict[str, Any]


class _Config(msgspec.Struct):
    params: _Params


class _Facts(_Snapshot, kw_only=True):
    """What is read of `collection.json`. `nodes` has an entry for each snapshot if there are several."""

    collection: str
    server: _Server
    config: _Config
    aliases: list[str]
    model: str
    promised_ids: int
    provider: str = ""
    payload_schema: dict[str, Any] = {}
    nodes: list[_Snapshot] = []


class GzipBlocks:
    """Writes a gzip file of several members (RFC 1952, 2.2), each of at least a megabyte; any gunzip reads them as one.

    The last member is never only padding, so that a file which is cut at the end of a member lacks data.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._out, self._size = out, 0
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Add bytes."""
        if self._size >= BLOCK_BYTES and len(data) > _PADDING_BYTES:
            self.close()
        self._held.append(data)
        self._size += len(data)

    def close(self) -> None:
        """Write what is held as a member; the underlying file stays open."""
        self._out.write(packed(b"".join(self._held)))
        self._held, self._size = [], 0


def packed(block: bytes) -> bytes:
    """One gzip member: deflated if a sample of the block shrinks enough, else stored."""
    from isal import igzip, isal_zlib

    sample = block[:_TRIED_BYTES]
    if len(isal_zlib.compress(sample, _LEVEL)) <= _WORTH * len(sample):
        return bytes(igzip.compress(block, _LEVEL))
    store = zlib.compressobj(0, wbits=_GZIP)
    return store.compress(block) + store.flush()


class ArchiveWriter:
    """Writes tar members whose bytes arrive by push: `begin`, `write` ..., `end`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._digest = hashlib.sha256()
        self._out = PassThrough(stream, self._digest.update)
        self._gzip = GzipBlocks(cast("IO[bytes]", self._out))
        self._background = BackgroundWriter(self._gzip.write)
        self._left = self._size = 0

    def begin(self, name: str, size: int) -> None:
        """Start a member of exactly `size` bytes."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o600
        self._left = self._size = size
        self._background.write(info.tobuf(tarfile.PAX_FORMAT))

    def write(self, data: bytes) -> None:
        """Add bytes to the member. Raises BackupDamaged if there are more than announced."""
        self._left -= len(data)
        if self._left < 0:
            raise BackupDamaged("the server sent more bytes of the snapshot than it announced", next_step=_AGAIN)
        self._background.write(data)

    def end(self) -> None:
        """End the member. Raises BackupDamaged if bytes are missing."""
        if self._left:
            raise BackupDamaged(f"the server sent {self._left} bytes of the snapshot too few", next_step=_AGAIN)
        self._background.write(b"\0" * (-self._size % tarfile.BLOCKSIZE))

    def add(self, name: str, stream: IO[bytes], size: int) -> None:
        """Add a whole member from a stream of exactly `size` bytes."""
        self.begin(name, size)
        while chunk := stream.read(_CHUNK):
            self.write(chunk)
        self.end()

    def finish(self) -> tuple[int, str]:
        """End the archive; returns its size in bytes and its sha256 in hex."""
        self._background.write(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._background.finish()
        self._gzip.close()
        return self._out.size, self._digest.hexdigest()

    def close(self) -> None:
        """Stop the background thread if an error left it running."""
        self._background.close()


@contextmanager
def archive_writer(path: Path) -> Iterator[ArchiveWriter]:
    """Write an archive that appears under `path` only when it is complete."""
    with atomic_writer(path) as stream, contextlib.closing(ArchiveWriter(stream)) as writer:
        yield writer


class _BoundedHeader(tarfile.TarInfo):
    """Refuses extensions (a long name, PAX fields) larger than any in a backup: tarfile reads them into memory."""

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > _NAME_LIMIT:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tarfile_)  # type: ignore[misc,no-any-return]  # not in the stubs


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Raise BackupDamaged if the gzip or the tar that the block reads is damaged."""
    from isal import igzip, isal_zlib

    try:
        yield
    except (EOFError, tarfile.TarError, igzip.BadGzipFile, cast("type[Exception]", isal_zlib.IsalError)) as error:
        raise BackupDamaged(f"{path} is damaged: {error}") from error


@contextmanager
def opened_tar(path: Path, *, to_end: bool) -> Iterator[tuple[tarfile.TarFile, Callable[[], str]]]:
    """Open the tar, and a function that returns the sha256 of the file after it was read `to_end`."""
    from isal import igzip_threaded

    digest = hashlib.sha256()
    with (
        damage_reported(path),
        path.open("rb") as file,
        # Inflates the next piece, and hashes the file, while this one is used.
        igzip_threaded.open(PassThrough(file, digest.update), "rb") as plain,
        tarfile.open(fileobj=plain, mode="r|", bufsize=_CHUNK, tarinfo=_BoundedHeader) as tar,
    ):
        yield tar, digest.hexdigest
        while to_end and plain.read(_CHUNK):  # the gzip trailer holds its own checksum
            pass


def read_snapshot(name: str, stream: IO[bytes], on_snapshot: SnapshotReader | None) -> SnapshotMember:
    """Read a snapshot to its end; `on_snapshot` gets the stream first."""
    digest = hashlib.sha256()
    reader = PassThrough(stream, digest.update)
    if on_snapshot:
        on_snapshot(cast("IO[bytes]", reader))
    while reader.read(_CHUNK):
        pass
    return SnapshotMember(name, reader.size, digest.hexdigest())


def read_archive(
    path: Path, on_snapshot: SnapshotReader | None = None, on_ids: IdsReader | None = None, *, only: str | None = None
) -> ArchiveFacts:
    """Read an archive to its end; the callbacks get the stream of each snapshot (or of `only` this one), and the ids.

    Raises BackupDamaged if a member is missing, cut or foreign, or if there are more snapshots or ids than
    `collection.json` says.
    """
    facts: dict[str, Any] = {}
    expected = 0  # snapshots; none may come before `collection.json`
    found: list[SnapshotMember] = []
    ids = -1
    with opened_tar(path, to_end=True) as (tar, sha256):
        for member in tar:
            # A sparse member could claim any size without holding it; ours never are.
            stream = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if stream and member.name == FACTS and not facts and member.size < _FACTS_LIMIT:
                facts = _read_facts(path, stream)
                expected = len(facts.get("nodes") or "1")
            elif stream and member.name.startswith(SNAPSHOT) and ids < 0 and len(found) < expected:
                name = member.name.removeprefix(SNAPSHOT)
                found.append(read_snapshot(name, stream, on_snapshot if only in {None, name} else None))
            elif stream and member.name == IDS and found and ids < 0:
                ids = _read_ids(path, stream, on_ids, facts["promised_ids"])
            else:
                raise BackupDamaged(f"{path} holds a member that no backup has: {member.name!r}")
    if not facts or len(found) < expected or ids < 0:
        raise BackupDamaged(f"{path} is incomplete: collection.json, a snapshot or ids.txt is missing")
    return ArchiveFacts(facts, tuple(found), ids, sha256())


def peek_facts(path: Path) -> dict[str, Any]:
    """Read `collection.json` alone, the first member. Raises BackupDamaged, BadFile for another program's tar.gz."""
    with opened_tar(path, to_end=False) as (tar, _):
        member = tar.next()
        if member and member.name == FACTS and member.isreg() and member.size < _FACTS_LIMIT:
            return _read_facts(path, cast("IO[bytes]", tar.extractfile(member)))
        raise _foreign(path)


def _foreign(path: Path) -> BadFile:
    return BadFile(f"{path} is a tar.gz, but not one that backup_automem.py wrote")


def _read_facts(path: Path, stream: IO[bytes]) -> dict[str, Any]:
    try:
        facts = orjson.loads(stream.read())
    except ValueError as error:
        raise BackupDamaged(f"{path}: its {FACTS} cannot be read: {error}") from error
    if not isinstance(facts, dict) or not facts.keys() >= _REQUIRED:
        raise _foreign(path)
    try:
        known = msgspec.convert(facts, _Facts)
    except msgspec.ValidationError as error:
        raise BackupDamaged(f"{path}: its {FACTS} is incomplete: {one_line(str(error))}") from error
    # Messages and commands show these.
    if not f"{known.collection}{known.model}{known.provider}{known.server.version}{known.server.address}".isprintable():
        raise BackupDamaged(f"{path}: its {FACTS} is incomplete: a name has characters that cannot be printed")
    return facts


def _read_ids(path: Path, stream: IO[bytes], on_ids: IdsReader | None, expected: int) -> int:
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        while line := stream.readline(_LINE_LIMIT):
            count += 1
            if not line.strip().isascii() or len(line) == _LINE_LIMIT:
                raise BackupDamaged(f"{path}: line {count} of its {IDS} is no id")
            if count > expected:
                raise BackupDamaged(f"{path}: its {IDS} has more than the {expected} ids that its {FACTS} says")
            yield line.decode("ascii").strip()

    ids = lines()
    if on_ids:
        on_ids(ids)
    deque(ids, maxlen=0)
    return count
