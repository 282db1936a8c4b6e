"""Recall before and after a re-embedding: the nearest neighbours of the same memories in the old and new collection.

The points are searched by their stored vectors, so that nothing is paid for. What was found before is stored in the
cache with the run's id, so that a run that resumes after the delete has it. A failed measurement fails no migration.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import msgspec

from lib.backup.last_migration import DELETING
from lib.backup.payloads import PointId
from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow
from lib.clients.qdrant.points import Hit, nearest_to, retrieve
from lib.clients.qdrant.transport import NotFound, Qdrant, QdrantError
from lib.errors import MigrationError, escaped
from lib.journal import Journal

SAMPLES, NEIGHBOURS = 50, 10
_SPARE = 14  # some memories have no point, or one with another content
_LONGEST_SECONDS = 15.0
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


@dataclass(frozen=True)
class MemoryRecall:
    """One memory before and after: how many of its `near` nearest points are the same, and all scores.

    `lost` are contents of the best neighbours that it no longer has, `won` of those that it has instead.
    """

    id: PointId
    content: str
    same: int
    near: int
    before: list[float]
    after: list[float]
    lost: list[str]
    won: list[str]


@dataclass(frozen=True)
class RecallComparison:
    """`overlap`: see `mean_overlap`, of the `neighbours` nearest. The scores are medians over all neighbours.

    `left`: neighbours in the old collection that have no point now, because the graph has no memory of them.
    """

    neighbours: int
    overlap: float
    before_score: float
    after_score: float
    left: int
    memories: list[MemoryRecall]


def mean_overlap(pairs: Iterable[tuple[Sequence[PointId], Sequence[PointId]]]) -> float:
    """The recall metric: the mean share of the neighbours before that are neighbours after, too (0..1)."""
    return fmean(len(set(before) & set(after)) / len(before) for before, after in pairs)


def save_before(qdrant: Qdrant, collection: str, cache: EmbeddingCache, journal: Journal) -> None:
    """Search the live collection, which is about to be replaced, and store the result."""
    if journal.has_reached(DELETING):
        return  # the old collection does not exist any more
    try:
        found = _nearest_of(qdrant, collection, cache.sample(SAMPLES + _SPARE))
        before = _Before(journal.run_id, near=found)
    except _FAILURES as error:
        problem = f"the old collection could not be searched: {error}".splitlines()[0]
        before = _Before(journal.run_id, escaped(problem))
    cache.set_meta(_META, msgspec.json.encode(before).decode())


def compare_after(
    qdrant: Qdrant, collection: str, cache: EmbeddingCache, journal: Journal
) -> tuple[RecallComparison | None, str]:
    """Compare the new collection with what was found in the old one. If that is impossible: None and why."""
    if not journal.has_reached(DELETING):
        return None, "no collection was replaced"
    try:
        before = msgspec.json.decode(cache.get_meta(_META) or "{}", type=_Before)
    except msgspec.DecodeError:
        return None, "an earlier version of these scripts searched the old collection"
    if before.run != journal.run_id:
        return None, "the old collection was not searched before it was deleted"
    if before.trouble:
        return None, before.trouble
    try:
        recall = _compare(qdrant, collection, cache, before.near)
    except _FAILURES as error:
        return None, f"the new collection could not be searched: {error}".splitlines()[0]
    return recall, "" if recall else "no memory had a point with its content and another point"


def _nearest_of(qdrant: Qdrant, collection: str, rows: Sequence[MemoryRow]) -> list[Nearest]:
    """Search for the rows whose point has their content; for fewer if the server is slow."""
    points = retrieve(qdrant, collection, [row.point_id for row in rows], payload=["content"])
    contents = {point.id: (point.payload or {}).get("content") for point in points}
    until = time.monotonic() + _LONGEST_SECONDS
    found: list[Nearest] = []
    for row in rows:
        if len(found) == SAMPLES or time.monotonic() > until:
            break
        if contents.get(row.point_id) == row.content and (hits := _hits(qdrant, collection, row.point_id)):
            scores = [round(hit.score, 6) for hit in hits]
            found.append(Nearest(row.point_id, row.key.hex(), [hit.id for hit in hits], scores))
    return found


def _hits(qdrant: Qdrant, collection: str, identity: PointId) -> list[Hit]:
    """The nearest points; none if the point does not exist any more, or has no vector."""
    try:
        return nearest_to(qdrant, collection, identity, NEIGHBOURS)
    except NotFound:
        return []
    except QdrantError as error:
        if error.status != 400:
            raise
        return []


def _compare(qdrant: Qdrant, collection: str, cache: EmbeddingCache, before: list[Nearest]) -> RecallComparison | None:
    old = {one.id: one for one in before}
    rows = cache.memories_of(list(old))
    same_text = [rows[one.id] for one in before if one.id in rows and rows[one.id].key.hex() == one.key]
    pairs = [(old[now.id], now) for now in _nearest_of(qdrant, collection, same_text)]
    if not pairs:
        return None
    neighbours = sorted({one for was, _ in pairs for one in was.near}, key=str)
    return RecallComparison(
        neighbours=NEIGHBOURS,
        overlap=mean_overlap((was.near, now.near) for was, now in pairs),
        before_score=median(score for was, _ in pairs for score in was.scores),
        after_score=median(score for _, now in pairs for score in now.scores),
        left=len(neighbours) - len(retrieve(qdrant, collection, neighbours)),
        memories=[_memory_recall(cache, rows[now.id], was, now) for was, now in pairs],
    )


def _memory_recall(cache: EmbeddingCache, row: MemoryRow, was: Nearest, now: Nearest) -> MemoryRecall:
    lost = [one for one in was.near if one not in now.near][:_EXAMPLES]
    won = [one for one in now.near if one not in was.near][:_EXAMPLES]
    texts = {one: _excerpt(other.content) for one, other in cache.memories_of([*lost, *won]).items()}
    return MemoryRecall(
        id=row.point_id,
        content=_excerpt(row.content),
        same=len(set(was.near) & set(now.near)),
        near=len(was.near),
        before=was.scores,
        after=now.scores,
        lost=[texts.get(one, f"point {one}, which has no memory") for one in lost],
        won=[texts.get(one, f"point {one}") for one in won],
    )


def _excerpt(content: str) -> str:
    words = " ".join(content[: 4 * _EXCERPT].split())
    return words if len(words) <= _EXCERPT else f"{words[:_EXCERPT].rstrip()}..."
