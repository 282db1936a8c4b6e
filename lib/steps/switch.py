"""The direct way to a new collection: keep what only the points hold, delete, create, fill from the spool.

Every call here is announced in the journal first, so that a run killed at any point goes on where it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from lib.dimensions import EmbeddingSpec
from lib.embedding.spool import Spool
from lib.journal import Journal
from lib.steps.keep import keep_payloads
from lib.steps.progress import ProgressBar
from lib.steps.sync import SyncOutcome, sync_collection
from lib.steps.take_collection import STAMP_KEY
from lib.vectors.collection import delete_collection, exists, get_state, wait_green
from lib.vectors.recreate import aliases_of, create_default, create_like, free_aliases, put_aliases
from lib.vectors.transport import Qdrant

INDEX_SECONDS = 3600.0
KEPT, CREATED = "payloads kept", "collection created"
RECOVERED = "settings taken from the backup"
DELETING, DELETED = "deleting the live collection", "live collection deleted"


@dataclass(frozen=True)
class Target:
    """The collection that is made anew, and what its vectors are."""

    qdrant: Qdrant
    collection: str
    spec: EmbeddingSpec


def stamp(spec: EmbeddingSpec) -> dict[str, Any]:
    """What is written into the collection's metadata, where the server supports it (1.16 and later)."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {STAMP_KEY: {"model": spec.model, "size": spec.size, "at": now}}


def drop_live(target: Target, spool: Spool, journal: Journal, bar: ProgressBar, *, undo: str) -> float:
    """Keep the payloads, journal the settings, delete the live collection. The guard has spoken before this.

    Returns the moment (monotonic seconds) from which the collection is absent.

    Where the journal says that the old collection is gone already, what stands there was made anew meanwhile: its
    payloads are kept beside the old ones, the old settings stay.
    """
    again = journal.has_reached(DELETING)
    state = get_state(target.qdrant, target.collection)
    with bar("keep payloads", state.points, "points") as progress:
        count = keep_payloads(target.qdrant, target.collection, spool, add=again, progress=progress)
    if again:
        journal.append(KEPT, kept_again=count)
    else:
        aliases = aliases_of(target.qdrant, target.collection)
        journal.append(KEPT, kept=count, settings=state.raw, aliases=aliases)
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
    """What filling did, which aliases somebody else has taken meanwhile, and whether the index was seen whole."""

    outcome: SyncOutcome
    aliases_taken: list[str]
    indexed: bool


def fill(
    target: Target, spool: Spool, total: int, bar: ProgressBar, aliases: list[str], *, whole: bool
) -> Filled:
    """Put every planned point in, then the aliases, then wait for the index; rejected rows are in the outcome.

    `whole`: the old points are gone, so every key of theirs comes back (see `standing_payload`).
    """
    with bar("upsert", total, "points") as progress:
        outcome = sync_collection(target.qdrant, target.collection, spool, whole=whole, progress=progress)
    free = free_aliases(target.qdrant, target.collection, aliases)
    put_aliases(target.qdrant, target.collection, free)
    state = get_state(target.qdrant, target.collection)
    if outcome.wrote or not state.settled:
        with bar("wait for the index", None, ""):
            state = wait_green(target.qdrant, target.collection, INDEX_SECONDS)
    return Filled(outcome, sorted(set(aliases) - set(free)), state.settled)
