"""Compare graph and collection: ids, content, payloads; and choose memories to try recall with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from hashlib import blake2b
from typing import Any

import orjson
import redis

from lib.backup.existing_points import TemporaryIdTable, existing_points
from lib.backup.payloads import PointId, base_payload, identical, merged_payload, point_id, unusable
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.embeddings.cache_file import chunks
from lib.clients.falkordb.queries import MemoryNode, iter_memories
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import Progress

_PAGE = 500
_CANDIDATES_PER_SAMPLE = 3  # some turn out not to be unique
_LONGEST_QUERY = 1500  # characters: an API that takes GET only gets it in the URL
_RECALL_KEYS = ("last_accessed",)  # recall updates them all the time, first in the graph
_CLOCK_SKEW = timedelta(hours=1)  # between two machines
_EXEMPT, _REPEATED = {"exempt": True}, {"repeated": True}

Properties = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A memory that recall by its content must bring first."""

    id: str
    content: str


@dataclass
class Differences:
    """Points that differ in one respect, by id: `newer` ones because their memory was written after the migration."""

    wrong: list[str] = field(default_factory=list)
    newer: list[str] = field(default_factory=list)

    def add(self, point: PointId, *, is_newer: bool, keys: list[str] | None = None) -> None:
        """Add a point, and the payload keys in which it differs."""
        text = f"{point} ({', '.join(keys)})" if keys else str(point)
        (self.newer if is_newer else self.wrong).append(text)


@dataclass
class Findings:
    """What one pass over graph and collection found.

    `expected`: memories that must have a point; `exempt`: those that need none. `recalled`: points that are equal
    except for keys that recall updates. `samples`: memories to try recall with.
    """

    expected: int = 0
    exempt: int = 0
    missing: Differences = field(default_factory=Differences)
    contents: Differences = field(default_factory=Differences)
    payloads: Differences = field(default_factory=Differences)
    orphans: list[str] = field(default_factory=list)
    recalled: int = 0
    samples: list[Sample] = field(default_factory=list)


def compare_stores(
    conn: redis.Redis,
    graph: str,
    qdrant: Qdrant,
    collection: str,
    cache: EmbeddingCache | None,
    migrated_at: datetime | None,
    samples: int,
    progress: Progress,
) -> Findings:
    """Compare every memory with its point, and choose up to `samples` memories. Only what differs stays in memory.

    A memory is newer than the migration if it was written after `migrated_at`, whatever the plan in `cache` has; a
    time in the future does not count. A node without a usable id or text is exempt, and so is its point.
    """
    found = Findings()
    with (
        existing_points(qdrant, collection) as existing,
        TemporaryIdTable() as seen,
        TemporaryIdTable() as contents,
    ):
        candidates = _Candidates(contents, samples, len(existing))
        for page in chunks(iter_memories(conn, graph), _PAGE):
            memories = _usable(page, seen, found)
            payloads = existing.payloads(list(memories))
            _compare_page(memories, payloads, cache, migrated_at, found)
            candidates.add(memories, payloads)
            progress(len(page))
        for ids in existing.ids():
            known = seen.payloads(ids)
            found.orphans += [str(one) for one in ids if one not in known]
        found.samples = candidates.samples()
    return found


def _usable(page: list[MemoryNode], seen: TemporaryIdTable, found: Findings) -> dict[PointId, Properties]:
    """The memories of the page that must have a point: as in the plan, the first usable node with each id."""
    memories: dict[PointId, Properties] = {}
    exempt: set[PointId] = set()
    ids = [point_id(node.properties.get("id")) for node in page]
    before = seen.payloads([one for one in ids if one is not None])
    for node, identity in zip(page, ids, strict=True):
        if identity is None or unusable(node.properties):
            found.exempt += 1
            if identity is not None and identity not in before:
                exempt.add(identity)
        elif identity in memories or before.get(identity) == {}:
            found.exempt += 1
        else:
            memories[identity] = orjson.loads(orjson.dumps(node.properties))
    seen.put((one, _EXEMPT) for one in exempt)
    seen.put((one, None) for one in memories)
    found.expected += len(memories)
    return memories


