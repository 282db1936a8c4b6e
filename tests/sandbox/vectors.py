"""Deterministic embeddings without a model: texts that share words are near each other, each model has its own space.

A text becomes a bag of features: stems of lower-cased words, or, for scripts without spaces, one to three characters.
Every feature has one Gaussian direction: a window on an array of noise that is seeded by the model. The offset of the
window is hashed from the feature, so that nothing is stored per word. The vector is the weighted sum of the directions,
scaled to length 1. A weak direction of the exact text separates any two texts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

# The full size of each model. The last three are models of Ollama and of other OpenAI-compatible servers.
NATIVE_SIZES = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
    "voyage-4-large": 2048,
    "voyage-4": 2048,
    "voyage-4-lite": 2048,
    "voyage-3.5": 2048,
    "nomic-embed-text": 768,
    "mxbai-embed-large": 1024,
    "all-minilm": 384,
}
NOISE_OFFSETS = 1 << 20  # 4 MB of noise per model; two windows are practically orthogonal
CACHED_WORDS = 1 << 16
CACHED_TEXTS = 1 << 11  # 25 MB: the tests embed the same sample memories again and again
EXACT_TEXT_WEIGHT = 0.25
STOP_WORD_WEIGHT = 0.1
FEATURES_AT_ONCE = 256  # rows per sum: a long text then needs little memory

_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\u0e00-\u0e7f"
_PIECES = re.compile(rf"([{_UNSPACED}]+)|([^\W_{_UNSPACED}]+)")
_ENDINGS = ("ingly", "edly", "ings", "ing", "ies", "ed", "es", "ly", "s", "e", "y")
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by can did do does for from had has have he her his how i if in into is it its "
        "me my no not of on or our she should so that the their them then there they this to was we were what when "
        "where which who why will with would you your",
    )
)


def vectors_for(model: str, texts: Sequence[str], size: int | None = None) -> FloatArray:
    """Embed texts: (n, size) float32, rows of length 1. Raises KeyError for an unknown model.

    For a `size` below the model's own, the full vector is cut and scaled to length 1 again, as by the
    text-embedding-3 models (https://platform.openai.com/docs/guides/embeddings) and Voyage's. Unlike the real ones,
    the voyage-4 models do not share one space.
    """
    full = np.stack([_direction_of(model, text) for text in texts])
    cut = full[:, : size or NATIVE_SIZES[model]]
    return np.ascontiguousarray(cut / np.linalg.norm(cut, axis=1, keepdims=True), dtype=np.float32)


def vector_for(model: str, text: str, size: int | None = None) -> FloatArray:
    """Embed one text: (size,) float32 of length 1."""
    vector: FloatArray = vectors_for(model, [text], size)[0]
    return vector


@lru_cache(maxsize=CACHED_TEXTS)
def _direction_of(model: str, text: str) -> FloatArray:
    counts = Counter(_features(text))
    weights = [weight * (1.0 + math.log(times)) for (_, weight), times in counts.items()]
    own_weight = 0.7 * EXACT_TEXT_WEIGHT * (math.hypot(*weights) or 1.0)
    offsets = [offset for offset, _ in counts] + [_offset(f"\0{number}\0{text}") for number in (1, 2)]
    return _weighted_sum(_windows(model), offsets, [*weights, own_weight, own_weight])


def _weighted_sum(windows: FloatArray, offsets: list[int], weights: list[float]) -> FloatArray:
    total = np.zeros(windows.shape[1], dtype=np.float32)
    for start in range(0, len(offsets), FEATURES_AT_ONCE):
        part = slice(start, start + FEATURES_AT_ONCE)
        total += np.asarray(weights[part], dtype=np.float32) @ windows[offsets[part]]
    return total


def _features(text: str) -> Iterator[tuple[int, float]]:
    for unspaced, word in _PIECES.findall(text.lower()):
        if word:
            yield _word(word)
        else:
            for width in (1, 2, 3):
                yield from (_word(unspaced[at : at + width]) for at in range(len(unspaced) - width + 1))


@lru_cache(maxsize=CACHED_WORDS)
def _word(word: str) -> tuple[int, float]:
    """Compute the offset in the noise and the weight of one word."""
    stem = word
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            stem = word[: -len(ending)]
            break
    return _offset(stem), STOP_WORD_WEIGHT if word in _STOP_WORDS else 1.0


def _offset(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % NOISE_OFFSETS


@lru_cache(maxsize=len(NATIVE_SIZES))
def _windows(model: str) -> FloatArray:
    """Create (NOISE_OFFSETS, native size) float32: overlapping views of the model's noise, no copies."""
    size = NATIVE_SIZES[model]
    seed = int.from_bytes(hashlib.blake2b(model.encode(), digest_size=16).digest(), "little")
    noise = np.random.Generator(np.random.SFC64(seed)).standard_normal(NOISE_OFFSETS + size - 1, dtype=np.float32)
    return np.lib.stride_tricks.sliding_window_view(noise, size)
