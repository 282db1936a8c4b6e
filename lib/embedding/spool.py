"""The spool: every bought vector, on the disk before it is used, so that nothing is paid for twice.

A vector's key is 16 bytes: 4 that stand for endpoint, model and size, and 12 of a BLAKE2b over those and the
exact text. So one size's vectors are one range of the index, and another endpoint, model or size never matches.

What is stored is the vector and a CRC-32 over key and vector: SQLite has no checksums, and a damaged vector would go
into the collection as if the model had made it. Rows of earlier versions have none.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from shlex import quote
from typing import NoReturn

from lib.dimensions import EmbeddingSpec, same_model, takes_dimensions
from lib.embedding.endpoint import public_url
from lib.embedding.kept_points import KeptPoints
from lib.embedding.plan_table import PlanTable, TextRow
from lib.embedding.pricing import CUT_TO_TOKENS, input_limit
from lib.embedding.pruning import PREFIX_BYTES, Pruning
from lib.embedding.spool_file import SpoolDamaged, chunks, marks

TEXT_BYTES = 12
FLOAT_BYTES = 4
SUM_BYTES = 4
TEXTS_AT_ONCE = 500


class Spool(PlanTable, KeptPoints, Pruning):
    """The open spool; see SpoolFile for its arguments. Raises SpoolDamaged where the file cannot be used."""

    def __init__(self, path: Path, *, vectors: Path | None = None, read_only: bool = False) -> None:
        super().__init__(path, vectors=vectors, read_only=read_only)
        self._specs: dict[bytes, EmbeddingSpec] = {}
        for prefix, url, model, size in self._rows("SELECT prefix, base_url, model, size FROM specs"):
            if not isinstance(prefix, bytes) or not isinstance(size, int):
                self.close()
                shown = quote(str(self.vectors_path))
                raise SpoolDamaged(
                    f"the embedding cache {self.vectors_path} names a model in a form that these scripts do not write",
                    next_step=f"move it away and run again:  mv {shown} {shown}.damaged",
                )
            self._specs[prefix] = EmbeddingSpec(str(url), str(model), size)

    def text_key(self, spec: EmbeddingSpec, text: str) -> bytes:
        """The 16-byte key of `text` under `spec`; the spool remembers the spec."""
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
                raise ValueError("a key that this spool did not make")
            if len(blob) != FLOAT_BYTES * spec.size:
                raise ValueError(f"{len(blob)} bytes for a vector of {spec.size} dimensions")
        sealed = ((key, blob + _sum(key, blob)) for key, blob in rows)
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO vectors (key, vector) VALUES (?, ?)", sealed)

    def get_vectors(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The vectors of those `keys` that have one, float32 little-endian.

        Raises SpoolDamaged where some are not what was stored, and removes these: they must be paid for again.
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
        raise SpoolDamaged(
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
        """Derive and store what the plan misses and the spool can make; returns how many."""
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
