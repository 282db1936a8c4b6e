"""Snapshots that a backup has the server make: announced in the journal, deleted afterwards."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from typing import Any

from lib.clients.qdrant import snapshots
from lib.clients.qdrant.snapshots import server_time
from lib.clients.qdrant.transport import Qdrant, QdrantError
from lib.errors import AccessRefused, MigrationError
from lib.journal import Journal

NODE = "node"  # the fact that holds the address of the node an entry is about


class NodeJournal(Journal):
    """The entries of one run that are about one node. What is appended is also written to the run's own journal."""

    def __init__(self, whole: Journal, node: str) -> None:
        about = [entry for entry in whole.entries[1:] if entry.get(NODE) == node]
        super().__init__(whole.path, [*whole.entries[:1], *about])
        self.node = node
        self._whole = whole

    def append(self, phase: str, **facts: object) -> None:
        """Record a phase with facts; on disk when this returns."""
        self._whole.append(phase, **facts, **{NODE: self.node})
        self.entries.append(self._whole.entries[-1])


def by_node(journal: Journal) -> list[tuple[str | None, Journal]]:
    """Split the journal by the addresses of the nodes in it; if it names no node: itself, under None."""
    nodes = dict.fromkeys(str(entry[NODE]) for entry in journal.entries if NODE in entry)
    return [(node, NodeJournal(journal, node)) for node in nodes] or [(None, journal)]


ANNOUNCED, MADE, REMOVED = "snapshot announced", "snapshot made", "snapshot removed"
AWAITED = "snapshot awaited"  # all else of the run is cleaned up, but the server may still make its snapshot
_POLL_SECONDS = 0.5
_OTHER_SECOND_SECONDS = 5.0  # how long a second is waited for in which no snapshot was begun
_MAKING = timedelta(hours=1)  # a server that has not made a snapshot by then makes it no more
_MOMENT = re.compile(r"-(\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d)\.snapshot$")
_ROUNDING = timedelta(seconds=2)  # two clocks of whole seconds
_ON_THE_WAY = timedelta(seconds=60)  # from the announcement until the server begins


@contextmanager
def own_snapshot(qdrant: Qdrant, collection: str, journal: Journal) -> Iterator[snapshots.Snapshot]:
    """A snapshot for the block, announced in the journal before it is asked for, deleted afterwards."""
    known = [one.name for one in snapshots.list_snapshots(qdrant, collection)]
    now = _second_of_our_own(qdrant, known).isoformat()
    journal.append(ANNOUNCED, collection=collection, known_snapshots=known, server_time=now, snapshot=None)
    ours = None
    try:
        made = _make(qdrant, collection, journal)
        if made.name in known:
            journal.append(REMOVED)  # another client's, made in the same second: never deleted
        else:
            ours = made.name
            journal.append(MADE, snapshot=ours)
        yield made
    finally:
        remove_named(qdrant, journal, ours)


def _make(qdrant: Qdrant, collection: str, journal: Journal) -> snapshots.Snapshot:
    try:
        return snapshots.create(qdrant, collection)
    except (QdrantError, AccessRefused):
        journal.append(REMOVED)  # the server reported that it made none
        raise


def _second_of_our_own(qdrant: Qdrant, known: Sequence[str]) -> datetime:
    """The server's time, once no known snapshot was begun in this second: ours would replace it."""
    latest = max(filter(None, map(_begun, known)), default=None)
    give_up = time.monotonic() + _OTHER_SECOND_SECONDS  # the clocks of a proxy and of the server may differ
    while True:
        now = server_time(qdrant)
        if latest is None or now > latest or time.monotonic() >= give_up:
            return now
        qdrant.sleep(_POLL_SECONDS)


def _begun(name: str) -> datetime | None:
    """The second in which the server began to make the snapshot, or None if its name does not say."""
    found = _MOMENT.search(name)
    return datetime.strptime(f"{found[1]}+0000", "%Y-%m-%d-%H-%M-%S%z") if found else None


def removed(journal: Journal) -> bool:
    """Whether surely no snapshot of this run is left on the server, or on any node of its cluster."""
    for _, one in by_node(journal):
        phases = [entry["phase"] for entry in one.entries if entry["phase"] in {ANNOUNCED, REMOVED}]
        if phases and phases[-1] == ANNOUNCED:
            return False
    return True


def remove_named(qdrant: Qdrant, journal: Journal, name: str | None = None) -> None:
    """Delete the run's snapshot, by default the one that its journal names. `removed` reports whether it is deleted."""
    name = name or journal.fact("snapshot")
    if name and not removed(journal):
        with suppress(MigrationError):  # the backup itself is what counts; an open journal tries again
            snapshots.delete(qdrant, str(journal.fact("collection")), str(name))
            journal.append(REMOVED, snapshot=name)


def candidates(qdrant: Qdrant, journal: Journal) -> list[str]:
    """The snapshots that may be the one of a run which was killed before it knew its name.

    They did not exist at the announcement and were begun right after it. Another client may have made them, so none
    is ever deleted here.
    """
    entry = _announcement(journal)
    collection, asked = str(entry["collection"]), datetime.fromisoformat(entry["server_time"])
    listed = [one.name for one in snapshots.list_snapshots(qdrant, collection)]
    fresh = [name for name in listed if name not in entry["known_snapshots"]]
    begun = {name: _begun(name) for name in fresh if name.startswith(f"{collection}-")}
    return sorted(name for name, at in begun.items() if at and -_ROUNDING <= at - asked <= _ON_THE_WAY)


def is_over(journal: Journal) -> bool:
    """Whether the announcement is so old that the server makes its snapshot no more."""
    return datetime.now(timezone.utc) - datetime.fromisoformat(_announcement(journal)["at"]) > _MAKING


def _announcement(journal: Journal) -> dict[str, Any]:
    return next(entry for entry in reversed(journal.entries) if entry["phase"] == ANNOUNCED)
