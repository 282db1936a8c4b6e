"""The checks of a migration: collection, graph, plan, journal, and recall."""

from __future__ import annotations

import json
from dataclasses import dataclass
from shlex import quote
from statistics import median
from typing import Any

from lib.backup.collection import STAMP_KEY
from lib.backup.payloads import PointId
from lib.clients import automem
from lib.clients.automem import AutoMemApi
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.qdrant.collection import AUTOMEM_INDEXES, CollectionState
from lib.clients.qdrant.points import Point, scroll, search
from lib.clients.qdrant.transport import Qdrant, curl_line
from lib.concurrency import Progress
from lib.dimensions import EmbeddingSpec, check_dimension, same_model
from lib.errors import listed, one_line
from lib.verify.compare import Findings, Sample
from lib.verify.vectors import compared

PASSED, FAILED, PENDING, SKIPPED = "passed", "FAILED", "restart pending", "not checked"
_EXAMPLES = 3
_LEVEL = "python scripts/reembed_embeddings.py --only-missing"
ANEW = "python scripts/backup_automem.py && python scripts/reembed_embeddings.py"


@dataclass(frozen=True)
class Check:
    """One question and its answer: `passed`, `FAILED`, `restart pending` or `not checked`, with the figures.

    `remedy` are the commands that help where it failed.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""


def check_size(state: CollectionState, spec: EmbeddingSpec) -> Check:
    """The guide's step 4; raises DimensionMismatch where the size is not the configured one."""
    check_dimension(state.name, state.size, spec.size)
    same = state.distance == "Cosine"
    return Check("size and distance", PASSED if same else FAILED, f"{state.size}d {state.distance}", ANEW)


def check_status(state: CollectionState) -> Check:
    """Green, and nothing left to optimise."""
    ok = state.status in {"green", "yellow", "grey"} and state.optimizer_ok
    word = state.status if state.status == "green" else f"{state.status} (indexing goes on by itself)"
    if state.optimizer_idle:
        word = f"{state.status} (indexing goes on with the next write)"
    detail = word if ok else f"{state.status}, optimizer {state.raw.get('optimizer_status')}"
    return Check("status", PASSED if ok else FAILED, detail, "look into Qdrant's log and at its free disk")


def check_indexes(qdrant: Qdrant, state: CollectionState, before: dict[str, Any] | None) -> Check:
    """The payload indexes that recall filters on, and all that the collection had before the migration."""
    wanted = dict.fromkeys(AUTOMEM_INDEXES, "keyword")
    wanted |= {name: one["data_type"] for name, one in ((before or {}).get("payload_schema") or {}).items()}
    have = {name: one["data_type"] for name, one in state.payload_schema.items()}
    lacking = [f"{name} ({kind})" for name, kind in wanted.items() if have.get(name) != kind]
    if lacking:
        remedy = "\n".join(
            f"{curl_line(qdrant, 'PUT', state.name, 'index', query='?wait=true')} -H 'content-type: application/json'"
            f" -d {quote(json.dumps({'field_name': name, 'field_schema': kind}))}"
            for name, kind in wanted.items()
            if have.get(name) != kind
        )
        return Check("payload indexes", FAILED, f"missing: {', '.join(lacking)}", remedy)
    return Check("payload indexes", PASSED, ", ".join(sorted(have)))


def check_model(state: CollectionState, spec: EmbeddingSpec) -> Check:
    """The model that made the vectors, where the collection says it."""
    stamp = state.metadata.get(STAMP_KEY) or {}
    if not stamp:
        return Check(
            "model stamp", SKIPPED, "this server keeps no metadata, or the collection was not stamped"
        )
    ok = same_model(stamp.get("model"), spec.model)
    detail = f"{stamp.get('model')}, EMBEDDING_MODEL is {spec.model}"
    remedy = f"export EMBEDDING_MODEL={quote(str(stamp.get('model')))}   or   {ANEW}"
    return Check("model stamp", PASSED if ok else FAILED, detail, remedy)


def _some(ids: list[Any]) -> str:
    more = f" and {len(ids) - _EXAMPLES} more" if len(ids) > _EXAMPLES else ""
    return listed(ids[:_EXAMPLES]) + more