def _compare_page(
    memories: dict[PointId, Properties],
    payloads: dict[PointId, dict[str, Any]],
    cache: EmbeddingCache | None,
    migrated_at: datetime | None,
    found: Findings,
) -> None:
    ids = list(memories)
    planned = cache.memories_of(ids) if cache else {}  # the memories as the last catch-up read them
    old_points = cache.saved_points(ids) if cache else {}
    latest = datetime.now(timezone.utc) + _CLOCK_SKEW
    for identity, properties in memories.items():
        payload, row = payloads.get(identity), planned.get(identity)
        is_newer = migrated_at is not None and migrated_at < _written_at(properties) <= latest
        if payload is None:
            found.missing.add(identity, is_newer=is_newer or row is None)
            continue
        if payload.get("content") != properties["content"]:
            has_changed = row is None or row.content != properties["content"]
            found.contents.add(identity, is_newer=is_newer or has_changed)
            continue
        before = orjson.loads(row.payload) if row else None
        has_changed = is_newer or before is None or _stable(before) != _stable(properties)
        # If the memory changed, AutoMem has rewritten its point: keys that it dropped were not lost by the migration.
        old = None if has_changed or identity not in old_points else orjson.loads(old_points[identity].payload)
        differing = _differing_keys(payload, old, properties)
        if differing:
            was_wrong = before is None or _differing_keys(payload, old, before)
            found.payloads.add(identity, is_newer=is_newer or not was_wrong, keys=differing)
        elif any(key in payload and payload[key] != properties.get(key, payload[key]) for key in _RECALL_KEYS):
            found.recalled += 1


def _differing_keys(payload: dict[str, Any], saved: dict[str, Any] | None, properties: Properties) -> list[str]:
    """The keys in which the point is not as the migration would write it."""
    wanted = merged_payload(base_payload(payload, saved), _stable(properties))
    return sorted(key for key in wanted if key not in payload or not identical(wanted[key], payload[key]))


def _stable(properties: Properties) -> Properties:
    return {key: value for key, value in properties.items() if key not in _RECALL_KEYS}


def _written_at(properties: Properties) -> datetime:
    """When AutoMem last wrote the memory, by the memory's own timestamps."""
    found = [datetime.min.replace(tzinfo=timezone.utc)]
    for key in ("timestamp", "updated_at"):
        try:
            moment = datetime.fromisoformat(str(properties.get(key)).replace("Z", "+00:00"))
        except ValueError:
            continue
        found.append(moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc))
    return max(found)


class _Candidates:
    """Chooses up to `count` samples with a unique content, spread over `total` memories, from pages of memories."""

    def __init__(self, contents: TemporaryIdTable, count: int, total: int) -> None:
        self._contents = contents
        self._count = count
        self._step = max(1, total // (count * _CANDIDATES_PER_SAMPLE))
        self._added = 0
        self._chosen: list[tuple[str, Sample]] = []

    def add(self, memories: dict[PointId, Properties], payloads: dict[PointId, dict[str, Any]]) -> None:
        """Add a page of memories, with the payloads of their points."""
        keys = {one: _content_key(str(properties["content"])) for one, properties in memories.items()}
        times = Counter(keys.values())
        known = self._contents.payloads(list(times))
        self._contents.put((key, _REPEATED if key in known or times[key] > 1 else None) for key in times)
        for identity, properties in memories.items():
            if self._added % self._step == 0 and _is_recallable(properties, payloads.get(identity)):
                self._chosen.append((keys[identity], Sample(str(identity), str(properties["content"]))))
            self._added += 1

    def samples(self) -> list[Sample]:
        """The samples, after the last page."""
        marks = self._contents.payloads([key for key, _ in self._chosen])
        unique = [sample for key, sample in self._chosen if not marks[key]]
        return unique[:: max(1, len(unique) // self._count)][: self._count]


def _is_recallable(properties: Properties, payload: dict[str, Any] | None) -> bool:
    content = str(properties["content"])
    if properties.get("archived") or properties.get("t_invalid") or len(content) >= _LONGEST_QUERY:
        return False
    return payload is not None and payload.get("content") == content


def _content_key(content: str) -> str:
    # A letter first: the table takes texts of digits for numbers.
    return "c" + blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
