"""What tests count in an embedding cache."""

from __future__ import annotations

from lib.clients.embeddings.cache import PREFIX_BYTES, EmbeddingCache
from lib.dimensions import EmbeddingSpec


def stored_count(cache: EmbeddingCache, spec: EmbeddingSpec) -> int:
    """The number of vectors of this endpoint, model and size."""
    prefix = cache.text_key(spec, "")[:PREFIX_BYTES]
    sql = f"SELECT count(*) FROM vectors WHERE substr(key, 1, {PREFIX_BYTES}) = ?"
    return cache.number(sql, [prefix])
