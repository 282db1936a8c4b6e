"""Cut over: verify the method, ask the guard again, delete the live collection, put the new one under its name."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib.backup.catalog import CACHE_DIR
from lib.backup.manifest import Manifest
from lib.backup.phases import (
    CREATED,
    DELETED,
    DELETING,
    PAYLOADS_SAVED,
    RESTORING_STAGED,
    SETTINGS_RECOVERED,
    SNAPSHOT_MADE,
    STAGED_RESTORED,
)
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.collection import (
    create_default,
    create_like,
    delete_collection,
    exists,
    get_state,
    is_failed,
    refuse_foreign,
)
from lib.clients.qdrant.restoring import (
    can_fetch_itself,
    delete_with_snapshots,
    recover,
    unique_filename,
    upload_and_restore,
)
from lib.clients.qdrant.transport import is_disk_full
from lib.concurrency import steps_of
from lib.errors import AccessRefused, MigrationError, StoreUnreachable
from lib.files import free_bytes, private_dir
from lib.journal import Journal
from lib.reembed.assess import (
    ABSENT,
    ADOPT,
    FAILED,
    REPLACE,
    Assessment,
    Live,
    find_live,
    require_protection,
    settings_of,
)
from lib.reembed.context import Context
from lib.reembed.guard import undo_of
from lib.reembed.staging import (
    drop_staged,
    require_same_settings,
    settings_and_aliases,
    staged_dropped_if_full,
    stamp,
    verified_staged,
    with_room,
)
from lib.reembed.sync import save_payloads

FETCH, SEND, FILL = "fetched by the server from itself", "sent", "filled from the embedding cache"
_TIMEOUT_SECONDS = 60.0  # the time limit of a restore: this, and three times the time that the snapshot took
_SPARE_BYTES = 64 << 20
_RESTORES = 2  # restores of the staged collection, before the new one is filled from the embedding cache


@dataclass(frozen=True)
class CutoverMethod:
    """How the new collection gets the live name.

    `restore` restores the staged snapshot, and returns whether the server answered; None: fill an empty one.
    """

    kind: str
    restore: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Cutover:
    """The method that was used, "" if none was needed in this process; both times are monotonic, or None.

    `absent_since`: when the live collection became unavailable. `complete_at`: when the staged one was in its place.
    `sample_suffices`: it is a copy of the staged one, whose vectors were compared, and no service of the old size can
    write a vector into it.
    """

    method: str
    absent_since: float | None
    complete_at: float | None = None
    sample_suffices: bool = False

    def absent_seconds(self, filled_at: float) -> float:
        """Return how long the collection was absent or incomplete; without `complete_at` until `filled_at`."""
        return 0.0 if self.absent_since is None else (self.complete_at or filled_at) - self.absent_since


def cut_over(
    ctx: Context,
    journal: Journal,
    assessment: Assessment,
    manifest: Manifest | None,
    announce: Callable[[str], None],
) -> Cutover:
    """Put the new collection under the live name: the complete staged one, or an empty one to be filled.

    `manifest` is the backup of the plan; the guard is asked again before each delete. `announce` gets the commands
    that undo the delete, right before it. Raises GuardRefused if no verified backup protects the collection.
    """
    absent_since: float | None = None
    method: CutoverMethod | None = None
    failures = 0
    deleted_sizes: set[int] = set()
    while True:
        live = find_live(ctx, journal)
        if live.kind == ADOPT:
            return Cutover("", absent_since)
        if live.kind != REPLACE and absent_since is None:
            absent_since = time.monotonic()
        method = method or _choose_method(ctx, journal, assessment, live.kind)
        if live.kind == REPLACE and method.restore:
            require_same_settings(ctx, journal)
        if live.kind != ABSENT:
            deleted_at = _delete_live(ctx, journal, live, announce)
            absent_since = deleted_at if absent_since is None else absent_since
            deleted_sizes.add(live.state.size if live.state else ctx.spec.size)
        _journal_old_settings(journal, manifest)
        if method.restore is None or failures == _RESTORES or verified_staged(ctx, journal) is None:
            with_room(ctx, journal, partial(_create_empty, ctx, journal))
            return Cutover(FILL, absent_since)
        answered = _restore_staged(ctx, journal, method.kind, method.restore)
        if answered is not None:
            # If an earlier start deleted the old collection, a service with the new size may run already.
            other_size = bool(deleted_sizes) and ctx.spec.size not in deleted_sizes
            return Cutover(method.kind, absent_since, time.monotonic(), sample_suffices=answered and other_size)
        failures += 1


def _choose_method(ctx: Context, journal: Journal, assessment: Assessment, kind: str) -> CutoverMethod:
    """Choose how to cut over, before the live collection is deleted if it still exists."""
    if assessment.in_place or verified_staged(ctx, journal) is None:
        return CutoverMethod(FILL)
    before_delete = kind == REPLACE
    with staged_dropped_if_full(ctx, journal, assessment.room) if before_delete else nullcontext():
        return verify_method(ctx, journal)


def verify_method(ctx: Context, journal: Journal) -> CutoverMethod:
    """Make a snapshot of the staged collection, and return the first method that works for it.

    The server fetches it from itself; else it is sent from here; else, if this machine has no room for it, the new
    collection is filled from the cache.
    """
    began = time.monotonic()
    snapshot = _snapshot(ctx, journal)
    location = can_fetch_itself(ctx.qdrant, ctx.staged, snapshot, f"{ctx.staged}_probe")
    file = None if location else _download(ctx, snapshot)
    limit = _TIMEOUT_SECONDS + 3 * (time.monotonic() - began)
    checksum = snapshot.checksum
    assert checksum is not None
    if location:
        fetch = partial(recover, ctx.qdrant, ctx.collection, location, checksum)
        return CutoverMethod(FETCH, partial(fetch, seconds=limit, answer_seconds=limit))
    return CutoverMethod(SEND, partial(_send, ctx, file, checksum, limit)) if file else CutoverMethod(FILL)


def _snapshot(ctx: Context, journal: Journal) -> snapshots.Snapshot:
    """Return the staged collection's snapshot: the journaled one if nothing was written since, else a new one."""
    for one in snapshots.list_snapshots(ctx.qdrant, ctx.staged):
        if one.name == journal.fact("snapshot"):
            return snapshots.with_checksum(ctx.qdrant, ctx.staged, one)
        snapshots.delete(ctx.qdrant, ctx.staged, one.name)
    with ctx.bar("snapshot", None, ""):
        made = snapshots.create(ctx.qdrant, ctx.staged)
    journal.append(SNAPSHOT_MADE, snapshot=made.name)
    return snapshots.with_checksum(ctx.qdrant, ctx.staged, made)


