"""The proof of a collection's archive; the levels are those of `lib.steps.prove`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lib.backup_set.archive import read_archive
from lib.backup_set.manifest import CHECKED, RESTORED, CollectionHalf
from lib.backup_set.members import ArchiveFacts, promised_snapshots
from lib.errors import BackupDamaged
from lib.files import FULL_DISK, free_bytes
from lib.steps.compare_manifest import compare_collection
from lib.steps.present import as_id, as_text
from lib.steps.prove import check_file
from lib.vectors.collection import vector_params
from lib.vectors.open_segments import Segments, opened_segments
from lib.vectors.snapshot_tar import SnapshotFacts, inspect_snapshot

_PAGE = 1000
_ROOM = 64 << 20  # what shall stay free beside the segments that are opened


@dataclass(frozen=True)
class CollectionProof:
    """What the archive holds, both tar levels read to the end."""

    level: str
    note: str
    archive: ArchiveFacts
    snapshot: SnapshotFacts


def prove_collection(path: Path, *, half: CollectionHalf | None = None) -> CollectionProof:
    """Prove an archive; raises BackupDamaged where bytes, structure or configuration are off."""
    if half:
        check_file(path, half.file)
    seen: list[SnapshotFacts] = []

    def inspect(stream: IO[bytes]) -> None:
        seen.append(inspect_snapshot(stream))

    archive = read_archive(path, on_snapshot=inspect)
    promised = archive.facts
    _compare_snapshots(path, archive, seen)
    if archive.ids != promised["promised_ids"]:
        raise BackupDamaged(f"{path}: {archive.ids} ids inside, {promised['promised_ids']} were promised")
    snapshot = seen[0]
    live = _shape_of(path, promised)
    if half:
        compare_collection(path, half, {**promised, "size": live[0], "distance": live[1]})
    if any((one.size, one.distance) != live for one in seen if not one.vectors_named):
        raise BackupDamaged(f"{path}: the snapshot is of another configuration than the collection was")
    counted, why_not = _opened(path, archive)
    if counted is None:
        note = f"checksum, both tar levels, configuration and ids; {why_not}"
        return CollectionProof(CHECKED, note, archive, snapshot)
    return CollectionProof(RESTORED, f"{counted} points counted by Qdrant's own engine", archive, snapshot)


def _opened(path: Path, archive: ArchiveFacts) -> tuple[int | None, str]:
    """The points that the engine counts, or why it cannot."""
    place = Path(tempfile.gettempdir())
    no_room = f"no room in {place} to open its segments"
    if not find_spec("qdrant_edge"):
        return None, "not opened: `pip install qdrant-edge-py` brings Qdrant's engine"
    if free_bytes(place) < 2 * archive.snapshot_size + _ROOM:
        return None, no_room
    try:
        return _asked(path), "its segments are of a format that Qdrant's engine here does not open"
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        return None, no_room


def _asked(path: Path) -> int | None:
    """The points in the segments, where the engine is installed here and reads their format.

    Of a shard that several nodes hold the replica with fewest counts: each was made while all promised ids were in.
    Raises BackupDamaged where a promised id is in none, or a replica has too few.
    """
    opened: list[Segments | None] = []

    def ask(lines: Iterator[str]) -> None:
        while page := {as_id(line) for line in islice(lines, _PAGE)}:
            for segments in opened:
                page -= segments.held(list(page)) if segments else page
            if page:
                raise BackupDamaged(
                    f"{path}: its segments lack promised points, {as_text(min(page, key=str))} for one"
                )

    with ExitStack() as stack:
        inside = read_archive(
            path,
            on_snapshot=lambda stream: opened.append(
                stack.enter_context(opened_segments(cast("BinaryIO", stream)))
            ),
            on_ids=ask,
        )
        if None in opened:
            return None
        fewest: dict[int, int] = {}
        for shard, points in (one for segments in opened if segments for one in segments.counts.items()):
            fewest[shard] = min(points, fewest.get(shard, points))
    counted = sum(fewest.values())
    if counted < inside.ids:
        raise BackupDamaged(f"{path}: its segments hold {counted} points, {inside.ids} were promised")
    return counted


def _compare_snapshots(path: Path, archive: ArchiveFacts, seen: list[SnapshotFacts]) -> None:
    """Each snapshot is the one that was downloaded, and together they hold every shard; raises BackupDamaged."""
    facts = archive.facts
    try:
        promised, whole = promised_snapshots(facts), (facts["snapshot_size"], facts["snapshot_sha256"])
    except ValueError as error:
        raise BackupDamaged(
            f"{path}: its collection.json is not whole", next_step="use another backup"
        ) from error
    if promised != archive.snapshots or whole != (archive.snapshot_size, archive.snapshot_sha256):
        raise BackupDamaged(
            f"{path}: the snapshot inside is not the one that was downloaded (sha256 differs)"
        )
    held = {shard for one in seen for shard, segments in one.shards.items() if segments}
    missing = {shard for one in seen for shard in one.shards} - held
    if missing:
        raise BackupDamaged(
            f"{path} holds no points of shard {min(missing)}: they are on another Qdrant node",
            next_step="use another backup; a new one needs QDRANT_NODE_URLS to list every node",
        )


def _shape_of(path: Path, facts: dict[str, Any]) -> tuple[int, str]:
    """Size and distance of the live collection; raises BackupDamaged where `facts` lack what a restore reads."""
    try:
        vectors, version = facts["config"]["params"]["vectors"], facts["server"]["version"]
        if all(isinstance(text, str) for text in (version, facts["model"], *facts["aliases"])):
            size, distance, _ = vector_params(vectors)
            return size, distance
    except (KeyError, TypeError, AttributeError, ValueError):
        pass
    raise BackupDamaged(f"{path}: its collection.json is not whole", next_step="use another backup")
