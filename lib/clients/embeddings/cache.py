"""The embedding cache: every vector that was paid for, the plan of one re-embedding, and saved points."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lib.clients.embeddings.cache_file import PREFIX_BYTES, CacheDamaged, CacheFile, chunks
from lib.clients.embeddings.pricing import input_limit
from lib.dimensions import EmbeddingSpec, facts_of, public_url, same_model

# A key is PREFIX_BYTES for endpoint, model and size, then TEXT_BYTES for the text.
TEXT_BYTES, FLOAT_BYTES, SUM_BYTES = 12, 4, 4
_COLUMNS = "m.id, m.point_id, m.node_id, m.key, m.content, m.payload, m.tokens"
# Of several memories with the same text, the first one represents all.
_DISTINCT = "FROM memories m WHERE NOT EXISTS (SELECT 1 FROM memories f WHERE f.key = m.key AND f.id < m.id)"
_MISSING = f"{_DISTINCT} AND NOT EXISTS (SELECT 1 FROM vectors v WHERE v.key = m.key)"  # noqa: S608 - constants


@dataclass(frozen=True)
class MemoryRow:
    """One memory of the graph and what its point should hold: `payload` is the JSON of the graph's values."""

    point_id: str | int
    node_id: int
    key: bytes
    content: str
    payload: bytes
    tokens: int


@dataclass(frozen=True)
class TextRow:
    """A text to embed: `label` names it to the operator (the memory's id); `tokens` is 0 if they are not counted."""

    key: bytes
    text: str
    label: str
    tokens: int = 0


@dataclass(frozen=True)
class Missing:
    """A number of distinct texts, and the tokens that they are billed for."""

    texts: int
    tokens: int


@dataclass(frozen=True)
class SavedPoint:
    """A live point as it was read: its payload as JSON, and its vector (float32, little-endian) if it was read too."""

    point_id: str | int
    payload: bytes
    vector: bytes | None = None


def point_id_of(stored: str) -> str | int:
    """A point id from its TEXT: an unsigned 64-bit number does not fit SQLite's INTEGER. A UUID is never all digits."""
    return int(stored) if stored.isdigit() else stored


def _memory_row(values: tuple[Any, ...]) -> MemoryRow:
    return MemoryRow(point_id_of(values[1]), *values[2:])


