"""The collection component: the server's snapshot, its configuration and ids; and its verification."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from lib.backup.archive import (
    FACTS,
    IDS,
    SNAPSHOT,
    ArchiveFacts,
    ArchiveWriter,
    IdsReader,
    SnapshotMember,
    archive_writer,
    expected_snapshots,
    peek_facts,
    read_archive,
    together,
)
from lib.backup.existing_points import as_id, pages
from lib.backup.graph import check_file, compare_collection
from lib.backup.last_migration import journalled_model
from lib.backup.manifest import CHECKED, COLLECTION_DIR, RESTORED, UNVERIFIED, BackupFile, CollectionComponent
from lib.backup.payloads import PointId
from lib.backup.server_snapshots import own_snapshot
from lib.child_process import scratch_folder
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.cluster import Node, whole_nodes
from lib.clients.qdrant.collection import CollectionState, aliases_of, get_state, vector_params
from lib.clients.qdrant.points import scroll
from lib.clients.qdrant.segments import EngineKilled, SegmentFiles, has_engine, opened_segments
from lib.clients.qdrant.snapshot_format import SnapshotFacts, inspect_snapshot
from lib.clients.qdrant.transport import NotFound, Qdrant
from lib.concurrency import Progress, steps_of
from lib.dimensions import UNKNOWN_MODEL, EmbeddingSpec
from lib.errors import BackupDamaged
from lib.files import FULL_DISK, free_bytes, private_dir
from lib.journal import Journal

_PAGE = 1000
_ROOM = 64 << 20  # what shall stay free


@dataclass(frozen=True)
class CollectionVerification:
    """What the archive holds, both tar levels read to the end."""

    level: str
    note: str
    archive: ArchiveFacts
    snapshot: SnapshotFacts


def verify_collection(
    path: Path,
    *,
    component: CollectionComponent | None = None,
    on_ids: IdsReader | None = None,
    passing: Callable[[IO[bytes]], IO[bytes]] | None = None,
) -> CollectionVerification:
    """Prove an archive; raises BackupDamaged where bytes, structure or configuration are off.

    It is read once: what the engine is to open is put aside as it passes. `on_ids` sees the promised ids; `passing`
    gets each snapshot's stream and gives back what is read in its place.
    """
    if component:
        check_file(path, component.file)
    with scratch_folder("segments-") as scratch:
        size = peek_facts(path)["snapshot_size"]
        aside = Aside(scratch.path, size if isinstance(size, int) else 0)
        seen: list[SnapshotFacts] = []
        archive = read_archive(
            path,
            on_snapshot=lambda stream: seen.append(aside.inspected(passing(stream) if passing else stream)),
            on_ids=lambda lines: aside.save_ids(lines, on_ids),
        )
        expected = archive.facts
        _compare_snapshots(path, archive, seen)
        if archive.ids != expected["promised_ids"]:
            raise BackupDamaged(f"{path}: {archive.ids} ids inside, {expected['promised_ids']} were promised")
        live = _shape_of(path, expected)
        if component:
            compare_collection(path, component, {**expected, "size": live[0], "distance": live[1]})
        if any((one.size, one.distance) != live for one in seen if not one.vectors_named):
            raise BackupDamaged(f"{path}: the snapshot is of another configuration than the collection was")
        counted, why_not = aside.counted(lambda: _asked(path, archive, aside))
    if counted is None:
        note = f"checksum, both tar levels, configuration and ids; {why_not}"
        return CollectionVerification(CHECKED, note, archive, seen[0])
    return CollectionVerification(
        RESTORED, f"{counted} points counted by Qdrant's own engine", archive, seen[0]
    )


class Aside:
    """What is there for the engine to open, put aside below `folder` while it is read, unless something hinders it.

    `size`: bytes of all snapshots.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.hindrance = "" if has_room(2 * size) else _no_room()
        if not has_engine():
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
        facts = inspect_snapshot(stream, self.segments[-1].save)
        if self.segments[-1].full:
            self.hindrance = _no_room()
        return facts

    def save_ids(self, lines: Iterator[str], on_ids: IdsReader | None) -> None:
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
                one = str(min(lacking, key=str))
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
        expected, whole = expected_snapshots(facts), (facts["snapshot_size"], facts["snapshot_sha256"])
    except ValueError as error:
        raise BackupDamaged(
            f"{path}: its collection.json is not whole", next_step="use another backup"
        ) from error
    if expected != archive.snapshots or whole != (archive.snapshot_size, archive.snapshot_sha256):
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


