"""Snapshots that a backup has the server make: deleted afterwards, whatever happens to the run."""

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

NODE = "node"  # the fact that tells the address of the node an entry is about


class NodeJournal(Journal):
    """The entries of one run that are about one node; what is appended is in the run's own journal, too."""

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
    """The journal by the addresses of the nodes that it tells of; itself, under None, where it tells of none."""
    if isinstance(journal, NodeJournal):
        return [(journal.node, journal)]
    nodes = dict.fromkeys(str(entry[NODE]) for entry in journal.entries if NODE in entry)
    return [(node, NodeJournal(journal, node)) for node in nodes] or [(None, journal)]


_MOMENT = re.compile(r"-(\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d)\.snapshot$")
_ROUNDING = timedelta(seconds=2)  # two clocks of whole seconds
_ON_THE_WAY = timedelta(seconds=60)  # from the announcement until the server begins


def age(journal: Journal) -> timedelta:
    """Since the run announced its snapshot."""
    return datetime.now(timezone.utc) - datetime.fromisoformat(announcement(journal)["at"])


def announcement(journal: Journal) -> dict[str, Any]:
    """The entry that the run wrote right before it asked for its snapshot."""
    return next(entry for entry in reversed(journal.entries) if "known_snapshots" in entry)


def owned_by(listed: Sequence[str], journal: Journal, pending: Sequence[Journal] = ()) -> str | None:
    """The name among `listed` that is surely this run's, or None.

    It appeared since the announcement and was begun right after it. Where several were, each must have a run in
    `pending` that asked for it then: otherwise one of them is somebody else's, and none is taken.
    """
    mine = _candidates(listed, journal)
    return mine[0] if mine and not unsure_of(listed, journal, pending) else None


def unsure_of(listed: Sequence[str], journal: Journal, pending: Sequence[Journal] = ()) -> list[str]:
    """More names than runs that asked for one at that time; else nothing. Once unsure, always unsure."""
    told: list[str] = journal.fact("unsure") or []
    if told:
        return told
    names, asked = set(_candidates(listed, journal)), 1
    for other in pending:
        theirs = set(_candidates(listed, other))
        if other.path != journal.path and theirs & names:
            names, asked = names | theirs, asked + 1
    return sorted(names) if len(names) > asked else []


def _candidates(listed: Sequence[str], journal: Journal) -> list[str]:
    """Names of the collection that were not there at the announcement and were begun right after it, oldest first."""
    entry = announcement(journal)
    asked = datetime.fromisoformat(entry["server_time"])
    fresh = (name for name in listed if name not in entry["known_snapshots"])
    mine = (name for name in fresh if name.startswith(f"{entry['collection']}-"))
    return sorted(name for name in mine if _begun_after(name, asked))


def begun(name: str) -> datetime | None:
    """The second in which the server began to make the snapshot; None where its name does not tell."""
    told = _MOMENT.search(name)
    return datetime.strptime(told[1], "%Y-%m-%d-%H-%M-%S").replace(tzinfo=timezone.utc) if told else None


def _begun_after(name: str, asked: datetime) -> bool:
    moment = begun(name)
    return moment is not None and -_ROUNDING <= moment - asked <= _ON_THE_WAY


ANNOUNCED, MADE, REMOVED = "snapshot announced", "snapshot made", "snapshot removed"
AWAITED = "snapshot awaited"  # all else of the run is settled, but the server may not have come to its end
_POLL_SECONDS = 0.5
_APPEAR_SECONDS = 5.0  # how long a run waits for the file that the server is still making
_MAKING = timedelta(hours=1)  # what a server has not made by then, it makes no more


