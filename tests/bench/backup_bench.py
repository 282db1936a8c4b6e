"""backup_automem.py compared with the raw transfers of the same data."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from lib.backup.collection import CollectionSource, take_collection
from lib.backup.graph import GraphSource, take_graph
from lib.clients.falkordb.scratch import installed_engines
from lib.files import private_dir
from lib.journal import start_journal
from tests.bench.figures import PAIRS, Figure, at_most, load, pairs
from tests.bench.peak import ROOT, peak_mb
from tests.bench.references import raw_rdb, raw_snapshot
from tests.bench.stores import MODEL, collection_source, graph_source, on_graph, on_qdrant

GRAPH_MEMORIES = 50_000
POINTS, SIZES = 10_000, (768, 3072)
PEAK_MEMORIES, PEAK_SIZE = (10_000, 100_000, 300_000), 64
PEAK_MB = 150
# Right after an RDB its child process still exists, and the next RDB waits for the server's one-second clock.
REAPED_SECONDS = 2.0


def graph_vs_raw(folder: Path) -> Iterator[Figure]:
    """Counted, checksummed, fsynced and atomically named, without verification by loading, against the bare stream."""
    stamps = iter(range(PAIRS))
    engines = installed_engines({})  # with none that loads the file the graph would be taken with DUMP
    with graph_source(folder, GRAPH_MEMORIES) as source:
        ours, raw = pairs(
            lambda: take_graph(source, folder, f"bench_{next(stamps)}", engines, verify=False),
            lambda: raw_rdb(source.address, folder / "raw.rdb"),
            rest_seconds=REAPED_SECONDS,
        )
        yield at_most("backup.graph_vs_raw", ours, raw, 1.1, on_graph(source, GRAPH_MEMORIES))


def vectors_vs_raw(folder: Path) -> Iterator[Figure]:
    """Compressed, checksummed, the ids read twice, against creating and downloading the same snapshot."""
    for size in SIZES:
        own = private_dir(folder / str(size))
        with collection_source(own, POINTS, size) as source:
            journal, stamps = (
                start_journal(own, "backup", [f"qdrant bench {source.collection}"]),
                iter(range(PAIRS)),
            )
            take = functools.partial(_take, source, own, journal)
            ours, raw = pairs(
                lambda take=take, stamps=stamps: take(f"bench_{next(stamps)}"),
                functools.partial(raw_snapshot, source, own / "raw.snapshot"),
            )
            name = "backup.vectors_vs_raw" if size == SIZES[0] else f"backup.vectors_vs_raw_{size}"
            yield at_most(name, ours, raw, 1.2, on_qdrant(source.qdrant, POINTS, size))


def _take(source: CollectionSource, folder: Path, journal: object, stamp: str) -> None:
    take_collection(source, stamp, journal, verify=False)
    (folder / "qdrant" / f"qdrant_snapshot_{stamp}.tar.gz").unlink()


def whole(folder: Path) -> Iterator[Figure]:
    """The script from its start to its end, verification included, against the sum of the two raw transfers.

    A default FalkorDB waits five seconds before it sends an RDB. Both sides include it; the first figure does not.
    """
    size = SIZES[0]
    with collection_source(folder, POINTS, size) as points:
        for name, delay in (("backup.whole_10k_768", 0), ("backup.whole_10k_768_deployed", None)):
            with graph_source(folder / name, POINTS, delay) as graph:
                ours, raw = pairs(
                    functools.partial(_script, graph, points, folder / name / "backups"),
                    functools.partial(_both_raw, graph, points, folder),
                    rest_seconds=REAPED_SECONDS,
                )
                wait = "no wait before the RDB" if delay == 0 else "5 s wait before the RDB, in both"
                yield at_most(name, ours, raw, 2.0, f"{on_qdrant(points.qdrant, POINTS, size)}; {wait}")


def _both_raw(graph: GraphSource, points: CollectionSource, folder: Path) -> None:
    raw_rdb(graph.address, folder / "raw.rdb")
    raw_snapshot(points, folder / "raw.snapshot")


def _script(graph: GraphSource, points: CollectionSource, backups: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts" / "backup_automem.py"), "-q", "--backup-dir", str(backups)]
    environ = {**os.environ, **_settings(graph, points)}
    subprocess.run(words, env=environ, stdout=subprocess.DEVNULL, check=True)


def _settings(graph: GraphSource, points: CollectionSource) -> dict[str, str]:
    return {
        "FALKORDB_HOST": graph.address.host,
        "FALKORDB_PORT": str(graph.address.port),
        "FALKORDB_GRAPH": graph.graph,
        "QDRANT_URL": points.qdrant.base_url,
        "QDRANT_COLLECTION": points.collection,
        "VECTOR_SIZE": str(points.spec.size),
        "EMBEDDING_MODEL": MODEL,
    }


def peak(folder: Path) -> Iterator[Figure]:
    """The script's memory must not grow with the data: each under 150 MB, the largest over the smallest 1.15."""
    peaks: dict[int, float] = {}
    for memories in PEAK_MEMORIES:
        own = private_dir(folder / str(memories))
        with contextlib.ExitStack() as stack:
            graph = stack.enter_context(graph_source(own, memories))
            points = stack.enter_context(collection_source(own, memories, PEAK_SIZE))
            environ = {**os.environ, **_settings(graph, points), "AUTOMEM_BACKUP_DIR": str(own / "backups")}
            peaks[memories] = median(peak_mb("backup_automem", "-q", env=environ, folder=own) for _ in range(3))
            on = on_qdrant(points.qdrant, memories, PEAK_SIZE)
            yield at_most(f"backup.peak_mb_{memories // 1000}k", peaks[memories], PEAK_MB, 1.0, on)
    largest, smallest = peaks[PEAK_MEMORIES[-1]], peaks[PEAK_MEMORIES[0]]
    yield at_most("backup.peak_mb", largest, smallest, 1.15, f"{max(peaks):,} over {min(peaks):,} memories; {load()}")


BENCHES = {
    "backup.graph_vs_raw": graph_vs_raw,
    "backup.vectors_vs_raw": vectors_vs_raw,
    "backup.whole_10k_768": whole,
    "backup.peak_mb": peak,
}
