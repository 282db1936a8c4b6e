"""`--only-missing`: sync a collection with the graph without replacing it, and never mix two models."""

from __future__ import annotations

from dataclasses import dataclass

from lib.backup.phases import kept_the_size
from lib.backup.points import existing_points
from lib.clients.embeddings.pricing import count_tokens
from lib.clients.qdrant.collection import CollectionState, get_state
from lib.clients.qdrant.points import Point, scroll
from lib.dimensions import SETTING_NAMES
from lib.errors import GuardRefused
from lib.reembed.context import Context
from lib.reembed.embed import EmbeddingRunner, EmbeddingTotals, embed_texts, embed_uncached
from lib.reembed.sync import SyncOutcome, missing_of, remove_orphans, sync_collection, texts_to_embed
from lib.verify.compare import SAME_MODEL_COSINE, cosine, repair_vectors

_SAMPLES = 3
_PAGE = 256
_REPLACE_ALL = "python scripts/backup_automem.py && python scripts/reembed_embeddings.py"


@dataclass(frozen=True)
class Synced:
    """What `--only-missing` did: points written, vectors repaired, orphan points removed."""

    outcome: SyncOutcome
    repaired: int
    removed: int


def only_missing(ctx: Context, runner: EmbeddingRunner, paid: EmbeddingTotals) -> Synced:
    """Add missing points, update those whose content or payload differs from the graph's, remove orphans with care.

    After a migration that kept the size, AutoMem may have written vectors of the old model. Then every vector is
    compared, and texts without a vector in the cache are embedded again.
    """
    state = get_state(ctx.qdrant, ctx.collection)
    compare_all = kept_the_size(ctx.folder, ctx.targets, ctx.spec)
    if not compare_all:
        require_same_model(ctx, runner, paid, state)
    with existing_points(ctx.qdrant, state.name) as existing:
        missing = missing_of(ctx.cache, existing)
        runner.require_affordable(missing.tokens, paid)
        embed_texts(runner, ctx.cache, texts_to_embed(ctx.cache, existing), missing, ctx.bar, paid)
    with ctx.store_lock():
        with ctx.bar("sync", None, "points") as progress:
            outcome = sync_collection(ctx.qdrant, state.name, ctx.cache, progress=progress)
        repaired = 0
        if compare_all:
            embed_uncached(runner, ctx.cache, ctx.bar, paid)
            repaired = repair_vectors(ctx.qdrant, state.name, ctx.cache, ctx.spec, ctx.bar)
        return Synced(outcome, repaired, remove_orphans(ctx, state))


def require_same_model(ctx: Context, runner: EmbeddingRunner, paid: EmbeddingTotals, state: CollectionState) -> None:
    """Embed the contents of three unchanged points and compare them with the stored vectors.

    Raises GuardRefused if a cosine is under 0.99: another model made the vectors.
    """
    points = _unchanged(ctx, state)
    if not points and state.points:
        raise GuardRefused(
            f"no point of '{state.name}' holds its memory's content: the model of its vectors cannot be checked",
            next_step=f"replace all vectors:\n{_REPLACE_ALL}",
        )
    if not points:
        return
    setting = SETTING_NAMES[ctx.spec.provider].model
    texts = [str((point.payload or {})["content"]) for point in points]
    runner.require_affordable(sum(count_tokens(texts)), paid)
    answer = runner.client.embed(texts)
    paid.pay(answer.tokens)
    for point, vector in zip(points, answer.vectors, strict=True):
        assert point.vector is not None
        likeness = cosine(point.vector, vector)
        if likeness < SAME_MODEL_COSINE:
            raise GuardRefused(
                f"the vectors in '{state.name}' were not made by {runner.spec.model} at {runner.spec.size}d"
                f" (point {point.id}: cosine {likeness:.2f}): --only-missing would mix two models",
                next_step=f"set {setting} to the model that made them, or replace all vectors:\n{_REPLACE_ALL}",
            )


def _unchanged(ctx: Context, state: CollectionState) -> list[Point]:
    """Return up to three points with a vector and the content of their memory."""
    found: list[Point] = []
    for page in scroll(ctx.qdrant, state.name, payload=["content"], vector=True, page=_PAGE):
        rows = ctx.cache.memories_of([point.id for point in page])
        for point in page:
            content = (point.payload or {}).get("content")
            if point.vector is not None and point.id in rows and content == rows[point.id].content:
                found.append(point)
        if len(found) >= _SAMPLES:
            break
    return found[:_SAMPLES]
