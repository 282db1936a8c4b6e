"""restore_from_backup.py beside the bare commands."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from lib.graph import digest as digests
from lib.graph.engine import installed_engines
from lib.graph.swap import drop_graph, dump_as
from lib.journal import start_journal
from lib.steps import restore_graph
from lib.steps.take_graph import GraphSource, take_graph
from tests.bench.figures import PAIRS, Figure, at_most, seconds_of
from tests.bench.references import Stopwatch
from tests.bench.stores import GRAPH, graph_source, on_graph

MEMORIES = 15_000


def graph_restore(folder: Path) -> Iterator[Figure]:
    """On one server with sample memories."""
    with graph_source(folder, MEMORIES) as source:
        yield from _figures(source, folder)


def _figures(source: GraphSource, folder: Path) -> list[Figure]:
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
    on = on_graph(source, MEMORIES)
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


BENCHES = {"restore.graph_vs_bare": graph_restore}
