"""The graph half of a backup: the replication stream into a file, proved by loading it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import redis

from lib.backup_set.manifest import GRAPH_DIR, UNPROVED, BackupFile, GraphHalf
from lib.errors import AccessRefused
from lib.files import atomic_writer, private_dir
from lib.graph.client import (
    GraphAddress,
    ServerVersions,
    expires_at,
    function_libraries,
    require_graph,
    save_trouble,
    server_versions,
)
from lib.graph.engine import Engine, foreign_modules, reads_from
from lib.graph.psync import PsyncRefused, RdbNotMade, stream_rdb
from lib.graph.rdb import wrap_dump
from lib.graph.read import counts, schema
from lib.graph.swap import dump_graph
from lib.steps.progress import Progress, steps_of
from lib.steps.prove import prove_graph, with_proof
from lib.stopping import Stop


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
    stop: Stop | None = None,
    on_loaded: Callable[[redis.Redis], None] | None = None,
) -> GraphHalf:
    """Write `falkordb/<graph>_<stamp>.rdb` below `folder` and prove it.

    The file appears under its name only when it is whole; from the first `progress` on its moment is fixed. `stop`
    ends it from another thread (Stopped, or what a connection that hung up raises); `on_loaded` gets the scratch
    server that has loaded the file. Raises MissingData where the graph is absent.
    """
    require_graph(source.conn, source.graph, source.address)
    path = private_dir(folder / GRAPH_DIR) / f"{source.graph}_{stamp}.rdb"
    seen, plan = counts(source.conn, source.graph), schema(source.conn, source.graph)
    versions, expires = server_versions(source.conn), expires_at(source.conn, source.graph)
    why_dump = _why_dump(versions, engines, expires)
    taken = _taken(source, path, _told(progress), stop, why_dump)
    half = GraphHalf(
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
        proof=UNPROVED,
        proof_note="--no-verify",
        expires=expires,
        functions=function_libraries(source.conn),
    )
    if verify:
        watch = (lambda _done: stop.check()) if stop else None
        proof = prove_graph(path, source.graph, engines, half=half, progress=watch, on_loaded=on_loaded)
        half = with_proof(half, proof)
    return replace(half, proof_note="; ".join(filter(None, (half.proof_note, taken.why))))


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
    stop: Stop | None,
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
        if not save_trouble(source.conn):
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
