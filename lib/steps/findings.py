"""Graph and collection side by side: every memory against its point, ids, content and payload."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson
import redis

from lib.embedding.plan_table import MemoryRow
from lib.embedding.spool import Spool
from lib.graph.read import MemoryNode, iter_memories
from lib.steps.memories import unusable
from lib.steps.payloads import PointId, merged_payload, point_id
from lib.steps.present import IdTable, points_present
from lib.steps.progress import Progress
from lib.vectors.transport import Qdrant

_PAGE = 500
# Recall moves this on all the time, in the graph first.
_MOVING = ("last_accessed",)
# What recall filters on and shows: a point without them is broken where its memory has them.
_NEEDED = ("content", "tags", "tag_prefixes")


@dataclass
class Findings:
    """What one pass over graph and collection found; `newer*` is what moved on since the last catch-up."""

    expected: int = 0
    exempt: int = 0
    missing: list[PointId] = field(default_factory=list)
    newer: list[PointId] = field(default_factory=list)
    surplus: list[PointId] = field(default_factory=list)
    contents: list[PointId] = field(default_factory=list)
    newer_contents: list[PointId] = field(default_factory=list)
    payloads: list[tuple[PointId, str]] = field(default_factory=list)
    newer_payloads: list[tuple[PointId, str]] = field(default_factory=list)
    lost_keys: list[tuple[PointId, str]] = field(default_factory=list)


def compare_stores(
    conn: redis.Redis, graph: str, qdrant: Qdrant, collection: str, spool: Spool | None, progress: Progress
) -> Findings:
    """Every memory against its point; flat in memory but for the ids that are found wrong."""
    found = Findings()
    with points_present(qdrant, collection) as present, IdTable() as seen:
        nodes = iter_memories(conn, graph)
        while page := list(islice(nodes, _PAGE)):
            _compare_page(page, present, seen, spool, found)
            progress(len(page))
        _find_surplus(present, seen, found)
    return found


def _compare_page(
    page: list[MemoryNode], present: IdTable, seen: IdTable, spool: Spool | None, found: Findings
) -> None:
    rows: dict[PointId, dict[str, Any]] = {}
    repeated = seen.payloads(
        [one for one in (point_id(node.properties.get("id")) for node in page) if one is not None]
    )
    for node in page:
        identity = point_id(node.properties.get("id"))
        if unusable(node.properties) or identity is None or identity in rows or identity in repeated:
            found.exempt += 1
        else:
            rows[identity] = orjson.loads(orjson.dumps(node.properties))
    seen.put((one, None) for one in rows)
    found.expected += len(rows)
    ids = list(rows)
    points = present.payloads(ids)
    planned = spool.memories_of(ids) if spool else {}
    kept = {one: orjson.loads(row.payload) for one, row in spool.kept(ids).items()} if spool else {}
    for identity, properties in rows.items():
        payload = points.get(identity)
        _compare_one(identity, properties, payload, planned.get(identity), found)
        if payload is not None:
            _compare_keys(identity, properties, payload, kept.get(identity, {}), found)


def _compare_one(
    identity: PointId,
    properties: dict[str, Any],
    payload: dict[str, Any] | None,
    planned: MemoryRow | None,
    found: Findings,
) -> None:
    """`planned` is the memory at the last catch-up: what differs from it was written since."""
    if payload is None:
        (found.missing if planned is not None else found.newer).append(identity)
        return
    if payload.get("content") != properties["content"]:
        moved = planned is None or planned.content != properties["content"]
        (found.newer_contents if moved else found.contents).append(identity)
        return
    differs = _differing(payload, properties)
    if differs:
        then = _differing(payload, orjson.loads(planned.payload)) if planned else differs
        (found.payloads if then else found.newer_payloads).append((identity, ", ".join(differs)))


def _differing(payload: dict[str, Any], properties: dict[str, Any]) -> list[str]:
    """The keys in which a point is not as the migration's rule wants it."""
    steady = {key: value for key, value in properties.items() if key not in _MOVING}
    wanted = merged_payload(payload, steady)
    return sorted(key for key in wanted if wanted[key] != payload.get(key))


def _compare_keys(
    identity: PointId,
    properties: dict[str, Any],
    payload: dict[str, Any],
    kept: dict[str, Any],
    found: Findings,
) -> None:
    lost = set(kept) - set(payload)
    lost |= {key for key in _NEEDED if properties.get(key) is not None and key not in payload}
    if lost:
        found.lost_keys.append((identity, ", ".join(sorted(lost))))


def _find_surplus(present: IdTable, seen: IdTable, found: Findings) -> None:
    for page in present.ids():
        known = seen.payloads(page)
        found.surplus += [one for one in page if one not in known]