class EmbeddingCache(CacheFile, AbstractContextManager["EmbeddingCache"]):
    """The open cache; see CacheFile for the argument."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        specs = self.rows("SELECT prefix, base_url, model, size FROM specs")
        self._specs = {prefix: EmbeddingSpec(url, model, size) for prefix, url, model, size in specs}

    # --- vectors

    def text_key(self, spec: EmbeddingSpec, text: str) -> bytes:
        """The 16-byte key of `text` under `spec`; the cache remembers the spec."""
        spec = _without_credentials(spec)
        digest = _spec_digest(spec)
        prefix = digest[:PREFIX_BYTES]
        if prefix not in self._specs:
            with self.transaction():
                values = [prefix, spec.base_url, spec.model, spec.size]
                self.db.execute("INSERT OR IGNORE INTO specs VALUES (?, ?, ?, ?)", values)
            self._specs[prefix] = spec
        own = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=digest, digest_size=TEXT_BYTES)
        return prefix + own.digest()

    def known(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of `keys` that have a vector."""
        return {key for (key,) in self.rows_in("SELECT key FROM vectors WHERE key IN", keys)}

    def put_vectors(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Store (key, float32 little-endian) pairs in one transaction, on the disk when it returns.

        An existing vector is not replaced. Raises ValueError, storing nothing, for a vector of a width that is not its
        spec's.
        """
        for key, blob in rows:
            spec = self._specs.get(key[:PREFIX_BYTES])
            if spec is None or len(key) != PREFIX_BYTES + TEXT_BYTES:
                raise ValueError("a key that this embedding cache did not make")
            if len(blob) != FLOAT_BYTES * spec.size:
                raise ValueError(f"{len(blob)} bytes for a vector of {spec.size} dimensions")
        sealed = ((key, blob + _checksum(key, blob)) for key, blob in rows)
        with self.transaction():
            self.db.executemany("INSERT OR IGNORE INTO vectors (key, vector) VALUES (?, ?)", sealed)

    def get_vectors(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The vectors of those `keys` that have one, float32 little-endian.

        Raises CacheDamaged if some do not match their checksum, and removes these: they must be paid for again.
        """
        found: dict[bytes, bytes] = {}
        damaged: list[list[bytes]] = []
        for key, stored in self.rows_in("SELECT key, vector FROM vectors WHERE key IN", keys):
            spec = self._specs.get(key[:PREFIX_BYTES])
            width = FLOAT_BYTES * spec.size if spec else 0
            blob, seal = (stored[:width], stored[width:]) if isinstance(stored, bytes) else (b"", b"")
            # An earlier version stored no checksum.
            if spec and len(blob) == width and seal in {b"", _checksum(key, blob)}:
                found[key] = blob
            else:
                damaged.append([key])
        if damaged:
            with self.transaction():
                self.db.executemany("DELETE FROM vectors WHERE key = ?", damaged)
            raise CacheDamaged(
                f"embeddings in {self.vectors_path} were damaged on the disk (wrong checksum): {len(damaged)}, which"
                " were removed",
                next_step="check that disk, then run the same command again: only these texts are paid for again",
            )
        return found

    def forget_planned(self) -> int:
        """Delete the vectors of the plan's texts, so that they are embedded again; returns how many."""
        with self.transaction():
            return self.db.execute("DELETE FROM vectors WHERE key IN (SELECT key FROM memories)").rowcount

    def derive(self, spec: EmbeddingSpec, texts: Sequence[str]) -> list[tuple[bytes, bytes]]:
        """Vectors of `spec` cut from larger ones of the same model and endpoint: (key, blob). Nothing is stored.

        Vectors of the same size under another name of the model (`openai/...`) are taken as they are. Only for models
        whose vectors may be cut: truncating and scaling to length 1 is what OpenAI's `dimensions` and Voyage's
        `output_dimension` do (https://platform.openai.com/docs/guides/embeddings,
        https://docs.voyageai.com/docs/flexible-dimensions-and-quantization).
        """
        wanted = {self.text_key(spec, text): text for text in texts}
        derived: dict[bytes, bytes] = {}
        for larger in self._larger_specs(spec):
            sources = {self.text_key(larger, text): key for key, text in wanted.items() if key not in derived}
            for source, blob in self.get_vectors(sources).items():
                derived[sources[source]] = _cut(blob, spec.size)
        return list(derived.items())

    def derive_missing(self, spec: EmbeddingSpec) -> None:
        """Derive and store the plan's missing vectors, as far as the cache has larger ones."""
        if self._larger_specs(spec):
            for texts in chunks(row.text for row in self.missing_texts(spec)):
                self.put_vectors(self.derive(spec, texts))

    def _larger_specs(self, spec: EmbeddingSpec) -> list[EmbeddingSpec]:
        """The specs that vectors of `spec` can be cut from, the nearest size first."""
        spec = _without_credentials(spec)
        same = [each for each in self._specs.values() if each != spec and each.base_url == spec.base_url]
        same = [each for each in same if same_model(each.model, spec.model) and each.size >= spec.size]
        return sorted(same, key=lambda each: each.size) if facts_of(spec.model).sizes else []

    # --- the plan: the memories that the last scan of the graph found

    def begin_scan(self) -> None:
        """Start a scan of the graph, which replaces the one before, finished or not."""
        self.set_meta("scan", str(self._scan() + 1))

    def _scan(self) -> int:
        return int(self.get_meta("scan") or 0)

    def put_memories(self, rows: Sequence[MemoryRow]) -> None:
        """Add or replace memories by point id, in one transaction."""
        scan = self._scan()
        with self.transaction():
            self.db.executemany(
                """INSERT INTO memories (point_id, node_id, key, content, payload, tokens, scan)
                   VALUES (?, ?, ?, ?, ?, ?, ?)
                   ON CONFLICT (point_id) DO UPDATE SET node_id = excluded.node_id, key = excluded.key,
                     content = excluded.content, payload = excluded.payload, tokens = excluded.tokens,
                     scan = excluded.scan""",
                ((str(row.point_id), row.node_id, row.key, row.content, row.payload, row.tokens, scan) for row in rows),
            )

    def end_scan(self) -> int:
        """Delete the memories that this scan did not find; returns how many."""
        with self.transaction():
            return self.db.execute("DELETE FROM memories WHERE scan < ?", [self._scan()]).rowcount

    def memory_count(self) -> int:
        """The number of memories in the plan."""
        return self.number("SELECT count(*) FROM memories")

    def memories(self, page: int = 1000) -> Iterator[MemoryRow]:
        """Every memory of the plan, read page by page."""
        return self._paged("FROM memories m WHERE 1", page)

    def sample(self, count: int) -> list[MemoryRow]:
        """`count` memories of distinct texts, the same ones each time. Keys are hashes, so their order is random."""
        rows = self.rows(f"SELECT {_COLUMNS} {_DISTINCT} ORDER BY m.key, m.id LIMIT ?", [count])
        return [_memory_row(values) for values in rows]

    def embedded(self, count: int) -> list[MemoryRow]:
        """The `count` memories with the shortest texts that have a vector."""
        has_vector = "AND EXISTS (SELECT 1 FROM vectors v WHERE v.key = m.key) ORDER BY length(m.content), m.id LIMIT ?"
        return [_memory_row(values) for values in self.rows(f"SELECT {_COLUMNS} {_DISTINCT} {has_vector}", [count])]

    def random_ids(self, count: int) -> list[str | int]:
        """The point ids of `count` memories of the plan, other ones each time."""
        rows = self.rows("SELECT point_id FROM memories ORDER BY random() LIMIT ?", [count])
        return [point_id_of(one) for (one,) in rows]

    def memories_of(self, point_ids: Sequence[str | int]) -> dict[str | int, MemoryRow]:
        """The memories of those `point_ids` that the plan has."""
        sql = f"SELECT {_COLUMNS} FROM memories m WHERE point_id IN"  # noqa: S608 - constants
        rows = map(_memory_row, self.rows_in(sql, map(str, point_ids)))
        return {row.point_id: row for row in rows}

    def scanned(self, point_ids: Sequence[str | int]) -> set[str | int]:
        """Those of `point_ids` that the current scan has put already."""
        sql = "SELECT point_id FROM memories WHERE scan = ? AND point_id IN"
        return {point_id_of(one) for (one,) in self.rows_in(sql, map(str, point_ids), [self._scan()])}

    def tokens_of(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """The tokens of those texts that the plan has already."""
        return dict(self.rows_in("SELECT key, tokens FROM memories WHERE key IN", keys))

    def missing_texts(self, spec: EmbeddingSpec, page: int = 500) -> Iterator[TextRow]:
        """Distinct texts of the plan without a vector. Raises ValueError if the plan was made for another spec."""
        for row in self._paged(_MISSING, page):
            if row.key != self.text_key(spec, row.content):
                raise ValueError("the plan was made for another model, size or endpoint")
            yield TextRow(row.key, row.content, str(row.point_id), row.tokens)

    def missing_total(self) -> Missing:
        """The number of texts that `missing_texts` would yield, and their tokens."""
        return self._total(_MISSING)

    def text_total(self) -> Missing:
        """The number of distinct texts in the plan, with or without a vector, and their tokens."""
        return self._total(_DISTINCT)

    def _total(self, source: str) -> Missing:
        some = self.rows("SELECT key FROM memories LIMIT 1")
        spec = self._specs.get(some[0][0][:PREFIX_BYTES]) if some else None
        limit = (input_limit(spec.model) if spec else None) or 1 << 62
        total = "SELECT count(*), coalesce(sum(CASE WHEN m.tokens > ? THEN ? ELSE m.tokens END), 0)"
        return Missing(*self.rows(f"{total} {source}", [limit, limit - 1])[0])

    def _paged(self, source: str, page: int) -> Iterator[MemoryRow]:
        # Each page is a separate statement: no read transaction stays open while the caller works.
        sql, last = f"SELECT {_COLUMNS} {source} AND m.id > ? ORDER BY m.id LIMIT ?", 0
        while rows := self.rows(sql, [last, page]):
            for values in rows:
                yield _memory_row(values)
            last = rows[-1][0]

    # --- saved points: the latest known payload of every live point that was read

    def save_points(self, rows: Sequence[SavedPoint]) -> None:
        """Add or replace, on the disk when it returns. A row without a vector leaves a saved vector in place."""
        with self.transaction():
            self.db.executemany(
                """INSERT INTO kept_points (point_id, payload, vector) VALUES (?, ?, ?)
                   ON CONFLICT (point_id) DO UPDATE SET payload = excluded.payload,
                     vector = coalesce(excluded.vector, kept_points.vector)""",
                ((str(row.point_id), row.payload, row.vector) for row in rows),
            )

    def saved_points(self, point_ids: Sequence[str | int]) -> dict[str | int, SavedPoint]:
        """The saved points of those `point_ids` that have one."""
        sql = "SELECT point_id, payload, vector FROM kept_points WHERE point_id IN"
        rows = (SavedPoint(point_id_of(one), *rest) for one, *rest in self.rows_in(sql, map(str, point_ids)))
        return {point.point_id: point for point in rows}

    def saved_count(self) -> int:
        """The number of saved points."""
        return self.number("SELECT count(*) FROM kept_points")

    def clear_saved(self) -> None:
        """Delete the payloads of an earlier migration. Points with a vector stay: they were removed as orphans."""
        with self.transaction():
            self.db.execute("DELETE FROM kept_points WHERE vector IS NULL")


@lru_cache(maxsize=32)
def _without_credentials(spec: EmbeddingSpec) -> EmbeddingSpec:
    return replace(spec, base_url=public_url(spec.base_url))


@lru_cache(maxsize=32)
def _spec_digest(spec: EmbeddingSpec) -> bytes:
    named = json.dumps([spec.base_url, spec.model, spec.size]).encode()
    return hashlib.blake2b(named, digest_size=32).digest()


def _checksum(key: bytes, blob: bytes) -> bytes:
    return zlib.crc32(blob, zlib.crc32(key)).to_bytes(SUM_BYTES, "little")


def _cut(blob: bytes, size: int) -> bytes:
    import numpy as np

    if len(blob) == FLOAT_BYTES * size:
        return blob
    part = np.frombuffer(blob, dtype="<f4")[:size].astype(np.float64)
    return bytes((part / np.linalg.norm(part)).astype("<f4").tobytes())
