"""Put a graph back from an RDB: proved in a scratch server, proved on the target, switched atomically.

The old graph stays whole under a safety name until the new one is counted and digested. Nothing else on the
instance is touched. A DUMP wrapped as an RDB goes back without an engine too: then its checksum, the versions and
the way back stand in for the loaded copy.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lib.backup_set.manifest import CHECKED, GraphHalf
from lib.errors import BackupDamaged, MigrationError, StoreFailed, UsageProblem
from lib.graph.client import server_versions, temporary_name
from lib.graph.digest import GraphDigest, graph_digest
from lib.graph.engine import Engine, NoEngine, engine_for, newest_encoding
from lib.graph.payload import graph_name
from lib.graph.preflight import memory_used, require_memory, require_writable
from lib.graph.rdb import RdbFacts, inspect_rdb, require_rdb_checksum, unwrap_dump
from lib.graph.read import counts, schema
from lib.graph.scratch import Scratch
from lib.graph.swap import dump_apart, dump_as, prove_acceptance, require_readable, swap_back, swap_in
from lib.journal import Journal
from lib.steps.old_graph import SWITCHED, SWITCHING, keep_aside
from lib.steps.prove import GraphProof, check_file, loaded_graph, machine_lacks
from lib.steps.take_graph import GraphSource

_UNLOADED_FACTOR = 3  # of its file's size, a graph in memory is at most about that (150k nodes on 4.16.3)
UNLOADED = "not loaded by any engine: its checksum, the versions and the way back stand in for that"


class TooSmall(MigrationError):
    """This machine has too little memory or room for a scratch server with the graph in it."""


@dataclass(frozen=True)
class GraphBackup:
    """A proved RDB. `scratch` has it loaded while the `open_backup` block lasts; None where no engine could."""

    path: Path
    graph: str
    proof: GraphProof
    scratch: Scratch | None
    throwaway: str = ""  # the name of the rehearsal, and
    copies: list[bytes] = field(default_factory=list, repr=False)  # the payload under it, until it is used

    @property
    def digest(self) -> GraphDigest | None:
        """The digest of the graph in the file, where an engine loaded it."""
        return self.proof.digest


@contextmanager
def open_backup(
    path: Path, source: GraphSource, engines: list[Engine], half: GraphHalf | None
) -> Iterator[GraphBackup]:
    """Prove the file; nothing on the target is touched. Raises BackupDamaged, NoEngine, TooSmall."""
    if half:
        check_file(path, half.file)
    facts = inspect_rdb(path)
    require_rdb_checksum(path, facts, expected_sha256=half.file.sha256 if half else "")
    try:
        engine = engine_for(facts, engines, server_versions(source.conn))
        _require_loadable(path, facts)
    except (NoEngine, TooSmall) as error:
        payload = unwrap_dump(path)
        if payload is None or graph_name(payload) != source.graph:
            raise
        yield GraphBackup(path, source.graph, GraphProof(CHECKED, f"{UNLOADED} ({error})", facts), None)
        return
    throwaway = temporary_name(source.conn, source.graph, "try", secrets.token_hex(6))
    copies = list[bytes]()
    loaded = loaded_graph(path, source.graph, engine, facts, half=half, dump=(throwaway, copies))
    with loaded as (proof, scratch):
        _require_nodes(path, proof, half)
        yield GraphBackup(path, source.graph, proof, scratch, throwaway, copies)


def _require_loadable(path: Path, facts: RdbFacts) -> None:
    lacking = machine_lacks(facts)
    if lacking:
        raise TooSmall(
            f"{path.name} cannot be loaded here to be proved: {lacking}",
            next_step="free some, or run this on another machine that reaches both stores; nothing was touched",
        )


def _require_nodes(path: Path, proof: GraphProof, half: GraphHalf | None) -> None:
    """An empty graph is put back where the manifest says that it was empty; a bare RDB may be another server's."""
    if proof.counts is not None and proof.counts.nodes == 0 and half is None:
        raise BackupDamaged(
            f"{path} holds an empty graph, and no manifest says that it was empty",
            next_step="check that this is the right file; of a backup set give the manifest: backup_*.json",
        )


def require_version(backup: GraphBackup, target: GraphSource) -> None:
    """Raise StoreFailed where the target is known to be too old for this file; asked before anything is touched."""
    falkordb = server_versions(target.conn).falkordb
    reads, written = newest_encoding(falkordb), backup.proof.rdb.graph_encoding
    if backup.scratch is None and reads is not None and written is not None and written > reads:
        raise StoreFailed(
            f"{backup.path.name} is of graph encoding {written}, FalkorDB {falkordb} reads up to {reads}",
            next_step="upgrade the target's FalkorDB to the version that the backup was taken from",
        )


