"""The one proof: is this file what a restore needs? Used by backup, `--check` and restore alike.

`checked`: the bytes are those that were written (sha256 or the RDB's own CRC), the structure is whole.
`restored`: it was also loaded: the RDB by a scratch FalkorDB, counted and digested; the segments by the engine.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lib.backup_set.archive import read_archive
from lib.backup_set.manifest import CHECKED, RESTORED, BackupFile, CollectionHalf, GraphHalf
from lib.backup_set.members import ArchiveFacts, promised_snapshots
from lib.errors import BackupDamaged, MissingData
from lib.files import FULL_DISK, free_bytes, sha256_file
from lib.graph.client import ServerVersions, require_graph
from lib.graph.digest import GraphDigest, graph_digest
from lib.graph.engine import Engine, NoEngine, engine_for, scratch_server
from lib.graph.rdb import RdbFacts, inspect_rdb, require_rdb_checksum
from lib.graph.read import GraphCounts, GraphSchema, counts, schema
from lib.graph.scratch import Scratch
from lib.graph.swap import rename_graph
from lib.steps.compare_manifest import compare_collection, compare_graph, compare_rdb
from lib.steps.present import as_id, as_text
from lib.vectors.collection import vector_params
from lib.vectors.open_segments import Segments, opened_segments
from lib.vectors.snapshot_tar import SnapshotFacts, inspect_snapshot

_PAGE = 1000
_ROOM = 64 << 20  # what shall stay free beside the segments that are opened


@dataclass(frozen=True)
class GraphProof:
    """What the RDB holds. `counts`, `schema` and `digest` are None where no engine could load it."""

    level: str
    note: str
    rdb: RdbFacts
    counts: GraphCounts | None = None
    schema: GraphSchema | None = None
    digest: GraphDigest | None = None


@dataclass(frozen=True)
class CollectionProof:
    """What the archive holds, both tar levels read to the end."""

    level: str
    note: str
    archive: ArchiveFacts
    snapshot: SnapshotFacts


def check_file(path: Path, file: BackupFile) -> None:
    """The file is the one that the manifest names; raises BackupDamaged."""
    if not path.is_file():
        raise BackupDamaged(f"{path} is missing", next_step="use another backup: ls -l backups/")
    if path.stat().st_size != file.size:
        raise BackupDamaged(f"{path} has {path.stat().st_size} bytes, its manifest says {file.size}")
    if sha256_file(path) != file.sha256:
        raise BackupDamaged(
            f"{path} does not have the sha256 that its manifest gives: it was damaged or edited"
        )


def prove_graph(
    path: Path,
    graph: str,
    engines: list[Engine],
    *,
    half: GraphHalf | None = None,
    target: ServerVersions | None = None,
) -> GraphProof:
    """Prove an RDB as far as this machine can; raises BackupDamaged where it is not what it should be."""
    if half:
        check_file(path, half.file)
    facts = inspect_rdb(path)
    require_rdb_checksum(path, facts, expected_sha256=half.file.sha256 if half else "")
    if half:
        compare_rdb(path, half, facts)
    try:
        engine = engine_for(facts, engines, target)
    except NoEngine as error:
        return GraphProof(CHECKED, f"not loaded: {error}", facts)
    with loaded_graph(path, graph, engine, facts, half=half) as (proof, _scratch):
        return proof


@contextmanager
def loaded_graph(
    path: Path, graph: str, engine: Engine, facts: RdbFacts, *, half: GraphHalf | None = None
) -> Iterator[tuple[GraphProof, Scratch]]:
    """The RDB loaded by a scratch server that runs inside the block, counted, digested and compared."""
    with scratch_server(engine, path) as scratch:
        if facts.dumped_graph and facts.dumped_graph.startswith(f"{graph}__pre_"):
            rename_graph(scratch.conn, facts.dumped_graph, graph)  # a restore saved it under its safety name
        try:
            require_graph(scratch.conn, graph, scratch.address)
        except MissingData as error:
            raise BackupDamaged(f"{path} does not hold the graph '{graph}': {error}") from error
        proof = GraphProof(
            RESTORED,
            f"loaded by FalkorDB {engine.falkordb_version}",
            facts,
            counts(scratch.conn, graph),
            schema(scratch.conn, graph),
            graph_digest(scratch.conn, graph, by_id=True),
        )
        if half:
            compare_graph(path, half, proof)
        yield proof, scratch


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
    room = free_bytes(Path(tempfile.gettempdir())) >= 2 * archive.snapshot_size + _ROOM
    try:
        counted = _asked(path) if room and find_spec("qdrant_edge") else None
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        room, counted = False, None
    if counted is None:
        note = "checksum, both tar levels, configuration and ids"
        if not room:
            note += f"; no room in {tempfile.gettempdir()} to open its segments"
        return CollectionProof(CHECKED, note, archive, snapshot)
    return CollectionProof(RESTORED, f"{counted} points counted by Qdrant's own engine", archive, snapshot)


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


def with_proof(half: GraphHalf, proof: GraphProof) -> GraphHalf:
    """The half with what the proof found: counts and digest as the file holds them."""
    if proof.counts is None or proof.schema is None or proof.digest is None:
        return dataclasses.replace(half, proof=proof.level, proof_note=proof.note)
    return dataclasses.replace(
        half,
        proof=proof.level,
        proof_note=proof.note,
        nodes=proof.counts.nodes,
        relationships=proof.counts.relationships,
        labels=proof.counts.labels,
        types=proof.counts.types,
        indexes=proof.schema.indexes,
        constraints=proof.schema.constraints,
        digest=proof.digest.digest,
    )
