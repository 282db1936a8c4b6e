"""Compare stored vectors with those of the embedding cache, and repair those that differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.qdrant.collection import (
    DATATYPES,
    FLOAT16,
    FLOAT32,
    TURBO4,
    UINT8,
    CollectionState,
    get_state,
)
from lib.clients.qdrant.points import Point, scroll, upsert
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import ProgressBar
from lib.dimensions import EmbeddingSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Qdrant normalises under Cosine, in float32, and so does whoever compares: their last bits may differ.
TOLERANCE = 2e-6
# 4 bits per number: 0.977 is the least that was measured over 60 vectors of 48 numbers, 0.992 of 768 (1.19).
TURBO4_COSINE = 0.97


def vectors_differ(
    stored: NDArray[np.float32],
    wanted: NDArray[np.float32],
    distance: str = "Cosine",
    datatype: str = FLOAT32,
) -> NDArray[np.bool_]:
    """Row by row, whether `stored` (n, dims) is not `wanted` (n, dims) as a collection keeps it.

    Under Cosine Qdrant normalises (but for uint8), then it rounds to `datatype`; so does this. The bits must agree
    where nothing was normalised. A row with a number that is not finite differs from everything. turbo4 can only be
    compared by direction. Raises ValueError for a datatype that is not in DATATYPES.
    """
    if datatype not in DATATYPES:
        raise ValueError(f"vectors of datatype {datatype} cannot be compared")
    if stored.shape != wanted.shape:
        return np.ones(len(stored), dtype=np.bool_)
    if datatype == UINT8:  # as Rust casts: towards zero, and no further than the ends
        return _any_gap(stored, np.clip(np.trunc(wanted), 0, 255), 0.0)
    if datatype == TURBO4:
        cosines = (_normalised(stored) * _normalised(wanted)).sum(axis=1)
        both_zero = ~stored.any(axis=1) & ~wanted.any(axis=1)
        return np.asarray(~((cosines >= TURBO4_COSINE) | both_zero), dtype=np.bool_)
    if datatype == FLOAT16:
        component = (_normalised(wanted) if distance == "Cosine" else wanted).astype(np.float16)
        step = np.abs(np.spacing(component)).astype(np.float64) if distance == "Cosine" else 0.0
        return _any_gap(stored, component, step)
    if distance != "Cosine":
        return _any_gap(stored, wanted, 0.0)
    return _any_gap(_normalised(stored), _normalised(wanted), TOLERANCE)


def _any_gap(
    stored: NDArray[np.floating], wanted: NDArray[np.floating], allowed: NDArray[np.float64] | float
) -> NDArray[np.bool_]:
    gap = np.abs(stored.astype(np.float64) - wanted.astype(np.float64))
    return np.asarray(~(gap <= allowed).all(axis=1), dtype=np.bool_)


def _normalised(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(lengths == 0, 1.0, lengths))


_SAMPLE = 64


def _wanted(
    points: list[Point], cache: EmbeddingCache, spec: EmbeddingSpec, *, planned: bool
) -> list[tuple[Point, NDArray[np.float32]]]:
    """Each point with the cache's vector for its content (`planned`: its memory's), where the cache has one."""
    import numpy as np

    if planned:
        rows = cache.memories_of([point.id for point in points])
        keyed = [(point, rows[point.id].key) for point in points if point.id in rows]
    else:
        texts = [str((point.payload or {}).get("content", "")) for point in points]
        keyed = [(point, cache.text_key(spec, text)) for point, text in zip(points, texts, strict=True)]
    known = cache.get_vectors([key for _, key in keyed])
    return [(point, np.frombuffer(known[key], dtype="<f4")) for point, key in keyed if key in known]


def compared(
    points: list[Point],
    cache: EmbeddingCache,
    spec: EmbeddingSpec,
    state: CollectionState,
    *,
    planned: bool = False,
) -> tuple[int, list[tuple[Point, NDArray[np.float32]]]]:
    """How many points the cache knows, and those whose stored vector is not the embedding cache's, with that one.

    `state` is the collection's: its distance and datatype say what Qdrant makes of a vector.
    """
    import numpy as np

    pairs = _wanted(points, cache, spec, planned=planned)
    sized = [pair for pair in pairs if pair[0].vector is not None and len(pair[0].vector) == spec.size]
    wrong = [pair for pair in pairs if pair[0].vector is None or len(pair[0].vector) != spec.size]
    if sized:
        stored = np.vstack([point.vector for point, _ in sized if point.vector is not None])
        differ = vectors_differ(
            stored, np.vstack([vector for _, vector in sized]), state.distance, state.datatype
        )
        wrong += [pair for pair, bad in zip(sized, differ, strict=True) if bad]
    return len(pairs), wrong


def vectors_agree(qdrant: Qdrant, state: CollectionState, cache: EmbeddingCache, spec: EmbeddingSpec) -> bool:
    """Whether a sample of the collection's vectors is known to the cache and equal to it: an earlier run's result."""
    for page in scroll(qdrant, state.name, payload=["content"], vector=True, page=_SAMPLE):
        known, wrong = compared(page, cache, spec, state)
        return known > 0 and not wrong
    return False


def repair_vectors(
    qdrant: Qdrant,
    collection: str,
    cache: EmbeddingCache,
    spec: EmbeddingSpec,
    bar: ProgressBar,
    *,
    planned: bool = False,
) -> int:
    """Compare every stored vector with the cache's and put the embedding cache's in where they differ; how many did.

    The old service may still write vectors of the old model while a migration keeps the size. What a vector should
    be tells the point's own content, or with `planned` its memory in the plan.
    """
    import numpy as np

    state, mended = get_state(qdrant, collection), 0
    with bar("compare vectors", state.points, "points") as progress:
        for page in scroll(qdrant, collection, payload=True, vector=True):
            _, wrong = compared(page, cache, spec, state, planned=planned)
            if wrong:
                ids = [point.id for point, _ in wrong]
                payloads = [point.payload or {} for point, _ in wrong]
                upsert(qdrant, collection, ids, np.vstack([vector for _, vector in wrong]), payloads)
                mended += len(wrong)
            progress(len(page))
    return mended
