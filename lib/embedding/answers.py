"""An embeddings answer, decoded and checked before anything of it is used."""

from __future__ import annotations

import binascii
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pybase64

from lib.dimensions import EmbeddingSpec, native_size
from lib.embedding.limit_headers import RateLimits
from lib.embedding.refusals import BadAnswer, BadIndices, WrongWidth

FloatArray = npt.NDArray[np.float32]
NORM_TOLERANCE = 0.01


@dataclass(frozen=True)
class Answer:
    """`vectors` (n, size) float32 in the order of the texts, each of length 1; `tokens` as billed."""

    vectors: FloatArray
    tokens: int
    limits: RateLimits | None = None


def parsed(content: bytes) -> dict[str, object]:
    """The answer's JSON object. Raises BadAnswer."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        try:
            body = json.loads(content)  # takes the NaN that servers written in Python may send
        except (ValueError, RecursionError) as error:
            raise BadAnswer("the answer is not JSON") from error
    if not isinstance(body, dict):
        raise BadAnswer("the answer is not a JSON object")
    return body


def read_answer(
    body: dict[str, object], count: int, spec: EmbeddingSpec, limits: RateLimits | None
) -> Answer:
    """The checked vectors for `count` texts. Raises BadAnswer, or WrongWidth for another size than `spec`'s."""
    data = body.get("data")
    if not isinstance(data, list) or len(data) != count:
        raise BadAnswer(
            f"{len(data) if isinstance(data, list) else 'no'} vectors came back for {count} texts"
        )
    indices = _indices(data)
    vectors = np.empty((count, spec.size), dtype=np.float32)
    while data:
        item = data.pop()  # the answer's text shrinks while the vectors grow
        vectors[indices.pop()] = _row(item.get("embedding"), spec)
    return Answer(_unit(vectors, spec), billed_tokens(body), limits)


def _indices(data: list[Any]) -> list[int]:
    """The index of each vector. Raises BadIndices if it does not follow from the answer which vector is which text's.

    Without any index the order is that of the texts. One that is missing among others is the one that is left:
    encoders that omit zeros leave out the 0 (protobuf's JSON, as Gemini's endpoint sends it).
    """
    if not all(isinstance(item, dict) for item in data):
        raise BadAnswer("a vector that is no JSON object")
    given = [item.get("index") for item in data]
    if all(index is None for index in given):
        return list(range(len(data)))
    left = set(range(len(data))) - {index for index in given if type(index) is int}
    if given.count(None) == 1 and len(left) == 1:
        given[given.index(None)] = left.pop()
    if not all(type(index) is int for index in given) or set(given) != set(range(len(data))):
        raise BadIndices("the answer's indices do not say which vector is which text's")
    return [int(index) for index in given if index is not None]


def _row(embedding: object, spec: EmbeddingSpec) -> FloatArray:
    try:
        if isinstance(embedding, str):
            row = np.frombuffer(pybase64.b64decode(embedding, validate=True), dtype="<f4")
        else:  # a server that ignores base64; None stands for NaN in JSON
            row = np.asarray(embedding, dtype=np.float32)
    except (ValueError, TypeError, OverflowError, binascii.Error) as error:
        raise BadAnswer("a vector that is neither base64 nor a list of numbers") from error
    if row.ndim != 1 or len(row) == 0:
        raise BadAnswer("a vector that is not a list of numbers")
    if len(row) != spec.size:
        raise WrongWidth(
            f"{spec.model} answered with {len(row)}d vectors, VECTOR_SIZE is {spec.size}",
            next_step=f"export VECTOR_SIZE={len(row)}   or name a model that makes {spec.size}d with EMBEDDING_MODEL",
        )
    return row


def _unit(vectors: FloatArray, spec: EmbeddingSpec) -> FloatArray:
    """Check the lengths; OpenAI's models answer with length 1, others may not and are scaled."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    if not np.isfinite(norms).all():
        raise BadAnswer("a vector with values that are not numbers")
    off = np.abs(norms - 1) > NORM_TOLERANCE
    if not off.any():
        return vectors
    if native_size(spec.model) is not None or (norms < 1e-6).any():
        raise BadAnswer(f"a vector of length {norms[off][0]:.3g} instead of 1")
    return np.asarray(vectors / norms[:, None], dtype=np.float32)


def billed_tokens(body: dict[str, object]) -> int:
    """The tokens that an answer is billed for, whether or not its vectors are of use; 0 if it names none."""
    usage = body.get("usage")
    billed = usage.get("total_tokens") or usage.get("prompt_tokens") if isinstance(usage, dict) else 0
    return max(0, billed) if isinstance(billed, int) else 0  # a negative one would pay for others
