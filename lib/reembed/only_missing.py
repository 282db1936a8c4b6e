"""`--only-missing`: bring a collection level with the graph without making it anew, and never mix two models."""

from __future__ import annotations

from dataclasses import dataclass

from lib.backup.existing_points import existing_points
from lib.backup.last_migration import kept_the_size
from lib.clients.embeddings.pricing import count_tokens
from lib.clients.qdrant.collection import CollectionState, get_state
from lib.clients.qdrant.points import Point, scroll
from lib.errors import GuardRefused
from lib.reembed.embed import EmbeddingRunner, embed_texts, embed_uncached
from lib.reembed.migration import Migration
from lib.reembed.sync import SyncOutcome, missing_of, remove_orphans, sync_collection, texts_to_embed
from lib.verify.vectors import repair_vectors

SAME_MODEL_COSINE = 0.99
_TRIES = 3
_PAGE = 256


@dataclass(frozen=True)
class Drifted:
    """What `--only-missing` did."""

    outcome: SyncOutcome
    removed: int


def only_missing(run: Migration, runner: EmbeddingRunner) -> Drifted:
    """Add missing ids, renew points whose content or payload is not the graph's, remove surplus ones with care.

    Where the migration kept the size, the old service may have written the old model's vectors since: then every
    vector is compared, and what the embedding cache does not know is embedded again.
    """
    state = get_state(run.target.qdrant, run.target.collection)
    qdrant, compare = run.target.qdrant, kept_the_size(run.folder, run.targets, run.spec)
    if not compare:
        require_same_model(run, runner, state)
    with existing_points(qdrant, state.name) as existing:
        missing = missing_of(run.cache, existing)
        runner.require_affordable(missing.tokens, run.bought)
        embed_texts(runner, run.cache, texts_to_embed(run.cache, existing), missing, run.bar, run.bought)
    with run.bar("sync", None, "points") as progress:
        outcome = sync_collection(qdrant, state.name, run.cache, progress=progress)
    if compare:
        embed_uncached(runner, run.cache, run.bar, run.bought)
        run.mended = repair_vectors(qdrant, state.name, run.cache, run.spec, run.bar)
    return Drifted(outcome, remove_orphans(run, state))


def require_same_model(run: Migration, runner: EmbeddingRunner, state: CollectionState) -> None:
    """Embed three unchanged points and compare with what is stored: another model's vectors are never mixed in.

    Raises GuardRefused where they differ (cosine under 0.99).
    """
    import numpy as np

    points = _unchanged(run, state)
    if not points and state.points:
        raise GuardRefused(
            f"no point of '{state.name}' holds its memory's content: nothing tells which model made its vectors",
            next_step="make all anew:\npython scripts/backup_automem.py && python scripts/reembed_embeddings.py",
        )
    if not points:
        return
    texts = [str((point.payload or {})["content"]) for point in points]
    runner.require_affordable(sum(count_tokens(texts)), run.bought)
    answer = runner.client.embed(texts)
    run.bought.pay(answer.tokens)
    for point, vector in zip(points, answer.vectors, strict=True):
        assert point.vector is not None
        lengths = float(np.linalg.norm(point.vector) * np.linalg.norm(vector))
        cosine = float(np.dot(point.vector, vector)) / lengths if lengths else 0.0
        if cosine < SAME_MODEL_COSINE:
            raise GuardRefused(
                f"the vectors in '{state.name}' were not made by {runner.spec.model} at {runner.spec.size}d"
                f" (point {point.id}: cosine {cosine:.2f}): --only-missing would mix two models",
                next_step="set EMBEDDING_MODEL to the model that made them, or make all of them anew:\n"
                "python scripts/backup_automem.py && python scripts/reembed_embeddings.py",
            )


def _unchanged(run: Migration, state: CollectionState) -> list[Point]:
    found: list[Point] = []
    for page in scroll(run.target.qdrant, state.name, payload=["content"], vector=True, page=_PAGE):
        rows = run.cache.memories_of([point.id for point in page])
        found += [
            point
            for point in page
            if point.vector is not None
            and point.id in rows
            and (point.payload or {}).get("content") == rows[point.id].content
        ]
        if len(found) >= _TRIES:
            break
    return found[:_TRIES]
