"""The whole commands over both stores: bytes moved, time from afar, and time on this machine against the bare transfers.

Both stores are behind a proxy that counts, and delays (tests/far_proxy.py). A ratio of bytes is what the command moved,
in both directions and of both stores, over what it needs; both in MB. `far` is 40 ms each way without a limit of the
rate, `far_5mb` also 5 MB/s each way; their reference is the bare transfer of the same data over the same proxies. An
RDB is sent without FalkorDB's wait before it. BENCH_QUICK=1 takes a small part of the data.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import redis
from isal import igzip

from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource
from lib.clients.embeddings.cache_file import chunks
from lib.clients.falkordb.connection import GraphAddress, connect
from lib.clients.falkordb.queries import iter_memories, nodes, pages
from lib.clients.falkordb.swap import drop_graph, dump_as
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.collection import delete_collection, wait_green
from lib.clients.qdrant.points import scroll
from lib.clients.qdrant.snapshots import unique_filename, upload_and_restore
from lib.clients.qdrant.transport import Qdrant, encode
from lib.files import private_dir
from tests.bench.absent_bench import seconds_of_upload
from tests.bench.cheap_endpoint import CheapEndpoint
from tests.bench.figures import PAIRS, Figure, at_most, seconds_of
from tests.bench.references import raw_rdb, raw_snapshot
from tests.bench.stores import GRAPH, MODEL, collection_source, graph_source, on_qdrant, run_script
from tests.far_proxy import FarProxy
from tests.sandbox.openai_server import OpenAIServer
from tests.sandbox.sample_memories import generate

QUICK = bool(os.environ.get("BENCH_QUICK"))
MEMORIES, RUNS = (1_000, 1) if QUICK else (10_000, PAIRS)
VERIFIED = (1_000,) if QUICK else (10_000, 100_000)
SIZE, LARGE_SIZE, LARGE_MODEL = 768, 3072, "text-embedding-3-large"
DELAY_SECONDS, BYTES_A_SECOND = 0.04, 5_000_000
LINES = {"far": None, "far_5mb": BYTES_A_SECOND}  # the rates
REST_SECONDS, FLUSHED_SECONDS = 1800.0, 7.0  # the index is built; the log is flushed each 5 s, by default
# The same address as 127.0.0.1, but not one that the scripts take for this machine: to a far server they compress.
FAR_HOST = "127.1"
MB = 1e6


@dataclass(frozen=True)
class Far:
    """Both stores as they are on this machine, and as the scripts reach them: through proxies."""

    graph: GraphSource
    points: CollectionSource
    falkordb: FarProxy
    qdrant: FarProxy
    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        """The settings of the scripts."""
        return {
            **{key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ},
            "HOME": str(self.folder),
            "FALKORDB_HOST": FAR_HOST,
            "FALKORDB_PORT": str(self.falkordb.port),
            "FALKORDB_GRAPH": self.graph.graph,
            "QDRANT_URL": f"http://{FAR_HOST}:{self.qdrant.port}",
            "QDRANT_COLLECTION": self.points.collection,
            "VECTOR_SIZE": str(SIZE),
            "EMBEDDING_MODEL": MODEL,
            "AUTOMEM_API_URL": "http://127.0.0.1:1",
            "AUTOMEM_BACKUP_DIR": str(self.folder / "backups"),
        }

    @property
    def here(self) -> dict[str, str]:
        """The settings with which the scripts go past the proxies."""
        address = self.graph.address
        return {
            "FALKORDB_HOST": address.host,
            "FALKORDB_PORT": str(address.port),
            "QDRANT_URL": self.points.qdrant.base_url,
        }

    def run(self, script: str, *words: str, **settings: str) -> str:
        """What the script prints."""
        return run_script(script, "-q", *words, environ={**self.environ, **settings}, folder=self.folder)

    def rest(self) -> None:
        """Wait until the collection is indexed and its log flushed: else a snapshot contains a log to replay."""
        wait_green(self.points.qdrant, self.points.collection, REST_SECONDS)
        time.sleep(FLUSHED_SECONDS)

    @contextlib.contextmanager
    def bare(self) -> Iterator[tuple[redis.Redis, CollectionSource]]:
        """Clients that go through the proxies, for the references."""
        with connect(GraphAddress(FAR_HOST, self.falkordb.port)) as conn:
            yield conn, CollectionSource(Qdrant(self.environ["QDRANT_URL"]), self.points.collection, self.points.spec)

    def moved_by(self, work: Callable[[], object]) -> int:
        """Bytes in both directions, of both stores."""
        before = self.falkordb.moved + self.qdrant.moved
        work()
        return self.falkordb.moved + self.qdrant.moved - before

    def bytes_of_ids(self) -> int:
        """Bytes of one read of the collection's ids."""
        with self.bare() as (_, points):
            return self.moved_by(lambda: list(scroll(points.qdrant, points.collection)))

    def snapshot(self, path: Path) -> tuple[int, str]:
        """Save the server's snapshot of the collection. Returns its size and sha256."""
        qdrant, name = self.points.qdrant, self.points.collection
        made = snapshots.create(qdrant, name)
        with path.open("wb") as out:
            snapshots.download(qdrant, name, made, out.write, None)
        snapshots.delete(qdrant, name, made.name)
        return made.size, str(made.checksum)

    def from_afar(self, command: str, ours: Callable[[], object], bare: Callable[[], object]) -> Iterator[Figure]:
        """Seconds of both at each line; no goal, as they are the line's more than the command's."""
        for name, rate in LINES.items():
            with self.slowed(rate):
                seconds = seconds_of(ours), seconds_of(bare)
            yield at_most(f"{command}.{name}_vs_bare", *seconds, None, self.on())

    @contextlib.contextmanager
    def slowed(self, rate: int | None) -> Iterator[None]:
        """Put both servers 40 ms away, at this rate, while the block runs."""
        for proxy in (self.falkordb, self.qdrant):
            proxy.set_line(DELAY_SECONDS, rate)
        try:
            yield
        finally:
            for proxy in (self.falkordb, self.qdrant):
                proxy.set_line(0.0, None)

    def on(self, memories: int = MEMORIES) -> str:
        return on_qdrant(self.points.qdrant, memories, SIZE)


