"""Cut over to the new collection: the method is proven, the live one deleted, the new one put under its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lib.backup.catalog import CACHE_DIR
from lib.backup.last_migration import PLACED, PLACING, RECOVERED, SNAPPED, STAGED
from lib.backup.manifest import Manifest
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.collection import CollectionState, get_state, health, is_failed
from lib.clients.qdrant.restoring import (
    can_fetch_itself,
    drop_temporary,
    recover,
    unique_filename,
    upload_and_restore,
)
from lib.clients.qdrant.transport import is_disk_full
from lib.concurrency import steps_of
from lib.errors import AccessRefused, MigrationError, StoreFailed, StoreUnreachable
from lib.files import free_bytes, private_dir
from lib.reembed.assess import ABSENT, ADOPT, DEAD, REPLACE, protection, settings_of, situation
from lib.reembed.migration import Migration, journal_of
from lib.reembed.recreate import drop_live, make_collection
from lib.reembed.staging import drop_staged, require_same_settings, room_kept, with_room

FETCH, SEND, FILL = "fetched by the server from itself", "sent", "filled from the spool"
_TIMEOUT_SECONDS = 60.0  # for an answer that does not come, on top of three times the rehearsal
_ROOM = 64 << 20


@dataclass(frozen=True)
class Way:
    """How the staged collection comes under the live name, and how long that may take (seconds)."""

    kind: str
    snapshot: snapshots.Snapshot | None = None
    location: str = ""
    file: Path | None = None
    patience: float = _TIMEOUT_SECONDS


def prove_way(run: Migration) -> Way:
    """Have the staged collection's snapshot made, and prove the shortest way that leads from it to the live name.

    Where the server cannot fetch from itself: the file sent from here, or the points from the cache, whichever the
    rates seen say is shorter.
    """
    qdrant = run.target.qdrant
    began = time.monotonic()
    snapshot = _snapshot(run)
    made = time.monotonic() - began
    location = can_fetch_itself(qdrant, run.staged, snapshot, f"{run.staged}_probe")
    if location:
        rehearsal = time.monotonic() - began - made
        return Way(FETCH, snapshot, location, patience=_TIMEOUT_SECONDS + 3 * rehearsal)
    began = time.monotonic()
    file = _fetched(run, snapshot)
    fetched = time.monotonic() - began
    points = get_state(qdrant, run.staged).points
    rate = run.upsert_rate or journal_of(run).fact("upsert_rate")
    if file is None or (rate and points / rate < fetched + made):
        return Way(FILL)
    return Way(SEND, snapshot, file=file, patience=_TIMEOUT_SECONDS + 3 * (fetched + made))


def _snapshot(run: Migration) -> snapshots.Snapshot:
    """The snapshot of the staged collection as it is now: an earlier start's, where nothing was written since."""
    qdrant, journal = run.target.qdrant, journal_of(run)
    for one in snapshots.list_snapshots(qdrant, run.staged):
        if one.name == journal.fact("snapshot"):
            return snapshots.with_checksum(qdrant, run.staged, one)
        snapshots.delete(qdrant, run.staged, one.name)
    with run.bar("snapshot", None, ""):
        made = snapshots.create(qdrant, run.staged)
    journal.append(SNAPPED, snapshot=made.name)
    return snapshots.with_checksum(qdrant, run.staged, made)


def file_of(run: Migration) -> Path:
    """Where the snapshot is kept while it has to be sent from here."""
    return snapshot_file(run.folder, run.staged)


def snapshot_file(folder: Path, staged: str) -> Path:
    """The snapshot of a staged collection, below the backup folder."""
    return folder / CACHE_DIR / f"{staged}.snapshot.partial"


