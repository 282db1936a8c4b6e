"""Open a snapshot's segments with Qdrant's own engine, on this machine: count their points, look up ids.

The engine runs in a process of this module: it maps the segments outside the caller's memory, and a file that crashes
it does not crash the caller.
"""

from __future__ import annotations

import errno
import signal
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from lib.child_process import Ask, ChildError, answer_questions, answering_module
from lib.clients.qdrant.snapshot_format import BLOCK, ByteStream, Section, Sparse
from lib.errors import BackupDamaged, MigrationError
from lib.files import FULL_DISK, PassThrough

if TYPE_CHECKING:
    from lib.clients.qdrant.points import PointId

# The engine cannot read segments over RocksDB (Qdrant up to about 1.15); seen with 1.11.3.
_UNKNOWN_FORMAT = ("unknown variant", "rocksdb", "RocksDB", "Failed to deserialize")
_ENGINE = "lib.clients.qdrant.segments"
# Far above what the engine needs for intact segments: preallocated files, payloads and indexes in memory.
_MAPPED, _PREALLOCATED, _CPU_SECONDS, _BYTES_PER_SECOND = 8, 512 << 20, 600, 1 << 20


class EngineKilled(MigrationError):
    """The system killed the engine's process. That says nothing about the segments."""

    usual_step = "free some memory, then run the same command again"


class Segments:
    """The opened segments of a snapshot; `counts` is the number of points in each shard, `count` that in all."""

    def __init__(self, ask: Ask, counts: dict[int, int]) -> None:
        self.counts, self.count = counts, sum(counts.values())
        self._ask = ask

    def held(self, ids: Sequence[PointId]) -> set[PointId]:
        """Those of `ids` that are points of the snapshot. Raises BackupDamaged if one is not a valid id."""
        try:
            return set(self._ask({"held": list(ids)}))
        except ChildError as error:
            raise BackupDamaged(f"an id that the engine refuses: {error}") from None


class SegmentFiles:
    """Copies of a snapshot's segments below `folder`, made while `inspect_snapshot` reads it: a tar per shard.

    The engine unpacks them into `folder`, so that twice their size is needed. `full`: the disk was full.
    """

    def __init__(self, folder: Path) -> None:
        self.full = False
        self.segments = 0
        self.folder = folder
        self._files: dict[int, IO[bytes]] = {}

    def save(self, shard: int, content: Section | Sparse) -> ByteStream:
        """Return a stream of `content`; what is read from it is copied to the shard's tar."""
        # The names in the tar are not the snapshot's, which could lead elsewhere.
        info = tarfile.TarInfo(f"segments/00000000-0000-4000-8000-{self.segments:012x}.tar")
        info.size = content.size or 0
        self.segments += 1
        self._write(shard, info.tobuf(tarfile.GNU_FORMAT), begins_block=True)
        return PassThrough(cast("IO[bytes]", content), partial(self._write, shard))

    def close(self) -> None:
        """Complete and close the tars, also of a snapshot that turned out to be damaged."""
        for file in self._files.values():
            with self._noting_full_disk(), file:
                file.write(bytes(-file.tell() % BLOCK + 2 * BLOCK))

    def archives(self) -> dict[str, Path]:
        """Return the tars by shard, once they are closed."""
        return {str(shard): Path(file.name).absolute() for shard, file in self._files.items()}

    def _write(self, shard: int, data: bytes, *, begins_block: bool = False) -> None:
        if self.full:
            return
        with self._noting_full_disk():
            if shard not in self._files:
                self._files[shard] = (self.folder / f"{shard}.tar").open("wb")
            file = self._files[shard]
            file.write(bytes(-file.tell() % BLOCK) + data if begins_block else data)

    @contextmanager
    def _noting_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self.full = True


def has_engine() -> bool:
    """Whether `qdrant-edge-py` is installed."""
    return find_spec("qdrant_edge") is not None


@contextmanager
def opened_segments(files: SegmentFiles) -> Iterator[Segments | None]:
    """Open the segments of an accepted snapshot, copied in full. Yields None if the engine cannot read their format.

    Raises BackupDamaged, EngineKilled, and OSError if the disk is full.
    """
    archives = files.archives()
    size = sum(path.stat().st_size for path in archives.values())
    mapped, cpu_seconds = _MAPPED * size + files.segments * _PREALLOCATED, _CPU_SECONDS + size // _BYTES_PER_SECOND
    with answering_module(_ENGINE, _ended, mapped=mapped, cpu_seconds=cpu_seconds) as ask:
        try:
            counts = ask({"open": {shard: str(path) for shard, path in archives.items()}})
            segments = Segments(ask, {int(shard): points for shard, points in counts.items()})
        except ChildError as error:
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device", str(files.folder)) from None
            if not any(sign in str(error) for sign in _UNKNOWN_FORMAT):
                raise BackupDamaged(f"the engine cannot open the snapshot's segments: {error}") from None
            segments = None
        yield segments


def _ended(code: int) -> MigrationError:
    if code == -signal.SIGKILL:
        return EngineKilled("Qdrant's engine was killed while it opened the segments: memory may be short")
    if code == -signal.SIGXCPU:
        return BackupDamaged("the segments exceed the CPU time limit of Qdrant's engine")
    return BackupDamaged(f"the segments crash Qdrant's engine (exit {code})")


# --- the engine's process


def _answer(shards: dict[str, Any], question: dict[str, Any]) -> object:
    """`open` unpacks archives into their folder, opens them and returns the points of each; `held` looks up ids."""
    from qdrant_edge import CountRequest, EdgeShard

    if "open" in question:
        for number, archive in question["open"].items():
            target = archive.removesuffix(".tar")
            EdgeShard.unpack_snapshot(archive, target)
            shards[number] = EdgeShard.load(target)
        return {number: int(shard.count(CountRequest(exact=True))) for number, shard in shards.items()}
    found: set[int | str] = set()
    for shard in shards.values():
        records = shard.retrieve(question["held"], with_payload=False, with_vector=False)
        found.update(record.id if isinstance(record.id, int) else str(record.id) for record in records)
    return list(found)


if __name__ == "__main__":
    opened: dict[str, Any] = {}
    answer_questions(partial(_answer, opened))
    for one in opened.values():
        one.close()
