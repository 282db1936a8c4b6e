"""The graph component: taken over the replication protocol, and verified by loading it."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson
import redis

from lib.backup.manifest import (
    CHECKED,
    GRAPH_DIR,
    RESTORED,
    UNVERIFIED,
    BackupFile,
    CollectionComponent,
    GraphComponent,
    Manifest,
)
from lib.child_process import free_memory
from lib.clients.falkordb.connection import (
    GraphAddress,
    ServerVersions,
    expires_at,
    function_libraries,
    require_graph,
    save_failure,
    server_versions,
)
from lib.clients.falkordb.digest import GraphDigest, graph_digest
from lib.clients.falkordb.psync import PsyncRefused, RdbNotMade, stream_rdb
from lib.clients.falkordb.queries import GraphCounts, GraphSchema, counts, schema
from lib.clients.falkordb.rdb import RdbFacts, inspect_rdb, require_rdb_checksum, wrap_dump
from lib.clients.falkordb.scratch import (
    Engine,
    NoEngine,
    Scratch,
    ScratchFailed,
    engine_for,
    foreign_modules,
    reads_from,
    scratch_server,
)
from lib.clients.falkordb.swap import dump_graph, dump_separately, rename_graph
from lib.concurrency import CancelToken, Progress, steps_of
from lib.errors import AccessRefused, BackupDamaged, MissingData
from lib.files import atomic_writer, free_bytes, private_dir, sha256_file
from lib.journal import STAMP_FORMAT

_COLLECTION = (
    "collection",
    "server",
    "points",
    "size",
    "distance",
    "payload_schema",
    "aliases",
    "model",
    "model_known",
)
_SNAPSHOT = ("nodes", "snapshot_name", "snapshot_size", "snapshot_sha256", "promised_ids")


def compare_names(manifest: Manifest) -> None:
    """The set's time is the same in the manifest, its name and its files' names; raises BackupDamaged."""
    assert manifest.path is not None
    created = datetime.fromisoformat(manifest.created).astimezone(timezone.utc)
    said = {"its own name": manifest.path.name, "created": f"{created:{STAMP_FORMAT}}"}
    said |= {component.file.name: component.file.name for component in manifest.components}
    for name, text in said.items():
        if manifest.stamp not in text:
            raise BackupDamaged(
                f"{manifest.path} was edited or renamed: stamp {manifest.stamp}, but {name}: {text}"
            )


def compare_rdb(path: Path, component: GraphComponent, facts: RdbFacts) -> None:
    """What the RDB says of itself without being loaded; raises BackupDamaged."""
    kind = "dump" if facts.dumped_graph else "rdb"
    told = facts.redis_version or component.server["redis"]
    _require_equal(
        path, {"kind": component.kind, "redis": component.server["redis"]}, {"kind": kind, "redis": told}
    )


def compare_graph(path: Path, component: GraphComponent, found: GraphVerification) -> None:
    """Counts, definitions and digest of the loaded graph, where the backup counted the file itself.

    A half that was only `checked` then has the source's counts, which writes may have changed before the RDB was
    taken. Raises BackupDamaged.
    """
    if not component.digest and component.proof != RESTORED:
        return
    assert found.counts is not None
    assert found.schema is not None
    assert found.digest is not None
    actual = {
        "nodes": found.counts.nodes,
        "relationships": found.counts.relationships,
        "labels": found.counts.labels,
        "types": found.counts.types,
        "indexes": found.schema.indexes,
        "constraints": found.schema.constraints,
        "digest": found.digest.digest,
    }
    _require_equal(path, {name: getattr(component, name) for name in actual}, actual)


def compare_collection(path: Path, component: CollectionComponent, facts: Mapping[str, Any]) -> None:
    """The manifest's half and the archive's own facts, with `size` and `distance`; raises BackupDamaged."""
    names = [name for name in (*_COLLECTION, *_SNAPSHOT) if name in facts]
    _require_equal(path, {name: getattr(component, name) for name in names}, facts)


def _require_equal(path: Path, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if orjson.loads(orjson.dumps(actual[name])) != orjson.loads(orjson.dumps(value)):
            raise BackupDamaged(
                f"{path}: {name} is {_short(actual[name])}, its manifest says {_short(value)}"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


_SERVER = 32 << 20  # memory of a FalkorDB without data
_LOG = 1 << 20  # what its folder takes


@dataclass(frozen=True)
class GraphVerification:
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


def verify_graph(
    path: Path,
    graph: str,
    engines: list[Engine],
    component: GraphComponent | None = None,
    *,
    target: ServerVersions | None = None,
    progress: Callable[[int], None] | None = None,
    on_loaded: Callable[[redis.Redis], None] | None = None,
) -> GraphVerification:
    """Prove an RDB as far as this machine can; raises BackupDamaged where it is not what it should be.

    `progress` gets the nodes and relationships read so far, `on_loaded` the scratch server where one has loaded it.
    """
    if component:
        check_file(path, component.file)
    facts = inspect_rdb(path)
    require_rdb_checksum(path, facts, expected_sha256=component.file.sha256 if component else "")
    if component:
        compare_rdb(path, component, facts)
    try:
        engine = engine_for(facts, engines, target)
    except NoEngine as error:
        return GraphVerification(CHECKED, f"not loaded: {error}; {error.next_step}", facts)
    lacking = machine_lacks(facts)
    if lacking:
        return GraphVerification(CHECKED, f"not loaded: {lacking}", facts)
    try:
        with loaded_graph(path, graph, engine, facts, component=component, progress=progress) as (
            proof,
            scratch,
        ):
            if on_loaded:
                on_loaded(scratch.conn)
            return proof
    except ScratchFailed as error:
        return GraphVerification(CHECKED, f"not loaded: {error}", facts)


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
    component: GraphComponent | None = None,
    dump: tuple[str, list[bytes]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[GraphVerification, Scratch]]:
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
                payload = beside.submit(dump_separately, scratch.address, dump[0])
                proof = _read(scratch, dump[0], engine, facts, progress)
                dump[1].append(payload.result())
            rename_graph(scratch.conn, dump[0], graph)
        else:
            proof = _read(scratch, graph, engine, facts, progress)
        if component:
            compare_graph(path, component, proof)
        yield proof, scratch


def _read(
    scratch: Scratch,
    name: str,
    engine: Engine,
    facts: RdbFacts,
    progress: Callable[[int], None] | None,
) -> GraphVerification:
    return GraphVerification(
        RESTORED,
        f"loaded by FalkorDB {engine.falkordb_version}",
        facts,
        counts(scratch.conn, name),
        schema(scratch.conn, name),
        graph_digest(scratch.conn, name, by_id=True, progress=progress),
    )


def with_verification(component: GraphComponent, proof: GraphVerification) -> GraphComponent:
    """The half with what the proof found: counts and digest as the file holds them."""
    if proof.counts is None or proof.schema is None or proof.digest is None:
        return dataclasses.replace(component, proof=proof.level, proof_note=proof.note)
    return dataclasses.replace(
        component,
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


@dataclass(frozen=True)
class GraphSource:
    """An opened FalkorDB and the graph in it."""

    address: GraphAddress
    conn: redis.Redis
    graph: str


def take_graph(
    source: GraphSource,
    folder: Path,
    stamp: str,
    engines: list[Engine],
    *,
    verify: bool = True,
    progress: Progress | None = None,
    stop: CancelToken | None = None,
    on_loaded: Callable[[redis.Redis], None] | None = None,
) -> GraphComponent:
    """Write `falkordb/<graph>_<stamp>.rdb` below `folder` and prove it.

    The file appears under its name only when it is whole; from the first `progress` on its moment is fixed. `stop`
    ends it from another thread (Cancelled, or what a connection that hung up raises); `on_loaded` gets the scratch
    server that has loaded the file. Raises MissingData where the graph is absent.
    """
    require_graph(source.conn, source.graph, source.address)
    path = private_dir(folder / GRAPH_DIR) / f"{source.graph}_{stamp}.rdb"
    seen, plan = counts(source.conn, source.graph), schema(source.conn, source.graph)
    versions, expires = server_versions(source.conn), expires_at(source.conn, source.graph)
    why_dump = _why_dump(versions, engines, expires)
    taken = _taken(source, path, _told(progress), stop, why_dump)
    component = GraphComponent(
        file=BackupFile(f"{GRAPH_DIR}/{path.name}", taken.size, taken.sha256),
        kind=taken.kind,
        graph=source.graph,
        server={"address": source.address.display, "redis": versions.redis, "falkordb": versions.falkordb},
        nodes=seen.nodes,
        relationships=seen.relationships,
        labels=seen.labels,
        types=seen.types,
        indexes=plan.indexes,
        constraints=plan.constraints,
        digest="",
        proof=UNVERIFIED,
        proof_note="--no-verify",
        expires=expires,
        functions=function_libraries(source.conn),
    )
    if verify:
        watch = (lambda _done: stop.check()) if stop else None
        found = verify_graph(path, source.graph, engines, component, progress=watch, on_loaded=on_loaded)
        component = with_verification(component, found)
    return replace(component, proof_note="; ".join(filter(None, (component.proof_note, taken.why))))


@dataclass(frozen=True)
class _Taken:
    """The file: its kind, bytes and sha256, and why it is a DUMP."""

    kind: str
    size: int
    sha256: str
    why: str = ""


def _taken(
    source: GraphSource,
    path: Path,
    tell: Callable[[int], None] | None,
    stop: CancelToken | None,
    why_dump: str,
) -> _Taken:
    """The replication stream; DUMP if that is refused, or if there is a reason for it from the start."""
    if why_dump:
        with suppress(AccessRefused):
            return _dumped(source, path, tell, why_dump)
    try:
        with atomic_writer(path) as stream:
            moved = stream_rdb(source.address, stream.write, progress=tell, stop=stop)
        return _Taken("rdb", moved.size, moved.sha256)
    except PsyncRefused:
        return _dumped(source, path, tell, "its RDB is refused")
    except RdbNotMade as error:
        if not save_failure(source.conn):
            raise  # the connection broke
        return _dumped(source, path, tell, str(error))


def _why_dump(versions: ServerVersions, engines: list[Engine], expires: str) -> str:
    """Why an RDB of the whole server could not be loaded here, now or later; "" if it can."""
    if not reads_from(versions, engines):
        return "no engine here loads what this server writes"
    if foreign := foreign_modules(versions, engines):
        return f"the server also has the redis module {', '.join(foreign)}, whose data no engine here loads"
    return f"its key expires at {expires}, and no engine loads it from an RDB after that" if expires else ""


def _dumped(source: GraphSource, path: Path, tell: Callable[[int], None] | None, why: str) -> _Taken:
    digest, size = hashlib.sha256(), 0
    payload = dump_graph(source.conn, source.graph)
    with atomic_writer(path) as stream:
        for chunk in wrap_dump(payload, source.graph):
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if tell:
                tell(size)
    return _Taken("dump", size, digest.hexdigest(), f"taken with DUMP: {why}")


def _told(progress: Progress | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    steps = steps_of(progress)
    return lambda done: steps(done, 0)
