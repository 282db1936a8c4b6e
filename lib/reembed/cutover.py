"""Cut over: verify the method, ask the guard again, delete the live collection, put the new one under its name."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lib.backup import phases
from lib.backup.manifest import Manifest
from lib.clients.qdrant import collection as collections
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.transport import is_disk_full
from lib.errors import AccessRefused, MigrationError
from lib.files import free_bytes, private_dir, private_file
from lib.journal import Journal
from lib.reembed import assess, staging
from lib.reembed.assess import Assessment
from lib.reembed.context import Context
from lib.reembed.sync import save_payloads

FETCH, SEND, FILL = "fetched by the server from itself", phases.SENT, "filled from the embedding cache"
_TIMEOUT_SECONDS = 60.0  # the time limit of a restore: this, and three times the time that the snapshot took
_SPARE_BYTES = 64 << 20
_RESTORES = 2  # restores of the staged collection, before the new one is filled from the embedding cache


class CutoverMethod(NamedTuple):
    """`restore` restores the staged snapshot, and returns whether the server answered; None: fill an empty one."""

    kind: str
    restore: Callable[[], bool] | None = None


class Cutover(NamedTuple):
    """The method that was used, "" if none was needed in this process; both times are monotonic, or None.

    `absent_since`: when the live collection became unavailable. `complete_at`: when the staged one was in its place.
    `sample_suffices`: it is a copy of the staged one, whose vectors were compared, and no service of the old size can
    write a vector into it.
    """

    method: str
    absent_since: float | None
    complete_at: float | None = None
    sample_suffices: bool = False


def cut_over(
    ctx: Context, journal: Journal, assessment: Assessment, manifest: Manifest | None, announce: Callable[[str], None]
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
        live = assess.find_live(ctx, journal)
        if live.kind == assess.ADOPT:
            return Cutover("", absent_since)
        if live.kind != assess.REPLACE and absent_since is None:
            absent_since = time.monotonic()
        method = method or _choose_method(ctx, journal, assessment, live.kind)
        if live.kind == assess.REPLACE and method.restore:
            staging.require_same_settings(ctx, journal)
        if live.kind != assess.ABSENT:
            deleted_at = _delete_live(ctx, journal, live, announce)
            absent_since = deleted_at if absent_since is None else absent_since
            deleted_sizes.add(live.state.size if live.state else ctx.spec.size)
        _journal_old_settings(journal, manifest)
        if method.restore is None or failures == _RESTORES or staging.verified_staged(ctx, journal) is None:
            staging.with_room(ctx, journal, partial(_create_empty, ctx, journal))
            return Cutover(FILL, absent_since)
        answered = _restore_staged(ctx, journal, method.kind, method.restore)
        if answered is not None:
            # If an earlier start deleted the old collection, a service with the new size may run already.
            other_size = bool(deleted_sizes) and ctx.spec.size not in deleted_sizes
            return Cutover(method.kind, absent_since, time.monotonic(), sample_suffices=answered and other_size)
        failures += 1


def _choose_method(ctx: Context, journal: Journal, assessment: Assessment, kind: str) -> CutoverMethod:
    """Choose how to cut over, before the live collection is deleted if it still exists."""
    if assessment.in_place or staging.verified_staged(ctx, journal) is None:
        return CutoverMethod(FILL)
    with staging.staged_dropped_if_full(ctx, journal, assessment.room) if kind == assess.REPLACE else nullcontext():
        return verify_method(ctx, journal)


def verify_method(ctx: Context, journal: Journal) -> CutoverMethod:
    """Make a snapshot of the staged collection, and return the first method that works for it.

    The server fetches it from itself; else it is sent from here; else, if this machine has no room for it, the new
    collection is filled from the cache.
    """
    began = time.monotonic()
    snapshot = _snapshot(ctx, journal)
    checksum = snapshot.checksum
    assert checksum is not None
    if location := snapshots.can_fetch_itself(ctx.qdrant, ctx.staged, snapshot, f"{ctx.staged}_probe"):
        limit = _TIMEOUT_SECONDS + 3 * (time.monotonic() - began)
        fetch = partial(snapshots.recover, ctx.qdrant, ctx.collection, location, checksum)
        return CutoverMethod(FETCH, partial(fetch, seconds=limit, answer_seconds=limit))
    path = phases.snapshot_file(ctx.folder, ctx.staged)
    if free_bytes(private_dir(path.parent)) < snapshot.size + _SPARE_BYTES:
        return CutoverMethod(FILL)
    private_file(path)
    with path.open("wb") as stream, ctx.bar("download the snapshot", snapshot.size, "bytes") as progress:
        snapshots.download(ctx.qdrant, ctx.staged, snapshot, stream.write, progress)  # which verifies the checksum
    limit = _TIMEOUT_SECONDS + 3 * (time.monotonic() - began)
    return CutoverMethod(SEND, partial(_send, ctx, journal, path, checksum, limit))


def _snapshot(ctx: Context, journal: Journal) -> snapshots.Snapshot:
    """Return the staged collection's snapshot: the journaled one if nothing was written since, else a new one."""
    for one in snapshots.list_snapshots(ctx.qdrant, ctx.staged):
        if one.name == journal.fact("snapshot"):
            return snapshots.with_checksum(ctx.qdrant, ctx.staged, one)
        snapshots.delete(ctx.qdrant, ctx.staged, one.name)
    with ctx.bar("snapshot", None, ""):
        made = snapshots.create(ctx.qdrant, ctx.staged)
    journal.append(phases.SNAPSHOT_MADE, snapshot=made.name)
    return snapshots.with_checksum(ctx.qdrant, ctx.staged, made)


