"""Stored vectors against the spool's: do they agree, and the renewal of those that do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.dimensions import EmbeddingSpec
from lib.embedding.spool import Spool
from lib.steps.progress import ProgressBar
from lib.vectors.collection import CollectionState, get_state
from lib.vectors.compare import vectors_differ
from lib.vectors.points import Point, scroll
from lib.vectors.transport import Qdrant
from lib.vectors.upsert import upsert

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SAMPLE = 64


def _wanted(
    points: list[Point], spool: Spool, spec: EmbeddingSpec, *, planned: bool
) -> list[tuple[Point, NDArray[np.float32]]]:
    """Each point with the spool's vector for its content (`planned`: its memory's), where the spool has one."""
    import numpy as np

    if planned:
        rows = spool.memories_of([point.id for point in points])
        keyed = [(point, rows[point.id].key) for point in points if point.id in rows]
    else:
        texts = [str((point.payload or {}).get("content", "")) for point in points]
        keyed = [(point, spool.text_key(spec, text)) for point, text in zip(points, texts, strict=True)]
    known = spool.get_vectors([key for _, key in keyed])
    return [(point, np.frombuffer(known[key], dtype="<f4")) for point, key in keyed if key in known]


def compared(
    points: list[Point], spool: Spool, spec: EmbeddingSpec, state: CollectionState, *, planned: bool = False
) -> tuple[int, list[tuple[Point, NDArray[np.float32]]]]:
    """How many points the spool knows, and those whose stored vector is not the spool's, with that one.

    `state` is the collection's: its distance and datatype say what Qdrant makes of a vector.
    """
    import numpy as np

    pairs = _wanted(points, spool, spec, planned=planned)
    sized = [pair for pair in pairs if pair[0].vector is not None and len(pair[0].vector) == spec.size]
    wrong = [pair for pair in pairs if pair[0].vector is None or len(pair[0].vector) != spec.size]
    if sized:
        stored = np.vstack([point.vector for point, _ in sized if point.vector is not None])
        differ = vectors_differ(
            stored, np.vstack([vector for _, vector in sized]), state.distance, state.datatype
        )
        wrong += [pair for pair, bad in zip(sized, differ, strict=True) if bad]
    return len(pairs), wrong


def vectors_agree(qdrant: Qdrant, state: CollectionState, spool: Spool, spec: EmbeddingSpec) -> bool:
    """Whether a sample of the collection's vectors is known to the spool and equal to it: an earlier run's result."""
    for page in scroll(qdrant, state.name, payload=["content"], vector=True, page=_SAMPLE):
        known, wrong = compared(page, spool, spec, state)
        return known > 0 and not wrong
    return False


def mend_vectors(
    qdrant: Qdrant,
    collection: str,
    spool: Spool,
    spec: EmbeddingSpec,
    bar: ProgressBar,
    *,
    planned: bool = False,
) -> int:
    """Compare every stored vector with the spool's and put the spool's in where they differ; how many did.

    The old service may still write vectors of the old model while a migration keeps the size. What a vector should
    be tells the point's own content, or with `planned` its memory in the plan.
    """
    import numpy as np

    state, mended = get_state(qdrant, collection), 0
    with bar("compare vectors", state.points, "points") as progress:
        for page in scroll(qdrant, collection, payload=True, vector=True):
            _, wrong = compared(page, spool, spec, state, planned=planned)
            if wrong:
                ids = [point.id for point, _ in wrong]
                payloads = [point.payload or {} for point, _ in wrong]
                upsert(qdrant, collection, ids, np.vstack([vector for _, vector in wrong]), payloads)
                mended += len(wrong)
            progress(len(page))
    return mended
