"""The graph component: taken over the replication protocol, and verified by loading it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import redis

from lib.backup import manifest as manifests
from lib.backup.manifest import BackupFile, GraphComponent, check_file, checking_file, require_equal
from lib.backup.points import TemporaryIdTable, ids_for_points
from lib.child_process import free_memory
from lib.clients.falkordb import connection
from lib.clients.falkordb.digest import GraphDigest, graph_digest
from lib.clients.falkordb.psync import PsyncRefused, RdbNotMade, SaveHangs, stream_rdb
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
from lib.clients.falkordb.swap import dump_graph, rename_graph
from lib.concurrency import CancelToken, Progress
from lib.errors import AccessRefused, BackupDamaged, UsageProblem, listed
from lib.files import PassThrough, atomic_writer, free_bytes, private_dir

_SERVER_BYTES = 32 << 20  # memory of a FalkorDB without data
_LOG_BYTES = 1 << 20  # what its folder takes


@dataclass(frozen=True)
class GraphVerification:
    """What the RDB holds. `counts`, `schema` and `digest` are None if no engine loaded it."""

    level: str
    note: str
    counts: GraphCounts | None = None
    schema: GraphSchema | None = None
    digest: GraphDigest | None = None

    @property
    def contents(self) -> dict[str, Any]:
        """The fields of a component that describe the loaded graph; none if it was not loaded."""
        if self.counts is None or self.schema is None or self.digest is None:
            return {}
        return _contents(self.counts, self.schema, self.digest.digest)


def _contents(seen: GraphCounts, definitions: GraphSchema, digest: str) -> dict[str, Any]:
    return vars(seen) | {"indexes": definitions.indexes, "constraints": definitions.constraints, "digest": digest}


def verify_graph(
    path: Path,
    component: GraphComponent,
    engines: list[Engine],
    *,
    stop: CancelToken | None = None,
    ids: TemporaryIdTable | None = None,
) -> GraphVerification:
    """Verify an RDB as far as this machine can. Raises BackupDamaged.

    If it is loaded, `ids` is filled with the ids of its memories that should have a point.
    """
    facts = inspect_backup(path, component.file)
    compare_rdb(path, component, facts)
    try:
        engine, why_not = engine_for(facts, engines, None), machine_lacks(facts)
        if not why_not:
            with loaded_graph(path, component.graph, engine, facts, component=component, stop=stop) as (found, scratch):
                if ids is not None:
                    ids.fill(ids_for_points(scratch.conn, component.graph))
                return found
    except NoEngine as error:
        why_not = f"{error}; {' '.join(error.next_step.splitlines())}"
    except ScratchFailed as error:
        why_not = str(error)
    return GraphVerification(manifests.CHECKED, f"not loaded: {why_not}")


def inspect_backup(path: Path, file: BackupFile | None) -> RdbFacts:
    """Read an RDB once. Raises BackupDamaged if its manifest's sha256, or without one its own checksum, differs."""
    with checking_file(path, file):
        facts = inspect_rdb(path)
    if file:
        check_file(path, file, facts.sha256)
    else:
        require_rdb_checksum(path, facts)
    return facts


def compare_rdb(path: Path, component: GraphComponent, facts: RdbFacts) -> None:
    """Compare the RDB's own fields, which need no engine, with the manifest. Raises BackupDamaged."""
    actual = {"kind": "dump" if facts.dumped_graph else "rdb"}
    if facts.redis_version:
        actual["redis"] = facts.redis_version
    require_equal(path, {"kind": component.kind, "redis": component.server["redis"]}, actual)


def compare_graph(path: Path, component: GraphComponent, found: GraphVerification) -> None:
    """Compare counts, definitions and digest of the loaded graph with the manifest. Raises BackupDamaged.

    Nothing is compared for a component that was only `checked`: writes to the source may have changed its counts.
    """
    if component.digest or component.proof == manifests.RESTORED:
        require_equal(path, vars(component), found.contents)


