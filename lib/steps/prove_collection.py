"""The proof of a collection's archive; the levels are those of `lib.steps.prove`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lib.backup_set.archive import IdsReader, peek_facts, read_archive
from lib.backup_set.manifest import CHECKED, RESTORED, CollectionHalf
from lib.backup_set.members import ArchiveFacts, promised_snapshots
from lib.errors import BackupDamaged
from lib.files import FULL_DISK, free_bytes
from lib.scratch_folder import scratch_folder
from lib.steps.compare_manifest import compare_collection
from lib.steps.pages import pages
from lib.steps.present import as_id, as_text
from lib.steps.prove import check_file
from lib.vectors.collection import vector_params
from lib.vectors.open_segments import EngineKilled, SegmentFiles, engine_here, opened_segments
from lib.vectors.snapshot_tar import SnapshotFacts, inspect_snapshot

_PAGE = 1000
_ROOM = 64 << 20  # what shall stay free


@dataclass(frozen=True)
class CollectionProof:
    """What the archive holds, both tar levels read to the end."""

    level: str
    note: str
    archive: ArchiveFacts
    snapshot: SnapshotFacts


def prove_collection(
    path: Path,
    *,
    half: CollectionHalf | None = None,
    on_ids: IdsReader | None = None,
    passing: Callable[[IO[bytes]], IO[bytes]] | None = None,
) -> CollectionProof:
    """Prove an archive; raises BackupDamaged where bytes, structure or configuration are off.

    It is read once: what the engine is to open is put aside as it passes. `on_ids` sees the promised ids; `passing`
    gets each snapshot's stream and gives back what is read in its place.
    """
    if half:
        check_file(path, half.file)
    with scratch_folder("segments-") as scratch:
        size = peek_facts(path)["snapshot_size"]
        aside = Aside(scratch.path, size if isinstance(size, int) else 0)
        seen: list[SnapshotFacts] = []
        archive = read_archive(
            path,
            on_snapshot=lambda stream: seen.append(aside.inspected(passing(stream) if passing else stream)),
            on_ids=lambda lines: aside.keep_ids(lines, on_ids),
        )
        promised = archive.facts
        _compare_snapshots(path, archive, seen)
        if archive.ids != promised["promised_ids"]:
            raise BackupDamaged(f"{path}: {archive.ids} ids inside, {promised['promised_ids']} were promised")
        live = _shape_of(path, promised)
        if half:
            compare_collection(path, half, {**promised, "size": live[0], "distance": live[1]})
        if any((one.size, one.distance) != live for one in seen if not one.vectors_named):
            raise BackupDamaged(f"{path}: the snapshot is of another configuration than the collection was")
        counted, why_not = aside.counted(lambda: _asked(path, archive, aside))
    if counted is None:
        note = f"checksum, both tar levels, configuration and ids; {why_not}"
        return CollectionProof(CHECKED, note, archive, seen[0])
    return CollectionProof(RESTORED, f"{counted} points counted by Qdrant's own engine", archive, seen[0])


class Aside:
    """What is there for the engine to open, put aside below `folder` while it is read, unless something hinders it.

    `size`: bytes of all snapshots.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.hindrance = "" if has_room(2 * size) else _no_room()
        if not engine_here():
            self.hindrance = "not opened: `pip install qdrant-edge-py` brings Qdrant's engine"
        self.segments: list[SegmentFiles] = []
        self.ids = folder / "ids.txt"
        self._folder = folder

    def inspected(self, stream: IO[bytes]) -> SnapshotFacts:
        """Read a snapshot to its end."""
        if self.hindrance:
            return inspect_snapshot(stream)
        own = self._folder / str(len(self.segments))
        own.mkdir()
        self.segments.append(SegmentFiles(own))
        facts = inspect_snapshot(stream, self.segments[-1].keep)
        if self.segments[-1].full:
            self.hindrance = _no_room()
        return facts

    def keep_ids(self, lines: Iterator[str], on_ids: IdsReader | None) -> None:
        """Write the ids down as they pass to `on_ids`."""
        with self.ids.open("w", encoding="ascii") as copy:
            passing = lines if self.hindrance else _copied(lines, copy)
            if on_ids:
                on_ids(passing)
            for _ in passing:
                pass

    def counted(self, count: Callable[[], int | None]) -> tuple[int | None, str]:
        """The points that `count` finds in the segments, or why it cannot; None of it: a format not read here."""
        if self.hindrance:
            return None, self.hindrance
        try:
            return count(), "its segments are of a format that Qdrant's engine here does not open"
        except EngineKilled as error:
            return None, f"not opened: {error}"
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            return None, _no_room()


def _copied(lines: Iterator[str], copy: IO[str]) -> Iterator[str]:
    for line in lines:
        copy.write(f"{line}\n")
        yield line


def has_room(size: int) -> bool:
    """Whether the temporary folder takes so many bytes and is not full then."""
    return free_bytes(Path(tempfile.gettempdir())) >= size + _ROOM


def _no_room() -> str:
    return f"no room in {tempfile.gettempdir()} to open its segments"


def _asked(path: Path, archive: ArchiveFacts, aside: Aside) -> int | None:
    """The points in the segments, where the engine reads their format.

    Of a shard that several nodes hold the replica with fewest counts: each was made while all promised ids were in.
    Raises BackupDamaged where a promised id is in none, or a replica has too few.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(opened_segments(files)) for files in aside.segments]
        known = [one for one in opened if one is not None]
        if len(known) < len(opened):
            return None
        lines = stack.enter_context(aside.ids.open(encoding="ascii"))
        for page in pages((as_id(line.strip()) for line in lines), _PAGE):
            lacking = set(page)
            for segments in known:
                lacking -= segments.held(list(lacking))
            if lacking:
                one = as_text(min(lacking, key=str))
                raise BackupDamaged(f"{path}: its segments lack promised points, {one} for one")
        fewest: dict[int, int] = {}
        for shard, points in (one for segments in known for one in segments.counts.items()):
            fewest[shard] = min(points, fewest.get(shard, points))
    counted = sum(fewest.values())
    if counted < archive.ids:
        raise BackupDamaged(f"{path}: its segments hold {counted} points, {archive.ids} were promised")
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
