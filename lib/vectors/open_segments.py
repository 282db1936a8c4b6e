"""The deepest proof of a snapshot on this machine: its segments opened by Qdrant's own engine, and counted."""

from __future__ import annotations

import re
import tarfile
import tempfile
from pathlib import Path
from typing import BinaryIO

from lib.errors import BackupDamaged
from lib.vectors.tar_stream import PIECE_BYTES, Section, Sparse, entries

_SEGMENT = re.compile(r"(\d+)/segments/[^/]+\.tar")
# Segments over RocksDB (Qdrant up to about 1.15) are what the engine cannot read; seen with 1.11.3.
_FOREIGN = ("unknown variant", "rocksdb", "RocksDB", "Failed to deserialize")


def open_segments_count(stream: BinaryIO, scratch_dir: Path | None = None) -> int | None:
    """The number of points in a snapshot that `inspect_snapshot` found whole, counted by the engine.

    None where `qdrant-edge-py` is not installed or cannot read the segments' format. Needs room for the segments
    twice in `scratch_dir` (default: the system's temporary folder). Raises BackupDamaged.
    """
    try:
        import qdrant_edge  # noqa: F401 - only whether it is there
    except ImportError:
        return None
    with tempfile.TemporaryDirectory(prefix="segments-", dir=scratch_dir) as folder:
        shards = _sort_out(stream, Path(folder))
        counts = [_count(archive, Path(folder) / f"shard-{index}") for index, archive in enumerate(shards)]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _sort_out(stream: BinaryIO, folder: Path) -> list[Path]:
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
    return [Path(str(archive.name)) for archive in archives.values()]


def _add(archive: tarfile.TarFile, name: str, content: Section | Sparse, folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as copy:
        while piece := content.read(PIECE_BYTES):
            copy.write(piece)
        info = tarfile.TarInfo(name)
        info.size = copy.tell()
        copy.seek(0)
        archive.addfile(info, copy)


def _count(archive: Path, target: Path) -> int | None:
    from qdrant_edge import CountRequest, EdgeShard

    try:
        EdgeShard.unpack_snapshot(str(archive), str(target))
        shard = EdgeShard.load(str(target))
    except Exception as error:  # noqa: BLE001 - the engine raises nothing finer (pypi.org/project/qdrant-edge-py)
        if any(sign in str(error) for sign in _FOREIGN):
            return None
        raise BackupDamaged(
            f"the engine cannot open the snapshot's segments: {error}", next_step=_STEP
        ) from None
    try:
        return int(shard.count(CountRequest(exact=True)))
    finally:
        shard.close()


_STEP = "use another backup"
