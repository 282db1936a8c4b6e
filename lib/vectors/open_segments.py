"""The deepest proof of a snapshot on this machine: its segments opened by Qdrant's own engine, counted and asked."""

from __future__ import annotations

import errno
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib.errors import BackupDamaged
from lib.files import FULL_DISK
from lib.vectors.points import PointId
from lib.vectors.tar_stream import BLOCK, ByteStream, Section, Sparse

# Segments over RocksDB (Qdrant up to about 1.15) are what the engine cannot read; seen with 1.11.3.
_FOREIGN = ("unknown variant", "rocksdb", "RocksDB", "Failed to deserialize")
_FULL = "No space left"
_STEP = "use another backup"


class Segments:
    """The shards of a snapshot by their numbers, as the engine opened them."""

    def __init__(self, shards: Mapping[int, Any]) -> None:
        self._shards = shards

    @property
    def counts(self) -> dict[int, int]:
        """The number of points in each shard."""
        from qdrant_edge import CountRequest

        return {number: int(shard.count(CountRequest(exact=True))) for number, shard in self._shards.items()}

    @property
    def count(self) -> int:
        """The number of points."""
        return sum(self.counts.values())

    def held(self, ids: Sequence[PointId]) -> set[PointId]:
        """Which of these ids are points of it. Raises BackupDamaged where one is no id at all."""
        found: set[PointId] = set()
        for shard in self._shards.values():
            try:
                records = shard.retrieve(list(ids), with_payload=False, with_vector=False)
            except Exception as error:  # noqa: BLE001 - the engine raises nothing finer
                raise BackupDamaged(f"an id that the engine refuses: {error}", next_step=_STEP) from None
            found.update(record.id if isinstance(record.id, int) else str(record.id) for record in records)
        return found


class SegmentFiles:
    """A snapshot's segments, put aside below `folder` while `inspect_snapshot` reads them: an archive per shard.

    The engine unpacks them beside that: room is needed for the segments twice. `full`: there was too little.
    """

    def __init__(self, folder: Path) -> None:
        self.full = False
        self._folder = folder
        self._archives: dict[int, _ShardArchive] = {}

    def keep(self, shard: int, content: Section | Sparse) -> ByteStream:
        """`content` again; what is read of it goes into the shard's archive."""
        try:
            if shard not in self._archives:
                self._archives[shard] = _ShardArchive(self._folder / f"{shard}.tar")
            self._archives[shard].begin(content.size or 0)
        except OSError as error:
            self._note(error)
        return _Copied(content, self._archives.get(shard), self._note)

    def finished(self) -> dict[int, Path]:
        """The archives by their shards. Raises OSError where the room was too little."""
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device", str(self._folder))
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
        self._number = self._padding = 0

    def begin(self, size: int) -> None:
        """The next segment, of exactly `size` bytes."""
        info = tarfile.TarInfo(f"segments/00000000-0000-4000-8000-{self._number:012x}.tar")
        info.size = size
        self._file.write(bytes(self._padding) + info.tobuf(tarfile.GNU_FORMAT))
        self._number += 1
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

    None where the engine cannot read the segments' format. Raises BackupDamaged, and OSError where the room is too
    little.
    """
    with ExitStack() as stack:
        shards = {}
        for number, archive in files.finished().items():
            shards[number] = shard = _load(archive, archive.with_suffix(""))
            if shard is not None:
                stack.callback(shard.close)
        yield Segments(shards) if None not in shards.values() else None


def _load(archive: Path, target: Path) -> Any | None:
    from qdrant_edge import EdgeShard

    try:
        EdgeShard.unpack_snapshot(str(archive), str(target))
        return EdgeShard.load(str(target))
    except Exception as error:  # noqa: BLE001 - the engine raises nothing finer (pypi.org/project/qdrant-edge-py)
        if _FULL in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(target)) from None
        if any(sign in str(error) for sign in _FOREIGN):
            return None
        raise BackupDamaged(
            f"the engine cannot open the snapshot's segments: {error}", next_step=_STEP
        ) from None
