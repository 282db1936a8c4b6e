"""The collection component: the server's snapshot, its configuration and ids; and its verification."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from heapq import merge
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import orjson

from lib.backup import archive as archives
from lib.backup import manifest as manifests
from lib.backup.archive import ArchiveFacts, SnapshotMember, archive_writer, peek_facts, read_archive
from lib.backup.manifest import BackupFile, CollectionComponent, check_file, checking_file, require_equal
from lib.backup.phases import journalled_stamp, own_snapshot
from lib.backup.points import TemporaryIdTable, as_id
from lib.child_process import scratch_folder
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.cluster import Node, whole_nodes
from lib.clients.qdrant.collection import aliases_of, get_state
from lib.clients.qdrant.points import PointId, scroll
from lib.clients.qdrant.segments import EngineKilled, SegmentFiles, has_engine, opened_segments
from lib.clients.qdrant.snapshot_format import SnapshotFacts, inspect_snapshot, vector_params
from lib.clients.qdrant.transport import NotFound, Qdrant
from lib.concurrency import Progress
from lib.dimensions import OPENAI, UNKNOWN_MODEL, EmbeddingSpec, provider_fact, provider_of
from lib.errors import BackupDamaged
from lib.files import FULL_DISK, free_bytes, private_dir
from lib.journal import Journal

_RESERVE_BYTES = 64 << 20  # what stays free in the temporary folder
STAMP_KEY = "automem_migration"
_GUESSES = {768: "text-embedding-3-small", 1536: "text-embedding-3-small", 3072: "text-embedding-3-large"}


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
    ids: TemporaryIdTable | None = None,
    passing: Callable[[IO[bytes]], IO[bytes]] | None = None,
    counting: bool = True,
) -> CollectionVerification:
    """Verify an archive, which is read once, and fill `ids` with the expected ids. Raises BackupDamaged.

    `passing` replaces each snapshot's stream. `counting`: Qdrant's engine counts the points.
    """
    file = component.file if component else None
    seen: list[SnapshotFacts] = []
    with scratch_folder("segments-") as scratch, TemporaryIdTable() as own_ids:
        expected = own_ids if ids is None else ids

        def read_ids(lines: Iterator[str]) -> None:
            if ids is not None or not copies.hindrance:
                expected.fill(map(as_id, lines))

        with checking_file(path, file):
            copies = SegmentCopies(scratch.path, peek_facts(path)["snapshot_size"], counting=counting)
            archive = read_archive(
                path,
                on_snapshot=lambda stream: seen.append(copies.inspect(passing(stream) if passing else stream)),
                on_ids=read_ids,
            )
        if file:
            check_file(path, file, archive.sha256)
        _compare_snapshots(path, archive, seen)
        facts = archive.facts
        if archive.ids != facts["promised_ids"]:
            raise BackupDamaged(f"{path}: {archive.ids} ids inside, {facts['promised_ids']} are expected")
        size, distance, _ = vector_params(facts["config"]["params"]["vectors"])
        if component:
            compare_collection(path, component, {**facts, "size": size, "distance": distance})
        if any((one.size, one.distance) != (size, distance) for one in seen if not one.vectors_named):
            raise BackupDamaged(f"{path}: the snapshot is of another configuration than the collection was")
        counted, why_not = copies.counted(lambda: _count_points(path, archive, copies, expected))
    level, note = manifests.CHECKED, f"checksum, both tar levels, configuration and ids; {why_not}"
    if counted is not None:
        level, note = manifests.RESTORED, f"{counted} points counted by Qdrant's own engine"
    return CollectionVerification(level, note, archive, seen[0])


class SegmentCopies:
    """Temporary copies of segments, below `folder`, made while a snapshot is read if nothing hinders.

    Qdrant's engine opens them. `size`: bytes of all snapshots.
    """

    def __init__(self, folder: Path, size: int, *, counting: bool = True) -> None:
        self.hindrance = "" if has_room(2 * size) else _no_room()
        if not has_engine():
            self.hindrance = "not opened: `pip install qdrant-edge-py` brings Qdrant's engine"
        if not counting:
            self.hindrance = "its points were not counted again"
        self.segments: list[SegmentFiles] = []
        self._folder = folder

    def inspect(self, stream: IO[bytes]) -> SnapshotFacts:
        """Read a snapshot to its end and copy its segments."""
        if self.hindrance:
            return inspect_snapshot(stream)
        folder = self._folder / str(len(self.segments))
        folder.mkdir()
        self.segments.append(SegmentFiles(folder))
        with closing(self.segments[-1]) as files:
            facts = inspect_snapshot(stream, files.save)
        if self.segments[-1].full:
            self.hindrance = _no_room()
        return facts

    def counted(self, count: Callable[[], int | None]) -> tuple[int | None, str]:
        """The points that `count` finds, or None and why. `count` returns None if no engine reads the format."""
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


def has_room(size: int) -> bool:
    """Whether the temporary folder has room for so many bytes and a reserve."""
    return free_bytes(Path(tempfile.gettempdir())) >= size + _RESERVE_BYTES


def _no_room() -> str:
    return f"no room in {tempfile.gettempdir()} to open its segments"


def _count_points(path: Path, archive: ArchiveFacts, copies: SegmentCopies, expected: TemporaryIdTable) -> int | None:
    """Count the points in the segments; None if the engine does not read their format.

    If several nodes hold a shard, the replica with the fewest points counts: each was made while all expected ids were
    in. Raises BackupDamaged if an expected id is in none, or if a replica has too few points.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(opened_segments(files)) for files in copies.segments]
        known = [one for one in opened if one is not None]
        if len(known) < len(opened):
            return None
        for page in expected.ids():
            missing = set(page)
            for segments in known:
                missing -= segments.held(list(missing))
            if missing:
                raise BackupDamaged(f"{path}: its segments lack expected points, such as {min(missing, key=str)}")
        fewest: dict[int, int] = {}
        for shard, points in (one for segments in known for one in segments.counts.items()):
            fewest[shard] = min(points, fewest.get(shard, points))
    counted = sum(fewest.values())
    if counted < archive.ids:
        raise BackupDamaged(f"{path}: its segments hold {counted} points, {archive.ids} are expected")
    return counted


