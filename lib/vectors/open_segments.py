"""The deepest proof of a snapshot on this machine: its segments opened by Qdrant's own engine, counted and asked."""

from __future__ import annotations

import errno
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lib.errors import BackupDamaged
from lib.scratch_folder import scratch_folder
from lib.vectors.points import PointId
from lib.vectors.tar_stream import PIECE_BYTES, Section, Sparse, entries

_SEGMENT = re.compile(r"(\d+)/segments/[^/]+\.tar")
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


@contextmanager
def opened_segments(stream: BinaryIO, scratch_dir: Path | None = None) -> Iterator[Segments | None]:
    """The segments of a snapshot that `inspect_snapshot` found whole, open inside the block.

    None where `qdrant-edge-py` is not installed or cannot read the segments' format. Needs room for the segments
    twice in `scratch_dir` (default: the system's temporary folder). Raises BackupDamaged, and OSError where the room
    is too little.
    """
    try:
        import qdrant_edge  # noqa: F401 - only whether it is there
    except ImportError:
        yield None
        return
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder("segments-", scratch_dir)).path
        shards = {}
        for number, archive in _sort_out(stream, folder).items():
            shards[number] = shard = _load(archive, folder / f"shard-{number}")
            if shard is not None:
                stack.callback(shard.close)
        yield Segments(shards) if None not in shards.values() else None


def _sort_out(stream: BinaryIO, folder: Path) -> dict[int, Path]:
    """One archive per shard, of its segments alone and under names made here."""
    archives: dict[str, tarfile.TarFile] = {}
    try:
        for number, entry in enumerate(entries(Section(stream, None, "the snapshot"), needs_end=True)):
            match = _SEGMENT.fullmatch(entry.name) if entry.is_file else None
            if match is None:
                continue
            if match[1] not in archives:
                archives[match[1]] = tarfile.open(folder / f"{len(archives)}.tar", "w")  # noqa: SIM115 - closed below
            _add(
                archives[match[1]],
                f"segments/00000000-0000-4000-8000-{number:012x}.tar",
                entry.content,
                folder,
            )
    finally:
        for archive in archives.values():
            archive.close()
    return {int(shard): Path(str(archive.name)) for shard, archive in archives.items()}


def _add(archive: tarfile.TarFile, name: str, content: Section | Sparse, folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as copy:
        while piece := content.read(PIECE_BYTES):
            copy.write(piece)
        info = tarfile.TarInfo(name)
        info.size = copy.tell()
        copy.seek(0)
        archive.addfile(info, copy)


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