def judge(found: Findings, *, have_plan: bool, after_restart: bool) -> list[Check]:
    """Findings as checks. What is newer than the last catch-up waits for the restart, unless that has happened.

    Without a plan (no embedding cache here) nothing can be told to be newer, so a difference is a failure.
    """
    strict = after_restart or not have_plan
    late = FAILED if strict else PENDING
    points = f"{found.expected} memories, {found.exempt} exempt (no text, unusable or repeated id)"
    missing = found.missing + (found.newer if strict else [])
    ids = Check("ids", PASSED, points)
    if missing:
        ids = Check("ids", FAILED, f"{len(missing)} memories have no point: {_some(missing)}", _LEVEL)
    elif found.newer:
        ids = Check(
            "ids", late, f"{len(found.newer)} memories are newer than the migration: {_some(found.newer)}"
        )
    contents = Check("content", PASSED, "every point holds its memory's content")
    if found.contents or (strict and found.newer_contents):
        stale = found.contents + (found.newer_contents if strict else [])
        contents = Check(
            "content", FAILED, f"{len(stale)} points hold another content: {_some(stale)}", _LEVEL
        )
    elif found.newer_contents:
        contents = Check("content", late, f"{len(found.newer_contents)} memories changed since the migration")
    orphans = Check("surplus points", PASSED, "none")
    if found.orphans:
        orphans = Check(
            "surplus points", FAILED, f"{len(found.orphans)} have no memory: {_some(found.orphans)}", _LEVEL
        )
    return [ids, orphans, contents, _judge_payloads(found, strict=strict)]


def _judge_payloads(found: Findings, *, strict: bool) -> Check:
    wrong = found.payloads + (found.newer_payloads if strict else [])
    if wrong:
        some = "; ".join(one_line(f"{one}: {keys}") for one, keys in wrong[:_EXAMPLES])
        return Check(
            "payloads", FAILED, f"{len(wrong)} are not as graph and old points have it ({some})", _LEVEL
        )
    if found.newer_payloads:
        return Check("payloads", PENDING, f"{len(found.newer_payloads)} memories changed since the migration")
    text = "equal to the graph, nothing of the old points lost"
    if found.moving:
        text += (
            f"; but for last_accessed of {found.moving:,}, which recall moves on (--only-missing renews it)"
        )
    return Check("payloads", PASSED, text)


def check_vectors(
    qdrant: Qdrant,
    state: CollectionState,
    cache: EmbeddingCache | None,
    spec: EmbeddingSpec,
    progress: Progress,
) -> Check:
    """Every stored vector: right width, finite, not zero; and equal to the cache's where the cache knows it."""
    bad: list[PointId] = []
    different: list[PointId] = []
    known = total = 0
    for page in scroll(qdrant, state.name, payload=["content"], vector=True):
        bad += [point.id for point in page if not _sound(point, spec.size)]
        if cache:
            sound = [one for one in page if _sound(one, spec.size)]
            count, wrong = compared(sound, cache, spec, state)
            known, different = known + count, different + [point.id for point, _ in wrong]
        total += len(page)
        progress(len(page))
    if bad:
        return Check(
            "vectors", FAILED, f"{len(bad)} are unusable (width, zero or not finite): {_some(bad)}", ANEW
        )
    if different:
        return Check(
            "vectors",
            FAILED,
            f"{len(different)} are not the model's for their content: {_some(different)}",
            ANEW,
        )
    return Check(
        "vectors", PASSED, f"{total} of {spec.size}d, {known} equal to the vectors that were paid for"
    )


def _sound(point: Point, size: int) -> bool:
    import numpy as np

    vector = point.vector
    return (
        vector is not None and len(vector) == size and bool(np.isfinite(vector).all()) and bool(vector.any())
    )


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
        answer = automem.recall(api, sample.content, 5)
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
    qdrant: Qdrant,
    collection: str,
    cache: EmbeddingCache,
    spec: EmbeddingSpec,
    samples: list[Sample],
    why: str,
) -> list[Check]:
    """Where no API answers: search Qdrant with each sample's own vector from the embedding cache."""
    import numpy as np

    keys = {sample.id: cache.text_key(spec, sample.content) for sample in samples}
    known = cache.get_vectors(keys.values())
    usable = [sample for sample in samples if keys[sample.id] in known]
    if not usable:
        return [Check("recall", SKIPPED, f"{why}, and the embedding cache holds no vector to search with")]
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
    answer = automem.recall(api, query, limit)
    lines = []
    for one in answer.results:
        content = " ".join(str((one.get("memory") or {}).get("content", "")).split())[:80]
        lines.append(f"{float(one.get('final_score') or 0):.3f}  {one.get('match_type')}  {content}")
    return lines
