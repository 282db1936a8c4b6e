"""The graph half of a backup: the replication stream into a file, proved by loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import redis

from lib.backup_set.manifest import UNPROVED, BackupFile, GraphHalf
from lib.backup_set.sets import GRAPH_DIR
from lib.files import atomic_writer, private_dir
from lib.graph.client import GraphAddress, require_graph, server_versions
from lib.graph.engine import Engine
from lib.graph.psync import PsyncRefused, stream_rdb
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
) -> GraphHalf:
    """Write `falkordb/<graph>_<stamp>.rdb` below `folder` and prove it.

    The file appears under its name only when it is whole; from the first `progress` on its moment is fixed. `stop`
    ends it from another thread (Stopped, or what a connection that hung up raises). Raises MissingData where the
    graph is absent.
    """
    require_graph(source.conn, source.graph, source.address)
    path = private_dir(folder / GRAPH_DIR) / f"{source.graph}_{stamp}.rdb"
    seen, plan = counts(source.conn, source.graph), schema(source.conn, source.graph)
    versions = server_versions(source.conn)
    kind, size, sha256 = _transfer(source, path, progress, stop)
    half = GraphHalf(
        file=BackupFile(f"{GRAPH_DIR}/{path.name}", size, sha256),
        kind=kind,
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
    )
    if not verify:
        return half
    return with_proof(half, prove_graph(path, source.graph, engines, half=half))


def _transfer(
    source: GraphSource, path: Path, progress: Progress | None, stop: Stop | None
) -> tuple[str, int, str]:
    steps = steps_of(progress) if progress else None
    tell = (lambda done: steps(done, 0)) if steps else None
    try:
        with atomic_writer(path) as stream:
            moved = stream_rdb(source.address, stream.write, progress=tell, stop=stop)
        return "rdb", moved.size, moved.sha256
    except PsyncRefused:
        import hashlib

        digest, size = hashlib.sha256(), 0
        with atomic_writer(path) as stream:
            for chunk in wrap_dump(dump_graph(source.conn, source.graph), source.graph):
                stream.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                if tell:
                    tell(size)
        return "dump", size, digest.hexdigest()
