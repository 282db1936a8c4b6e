"""Step 5 of the guide: does recall find what it should, through AutoMem's API or straight from Qdrant?"""

from __future__ import annotations

from statistics import median
from typing import Any

from lib import automem_api
from lib.automem_api import AutoMemApi
from lib.dimensions import EmbeddingSpec
from lib.embedding.spool import Spool
from lib.steps.candidates import Sample
from lib.steps.checks import ANEW, FAILED, PASSED, PENDING, SKIPPED, Check
from lib.vectors.search import search
from lib.vectors.transport import Qdrant

_SIZES = ("configured", "effective", "collection")
_RESTART = "restart AutoMem with the VECTOR_SIZE and EMBEDDING_MODEL that are set here"
_SAME_STORES = (
    "set FALKORDB_GRAPH, QDRANT_URL and QDRANT_COLLECTION of AutoMem and of these scripts to the same stores, then"
    " restart AutoMem"
)
_FEW_VECTORS, _SHARE = 10, 0.05  # by which the two counts may differ
START_AUTOMEM = (
    "docker compose logs flask-api   (in AutoMem's folder: a service that refuses to start says why)\n"
    "docker compose up -d --force-recreate flask-api\n"
    "export AUTOMEM_API_URL=...   (if AutoMem listens at another address)"
)


def agrees(health: dict[str, Any], spec: EmbeddingSpec) -> bool:
    """Whether `/health` shows the service at VECTOR_SIZE without a mismatch."""
    sizes = health.get("vector_dimensions") or {}
    shown = [sizes.get(name) for name in ("effective", "collection") if sizes.get(name) is not None]
    return not sizes.get("mismatch") and bool(shown) and all(size == spec.size for size in shown)


def elsewhere(health: dict[str, Any], graph: str, points: int) -> str:
    """What in `/health` shows that AutoMem works on other stores than these; empty where nothing does.

    It names its graph, and counts its vectors: memories of the last minutes may lack theirs.
    """
    named, count = health.get("graph"), health.get("vector_count")
    if isinstance(named, str) and named != graph:
        return f"AutoMem works on the graph '{named}', FALKORDB_GRAPH is '{graph}'"
    if isinstance(count, int) and abs(count - points) > max(_FEW_VECTORS, _SHARE * points):
        return f"AutoMem counts {count:,} vectors, the collection holds {points:,}: it works on another one"
    return ""


def check_recall_api(
    api: AutoMemApi,
    health: dict[str, Any],
    spec: EmbeddingSpec,
    samples: list[Sample],
    *,
    stranger: str = "",
    after_restart: bool,
) -> list[Check]:
    """Recall through AutoMem: proved only by `match_type: vector`, the memory's own content bringing it first."""
    if not agrees(health, spec):
        sizes = health.get("vector_dimensions") or {}
        shown = ", ".join(f"{name} {sizes[name]}" for name in _SIZES if sizes.get(name) is not None)
        detail = f"AutoMem does not run at {spec.size}d yet (/health: {shown or 'no sizes'})"
        return [Check("recall", FAILED if after_restart else PENDING, detail, _RESTART)]
    if stranger:
        return [Check("recall", FAILED if after_restart else PENDING, stranger, _SAME_STORES)]
    wrong, times, method = [], [], ""
    for sample in samples:
        answer = automem_api.recall(api, sample.content, 5)
        method = answer.method
        times.append(answer.milliseconds)
        first = answer.results[0] if answer.results else {}
        if str(first.get("id")) != sample.id or first.get("match_type") != "vector":
            wrong.append(f"{sample.id} (first: {first.get('id')}, {first.get('match_type')})")
    if not samples:
        return [Check("recall", SKIPPED, "no memory fit to be a sample")]
    latency = Check(
        "recall latency", PASSED, f"median {median(times):.0f} ms over {len(times)} ({method} /recall)"
    )
    if wrong:
        detail = (
            f"{len(wrong)} of {len(samples)} samples are not found first by vector: {'; '.join(wrong[:3])}"
        )
        return [Check("recall", FAILED if after_restart else PENDING, detail, _RESTART), latency]
    return [
        Check("recall", PASSED, f"{len(samples)} of {len(samples)} samples come first by vector"),
        latency,
    ]


def check_recall_direct(
    qdrant: Qdrant, collection: str, spool: Spool, spec: EmbeddingSpec, samples: list[Sample], why: str
) -> list[Check]:
    """Where no API answers: search Qdrant with each sample's own vector from the spool."""
    import numpy as np

    keys = {sample.id: spool.text_key(spec, sample.content) for sample in samples}
    known = spool.get_vectors(keys.values())
    usable = [sample for sample in samples if keys[sample.id] in known]
    if not usable:
        return [Check("recall", SKIPPED, f"{why}, and the spool holds no vector to search with")]
    wrong = []
    for sample in usable:
        hits = search(qdrant, collection, np.frombuffer(known[keys[sample.id]], dtype="<f4"), 5)
        if not hits or str(hits[0].id) != sample.id:
            wrong.append(sample.id)
    if wrong:
        detail = f"{len(wrong)} of {len(usable)} samples are not found first: {', '.join(wrong[:3])}"
        return [Check("recall", FAILED, detail, ANEW)]
    return [Check("recall", PASSED, f"{len(usable)} samples come first, straight from Qdrant ({why})")]


def recall_lines(api: AutoMemApi, query: str, limit: int = 5) -> list[str]:
    """What one recall brings, for the operator to judge: score, how it matched, the beginning of the content."""
    answer = automem_api.recall(api, query, limit)
    lines = []
    for one in answer.results:
        content = " ".join(str((one.get("memory") or {}).get("content", "")).split())[:80]
        lines.append(f"{float(one.get('final_score') or 0):.3f}  {one.get('match_type')}  {content}")
    return lines