@contextmanager
def own_snapshot(qdrant: Qdrant, collection: str, journal: Journal) -> Iterator[snapshots.Snapshot]:
    """A snapshot for the block, announced in the journal before it is asked for, deleted afterwards."""
    known = [one.name for one in snapshots.list_snapshots(qdrant, collection)]
    now = _second_of_our_own(qdrant, known).isoformat()
    journal.append(ANNOUNCED, collection=collection, known_snapshots=known, server_time=now, snapshot=None)
    try:
        made = _make(qdrant, collection, journal)
        if made.name in known:
            journal.append(REMOVED)  # somebody's, made in the same second: never deleted
        else:
            journal.append(MADE, snapshot=made.name)
        yield made
    finally:
        remove_own(qdrant, journal, seconds=_APPEAR_SECONDS)


def _second_of_our_own(qdrant: Qdrant, known: Sequence[str]) -> datetime:
    """The server's time, once no snapshot that is there was begun in this second: a second one would replace it."""
    latest = max(filter(None, map(begun, known)), default=None)
    give_up = time.monotonic() + _APPEAR_SECONDS  # the clocks of a proxy and of the server may differ
    while True:
        now = server_time(qdrant)
        if latest is None or now > latest or time.monotonic() >= give_up:
            return now
        qdrant.sleep(_POLL_SECONDS)


def _make(qdrant: Qdrant, collection: str, journal: Journal) -> snapshots.Snapshot:
    try:
        return snapshots.create(qdrant, collection)
    except (QdrantError, AccessRefused):
        journal.append(REMOVED)  # the server said that it made none
        raise


def removed(journal: Journal) -> bool:
    """Whether surely nothing of this run is left on the server, or on any node of its cluster."""
    return all(_phase(one) != ANNOUNCED for _, one in by_node(journal))


def _phase(journal: Journal) -> str | None:
    """Whether the latest snapshot is announced or removed; None where none was asked for."""
    phases = [entry["phase"] for entry in journal.entries]
    return next((phase for phase in reversed(phases) if phase in {ANNOUNCED, REMOVED}), None)


def remove_own(
    qdrant: Qdrant, journal: Journal, pending: Sequence[Journal] = (), *, seconds: float = 0.0
) -> bool:
    """Delete the run's snapshot file, also after a kill; `removed` says what came of it, and so does the answer.

    A server goes on making a snapshot when its client is gone: where the name never reached the journal, the file
    is waited for, at most `seconds`. Which one it is, `owned_by` tells, seeing also the other runs that are
    `pending`: an operator's own snapshots stay.
    """
    deadline = time.monotonic() + seconds
    pending = [one for one in pending if not removed(one)]
    with suppress(MigrationError):  # the backup itself is what counts; an open journal tries again
        while not removed(journal):
            name = journal.fact("snapshot") or owned_by(_listed(qdrant, journal), journal, pending)
            if name:
                snapshots.delete(qdrant, str(journal.fact("collection")), str(name))
                journal.append(REMOVED, snapshot=name)
            elif time.monotonic() >= deadline:
                break
            else:
                qdrant.sleep(_POLL_SECONDS)
    return removed(journal)


def remove_late(qdrant: Qdrant, journal: Journal, pending: Sequence[Journal]) -> bool:
    """As `remove_own` at the end of the next run; whether the journal can be closed.

    What the server was asked for moments ago is waited for. What does not appear leaves the journal open, for the
    run after this one, until the server surely makes it no more.
    """
    waited = age(journal).total_seconds()
    if remove_own(qdrant, journal, pending, seconds=max(0.0, _APPEAR_SECONDS - waited)):
        return True
    with suppress(MigrationError):
        listed = _listed(qdrant, journal)
        unsure = unsure_of(listed, journal, [one for one in pending if not removed(one)])
        gone = any(name not in listed for name in unsure)  # the operator, who was told of them, has chosen
        if gone or age(journal) > _MAKING:
            return True
        if journal.phase != AWAITED:
            journal.append(AWAITED, unsure=unsure)
    return False


def _listed(qdrant: Qdrant, journal: Journal) -> list[str]:
    return [one.name for one in snapshots.list_snapshots(qdrant, str(journal.fact("collection")))]