def compare_collection(path: Path, component: CollectionComponent, facts: Mapping[str, Any]) -> None:
    """Compare `collection.json`, with `size` and `distance`, with the manifest. Raises BackupDamaged."""
    fields = vars(component)
    require_equal(path, fields, {name: value for name, value in facts.items() if name in fields})


def _compare_snapshots(path: Path, archive: ArchiveFacts, seen: list[SnapshotFacts]) -> None:
    """Raise BackupDamaged unless the snapshots are those that were downloaded and together hold every shard."""
    facts, names = archive.facts, ("snapshot_name", "snapshot_size", "snapshot_sha256")
    expected = tuple(SnapshotMember(*(one[name] for name in names)) for one in facts.get("nodes") or [facts])
    whole = (facts["snapshot_size"], facts["snapshot_sha256"])
    if expected != archive.snapshots or whole != (archive.snapshot.size, archive.snapshot.sha256):
        raise BackupDamaged(f"{path}: the snapshot inside is not the one that was downloaded (sha256 differs)")
    held = {shard for one in seen for shard, segments in one.shards.items() if segments}
    missing = {shard for one in seen for shard in one.shards} - held
    if missing:
        raise BackupDamaged(
            f"{path} holds no points of shard {min(missing)}: they are on another Qdrant node",
            next_step="use another backup. A new one needs QDRANT_NODE_URLS to list every node",
        )


@dataclass(frozen=True)
class CollectionSource:
    """An opened Qdrant, the collection in it, and what the configuration says of its vectors.

    `nodes` are those of its cluster that the configuration lists; none has been contacted yet.
    """

    qdrant: Qdrant
    collection: str
    spec: EmbeddingSpec
    nodes: tuple[Qdrant, ...] = ()


def stamp_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model stamp in a collection's configuration; empty if there is none, or one of another form."""
    metadata = config.get("metadata")
    stamp = metadata.get(STAMP_KEY) if isinstance(metadata, dict) else None
    if not isinstance(stamp, dict) or not isinstance(model := stamp.get("model"), str):
        return {}
    return stamp if model and f"{model}{provider_of(stamp)}".isprintable() else {}


