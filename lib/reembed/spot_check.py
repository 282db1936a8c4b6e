"""`--limit N`: some memories re-embedded into a collection of their own, its recall compared with the live one's.

The live collection is only read. The side collection is in a journal before it is made, and gone when the check ends;
after a kill the next start removes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np

from lib.backup.existing_points import pages
from lib.backup.last_migration import spec_as_json
from lib.backup.payloads import PointId
from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow, Missing, TextRow
from lib.clients.qdrant.collection import CollectionState, create_default, create_like, delete_collection
from lib.clients.qdrant.points import Hit, exact_search, retrieve
from lib.clients.qdrant.transport import Qdrant, curl_line
from lib.journal import Journal, open_journals, start_journal
from lib.reembed.embed import EmbeddingRunner, embed_texts
from lib.reembed.migration import Migration
from lib.reembed.sync import SyncOutcome, sync_collection

COMMAND, ANNOUNCED = "spot_check", "side collection announced"
NEIGHBOURS = 10
MOST_QUERIES = 50
_PAGE = 256


@dataclass(frozen=True)
class Recall:
    """Neighbours of the same memories, among the same memories, in the live and in the side collection.

    `overlap` is the mean share of the `neighbours` nearest that both name (0..1); the scores are medians of the
    nearest neighbour's, each in its own collection.
    """

    queries: int
    neighbours: int
    overlap: float
    live_score: float
    side_score: float


@dataclass(frozen=True)
class SpotCheck:
    """What came of it; `compared` is None where no live point of these memories could be compared."""

    memories: int
    outcome: SyncOutcome
    compared: Recall | None


def spot_check(
    run: Migration, runner: EmbeddingRunner, live: CollectionState | None, count: int
) -> SpotCheck:
    """Embed `count` memories spread over the plan, fill a side collection with them, compare, drop it."""
    rows = spread(run.cache, count)
    _buy(run, runner, rows)
    journal = start_journal(run.folder, COMMAND, run.targets, spec=spec_as_json(run.spec))
    side = f"{run.target.collection}__check_{journal.run_id}"
    journal.append(ANNOUNCED, side=side, undo=f"  {curl_line(run.target.qdrant, 'DELETE', side)}")
    try:
        _make(run, side, live)
        with plan_of(run.cache, rows, journal) as plan, run.bar("upsert", len(rows), "points") as progress:
            outcome = sync_collection(run.target.qdrant, side, plan, progress=progress)
        compared = (
            compare(run, side, live, [row for row in rows if _stored(row, run.cache)]) if live else None
        )
    finally:
        _remove(run.target.qdrant, run.cache, journal)
    return SpotCheck(len(rows), outcome, compared)


def clear_up(run: Migration) -> None:
    """Remove what killed checks of the same stores left."""
    for journal in open_journals(run.folder):
        if journal.command == COMMAND and journal.targets == run.targets:
            _remove(run.target.qdrant, run.cache, journal)


def _remove(qdrant: Qdrant, cache: EmbeddingCache, journal: Journal) -> None:
    side = str(journal.fact("side") or "")
    if side:
        delete_collection(qdrant, side)
    remove_plan(cache, journal)
    journal.close("removed")


def remove_plan(cache: EmbeddingCache, journal: Journal) -> None:
    """Delete the plan of a check, which is a file of its own."""
    for ending in ("", "-wal", "-shm"):
        path = _plan_path(cache, journal)
        path.with_name(path.name + ending).unlink(missing_ok=True)


def spread(cache: EmbeddingCache, count: int) -> list[MemoryRow]:
    """`count` memories at equal distances over the plan, or all of them."""
    total = cache.memory_count()
    step = max(1.0, total / count)
    wanted = {int(number * step) for number in range(min(count, total))}
    return [row for number, row in enumerate(cache.memories()) if number in wanted]


def _buy(run: Migration, runner: EmbeddingRunner, rows: Sequence[MemoryRow]) -> None:
    known = run.cache.known([row.key for row in rows])
    missing = {row.key: row for row in reversed(rows) if row.key not in known}
    total = Missing(len(missing), sum(row.tokens for row in missing.values()))
    runner.require_affordable(total.tokens, run.bought)
    texts = (TextRow(row.key, row.content, str(row.point_id), row.tokens) for row in missing.values())
    embed_texts(runner, run.cache, texts, total, run.bar, run.bought)


def _make(run: Migration, side: str, live: CollectionState | None) -> None:
    if live is None:
        create_default(run.target.qdrant, side, run.spec.size)
    else:
        create_like(run.target.qdrant, side, live.raw, run.spec.size)


def _plan_path(cache: EmbeddingCache, journal: Journal) -> Path:
    return cache.path.with_name(f"{cache.path.stem}-check-{journal.run_id}.sqlite3")


@contextlib.contextmanager
def plan_of(cache: EmbeddingCache, rows: Sequence[MemoryRow], journal: Journal) -> Iterator[EmbeddingCache]:
    """A plan of these memories alone, over the same vectors."""
    with EmbeddingCache(_plan_path(cache, journal), vectors=cache.vectors_path) as plan:
        plan.begin_scan()
        plan.put_memories(rows)
        plan.end_scan()
        yield plan


def _stored(row: MemoryRow, cache: EmbeddingCache) -> bool:
    return bool(cache.known([row.key]))


def compare(run: Migration, side: str, live: CollectionState, rows: Sequence[MemoryRow]) -> Recall | None:
    """The same memories' nearest neighbours in both collections; None where fewer than two have a live point."""
    qdrant = run.target.qdrant
    vectors = dict(_live_vectors(qdrant, live.name, [row.point_id for row in rows]))
    shared = [row for row in rows if row.point_id in vectors]
    if len(shared) < 2:
        return None
    among = [row.point_id for row in shared]
    near = min(NEIGHBOURS, len(shared) - 1)
    overlaps, scores = [], []
    with exact_search(qdrant, among) as search:
        for row in shared[:: max(1, len(shared) // MOST_QUERIES)]:
            blob = run.cache.get_vectors([row.key])[row.key]
            before = search(live.name, vectors[row.point_id], near + 1)
            after = search(side, np.frombuffer(blob, "<f4"), near + 1)
            old, new = _others(before, row.point_id, near), _others(after, row.point_id, near)
            overlaps.append(len({hit.id for hit in old} & {hit.id for hit in new}) / near)
            scores.append((old[0].score, new[0].score))
    return Recall(
        queries=len(overlaps),
        neighbours=near,
        overlap=fmean(overlaps),
        live_score=median(old for old, _ in scores),
        side_score=median(new for _, new in scores),
    )


def _others(hits: list[Hit], own: PointId, near: int) -> list[Hit]:
    return [hit for hit in hits if hit.id != own][:near]


def _live_vectors(
    qdrant: Qdrant, collection: str, ids: Sequence[PointId]
) -> Iterator[tuple[PointId, np.ndarray[tuple[int], np.dtype[np.float32]]]]:
    for page in pages(ids, _PAGE):
        for point in retrieve(qdrant, collection, page, vector=True):
            if point.vector is not None and point.vector.any():
                yield point.id, point.vector
