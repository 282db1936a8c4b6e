"""Which snapshot file on the server a killed run had asked for, and which ones are an operator's.

A server names a snapshot by the moment (UTC, to the second) at which it began to make it, and nothing else about the
file tells who asked; seen on 1.11.3 and 1.18.3. A run notes in its journal which files were there, and what time it
was at the server, right before it asks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from lib.journal import Journal

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