STAMP_KEY = "automem_migration"
Made = list[tuple[Node, snapshots.Snapshot]]
_GUESSES = {768: "text-embedding-3-small", 1536: "text-embedding-3-small", 3072: "text-embedding-3-large"}


@dataclass(frozen=True)
class CollectionSource:
    """An opened Qdrant, the collection in it, and what the configuration says of its vectors.

    `nodes` are those of its cluster that the configuration lists, none of them asked yet.
    """

    qdrant: Qdrant
    collection: str
    spec: EmbeddingSpec
    nodes: tuple[Qdrant, ...] = ()


def known_model(
    state: CollectionState, spec: EmbeddingSpec, journalled: str | None = None
) -> tuple[str, str]:
    """Which model made the vectors, and how that is known: `stamped` (or `journalled`), `configured` or `guessed`."""
    stamp = (state.raw["config"].get("metadata") or {}).get(STAMP_KEY) or {}
    if stamp.get("model") or journalled:
        return str(stamp.get("model") or journalled), "stamped"
    if state.size == spec.size:
        return spec.model, "configured"
    return _GUESSES.get(state.size, UNKNOWN_MODEL), "guessed"


def order(identity: PointId) -> tuple[int, int | str]:
    """Qdrant's own order of ids: numbers, then UUIDs."""
    return (0, identity) if isinstance(identity, int) else (1, identity)


def parsed(line: str) -> PointId:
    """An id from a line of ids.txt."""
    return int(line) if line.isdigit() else line


def _write_ids(source: CollectionSource, stream: IO[bytes]) -> None:
    for page in scroll(source.qdrant, source.collection):
        stream.write("".join([f"{point.id}\n" for point in page]).encode())
    stream.flush()


def _lines(stream: IO[bytes]) -> Iterator[str]:
    stream.seek(0)
    return (line.decode().strip() for line in stream)


def _in_both(before: IO[bytes], after: IO[bytes], expected: IO[bytes]) -> int:
    """Ids scrolled before and after the snapshot: those the snapshot must hold. Merged, both being in order."""
    count, later = 0, _lines(after)
    other = next(later, None)
    for line in _lines(before):
        while other is not None and other != line and order(parsed(other)) < order(parsed(line)):
            other = next(later, None)
        if other == line:
            expected.write(f"{line}\n".encode())
            count += 1
    expected.flush()
    return count


def take_collection(
    source: CollectionSource,
    folder: Path,
    stamp: str,
    journal: Journal,
    *,
    verify: bool = True,
    progress: Progress | None = None,
    on_ids: IdsReader | None = None,
) -> CollectionComponent:
    """Write `qdrant/qdrant_snapshot_<stamp>.tar.gz` below `folder` and prove it.

    The server-side snapshots, one on each node that holds a part, are deleted again, whatever happens (see
    `own_snapshot`). Raises MissingData where the collection is absent, and like `whole_nodes` where no set of
    snapshots would hold all of it.
    """
    nodes = holding_nodes(source)
    state = get_state(source.qdrant, source.collection)
    path = private_dir(folder / COLLECTION_DIR) / f"qdrant_snapshot_{stamp}.tar.gz"
    journalled = journalled_model(folder, journal.targets[-1], state.size)
    model, known = known_model(state, source.spec, journalled)
    facts: dict[str, Any] = {
        "collection": source.collection,
        "server": {"address": source.qdrant.display, "version": source.qdrant.version()},
        "config": state.raw["config"],
        "payload_schema": state.raw.get("payload_schema") or {},
        "aliases": aliases_of(source.qdrant, source.collection),
        "points": state.points,
        "model": model,
        "model_known": known,
    }
    file, facts = _archive(source, nodes, path, facts, journal, progress)
    component = _component(file, facts, state)
    return _proved(path, component, on_ids) if verify else component


