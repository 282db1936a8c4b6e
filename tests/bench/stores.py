"""The stores that are measured, loaded with samples: FalkorDB, and the stand-in or a real Qdrant."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource
from lib.clients.falkordb.connection import connect, server_versions
from lib.clients.qdrant.transport import Qdrant
from lib.dimensions import EmbeddingSpec
from tests.bench.figures import load
from tests.bench.peak import ROOT
from tests.real_qdrant import RealQdrant, test_server
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.qdrant_server.process import QdrantServer
from tests.sandbox.sample_loading import load_graph, load_points
from tests.sandbox.sample_memories import generate

GRAPH = "memories"
MODEL = "text-embedding-3-small"


@contextlib.contextmanager
def graph_source(folder: Path, memories: int, sync_delay_seconds: int | None = 0) -> Iterator[GraphSource]:
    """A FalkorDB with sample memories; it waits `sync_delay_seconds` before it sends an RDB (None: its default, 5)."""
    server = FalkorServer(folder / "falkordb", sync_delay_seconds=sync_delay_seconds)
    server.start()
    try:
        with connect(server.address) as conn:
            load_graph(conn, GRAPH, generate(memories))
            yield GraphSource(server.address, conn, GRAPH)
    finally:
        server.stop()


@contextlib.contextmanager
def collection_source(folder: Path, points: int, size: int) -> Iterator[CollectionSource]:
    """A Qdrant with sample points and vectors of noise; the collection is removed from a server that stays."""
    name = f"bench_{os.getpid()}"
    noise = np.random.default_rng(1)

    def embed(texts: Sequence[str]) -> Any:
        rows = noise.standard_normal((len(texts), size)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    with running_qdrant(folder) as url:
        qdrant = Qdrant(url)
        load_points(url, "", name, size, embed, generate(points))
        try:
            yield CollectionSource(qdrant, name, EmbeddingSpec("", MODEL, size))
        finally:
            qdrant.json("DELETE", f"/collections/{name}")


@contextlib.contextmanager
def running_qdrant(folder: Path) -> Iterator[str]:
    """QDRANT_TEST_URL, else a server started from QDRANT_TEST_SERVER, else the stand-in."""
    binary = test_server()
    if os.environ.get("QDRANT_TEST_URL"):
        yield os.environ["QDRANT_TEST_URL"]
    elif binary:
        with RealQdrant(binary, folder / "qdrant") as real:
            yield real.url
    else:
        with QdrantServer(folder / "qdrant") as stand_in:
            yield stand_in.url


def run_script(name: str, *words: str, environ: Mapping[str, str], folder: Path) -> str:
    """What `scripts/<name>.py` with these words prints. Raises RuntimeError with its errors if it fails."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *words]
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in {0, 3}:  # 3: the samples lack some points, which is reported
        raise RuntimeError(f"{name}.py: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def on_graph(source: GraphSource, memories: int) -> str:
    """The server, how much it holds, and how busy the machine was."""
    return f"FalkorDB {server_versions(source.conn).falkordb}, {memories:,} memories; {load()}"


def on_qdrant(qdrant: Qdrant, points: int, size: int) -> str:
    """The server or stand-in, how much it holds, and how busy the machine was."""
    real = os.environ.get("QDRANT_TEST_URL") or test_server()
    return f"Qdrant{'' if real else ' stand-in'} {qdrant.version()}, {points:,} x {size}; {load()}"
