"""The snapshot file that a backup has the server make: gone from the server again, whatever happens to the run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone

from lib.errors import AccessRefused, MigrationError
from lib.journal import Journal
from lib.vectors import snapshots
from lib.vectors.refusals import QdrantError
from lib.vectors.transport import Qdrant

ANNOUNCED, MADE, REMOVED = "snapshot announced", "snapshot made", "snapshot removed"
# A server names a snapshot by the moment (UTC) at which it began to make it; seen on 1.11.3 and 1.18.3.
_MOMENT = re.compile(r"-(\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d)\.snapshot$")
_NEAR = timedelta(seconds=60)
_POLL_SECONDS = 0.5
_APPEAR_SECONDS = 5.0  # how long an interrupted run waits for the file that the server is still making


@contextmanager
def own_snapshot(qdrant: Qdrant, collection: str, journal: Journal) -> Iterator[snapshots.Snapshot]:
    """A snapshot for the block, announced in the journal before it is asked for, deleted afterwards."""
    known = [one.name for one in snapshots.list_snapshots(qdrant, collection)]
    journal.append(ANNOUNCED, collection=collection, known_snapshots=known)
    try:
        made = _make(qdrant, collection, journal)
        journal.append(MADE, snapshot=made.name)
        yield made
    finally:
        remove_own(qdrant, journal, _APPEAR_SECONDS)


def _make(qdrant: Qdrant, collection: str, journal: Journal) -> snapshots.Snapshot:
    try:
        return snapshots.create(qdrant, collection)
    except (QdrantError, AccessRefused):
        journal.append(REMOVED)  # the server said that it made none
        raise


def removed(journal: Journal) -> bool:
    """Whether surely nothing of this run is left on the server."""
    return not journal.has_reached(ANNOUNCED) or journal.has_reached(REMOVED)


def remove_own(qdrant: Qdrant, journal: Journal, seconds: float = 0.0) -> bool:
    """Delete the run's snapshot file, also after a kill; `removed` says what came of it, and so does the answer.

    A server goes on making a snapshot when its client is gone: where the name never reached the journal, the file
    is waited for, at most `seconds`. It is ours when it appeared since the announcement, alone, and by its name at
    that very time: an operator's own snapshots stay.
    """
    deadline = time.monotonic() + seconds
    with suppress(MigrationError):  # the backup itself is what counts; an open journal tries again
        while not removed(journal):
            name = journal.fact("snapshot") or _found(qdrant, journal)
            if name:
                snapshots.delete(qdrant, str(journal.fact("collection")), str(name))
                journal.append(REMOVED, snapshot=name)
            elif time.monotonic() >= deadline:
                break
            else:
                qdrant.sleep(_POLL_SECONDS)
    return removed(journal)


def _found(qdrant: Qdrant, journal: Journal) -> str | None:
    announced = next(entry["at"] for entry in reversed(journal.entries) if entry["phase"] == ANNOUNCED)
    collection, known = str(journal.fact("collection")), journal.fact("known_snapshots")
    names = [one.name for one in snapshots.list_snapshots(qdrant, collection)]
    fresh = [name for name in names if name not in known and name.startswith(f"{collection}-")]
    mine = [name for name in fresh if _made_near(name, datetime.fromisoformat(announced))]
    return mine[0] if len(mine) == 1 else None


def _made_near(name: str, moment: datetime) -> bool:
    told = _MOMENT.search(name)
    if told is None:
        return False
    made = datetime.strptime(told[1], "%Y-%m-%d-%H-%M-%S").replace(tzinfo=timezone.utc)
    return abs(made - moment) <= _NEAR
