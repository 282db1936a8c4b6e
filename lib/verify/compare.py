"""Compare graph and collection (ids, content, payloads), choose memories to try recall with; compare vectors."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from hashlib import blake2b
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from lib.backup.graph import GraphSource
from lib.backup.points import TemporaryIdTable, base_payload, identical, merged_payload, orphan_ids, point_id, unusable
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.embeddings.cache_file import chunks
from lib.clients.falkordb.queries import MemoryNode, iter_memories
from lib.clients.qdrant.collection import DATATYPES, FLOAT16, FLOAT32, TURBO4, UINT8, CollectionState
from lib.clients.qdrant.points import Point, PointId
from lib.concurrency import Progress, read_ahead
from lib.dimensions import EmbeddingSpec

_PAGE = 500
_NEWEST, _SAMPLED = 3, 8
_LONGEST_QUERY = 1500  # characters: an API that takes GET only gets it in the URL
# AutoMem changes them in the graph all the time: recall the first, consolidation the second. It changes the points
# later or, up to 0.11, never. When it updates a memory, the point loses relevance_score (0.16).
_LAGGING_KEYS = ("last_accessed", "relevance_score")
_CLOCK_SKEW = timedelta(hours=1)  # between two machines
_EXEMPT = {"exempt": True}

Properties = dict[str, Any]
# Under Cosine, Qdrant and this module normalize in float32: the last bits may differ.
TOLERANCE = 2e-6
# 4 bits per number: the least cosine measured over 60 vectors was 0.977 at 48 numbers, 0.992 at 768 (1.19).
TURBO4_COSINE = 0.97
# Vectors of one model for one text: a provider's answers differ by far less, two models by far more.
SAME_MODEL_COSINE = 0.99
ONLY_MISSING = "python scripts/reembed_embeddings.py --only-missing"
REPLACE_ALL = "python scripts/backup_automem.py && python scripts/reembed_embeddings.py"
# In the embedding cache: the run id of the migration since which a verification found a vector of another model.
OTHER_MODEL = "other model since"


@dataclass(frozen=True)
class Sample:
    """A memory that recall by its content must bring first, or another one with the same content."""

    id: str
    content: str


@dataclass
class Differences:
    """Points that differ in one respect, by id: `newer` ones because their memory was written after the migration."""

    wrong: list[str] = field(default_factory=list)
    newer: list[str] = field(default_factory=list)
    ids: list[PointId] = field(default_factory=list)

    def add(self, point: PointId, *, is_newer: bool, keys: list[str] | None = None) -> None:
        """Add a point, and the payload keys in which it differs."""
        text = f"{point} ({', '.join(keys)})" if keys else str(point)
        (self.newer if is_newer else self.wrong).append(text)
        self.ids.append(point)


@dataclass
class Findings:
    """What one pass over graph and collection found.

    `expected`: memories that must have a point; `exempt`: those that need none. `lagging`: points that are equal
    except for keys that AutoMem changes in the graph all the time. `samples`: memories to try recall with. `since`: of
    the memories that were written after the migration and have their point, the newest three and a random eight, each
    with its time. The eight have the smallest hashes of all ids, so that later runs choose the same.
    """

    expected: int = 0
    exempt: int = 0
    missing: Differences = field(default_factory=Differences)
    contents: Differences = field(default_factory=Differences)
    payloads: Differences = field(default_factory=Differences)
    orphans: list[str] = field(default_factory=list)
    lagging: int = 0
    samples: list[Sample] = field(default_factory=list)
    since: list[tuple[datetime, Sample]] = field(default_factory=list)

    def add_since(self, written_at: datetime, sample: Sample) -> None:
        """Add a memory that was written after the migration."""
        every = sorted([*self.since, (written_at, sample)], key=lambda one: one[0], reverse=True)
        sampled = sorted(every, key=lambda one: blake2b(one[1].id.encode()).digest())[:_SAMPLED]
        self.since = [one for number, one in enumerate(every) if number < _NEWEST or one in sampled]


def compare_stores(
    graph: GraphSource,
    existing: TemporaryIdTable,
    cache: EmbeddingCache | None,
    migrated_at: datetime | None,
    samples: int,
    progress: Progress,
    only: Container[PointId] | None = None,
) -> Findings:
    """Compare every memory (or `only` some) with its existing point, and choose up to `samples` memories.

    A memory is newer than the migration if it was written after `migrated_at`, whatever the plan in `cache` has; a
    time in the future does not count. A node without a usable id or text is exempt, and so is its point.
    """
    found = Findings()
    step = max(1, len(existing) // samples)  # so that they are spread over all memories
    with TemporaryIdTable() as seen:
        for page in read_ahead(chunks(iter_memories(graph.conn, graph.graph), _PAGE)):
            asked = [node for node in page if only is None or point_id(node.properties.get("id")) in only]
            memories = _usable(asked, seen, found)
            payloads = existing.payloads(list(memories))
            _compare_page(memories, payloads, cache, migrated_at, found)
            # A sample is every `step`-th memory, or the next one that is fit for it.
            for number, (identity, properties) in enumerate(memories.items(), found.expected - len(memories)):
                content, payload = str(properties["content"]), payloads.get(identity)
                is_valid = not (properties.get("archived") or properties.get("t_invalid"))
                is_due = len(found.samples) < samples and number >= len(found.samples) * step
                if is_due and is_valid and len(content) < _LONGEST_QUERY and (payload or {}).get("content") == content:
                    found.samples.append(Sample(str(identity), content))
            progress(len(page))
        found.orphans = [str(one) for one in orphan_ids(existing, seen.payloads)]
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
    decoded = cache.decoded if cache else orjson.loads
    latest = datetime.now(timezone.utc) + _CLOCK_SKEW
    for identity, properties in memories.items():
        payload, row = payloads.get(identity), planned.get(identity)
        written_at = _written_at(properties)
        is_newer = migrated_at is not None and migrated_at < written_at <= latest
        if payload is None:
            found.missing.add(identity, is_newer=is_newer or row is None)
            continue
        if payload.get("content") != properties["content"]:
            has_changed = row is None or row.content != properties["content"]
            found.contents.add(identity, is_newer=is_newer or has_changed)
            continue
        before = None
        if row:
            before = properties if row.payload == orjson.dumps(properties) else decoded(row.payload)
        if is_newer:
            found.add_since(written_at, Sample(str(identity), str(properties["content"])))
        is_same = before is properties or (before is not None and _stable(before) == _stable(properties))
        has_changed = is_newer or not is_same
        # If the memory changed, AutoMem has rewritten its point: keys that it dropped were not lost by the migration.
        old = None if has_changed or identity not in old_points else decoded(old_points[identity].payload)
        differing = _differing_keys(payload, old, properties)
        if differing:
            was_wrong = before is None or _differing_keys(payload, old, before)
            found.payloads.add(identity, is_newer=is_newer or not was_wrong, keys=differing)
        elif any(payload.get(key) != properties.get(key) for key in _LAGGING_KEYS):
            lagging = {key: properties[key] for key in _LAGGING_KEYS if key in properties}
            found.lagging += not identical(payload, merged_payload(payload, lagging))


def _differing_keys(payload: dict[str, Any], saved: dict[str, Any] | None, properties: Properties) -> list[str]:
    """The keys in which the point is not as the migration would write it."""
    wanted = merged_payload(base_payload(payload, saved), _stable(properties))
    return sorted(key for key in wanted if key not in payload or not identical(wanted[key], payload[key]))


def _stable(properties: Properties) -> Properties:
    return {key: value for key, value in properties.items() if key not in _LAGGING_KEYS}


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


def vectors_differ(
    stored: NDArray[np.float32], wanted: NDArray[np.float32], distance: str = "Cosine", datatype: str = FLOAT32
) -> NDArray[np.bool_]:
    """For each row, whether `stored` (n, dims) is not what a collection makes of `wanted` (n, dims).

    Qdrant normalizes under Cosine (except uint8), then rounds to `datatype`. If it does not normalize, the bits must be
    equal. A row with a number that is not finite always differs. turbo4 is compared by direction only.
    Raises ValueError for a datatype that is not in DATATYPES.
    """
    if datatype not in DATATYPES:
        raise ValueError(f"vectors of datatype {datatype} cannot be compared")
    if stored.shape != wanted.shape:
        return np.ones(len(stored), dtype=np.bool_)
    if datatype == UINT8:  # as Rust casts: towards zero, clipped at both ends
        return _any_gap(stored, np.clip(np.trunc(wanted), 0, 255), 0.0)
    if datatype == TURBO4:
        cosines = (_normalized(stored) * _normalized(wanted)).sum(axis=1)
        both_zero = ~stored.any(axis=1) & ~wanted.any(axis=1)
        return np.asarray(~((cosines >= TURBO4_COSINE) | both_zero), dtype=np.bool_)
    if datatype == FLOAT16:
        rounded = (_normalized(wanted) if distance == "Cosine" else wanted).astype(np.float16)
        step = np.abs(np.spacing(rounded)).astype(np.float64) if distance == "Cosine" else 0.0
        return _any_gap(stored, rounded, step)
    if distance != "Cosine":
        return _any_gap(stored, wanted, 0.0)
    return _any_gap(_normalized(stored), _normalized(wanted), TOLERANCE)


def _any_gap(
    stored: NDArray[np.floating], wanted: NDArray[np.floating], allowed: NDArray[np.float64] | float
) -> NDArray[np.bool_]:
    gap = np.abs(stored.astype(np.float64, copy=False) - wanted.astype(np.float64, copy=False))
    return np.asarray(~(gap <= allowed).all(axis=1), dtype=np.bool_)


def _normalized(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(lengths == 0, 1.0, lengths))


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the cosine of two vectors (dims,); 0 if one of them is all zeros."""
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.dot(one, other)) / lengths if lengths else 0.0


