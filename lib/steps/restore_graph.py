"""Put a graph back from an RDB: proved in a scratch server, proved on the target, switched atomically.

The old graph stays whole under a safety name until the new one is counted and digested. Nothing else on the
instance is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lib.backup_set.manifest import GraphHalf
from lib.backup_set.sets import GRAPH_DIR
from lib.errors import BackupDamaged, StoreFailed
from lib.files import atomic_writer, private_dir
from lib.graph.client import list_graphs, server_versions
from lib.graph.digest import GraphDigest, graph_digest
from lib.graph.engine import Engine, engine_for
from lib.graph.rdb import inspect_rdb, require_rdb_checksum, wrap_dump
from lib.graph.scratch import Scratch
from lib.graph.swap import drop_graph, dump_as, dump_graph, prove_acceptance, swap_back, swap_in
from lib.journal import Journal
from lib.steps.prove import GraphProof, check_file, loaded_graph
from lib.steps.take_graph import GraphSource

Say = Callable[[str], None]
SWITCHING, SWITCHED = "switching the graph", "graph switched"


@dataclass(frozen=True)
class LoadedBackup:
    """A proved RDB, loaded by a scratch server that lives as long as the `open_backup` block."""

    path: Path
    graph: str
    proof: GraphProof
    scratch: Scratch

    @property
    def digest(self) -> GraphDigest:
        """The digest of the graph in the file."""
        assert self.proof.digest is not None
        return self.proof.digest


@contextmanager
def open_backup(
    path: Path, source: GraphSource, engines: list[Engine], half: GraphHalf | None
) -> Iterator[LoadedBackup]:
    """Prove the file by loading it; nothing on the target is touched. Raises BackupDamaged, NoEngine."""
    if half:
        check_file(path, half.file)
    facts = inspect_rdb(path)
    require_rdb_checksum(path, facts, expected_sha256=half.file.sha256 if half else "")
    engine = engine_for(facts, engines, server_versions(source.conn))
    with loaded_graph(path, source.graph, engine, facts, half=half) as (proof, scratch):
        yield LoadedBackup(path, source.graph, proof, scratch)


def rehearse(backup: LoadedBackup, target: GraphSource, journal: Journal) -> bytes:
    """Let the target take the graph under a throw-away name, digests compared; the payload under the real name.

    A payload carries its graph's name, and restoring it under another one can crash a server: so the scratch
    graph is renamed before each DUMP.
    """
    throwaway = f"{backup.graph}__try_{journal.run_id}"
    payload = dump_as(backup.scratch.conn, backup.graph, throwaway)
    journal.append("rehearsing the graph", throwaway_graph=throwaway)
    prove_acceptance(target.conn, payload, throwaway, backup.digest)
    return dump_graph(backup.scratch.conn, backup.graph)


def switch_graph(
    backup: LoadedBackup,
    target: GraphSource,
    payload: bytes,
    journal: Journal,
    *,
    undo: str,
    quiet: bool = True,
) -> str | None:
    """The atomic swap, then the digest again; back to the old graph where it differs.

    `quiet` says that AutoMem is stopped: while it runs it may write at once, and the rehearsal alone is the proof.
    Returns the name under which the old graph now stands, None where there was none.
    """
    safety = f"{backup.graph}__pre_{journal.run_id}"
    journal.append(SWITCHING, safety_graph=safety, undo=undo)
    had_old = swap_in(target.conn, backup.graph, payload, safety)
    found = graph_digest(target.conn, backup.graph, by_id=True)
    if quiet and found.digest != backup.digest.digest:
        if had_old:
            swap_back(target.conn, backup.graph, safety)
        raise StoreFailed(
            f"graph '{backup.graph}' does not have the backup's digest after the switch; the old graph is back",
            next_step="run the same command again; if it fails again, keep the backup and report it",
        )
    journal.append(SWITCHED, digest=found.digest)
    return safety if had_old else None


def retire_old(
    target: GraphSource, safety_name: str, safety: GraphHalf | None, folder: Path, journal: Journal
) -> Path | None:
    """Drop the old graph; first its late writes are saved, where it differs from the safety backup.

    Returns the file they were saved to, as a DUMP wrapped as an RDB under the safety name.
    """
    saved = None
    if safety is not None and graph_digest(target.conn, safety_name, by_id=True).digest != safety.digest:
        saved = private_dir(folder / GRAPH_DIR) / f"{safety_name}.rdb"
        with atomic_writer(saved) as stream:
            for chunk in wrap_dump(dump_graph(target.conn, safety_name), safety_name):
                stream.write(chunk)
        journal.append("late writes saved", late_writes=str(saved))
    drop_graph(target.conn, safety_name)
    return saved


def settle_graph(target: GraphSource, journal: Journal) -> list[str]:
    """Clean up after a run that was killed: its throw-away graph, and the old graph under its safety name.

    The swap is atomic: either the old graph stands under its own name, or the new one does and the old one is
    whole under its safety name. Then the old one is put back, because the new one was never compared.
    """
    done, graphs = [], list_graphs(target.conn)
    throwaway, safety = journal.fact("throwaway_graph"), journal.fact("safety_graph")
    if throwaway in graphs:
        drop_graph(target.conn, throwaway)
        done.append(f"removed the rehearsal graph {throwaway}")
    if safety in graphs:
        if journal.has_reached(SWITCHED):
            done.append(f"the graph before that run still stands as {safety}")
        else:
            swap_back(target.conn, target.graph, safety)
            done.append(f"put the old graph back from {safety}")
    return done


def require_loaded(backup: LoadedBackup) -> None:
    """Raise BackupDamaged where the file holds no node at all: nothing to put back."""
    if backup.proof.counts is not None and backup.proof.counts.nodes == 0:
        raise BackupDamaged(f"{backup.path} holds an empty graph")
