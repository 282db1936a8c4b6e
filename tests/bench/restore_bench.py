"""restore_from_backup.py compared with the bare commands."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import median

import redis

from lib.backup.archive import read_archive
from lib.backup.collection import CollectionSource, take_collection
from lib.backup.graph import GraphSource, take_graph
from lib.clients.falkordb import digest as digests
from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.scratch import installed_engines
from lib.clients.falkordb.swap import drop_graph, dump_as
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.collection import delete_collection, wait_green
from lib.clients.qdrant.snapshots import delete_with_snapshots, upload_and_restore
from lib.files import private_dir
from lib.journal import Journal, start_journal
from lib.restore import collection as restore_collection
from lib.restore import graph as restore_graph
from lib.restore.collection import RestorePlan, plan_restore
from lib.restore.inputs import open_archive
from tests.automem_json import write_samples
from tests.bench.figures import PAIRS, Figure, at_most, seconds_of
from tests.bench.peak import ROOT, peak_mb
from tests.bench.references import Stopwatch
from tests.bench.stores import GRAPH, MODEL, collection_source, graph_source, on_graph, on_qdrant
from tests.sandbox.falkordb_server import FalkorServer

NODES, BATCH = 150_000, 5_000  # and as many relationships
POINTS, FEW_POINTS, SIZE = 10_000, 1_000, 3072
NO_LIMITS = "MAX_QUEUED_QUERIES 25 RESULTSET_SIZE 10000"  # the graph is filled in large pieces
LIMIT_MB = 150
AUTOMEM_MEMORIES, AUTOMEM_SIZE = 10_000, 768
REST_SECONDS, FLUSHED_SECONDS = 600.0, 7.0  # the index is built; the log is flushed each 5 s, by default


# --- the graph --------------------------------------------------------------------------------------------------


def graph_restore(folder: Path) -> Iterator[Figure]:
    """150,000 nodes of 300 bytes of content, as many relationships, five indexes."""
    server = FalkorServer(folder / "falkordb", sync_delay_seconds=0, limits=NO_LIMITS)
    server.start()
    try:
        with connect(server.address) as conn:
            fill(conn)
            yield from graph_figures(GraphSource(server.address, conn, GRAPH), folder)
    finally:
        server.stop()


def fill(conn: redis.Redis) -> None:
    """The graph, in pieces; its content hardly compresses, as texts do."""

    def query(text: str) -> None:
        conn.execute_command("GRAPH.QUERY", GRAPH, text)

    for key in ("id", "type", "timestamp", "importance", "confidence"):
        query(f"CREATE INDEX FOR (m:Memory) ON (m.{key})")
    for start in range(0, NODES, BATCH):
        texts = ", ".join(f"'{os.urandom(150).hex()}'" for _ in range(BATCH))
        query(
            f"CYPHER texts=[{texts}] UNWIND range(0, {BATCH - 1}) AS k"
            f" CREATE (:Memory {{id: 'm' + (k + {start}), content: $texts[k], type: 'Decision',"
            " timestamp: '2026-01-01T00:00:00', importance: k / 5000.0, confidence: 0.5})"
        )
    for start in range(0, NODES, BATCH):
        query(
            f"MATCH (m:Memory) WHERE id(m) >= {start} AND id(m) < {start + BATCH}"
            f" MATCH (o:Memory {{id: 'm' + (id(m) * 31 % {NODES})}}) CREATE (m)-[:RELATES_TO {{strength: 0.5}}]->(o)"
        )


def graph_figures(source: GraphSource, folder: Path) -> list[Figure]:
    """From the verified file to the dropped old graph, without digests, against one DUMP and RESTORE of the same graph.

    The verification (checksum, load, counts, and the first DUMP while the graph is read) is a separate figure.
    """
    component = take_graph(source, folder, "restore", [], verify=False)
    path, engines = folder / component.file.name, installed_engines({})
    ours, bare, read, verification = [], [], [], []
    for number in range(PAIRS):
        journal = start_journal(folder, "restore", ["bench"])
        with Stopwatch(digests, "graph_digest") as digest:
            began = time.perf_counter()
            with restore_graph.open_rdb(path, source, engines, component, None) as backup:
                verification.append(time.perf_counter() - began - digest.seconds)
                before = digest.seconds
                whole = seconds_of(functools.partial(_restore, backup, journal))
                ours.append(whole - (digest.seconds - before))
                read.append(digest.seconds)
                bare.append(seconds_of(functools.partial(_bare, backup, source, f"bare_{number}")))
        drop_graph(source.conn, f"bare_{number}")
        journal.close("done")
    on = on_graph(source, NODES)
    return [
        at_most("restore.graph_vs_bare", median(ours), median(bare), 1.5, on),
        at_most("restore.graph_proof_vs_bare", median(verification), median(bare), None, on),
        at_most("restore.digests_vs_bare", median(read), median(bare), None, on),
    ]


def _restore(backup: restore_graph.GraphBackup, journal: Journal) -> None:
    payload = restore_graph.trial_restore(backup, restore_graph.begin_trial(backup, journal))
    old = restore_graph.cut_over(backup, payload, journal, undo="")
    assert old
    drop_graph(backup.target.conn, old)


def _bare(backup: restore_graph.GraphBackup, source: GraphSource, name: str) -> None:
    assert backup.scratch
    source.conn.execute_command("RESTORE", name, 0, dump_as(backup.scratch.conn, GRAPH, name))


# --- the collection ---------------------------------------------------------------------------------------------


def collection_restore(folder: Path) -> Iterator[Figure]:
    """Trial restore, comparisons and cutover against one upload and restore; and how long the live one is absent.

    The verification of the archive, which inflates it and saves the snapshot for the trial restore, is a separate
    figure. The collection is at rest: the snapshot of a collection that was just filled contains a log that each
    restore replays, which takes four times as long as all the rest.
    """
    with collection_source(folder, POINTS, SIZE) as source:
        wait_green(source.qdrant, source.collection, REST_SECONDS)
        time.sleep(FLUSHED_SECONDS)
        component = take_collection(
            source, "restore", start_journal(folder, "backup", [f"qdrant bench {source.collection}"])
        )
        raw = folder / "bare.snapshot"
        read_archive(folder / component.file.name, on_snapshot=lambda stream: raw.write_bytes(stream.read()))
        ours, bare, absent, verification = [], [], [], []
        for number in range(PAIRS):
            journal = start_journal(folder, "restore", [f"qdrant bench {source.collection}"])
            began = time.perf_counter()
            plan = plan_restore(open_archive(folder / component.file.name, component), source)
            verification.append(time.perf_counter() - began)
            ours.append(seconds_of(functools.partial(_replace, plan, journal)))
            absent.append(_between(journal))
            name = f"{source.collection}_bare"
            put = functools.partial(_put, raw, plan.backup.archive.snapshot.sha256, source, f"{name}_{number}", name)
            bare.append(seconds_of(put))
            delete_collection(source.qdrant, name)
        on = on_qdrant(source.qdrant, POINTS, SIZE)
        goal = 2.5 if source.qdrant.version().startswith("1.11.") else 2.0
        yield at_most("restore.collection_vs_bare", median(ours), median(bare), goal, on)
        yield at_most("restore.collection_proof_vs_bare", median(verification), median(bare), None, on)
        yield at_most("restore.absent_vs_bare", median(absent), median(bare), None, on)


def _replace(plan: RestorePlan, journal: Journal) -> None:
    journal.append(restore_collection.TRIAL_BEGUN, temporary_collection=plan.trial)
    trial = restore_collection.trial_restore(plan, None)
    restore_collection.cut_over(plan, trial, journal, None, undo="")
    delete_with_snapshots(plan.target.qdrant, plan.trial)


def _put(raw: Path, sha256: str, source: CollectionSource, file: str, name: str) -> None:
    size = raw.stat().st_size
    filename = f"{file}.snapshot"
    upload_and_restore(source.qdrant, name, raw, size=size, filename=filename, checksum=sha256)
    snapshots.delete(source.qdrant, name, filename)


def _between(journal: Journal) -> float:
    """From the announced delete to the compared new collection, in seconds."""
    at = {entry["phase"]: datetime.fromisoformat(entry["at"]) for entry in journal.entries}
    return (at[restore_collection.RESTORED] - at[restore_collection.DELETING]).total_seconds()


# --- AutoMem's own files ------------------------------------------------------------------------------------------


def automem_json(folder: Path) -> Iterator[Figure]:
    """Both files that AutoMem's own backup writes: our script against the steps of AutoMem's restore, as processes.

    Both replace the same stores. Ours takes a safety backup first; the second figure is without it.
    """
    memories, size = AUTOMEM_MEMORIES, AUTOMEM_SIZE
    with graph_source(folder, memories) as graph, collection_source(folder, memories, size) as points:
        files = write_samples(folder / "files", graph.graph, points.collection, memories, size)
        environ = {
            **os.environ,
            **_settings(points, size, folder),
            "FALKORDB_HOST": graph.address.host,
            "FALKORDB_PORT": str(graph.address.port),
            "FALKORDB_GRAPH": graph.graph,
        }
        ours = [sys.executable, str(ROOT / "scripts" / "restore_from_backup.py"), "-q"]
        peer = [sys.executable, "-m", "tests.bench.automem_peer"]

        def run(command: list[str]) -> None:
            words = [*command, *map(str, files)]
            done = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{words}: exit code {done.returncode}\n{done.stderr}")

        seconds: dict[str, list[float]] = {"ours": [], "no safety": [], "peer": []}
        commands = {"ours": ours, "no safety": [*ours, "--no-safety-backup"], "peer": peer}
        for _ in range(PAIRS):
            for name, command in commands.items():
                wait_green(points.qdrant, points.collection, REST_SECONDS)
                seconds[name].append(seconds_of(functools.partial(run, command)))
        on, reference = on_qdrant(points.qdrant, memories, size), median(seconds["peer"])
        yield at_most("restore.automem_json_vs_peer", median(seconds["ours"]), reference, 1.0, on)
        yield at_most("restore.automem_json_vs_peer_no_safety", median(seconds["no safety"]), reference, None, on)


# --- memory -----------------------------------------------------------------------------------------------------


def peak(folder: Path) -> Iterator[Figure]:
    """The script's largest resident size over ten times the points: flat, and under 150 MB."""
    peaks = []
    for points in (FEW_POINTS, POINTS):
        place = private_dir(folder / str(points))
        with collection_source(place, points, SIZE) as source:
            component = take_collection(
                source,
                "restore",
                start_journal(place, "backup", [f"qdrant bench {source.collection}"]),
            )
            peaks.append(_peak_of(source, place, place / component.file.name))
            on = on_qdrant(source.qdrant, points, SIZE)
    yield at_most("restore.peak_mb", peaks[1], LIMIT_MB, 1.0, on)
    yield at_most("restore.peak_flat", peaks[1], peaks[0], 1.15, on)


def _peak_of(source: CollectionSource, folder: Path, archive: Path) -> float:
    """MiB of the restore of this archive, its safety backup included."""
    settings = {"PATH": os.environ["PATH"], **_settings(source, SIZE, folder)}
    return peak_mb("restore_from_backup", "-q", str(archive), env=settings, folder=folder)


def _settings(source: CollectionSource, size: int, folder: Path) -> dict[str, str]:
    return {
        "HOME": str(folder),
        "QDRANT_URL": source.qdrant.base_url,
        "QDRANT_COLLECTION": source.collection,
        "VECTOR_SIZE": str(size),
        "EMBEDDING_MODEL": MODEL,
        "AUTOMEM_API_URL": "http://127.0.0.1:1",
        "AUTOMEM_BACKUP_DIR": str(folder),
    }


BENCHES = {
    "restore.graph_vs_bare": graph_restore,
    "restore.collection_vs_bare": collection_restore,
    "restore.automem_json_vs_peer": automem_json,
    "restore.peak_mb": peak,
}
