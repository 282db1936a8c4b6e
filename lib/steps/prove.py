"""The one proof: is this file what a restore needs? Used by backup, `--check` and restore alike; here: of a graph.

`checked`: the bytes are those that were written (sha256 or the RDB's own CRC), the structure is whole.
`restored`: it was also loaded: the RDB by a scratch FalkorDB, counted and digested; the segments by the engine.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from lib.backup_set.manifest import CHECKED, RESTORED, BackupFile, GraphHalf
from lib.errors import BackupDamaged, MissingData
from lib.files import free_bytes, sha256_file
from lib.graph.client import ServerVersions, require_graph
from lib.graph.digest import GraphDigest, graph_digest
from lib.graph.engine import Engine, NoEngine, engine_for, scratch_server
from lib.graph.rdb import RdbFacts, inspect_rdb, require_rdb_checksum
from lib.graph.read import GraphCounts, GraphSchema, counts, schema
from lib.graph.scratch import Scratch, ScratchFailed
from lib.graph.swap import dump_apart, rename_graph
from lib.memory import free_memory
from lib.steps.compare_manifest import compare_graph, compare_rdb

_SERVER = 32 << 20  # memory of a FalkorDB without data
_LOG = 1 << 20  # what its folder takes


@dataclass(frozen=True)
class GraphProof:
    """What the RDB holds. `counts`, `schema` and `digest` are None where no engine could load it."""

    level: str
    note: str
    rdb: RdbFacts
    counts: GraphCounts | None = None
    schema: GraphSchema | None = None
    digest: GraphDigest | None = None


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
    progress: Callable[[int], None] | None = None,
    on_loaded: Callable[[redis.Redis], None] | None = None,
) -> GraphProof:
    """Prove an RDB as far as this machine can; raises BackupDamaged where it is not what it should be.

    `progress` gets the nodes and relationships read so far, `on_loaded` the scratch server where one has loaded it.
    """
    if half:
        check_file(path, half.file)
    facts = inspect_rdb(path)
    require_rdb_checksum(path, facts, expected_sha256=half.file.sha256 if half else "")
    if half:
        compare_rdb(path, half, facts)
    try:
        engine = engine_for(facts, engines, target)
    except NoEngine as error:
        return GraphProof(CHECKED, f"not loaded: {error}; {error.next_step}", facts)
    lacking = machine_lacks(facts)
    if lacking:
        return GraphProof(CHECKED, f"not loaded: {lacking}", facts)
    try:
        with loaded_graph(path, graph, engine, facts, half=half, progress=progress) as (proof, scratch):
            if on_loaded:
                on_loaded(scratch.conn)
            return proof
    except ScratchFailed as error:
        return GraphProof(CHECKED, f"not loaded: {error}", facts)


def machine_lacks(facts: RdbFacts) -> str:
    """What this machine lacks to load the file, empty where nothing: known before a server is started.

    A server that loads a file takes what the one that wrote it did, as seen on 4.16.3 and 4.22.1; where the file does
    not tell, ten times its size.
    """
    need = _SERVER + (facts.memory * 5 // 4 or facts.size * 10)
    memory, place = free_memory(), Path(tempfile.gettempdir())
    if memory is not None and memory < need:
        return f"{memory >> 20} MiB of memory are free, a scratch FalkorDB may need {need >> 20}"
    return f"no room in {place}" if free_bytes(place) < _LOG else ""


@contextmanager
def loaded_graph(
    path: Path,
    graph: str,
    engine: Engine,
    facts: RdbFacts,
    *,
    half: GraphHalf | None = None,
    dump: tuple[str, list[bytes]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[GraphProof, Scratch]]:
    """The RDB loaded by a scratch server that runs inside the block, counted, digested and compared.

    `dump` is a name and a list: the list gets the payload of a DUMP under that name, taken while the graph is read.
    """
    with scratch_server(engine, path) as scratch:
        if facts.dumped_graph and facts.dumped_graph.startswith((f"{graph}__pre_", f"{{{graph}}}__pre_")):
            rename_graph(scratch.conn, facts.dumped_graph, graph)  # a restore saved it under its safety name
        try:
            require_graph(scratch.conn, graph, scratch.address)
        except MissingData as error:
            raise BackupDamaged(f"{path} does not hold the graph '{graph}': {error}") from error
        if dump:
            rename_graph(scratch.conn, graph, dump[0])
            with ThreadPoolExecutor(1) as beside:
                payload = beside.submit(dump_apart, scratch.address, dump[0])
                proof = _read(scratch, dump[0], engine, facts, progress)
                dump[1].append(payload.result())
            rename_graph(scratch.conn, dump[0], graph)
        else:
            proof = _read(scratch, graph, engine, facts, progress)
        if half:
            compare_graph(path, half, proof)
        yield proof, scratch


def _read(
    scratch: Scratch,
    name: str,
    engine: Engine,
    facts: RdbFacts,
    progress: Callable[[int], None] | None,
) -> GraphProof:
    return GraphProof(
        RESTORED,
        f"loaded by FalkorDB {engine.falkordb_version}",
        facts,
        counts(scratch.conn, name),
        schema(scratch.conn, name),
        graph_digest(scratch.conn, name, by_id=True, progress=progress),
    )


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
