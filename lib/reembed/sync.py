"""Bring the points of a collection level: add, renew, save, remove orphans. Nothing is paid for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import orjson

from lib.backup.existing_points import TemporaryIdTable, existing_points, pages
from lib.backup.last_migration import DELETING
from lib.backup.payloads import PointId, identical, merged_payload, own_payload, standing_payload
from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow, Missing, SavedPoint, TextRow
from lib.clients.qdrant.collection import CollectionState
from lib.clients.qdrant.points import (
    Point,
    Rejected,
    delete_points,
    overwrite_payload,
    retrieve,
    scroll,
    upsert,
)
from lib.clients.qdrant.transport import Qdrant, QdrantError
from lib.concurrency import Progress, bounded_map
from lib.errors import GuardRefused, MissingData
from lib.reembed.guard import Wanted, fitting_backup
from lib.reembed.migration import Migration
from lib.reembed.plan import Payloads, memories_now, only_live_ids, usually_spelled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _row(point: Point) -> SavedPoint:
    vector = None if point.vector is None else point.vector.astype("<f4").tobytes()
    return SavedPoint(point.id, orjson.dumps(point.payload or {}), vector)


def save_payloads(
    qdrant: Qdrant,
    collection: str,
    cache: EmbeddingCache,
    *,
    first: bool = True,
    add: bool = False,
    progress: Progress | None = None,
) -> int:
    """Keep every live point's payload (fsynced); the `first` reading of a migration forgets those of earlier ones.

    With `add` it is laid over what was kept: for a run that goes on after the delete. What stands there then was
    made anew, what was kept before the delete is all that is left of the old points, and no key that only they held
    is lost.
    """
    if first and not add:
        cache.clear_saved()
    count = 0
    for page in scroll(qdrant, collection, payload=True):
        cache.save_points(_laid_over(page, cache) if add else [_row(point) for point in page])
        count += len(page)
        if progress:
            progress(len(page))
    return count


def _laid_over(points: list[Point], cache: EmbeddingCache) -> list[SavedPoint]:
    """The points with what was kept of them before, where they lack it."""
    rows = cache.saved_points([point.id for point in points])
    before = {one: orjson.loads(row.payload) for one, row in rows.items()}
    laid = []
    for point in points:
        payload = standing_payload(point.payload or {}, before.get(point.id), whole=True)
        laid.append(_row(replace(point, payload=dict(payload or {}))))
    return laid


def payloads_now(run: Migration) -> Payloads:
    """Look payloads up by id: the live points', and once this run has deleted the collection those that it kept."""

    def look_up(ids: Sequence[PointId]) -> dict[PointId, dict[str, Any]]:
        found: dict[PointId, dict[str, Any]] = {}
        if run.reached(DELETING):
            found = {one: orjson.loads(row.payload) for one, row in run.cache.saved_points(ids).items()}
        with suppress(QdrantError):  # missing, or being restored
            live = retrieve(run.target.qdrant, run.target.collection, ids, payload=True)
            found |= {point.id: point.payload for point in live if point.payload}
        return found

    return look_up


def save_whole(points: list[Point], cache: EmbeddingCache) -> None:
    """Keep these points, vectors and all, before they are removed as surplus."""
    cache.save_points([_row(point) for point in points])


_SHARE = 0.01


def remove_orphans(run: Migration, state: CollectionState) -> int:
    """Remove points that no memory has: asked by id after the point was read; how many went.

    Raises MissingData for an empty graph, GuardRefused where more than 1% would go without a proved backup.
    """
    with only_live_ids(run.target.qdrant, state.name, run.cache, run.graph) as orphans:
        if not len(orphans):
            return 0
        if run.cache.memory_count() == 0:
            raise MissingData(
                f"graph '{run.graph.graph}' holds no embeddable memory: nothing is removed from '{state.name}'",
                next_step="check FALKORDB_GRAPH and FALKORDB_HOST",
            )
        if len(orphans) > _SHARE * state.points:
            with existing_points(run.target.qdrant, state.name, payload=False) as live:
                found = fitting_backup(run.folder, Wanted(run.target.qdrant.display, state, live, orphans))
            if isinstance(found, str):
                raise GuardRefused(
                    f"{len(orphans)} of the {state.points} points of '{state.name}' have no memory in the graph;"
                    f" so many are not removed without a proved backup: {found}",
                    next_step=f"python scripts/backup_automem.py\n{run.again}",
                )
        there = memories_now(run.graph.conn, run.graph.graph, orphans.ids())
        return sum(_remove_page(run, state.name, page, there) for page in orphans.ids())


def _remove_page(run: Migration, collection: str, ids: list[PointId], known: set[PointId]) -> int:
    """Remove the points of `ids` but those of `known` memories, and of memories that were stored since."""
    points = retrieve(run.target.qdrant, collection, ids, payload=True, vector=True)
    there = known | usually_spelled(run.graph.conn, run.graph.graph, ids)
    gone = [point for point in points if point.id not in there]
    save_whole(gone, run.cache)
    delete_points(run.target.qdrant, collection, [point.id for point in gone])
    return len(gone)


_BATCH = 256
_LANES = 4  # connections at once: a third more points a second than over one; more bring nothing


@dataclass(frozen=True)
class Change:
    """A memory whose point is missing or differs; `old` is the payload that stands there, if any."""

    row: MemoryRow
    payload: dict[str, Any]
    old: dict[str, Any] | None

    @property
    def needs_vector(self) -> bool:
        """False where only the payload moved on: the vector that stands there is right.

        A point without its content does not say which text its vector was made of.
        """
        return self.old is None or self.old.get("content") != self.row.content