def different_vectors(
    points: list[Point], cache: EmbeddingCache, spec: EmbeddingSpec, state: CollectionState, *, planned: bool = False
) -> tuple[int, list[tuple[Point, NDArray[np.float32]]]]:
    """How many of the points the cache knows, and those whose stored vector differs from the cache's, with the latter.

    The cache's vector is that of the point's own content, or with `planned` that of its memory in the plan. `state` is
    the collection's: its distance and datatype decide how Qdrant stores a vector.
    """
    if planned:
        rows = cache.memories_of([point.id for point in points])
        keyed = [(point, rows[point.id].key) for point in points if point.id in rows]
    else:
        keyed = [(point, cache.text_key(spec, str((point.payload or {}).get("content", "")))) for point in points]
    vectors = cache.get_vectors([key for _, key in keyed])
    pairs = [(point, np.frombuffer(vectors[key], dtype="<f4")) for point, key in keyed if key in vectors]
    wrong: list[tuple[Point, NDArray[np.float32]]] = []
    sized: list[tuple[Point, NDArray[np.float32]]] = []
    for point, vector in pairs:
        has_size = point.vector is not None and len(point.vector) == spec.size
        (sized if has_size else wrong).append((point, vector))
    if sized:
        stored = np.vstack([point.vector for point, _ in sized if point.vector is not None])
        wanted = np.vstack([vector for _, vector in sized])
        differ = vectors_differ(stored, wanted, state.distance, state.datatype)
        wrong += [pair for pair, bad in zip(sized, differ, strict=True) if bad]
    return len(pairs), wrong
