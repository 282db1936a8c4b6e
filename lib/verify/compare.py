"""Graph and collection compared: ids, content, payloads; and memories to try recall with."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from hashlib import blake2b
from types import TracebackType
from typing import Any

import orjson
import redis

from lib.backup.existing_points import TemporaryIdTable, existing_points, pages
from lib.backup.payloads import PointId, identical, merged_payload, point_id, standing_payload, unusable
from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow
from lib.clients.falkordb.queries import MemoryNode, iter_memories
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import Progress

_SPARE = 3  # candidates a sample: some turn out not to be unique
_LONGEST = 1500  # characters: a query is sent in a URL where the API takes GET only
_AGAIN = {"again": True}


@dataclass(frozen=True)
class Sample:
    """A memory that recall by its own content must bring first."""

    id: str
    content: str


class Candidates:
    """Gathers up to `count` samples, spread over `total` memories, while the graph is read page by page."""

    def __init__(self, count: int, total: int) -> None:
        self._count = count
        self._step = max(1, total // (count * _SPARE))
        self._shown = 0
        self._found: list[tuple[str, Sample]] = []
        self._contents = TemporaryIdTable()

    def __enter__(self) -> Candidates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contents.__exit__(kind, value, trace)

    def show(self, memories: dict[PointId, dict[str, Any]], points: dict[PointId, dict[str, Any]]) -> None:
        """A page of memories, and the payloads of their points."""
        keys = {one: _key(str(properties["content"])) for one, properties in memories.items()}
        known, seen = self._contents.payloads(list(keys.values())), set[str]()
        for key in keys.values():
            known |= {key: _AGAIN} if key in seen else {}
            seen.add(key)
        self._contents.put((key, _AGAIN if key in known else None) for key in seen)
        for identity, properties in memories.items():
            if self._shown % self._step == 0 and _fit(properties, points.get(identity)):
                self._found.append((keys[identity], Sample(str(identity), str(properties["content"]))))
            self._shown += 1

    def samples(self) -> list[Sample]:
        """Up to `count` of them, once every memory was shown."""
        marks = self._contents.payloads([key for key, _ in self._found])
        unique = [sample for key, sample in self._found if not marks[key]]
        step = max(1, len(unique) // self._count)
        return unique[::step][: self._count]


def _fit(properties: dict[str, Any], payload: dict[str, Any] | None) -> bool:
    content = str(properties["content"])
    current = not properties.get("archived") and not properties.get("t_invalid")
    return current and payload is not None and payload.get("content") == content and len(content) < _LONGEST


def _key(content: str) -> str:
    # A letter first: the table takes texts of digits for numbers.
    return "c" + blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


_PAGE = 500
# Recall moves this on all the time, in the graph first.
_MOVING = ("last_accessed",)
_EXEMPT = {"exempt": True}
_SKEW = timedelta(hours=1)  # of the clocks of two machines


@dataclass
class Findings:
    """What one pass over graph and collection found; `newer*` is what moved on since the last catch-up.

    `moving`: points that are equal but for keys that recall moves on, in the graph first.
    """

    expected: int = 0
    exempt: int = 0
    missing: list[PointId] = field(default_factory=list)
    newer: list[PointId] = field(default_factory=list)
    orphans: list[PointId] = field(default_factory=list)
    contents: list[PointId] = field(default_factory=list)
    newer_contents: list[PointId] = field(default_factory=list)
    payloads: list[tuple[PointId, str]] = field(default_factory=list)
    newer_payloads: list[tuple[PointId, str]] = field(default_factory=list)
    moving: int = 0


def compare_stores(
    conn: redis.Redis,
    graph: str,
    qdrant: Qdrant,
    collection: str,
    cache: EmbeddingCache | None,
    progress: Progress,
    candidates: Candidates,
    proved: datetime | None,
) -> Findings:
    """Every memory against its point; flat in memory but for the ids that are found wrong.

    What was written after `proved`, the end of the last migration, is newer than it, whatever the plan holds by now;
    a memory that bears a moment still to come says nothing of when it was written.
    `candidates` is shown every memory that has a point of its content: recall may be tried with it.
    """
    found = Findings()
    with existing_points(qdrant, collection) as existing, TemporaryIdTable() as seen:
        for page in pages(iter_memories(conn, graph), _PAGE):
            rows = _usable(page, seen, found)
            points = existing.payloads(list(rows))
            _compare_page(rows, points, cache, found, proved)
            candidates.show(rows, points)
            progress(len(page))
        _find_orphans(existing, seen, found)
    return found


def _usable(page: list[MemoryNode], seen: TemporaryIdTable, found: Findings) -> dict[PointId, dict[str, Any]]:
    """The memories of the page that must have a point, as the plan has it: the first usable node with an id."""
    rows: dict[PointId, dict[str, Any]] = {}
    exempt: set[PointId] = set()
    identities = [point_id(node.properties.get("id")) for node in page]
    before = seen.payloads([one for one in identities if one is not None])
    for node, identity in zip(page, identities, strict=True):
        if identity is None or unusable(node.properties):
            found.exempt += 1
            if identity is not None and identity not in before:
                exempt.add(identity)
        elif identity in rows or before.get(identity) == {}:
            found.exempt += 1
        else:
            rows[identity] = orjson.loads(orjson.dumps(node.properties))
    seen.put((one, _EXEMPT) for one in exempt)
    seen.put((one, None) for one in rows)
    found.expected += len(rows)
    return rows


def _compare_page(
    rows: dict[PointId, dict[str, Any]],
    points: dict[PointId, dict[str, Any]],
    cache: EmbeddingCache | None,
    found: Findings,
    proved: datetime | None,
) -> None:
    ids = list(rows)
    planned = cache.memories_of(ids) if cache else {}
    kept = {one: orjson.loads(row.payload) for one, row in cache.saved_points(ids).items()} if cache else {}
    now = datetime.now(timezone.utc) + _SKEW
    for identity, properties in rows.items():
        late = proved is not None and proved < _written(properties) <= now
        pair = _Pair(properties, points.get(identity), kept.get(identity), late)
        _compare_one(identity, pair, planned.get(identity), found)


@dataclass(frozen=True)
class _Pair:
    """A memory, its point's payload, the payload that the old point had; `late`: written since the migration."""

    properties: dict[str, Any]
    payload: dict[str, Any] | None
    kept: dict[str, Any] | None
    late: bool


