"""Put a collection back from a backup's snapshots: rehearsed under a temporary name, then in the live one's place.

A restore can destroy the collection that it restores onto, and a dead collection keeps a 1.11.3 server from
starting again: so never onto a live one, and a temporary one whose restore failed is deleted at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from lib.backup.snapshot_restore import CollectionBackup, Placement, Sample, compare, require_equal, sample
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.collection import (
    aliases_of,
    delete_collection,
    exists,
    free_aliases,
    health,
    is_failed,
    list_collections,
    put_aliases,
    put_fan_out,
)
from lib.clients.qdrant.restoring import wait_restored
from lib.clients.qdrant.transport import Qdrant, QdrantError
from lib.concurrency import Progress
from lib.errors import BackupDamaged, MigrationError, StoreFailed
from lib.journal import Journal

REHEARSED, SWITCHING, SWITCHED = "collection rehearsed", "deleting the live collection", "collection restored"
PUT_BACK = "old collection put back"
_ROOM_FACTOR = 4  # the file, the rehearsal, what is unpacked, the file fetched
_UNDER_WAY_SECONDS = 60.0  # for a restore that the server goes on with though its client was killed


def temporary_name(collection: str, backup: CollectionBackup) -> str:
    """The name of the rehearsal of this very snapshot."""
    return f"{collection}__try_{backup.sha256[:16]}"


def trial_restore(placement: Placement, journal: Journal, progress: Progress | None) -> str:
    """Restore under a temporary name and compare; returns that name. The caller deletes a failed one at once.

    The rehearsal that a killed run proved (its name holds the snapshot's checksum) is used again.
    """
    backup, qdrant = placement.backup, placement.target.qdrant
    name = temporary_name(placement.target.collection, backup)
    journal.append("rehearsing the collection", temporary_collection=name)
    if name not in list_collections(qdrant):
        try:
            placement.upload(name, name, progress)
        except QdrantError as error:
            with suppress(MigrationError):  # what went wrong first is what the operator must read
                placement.withdraw(name, name)
            if error.status < 500:
                raise
            raise _trial_failed(placement, error) from error
    compare(backup, qdrant, name)
    journal.append(REHEARSED)
    return name


def _trial_failed(placement: Placement, error: QdrantError) -> StoreFailed:
    # On a full disk a server says no more than that it failed to unpack, or to process the field (1.18.3).
    room = _ROOM_FACTOR * sum(part.snapshot.size for part in placement.parts) / 2**20
    return StoreFailed(
        f"'{placement.target.collection}' is untouched: the backup's rehearsal failed: {error}",
        next_step=f"look at the Qdrant server's log and at its disk (about {room:,.0f} MiB beside what is there now are"
        " needed), then run the same command again",
    )


def replace_live(
    placement: Placement,
    temporary: str,
    journal: Journal,
    progress: Progress | None,
    *,
    undo: str,
    aliases: Iterable[str] = (),
) -> None:
    """Delete the live collection and restore under its name from the copies that the servers already hold.

    The way is proved before the delete: where a server cannot fetch from itself, the files are uploaded again.
    `aliases` are those that an earlier run took off with the collection. A failed restore is deleted at once.
    """
    qdrant, name = placement.target.qdrant, placement.target.collection
    with ThreadPoolExecutor(1) as beside:
        sampled = beside.submit(sample, qdrant, temporary, placement.backup)
        urls = placement.fetched_from(temporary, temporary)
        rehearsed = sampled.result()
    standing = exists(qdrant, name)
    wanted = {*aliases, *placement.backup.facts["aliases"], *(aliases_of(qdrant, name) if standing else ())}
    journal.append(SWITCHING, undo=undo, aliases=sorted(wanted))
    if standing:
        delete_collection(qdrant, name)
    again = f"{temporary}-again"
    try:
        if urls:
            placement.fetch(name, urls)
        else:
            placement.upload(name, again, progress)
        for stem in (again, _old(temporary)):  # also what a killed run uploaded
            placement.forget(name, stem)
    except MigrationError:
        _drop_unusable(placement)
        raise
    _require_equal(placement, rehearsed)
    put_fan_out(qdrant, name, placement.backup.facts["config"])
    put_aliases(qdrant, name, free_aliases(qdrant, name, wanted))
    journal.append(SWITCHED)


def _require_equal(placement: Placement, rehearsed: Sample) -> None:
    """What was restored is what the rehearsal is; what differs is of no use and is deleted. Raises BackupDamaged."""
    backup, qdrant, name = placement.backup, placement.target.qdrant, placement.target.collection
    try:
        require_equal(backup, qdrant, name, rehearsed)
    except BackupDamaged:
        with suppress(MigrationError):  # what went wrong first is what the operator must read
            delete_collection(qdrant, name)
        raise


def put_back(saved: Placement, temporary: str, aliases: Iterable[str]) -> None:
    """Put the collection that stood there back from its safety backup, where nothing stands there now."""
    qdrant, name, stem = saved.target.qdrant, saved.target.collection, _old(temporary)
    try:
        saved.upload(name, stem, None)
        saved.forget(name, stem)
        compare(saved.backup, qdrant, name)
    except MigrationError:
        _drop_unusable(saved)
        raise
    put_fan_out(qdrant, name, saved.backup.facts["config"])
    put_aliases(qdrant, name, free_aliases(qdrant, name, aliases))


def _old(temporary: str) -> str:
    """By which the old collection's snapshots are uploaded when it is put back."""
    return f"{temporary}-old"


def _drop_unusable(placement: Placement) -> None:
    """Left dead it would keep a 1.11.3 server from starting again; with some of its parts it would pass for whole."""
    qdrant, name = placement.target.qdrant, placement.target.collection
    with suppress(MigrationError):  # what went wrong first is what the operator must read
        if name in placement.begun or is_failed(qdrant, name):
            delete_collection(qdrant, name)


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


def clean_up_collection(
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
