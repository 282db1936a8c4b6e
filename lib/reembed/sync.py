"""Bring the points of a collection to the plan: add, update, repair vectors; save payloads. Nothing is paid for."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import orjson

from lib.backup.phases import DELETING, PAYLOADS_SAVED, READ
from lib.backup.points import (
    TemporaryIdTable,
    all_points,
    base_payload,
    changed_since_written,
    existing_points,
    identical,
    merged_payload,
)
from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow, Missing, SavedPoint, TextRow
from lib.clients.embeddings.cache_file import chunks
from lib.clients.qdrant.collection import get_state
from lib.clients.qdrant.points import PAGE_WITH_VECTORS, Point, PointId, Rejected, delete_points, update_payload, upsert
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import Progress, bounded_map
from lib.journal import Journal
from lib.reembed.context import Context, saved_payloads, unplanned_ids
from lib.verify.compare import different_vectors

_BATCH = 256
_CONNECTIONS = 4  # a third more points a second than with one; more connections gain nothing


def was_recreated(journal: Journal, points: int) -> bool:
    """Whether this run deleted the collection, or most of its points have gone since their payloads were read."""
    # Not the number of saved payloads: those of orphan points that were removed earlier are among them.
    read = max(entry.get("kept") or 0 for entry in journal.entries)
    return journal.has_reached(DELETING) or 2 * points < read


def save_payloads(ctx: Context, journal: Journal, points: int) -> int:
    """Save the payloads of the collection's `points` in the cache, fsynced. Returns how many were read.

    The first reading of a migration drops those of earlier ones. If the collection was recreated, its payloads are
    merged into the saved ones, which are all that is left of the old points.
    """
    recreated = was_recreated(journal, points)
    if not (recreated or journal.has_reached(READ, PAYLOADS_SAVED)):
        ctx.cache.clear_saved()
    count = 0
    with ctx.bar("save payloads", points, "points") as progress:
        for page in all_points(ctx.qdrant, ctx.collection):
            saved = saved_payloads(ctx.cache, [point.id for point in page]) if recreated else {}
            ctx.cache.save_points([saved_row(point, saved.get(point.id)) for point in page])
            count += len(page)
            progress(len(page))
    return count


def saved_row(point: Point, saved: dict[str, Any] | None = None) -> SavedPoint:
    """Return a point as the cache saves it; its payload gets the keys of `saved` that it lacks."""
    vector = None if point.vector is None else point.vector.astype("<f4").tobytes()
    payload = base_payload(point.payload or {}, saved, whole=True)
    return SavedPoint(point.id, orjson.dumps(payload or {}), vector)


@dataclass(frozen=True)
class Change:
    """A memory whose point is missing or differs; `old` is the payload of its point, None if there is no point."""

    row: MemoryRow
    payload: dict[str, Any]
    old: dict[str, Any] | None

    @property
    def needs_vector(self) -> bool:
        """False if only the payload changed. The content of a point says which text its vector was made of."""
        return self.old is None or self.old.get("content") != self.row.content


class SyncOutcome(NamedTuple):
    """Points added, updated with their vector, updated in the payload only; rows without a vector; rejected rows."""

    added: int = 0
    changed: int = 0
    payloads: int = 0
    unembedded: int = 0
    rejected: tuple[Rejected, ...] = ()

    @property
    def wrote(self) -> bool:
        """Whether a point was written."""
        return bool(self.added or self.changed or self.payloads)


def changes(
    cache: EmbeddingCache,
    existing: TemporaryIdTable,
    *,
    memories: Iterable[MemoryRow] | None = None,
    whole: bool = False,
    copies: TemporaryIdTable | None = None,
    touched: TemporaryIdTable | None = None,
) -> Iterator[list[Change]]:
    """Yield what the existing points lack of the plan, one list (maybe empty) for each batch of `memories`.

    These are by default all of the plan. `whole`: see `base_payload`. `copies`: payloads that this migration wrote. A
    value that still equals its copy is replaced by one that was saved later. `touched` gets the ids of what is yielded,
    and of points whose payload is not that of their copy.
    """
    for rows in chunks(cache.memories() if memories is None else memories, _BATCH):
        ids: list[PointId] = [row.point_id for row in rows]
        live, saved = existing.payloads(ids), saved_payloads(cache, ids)
        written = copies.payloads(ids) if copies is not None else {}
        found, changed = [], list[PointId]()
        for row in rows:
            old = live.get(row.point_id)
            own = changed_since_written(old, written.get(row.point_id))
            base = base_payload(own, saved.get(row.point_id), whole=whole)
            # The text that is embedded: the node's, or the point's if the node has none.
            payload = {**merged_payload(base, cache.decoded(row.payload)), "content": row.content}
            change = Change(row, payload, old)
            differs = old is None or not identical(old, payload) or change.needs_vector
            if differs:
                found.append(change)
            if differs or old != written.get(row.point_id):
                changed.append(row.point_id)
        if touched is not None:
            touched.put((one, None) for one in changed)
        yield found


def texts_to_embed(cache: EmbeddingCache, existing: TemporaryIdTable) -> Iterator[TextRow]:
    """Yield the texts, each once, that missing or changed points need and the cache lacks."""
    seen: set[bytes] = set()
    for batch in changes(cache, existing):
        wanted = [change.row for change in batch if change.needs_vector]
        known = cache.known([row.key for row in wanted])
        for row in wanted:
            if row.key not in known and row.key not in seen:
                seen.add(row.key)
                yield TextRow(row.key, row.content, str(row.point_id), row.tokens)


def missing_of(cache: EmbeddingCache, existing: TemporaryIdTable) -> Missing:
    """Count the texts of `texts_to_embed`, and their tokens."""
    tokens = [row.tokens for row in texts_to_embed(cache, existing)]
    return Missing(len(tokens), sum(tokens))


def sync_collection(
    ctx: Context,
    collection: str,
    progress: Progress,
    *,
    memories: Iterable[MemoryRow] | None = None,
    whole: bool = False,
    copied_from: str | None = None,
    touched: TemporaryIdTable | None = None,
    existing: TemporaryIdTable | None = None,
) -> SyncOutcome:
    """Write every missing or changed point of the plan into `collection`, with the cache's vectors.

    A payload starts from the live point's, else from the saved one (`whole`: see `base_payload`), overlaid by the
    graph's values. Memories without a vector in the cache are counted as `unembedded` and left alone. `copied_from`:
    the collection that this migration made this one from (see `changes`). Its own name means that nobody else writes
    to it: then points without a memory are removed, too. `memories` and `touched`: see `changes`. `existing`: its
    points, if they were read before the graph. With a later reading, what AutoMem wrote in between would be undone.
    """
    qdrant, cache, outcome = ctx.qdrant, ctx.cache, SyncOutcome()
    with contextlib.ExitStack() as tables:
        if existing is None:
            existing = tables.enter_context(existing_points(qdrant, collection))
        copies = existing if copied_from == collection else None
        if copied_from and copies is None:
            copies = tables.enter_context(existing_points(qdrant, copied_from))
        if copied_from == collection:
            delete_points(qdrant, collection, list(unplanned_ids(cache, existing)))
        found = changes(cache, existing, memories=memories, whole=whole, copies=copies, touched=touched)
        batches = ((one, cache.get_vectors([change.row.key for change in one if change.needs_vector])) for one in found)
        for written, rows in bounded_map(partial(_write, qdrant, collection), batches, _CONNECTIONS):
            outcome = SyncOutcome(*map(operator.add, outcome, written))
            progress(rows)
    return outcome


def repair_vectors(ctx: Context, collection: str, *, planned: bool = False) -> int:
    """Compare every stored vector with the cache's and overwrite those that differ. Returns how many did.

    While a migration keeps the size, the old service may still write vectors of the old model. `planned`: see
    `different_vectors`.
    """
    state, repaired = get_state(ctx.qdrant, collection), 0
    with ctx.bar("compare vectors", state.points, "points") as progress:
        for page in all_points(ctx.qdrant, collection, page=PAGE_WITH_VECTORS, vector=True):
            _, wrong = different_vectors(page, ctx.cache, ctx.spec, state, planned=planned)
            if wrong:
                ids = [point.id for point, _ in wrong]
                payloads = [point.payload or {} for point, _ in wrong]
                upsert(ctx.qdrant, collection, ids, np.vstack([vector for _, vector in wrong]), payloads)
                repaired += len(wrong)
            progress(len(page))
    return repaired


def _write(qdrant: Qdrant, collection: str, batch: tuple[list[Change], dict[bytes, bytes]]) -> tuple[SyncOutcome, int]:
    """Write one batch. Returns its outcome and how many rows it had."""
    found, vectors = batch
    embed = [change for change in found if change.needs_vector]
    ready = [change for change in embed if change.row.key in vectors]
    rejected: list[Rejected] = []
    if ready:
        matrix = np.vstack([np.frombuffer(vectors[change.row.key], dtype="<f4") for change in ready])
        ids, payloads = [change.row.point_id for change in ready], [change.payload for change in ready]
        rejected = upsert(qdrant, collection, ids, matrix, payloads)
    added = sum(change.old is None for change in ready)
    only_payload = [change for change in found if not change.needs_vector]
    for change in only_payload:
        update_payload(qdrant, collection, change.row.point_id, change.old or {}, change.payload)
    outcome = SyncOutcome(added, len(ready) - added, len(only_payload), len(embed) - len(ready), tuple(rejected))
    return outcome, len(found)
