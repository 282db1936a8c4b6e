"""What one re-embedding works on: opened stores and settings, which do not change during the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from lib.backup.graph import GraphSource
from lib.backup.phases import spec_as_json
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import ProgressBar
from lib.dimensions import EmbeddingSpec
from lib.journal import Journal

_FRESH = "fresh since"


@dataclass(frozen=True)
class Context:
    """The graph, the collection, the embedding cache, the backup folder, and what the operator asked for.

    `spec` describes the new vectors; `reason` is why its provider is used, "" if it is OpenAI and no other one has a
    setting. `targets` name both stores in journals. `store_lock` is held while the live collection changes: a backup
    excludes it. `again` is the command line, without secrets.
    """

    graph: GraphSource
    qdrant: Qdrant
    collection: str
    spec: EmbeddingSpec
    cache: EmbeddingCache
    folder: Path
    targets: list[str]
    bar: ProgressBar
    store_lock: Callable[[], AbstractContextManager[None]] = nullcontext
    again: str = "python scripts/reembed_embeddings.py"
    fresh: bool = False
    in_place: bool = False
    no_switch: bool = False
    reason: str = ""

    @property
    def staged(self) -> str:
        """The name of the collection that is built while the live one serves."""
        return f"{self.collection}__next"


def reached(journal: Journal | None, phase: str) -> bool:
    """Return whether the run that is resumed, if any, has announced `phase`."""
    return journal is not None and journal.has_reached(phase)


def is_fresh(ctx: Context) -> bool:
    """Return whether the cache holds only vectors that this migration paid for since it was started with `--fresh`."""
    return ctx.cache.get_meta(_FRESH) == _fresh_mark(ctx.spec)


def must_forget(ctx: Context) -> bool:
    """Return whether `--fresh` was asked for and the earlier vectors are still in the cache."""
    return ctx.fresh and not is_fresh(ctx)


def mark_fresh(ctx: Context, *, done: bool = False) -> None:
    """Note in the cache that the earlier vectors are dropped, or that the migration is `done`."""
    ctx.cache.set_meta(_FRESH, "" if done else _fresh_mark(ctx.spec))


def _fresh_mark(spec: EmbeddingSpec) -> str:
    values = spec_as_json(spec)
    return f"{values['endpoint']} {values['model']} {values['size']}"