def _fetched(run: Migration, snapshot: snapshots.Snapshot) -> Path | None:
    """The snapshot on this machine, whole by its checksum; None where there is no room for it."""
    folder = private_dir(run.folder / CACHE_DIR)
    if free_bytes(folder) < snapshot.size + _ROOM:
        return None
    path = file_of(run)
    with path.open("wb") as stream, run.bar("fetch the snapshot", snapshot.size, "bytes") as progress:
        path.chmod(0o600)
        snapshots.download(run.target.qdrant, run.staged, snapshot, stream.write, steps_of(progress))
    return path


def put_in_place(run: Migration, way: Way) -> bool:
    """Take the way, onto a name that nobody has; whether the server says that the collection stands.

    An answer that does not come is waited for: the server goes on. What stands there when this returns False, or was
    made by somebody else meanwhile, is the caller's to look at; something dead is deleted here. A disk that is full
    now gets room: the staged collection goes, the embedding cache has all of it.
    """
    journal_of(run).append(PLACING, way=way.kind)
    try:
        _restore(run, way)
    except (AccessRefused, StoreUnreachable):
        raise
    except MigrationError as error:
        if is_failed(run.target.qdrant, run.target.collection):
            drop_temporary(run.target.qdrant, run.target.collection)
        if is_disk_full(error):
            drop_staged(run)
        return False
    journal_of(run).append(PLACED)
    return True


def _restore(run: Migration, way: Way) -> None:
    assert way.snapshot is not None
    assert way.snapshot.checksum is not None
    qdrant, name, checksum = run.target.qdrant, run.target.collection, way.snapshot.checksum
    if way.kind == FETCH:
        recover(qdrant, name, way.location, checksum, seconds=way.patience, answer_seconds=way.patience)
        return
    assert way.file is not None
    sent = unique_filename(run.staged)
    size = way.file.stat().st_size
    with run.bar("send", size, "bytes") as progress:
        upload_and_restore(
            qdrant,
            name,
            way.file,
            size=size,
            filename=sent,
            checksum=checksum,
            progress=steps_of(progress),
            seconds=way.patience,
            answer_seconds=way.patience,
        )
    snapshots.delete(qdrant, name, sent)


_TURNS = 6  # looks at what stands there; somebody may make it anew again and again
_TRIES = 2  # restores of the staged collection, before it is filled from the embedding cache


@dataclass(frozen=True)
class Callbacks:
    """How the operator is told: the way back from a backup, what is said right before a delete, the report's files."""

    undo_of: Callable[[Manifest | None], str]
    announce: Callable[[str], None]
    report: Callable[[Mapping[str, Any]], list[Path]]


def standing_staged(run: Migration) -> str | None:
    """The staged collection's name, where it stands, is this run's own, and was proved."""
    if not (run.has_staged and run.reached(STAGED) and journal_of(run).fact("proved")):
        return None
    return run.staged if health(run.target.qdrant, run.staged) == "live" else None


def exchange(run: Migration, first: Manifest | None, callbacks: Callbacks) -> float | None:
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
        gone = time.monotonic() if kind == ABSENT else _clear(run, (kind, state), callbacks)
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


def _clear(run: Migration, found: tuple[str, CollectionState | None], callbacks: Callbacks) -> float:
    """Delete what stands there, guarded; when (monotonic seconds)."""
    journal = journal_of(run)
    manifest = protection(run, *found)
    if manifest and manifest.name != journal.fact("manifest"):
        journal.append("backup accepted by the guard", manifest=manifest.name)
    if manifest or not journal.undo:
        run.undo = callbacks.undo_of(manifest)
    callbacks.announce(run.undo)
    if found[0] == DEAD:
        drop_temporary(run.target.qdrant, run.target.collection)
        return time.monotonic()
    return drop_live(run.target, run.cache, journal, run.bar, undo=run.undo)


def _know_settings(run: Migration, first: Manifest | None) -> None:
    """The old collection's settings into the journal, where it was gone before this run read them."""
    journal = journal_of(run)
    if journal.fact("settings"):
        return
    if journal.fact("staged_like"):
        journal.append(RECOVERED, settings=journal.fact("staged_like"))
    elif first:
        journal.append(RECOVERED, **settings_of(first))
