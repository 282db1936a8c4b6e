"""Put a collection back from a snapshot: rehearsed under a temporary name, then in the live one's place.

A restore can destroy the collection that it restores onto, and a dead collection keeps a 1.11.3 server from
starting again: so never onto a live one, and a temporary one whose restore failed is deleted at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import IO, BinaryIO, cast

from lib.errors import BackupDamaged, MigrationError, StoreFailed
from lib.journal import Journal
from lib.steps.progress import Progress, steps_of
from lib.steps.restored_points import CollectionBackup, compare, require_same_points, sample_ids
from lib.vectors import snapshots
from lib.vectors.collection import delete_collection, exists, health, is_dead, list_collections
from lib.vectors.recreate import aliases_of, free_aliases, put_aliases
from lib.vectors.restoring import (
    can_fetch_itself,
    recover,
    upload_and_restore,
    wait_restored,
)
from lib.vectors.transport import Qdrant

REHEARSED, SWITCHING, SWITCHED = "collection rehearsed", "deleting the live collection", "collection restored"
PUT_BACK = "old collection put back"
_PATIENCE_SECONDS, _SLOW_BYTES_A_SECOND = 60.0, 4_000_000  # seen: 65 MB/s on 1.11.3, 250 MB/s on 1.18.3
_UNDER_WAY_SECONDS = 60.0  # for a restore that the server goes on with though its client was killed


def _upload(
    qdrant: Qdrant, name: str, backup: CollectionBackup, filename: str, progress: Progress | None
) -> None:
    size = backup.proof.archive.snapshot_size

    def send(stream: IO[bytes]) -> None:
        upload_and_restore(
            qdrant,
            name,
            cast("BinaryIO", stream),
            size=size,
            filename=filename,
            checksum=backup.sha256,
            progress=steps_of(progress) if progress else None,
            seconds=patience(size),
        )

    backup.send(send)


def patience(size: int) -> float:
    """Seconds to wait for the server to put a snapshot of `size` bytes in place when its answer does not come."""
    return _PATIENCE_SECONDS + size / _SLOW_BYTES_A_SECOND


def temporary_name(collection: str, backup: CollectionBackup) -> str:
    """The name of the rehearsal of this very snapshot."""
    return f"{collection}__try_{backup.sha256[:16]}"


def rehearse(
    backup: CollectionBackup, qdrant: Qdrant, collection: str, journal: Journal, progress: Progress | None
) -> str:
    """Restore under a temporary name and compare; returns that name. The caller deletes a failed one at once.

    The rehearsal that a killed run proved (its name holds the snapshot's checksum) is used again.
    """
    name = temporary_name(collection, backup)
    journal.append("rehearsing the collection", temporary_collection=name)
    if name not in list_collections(qdrant):
        _upload(qdrant, name, backup, f"{name}.snapshot", progress)
    compare(backup, qdrant, name)
    journal.append(REHEARSED)
    return name


def replace_live(
    backup: CollectionBackup,
    qdrant: Qdrant,
    collection: str,
    temporary: str,
    journal: Journal,
    progress: Progress | None,
    *,
    undo: str,
    aliases: Iterable[str] = (),
) -> None:
    """Delete the live collection and restore under its name from the copy that the server already holds.

    The way is proved before the delete: where the server cannot fetch from itself, the file is uploaded again.
    `aliases` are those that an earlier run took off with the collection. A failed restore is deleted at once.
    """
    held = snapshots.Snapshot(f"{temporary}.snapshot", backup.proof.archive.snapshot_size, backup.sha256, "")
    location = can_fetch_itself(qdrant, temporary, held, f"{temporary}_probe")
    standing = exists(qdrant, collection)
    wanted = {*aliases, *backup.facts["aliases"], *(aliases_of(qdrant, collection) if standing else ())}
    journal.append(SWITCHING, undo=undo, aliases=sorted(wanted))
    if standing:
        delete_collection(qdrant, collection)
    again = f"{temporary}-again.snapshot"
    try:
        if location:
            recover(qdrant, collection, location, backup.sha256, seconds=patience(held.size))
        else:
            _upload(qdrant, collection, backup, again, progress)
        for one in (again, old_filename(temporary)):  # also one that a killed run uploaded
            snapshots.delete(qdrant, collection, one)
    except MigrationError:
        drop_dead(qdrant, collection)
        raise
    require_equal(backup, qdrant, collection, temporary)
    put_aliases(qdrant, collection, free_aliases(qdrant, collection, wanted))
    journal.append(SWITCHED)


def require_equal(backup: CollectionBackup, qdrant: Qdrant, collection: str, temporary: str) -> None:
    """What was restored is what the rehearsal is; what differs is of no use and is deleted. Raises BackupDamaged."""
    try:
        compare(backup, qdrant, collection)
        require_same_points(qdrant, collection, temporary, sample_ids(backup))
    except BackupDamaged:
        with suppress(MigrationError):  # what went wrong first is what the operator must read
            delete_collection(qdrant, collection)
        raise


def put_back(
    saved: CollectionBackup, qdrant: Qdrant, collection: str, temporary: str, aliases: Iterable[str]
) -> None:
    """Put the collection that stood there back from its safety backup, where nothing stands there now."""
    filename = old_filename(temporary)
    try:
        _upload(qdrant, collection, saved, filename, None)
        snapshots.delete(qdrant, collection, filename)
        compare(saved, qdrant, collection)
    except MigrationError:
        drop_dead(qdrant, collection)
        raise
    put_aliases(qdrant, collection, free_aliases(qdrant, collection, aliases))


def old_filename(temporary: str) -> str:
    """Under which the old collection's snapshot is uploaded when it is put back."""
    return f"{temporary}-old.snapshot"


def drop_dead(qdrant: Qdrant, collection: str) -> None:
    """Left dead it would keep a 1.11.3 server from starting again."""
    with suppress(MigrationError):  # what went wrong first is what the operator must read
        if is_dead(qdrant, collection):
            delete_collection(qdrant, collection)


def drop_temporary(qdrant: Qdrant, name: str, nodes: Iterable[Qdrant] = ()) -> None:
    """Delete the uploaded files first (they cannot be reached afterwards), then the collection, dead or alive.

    `nodes` are those of a cluster, each of which may hold a file.
    """
    if name not in list_collections(qdrant):
        return
    for node in (qdrant, *nodes):
        # The collection matters more: left dead, it keeps a 1.11.3 server from starting again.
        with suppress(MigrationError):
            for one in snapshots.list_snapshots(node, name):
                snapshots.delete(node, name, one.name)
    delete_collection(qdrant, name)


def settle_collection(
    qdrant: Qdrant,
    collection: str,
    journal: Journal,
    backup: CollectionBackup | None,
    nodes: Iterable[Qdrant] = (),
) -> list[str]:
    """Clean up after a run that was killed. The rehearsal of `backup`, if it was proved, is left for this run."""
    if journal.has_reached(SWITCHING) and health(qdrant, collection) == "restoring":
        with suppress(StoreFailed):  # dead in the end: this run replaces it
            wait_restored(qdrant, collection, _UNDER_WAY_SECONDS)
    name = journal.fact("temporary_collection")
    if name is None or name not in list_collections(qdrant):
        return []
    if backup is not None and journal.has_reached(REHEARSED) and name == temporary_name(collection, backup):
        return [f"going on from {name}, which an earlier run proved"]
    drop_temporary(qdrant, name, nodes)
    return [f"removed the temporary collection {name}"]


def aliases_taken_off(journal: Journal) -> list[str]:
    """The aliases that a run, or one that it went on from, took off with the collection and did not put back."""
    return (
        []
        if journal.has_reached(SWITCHED) or journal.has_reached(PUT_BACK)
        else list(journal.fact("aliases") or [])
    )
