"""The deepest proof of a snapshot on this machine: its segments opened by Qdrant's own engine, counted and asked."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson

from lib.child_process import child_environment, limit_resources
from lib.clients.qdrant.points import PointId
from lib.clients.qdrant.snapshot_format import BLOCK, ByteStream, Section, Sparse
from lib.errors import BackupDamaged, MigrationError
from lib.files import FULL_DISK

# Segments over RocksDB (Qdrant up to about 1.15) are what the engine cannot read; seen with 1.11.3.
_FOREIGN = ("unknown variant", "rocksdb", "RocksDB", "Failed to deserialize")
_FULL = "No space left"
_ENGINE = Path(__file__).with_name("segment_engine.py")
_STEP = "use another backup"
# Far above what the engine needs for whole segments: preallocated files, payloads and indexes in memory.
_MAPPED, _PREALLOCATED, _CPU_SECONDS, _BYTES_A_SECOND = 8, 512 << 20, 600, 1 << 20


class EngineKilled(MigrationError):
    """The engine's process was killed by the system, which says nothing about the segments."""


class Segments:
    """The shards of a snapshot, opened by the engine in a process of its own; `counts` is the points in each."""

    def __init__(self, ask: Callable[[dict[str, Any]], Any], counts: Mapping[int, int]) -> None:
        self.counts = dict(counts)
        self._ask = ask

    @property
    def count(self) -> int:
        """The number of points."""
        return sum(self.counts.values())

    def held(self, ids: Sequence[PointId]) -> set[PointId]:
        """Which of these ids are points of it. Raises BackupDamaged where one is no id at all."""
        try:
            return set(self._ask({"held": list(ids)}))
        except _EngineError as error:
            raise BackupDamaged(f"an id that the engine refuses: {error}", next_step=_STEP) from None


class _EngineError(Exception):
    """What the engine said."""


class SegmentFiles:
    """A snapshot's segments, put aside below `folder` while `inspect_snapshot` reads them: an archive per shard.

    The engine unpacks them beside that: room is needed for the segments twice. `full`: there was too little.
    """

    def __init__(self, folder: Path) -> None:
        self.full = False
        self.folder = folder
        self._archives: dict[int, _ShardArchive] = {}

    @property
    def segments(self) -> int:
        """How many segments were put aside."""
        return sum(archive.segments for archive in self._archives.values())

    def keep(self, shard: int, content: Section | Sparse) -> ByteStream:
        """`content` again; what is read of it goes into the shard's archive."""
        try:
            if shard not in self._archives:
                self._archives[shard] = _ShardArchive(self.folder / f"{shard}.tar")
            self._archives[shard].begin(content.size or 0)
        except OSError as error:
            self._note(error)
        return _Copied(content, self._archives.get(shard), self._note)

    def finished(self) -> dict[int, Path]:
        """The archives by their shards. Raises OSError where the room was too little."""
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder))
        for archive in self._archives.values():
            archive.end()
        return {shard: archive.path for shard, archive in self._archives.items()}

    def _note(self, error: OSError) -> None:
        if error.errno not in FULL_DISK:
            raise error
        self.full = True


class _ShardArchive:
    """A tar of segments under names made here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self.segments = self._padding = 0

    def begin(self, size: int) -> None:
        """The next segment, of exactly `size` bytes."""
        info = tarfile.TarInfo(f"segments/00000000-0000-4000-8000-{self.segments:012x}.tar")
        info.size = size
        self._file.write(bytes(self._padding) + info.tobuf(tarfile.GNU_FORMAT))
        self.segments += 1
        self._padding = -size % BLOCK

    def write(self, piece: bytes) -> None:
        """More bytes of it."""
        self._file.write(piece)

    def end(self) -> None:
        """Close the file."""
        self._file.write(bytes(self._padding + 2 * BLOCK))
        self._file.close()


class _Copied:
    """A stream whose bytes also go into an archive, as long as that takes them."""

    def __init__(
        self, content: ByteStream, archive: _ShardArchive | None, failed: Callable[[OSError], None]
    ) -> None:
        self._content, self._archive, self._failed = content, archive, failed

    def read(self, size: int, /) -> bytes:
        """Like `Section.read`."""
        piece = self._content.read(size)
        if self._archive:
            try:
                self._archive.write(piece)
            except OSError as error:
                self._archive = None
                self._failed(error)
        return piece


def engine_here() -> bool:
    """Whether `qdrant-edge-py` is installed."""
    return find_spec("qdrant_edge") is not None


@contextmanager
def opened_segments(files: SegmentFiles) -> Iterator[Segments | None]:
    """The segments of a snapshot that `inspect_snapshot` found whole, open inside the block.

    None where the engine cannot read the segments' format. Raises BackupDamaged, EngineKilled, and OSError where the
    room is too little.
    """
    paths = files.finished()
    archives = {str(shard): str(path) for shard, path in paths.items()}
    with _engine(sum(path.stat().st_size for path in paths.values()), files.segments) as ask:
        try:
            counts = ask({"open": archives})
        except _EngineError as error:
            if _FULL in str(error):
                raise OSError(errno.ENOSPC, "No space left on device", str(files.folder)) from None
            if not any(sign in str(error) for sign in _FOREIGN):
                raise BackupDamaged(
                    f"the engine cannot open the snapshot's segments: {error}", next_step=_STEP
                ) from None
            counts = None
        yield None if counts is None else Segments(ask, {int(shard): n for shard, n in counts.items()})


@contextmanager
def _engine(size: int, segments: int) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """Ask the engine, which opens segments of `size` bytes; its process ends with the block, and with this one."""
    with subprocess.Popen(
        [sys.executable, str(_ENGINE), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(),
        start_new_session=True,  # a Ctrl-C is for the command, which then ends this
    ) as child:
        mapped = _MAPPED * size + segments * _PREALLOCATED
        limit_resources(child.pid, mapped=mapped, cpu_seconds=_CPU_SECONDS + size // _BYTES_A_SECOND)

        def ask(question: dict[str, Any]) -> Any:
            assert child.stdin is not None
            assert child.stdout is not None
            with suppress(BrokenPipeError):
                child.stdin.write(orjson.dumps(question) + b"\n")
                child.stdin.flush()
            line = child.stdout.readline()
            if not line.endswith(b"\n"):
                raise _ended(child.wait())
            told = orjson.loads(line)
            if "error" in told:
                raise _EngineError(told["error"])
            return told["answer"]

        try:
            yield ask
        finally:
            child.kill()


def _ended(code: int) -> MigrationError:
    if code == -signal.SIGKILL:
        return EngineKilled("Qdrant's engine was killed while it opened the segments: memory may be short")
    if code == -signal.SIGXCPU:
        return BackupDamaged("the segments keep Qdrant's engine busy without end", next_step=_STEP)
    return BackupDamaged(f"the segments crash Qdrant's engine (exit {code})", next_step=_STEP)