def _delete_live(ctx: Context, journal: Journal, live: assess.Live, announce: Callable[[str], None]) -> float:
    """Ask the guard, save settings, then payloads, delete. Returns the monotonic time of the delete."""
    manifest = assess.require_protection(ctx, journal, live)
    if manifest and manifest.name != journal.fact("manifest"):
        journal.append("backup accepted by the guard", manifest=manifest.name)
    undo = assess.undo_of(manifest, named=bool(ctx.reason)) if manifest or not journal.undo else journal.undo
    announce(undo)
    if live.kind == assess.FAILED:  # nothing in it can be read
        journal.append(phases.DELETING, undo=undo)
        snapshots.delete_with_snapshots(ctx.qdrant, ctx.collection)
        return time.monotonic()
    state = collections.get_state(ctx.qdrant, ctx.collection)
    collections.refuse_foreign(state.raw)  # a sparse vector may have been added since the plan
    settings, aliases = staging.settings_and_aliases(ctx, journal, state)
    count = save_payloads(ctx, journal, state.points)
    journal.append(phases.PAYLOADS_SAVED, kept=count, settings=settings, aliases=aliases)
    journal.append(phases.DELETING, undo=undo)
    deleted_at = time.monotonic()
    collections.delete_collection(ctx.qdrant, ctx.collection)
    journal.append(phases.DELETED)
    return deleted_at


def _journal_old_settings(journal: Journal, manifest: Manifest | None) -> None:
    """Note the old collection's settings in the journal if it was gone before this run read them."""
    if journal.fact("settings"):
        return
    if journal.fact("staged_like"):
        journal.append(phases.SETTINGS_RECOVERED, settings=journal.fact("staged_like"))
    elif manifest:
        journal.append(phases.SETTINGS_RECOVERED, **assess.settings_of(manifest))


def _create_empty(ctx: Context, journal: Journal) -> None:
    """Create the collection at the new size with the old settings, or with AutoMem's if there are none."""
    qdrant, name, size, stamp = ctx.qdrant, ctx.collection, ctx.spec.size, staging.stamp(ctx.spec)
    if not collections.exists(qdrant, name):
        settings = journal.fact("settings") or collections.AUTOMEM_INFO
        collections.create_like(qdrant, name, settings, size, metadata=stamp)
    journal.append(phases.CREATED)


def _restore_staged(ctx: Context, journal: Journal, kind: str, restore: Callable[[], bool]) -> bool | None:
    """Restore the staged collection's snapshot under the live name, which is free. Returns None if that failed.

    Otherwise returns whether the server answered; if no answer comes, its restore is waited for. A failed collection
    that a restore leaves is deleted. If the disk is full, the staged collection is dropped.
    """
    journal.append(phases.RESTORING_STAGED, way=kind)
    try:
        answered = restore()
    except AccessRefused:
        raise
    except MigrationError as error:
        # A server that does not answer ends the run here. An upload that broke off is tried again.
        if collections.health(ctx.qdrant, ctx.collection) == "failed":
            snapshots.delete_with_snapshots(ctx.qdrant, ctx.collection)
        if is_disk_full(error):
            staging.drop_staged(ctx, journal)
        return None
    journal.append(phases.STAGED_RESTORED)
    return answered


def _send(ctx: Context, journal: Journal, file: Path, checksum: str, seconds: float) -> bool:
    """Upload the snapshot and have it restored. Returns whether the server answered. It keeps its copy."""
    size = file.stat().st_size
    with ctx.bar("send", size, "bytes") as progress:
        return snapshots.upload_and_restore(
            ctx.qdrant,
            ctx.collection,
            file,
            size=size,
            filename=phases.sent_name(journal),
            checksum=checksum,
            progress=progress,
            seconds=seconds,
            answer_seconds=seconds,
        )
