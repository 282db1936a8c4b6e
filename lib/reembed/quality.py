"""Recall before and after a re-embedding: the nearest neighbours of the same memories in the old and new collection.

A migration searches the points by their stored vectors, so that nothing is paid for. What was found before is stored in
the cache with the run's id, so that a run that resumes after the delete has it. A failed measurement fails no
migration. A spot check (`--limit N`) compares a sample that it embeds into a temporary collection.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, NamedTuple

import msgspec
import numpy as np

from lib.backup.phases import DELETING, spec_as_json
from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow, Missing, TextRow
from lib.clients.qdrant.collection import AUTOMEM_INFO, CollectionState, create_like, delete_collection
from lib.clients.qdrant.points import Hit, PointId, exact_search, retrieve, search
from lib.clients.qdrant.transport import QdrantError, curl_line
from lib.concurrency import bounded_map
from lib.errors import MigrationError, escaped
from lib.journal import Journal, open_journals, start_journal
from lib.reembed.context import Context
from lib.reembed.embed import EmbeddingRunner, embed_texts
from lib.reembed.sync import SyncOutcome, sync_collection

SAMPLES, NEIGHBOURS, MOST_QUERIES = 50, 10, 50
SPOT_CHECK, ANNOUNCED = "spot_check", "side collection announced"
_SPARE = 14  # some memories have no point, or one with another content
_LONGEST_SECONDS = 15.0
_SEARCHES = 4  # at once: over a long way the answers take longer than the searches
_EXAMPLES, _EXCERPT = 3, 120
_META = "neighbours before"
# Failures of the servers and of this disk. A bug in this program keeps its traceback.
_FAILURES = (MigrationError, OSError)


@dataclass(frozen=True)
class Nearest:
    """The points nearest to one memory's point, best first. `key` is its text's key in the cache, in hex."""

    id: PointId
    key: str
    near: list[PointId]
    scores: list[float]


@dataclass(frozen=True)
class _Before:
    """What was found in the old collection. Stored as JSON in the cache: the field names must stay."""

    run: str = ""
    trouble: str = ""
    near: list[Nearest] = field(default_factory=list)


def mean_overlap(pairs: Iterable[tuple[Sequence[PointId], Sequence[PointId]]]) -> float:
    """The recall metric: the mean share of the neighbours before that are neighbours after, too (0..1)."""
    return fmean(len(set(before) & set(after)) / len(before) for before, after in pairs)


def save_before(ctx: Context, journal: Journal) -> None:
    """Search the live collection, which is about to be replaced, and store the result."""
    if journal.has_reached(DELETING):
        return  # the old collection does not exist any more
    try:
        before = _Before(journal.run_id, near=_nearest_of(ctx, ctx.cache.sample(SAMPLES + _SPARE)))
    except _FAILURES as error:
        problem = f"the old collection could not be searched: {error}".splitlines()[0]
        before = _Before(journal.run_id, escaped(problem))
    ctx.cache.set_meta(_META, msgspec.json.encode(before).decode())


def compare_after(ctx: Context, journal: Journal) -> tuple[dict[str, Any] | None, str]:
    """Compare the new collection with what was found in the old one, for the report. If that is impossible: None, why.

    `overlap`: see `mean_overlap`, of the `neighbours` nearest. The scores are medians over all neighbours. `left`:
    neighbours in the old collection that have no point now, because the graph has no memory of them.
    """
    if not journal.has_reached(DELETING):
        return None, "no collection was replaced"
    try:
        before = msgspec.json.decode(ctx.cache.get_meta(_META) or "{}", type=_Before)
    except msgspec.DecodeError:
        return None, "an earlier version of these scripts searched the old collection"
    if before.run != journal.run_id:
        return None, "the old collection was not searched before it was deleted"
    if before.trouble:
        return None, before.trouble
    recall = None
    try:
        old = {one.id: one for one in before.near}
        rows = ctx.cache.memories_of(list(old))
        same_text = [rows[one.id] for one in before.near if one.id in rows and rows[one.id].key.hex() == one.key]
        pairs = [(old[now.id], now) for now in _nearest_of(ctx, same_text)]
        if pairs:
            neighbours = sorted({one for was, _ in pairs for one in was.near}, key=str)
            recall = {
                "neighbours": NEIGHBOURS,
                "overlap": mean_overlap((was.near, now.near) for was, now in pairs),
                "before_score": median(score for was, _ in pairs for score in was.scores),
                "after_score": median(score for _, now in pairs for score in now.scores),
                "left": len(neighbours) - len(retrieve(ctx.qdrant, ctx.collection, neighbours)),
                "memories": [_memory_recall(ctx.cache, rows[now.id], was, now) for was, now in pairs],
            }
    except _FAILURES as error:
        return None, f"the new collection could not be searched: {error}".splitlines()[0]
    return recall, "" if recall else "no memory had a point with its content and another point"


def _nearest_of(ctx: Context, rows: Sequence[MemoryRow]) -> list[Nearest]:
    """Search for the rows whose point has their content; for fewer if the server is slow."""
    points = retrieve(ctx.qdrant, ctx.collection, [row.point_id for row in rows], payload=["content"])
    contents = {point.id: (point.payload or {}).get("content") for point in points}
    until = time.monotonic() + _LONGEST_SECONDS
    asked = (row for row in rows if contents.get(row.point_id) == row.content and time.monotonic() <= until)
    found: list[Nearest] = []
    for row, hits in bounded_map(lambda row: (row, _hits(ctx, row.point_id)), asked, _SEARCHES):
        if hits:
            scores = [round(hit.score, 6) for hit in hits]
            found.append(Nearest(row.point_id, row.key.hex(), [hit.id for hit in hits], scores))
        if len(found) == SAMPLES:
            break
    return found


def _hits(ctx: Context, identity: PointId) -> list[Hit]:
    """Return the nearest points; none if the point does not exist any more, or has no vector."""
    try:
        return search(ctx.qdrant, ctx.collection, identity, NEIGHBOURS)
    except QdrantError as error:
        if error.status in {400, 404}:
            return []
        raise


def _memory_recall(cache: EmbeddingCache, row: MemoryRow, was: Nearest, now: Nearest) -> dict[str, Any]:
    """One memory before and after: how many of its `near` nearest points are the same, and all scores.

    `lost` are contents of the best neighbours that it no longer has, `won` of those that it has instead.
    """
    lost = [one for one in was.near if one not in now.near][:_EXAMPLES]
    won = [one for one in now.near if one not in was.near][:_EXAMPLES]
    texts = {one: _excerpt(other.content) for one, other in cache.memories_of([*lost, *won]).items()}
    return {
        "id": row.point_id,
        "content": _excerpt(row.content),
        "same": len(set(was.near) & set(now.near)),
        "near": len(was.near),
        "before": was.scores,
        "after": now.scores,
        "lost": [texts.get(one, f"point {one}, which has no memory") for one in lost],
        "won": [texts.get(one, f"point {one}") for one in won],
    }


def _excerpt(content: str) -> str:
    words = " ".join(content[: 4 * _EXCERPT].split())
    return words if len(words) <= _EXCERPT else f"{words[:_EXCERPT].rstrip()}..."


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


class SpotCheck(NamedTuple):
    """What a spot check did; `compared` is None if the live collection has no points of these memories."""

    memories: int
    outcome: SyncOutcome
    compared: SampleRecall | None


def spot_check(ctx: Context, runner: EmbeddingRunner, live: CollectionState | None, count: int) -> SpotCheck:
    """Embed `count` memories spread over the plan, fill a temporary collection with them, compare, delete it.

    The live collection is only read. The temporary one is in a journal before it is created; after a kill the next
    start deletes it.
    """
    total = ctx.cache.memory_count()
    step = max(1.0, total / count)
    wanted = {int(number * step) for number in range(min(count, total))}
    rows = [row for number, row in enumerate(ctx.cache.memories()) if number in wanted]
    known = ctx.cache.known(row.key for row in rows)
    lacking = {row.key: row for row in reversed(rows) if row.key not in known}
    missing = Missing(len(lacking), sum(row.tokens for row in lacking.values()))
    runner.require_affordable(missing.tokens)
    texts = (TextRow(row.key, row.content, str(row.point_id), row.tokens) for row in lacking.values())
    embed_texts(ctx, runner, texts, missing)
    journal = start_journal(ctx.folder, SPOT_CHECK, ctx.targets, spec=spec_as_json(ctx.spec))
    side = f"{ctx.collection}__check_{journal.run_id}"
    journal.append(ANNOUNCED, side=side, undo=f"  {curl_line(ctx.qdrant, 'DELETE', side)}")
    try:
        create_like(ctx.qdrant, side, live.raw if live else AUTOMEM_INFO, ctx.spec.size)
        with ctx.bar("upsert", len(rows), "points") as progress:
            outcome = sync_collection(ctx, side, progress, memories=rows)
        compared = compare_sample(ctx, live.name, side, rows) if live else None
    finally:
        _remove(ctx, journal)
    return SpotCheck(len(rows), outcome, compared)


def clear_up(ctx: Context) -> None:
    """Remove what killed checks of the same stores left."""
    for journal in open_journals(ctx.folder, ctx.targets, SPOT_CHECK):
        _remove(ctx, journal)


def _remove(ctx: Context, journal: Journal) -> None:
    if side := journal.fact("side"):
        delete_collection(ctx.qdrant, side)
    remove_plan(ctx.cache, journal)
    journal.close("removed")


def remove_plan(cache: EmbeddingCache, journal: Journal) -> None:
    """Delete the file in which a check of an earlier version had its plan."""
    for path in cache.path.parent.glob(f"*-check-{journal.run_id}.sqlite3*"):
        path.unlink(missing_ok=True)


def compare_sample(ctx: Context, live: str, side: str, rows: Sequence[MemoryRow]) -> SampleRecall | None:
    """Compare the neighbours in both collections. None if fewer than two embedded memories have a live point."""
    keys = {row.point_id: row.key for row in rows}
    embedded = ctx.cache.known(keys.values())
    points = retrieve(ctx.qdrant, live, [one for one, key in keys.items() if key in embedded], vector=True)
    vectors = {point.id: point.vector for point in points if point.vector is not None and point.vector.any()}
    shared = [one for one in keys if one in vectors]
    if len(shared) < 2:
        return None
    near = min(NEIGHBOURS, len(shared) - 1)
    pairs, scores = [], []
    with exact_search(ctx.qdrant, shared) as nearest:
        for one in shared[:: max(1, len(shared) // MOST_QUERIES)]:
            wanted = np.frombuffer(ctx.cache.get_vectors([keys[one]])[keys[one]], "<f4")
            before = nearest(live, vectors[one], near + 1)
            after = nearest(side, wanted, near + 1)
            old, new = ([hit for hit in hits if hit.id != one][:near] for hits in (before, after))
            if not (old and new):  # AutoMem has deleted the others meanwhile
                continue
            pairs.append(([hit.id for hit in old], [hit.id for hit in new]))
            scores.append((old[0].score, new[0].score))
    if not pairs:
        return None
    return SampleRecall(
        queries=len(pairs),
        neighbours=near,
        overlap=mean_overlap(pairs),
        live_score=median(old for old, _ in scores),
        side_score=median(new for _, new in scores),
    )
