"""All the checks of a migration in one go: steps 4 and 5 of the guide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource
from lib.backup.last_migration import settings_before, verified_at
from lib.clients.automem import AutoMemApi, ask_health, remember
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.falkordb.connection import require_graph
from lib.clients.qdrant.collection import get_state
from lib.concurrency import ProgressBar
from lib.errors import MigrationError
from lib.network import without_login
from lib.verify.checks import (
    FAILED,
    PENDING,
    START_AUTOMEM,
    Check,
    check_indexes,
    check_model,
    check_recall_api,
    check_recall_direct,
    check_size,
    check_status,
    check_vectors,
    elsewhere,
    judge,
)
from lib.verify.compare import Candidates, Sample, compare_stores


@dataclass(frozen=True)
class Stores:
    """What is verified, and where the journals of its migrations are."""

    graph: GraphSource
    collection: CollectionSource
    api: AutoMemApi
    folder: Path
    targets: list[str]


def verify(
    stores: Stores, cache: EmbeddingCache, *, samples: int, after_restart: bool, bar: ProgressBar
) -> list[Check]:
    """Every check, in the guide's order. Raises DimensionMismatch, MissingData, StoreUnreachable."""
    source = stores.collection
    require_graph(stores.graph.conn, stores.graph.graph, stores.graph.address)
    state = get_state(source.qdrant, source.collection)
    checks = [check_size(state, source.spec), check_status(state), check_model(state, source.spec)]
    checks.append(check_indexes(source.qdrant, state, settings_before(stores.folder, stores.targets)))
    known = cache if cache.memory_count() else None
    with bar("compare stores", None, "memories") as progress, Candidates(samples, state.points) as candidates:
        found = compare_stores(
            stores.graph.conn,
            stores.graph.graph,
            source.qdrant,
            source.collection,
            known,
            progress,
            candidates,
            verified_at(stores.folder, stores.targets),
        )
        chosen = candidates.samples()
    checks += judge(found, have_plan=known is not None, after_restart=after_restart)
    with bar("compare vectors", state.points, "points") as progress:
        checks.append(check_vectors(source.qdrant, state, known, source.spec, progress))
    return checks + _recall(stores, cache, chosen, after_restart=after_restart)


def _recall(
    stores: Stores, cache: EmbeddingCache, samples: list[Sample], *, after_restart: bool
) -> list[Check]:
    try:
        return _asked(stores, cache, samples, after_restart=after_restart)
    except MigrationError as error:  # every other check has ended: what it found is shown
        return [Check("recall", FAILED, str(error).replace("\n", " "), error.next_step)]


def _asked(
    stores: Stores, cache: EmbeddingCache, samples: list[Sample], *, after_restart: bool
) -> list[Check]:
    source = stores.collection
    answer = ask_health(stores.api)
    if answer.health is not None:
        points = get_state(source.qdrant, source.collection).points
        stranger = elsewhere(answer.health, stores.graph.graph, points)
        asked = (stores.api, answer.health, source.spec, samples)
        return check_recall_api(*asked, stranger=stranger, after_restart=after_restart)
    why = f"AutoMem does not answer at {without_login(stores.api.url)}: {answer.summary}"
    if after_restart:
        return [Check("recall", FAILED, why, START_AUTOMEM)]
    return check_recall_direct(source.qdrant, source.collection, cache, source.spec, samples, why)


def is_settled(checks: list[Check]) -> bool:
    """Whether nothing failed and nothing waits for the restart."""
    return not any(check.status in {FAILED, PENDING} for check in checks)


def record(stores: Stores) -> str:
    """Store the migration record that the guide asks for; the memory's id."""
    spec = stores.collection.spec
    content = (
        f"The embeddings were migrated to {spec.size}d ({spec.model}); every check of the migration passed"
    )
    return remember(stores.api, content, ["migration", "config", "embeddings"], 0.8)
