"""Restore a graph: verified in a scratch server and on the target, then cut over atomically."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lib.backup.graph import GraphSource, GraphVerification, inspect_backup, loaded_graph, machine_lacks, write_dump
from lib.backup.manifest import CHECKED, GRAPH_DIR, RESTORED, GraphComponent, read_manifest
from lib.clients.falkordb import swap
from lib.clients.falkordb.connection import command, list_graphs, server_versions, temporary_name
from lib.clients.falkordb.digest import GraphDigest, graph_digest
from lib.clients.falkordb.queries import counts, schema
from lib.clients.falkordb.rdb import RdbFacts, graph_name, unwrap_dump
from lib.clients.falkordb.scratch import Engine, NoEngine, Scratch, engine_for
from lib.clients.falkordb.swap import drop_graph, swap_in, verify_acceptance
from lib.concurrency import CancelToken
from lib.errors import BackupDamaged, MigrationError, StoreFailed, UsageProblem
from lib.files import private_dir
from lib.journal import Journal

# Phases of the journal.
TRIAL_BEGUN, SAFE, SWAPPING, SWAPPED = (
    "rehearsing the graph",
    "safety backup",
    "switching the graph",
    "graph switched",
)
_UNLOADED_FACTOR = 3  # of its file's size, a graph in memory is at most about that (150k nodes on 4.16.3)
UNLOADED = "not loaded by any engine: only its checksum and the versions are verified"


def drop_old(target: GraphSource, safety_name: str, journal: Journal, *, unwritten: bool = False) -> Path | None:
    """Drop the old graph. If its digest differs from the safety backup's, it is first saved to a file: late writes.

    `unwritten`: nobody can have written to it since. Returns that file, or None.
    """
    saved = None
    if journal.has_reached(SAFE) and not unwritten:
        try:
            component = read_manifest(journal.folder / str(journal.fact("manifest"))).graph
        except MigrationError:
            component = None
        if _digest(target, safety_name) != (component.digest if component else ""):
            _require_preserved(target, safety_name, journal)
            saved = save_graph(target, safety_name, journal)
    try:
        command(target.conn, "GRAPH.DELETE", safety_name)
    except StoreFailed:
        _require_preserved(target, safety_name, journal)
        raise
    return saved


def _require_preserved(target: GraphSource, safety_name: str, journal: Journal) -> None:
    """Raise StoreFailed if the old graph is gone: without an AOF, a restart loses what the server had not saved."""
    if safety_name in list_graphs(target.conn):
        return
    raise StoreFailed(
        f"graph '{target.graph}' is not restored: FalkorDB at {target.address.display} no longer has {safety_name}, the"
        " graph before the cutover. It probably restarted with the data of its last save",
        next_step=f"run the same command again, or undo it:\n{journal.fact('undo')}",
    )


def save_graph(target: GraphSource, name: str, journal: Journal) -> Path:
    """Save a graph to a file that restore accepts: a DUMP wrapped as an RDB."""
    mark = name if name != target.graph else f"{name}__found_{journal.run_id}"
    path = private_dir(journal.folder / GRAPH_DIR) / f"{mark}.rdb"
    write_dump(target.conn, name, path)
    journal.append("graph saved", late_writes=str(path))
    return path


def clean_up_graph(target: GraphSource, journal: Journal) -> list[str]:
    """Clean up after a killed run: its trial graph, and the old graph under its safety name. Returns what was done.

    The swap is atomic: either the old graph still has its own name, or the new one has it and the old one is complete
    under its safety name. If the new one is what the file holds, the old one is dropped. If another graph has the name
    by now, both stay, because it may hold days of work.
    """
    done = []
    temporary, safety = journal.fact("throwaway_graph"), journal.fact("safety_graph")
    if temporary in list_graphs(target.conn):
        drop_graph(target.conn, temporary)
        done.append(f"removed the trial graph {temporary}")
    if safety not in list_graphs(target.conn):
        return done
    current = _digest(target, target.graph)
    if journal.has_reached(SWAPPED) or (current and current == journal.fact("restored_digest")):
        saved = drop_old(target, safety, journal)
        done.append(f"dropped {safety}, the graph before that run" + (f"; see {saved}" if saved else ""))
    elif current:
        done.append(
            f"the graph before that run is preserved as {safety}: '{target.graph}' has changed since. When it is no"
            f" longer needed: GRAPH.DELETE {safety}"
        )
    else:
        swap.swap_back(target.conn, target.graph, safety)
        done.append(f"put the old graph back from {safety}")
    return done


def _digest(target: GraphSource, name: str) -> str:
    """The digest of a graph, or "" if it does not exist."""
    return graph_digest(target.conn, name).digest if name in list_graphs(target.conn) else ""


@dataclass(frozen=True)
class GraphBackup:
    """A verified RDB, and the graph that it replaces.

    `scratch` has it loaded while the `open_rdb` block lasts; None if no engine could load it.
    """

    path: Path
    target: GraphSource
    verification: GraphVerification
    scratch: Scratch | None

    @property
    def digest(self) -> GraphDigest | None:
        """The digest of the graph in the file, if an engine loaded it."""
        return self.verification.digest


@contextmanager
def open_rdb(
    path: Path, target: GraphSource, engines: list[Engine], component: GraphComponent | None, stop: CancelToken | None
) -> Iterator[GraphBackup]:
    """Verify the file; nothing on the target is touched. Raises BackupDamaged, NoEngine.

    If its bytes are those of a manifest with the graph's digest, that one is taken: the trial restore is compared with
    it. A wrapped DUMP needs no engine: without one its checksum and versions are verified alone.
    """
    facts = inspect_backup(path, component.file if component else None)
    try:
        engine = engine_for(facts, engines, server_versions(target.conn))
        _require_loadable(path, facts)
    except NoEngine as error:
        payload = unwrap_dump(path)
        if payload is None or graph_name(payload) != target.graph:
            raise
        yield GraphBackup(path, target, GraphVerification(CHECKED, f"{UNLOADED} ({error})"), None)
        return
    digest = component.digest if component and component.proof == RESTORED else ""
    loaded = loaded_graph(path, target.graph, engine, facts, component=component, digest=digest, stop=stop)
    with loaded as (found, scratch):
        if found.counts is not None and found.counts.nodes == 0 and component is None:
            raise BackupDamaged(  # the RDB may be of another server
                f"{path} holds an empty graph, and no manifest says that it was empty",
                next_step="check that this is the right file; of a backup set give the manifest: backup_*.json",
            )
        yield GraphBackup(path, target, found, scratch)


def _require_loadable(path: Path, facts: RdbFacts) -> None:
    """Raise NoEngine if this machine has too little memory or room for a scratch server with the graph in it."""
    if lacking := machine_lacks(facts):
        raise NoEngine(
            f"{path.name} cannot be loaded here to be verified: {lacking}",
            next_step="free some, or run this on another machine that reaches both stores; nothing was touched",
        )


def require_swap(backup: GraphBackup) -> None:
    """Raise if the target would refuse the swap: rights, memory, a replica, a taken name."""
    target, mark = backup.target, secrets.token_hex(4)
    names = [temporary_name(target.conn, target.graph, kind, mark) for kind in ("try", "pre")]
    swap.require_writable(target.conn, target.graph, *names)
    payload = backup.path.stat().st_size
    loaded = swap.memory_used(backup.scratch.conn) if backup.scratch else _UNLOADED_FACTOR * payload
    swap.require_memory(target.conn, loaded + payload)


def require_same_numbers(backup: GraphBackup) -> None:
    """Raise UsageProblem unless a running AutoMem would read the restored graph correctly.

    Its client caches labels, relationship types and property keys by their number and never refreshes them.
    """
    stop = "stop AutoMem, in its folder, then run this without --while-running:\ndocker compose stop flask-api"
    saved = backup.verification.schema
    if saved is None:
        raise UsageProblem(f"--while-running is not safe here: {backup.path.name} is {UNLOADED}", next_step=stop)
    live = schema(backup.target.conn, backup.target.graph)
    for name in ("labels", "relationship_types", "property_keys"):
        if getattr(live, name) != getattr(saved, name):
            raise UsageProblem(
                f"--while-running is not safe here: the {name.replace('_', ' ')} of the live graph and of the backup"
                " differ, and a running AutoMem has cached them by number",
                next_step=stop,
            )


def begin_trial(backup: GraphBackup, journal: Journal) -> str:
    """Announce the trial restore in the journal. Returns its name on the target."""
    temporary = temporary_name(backup.target.conn, backup.target.graph, "try", journal.run_id)
    journal.append(TRIAL_BEGUN, throwaway_graph=temporary)
    return temporary


def trial_restore(backup: GraphBackup, temporary: str) -> bytes:
    """Restore the graph under a temporary name on the target and compare digests. Returns the payload to swap in.

    A payload contains its graph's name, and restoring it under another one can crash a server. So the scratch graph is
    renamed before each DUMP. Without an engine only the versions are compared.
    """
    target, scratch = backup.target, backup.scratch
    if scratch is None or backup.digest is None:
        payload = unwrap_dump(backup.path)
        assert payload is not None
        swap.require_readable(target.conn, payload, temporary)
        return payload
    with ThreadPoolExecutor(1) as background:
        dumped: list[Future[bytes]] = []

        def dump() -> None:  # while the target's copy is read; so only one payload at a time is in memory
            dumped.append(background.submit(swap.dump_separately, scratch.address, target.graph))

        # The payload has no name here: `verify_acceptance` alone holds it.
        verify_acceptance(
            target.conn, swap.dump_as(scratch.conn, target.graph, temporary), temporary, backup.digest, dump
        )
        return dumped[0].result()


def cut_over(backup: GraphBackup, payload: bytes, journal: Journal, *, undo: str, quiet: bool = True) -> str | None:
    """Swap the graph in atomically and compare its counts and definitions; if they differ, swap the old graph back.

    Its trial restore has the backup's digest. `quiet`: AutoMem is stopped; while it runs it may write at once, so that
    only the trial restore is compared. Returns the name that the old graph has now, or None if there was none.
    """
    target = backup.target
    safety = temporary_name(target.conn, target.graph, "pre", journal.run_id)
    wanted = backup.digest.digest if backup.digest else ""
    journal.append(SWAPPING, safety_graph=safety, restored_digest=wanted, undo=undo)
    had_old = swap_in(target.conn, target.graph, payload, safety)
    try:
        differs = _differs(backup)
    except MigrationError as error:
        raise StoreFailed(
            f"graph '{target.graph}' is replaced and could not be compared: {error}",
            next_step=f"run the same command again, or undo it:\n{undo}",
        ) from error
    if quiet and differs:
        if had_old:
            _require_preserved(target, safety, journal)
        saved = save_graph(target, target.graph, journal)
        if had_old:
            swap.swap_back(target.conn, target.graph, safety)
        raise StoreFailed(
            f"graph '{target.graph}' has not the backup's {differs} after the cutover; "
            + (f"the old graph is back, what was found is in {saved}" if had_old else f"see {saved}"),
            next_step="stop whatever writes to the graph, then run the same command again",
        )
    journal.append(SWAPPED)
    return safety if had_old else None


def _differs(backup: GraphBackup) -> str:
    """Return what of the restored graph is not the backup's, or "". Of a graph that no engine counted: no nodes."""
    conn, graph = backup.target.conn, backup.target.graph
    seen, definitions = counts(conn, graph), schema(conn, graph)
    wanted, expected = backup.verification.counts, backup.verification.schema
    if wanted is None or expected is None:
        return "" if seen.nodes else "nodes"
    if seen != wanted:
        return "counts"
    same = (definitions.indexes, definitions.constraints) == (expected.indexes, expected.constraints)
    return "" if same else "indexes and constraints"
