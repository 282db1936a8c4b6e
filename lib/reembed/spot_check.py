"""`--limit N`: re-embed a sample into a temporary collection and compare its recall with the live collection's.

The live collection is only read. The temporary one is in a journal before it is created, and deleted when the check
ends; after a kill the next start deletes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from lib.backup.last_migration import spec_as_json
from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow, Missing, TextRow
from lib.clients.qdrant.collection import CollectionState, create_default, create_like, delete_collection
from lib.clients.qdrant.points import exact_search, retrieve
from lib.clients.qdrant.transport import Qdrant, curl_line
from lib.journal import Journal, open_journals, start_journal
from lib.reembed.embed import EmbeddingRunner, embed_texts
from lib.reembed.migration import Migration
from lib.reembed.quality import NEIGHBOURS, mean_overlap
from lib.reembed.sync import SyncOutcome, sync_collection

COMMAND, ANNOUNCED = "spot_check", "side collection announced"
MOST_QUERIES = 50


@dataclass(frozen=True)
class SampleRecall:
    """The neighbours of the same memories, among the same memories, in the live and in the temporary collection.

    `overlap`: see `mean_overlap`, of the `neighbours` nearest. The scores are medians of the nearest neighbour's in the
    live and in the temporary ("side") collection.
    """

    queries: int
    neighbours: int
    overlap: float
    live_score: float
    side_score: float


@dataclass(frozen=True)
class SpotCheck:
    """What a spot check did; `compared` is None if the live collection has no points of these memories."""

    memories: int
    outcome: SyncOutcome
    compared: SampleRecall | None


def spot_check(
    run: Migration, runner: EmbeddingRunner, live: CollectionState | None, count: int
) -> SpotCheck:
    """Embed `count` memories spread over the plan, fill a temporary collection with them, compare, delete it."""
    qdrant, rows = run.target.qdrant, spread(run.cache, count)
    _embed(run, runner, rows)
    journal = start_journal(run.folder, COMMAND, run.targets, spec=spec_as_json(run.spec))
    side = f"{run.target.collection}__check_{journal.run_id}"
    journal.append(ANNOUNCED, side=side, undo=f"  {curl_line(qdrant, 'DELETE', side)}")
    try:
        _make(qdrant, side, live, run.spec.size)
        with plan_of(run.cache, rows, journal) as plan, run.bar("upsert", len(rows), "points") as progress:
            outcome = sync_collection(qdrant, side, plan, progress=progress)
        compared = compare(qdrant, run.cache, live.name, side, rows) if live else None
    finally:
        _remove(qdrant, run.cache, journal)
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
    """Delete the file with the plan of a check."""
    path = _plan_path(cache, journal)
    for ending in ("", "-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)


def _plan_path(cache: EmbeddingCache, journal: Journal) -> Path:
    return cache.path.with_name(f"{cache.path.stem}-check-{journal.run_id}.sqlite3")


def spread(cache: EmbeddingCache, count: int) -> list[MemoryRow]:
    """`count` memories at equal distances over the plan, or all of them."""
    total = cache.memory_count()
    step = max(1.0, total / count)
    wanted = {int(number * step) for number in range(min(count, total))}
    return [row for number, row in enumerate(cache.memories()) if number in wanted]


def _embed(run: Migration, runner: EmbeddingRunner, rows: Sequence[MemoryRow]) -> None:
    known = run.cache.known(row.key for row in rows)
    missing = {row.key: row for row in reversed(rows) if row.key not in known}
    total = Missing(len(missing), sum(row.tokens for row in missing.values()))
    runner.require_affordable(total.tokens, run.bought)
    texts = (TextRow(row.key, row.content, str(row.point_id), row.tokens) for row in missing.values())
    embed_texts(runner, run.cache, texts, total, run.bar, run.bought)


def _make(qdrant: Qdrant, side: str, live: CollectionState | None, size: int) -> None:
    if live is None:
        create_default(qdrant, side, size)
    else:
        create_like(qdrant, side, live.raw, size)


@contextlib.contextmanager
def plan_of(cache: EmbeddingCache, rows: Sequence[MemoryRow], journal: Journal) -> Iterator[EmbeddingCache]:
    """A plan of these memories alone, over the same vectors."""
    with EmbeddingCache(_plan_path(cache, journal), vectors=cache.vectors_path) as plan:
        plan.begin_scan()
        plan.put_memories(rows)
        plan.end_scan()
        yield plan


def compare(
    qdrant: Qdrant, cache: EmbeddingCache, live: str, side: str, rows: Sequence[MemoryRow]
) -> SampleRecall | None:
    """Compare the neighbours in both collections. None if fewer than two embedded memories have a live point."""
    keys = {row.point_id: row.key for row in rows}
    embedded = cache.known(keys.values())
    points = retrieve(qdrant, live, [one for one, key in keys.items() if key in embedded], vector=True)
    vectors = {point.id: point.vector for point in points if point.vector is not None and point.vector.any()}
    shared = [one for one in keys if one in vectors]
    if len(shared) < 2:
        return None
    near = min(NEIGHBOURS, len(shared) - 1)
    pairs, scores = [], []
    with exact_search(qdrant, shared) as search:
        for one in shared[:: max(1, len(shared) // MOST_QUERIES)]:
            wanted = np.frombuffer(cache.get_vectors([keys[one]])[keys[one]], "<f4")
            before = search(live, vectors[one], near + 1)
            after = search(side, wanted, near + 1)
            old, new = ([hit for hit in hits if hit.id != one][:near] for hits in (before, after))
            pairs.append(([hit.id for hit in old], [hit.id for hit in new]))
            scores.append((old[0].score, new[0].score))
    return SampleRecall(
        queries=len(pairs),
        neighbours=near,
        overlap=mean_overlap(pairs),
        live_score=median(old for old, _ in scores),
        side_score=median(new for _, new in scores),
    )
