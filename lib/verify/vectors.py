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

# Under Cosine, Qdrant and this module normalize in float32: the last bits may differ.
TOLERANCE = 2e-6
# 4 bits per number: the least cosine measured over 60 vectors was 0.977 at 48 numbers, 0.992 at 768 (1.19).
TURBO4_COSINE = 0.97
_SAMPLE = 64


def vectors_differ(
    stored: NDArray[np.float32],
    wanted: NDArray[np.float32],
    distance: str = "Cosine",
    datatype: str = FLOAT32,
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
    gap = np.abs(stored.astype(np.float64) - wanted.astype(np.float64))
    return np.asarray(~(gap <= allowed).all(axis=1), dtype=np.bool_)


def _normalized(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(lengths == 0, 1.0, lengths))


def different_vectors(
    points: list[Point],
    cache: EmbeddingCache,
    spec: EmbeddingSpec,
    state: CollectionState,
    *,
    planned: bool = False,
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


def vectors_agree(qdrant: Qdrant, state: CollectionState, cache: EmbeddingCache, spec: EmbeddingSpec) -> bool:
    """Whether the first points of the collection have the cache's vectors, so that an earlier run made it."""
    page = next(scroll(qdrant, state.name, payload=["content"], vector=True, page=_SAMPLE))
    known, wrong = different_vectors(page, cache, spec, state)
    return known > 0 and not wrong


def repair_vectors(
    qdrant: Qdrant,
    collection: str,
    cache: EmbeddingCache,
    spec: EmbeddingSpec,
    bar: ProgressBar,
    *,
    planned: bool = False,
) -> int:
    """Compare every stored vector with the cache's and overwrite those that differ. Returns how many did.

    While a migration keeps the size, the old service may still write vectors of the old model. `planned`: see
    `different_vectors`.
    """
    state, repaired = get_state(qdrant, collection), 0
    with bar("compare vectors", state.points, "points") as progress:
        for page in scroll(qdrant, collection, payload=True, vector=True):
            _, wrong = different_vectors(page, cache, spec, state, planned=planned)
            if wrong:
                ids = [point.id for point, _ in wrong]
                payloads = [point.payload or {} for point, _ in wrong]
                upsert(qdrant, collection, ids, np.vstack([vector for _, vector in wrong]), payloads)
                repaired += len(wrong)
            progress(len(page))
    return repaired
