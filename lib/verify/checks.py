"""The checks of a migration; all of them in the guide's order (its steps 4 and 5); and the migration record."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.backup.collection import CollectionSource, stamp_of
from lib.backup.graph import GraphSource
from lib.backup.phases import VERIFIED, last_migration, restored_since
from lib.backup.points import TemporaryIdTable, all_points, as_id
from lib.clients import automem
from lib.clients.automem import AutoMemApi, ask_health
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.falkordb.connection import require_graph
from lib.clients.qdrant.collection import AUTOMEM_INFO, CollectionState, get_state, require_plain_vectors
from lib.clients.qdrant.points import Point, PointId, count, retrieve, search
from lib.clients.qdrant.transport import Qdrant, curl_line
from lib.concurrency import Progress, ProgressBar
from lib.dimensions import OPENAI, EmbeddingSpec, check_dimension, is_model_of, model_settings, provider_of
from lib.errors import MigrationError, listed, one_line
from lib.network import without_login
from lib.verify import compare
from lib.verify.compare import ONLY_MISSING, REPLACE_ALL, SAME_MODEL_COSINE, Findings, Sample, compare_stores, cosine

PASSED, FAILED, PENDING, SKIPPED = "passed", "FAILED", "restart pending", "not checked"
_EXAMPLES = 3
_RECALL_LIMIT = 5
_FEW_DIFFER = 1000  # AutoMem changes fewer in the time of a verification
_NUMBERS_AT_ONCE = 200_000  # of a page of vectors
_SIZES = ("configured", "effective", "collection")  # in AutoMem's /health
# By how much the two counts of vectors may differ: memories of the last minutes may lack theirs.
_FEW_VECTORS, _SHARE = 10, 0.05
_COMPARED = "text and vector compared with AutoMem's"

_LOST_GRAPH = "the graph holds no memory: if it is lost, docs/worst-day.md has the next steps"
_BACKUP = "python scripts/backup_automem.py"
_RESTART = "restart AutoMem with the VECTOR_SIZE, provider and model that are set here"
_SAME_STORES = (
    "set FALKORDB_GRAPH, QDRANT_URL and QDRANT_COLLECTION of AutoMem and of these scripts to the same stores, then"
    " restart AutoMem"
)
START_AUTOMEM = (
    "start AutoMem, in its folder:\ndocker compose up -d --force-recreate flask-api\n"
    "if it does not start, its log says why:\ndocker compose logs flask-api\n"
    "if it listens at another address:\nexport AUTOMEM_API_URL=..."
)


@dataclass(frozen=True)
class Check:
    """The result of one check: its status (PASSED, FAILED, PENDING, SKIPPED) and the figures.

    `remedy` has the commands that help if it failed.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""


def check_size(qdrant: Qdrant, state: CollectionState, spec: EmbeddingSpec) -> Check:
    """The guide's step 4. Raises DimensionMismatch, or UsageProblem for other vectors than AutoMem's."""
    require_plain_vectors(state)
    check_dimension(state.name, state.size, spec.size)
    detail = f"{state.size}d {state.distance}"
    if state.distance == "Cosine":
        return Check("size and distance", PASSED, detail)
    put = curl_line(qdrant, "PUT", state.name) + " -H 'content-type: application/json' -d "
    put += quote(json.dumps({"vectors": {"size": state.size, "distance": "Cosine"}}))
    remedy = (
        "a re-embed keeps the distance; this changes it, and loses settings, aliases and keys that only points have:\n"
    )
    remedy += " && ".join((_BACKUP, curl_line(qdrant, "DELETE", state.name), put, ONLY_MISSING))
    return Check("size and distance", FAILED, f"{detail}, AutoMem uses Cosine", remedy)


def check_status(state: CollectionState) -> Check:
    """The collection's status and that of its optimizer; indexing may still be under way."""
    if state.status not in {"green", "yellow", "grey"} or not state.optimizer_ok:
        detail = f"{state.status}, optimizer {state.raw.get('optimizer_status')}"
        return Check("status", FAILED, detail, "check Qdrant's log and its free disk space")
    note = "" if state.status == "green" else " (indexing continues)"
    if state.optimizer_idle:
        note = " (indexing continues with the next write)"
    return Check("status", PASSED, state.status + note)