def holding_nodes(source: CollectionSource) -> list[Node]:
    """The nodes whose snapshots together hold the collection; raises like `whole_nodes`, and MissingData."""
    try:
        return whole_nodes(source.qdrant, source.nodes, source.collection)
    except NotFound:
        get_state(source.qdrant, source.collection)  # says what there is instead
        raise


def require_whole(source: CollectionSource | None) -> None:
    """Raise like `holding_nodes` where a backup of the collection would not hold all of it; nothing is written."""
    if source:
        holding_nodes(source)


def _archive(
    source: CollectionSource,
    nodes: list[Node],
    path: Path,
    facts: dict[str, Any],
    journal: Journal,
    progress: Progress | None,
) -> tuple[BackupFile, dict[str, Any]]:
    with (
        tempfile.TemporaryFile() as before,
        tempfile.TemporaryFile() as after,
        tempfile.TemporaryFile() as both,
    ):
        _write_ids(source, before)
        with ExitStack() as standing:
            made = [(node, standing.enter_context(_snapshot_on(node, source, journal))) for node in nodes]
            _write_ids(source, after)
            facts["promised_ids"] = _in_both(before, after, both)
            facts |= _facts_of(made)
            with archive_writer(path) as archive:
                _fill(source, archive, facts, made, both, progress)
                size, sha256 = archive.finish()
    return BackupFile(f"{COLLECTION_DIR}/{path.name}", size, sha256), facts


@contextmanager
def _snapshot_on(node: Node, source: CollectionSource, journal: Journal) -> Iterator[snapshots.Snapshot]:
    address = node.qdrant.display if source.nodes else None
    with own_snapshot(node.qdrant, source.collection, journal, address) as made:
        yield snapshots.with_checksum(node.qdrant, source.collection, made)


def _facts_of(made: Made) -> dict[str, Any]:
    """What collection.json says of the snapshots, and where there are several, of each."""
    each = [
        {
            "peer": node.peer,
            "address": node.qdrant.display,
            "shards": list(node.shards),
            "snapshot_name": one.name,
            "snapshot_size": one.size,
            "snapshot_sha256": one.checksum,
        }
        for node, one in made
    ]
    whole = together([SnapshotMember(one.name, one.size, str(one.checksum)) for _, one in made])
    facts = {"snapshot_name": whole.name, "snapshot_size": whole.size, "snapshot_sha256": whole.sha256}
    return {**facts, "nodes": each if len(each) > 1 else []}


def _fill(
    source: CollectionSource,
    archive: ArchiveWriter,
    facts: dict[str, Any],
    made: Made,
    ids: IO[bytes],
    progress: Progress | None,
) -> None:
    import io

    document = orjson.dumps(facts, option=orjson.OPT_INDENT_2)
    archive.add(FACTS, io.BytesIO(document), len(document))
    for node, one in made:
        archive.begin(SNAPSHOT + one.name, one.size)
        shown = steps_of(progress) if progress else None
        got = snapshots.download(node.qdrant, source.collection, one, archive.write, shown)
        archive.end()
        if got.sha256 != one.checksum:
            raise BackupDamaged(f"snapshot {one.name} arrived damaged: its sha256 is not the server's")
    size = ids.tell()
    ids.seek(0)
    archive.add(IDS, ids, size)


def _component(file: BackupFile, facts: dict[str, Any], state: CollectionState) -> CollectionComponent:
    names = ("collection", "server", "points", "payload_schema", "aliases", "model", "model_known")
    more = ("snapshot_name", "snapshot_size", "snapshot_sha256", "nodes", "promised_ids")
    return CollectionComponent(
        file=file,
        size=state.size,
        distance=state.distance,
        proof=UNVERIFIED,
        proof_note="--no-verify",
        **{name: facts[name] for name in (*names, *more)},
    )


def _proved(path: Path, component: CollectionComponent, on_ids: IdsReader | None) -> CollectionComponent:
    import dataclasses

    proof = verify_collection(path, component=component, on_ids=on_ids)
    return dataclasses.replace(component, proof=proof.level, proof_note=proof.note)
