"""The live collection deleted and the new one under its name, whatever stands there when a run comes to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib.backup_set.manifest import Manifest
from lib.errors import StoreFailed
from lib.steps.migration import Migration, journal_of
from lib.steps.phases import RECOVERED, STAGED
from lib.steps.place import FILL, Way, prove_way, put_in_place
from lib.steps.report import Report
from lib.steps.restore_collection import drop_temporary
from lib.steps.situation import ABSENT, ADOPT, DEAD, REPLACE, protection, settings_of, situation
from lib.steps.stage import require_same_settings, room_kept, with_room
from lib.steps.switch import drop_live, make_collection
from lib.vectors.collection import CollectionState, health

_TURNS = 6  # looks at what stands there; somebody may make it anew again and again
_TRIES = 2  # restores of the staged collection, before it is filled from the spool


@dataclass(frozen=True)
class Voice:
    """How the operator is told: the way back from a backup, what is said right before a delete, the report's files."""

    undo_of: Callable[[Manifest | None], str]
    announce: Callable[[str], None]
    report: Callable[[Report], list[Path]]


def standing_staged(run: Migration) -> str | None:
    """The staged collection's name, where it stands, is this run's own, and was proved."""
    if not (run.has_staged and run.reached(STAGED) and journal_of(run).fact("proved")):
        return None
    return run.staged if health(run.target.qdrant, run.staged) == "live" else None


def exchange(run: Migration, first: Manifest | None, voice: Voice) -> float | None:
    """Bring the new collection under its name; the moment (monotonic seconds) from which it was absent, or None.

    It is whole where it was put in place from the staged one, else empty. `run.absent_seconds` is set where it is
    whole. Raises GuardRefused before a delete without a proved backup.
    """
    began: float | None = None
    way: Way | None = None
    failed: list[Way] = []
    for _ in range(_TURNS):
        kind, state = situation(run)
        if kind == ADOPT:
            return began
        if kind != REPLACE and began is None:
            began = time.monotonic()
        if way is None:
            way = _way(run, kind)
        if kind == REPLACE and way.kind != FILL:
            require_same_settings(run)
        gone = time.monotonic() if kind == ABSENT else _clear(run, (kind, state), voice)
        began = gone if began is None else began
        _know_settings(run, first)
        if way.kind == FILL or len(failed) == _TRIES or standing_staged(run) is None:
            journal = journal_of(run)
            with_room(run, partial(make_collection, run.target, journal.fact("settings"), journal))
            run.way = FILL
            return began
        if put_in_place(run, way):
            run.way = way.kind
            run.absent_seconds = time.monotonic() - began
            return began
        failed.append(way)
    raise StoreFailed(
        f"'{run.target.collection}' is made anew by somebody else again and again",
        next_step="stop AutoMem (docker compose stop flask-api), then run the same command again",
    )


def _way(run: Migration, kind: str) -> Way:
    """The way from the staged collection, proved while the live one still stands, if it does."""
    if run.in_place or standing_staged(run) is None:
        return Way(FILL)
    if kind != REPLACE:
        return prove_way(run)
    with room_kept(run):
        return prove_way(run)


def _clear(run: Migration, found: tuple[str, CollectionState | None], voice: Voice) -> float:
    """Delete what stands there, guarded; when (monotonic seconds)."""
    journal = journal_of(run)
    manifest = protection(run, *found)
    if manifest and manifest.name != journal.fact("manifest"):
        journal.append("backup accepted by the guard", manifest=manifest.name)
    if manifest or not journal.undo:
        run.undo = voice.undo_of(manifest)
    voice.announce(run.undo)
    if found[0] == DEAD:
        drop_temporary(run.target.qdrant, run.target.collection)
        return time.monotonic()
    return drop_live(run.target, run.spool, journal, run.bar, undo=run.undo)


def _know_settings(run: Migration, first: Manifest | None) -> None:
    """The old collection's settings into the journal, where it was gone before this run read them."""
    journal = journal_of(run)
    if journal.fact("settings"):
        return
    if journal.fact("staged_like"):
        journal.append(RECOVERED, settings=journal.fact("staged_like"))
    elif first:
        journal.append(RECOVERED, **settings_of(first))