def check_indexes(qdrant: Qdrant, state: CollectionState, before: dict[str, Any] | None) -> Check:
    """The payload indexes that recall filters on, and those of the collection `before` the migration (raw info)."""
    wanted = _parameters(AUTOMEM_INFO["payload_schema"] | ((before or {}).get("payload_schema") or {}))
    have = _parameters(state.raw.get("payload_schema") or {})
    missing = {name: one for name, one in wanted.items() if not one.items() <= have.get(name, {}).items()}
    if not missing:
        return Check("payload indexes", PASSED, ", ".join(sorted(have)))
    put = curl_line(qdrant, "PUT", state.name, "index", query="?wait=true")
    bodies = [json.dumps({"field_name": name, "field_schema": one}) for name, one in missing.items()]
    remedy = "\n".join(f"{put} -H 'content-type: application/json' -d {quote(body)}" for body in bodies)
    names = ", ".join(f"{name} ({one['type']})" for name, one in missing.items())
    what = "missing or with other parameters" if missing.keys() & have else "missing"
    return Check("payload indexes", FAILED, f"{what}: {names}", remedy)


def _parameters(schema: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The type and the other parameters of each payload index of an info."""
    return {name: {"type": one["data_type"], **(one.get("params") or {})} for name, one in schema.items()}


def check_model(state: CollectionState, spec: EmbeddingSpec) -> Check:
    """The model that made the vectors, if the collection's metadata names it."""
    stamp = stamp_of(state.raw["config"])
    if not stamp:
        return Check("model stamp", SKIPPED, "this server keeps no metadata, or the collection was not stamped")
    model, provider = str(stamp.get("model")), provider_of(stamp)
    status = PASSED if is_model_of(stamp, spec) else FAILED
    settings = model_settings(provider, model, named=spec.provider != OPENAI)
    exports = " ".join(f"{name}={quote(value)}" for name, value in settings.items())
    detail = f"{model}, EMBEDDING_MODEL is {spec.model}"
    if {provider, spec.provider} != {OPENAI}:
        detail = f"{model} of {provider}, the settings choose {spec.model} of {spec.provider}"
    return Check("model stamp", status, detail, f"export {exports}\nor replace all vectors:\n{REPLACE_ALL}")


def check_findings(found: Findings, *, have_plan: bool, after_restart: bool) -> list[Check]:
    """The comparison of both stores as checks: ids, orphan points, content, payloads.

    What was written after the migration is pending until the restart. Without a plan (an embedding cache) nothing is
    known to be newer, so that every difference is a failure.
    """
    exempt = f"{found.exempt} exempt (no text, unusable or repeated id)"
    equal = "equal to the graph, nothing of the old points lost"
    if found.lagging:
        equal += f"; except last_accessed or relevance_score of {found.lagging:,}, which AutoMem changes in the graph"
        equal += " (--only-missing copies them)"
    newer, changed = "memories are newer than the migration", "memories changed since the migration"
    # name, what differs, detail if nothing does, what is wrong, what is pending
    rows = (
        ("ids", found.missing, f"{found.expected} memories, {exempt}", "memories have no point", newer),
        ("orphan points", compare.Differences(found.orphans), "none", "have no memory", ""),
        ("content", found.contents, "equal to the graph", "points hold another content", changed),
        ("payloads", found.payloads, equal, "differ from the graph or the old points", changed),
    )
    checks = []
    for name, differences, same, wrong, new in rows:
        failed = differences.wrong + (differences.newer if after_restart or not have_plan else [])
        if failed:
            remedy = ONLY_MISSING if found.expected or found.exempt else _LOST_GRAPH
            checks.append(Check(name, FAILED, f"{len(failed)} {wrong}: {_some(failed)}", remedy))
        elif differences.newer:
            detail = f"{len(differences.newer)} {new}: {_some(differences.newer)}"
            checks.append(Check(name, PENDING, detail))
        else:
            checks.append(Check(name, PASSED, same))
    return checks


def _some(ids: list[Any]) -> str:
    more = f" and {len(ids) - _EXAMPLES} more" if len(ids) > _EXAMPLES else ""
    return listed(ids[:_EXAMPLES]) + more


def read_points(
    qdrant: Qdrant,
    state: CollectionState,
    cache: EmbeddingCache | None,
    spec: EmbeddingSpec,
    existing: TemporaryIdTable,
    progress: Progress,
) -> Check:
    """Read every point once: add its payload to `existing`, and check its vector.

    The vector has the width of `spec`, is finite, not zero, and equal to the embedding cache's if the cache has it.
    """
    unusable: list[PointId] = []
    different: list[PointId] = []
    known = total = 0
    for page in all_points(qdrant, state.name, page=max(1, _NUMBERS_AT_ONCE // spec.size), vector=True):
        existing.put((point.id, point.payload) for point in page)
        sized = [point for point in page if point.vector is not None and len(point.vector) == spec.size]
        usable = list[Point]()
        if sized:
            vectors = np.vstack([point.vector for point in sized if point.vector is not None])
            are_usable = np.asarray(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1))
            usable = [point for point, is_usable in zip(sized, are_usable, strict=True) if is_usable]
        if len(usable) < len(page):
            unusable += [point.id for point in page if point not in usable]
        if cache:
            found, differing = compare.different_vectors(usable, cache, spec, state)
            known += found
            different += [point.id for point, _ in differing]
        total += len(page)
        progress(len(page))
    if wrong := unusable or different:
        what = "unusable (width, zero or not finite)" if unusable else "not the model's for their content"
        return Check("vectors", FAILED, f"{len(wrong)} are {what}: {_some(wrong)}", REPLACE_ALL)
    return Check("vectors", PASSED, f"{total} of {spec.size}d, {known} equal to the embedding cache's")


def check_service(health: dict[str, Any], spec: EmbeddingSpec, graph: str, points: int) -> Check | None:
    """The pending check if AutoMem's `/health` shows other settings or stores: a restart may change it; else None.

    Before 0.14 it shows no sizes, and only recall shows which is used.
    """
    sizes = health.get("vector_dimensions") or {}
    shown = {name: sizes[name] for name in _SIZES if sizes.get(name) is not None}
    used = [size for name, size in shown.items() if name != "configured"]
    if sizes and (sizes.get("mismatch") or not used or any(size != spec.size for size in used)):
        text = ", ".join(f"{name} {size}" for name, size in shown.items()) or "no sizes"
        return Check("recall", PENDING, f"AutoMem does not run at {spec.size}d yet (/health: {text})", _RESTART)
    named, counted = health.get("graph"), health.get("vector_count")
    if isinstance(named, str) and named != graph:
        detail = f"AutoMem works on the graph '{named}', FALKORDB_GRAPH is '{graph}'"
        return Check("recall", PENDING, detail, _SAME_STORES)
    if isinstance(counted, int) and abs(counted - points) > max(_FEW_VECTORS, _SHARE * points):
        detail = f"AutoMem counts {counted:,} vectors, the collection holds {points:,}: it works on another one"
        return Check("recall", PENDING, detail, _SAME_STORES)
    return None


def check_recall(api: AutoMemApi, samples: list[Sample]) -> list[Check]:
    """Recall through AutoMem: each sample's content must bring a memory with it first, with `match_type: vector`."""
    if not samples:
        return [Check("recall", SKIPPED, "no memory fit to be a sample")]
    wrong, times, method = [], [], ""
    for sample in samples:
        answer = automem.recall(api, sample.content, _RECALL_LIMIT)
        method = answer.method
        times.append(answer.milliseconds)
        first = answer.results[0] if answer.results else {}
        content = (first.get("memory") or {}).get("content")
        if content != sample.content or first.get("match_type") != "vector":
            wrong.append(f"{sample.id} (first: {first.get('id')}, {first.get('match_type')})")
    latency = Check("recall latency", PASSED, f"median {median(times):.0f} ms over {len(times)} ({method} /recall)")
    if wrong:
        detail = f"{len(wrong)} of {len(samples)} samples are not found first by vector: {_some(wrong)}"
        return [Check("recall", PENDING, detail, _RESTART), latency]
    return [Check("recall", PASSED, f"{len(samples)} of {len(samples)} samples come first by vector"), latency]


def check_recall_direct(source: CollectionSource, cache: EmbeddingCache, samples: list[Sample], why: str) -> Check:
    """Recall without AutoMem: a search in Qdrant with each sample's vector from the embedding cache."""
    keys = {sample.id: cache.text_key(source.spec, sample.content) for sample in samples}
    vectors = cache.get_vectors(keys.values())
    usable = [sample for sample in samples if keys[sample.id] in vectors]
    if not usable:
        return Check("recall", SKIPPED, f"{why}, and the embedding cache holds no vector to search with")
    wrong = []
    for sample in usable:
        vector = np.frombuffer(vectors[keys[sample.id]], dtype="<f4")
        nearest = [hit.id for hit in search(source.qdrant, source.collection, vector, 1)]
        found = retrieve(source.qdrant, source.collection, nearest, payload=["content"])
        if not found or found[0].payload != {"content": sample.content}:
            wrong.append(sample.id)
    if wrong:
        detail = f"{len(wrong)} of {len(usable)} samples are not found first: {_some(wrong)}"
        return Check("recall", FAILED, detail, REPLACE_ALL)
    return Check("recall", PASSED, f"{len(usable)} samples come first, straight from Qdrant ({why})")


def check_provider(
    stores: Stores, state: CollectionState, cache: EmbeddingCache, since: list[Sample], *, restored: bool
) -> Check:
    """Compare vectors that AutoMem made of memories `since` the migration, the newest first, with the provider's.

    The newest shows which model AutoMem embeds with, the others whether it used another one before. `restored`:
    whether a restore has replaced the migration's collection.
    """
    spec, name = stores.collection.spec, "AutoMem's model"
    model = f"{spec.model} of {spec.provider}"
    believed = f"{model}, {stores.reason}" if stores.reason else model
    # Those whose vector these scripts did not make.
    keys = [cache.text_key(spec, sample.content) for sample in since]
    known = cache.known(keys)
    others = {sample.id: sample for key, sample in zip(keys, since, strict=True) if key not in known}
    points = retrieve(stores.collection.qdrant, state.name, list(map(as_id, others)), vector=True)
    vectors = {str(one.id): one.vector for one in points if one.vector is not None}
    made = [(sample, vectors[one]) for one, sample in others.items() if one in vectors]
    if not made:
        return Check(name, SKIPPED, f"{believed}; not yet known: it embedded no memory since the migration")
    try:
        ours = _compared_vectors(stores, cache, [sample for sample, _ in made])
    except MigrationError as error:
        return Check(name, SKIPPED, f"{believed}; not yet known: {one_line(str(error))}")
    likeness = [cosine(vector, own) for (_, vector), own in zip(made, ours, strict=True)]
    least = min(likeness)
    evidence = f"its vector of memory {made[likeness.index(least)][0].id} has the cosine {least:.3f} with ours"
    evidence += f", the least of {len(made)}" if len(made) > 1 else ""
    if least >= SAME_MODEL_COSINE:
        return Check(name, PASSED, f"{believed}: {evidence}")
    replace_them = f"{REPLACE_ALL} --fresh" if restored else ONLY_MISSING
    if likeness[0] >= SAME_MODEL_COSINE:
        remedy = f"replace the vectors that it made before it was restarted:\n{replace_them}"
        return Check(name, FAILED, f"{model} now, but not always since the migration: {evidence}", remedy)
    remedy = f"{_RESTART}\nthen replace the vectors that it made:\n{replace_them}"
    return Check(name, PENDING, f"not {model}: {evidence}", remedy)


def _compared_vectors(stores: Stores, cache: EmbeddingCache, samples: list[Sample]) -> list[NDArray[np.float32]]:
    """The provider's vectors of the texts. Each text is paid for once.

    The cache's vectors are those of points: there they would be compared with AutoMem's bit by bit.
    """
    texts = {cache.text_key(stores.collection.spec, one.content).hex(): one.content for one in samples}
    known = dict(line.split(" ") for line in (cache.get_meta(_COMPARED) or "").splitlines())
    if missing := [key for key in texts if key not in known]:
        vectors = stores.embed([texts[key] for key in missing])
        known |= {key: one.astype("<f4").tobytes().hex() for key, one in zip(missing, vectors, strict=True)}
        cache.set_meta(_COMPARED, "\n".join(f"{key} {known[key]}" for key in texts))
    return [np.frombuffer(bytes.fromhex(known[key]), "<f4") for key in texts]


@dataclass(frozen=True)
class Stores:
    """What is verified, and the folder with the journals of its migrations.

    `embed` returns the provider's vectors of texts, and raises MigrationError. `reason` is why that provider is used.
    """

    graph: GraphSource
    collection: CollectionSource
    api: AutoMemApi
    folder: Path
    targets: list[str]
    embed: Callable[[list[str]], NDArray[np.float32]]
    reason: str


def verify(
    stores: Stores, cache: EmbeddingCache, *, samples: int, after_restart: bool, bar: ProgressBar
) -> list[Check]:
    """Make every check; recall is tried with `samples` memories. `after_restart`: nothing may be pending."""
    graph, source = stores.graph, stores.collection
    qdrant, spec = source.qdrant, source.spec
    require_graph(graph.conn, graph.graph)
    state = get_state(qdrant, source.collection)
    last = last_migration(stores.folder, stores.targets)
    restored = last is not None and restored_since(last)
    checks = [
        check_size(qdrant, state, spec),
        check_status(state),
        check_model(state, spec),
        check_indexes(qdrant, state, last.fact("settings") if last and not restored else None),
    ]
    planned = cache if cache.memory_count() else None
    migrated_at = next(reversed(last.times(VERIFIED)), None) if last else None
    with TemporaryIdTable() as existing:
        with bar("compare vectors", state.points, "points") as progress:
            vectors = read_points(qdrant, state, planned, spec, existing, progress)
        with bar("compare stores", None, "memories") as progress:
            found = compare_stores(graph, existing, planned, migrated_at, samples, progress)
    ids = [*found.missing.ids, *found.contents.ids, *found.payloads.ids, *map(as_id, found.orphans)]
    if 0 < len(ids) <= _FEW_DIFFER:
        # AutoMem works on: it may have written these between the reading of the points and that of the graph.
        with TemporaryIdTable() as existing, bar("compare again", None, "memories") as progress:
            existing.put((one.id, one.payload) for one in retrieve(qdrant, state.name, ids, payload=True))
            again = compare_stores(graph, existing, planned, migrated_at, samples, progress, set(ids))
        found.missing, found.contents, found.payloads = again.missing, again.contents, again.payloads
        found.orphans = again.orphans
    checks += [*check_findings(found, have_plan=planned is not None, after_restart=after_restart), vectors]
    checks.append(check_provider(stores, state, cache, [one for _, one in found.since], restored=restored))
    if last and {vectors.status, checks[-1].status} & {FAILED, PENDING}:
        cache.set_meta(compare.OTHER_MODEL, last.run_id)  # --only-missing replaces these vectors
    try:
        checks += _recall_checks(stores, cache, found.samples, after_restart=after_restart)
    except MigrationError as error:  # the results of all other checks are shown
        checks.append(Check("recall", FAILED, str(error).replace("\n", " "), error.next_step))
    if after_restart:
        checks = [replace(one, status=FAILED) if one.status == PENDING else one for one in checks]
    return checks


def _recall_checks(stores: Stores, cache: EmbeddingCache, samples: list[Sample], *, after_restart: bool) -> list[Check]:
    source = stores.collection
    answer = ask_health(stores.api)
    if answer.health is None:
        why = f"AutoMem does not answer at {without_login(stores.api.url)}: {answer.summary}"
        if after_restart:
            return [Check("recall", FAILED, why, START_AUTOMEM)]
        return [check_recall_direct(source, cache, samples, why)]
    mismatch = check_service(answer.health, source.spec, stores.graph.graph, count(source.qdrant, source.collection))
    return [mismatch] if mismatch else check_recall(stores.api, samples)


def record(stores: Stores, checks: list[Check]) -> str:
    """Store the migration record of the guide in AutoMem, if every check passed. Returns the memory's id."""
    if any(check.status in {FAILED, PENDING} for check in checks):
        raise MigrationError("not stored before every check has passed", next_step="do first what is printed below")
    spec = stores.collection.spec
    model = spec.model if spec.provider == OPENAI else f"{spec.model} of {spec.provider}"
    content = f"The embeddings were migrated to {spec.size}d ({model}); every check of the migration passed"
    return automem.remember(stores.api, content, ["migration", "config", "embeddings"], 0.8)


def recall_lines(api: AutoMemApi, query: str) -> list[str]:
    """One line per memory that recalling `query` returns: score, match type, the beginning of the content."""
    lines = []
    for one in automem.recall(api, query, _RECALL_LIMIT).results:
        content = " ".join(str((one.get("memory") or {}).get("content", "")).split())[:80]
        lines.append(f"{float(one.get('final_score') or 0):.3f}  {one.get('match_type')}  {content}")
    return lines
