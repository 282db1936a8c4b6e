"""Whether a vector that Qdrant stores is the one that was sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Qdrant normalises under Cosine, in float32, and so does whoever compares: their last bits may differ.
TOLERANCE = 2e-6


def vectors_differ(
    stored: NDArray[np.float32], wanted: NDArray[np.float32], distance: str = "Cosine"
) -> NDArray[np.bool_]:
    """Row by row, whether `stored` (n, dims) is not `wanted` (n, dims) as a collection of `distance` keeps it.

    Under Cosine both are normalised first (a vector of zeros stays one); otherwise the bits must agree. A row with
    a number that is not finite differs from everything.
    """
    if stored.shape != wanted.shape:
        return np.ones(len(stored), dtype=np.bool_)
    if distance != "Cosine":
        return np.asarray(~(stored == wanted).all(axis=1), dtype=np.bool_)
    gap = np.abs(_normalised(stored) - _normalised(wanted)).max(axis=1)
    return np.asarray(~(gap <= TOLERANCE), dtype=np.bool_)


def _normalised(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(lengths == 0, 1.0, lengths))
