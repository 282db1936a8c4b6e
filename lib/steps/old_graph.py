"""The graph that a restore replaced: kept under a safety name, its late writes saved, dropped when it is safe."""

from __future__ import annotations

from pathlib import Path

from lib.backup_set.manifest import GRAPH_DIR, read_manifest
from lib.errors import MigrationError
from lib.files import atomic_writer, private_dir
from lib.graph.client import list_graphs
from lib.graph.digest import graph_digest
from lib.graph.rdb import wrap_dump
from lib.graph.swap import drop_graph, dump_graph, swap_back
from lib.journal import Journal
from lib.steps.take_graph import GraphSource

SWITCHING, SWITCHED, SAFE = "switching the graph", "graph switched", "safety backup"


def retire_old(
    target: GraphSource, safety_name: str, saved_digest: str | None, folder: Path, journal: Journal
) -> Path | None:
    """Drop the old graph; first its late writes are saved, where it differs from the safety backup's digest.

    `saved_digest` is None where the operator wanted no safety backup. Returns the file they were saved to.
    """
    saved = None
    if saved_digest is not None and _digest(target, safety_name) != saved_digest:
        saved = keep_aside(target, safety_name, folder, journal)
    drop_graph(target.conn, safety_name)
    return saved


def keep_aside(target: GraphSource, name: str, folder: Path, journal: Journal) -> Path:
    """Save a graph as it stands into a file of its own, a DUMP wrapped as an RDB, which restore takes back."""
    mark = name if name != target.graph else f"{name}__found_{journal.run_id}"
    path = private_dir(folder / GRAPH_DIR) / f"{mark}.rdb"
    with atomic_writer(path) as stream:
        for chunk in wrap_dump(dump_graph(target.conn, name), name):
            stream.write(chunk)
    journal.append("graph saved", late_writes=str(path))
    return path


def settle_graph(target: GraphSource, journal: Journal, folder: Path) -> list[str]:
    """Clean up after a run that was killed: its throw-away graph, and the old graph under its safety name.

    The swap is atomic: either the old graph stands under its own name, or the new one does and the old one is
    whole under its safety name. Where the new one is what the file holds, the old one is retired. Where something
    else stands there by now, both stay: it may hold days of work.
    """
    done = []
    throwaway, safety = journal.fact("throwaway_graph"), journal.fact("safety_graph")
    if throwaway in list_graphs(target.conn):
        drop_graph(target.conn, throwaway)
        done.append(f"removed the rehearsal graph {throwaway}")
    if safety not in list_graphs(target.conn):
        return done
    standing = _digest(target, target.graph)
    if journal.has_reached(SWITCHED) or (standing and standing == journal.fact("restored_digest")):
        saved = retire_old(target, safety, _saved_digest(journal, folder), folder, journal)
        done.append(f"dropped {safety}, the graph before that run" + (f"; see {saved}" if saved else ""))
    elif standing:
        done.append(
            f"the graph before that run is kept as {safety}: what stands as '{target.graph}' has changed since."
            f" When it is of no use any more: GRAPH.DELETE {safety}"
        )
    else:
        swap_back(target.conn, target.graph, safety)
        done.append(f"put the old graph back from {safety}")
    return done


def _saved_digest(journal: Journal, folder: Path) -> str | None:
    """The digest in the safety backup of that run; "" where it cannot be read, None where none was wanted."""
    if not journal.has_reached(SAFE):
        return None
    try:
        half = read_manifest(folder / str(journal.fact("manifest"))).graph
    except MigrationError:
        return ""
    return half.digest if half else ""


def _digest(target: GraphSource, name: str) -> str:
    """The digest of a graph that stands there; "" where none does."""
    return graph_digest(target.conn, name, by_id=True).digest if name in list_graphs(target.conn) else ""
