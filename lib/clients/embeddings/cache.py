"""The embedding cache: every vector that was paid for, on the disk before it is used."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from shlex import quote
from typing import NoReturn

from lib.clients.embeddings.cache_file import PREFIX_BYTES, CacheDamaged, CacheFile, Pruning, chunks, marks
from lib.clients.embeddings.pricing import CUT_TO_TOKENS, input_limit
from lib.dimensions import EmbeddingSpec, public_url, same_model, takes_dimensions

_COLUMNS = "id, point_id, node_id, key, content, payload, tokens"
# Of several memories with one text the first stands for all; those whose vector is there are left out.
_DISTINCT = "FROM memories m WHERE NOT EXISTS (SELECT 1 FROM memories f WHERE f.key = m.key AND f.id < m.id)"
_MISSING = f"{_DISTINCT} AND NOT EXISTS (SELECT 1 FROM vectors v WHERE v.key = m.key)"  # noqa: S608 - constants


@dataclass(frozen=True)
class MemoryRow:
    """One memory of the graph: its point id, its node, and what its point should hold.

    `key` is the vector's key in the embedding cache, `payload` the JSON of the graph's values, `tokens` those of
    the whole content.
    """

    point_id: str | int
    node_id: int
    key: bytes
    content: str
    payload: bytes
    tokens: int


@dataclass(frozen=True)
class TextRow:
    """A text to embed: `label` names it to the operator (the memory's id); `tokens` where they are counted."""

    key: bytes
    text: str
    label: str
    tokens: int = 0


@dataclass(frozen=True)
class Missing:
    """Distinct texts of the plan without a vector, and the tokens that they are billed for."""

    texts: int
    tokens: int


def stored_id(point_id: str | int) -> str:
    """A point id as TEXT: an unsigned 64-bit number does not fit SQLite's signed INTEGER."""
    return str(point_id)


def point_id_of(stored: object) -> str | int:
    """The point id again: a UUID is never all digits."""
    text = str(stored)
    return int(text) if text.isdigit() else text


class PlanTable(CacheFile):
    """Scans replace the plan: what a scan did not see is gone when it ends."""

    def begin_scan(self) -> None:
        """Start a scan of the graph. One that never ended is simply replaced by the next."""
        self.set_meta("scan", str(self._scan() + 1))

    def _scan(self) -> int:
        return int(self.get_meta("scan") or 0)

    def put_memories(self, rows: Sequence[MemoryRow]) -> None:
        """Add or replace memories by point id, in one transaction."""
        scan = self._scan()
        with self._transaction():
            self._db.executemany(
                """INSERT INTO memories (point_id, node_id, key, content, payload, tokens, scan)
                   VALUES (?, ?, ?, ?, ?, ?, ?)
                   ON CONFLICT (point_id) DO UPDATE SET node_id = excluded.node_id, key = excluded.key,
                     content = excluded.content, payload = excluded.payload, tokens = excluded.tokens,
                     scan = excluded.scan""",
                (
                    (
                        stored_id(row.point_id),
                        row.node_id,
                        row.key,
                        row.content,
                        row.payload,
                        row.tokens,
                        scan,
                    )
                    for row in rows
                ),
            )

    def end_scan(self) -> int:
        """Drop the memories this scan did not see; returns how many."""
        with self._transaction():
            return self._db.execute("DELETE FROM memories WHERE scan < ?", [self._scan()]).rowcount

    def memory_count(self) -> int:
        """Memories of the plan."""
        return self._number("SELECT count(*) FROM memories")

    def memories(self, after: int = 0, page: int = 1000) -> Iterator[MemoryRow]:
        """Every memory of the plan, read page by page."""
        for _, row in self._pages("FROM memories m WHERE 1", after, page):
            yield row

    def sample(self, count: int) -> list[MemoryRow]:
        """Some memories of distinct texts, the same ones each time: keys are hashes, the first are like any others."""
        sql = f"SELECT {_COLUMNS} {_DISTINCT} ORDER BY m.key, m.id LIMIT ?"
        return [_memory_row(values) for values in self._rows(sql, [count])]

    def memories_of(self, point_ids: Sequence[str | int]) -> dict[str | int, MemoryRow]:
        """Those of `point_ids` that the plan knows."""
        found: dict[str | int, MemoryRow] = {}
        for part in chunks([stored_id(each) for each in point_ids]):
            sql = f"SELECT {_COLUMNS} FROM memories WHERE point_id IN ({marks(part)})"  # noqa: S608 - only marks
            for values in self._rows(sql, part):
                row = _memory_row(values)
                found[row.point_id] = row
        return found

    def scanned(self, point_ids: Sequence[str | int]) -> set[str | int]:
        """Those of `point_ids` that the current scan has put already."""
        found: set[str | int] = set()
        for part in chunks([stored_id(each) for each in point_ids]):
            sql = f"SELECT point_id FROM memories WHERE scan = ? AND point_id IN ({marks(part)})"  # noqa: S608 - only marks
            found.update(point_id_of(stored) for (stored,) in self._rows(sql, [self._scan(), *part]))
        return found

    def tokens_of(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """The tokens of those texts that the plan holds already."""
        found: dict[bytes, int] = {}
        for part in chunks(list(keys)):
            sql = f"SELECT key, tokens FROM memories WHERE key IN ({marks(part)})"  # noqa: S608 - only marks
            found.update(
                {key: int(str(count)) for key, count in self._rows(sql, part) if isinstance(key, bytes)}
            )
        return found

    def missing_rows(self, page: int = 500) -> Iterator[TextRow]:
        """Distinct texts of the plan that have no vector yet; vectors may be stored while this is read."""
        for _, row in self._pages(_MISSING, 0, page):
            yield TextRow(row.key, row.content, str(row.point_id), row.tokens)

    def missing_total(self) -> Missing:
        """How many texts `missing_rows` would give, and their tokens."""
        return self._total(_MISSING)

    def text_total(self) -> Missing:
        """How many distinct texts the plan has, whether or not they have vectors, and their tokens."""
        return self._total(_DISTINCT)

    def _total(self, source: str) -> Missing:
        rows = self._rows(
            f"SELECT count(*), coalesce(sum(CASE WHEN m.tokens > ? THEN ? ELSE m.tokens END), 0) {source}",
            self._most_tokens(),
        )
        return Missing(*(int(str(value)) for value in rows[0]))

    def _most_tokens(self) -> tuple[int, int]:
        """The most tokens that a text of this plan may have, and what it is cut to where it has more."""
        return 1 << 62, 1 << 62

    def _pages(self, source: str, after: int, page: int) -> Iterator[tuple[int, MemoryRow]]:
        # Each page is a statement of its own: no read transaction stays open while the caller works.
        sql = f"SELECT {_COLUMNS} {source} AND m.id > ? ORDER BY m.id LIMIT ?"
        while rows := self._rows(sql, [after, page]):
            for values in rows:
                after = int(str(values[0]))
                yield after, _memory_row(values)


def _memory_row(values: tuple[object, ...]) -> MemoryRow:
    _, point_id, node_id, key, content, payload, tokens = values
    assert isinstance(key, bytes)
    assert isinstance(payload, bytes)
    return MemoryRow(point_id_of(point_id), int(str(node_id)), key, str(content), payload, int(str(tokens)))


@dataclass(frozen=True)
class SavedPoint:
    """A live point as it was read: its payload as JSON, and its vector (float32, little-endian) where one was asked."""

    point_id: str | int
    payload: bytes
    vector: bytes | None = None


class SavedPoints(CacheFile):
    """The latest known payload of every point that was read."""

    def save_points(self, rows: Sequence[SavedPoint]) -> None:
        """Add or replace, on the disk when it returns. A row without a vector leaves a kept vector in place."""
        with self._transaction():
            self._db.executemany(
                """INSERT INTO kept_points (point_id, payload, vector) VALUES (?, ?, ?)
                   ON CONFLICT (point_id) DO UPDATE SET payload = excluded.payload,
                     vector = coalesce(excluded.vector, kept_points.vector)""",
                ((stored_id(row.point_id), row.payload, row.vector) for row in rows),
            )

    def kept(self, point_ids: Sequence[str | int]) -> dict[str | int, SavedPoint]:
        """Those of `point_ids` that are kept."""
        found: dict[str | int, SavedPoint] = {}
        for part in chunks([stored_id(each) for each in point_ids]):
            sql = f"SELECT id, point_id, payload, vector FROM kept_points WHERE point_id IN ({marks(part)})"  # noqa: S608 - only marks
            for values in self._rows(sql, part):
                point = _saved_point(values)
                found[point.point_id] = point
        return found

    def saved_points(self, page: int = 500) -> Iterator[SavedPoint]:
        """Every kept point, read page by page."""
        after = 0
        sql = "SELECT id, point_id, payload, vector FROM kept_points WHERE id > ? ORDER BY id LIMIT ?"
        while rows := self._rows(sql, [after, page]):
            for values in rows:
                after = int(str(values[0]))
                yield _saved_point(values)

    def saved_count(self) -> int:
        """How many points are kept."""
        return self._number("SELECT count(*) FROM kept_points")

    def clear_saved(self) -> None:
        """Forget the payloads of an earlier migration; points kept whole, vector and all, stay: they were removed."""
        with self._transaction():
            self._db.execute("DELETE FROM kept_points WHERE vector IS NULL")


def _saved_point(values: tuple[object, ...]) -> SavedPoint:
    _, point_id, payload, vector = values
    assert isinstance(payload, bytes)
    assert vector is None or isinstance(vector, bytes)
    return SavedPoint(point_id_of(point_id), payload, vector)


TEXT_BYTES = 12
FLOAT_BYTES = 4
SUM_BYTES = 4
TEXTS_AT_ONCE = 500


class EmbeddingCache(PlanTable, SavedPoints, Pruning):
    """The open embedding cache; see CacheFile for its arguments. Raises CacheDamaged where the file cannot be used."""

    def __init__(self, path: Path, *, vectors: Path | None = None, read_only: bool = False) -> None:
        super().__init__(path, vectors=vectors, read_only=read_only)
        self._specs: dict[bytes, EmbeddingSpec] = {}
        for prefix, url, model, size in self._rows("SELECT prefix, base_url, model, size FROM specs"):
            if not isinstance(prefix, bytes) or not isinstance(size, int):
                self.close()
                shown = quote(str(self.vectors_path))
                raise CacheDamaged(
                    f"the embedding cache {self.vectors_path} names a model in a form that these scripts do not write",
                    next_step=f"move it away and run again:  mv {shown} {shown}.damaged",
                )
            self._specs[prefix] = EmbeddingSpec(str(url), str(model), size)

    def text_key(self, spec: EmbeddingSpec, text: str) -> bytes:
        """The 16-byte key of `text` under `spec`; the embedding cache remembers the spec."""
        spec = _without_credentials(spec)
        digest = _spec_digest(spec)
        if digest[:PREFIX_BYTES] not in self._specs:
            self._remember(spec, digest[:PREFIX_BYTES])
        return _key(digest, text)

    def known(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of `keys` that have a vector."""
        found: set[bytes] = set()
        for part in chunks(list(keys)):
            rows = self._rows(f"SELECT key FROM vectors WHERE key IN ({marks(part)})", part)  # noqa: S608 - only marks
            found.update(key for (key,) in rows if isinstance(key, bytes))
        return found

    def put_vectors(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Store (key, float32 little-endian) pairs in one transaction, on the disk when it returns.

        A key that has a vector keeps it. Raises ValueError, storing nothing, for a vector that is not as wide as
        its key says.
        """
        for key, blob in rows:
            spec = self._specs.get(key[:PREFIX_BYTES])
            if spec is None or len(key) != PREFIX_BYTES + TEXT_BYTES:
                raise ValueError("a key that this embedding cache did not make")
            if len(blob) != FLOAT_BYTES * spec.size:
                raise ValueError(f"{len(blob)} bytes for a vector of {spec.size} dimensions")
        sealed = ((key, blob + _sum(key, blob)) for key, blob in rows)
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO vectors (key, vector) VALUES (?, ?)", sealed)

    def get_vectors(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The vectors of those `keys` that have one, float32 little-endian.

        Raises CacheDamaged where some are not what was stored, and removes these: they must be paid for again.
        """
        found: dict[bytes, bytes] = {}
        damaged: list[bytes] = []
        for part in chunks(list(keys)):
            sql = f"SELECT key, vector FROM vectors WHERE key IN ({marks(part)})"  # noqa: S608 - only marks
            for key, vector in self._rows(sql, part):
                assert isinstance(key, bytes)
                assert isinstance(vector, bytes)
                whole = self._unsealed(key, vector)
                if whole is None:
                    damaged.append(key)
                else:
                    found[key] = whole
        if damaged:
            self._remove_damaged(damaged)
        return found

    def _unsealed(self, key: bytes, stored: bytes) -> bytes | None:
        """The vector, None where it is not the one that was stored under this key."""
        spec = self._specs.get(key[:PREFIX_BYTES])
        width = FLOAT_BYTES * spec.size if spec else -1
        if len(stored) == width:  # of an earlier version
            return stored
        blob = stored[:-SUM_BYTES]
        return blob if len(blob) == width and stored[-SUM_BYTES:] == _sum(key, blob) else None

    def _remove_damaged(self, keys: list[bytes]) -> NoReturn:
        with self._transaction():
            self._db.executemany("DELETE FROM vectors WHERE key = ?", ([key] for key in keys))
        raise CacheDamaged(
            f"{len(keys)} embedding(s) in {self.vectors_path} were damaged on the disk: they are not what was stored,"
            " and were removed",
            next_step="look at that disk, then run the same command again: these texts alone are paid for again",
        )

    def count(self, spec: EmbeddingSpec) -> int:
        """Vectors of this endpoint, model and size."""
        return self._number("SELECT count(*) FROM vectors WHERE key >= ? AND key <= ?", _key_range(spec))

    def forget_planned(self) -> int:
        """Drop the vectors of the plan's texts, so that they are bought anew; returns how many."""
        with self._transaction():
            return self._db.execute("DELETE FROM vectors WHERE key IN (SELECT key FROM memories)").rowcount

    def missing_texts(self, spec: EmbeddingSpec) -> Iterator[TextRow]:
        """Distinct texts of the plan without a vector. Raises ValueError where the plan was made for another spec."""
        for row in self.missing_rows():
            if row.key != self.text_key(spec, row.text):
                raise ValueError("the plan was made for another model, size or endpoint")
            yield row

    def _most_tokens(self) -> tuple[int, int]:
        some = self._rows("SELECT key FROM memories LIMIT 1")
        spec = (
            self._specs.get(bytes(some[0][0])[:PREFIX_BYTES])
            if some and isinstance(some[0][0], bytes)
            else None
        )
        limit = input_limit(spec.model) if spec else None
        return super()._most_tokens() if limit is None else (limit, CUT_TO_TOKENS)

    def derive(self, spec: EmbeddingSpec, texts: Sequence[str]) -> list[tuple[bytes, bytes]]:
        """Vectors of `spec` cut from larger ones of the same model and endpoint: (key, blob), nothing is stored.

        Those of the same size that were bought under another name of the model (`openai/...`) are taken as they are.
        Only for models whose vectors may be cut; cutting and scaling to length 1 is what `dimensions` does
        (https://platform.openai.com/docs/guides/embeddings).
        """
        spec = _without_credentials(spec)
        if not takes_dimensions(spec.model):
            return []
        wanted = {self.text_key(spec, text): text for text in texts}
        made: dict[bytes, bytes] = {}
        for larger in self._sources(spec):
            sources = {self.text_key(larger, text): key for key, text in wanted.items() if key not in made}
            for source, blob in self.get_vectors(sources).items():
                made[sources[source]] = _cut(blob, spec.size)
        return list(made.items())

    def derive_missing(self, spec: EmbeddingSpec) -> int:
        """Derive and store what the plan misses and the embedding cache can make; returns how many."""
        if not takes_dimensions(spec.model) or not self._sources(_without_credentials(spec)):
            return 0
        derived, texts = 0, []
        for row in self.missing_texts(spec):
            texts.append(row.text)
            if len(texts) == TEXTS_AT_ONCE:
                derived += self._store_derived(spec, texts)
                texts = []
        return derived + self._store_derived(spec, texts)

    def _store_derived(self, spec: EmbeddingSpec, texts: list[str]) -> int:
        rows = self.derive(spec, texts)
        if rows:
            self.put_vectors(rows)
        return len(rows)

    def _sources(self, spec: EmbeddingSpec) -> list[EmbeddingSpec]:
        """Of what vectors of `spec` can be made, the nearest size first."""
        same = [
            each
            for each in self._specs.values()
            if each != spec and each.base_url == spec.base_url and same_model(each.model, spec.model)
        ]
        return sorted((each for each in same if each.size >= spec.size), key=lambda each: each.size)

    def _remember(self, spec: EmbeddingSpec, prefix: bytes) -> None:
        if not self._read_only:
            with self._transaction():
                self._db.execute(
                    "INSERT OR IGNORE INTO specs VALUES (?, ?, ?, ?)",
                    [prefix, spec.base_url, spec.model, spec.size],
                )
        self._specs[prefix] = spec


@lru_cache(maxsize=32)
def _without_credentials(spec: EmbeddingSpec) -> EmbeddingSpec:
    return replace(spec, base_url=public_url(spec.base_url))


def _key_range(spec: EmbeddingSpec) -> list[bytes]:
    prefix = _spec_digest(_without_credentials(spec))[:PREFIX_BYTES]
    return [prefix, prefix + b"\xff" * TEXT_BYTES]


@lru_cache(maxsize=32)
def _spec_digest(spec: EmbeddingSpec) -> bytes:
    named = json.dumps([spec.base_url, spec.model, spec.size]).encode()
    return hashlib.blake2b(named, digest_size=32).digest()


def _key(spec_digest: bytes, text: str) -> bytes:
    own = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=spec_digest, digest_size=TEXT_BYTES)
    return spec_digest[:PREFIX_BYTES] + own.digest()


def _sum(key: bytes, blob: bytes) -> bytes:
    return zlib.crc32(blob, zlib.crc32(key)).to_bytes(SUM_BYTES, "little")


def _cut(blob: bytes, size: int) -> bytes:
    import numpy as np

    if len(blob) == FLOAT_BYTES * size:
        return blob
    part = np.frombuffer(blob, dtype="<f4")[:size].astype(np.float64)
    return bytes((part / np.linalg.norm(part)).astype("<f4").tobytes())