@dataclass
class SyncOutcome:
    """Points added, renewed with a vector, renewed in the payload alone; rows that the server rejects."""

    added: int = 0
    changed: int = 0
    payloads: int = 0
    unembedded: int = 0
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def wrote(self) -> bool:
        """Whether any point was written."""
        return bool(self.added or self.changed or self.payloads)

    def add(self, other: SyncOutcome) -> None:
        """Count in what another part of the rows came to."""
        self.added += other.added
        self.changed += other.changed
        self.payloads += other.payloads
        self.unembedded += other.unembedded
        self.rejected += other.rejected


def changes(
    cache: EmbeddingCache,
    existing: TemporaryIdTable,
    *,
    whole: bool = False,
    copies: TemporaryIdTable | None = None,
) -> Iterator[list[Change]]:
    """What the plan wants and the collection does not have so, in batches (some may be empty).

    `whole`: see `standing_payload`. `copies`: payloads that this migration itself wrote; what a point has as they
    have it is not its own word, and gives way to what was kept since.
    """
    for rows in pages(cache.memories(), _BATCH):
        ids: list[PointId] = [row.point_id for row in rows]
        live, kept = existing.payloads(ids), cache.saved_points(ids)
        written = copies.payloads(ids) if copies is not None else {}
        found = []
        for row in rows:
            old = live.get(row.point_id)
            known = kept.get(row.point_id)
            before, properties = orjson.loads(known.payload) if known else None, orjson.loads(row.payload)
            own = own_payload(old, written.get(row.point_id))
            base = standing_payload(own, before, whole=whole)
            # The text that is embedded: the node's, or the point's own where the node has none.
            payload = {**merged_payload(base, properties), "content": row.content}
            change = Change(row, payload, old)
            if old is None or not identical(old, payload) or change.needs_vector:
                found.append(change)
        yield found


def texts_to_embed(cache: EmbeddingCache, existing: TemporaryIdTable) -> Iterator[TextRow]:
    """Texts that missing or changed points need and the embedding cache lacks, identical ones once."""
    seen: set[bytes] = set()
    for batch in changes(cache, existing):
        wanted = [change.row for change in batch if change.needs_vector]
        known = cache.known([row.key for row in wanted])
        for row in wanted:
            if row.key not in known and row.key not in seen:
                seen.add(row.key)
                yield TextRow(row.key, row.content, str(row.point_id), row.tokens)


def missing_of(cache: EmbeddingCache, existing: TemporaryIdTable) -> Missing:
    """How many texts `texts_to_embed` would give, and their tokens."""
    tokens = [row.tokens for row in texts_to_embed(cache, existing)]
    return Missing(len(tokens), sum(tokens))


def sync_collection(
    qdrant: Qdrant,
    collection: str,
    cache: EmbeddingCache,
    *,
    whole: bool = False,
    copied_from: str | None = None,
    progress: Progress | None = None,
) -> SyncOutcome:
    """Bring `collection` to the embedding cache's plan, with the embedding cache's vectors.

    A payload starts from the live point's, else from the one kept in the cache (`whole`: see `standing_payload`),
    overlaid by the graph's values. `copied_from`: the collection that this one was made from by this migration, or
    itself where nobody else writes to it (see `changes`).
    Memories whose vector is not in the embedding cache are counted in `unembedded` and left alone.
    """
    outcome = SyncOutcome()
    with contextlib.ExitStack() as tables:
        existing = tables.enter_context(existing_points(qdrant, collection))
        copies = existing if copied_from == collection else None
        if copied_from and copies is None:
            copies = tables.enter_context(existing_points(qdrant, copied_from))
        found = changes(cache, existing, whole=whole, copies=copies)
        write = functools.partial(_write, qdrant, collection)
        for done, rows in bounded_map(write, _with_vectors(cache, found), _LANES):
            outcome.add(done)
            if progress:
                progress(rows)
    return outcome


@dataclass(frozen=True)
class _Batch:
    """What one lane writes: `vectors` (n, dims) are those of `ready`; the others' are right, or not bought yet."""

    changes: list[Change]
    ready: list[Change]
    vectors: NDArray[np.float32] | None


def _with_vectors(cache: EmbeddingCache, found: Iterator[list[Change]]) -> Iterator[_Batch]:
    import numpy as np

    for batch in found:
        vectors = cache.get_vectors([change.row.key for change in batch if change.needs_vector])
        ready = [change for change in batch if change.needs_vector and change.row.key in vectors]
        rows = [np.frombuffer(vectors[change.row.key], dtype="<f4") for change in ready]
        yield _Batch(batch, ready, np.vstack(rows) if rows else None)


def _write(qdrant: Qdrant, collection: str, batch: _Batch) -> tuple[SyncOutcome, int]:
    """Write one batch; what came of it, and how many rows it had."""
    outcome, ready = SyncOutcome(), batch.ready
    outcome.unembedded = sum(change.needs_vector for change in batch.changes) - len(ready)
    if batch.vectors is not None:
        ids, payloads = [change.row.point_id for change in ready], [change.payload for change in ready]
        outcome.rejected = upsert(qdrant, collection, ids, batch.vectors, payloads)
        outcome.added = sum(change.old is None for change in ready)
        outcome.changed = sum(change.old is not None for change in ready)
    for change in batch.changes:
        if not change.needs_vector:
            overwrite_payload(qdrant, collection, change.row.point_id, change.payload)
            outcome.payloads += 1
    return outcome, len(batch.changes)