def known_model(
    size: int, config: Mapping[str, Any], spec: EmbeddingSpec, journalled: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return `model` and `model_known` of the vectors, and `provider` unless it is OpenAI.

    `size` and `config` are the collection's. `model_known` is `stamped` (also if only the journal has the stamp),
    `configured` or `guessed`.
    """
    if stamp := stamp_of(config) or journalled or {}:
        model, known, provider = str(stamp["model"]), "stamped", provider_of(stamp)
    elif size == spec.size:
        model, known, provider = spec.model, "configured", spec.provider
    else:
        model, known, provider = _GUESSES.get(size, UNKNOWN_MODEL), "guessed", OPENAI
    return {"model": model, "model_known": known, **provider_fact(provider)}


def require_whole(source: CollectionSource) -> list[Node]:
    """The nodes whose snapshots together hold the collection. Raises like `whole_nodes`, and MissingData."""
    try:
        return whole_nodes(source.qdrant, source.nodes, source.collection)
    except NotFound:
        get_state(source.qdrant, source.collection)  # its error lists the collections that exist
        raise


def take_collection(
    source: CollectionSource,
    stamp: str,
    journal: Journal,
    *,
    verify: bool = True,
    progress: Progress | None = None,
    ids: TemporaryIdTable | None = None,
    before_ids: Callable[[], object] = lambda: None,
) -> CollectionComponent:
    """Write `qdrant/qdrant_snapshot_<stamp>.tar.gz` below the journal's folder and verify it.

    If the archive is verified, `ids` is filled with the expected ids. `before_ids` is called before the first id is
    read. Raises MissingData if the collection is absent, BackupDamaged, and like `whole_nodes` if the snapshots would
    not hold all of it.
    """
    nodes = require_whole(source)
    state = get_state(source.qdrant, source.collection)
    path = private_dir(journal.folder / manifests.COLLECTION_DIR) / f"qdrant_snapshot_{stamp}.tar.gz"
    journalled = journalled_stamp(journal.folder, journal.targets[-1], state.size)
    facts: dict[str, Any] = {
        "collection": source.collection,
        "server": {"address": source.qdrant.display, "version": source.qdrant.version()},
        "config": state.raw["config"],
        "payload_schema": state.raw.get("payload_schema") or {},
        "aliases": aliases_of(source.qdrant, source.collection),
        "points": state.points,
        **known_model(state.size, state.raw["config"], source.spec, journalled),
    }
    before_ids()
    size, sha256 = _write_archive(source, nodes, path, facts, journal, progress)
    component = CollectionComponent(
        file=BackupFile(f"{manifests.COLLECTION_DIR}/{path.name}", size, sha256),
        size=state.size,
        distance=state.distance,
        proof=manifests.UNVERIFIED,
        proof_note="--no-verify",
        **{name: value for name, value in facts.items() if name != "config"},
    )
    if not verify:
        return component
    found = verify_collection(path, component=component, ids=ids)
    return replace(component, proof=found.level, proof_note=found.note)


def _write_archive(
    source: CollectionSource,
    nodes: list[Node],
    path: Path,
    facts: dict[str, Any],
    journal: Journal,
    progress: Progress | None,
) -> tuple[int, str]:
    """Have the nodes make their snapshots, download them, add to `facts` what they are. Returns bytes and sha256."""
    with tempfile.TemporaryFile("w+") as before, tempfile.TemporaryFile() as ids, ExitStack() as on_server:
        before.writelines(f"{one}\n" for one in _ids(source))
        before.seek(0)
        made = []
        for node in nodes:
            address = node.qdrant.display if source.nodes else None
            snapshot = own_snapshot(node.qdrant, source.collection, journal, address)
            made.append((node, on_server.enter_context(snapshot)))
        # Expected are the ids that existed before and exist now. Qdrant lists numbers before UUIDs.
        earlier = (as_id(line.strip()) for line in before)
        both = groupby(merge(earlier, _ids(source), key=lambda one: (isinstance(one, str), one)))
        facts["promised_ids"] = 0
        for identity, equal in both:
            if len(list(equal)) == 2:
                ids.write(f"{identity}\n".encode())
                facts["promised_ids"] += 1
        facts |= _snapshot_facts(made)
        with archive_writer(path) as archive:
            document = orjson.dumps(facts, option=orjson.OPT_INDENT_2)
            archive.add(archives.FACTS, io.BytesIO(document), len(document))
            for node, one in made:
                archive.begin(archives.SNAPSHOT + one.name, one.size)
                snapshots.download(node.qdrant, source.collection, one, archive.write, progress)
                archive.end()
            size = ids.tell()
            ids.seek(0)
            archive.add(archives.IDS, ids, size)
            return archive.finish()


def _ids(source: CollectionSource) -> Iterator[PointId]:
    return (point.id for page in scroll(source.qdrant, source.collection) for point in page)


def _snapshot_facts(made: list[tuple[Node, snapshots.Snapshot]]) -> dict[str, Any]:
    """What collection.json says of all snapshots, and of each if there are several."""
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
    whole = archives.combined([SnapshotMember(one.name, one.size, str(one.checksum)) for _, one in made])
    facts = {"snapshot_name": whole.name, "snapshot_size": whole.size, "snapshot_sha256": whole.sha256}
    return {**facts, "nodes": each if len(each) > 1 else []}