@contextlib.contextmanager
def far_stores(folder: Path, memories: int = MEMORIES, points: int = MEMORIES) -> Iterator[Far]:
    """Both stores, the points at 768d, behind proxies that only count until they are slowed."""
    with graph_source(folder, memories) as graph, collection_source(folder, points, SIZE) as collection:
        qdrant_port = urlsplit(collection.qdrant.base_url).port or 0
        with FarProxy(graph.address.port) as falkordb, FarProxy(qdrant_port) as qdrant:
            far = Far(graph, collection, falkordb, qdrant, private_dir(folder / "scripts"))
            if points:
                far.rest()
            yield far


# --- bytes, and time from afar ------------------------------------------------------------------------------------


def backup(folder: Path) -> Iterator[Figure]:
    """Needed: one snapshot and one RDB down, one read of the collection's ids."""
    with far_stores(folder) as far:
        moved = far.moved_by(partial(far.run, "backup_automem"))
        raw = folder / "raw"
        raw_rdb(far.graph.address, raw)
        rdb = raw.stat().st_size
        needed = far.snapshot(raw)[0] + rdb + far.bytes_of_ids()
        yield at_most("backup.bytes_vs_needed", moved / MB, needed / MB, 1.25, far.on())
        yield from far.from_afar("backup", partial(far.run, "backup_automem"), partial(_bare_backup, far, raw))


def _bare_backup(far: Far, path: Path) -> None:
    raw_rdb(GraphAddress(FAR_HOST, far.falkordb.port), path)
    with far.bare() as (_, points):
        raw_snapshot(points, path)


def restore(folder: Path) -> Iterator[Figure]:
    """Needed: the snapshot up, the safety copy's down, the graph's payload (DUMP) twice each way, one read of ids.

    A server that fetches its own snapshot from its public address moves it through the proxy once more: it counts.
    """
    with far_stores(folder) as far:
        run, raw = partial(_restore, far), folder / "raw"
        far.run("backup_automem")
        moved = far.moved_by(run)
        far.rest()
        size, sha256 = far.snapshot(raw)
        needed = 2 * size + 4 * len(dump_as(far.graph.conn, GRAPH, "bare")) + far.bytes_of_ids()
        yield at_most("restore.bytes_vs_needed", moved / MB, needed / MB, 1.25, far.on())
        with far.bare() as stores:
            yield from far.from_afar("restore", run, partial(_bare_restore, *stores, raw, size, sha256))


def _restore(far: Far, **settings: str) -> None:
    """Restore both stores from the oldest backup set: the other ones are safety backups."""
    far.run("restore_from_backup", str(min((far.folder / "backups").glob("backup_*.json"))), **settings)


def _bare_restore(conn: redis.Redis, points: CollectionSource, raw: Path, size: int, sha256: str) -> None:
    """Upload and restore a snapshot under another name, then DUMP and RESTORE of the same graph."""
    name = f"{points.collection}_bare"
    file = unique_filename("bare")
    upload_and_restore(points.qdrant, name, raw, size=size, filename=file, checksum=sha256)
    conn.execute_command("RESTORE", "bare", 0, dump_as(conn, GRAPH, "bare"))
    delete_collection(points.qdrant, name)
    drop_graph(conn, "bare")


