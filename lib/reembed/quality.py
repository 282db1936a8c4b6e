"""Recall before and after a re-embedding: the same memories' nearest neighbours in the old and the new collection.

Asked by the points' own stored vectors, so that nothing is bought. What was found before is kept in the cache, under
the run's id: a run that goes on after the delete still has it. That nothing could be measured fails no migration.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from lib.backup.last_migration import DELETING
from lib.backup.payloads import PointId
from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow
from lib.clients.qdrant.points import Hit, nearest_to, retrieve
from lib.clients.qdrant.transport import NotFound, Qdrant, QdrantError
from lib.errors import MigrationError
from lib.reembed.migration import Migration, journal_of

SAMPLES, NEIGHBOURS = 50, 10
_SPARE = 14  # some have no point, or one of another content
_LONGEST_SECONDS = 15.0
_EXAMPLES, _EXCERPT = 3, 120
_KEPT = "neighbours before"
_TROUBLE = (
    MigrationError,
    OSError,
)  # of the servers and of this disk; a fault of this program keeps its traceback


@dataclass(frozen=True)
class Near:
    """One memory's nearest points, itself left out, best first; `key` is its text's key in the cache, in hex."""

    id: PointId
    key: str
    near: list[PointId]
    scores: list[float]


@dataclass(frozen=True)
class Compared:
    """One memory before and after: how many of its `near` nearest are the same, all scores, and a few contents.

    `lost` are the best of the neighbours that it had, `won` of those that it has instead.
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
class Recall:
    """`overlap`: the mean share of the `neighbours` nearest that are the same (0..1); the scores are medians.

    `left`: neighbours of before that have no point any more, because no memory of the graph is theirs.
    """

    neighbours: int
    overlap: float
    before_score: float
    after_score: float
    left: int
    memories: list[Compared]


def save_before(run: Migration) -> None:
    """Search the live collection, which is about to be replaced, and keep what was found."""
    if run.reached(DELETING):
        return  # what stands there now is not the old collection
    found: dict[str, Any] = {"run": journal_of(run).run_id, "trouble": "", "near": []}
    rows = run.cache.sample(SAMPLES + _SPARE)
    try:
        found["near"] = _nearest_of(run.target.qdrant, run.target.collection, rows)
    except _TROUBLE as error:
        found["trouble"] = f"the old collection could not be searched: {error}".splitlines()[0]
    run.cache.set_meta(_KEPT, json.dumps(found, default=dataclasses.asdict))


def compare_after(run: Migration) -> tuple[Recall | None, str]:
    """The new collection beside what was found before; without that, None and why."""
    kept = json.loads(run.cache.get_meta(_KEPT) or "{}")
    if kept.get("run") != journal_of(run).run_id:
        if not run.reached(DELETING):
            return None, "no collection was replaced"
        return None, "the old collection was not searched before it went"
    if kept["trouble"]:
        return None, str(kept["trouble"])
    if not all(
        isinstance(one, dict) and one.keys() == set(Near.__dataclass_fields__) for one in kept["near"]
    ):
        return None, "an earlier version of these scripts searched the old collection"
    try:
        recall = _compare(run, [Near(**one) for one in kept["near"]])
    except _TROUBLE as error:
        return None, f"the new collection could not be searched: {error}".splitlines()[0]
    return recall, "" if recall else "no memory had a point of its content and another one beside it"


def _nearest_of(qdrant: Qdrant, collection: str, rows: Sequence[MemoryRow]) -> list[Near]:
    """Of the rows whose point holds their very content; fewer where the server takes long."""
    points = retrieve(qdrant, collection, [row.point_id for row in rows], payload=["content"])
    contents = {point.id: (point.payload or {}).get("content") for point in points}
    fit = [row for row in rows if contents.get(row.point_id) == row.content]
    until = time.monotonic() + _LONGEST_SECONDS
    found: list[Near] = []
    for row in fit:
        if len(found) == SAMPLES or time.monotonic() > until:
            break
        if hits := _hits(qdrant, collection, row.point_id):
            scores = [round(hit.score, 6) for hit in hits]
            found.append(Near(row.point_id, row.key.hex(), [hit.id for hit in hits], scores))
    return found


def _hits(qdrant: Qdrant, collection: str, identity: PointId) -> list[Hit]:
    """None where the point is gone, or has no vector."""
    try:
        return nearest_to(qdrant, collection, identity, NEIGHBOURS)
    except NotFound:
        return []
    except QdrantError as error:
        if error.status != 400:
            raise
        return []


def _compare(run: Migration, before: list[Near]) -> Recall | None:
    old = {one.id: one for one in before}
    rows = run.cache.memories_of(list(old))
    same = [rows[one.id] for one in before if one.id in rows and rows[one.id].key.hex() == one.key]
    now = {one.id: one for one in _nearest_of(run.target.qdrant, run.target.collection, same)}
    pairs = [(old[one.id], one) for one in now.values()]
    if not pairs:
        return None
    asked = sorted({str(one): one for was, _ in pairs for one in was.near}.items())
    there = retrieve(run.target.qdrant, run.target.collection, [one for _, one in asked])
    return Recall(
        neighbours=NEIGHBOURS,
        overlap=fmean(len(set(was.near) & set(one.near)) / len(was.near) for was, one in pairs),
        before_score=median(score for was, _ in pairs for score in was.scores),
        after_score=median(score for _, one in pairs for score in one.scores),
        left=len(asked) - len(there),
        memories=[_compared(run.cache, rows[one.id], was, one) for was, one in pairs],
    )


def _compared(cache: EmbeddingCache, row: MemoryRow, was: Near, now: Near) -> Compared:
    lost = [one for one in was.near if one not in now.near][:_EXAMPLES]
    won = [one for one in now.near if one not in was.near][:_EXAMPLES]
    known = {one: _excerpt(other.content) for one, other in cache.memories_of([*lost, *won]).items()}
    return Compared(
        id=row.point_id,
        content=_excerpt(row.content),
        same=len(set(was.near) & set(now.near)),
        near=len(was.near),
        before=was.scores,
        after=now.scores,
        lost=[known.get(one, f"point {one}, which has no memory") for one in lost],
        won=[known.get(one, f"point {one}") for one in won],
    )


def _excerpt(content: str) -> str:
    words = " ".join(content[: 4 * _EXCERPT].split())
    return words if len(words) <= _EXCERPT else f"{words[:_EXCERPT].rstrip()}..."
