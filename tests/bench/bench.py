"""How fast the steps are beside the barest way to do the same: a table, and bench.json.

Each figure is the median of PAIRS alternated pairs, ours and the reference, on this machine, in one run. Nothing is
asserted: on another machine times differ, ratios less. Small data, so that the whole takes a minute or two; fixed costs weigh
more here than on real deployments. QDRANT_TEST_URL names a real Qdrant to use instead of the stand-in.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from lib.console import table
from lib.dimensions import EmbeddingSpec
from lib.embedding.client import EmbeddingClient
from lib.embedding.plan_table import TextRow
from lib.embedding.spool import Spool
from lib.embedding.workers import embed_missing
from lib.files import private_dir
from lib.graph import digest as digests
from lib.graph.client import connect, server_versions
from lib.graph.engine import installed_engines
from lib.graph.swap import drop_graph, dump_as
from lib.journal import start_journal
from lib.sandbox.falkordb_server import FalkorServer
from lib.sandbox.openai_server import OpenAIServer
from lib.sandbox.qdrant_server.process import QdrantServer
from lib.sandbox.sample_loading import load_graph, load_points
from lib.sandbox.sample_memories import generate
from lib.sandbox.vectors import vectors_for
from lib.steps import restore_graph
from lib.steps.take_collection import CollectionSource, take_collection
from lib.steps.take_graph import GraphSource, take_graph
from lib.vectors.transport import Qdrant
from tests.bench.references import Stopwatch, raw_rdb, raw_snapshot

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 5
MEMORIES = 15_000
POINTS, POINT_SIZE = 8_000, 768
TEXTS, VECTOR_SIZE, WORKERS, BATCH, LATENCY_SECONDS = 16_000, 3072, 16, 100, 0.3
RUNS_OF_EMBEDDING = 2
SMALL, LARGE = "text-embedding-3-small", "text-embedding-3-large"
GRAPH = "memories"


@dataclass(frozen=True)
class Figure:
    """One line of bench.json: seconds (texts a second for a rate), their ratio; no goal where one only looks on."""

    figure: str
    ours: float
    reference: float
    ratio: float
    goal: float | None
    met: bool | None
    on: str


def at_most(name: str, ours: float, reference: float, goal: float | None, on: str) -> Figure:
    """A figure whose ratio should not be above `goal`."""
    ratio = ours / reference
    met = None if goal is None else ratio <= goal
    return Figure(name, round(ours, 3), round(reference, 3), round(ratio, 2), goal, met, on)


def at_least(name: str, ours: float, reference: float, goal: float, on: str) -> Figure:
    """A figure whose ratio should not be below `goal`."""
    ratio = ours / reference
    return Figure(name, round(ours, 1), round(reference, 1), round(ratio, 2), goal, ratio >= goal, on)


def seconds_of(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def pairs(ours: Callable[[], object], reference: Callable[[], object]) -> tuple[float, float]:
    """Medians of both in seconds, alternated so that both meet the same weather."""
    taken = [(seconds_of(ours), seconds_of(reference)) for _ in range(PAIRS)]
    return median(one[0] for one in taken), median(one[1] for one in taken)


# --- backup -----------------------------------------------------------------------------------------------------


def bench_graph_backup(source: GraphSource, folder: Path) -> Figure:
    """Counted, checksummed, fsynced and atomically named, without the proof by loading, against the bare stream."""
    stamps = iter(range(PAIRS))
    ours, raw = pairs(
        lambda: take_graph(source, folder, f"bench_{next(stamps)}", [], verify=False),
        lambda: raw_rdb(source.address, folder / "raw.rdb"),
    )
    return at_most("backup.graph_vs_raw", ours, raw, 1.1, on_graph(source))


def bench_collection_backup(source: CollectionSource, folder: Path) -> Figure:
    """Compressed, checksummed, the ids read twice, against creating and downloading the same snapshot."""
    journal, stamps = start_journal(folder, "backup", ["bench"]), iter(range(PAIRS))
    ours, raw = pairs(
        lambda: take_collection(source, folder, f"bench_{next(stamps)}", journal, verify=False),
        lambda: raw_snapshot(source, folder / "raw.snapshot"),
    )
    return at_most("backup.vectors_vs_raw", ours, raw, 1.2, on_qdrant(source.qdrant))


# --- re-embed ---------------------------------------------------------------------------------------------------


def rate(url: str, folder: Path, number: int) -> float:
    """Texts a second from the request to the spool on the disk, 16 workers."""
    spec = EmbeddingSpec(url, LARGE, VECTOR_SIZE)
    texts = [f"memory {number}-{one}: the release of project {one % 997} was moved" for one in range(TEXTS)]
    client = EmbeddingClient(spec, "sk-sandbox")
    with Spool(folder / f"rate-{number}.sqlite3") as spool:
        rows = (TextRow(spool.text_key(spec, text), text, str(one)) for one, text in enumerate(texts))
        began = time.perf_counter()
        outcome = embed_missing(
            client, rows, spool.put_vectors, workers=WORKERS, batch_size=BATCH, progress=None
        )
        seconds = time.perf_counter() - began
    client.close()
    assert outcome.embedded == TEXTS
    return TEXTS / seconds


def bench_embedding(folder: Path) -> Figure:
    """Against workers x batch / latency: what a provider with 300 ms a request and no limits could give at most."""
    with OpenAIServer(latency_seconds=LATENCY_SECONDS) as provider:
        rates = [rate(provider.base_url, folder, number) for number in range(RUNS_OF_EMBEDDING)]
    ideal = WORKERS * BATCH / LATENCY_SECONDS
    on = f"endpoint stand-in, {VECTOR_SIZE}d, on the same {os.cpu_count()} cores"
    return at_least("reembed.rate_vs_ideal_16", max(rates), ideal, 0.87, on)


# --- restore ----------------------------------------------------------------------------------------------------


def bench_graph_restore(source: GraphSource, folder: Path) -> list[Figure]:
    """Rehearsal and atomic swap, the digests apart, against one bare DUMP and RESTORE of the same graph."""
    half = take_graph(source, folder, "restore", [], verify=False)
    path, engines = folder / half.file.name, installed_engines({})
    ours, bare, watched = [], [], []
    with restore_graph.open_backup(path, source, engines, half) as backup:
        for number in range(PAIRS):
            journal = start_journal(folder, "restore", ["bench"])
            with Stopwatch(digests, "graph_digest") as digest:
                whole = seconds_of(functools.partial(_restore, backup, source, journal, folder))
            ours.append(whole - digest.seconds)
            watched.append(digest.seconds)
            bare.append(seconds_of(functools.partial(_bare, backup, source, f"bare_{number}")))
            drop_graph(source.conn, f"bare_{number}")
            journal.close("done")
    on = on_graph(source)
    return [
        at_most("restore.graph_vs_bare", median(ours), median(bare), 1.5, on),
        at_most("restore.digests_vs_bare", median(watched), median(bare), None, on),
    ]


def _restore(backup: restore_graph.GraphBackup, source: GraphSource, journal: object, folder: Path) -> None:
    payload = restore_graph.rehearse(backup, source, journal)
    old = restore_graph.switch_graph(backup, source, payload, journal, folder=folder, undo="")
    assert old
    drop_graph(source.conn, old)


def _bare(backup: restore_graph.GraphBackup, source: GraphSource, name: str) -> None:
    source.conn.execute_command("RESTORE", name, 0, dump_as(backup.scratch.conn, GRAPH, name))


# --- the run ----------------------------------------------------------------------------------------------------


def on_graph(source: GraphSource) -> str:
    """The server, and how much it holds."""
    return f"FalkorDB {server_versions(source.conn).falkordb}, {MEMORIES:,} memories"


def on_qdrant(qdrant: Qdrant) -> str:
    """The server or stand-in, and how much it holds."""
    kind = "Qdrant" if os.environ.get("QDRANT_TEST_URL") else "Qdrant stand-in"
    return f"{kind} {qdrant.version()}, {POINTS:,} x {POINT_SIZE}"


@contextlib.contextmanager
def graph_source(folder: Path) -> Iterator[GraphSource]:
    """A FalkorDB with sample memories."""
    server = FalkorServer(folder / "falkordb", sync_delay_seconds=0)
    server.start()
    try:
        with connect(server.address) as conn:
            load_graph(conn, GRAPH, generate(MEMORIES))
            yield GraphSource(server.address, conn, GRAPH)
    finally:
        server.stop()


@contextlib.contextmanager
def collection_source(folder: Path) -> Iterator[CollectionSource]:
    """A Qdrant with sample points; the collection is removed from a real one."""
    name = f"bench_{os.getpid()}"
    with contextlib.ExitStack() as stack:
        url = os.environ.get("QDRANT_TEST_URL") or stack.enter_context(QdrantServer(folder / "qdrant")).url
        qdrant = Qdrant(url)
        embed = functools.partial(vectors_for, SMALL)
        load_points(url, "", name, POINT_SIZE, lambda texts: embed(texts, POINT_SIZE), list(generate(POINTS)))
        try:
            yield CollectionSource(qdrant, name, EmbeddingSpec("", SMALL, POINT_SIZE))
        finally:
            qdrant.json("DELETE", f"/collections/{name}")


def main() -> int:
    """Measure, print, write bench.json."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        backups = private_dir(folder / "backups")
        with graph_source(folder) as graph:
            figures.append(bench_graph_backup(graph, backups))
            figures += bench_graph_restore(graph, backups)
        with collection_source(folder) as collection:
            figures.append(bench_collection_backup(collection, backups))
        figures.append(bench_embedding(folder))
    (ROOT / "bench.json").write_text(
        json.dumps([asdict(one) for one in figures], indent=2) + "\n", encoding="utf-8"
    )
    print(table([tuple(asdict(one).values()) for one in figures], tuple(asdict(figures[0]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