def reembed(folder: Path) -> Iterator[Figure]:
    """From 768d to 3072d. Needed: the memories, the old points' payloads and the ids once, the new points up and down.

    They are read back once, because every staged vector is compared; the stand-in does not compress its answers.
    The memories are read with all their properties, because the new payloads are the old ones with the graph's values.
    A new point counts as gzip of its JSON, 1.4 times its float32 numbers: REST takes no smaller form on all servers. The
    second figure is over the numbers alone. The provider's traffic goes past the proxies.
    """
    with CheapEndpoint(size=LARGE_SIZE) as endpoint:
        settings = {
            "OPENAI_BASE_URL": endpoint.base_url,
            "OPENAI_API_KEY": "sk-bench",
            "VECTOR_SIZE": str(LARGE_SIZE),
            "EMBEDDING_MODEL": LARGE_MODEL,
        }
        with far_stores(private_dir(folder / "bytes")) as far:
            far.run("backup_automem")
            read, new = _bytes_read(far), _bytes_of_new_points(far)
            moved = far.moved_by(partial(far.run, "reembed_embeddings", **settings))
            yield at_most("reembed.bytes_vs_needed", moved / MB, (read + 2 * new) / MB, 1.25, far.on())
            numbers = MEMORIES * LARGE_SIZE * 4
            yield at_most("reembed.bytes_vs_float32", moved / MB, (read + numbers) / MB, None, far.on())
        for name, rate in LINES.items():
            with far_stores(private_dir(folder / name)) as far:
                far.run("backup_automem")
                with far.slowed(rate):
                    ours = seconds_of(partial(far.run, "reembed_embeddings", **settings))
                    bare = seconds_of_upload(far.environ["QDRANT_URL"])
                yield at_most(f"reembed.{name}_vs_upload", ours, bare, None, far.on())


def _bytes_read(far: Far) -> int:
    with far.bare() as (conn, points):
        memories = far.moved_by(lambda: [None for _ in iter_memories(conn, GRAPH)])
        payloads = far.moved_by(lambda: [None for _ in scroll(points.qdrant, points.collection, payload=True)])
    return memories + payloads + far.bytes_of_ids()


def _bytes_of_new_points(far: Far) -> int:
    """Bytes of the points as compressed JSON: the vectors of one batch of the endpoint are those of every batch."""
    import numpy as np

    rows = np.random.default_rng(1).standard_normal((100, LARGE_SIZE), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    points = (
        {"id": one.point_id, "vector": rows[at % 100], "payload": one.payload}
        for at, one in enumerate(generate(MEMORIES))
        if one.point_id is not None
    )
    return sum(len(igzip.compress(encode(batch), 1)) for batch in chunks(points, 100))


# --- on this machine, against the bare transfers ------------------------------------------------------------------


def both(folder: Path) -> Iterator[Figure]:
    """restore_from_backup.py of both stores, its safety backup included, against their bare transfers.

    The collection is at rest before each run.
    """
    with far_stores(folder) as far:
        raw = folder / "raw"
        far.run("backup_automem", **far.here)
        size, sha256 = far.snapshot(raw)
        reference = partial(_bare_restore, far.graph.conn, far.points, raw, size, sha256)
        ours, bare = [], []
        for _ in range(RUNS):
            ours.append(seconds_of(partial(_restore, far, **far.here)))
            far.rest()
            bare.append(seconds_of(reference))
        yield at_most("restore.both_vs_bare", median(ours), median(bare), 2.5, far.on())


def verify(folder: Path) -> Iterator[Figure]:
    """verify_migration.py after a re-embed, with its embedding cache, against one bare read of the same data.

    The bare read is a scroll of all points with payloads and vectors, then the properties of all memories.
    """
    for memories in VERIFIED:
        with far_stores(private_dir(folder / str(memories)), memories, points=0) as far:
            settings = _reembed_same_size(far, **far.here)
            ours, bare = [], []
            for _ in range(RUNS):
                ours.append(seconds_of(partial(far.run, "verify_migration", **settings)))
                bare.append(seconds_of(partial(_bare_read, far.graph.conn, far.points)))
            name = "" if memories == VERIFIED[0] else f"_{memories // 1000}k"
            yield at_most(f"verify.vs_scroll{name}", median(ours), median(bare), 1.5, far.on(memories))


def verify_from_afar(folder: Path) -> Iterator[Figure]:
    """As `verify`, from afar: what the command needs is what the bare read moves."""
    with far_stores(folder, points=0) as far, far.bare() as stores:
        settings = _reembed_same_size(far)
        ours, bare = partial(far.run, "verify_migration", **settings), partial(_bare_read, *stores)
        moved, needed = far.moved_by(ours), far.moved_by(bare)
        yield at_most("verify.bytes_vs_needed", moved / MB, needed / MB, 1.25, far.on())
        yield from far.from_afar("verify", ours, bare)


def _reembed_same_size(far: Far, **settings: str) -> dict[str, str]:
    """Fill the empty collection by a re-embed, so that its vectors are in the embedding cache. Returns all settings."""
    delete_collection(far.points.qdrant, far.points.collection)
    with OpenAIServer() as endpoint:
        settings = {**settings, "OPENAI_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": "sk-bench"}
        far.run("reembed_embeddings", **settings)
    far.rest()
    return settings


def _bare_read(conn: redis.Redis, points: CollectionSource) -> None:
    for _ in scroll(points.qdrant, points.collection, payload=True, vector=True):
        pass
    for _ in pages(conn, GRAPH, nodes("Memory"), "id(n), properties(n)"):
        pass


BENCHES = {
    "backup.bytes_vs_needed": backup,
    "restore.bytes_vs_needed": restore,
    "reembed.bytes_vs_needed": reembed,
    "restore.both_vs_bare": both,
    "verify.vs_scroll": verify,
    "verify.bytes_vs_needed": verify_from_afar,
}