def machine_lacks(facts: RdbFacts) -> str:
    """What this machine lacks to load the file, or an empty text.

    A server needs as much memory as the one that wrote the file (seen on 4.16.3 and 4.22.1); if the file does not
    record that, ten times its size.
    """
    need = _SERVER_BYTES + (facts.memory * 5 // 4 or facts.size * 10)
    memory, folder = free_memory(), Path(tempfile.gettempdir())
    if memory is not None and memory < need:
        return f"{memory >> 20} MiB of memory are free, a scratch FalkorDB may need {need >> 20}"
    return f"no room in {folder}" if free_bytes(folder) < _LOG_BYTES else ""


@contextmanager
def loaded_graph(
    path: Path,
    graph: str,
    engine: Engine,
    facts: RdbFacts,
    *,
    component: GraphComponent | None = None,
    digest: str = "",
    stop: CancelToken | None = None,
) -> Iterator[tuple[GraphVerification, Scratch]]:
    """Load the RDB into a scratch server, which runs inside the block; count, digest and compare the graph.

    A known `digest` is not computed. Raises BackupDamaged, ScratchFailed, UsageProblem if the file is of another graph.
    """
    with scratch_server(engine, path, stop=stop) as scratch:
        if facts.dumped_graph and facts.dumped_graph.startswith((f"{graph}__pre_", f"{{{graph}}}__pre_")):
            rename_graph(scratch.conn, facts.dumped_graph, graph)  # a restore saved it under its safety name
        held = connection.list_graphs(scratch.conn)
        if graph not in held and component and component.graph == graph:
            raise BackupDamaged(f"{path} does not hold the graph '{graph}', which its manifest names")
        if graph not in held:
            raise UsageProblem(
                f"{path} does not hold the graph '{graph}' (FALKORDB_GRAPH); it holds: {listed(held) or 'none'}",
                next_step="set FALKORDB_GRAPH to the graph that is to be restored, or name another file",
            )
        found = read_loaded(scratch, graph, engine, digest=digest)
        if component:
            compare_graph(path, component, found)
        yield found, scratch


def read_loaded(scratch: Scratch, name: str, engine: Engine, *, digest: str = "") -> GraphVerification:
    """Count the graph that a scratch server holds, read its definitions, and compute its digest unless it is known."""
    seen, definitions = counts(scratch.conn, name), schema(scratch.conn, name)
    known = GraphDigest(digest, seen.nodes, seen.relationships) if digest else None
    whole = known or graph_digest(scratch.conn, name)
    note = f"loaded by FalkorDB {engine.falkordb_version}"
    return GraphVerification(manifests.RESTORED, note, seen, definitions, whole)


@dataclass(frozen=True)
class GraphSource:
    """An opened FalkorDB and the graph in it."""

    address: connection.GraphAddress
    conn: redis.Redis
    graph: str


def take_graph(
    source: GraphSource,
    folder: Path,
    stamp: str,
    engines: list[Engine],
    *,
    verify: bool = True,
    at_once: bool = False,
    progress: Progress = lambda _size: None,
    stop: CancelToken | None = None,
    ids: TemporaryIdTable | None = None,
) -> GraphComponent:
    """Write `falkordb/<graph>_<stamp>.rdb` below `folder` and verify it.

    The graph is saved as it was at the first call of `progress`. `at_once`: with DUMP, which blocks the server for a
    moment, because a server waits 5 s by default before it sends an RDB. `ids`: see `verify_graph`. Raises MissingData
    if the graph is absent, BackupDamaged.
    """
    connection.require_graph(source.conn, source.graph)
    path = private_dir(folder / manifests.GRAPH_DIR) / f"{source.graph}_{stamp}.rdb"
    contents = _contents(counts(source.conn, source.graph), schema(source.conn, source.graph), "")
    versions, expires = connection.server_versions(source.conn), connection.expires_at(source.conn, source.graph)
    why_dump = "no wait for an RDB before a restore" if at_once else _why_dump(versions, engines, expires)
    size, sha256, why_dump = _write_rdb(source, path, progress, stop, why_dump)
    component = GraphComponent(
        file=BackupFile(f"{manifests.GRAPH_DIR}/{path.name}", size, sha256),
        kind="dump" if why_dump else "rdb",
        graph=source.graph,
        server={"address": source.address.display, "redis": versions.redis, "falkordb": versions.falkordb},
        proof=manifests.UNVERIFIED,
        proof_note="--no-verify",
        expires=expires,
        functions=connection.function_libraries(source.conn),
        **contents,
    )
    if verify:
        found = verify_graph(path, component, engines, stop=stop, ids=ids)
        component = replace(component, proof=found.level, proof_note=found.note, **found.contents)
    if why_dump:
        component = replace(component, proof_note=f"{component.proof_note}; taken with DUMP: {why_dump}")
    return component


def _write_rdb(
    source: GraphSource, path: Path, progress: Callable[[int], None], stop: CancelToken | None, why_dump: str
) -> tuple[int, str, str]:
    """Write the replication stream, or a DUMP. Returns bytes, sha256, and why it is a DUMP ("" for the stream)."""
    if why_dump:
        with suppress(AccessRefused):
            return *write_dump(source.conn, source.graph, path, progress), why_dump
    try:
        with atomic_writer(path) as stream:
            size, sha256 = stream_rdb(source.address, stream.write, progress=progress, stop=stop)
        return size, sha256, ""
    except PsyncRefused:
        why_dump = "its RDB is refused"
    except RdbNotMade as error:
        if not (isinstance(error, SaveHangs) or connection.save_failure(source.conn)):
            raise  # the connection broke
        why_dump = str(error)
    return *write_dump(source.conn, source.graph, path, progress), why_dump


def _why_dump(versions: connection.ServerVersions, engines: list[Engine], expires: str) -> str:
    """Why an RDB of the whole server could not be loaded here, now or later; "" if it can."""
    if not reads_from(versions, engines):
        return "no engine here loads what this server writes"
    if foreign := foreign_modules(versions, engines):
        return f"the server also has the redis module {', '.join(foreign)}, whose data no engine here loads"
    return f"its key expires at {expires}, and no engine loads it from an RDB after that" if expires else ""


def write_dump(
    conn: redis.Redis, graph: str, path: Path, progress: Callable[[int], None] = lambda _size: None
) -> tuple[int, str]:
    """Write a DUMP of the graph as an RDB. Returns bytes and sha256. `progress` gets the bytes of each piece."""
    payload, digest = dump_graph(conn, graph), hashlib.sha256()
    with atomic_writer(path) as stream:
        out = PassThrough(stream, digest.update)
        for chunk in wrap_dump(payload, graph):
            out.write(chunk)
            progress(len(chunk))
    return out.size, digest.hexdigest()