def snapshot_file(folder: Path, staged: str) -> Path:
    """Return where in the backup folder a staged collection's snapshot is while it is sent."""
    return folder / CACHE_DIR / f"{staged}.snapshot.partial"


def _download(ctx: Context, snapshot: snapshots.Snapshot) -> Path | None:
    """Download the snapshot and verify its checksum. Returns None if there is no room for it."""
    path = snapshot_file(ctx.folder, ctx.staged)
    if free_bytes(private_dir(path.parent)) < snapshot.size + _SPARE_BYTES:
        return None
    with path.open("wb") as stream, ctx.bar("download the snapshot", snapshot.size, "bytes") as progress:
        path.chmod(0o600)
        snapshots.download(ctx.qdrant, ctx.staged, snapshot, stream.write, progress)
    return path


def _delete_live(ctx: Context, journal: Journal, live: Live, announce: Callable[[str], None]) -> float:
    """Ask the guard, save settings and payloads, delete the collection. Returns the monotonic time of the delete.

    Payloads are read by the last request before the delete.
    """
    manifest = require_protection(ctx, journal, live)
    if manifest and manifest.name != journal.fact("manifest"):
        journal.append("backup accepted by the guard", manifest=manifest.name)
    undo = undo_of(manifest, named=bool(ctx.reason)) if manifest or not journal.undo else journal.undo
    announce(undo)
    if live.kind == FAILED:  # nothing in it can be read
        journal.append(DELETING, undo=undo)
        delete_with_snapshots(ctx.qdrant, ctx.collection)
        return time.monotonic()
    state = get_state(ctx.qdrant, ctx.collection)
    refuse_foreign(state.raw)  # a sparse vector may have been added since the plan
    settings, aliases = settings_and_aliases(ctx, journal, state)
    count = save_payloads(ctx, journal, state.points)
    journal.append(PAYLOADS_SAVED, kept=count, settings=settings, aliases=aliases)
    journal.append(DELETING, undo=undo)
    deleted_at = time.monotonic()
    delete_collection(ctx.qdrant, ctx.collection)
    journal.append(DELETED)
    return deleted_at


def _journal_old_settings(journal: Journal, manifest: Manifest | None) -> None:
    """Note the old collection's settings in the journal if it was gone before this run read them."""
    if journal.fact("settings"):
        return
    if journal.fact("staged_like"):
        journal.append(SETTINGS_RECOVERED, settings=journal.fact("staged_like"))
    elif manifest:
        journal.append(SETTINGS_RECOVERED, **settings_of(manifest))


def _create_empty(ctx: Context, journal: Journal) -> None:
    """Create the collection at the new size with the old settings, or with AutoMem's if there are none."""
    if not exists(ctx.qdrant, ctx.collection):
        if settings := journal.fact("settings"):
            create_like(ctx.qdrant, ctx.collection, settings, ctx.spec.size, metadata=stamp(ctx.spec))
        else:
            create_default(ctx.qdrant, ctx.collection, ctx.spec.size, stamp(ctx.spec))
    journal.append(CREATED)


def _restore_staged(ctx: Context, journal: Journal, kind: str, restore: Callable[[], bool]) -> bool | None:
    """Restore the staged collection's snapshot under the live name, which is free. Returns None if that failed.

    Otherwise returns whether the server answered; if no answer comes, its restore is waited for. A failed collection
    that a restore leaves is deleted. If the disk is full, the staged collection is dropped.
    """
    journal.append(RESTORING_STAGED, way=kind)
    try:
        answered = restore()
    except (AccessRefused, StoreUnreachable):
        raise
    except MigrationError as error:
        if is_failed(ctx.qdrant, ctx.collection):
            delete_with_snapshots(ctx.qdrant, ctx.collection)
        if is_disk_full(error):
            drop_staged(ctx, journal)
        return None
    journal.append(STAGED_RESTORED)
    return answered


def _send(ctx: Context, file: Path, checksum: str, seconds: float) -> bool:
    """Upload the snapshot and have it restored under the live name; delete the copy that the server keeps of it.

    Returns whether the server answered.
    """
    filename, size = unique_filename(ctx.staged), file.stat().st_size
    with ctx.bar("send", size, "bytes") as progress:
        answered = upload_and_restore(
            ctx.qdrant,
            ctx.collection,
            file,
            size=size,
            filename=filename,
            checksum=checksum,
            progress=steps_of(progress),
            seconds=seconds,
            answer_seconds=seconds,
        )
    snapshots.delete(ctx.qdrant, ctx.collection, filename)
    return answered
