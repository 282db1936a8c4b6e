"""All checks of a migration in the guide's order (its steps 4 and 5), and the migration record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource
from lib.backup.last_migration import settings_before, verified_at
from lib.clients import automem
from lib.clients.automem import AutoMemApi, ask_health
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.falkordb.connection import require_graph
from lib.clients.qdrant.collection import get_state
from lib.clients.qdrant.points import count
from lib.concurrency import ProgressBar
from lib.dimensions import OPENAI
from lib.errors import MigrationError
from lib.network import without_login
from lib.verify.checks import (
    FAILED,
    PENDING,
    START_AUTOMEM,
    Check,
    check_findings,
    check_indexes,
    check_model,
    check_recall,
    check_recall_direct,
    check_service,
    check_size,
    check_status,
    check_vectors,
)
from lib.verify.compare import Sample, compare_stores


@dataclass(frozen=True)
class Stores:
    """What is verified, and the folder with the journals of its migrations."""

    graph: GraphSource
    collection: CollectionSource
    api: AutoMemApi
    folder: Path
    targets: list[str]


def verify(
    stores: Stores, cache: EmbeddingCache, *, samples: int, after_restart: bool, bar: ProgressBar
) -> list[Check]:
    """Make every check; recall is tried with `samples` memories. `after_restart`: nothing may be pending.

    Raises DimensionMismatch, MissingData, StoreUnreachable.
    """
    graph, source = stores.graph, stores.collection
    qdrant, spec = source.qdrant, source.spec
    require_graph(graph.conn, graph.graph, graph.address)
    state = get_state(qdrant, source.collection)
    checks = [
        check_size(state, spec),
        check_status(state),
        check_model(state, spec),
        check_indexes(qdrant, state, settings_before(stores.folder, stores.targets)),
    ]
    planned = cache if cache.memory_count() else None
    migrated_at = verified_at(stores.folder, stores.targets)
    with bar("compare stores", None, "memories") as progress:
        found = compare_stores(graph.conn, graph.graph, qdrant, state.name, planned, migrated_at, samples, progress)
    checks += check_findings(found, have_plan=planned is not None, after_restart=after_restart)
    with bar("compare vectors", state.points, "points") as progress:
        checks.append(check_vectors(qdrant, state, planned, spec, progress))
    try:
        checks += _recall_checks(stores, cache, found.samples, after_restart=after_restart)
    except MigrationError as error:  # the results of all other checks are shown
        checks.append(Check("recall", FAILED, str(error).replace("\n", " "), error.next_step))
    return checks


def _recall_checks(stores: Stores, cache: EmbeddingCache, samples: list[Sample], *, after_restart: bool) -> list[Check]:
    source = stores.collection
    answer = ask_health(stores.api)
    if answer.health is None:
        why = f"AutoMem does not answer at {without_login(stores.api.url)}: {answer.summary}"
        if after_restart:
            return [Check("recall", FAILED, why, START_AUTOMEM)]
        return [check_recall_direct(source.qdrant, source.collection, cache, source.spec, samples, why)]
    points = count(source.qdrant, source.collection)
    mismatch = check_service(answer.health, source.spec, stores.graph.graph, points)
    checks = [mismatch] if mismatch else check_recall(stores.api, samples)
    if after_restart:
        checks = [replace(one, status=FAILED) if one.status == PENDING else one for one in checks]
    return checks


def all_passed(checks: list[Check]) -> bool:
    """Whether no check failed or is pending."""
    return not any(check.status in {FAILED, PENDING} for check in checks)


def record(stores: Stores) -> str:
    """Store the migration record of the guide in AutoMem. Returns the memory's id."""
    spec = stores.collection.spec
    model = spec.model if spec.provider == OPENAI else f"{spec.model} of {spec.provider}"
    content = f"The embeddings were migrated to {spec.size}d ({model}); every check of the migration passed"
    return automem.remember(stores.api, content, ["migration", "config", "embeddings"], 0.8)


def recall_lines(api: AutoMemApi, query: str, limit: int = 5) -> list[str]:
    """One line per memory that recalling `query` returns: score, match type, the beginning of the content."""
    lines = []
    for one in automem.recall(api, query, limit).results:
        content = " ".join(str((one.get("memory") or {}).get("content", "")).split())[:80]
        lines.append(f"{float(one.get('final_score') or 0):.3f}  {one.get('match_type')}  {content}")
    return lines
