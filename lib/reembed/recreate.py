"""The live collection exchanged: keep what only its points hold, delete it, create, fill from the embedding cache.

Every call here is announced in the journal first, so that a run killed at any point goes on where it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from lib.backup.collection import STAMP_KEY
from lib.backup.last_migration import CREATED, DELETED, DELETING, KEPT, READ
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.qdrant.collection import (
    aliases_of,
    create_default,
    create_like,
    delete_collection,
    exists,
    free_aliases,
    get_state,
    put_aliases,
    refuse_foreign,
    wait_green,
)
from lib.concurrency import ProgressBar
from lib.dimensions import EmbeddingSpec
from lib.journal import Journal
from lib.reembed.migration import Target
from lib.reembed.sync import SyncOutcome, save_payloads, sync_collection

INDEX_SECONDS = 3600.0


def stamp(spec: EmbeddingSpec) -> dict[str, Any]:
    """What is written into the collection's metadata, where the server supports it (1.16 and later)."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {STAMP_KEY: {"model": spec.model, "size": spec.size, "at": now}}


def made_anew(cache: EmbeddingCache, journal: Journal, points: int) -> bool:
    """Whether somebody made the collection anew since this run read it: most of the points it had are gone."""
    return journal.has_reached(READ) and 2 * points < cache.saved_count()


def save_live(target: Target, cache: EmbeddingCache, journal: Journal, bar: ProgressBar, points: int) -> int:
    """Keep the payloads of the live collection, which has `points`; how many were read.

    What was made anew meanwhile (this run deleted the old one; or somebody did, and most of the points that were
    kept are gone) is laid over what was kept.
    """
    began = journal.has_reached(READ) or journal.has_reached(KEPT)
    anew = journal.has_reached(DELETING) or made_anew(cache, journal, points)
    with bar("keep payloads", points, "points") as progress:
        return save_payloads(
            target.qdrant, target.collection, cache, first=not began, add=anew, progress=progress
        )


def drop_live(
    target: Target, cache: EmbeddingCache, journal: Journal, bar: ProgressBar, *, undo: str
) -> float:
    """Journal the settings, keep the payloads, delete the live collection. The guard has spoken before this.

    The payloads are read by the last request before the delete. Returns the moment (monotonic seconds) from which
    the collection is absent.

    Where the journal says that the old collection is gone already, what stands there was made anew meanwhile: its
    payloads are kept beside the old ones, the old settings stay.
    """
    state, facts = get_state(target.qdrant, target.collection), {}
    refuse_foreign(state.raw)  # a sparse vector may have been added since the plan
    if not journal.has_reached(DELETING):
        anew = made_anew(cache, journal, state.points)
        known = journal.fact("aliases") or [] if anew else []
        facts = {
            "settings": journal.fact("staged_like") if anew else state.raw,
            "aliases": sorted({*known, *aliases_of(target.qdrant, target.collection)}),
        }
    count = save_live(target, cache, journal, bar, state.points)
    journal.append(KEPT, kept=count, **facts)
    journal.append(DELETING, undo=undo)
    began = time.monotonic()
    delete_collection(target.qdrant, target.collection)
    journal.append(DELETED)
    return began


def make_collection(target: Target, settings: dict[str, Any] | None, journal: Journal) -> None:
    """Create the collection at the new size, else as `settings` (raw info) has it, else as AutoMem does."""
    if not exists(target.qdrant, target.collection):
        if settings:
            create_like(
                target.qdrant, target.collection, settings, target.spec.size, metadata=stamp(target.spec)
            )
        else:
            create_default(target.qdrant, target.collection, target.spec.size, stamp(target.spec))
    journal.append(CREATED)


@dataclass
class Filled:
    """What filling did, which aliases somebody else has taken meanwhile, and whether the index was seen whole.

    `whole_at`: when the last point was in (monotonic seconds).
    """

    outcome: SyncOutcome
    aliases_taken: list[str]
    indexed: bool
    whole_at: float


def fill(
    target: Target,
    cache: EmbeddingCache,
    total: int,
    bar: ProgressBar,
    aliases: list[str],
    *,
    whole: bool,
    copied_from: str | None = None,
) -> Filled:
    """Put every planned point in, then the aliases, then wait for the index; rejected rows are in the outcome.

    `whole`: the old points are gone, so every key of theirs comes back (see `standing_payload`). `copied_from`: see
    `sync_collection`.
    """
    with bar("upsert", total, "points") as progress:
        outcome = sync_collection(
            target.qdrant,
            target.collection,
            cache,
            whole=whole,
            copied_from=copied_from,
            progress=progress,
        )
    whole_at = time.monotonic()
    taken = put_back_aliases(target, aliases)
    state = get_state(target.qdrant, target.collection)
    if outcome.wrote or not state.optimized:
        with bar("wait for the index", None, ""):
            state = wait_green(target.qdrant, target.collection, INDEX_SECONDS)
    return Filled(outcome, taken, state.optimized, whole_at)


def put_back_aliases(target: Target, aliases: list[str]) -> list[str]:
    """Let the collection have its aliases again; those that somebody else has taken meanwhile."""
    free = free_aliases(target.qdrant, target.collection, aliases)
    put_aliases(target.qdrant, target.collection, free)
    return sorted(set(aliases) - set(free))