def _compare_one(identity: PointId, pair: _Pair, planned: MemoryRow | None, found: Findings) -> None:
    """`planned` is the memory at the last catch-up: what differs from it was written since."""
    properties, payload = pair.properties, pair.payload
    if payload is None:
        (found.newer if planned is None or pair.late else found.missing).append(identity)
        return
    if payload.get("content") != properties["content"]:
        moved = planned is None or pair.late or planned.content != properties["content"]
        (found.newer_contents if moved else found.contents).append(identity)
        return
    then = orjson.loads(planned.payload) if planned else None
    moved = then is None or pair.late or _steady(then) != _steady(properties)
    # Where the memory moved on AutoMem has written its point anew: what it dropped was not lost by the migration.
    kept = None if moved else pair.kept
    differs = _differing(payload, kept, properties)
    found.moving += not differs and any(
        key in payload and key in properties and payload[key] != properties[key] for key in _MOVING
    )
    if differs:
        stale = not pair.late and (then is None or _differing(payload, kept, then))
        (found.payloads if stale else found.newer_payloads).append((identity, ", ".join(differs)))


def _differing(payload: dict[str, Any], kept: dict[str, Any] | None, properties: dict[str, Any]) -> list[str]:
    """The keys in which a point is not as the migration would write it."""
    steady = _steady(properties)
    wanted = merged_payload(standing_payload(payload, kept), steady)
    return sorted(key for key in wanted if key not in payload or not identical(wanted[key], payload[key]))


def _written(properties: dict[str, Any]) -> datetime:
    """When AutoMem last wrote the memory, as the memory itself says."""
    found = [datetime.min.replace(tzinfo=timezone.utc)]
    for key in ("timestamp", "updated_at"):
        try:
            moment = datetime.fromisoformat(str(properties.get(key)).replace("Z", "+00:00"))
        except ValueError:
            continue
        found.append(moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc))
    return max(found)


def _steady(properties: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in properties.items() if key not in _MOVING}


def _find_orphans(existing: TemporaryIdTable, seen: TemporaryIdTable, found: Findings) -> None:
    """Points without a node of their id; where the node is exempt, its point is left to AutoMem."""
    for page in existing.ids():
        known = seen.payloads(page)
        found.orphans += [one for one in page if one not in known]