def require_target(backup: GraphBackup, target: GraphSource) -> None:
    """Raise where the target would refuse the swap half-way: rights, memory, a replica, a taken name."""
    mark = secrets.token_hex(4)
    names = [temporary_name(target.conn, target.graph, kind, mark) for kind in ("try", "pre")]
    require_writable(target.conn, target.graph, *names)
    payload = backup.path.stat().st_size
    loaded = memory_used(backup.scratch.conn) if backup.scratch else _UNLOADED_FACTOR * payload
    require_memory(target.conn, loaded + payload)


def require_same_numbers(backup: GraphBackup, target: GraphSource) -> None:
    """Raise UsageProblem unless a running AutoMem would read the restored graph right.

    It knows labels, relationship types and property keys by their number and is never told of new ones.
    """
    stop = "stop AutoMem (docker compose stop flask-api) and run this without --while-running"
    kept = backup.proof.schema
    if kept is None:
        raise UsageProblem(
            f"--while-running is not safe here: {backup.path.name} is {UNLOADED}", next_step=stop
        )
    live = schema(target.conn, target.graph)
    for name in ("labels", "relationship_types", "property_keys"):
        if getattr(live, name) != getattr(kept, name):
            raise UsageProblem(
                f"--while-running is not safe here: the {name.replace('_', ' ')} of the live graph and of the backup"
                " differ, and a running AutoMem knows them by number",
                next_step=stop,
            )


def rehearse(backup: GraphBackup, target: GraphSource, journal: Journal) -> bytes:
    """Let the target take the graph under a throw-away name, digests compared; the payload under the real name.

    A payload carries its graph's name, and restoring it under another one can crash a server: so the scratch
    graph is renamed before each DUMP, and without one only the versions are compared.
    """
    throwaway = backup.throwaway or temporary_name(target.conn, backup.graph, "try", journal.run_id)
    journal.append("rehearsing the graph", throwaway_graph=throwaway)
    if backup.scratch is None or backup.digest is None:
        payload = unwrap_dump(backup.path)
        assert payload is not None
        require_readable(target.conn, payload, throwaway)
        return payload
    with ThreadPoolExecutor(1) as beside:
        dumped: list[Future[bytes]] = []

        def dump() -> None:  # while the target's copy is read; one payload at a time is held
            assert backup.scratch is not None
            dumped.append(beside.submit(dump_apart, backup.scratch.address, backup.graph))

        prove_acceptance(target.conn, _copy(backup, backup.scratch), throwaway, backup.digest, dump)
        return dumped[0].result()


def _copy(backup: GraphBackup, scratch: Scratch) -> bytes:
    """The payload under the rehearsal's name: the one that was taken with the proof, at its first use."""
    return backup.copies.pop() if backup.copies else dump_as(scratch.conn, backup.graph, backup.throwaway)


def switch_graph(
    backup: GraphBackup,
    target: GraphSource,
    payload: bytes,
    journal: Journal,
    *,
    folder: Path,
    undo: str,
    quiet: bool = True,
) -> str | None:
    """The atomic swap, then the digest again; back to the old graph where it differs.

    `quiet` says that AutoMem is stopped: while it runs it may write at once, and the rehearsal alone is the proof.
    Returns the name under which the old graph now stands, None where there was none.
    """
    safety = temporary_name(target.conn, backup.graph, "pre", journal.run_id)
    wanted = backup.digest.digest if backup.digest else ""
    journal.append(SWITCHING, safety_graph=safety, restored_digest=wanted, undo=undo)
    had_old = swap_in(target.conn, backup.graph, payload, safety)
    try:
        found = _found(backup, target)
    except MigrationError as error:
        raise StoreFailed(
            f"graph '{backup.graph}' is switched and could not be compared: {error}",
            next_step=f"run the same command again; or undo:\n{undo}",
        ) from error
    if quiet and wanted and found != wanted:
        aside = keep_aside(target, backup.graph, folder, journal)
        if had_old:
            swap_back(target.conn, backup.graph, safety)
        raise StoreFailed(
            f"graph '{backup.graph}' does not have the backup's digest after the switch; "
            + (f"the old graph is back, what was found is in {aside}" if had_old else f"see {aside}"),
            next_step="stop whatever writes to the graph, then run the same command again",
        )
    journal.append(SWITCHED, digest=found)
    return safety if had_old else None


def _found(backup: GraphBackup, target: GraphSource) -> str:
    """The digest of the graph in its place; without an engine it is at least read and counted."""
    if backup.digest is None and not counts(target.conn, target.graph).nodes:
        raise StoreFailed(f"graph '{target.graph}' is empty after the switch")
    return graph_digest(target.conn, target.graph, by_id=True).digest
