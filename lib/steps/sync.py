"""The one way that points get into a collection: add what is missing, renew what changed, buy nothing.

Idempotent: what is already right is not written again, so an interrupted run goes on and a second one does nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from lib.embedding.plan_table import MemoryRow, Missing, TextRow
from lib.embedding.spool import Spool
from lib.steps.forms import identical
from lib.steps.lanes import in_lanes
from lib.steps.pages import pages
from lib.steps.payloads import PointId, merged_payload, own_payload, standing_payload
from lib.steps.present import IdTable, points_present
from lib.steps.progress import Progress
from lib.vectors.points import overwrite_payload
from lib.vectors.transport import Qdrant
from lib.vectors.upsert import Rejected, upsert

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
    spool: Spool, present: IdTable, *, whole: bool = False, copies: IdTable | None = None
) -> Iterator[list[Change]]:
    """What the plan wants and the collection does not have so, in batches (some may be empty).

    `whole`: see `standing_payload`. `copies`: payloads that this migration itself wrote; what a point has as they
    have it is not its own word, and gives way to what was kept since.
    """
    for rows in pages(spool.memories(), _BATCH):
        ids: list[PointId] = [row.point_id for row in rows]
        live, kept = present.payloads(ids), spool.kept(ids)
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


def texts_to_buy(spool: Spool, present: IdTable) -> Iterator[TextRow]:
    """Texts that missing or changed points need and the spool lacks, identical ones once."""
    seen: set[bytes] = set()
    for batch in changes(spool, present):
        wanted = [change.row for change in batch if change.needs_vector]
        known = spool.known([row.key for row in wanted])
        for row in wanted:
            if row.key not in known and row.key not in seen:
                seen.add(row.key)
                yield TextRow(row.key, row.content, str(row.point_id), row.tokens)


def missing_of(spool: Spool, present: IdTable) -> Missing:
    """How many texts `texts_to_buy` would give, and their tokens."""
    tokens = [row.tokens for row in texts_to_buy(spool, present)]
    return Missing(len(tokens), sum(tokens))


def sync_collection(
    qdrant: Qdrant,
    collection: str,
    spool: Spool,
    *,
    whole: bool = False,
    copied_from: str | None = None,
    progress: Progress | None = None,
) -> SyncOutcome:
    """Bring `collection` to the spool's plan, with the spool's vectors.

    A payload starts from the live point's, else from the one kept in the spool (`whole`: see `standing_payload`),
    overlaid by the graph's values. `copied_from`: the collection that this one was made from by this migration, or
    itself where nobody else writes to it (see `changes`).
    Memories whose vector is not in the spool are counted in `unembedded` and left alone.
    """
    outcome = SyncOutcome()
    with contextlib.ExitStack() as tables:
        present = tables.enter_context(points_present(qdrant, collection))
        copies = present if copied_from == collection else None
        if copied_from and copies is None:
            copies = tables.enter_context(points_present(qdrant, copied_from))
        found = changes(spool, present, whole=whole, copies=copies)
        write = functools.partial(_write, qdrant, collection)
        for done, rows in in_lanes(write, _with_vectors(spool, found), _LANES):
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


def _with_vectors(spool: Spool, found: Iterator[list[Change]]) -> Iterator[_Batch]:
    import numpy as np

    for batch in found:
        vectors = spool.get_vectors([change.row.key for change in batch if change.needs_vector])
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
