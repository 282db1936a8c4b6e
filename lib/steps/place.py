"""The staged collection put under the live one's name: the way is proved before the delete, and taken after it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lib.backup_set.sets import SPOOL_DIR
from lib.errors import AccessRefused, MigrationError, StoreUnreachable
from lib.files import free_bytes, private_dir
from lib.steps.migration import Migration, journal_of
from lib.steps.phases import PLACED, PLACING, SNAPPED
from lib.steps.progress import steps_of
from lib.steps.restore_collection import drop_temporary
from lib.steps.stage import drop_staged
from lib.vectors import snapshots
from lib.vectors.collection import get_state, health
from lib.vectors.refusals import is_disk_full
from lib.vectors.restoring import can_fetch_itself, recover, unique_filename, upload_and_restore

FETCH, SEND, FILL = "fetched by the server from itself", "sent", "filled from the spool"
_PATIENCE_SECONDS = 60.0  # for an answer that does not come, on top of three times the rehearsal
_ROOM = 64 << 20


@dataclass(frozen=True)
class Way:
    """How the staged collection comes under the live name, and how long that may take (seconds)."""

    kind: str
    snapshot: snapshots.Snapshot | None = None
    location: str = ""
    file: Path | None = None
    patience: float = _PATIENCE_SECONDS


def prove_way(run: Migration) -> Way:
    """Have the staged collection's snapshot made, and prove the shortest way that leads from it to the live name.

    Where the server cannot fetch from itself: the file sent from here, or the points from the spool, whichever the
    rates seen say is shorter.
    """
    qdrant = run.target.qdrant
    began = time.monotonic()
    snapshot = _snapshot(run)
    made = time.monotonic() - began
    location = can_fetch_itself(qdrant, run.staged, snapshot, f"{run.staged}_probe")
    if location:
        rehearsal = time.monotonic() - began - made
        return Way(FETCH, snapshot, location, patience=_PATIENCE_SECONDS + 3 * rehearsal)
    began = time.monotonic()
    file = _fetched(run, snapshot)
    fetched = time.monotonic() - began
    points = get_state(qdrant, run.staged).points
    rate = run.upsert_rate or journal_of(run).fact("upsert_rate")
    if file is None or (rate and points / rate < fetched + made):
        return Way(FILL)
    return Way(SEND, snapshot, file=file, patience=_PATIENCE_SECONDS + 3 * (fetched + made))


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
    return folder / SPOOL_DIR / f"{staged}.snapshot.partial"


def _fetched(run: Migration, snapshot: snapshots.Snapshot) -> Path | None:
    """The snapshot on this machine, whole by its checksum; None where there is no room for it."""
    folder = private_dir(run.folder / SPOOL_DIR)
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
    now gets room: the staged collection goes, the spool has all of it.
    """
    journal_of(run).append(PLACING, way=way.kind)
    try:
        _restore(run, way)
    except (AccessRefused, StoreUnreachable):
        raise
    except MigrationError as error:
        if health(run.target.qdrant, run.target.collection) == "dead":
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
