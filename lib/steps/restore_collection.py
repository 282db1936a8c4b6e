"""Put a collection back from a snapshot: rehearsed under a temporary name, then in the live one's place.

A restore can destroy the collection that it restores onto, and a dead collection keeps a 1.11.3 server from
starting again: so never onto a live one, and a temporary one whose restore failed is deleted at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO, cast

from lib.backup_set.archive import read_archive
from lib.backup_set.manifest import CollectionHalf
from lib.errors import BackupDamaged, MigrationError, StoreFailed, UsageProblem
from lib.journal import Journal
from lib.steps.progress import Progress, steps_of
from lib.steps.prove import prove_collection
from lib.steps.restored_points import CollectionBackup, compare, same_points, sample_ids
from lib.steps.take_collection import CollectionSource
from lib.vectors import snapshots
from lib.vectors.collection import delete_collection, exists, health, is_dead, list_collections
from lib.vectors.recreate import alias_target, aliases_of, free_aliases, put_aliases
from lib.vectors.restoring import (
    can_fetch_itself,
    preflight_upload,
    recover,
    upload_and_restore,
    wait_restored,
)
from lib.vectors.transport import Qdrant
from lib.vectors.versions import restorable

REHEARSED, SWITCHING, SWITCHED = "collection rehearsed", "deleting the live collection", "collection restored"
_UNDER_WAY_SECONDS = 60.0  # for a restore that the server goes on with though its client was killed


def open_backup(path: Path, half: CollectionHalf | None) -> CollectionBackup:
    """Prove the archive; nothing on the target is touched. Raises BackupDamaged."""
    return CollectionBackup(path, prove_collection(path, half=half))


def require_same_name(backup: CollectionBackup, target: CollectionSource) -> None:
    """Raise UsageProblem where the archive is of another collection than the one that it would replace."""
    name = backup.facts["collection"]
    if name != target.collection:
        raise UsageProblem(
            f"{backup.path} is of collection '{name}', and not put over '{target.collection}' (QDRANT_COLLECTION)",
            next_step=f"export QDRANT_COLLECTION={name}   if that is the collection to restore",
        )


def require_target(qdrant: Qdrant, collection: str) -> None:
    """Raise where this key may not put a collection in place, or where the name is an alias; nothing is changed."""
    stands_on = alias_target(qdrant, collection)
    if stands_on:
        raise UsageProblem(
            f"'{collection}' (QDRANT_COLLECTION) is an alias at {qdrant.display}, it stands on '{stands_on}';"
            " a restore needs the name of a collection",
            next_step=f"export QDRANT_COLLECTION={stands_on}   if that is the collection to restore",
        )
    preflight_upload(qdrant, f"{collection}__try_{secrets.token_hex(4)}")


def check_version(backup: CollectionBackup, qdrant: Qdrant, *, force: bool) -> None:
    """Raise where this server cannot take the snapshot: it would leave a dead collection behind."""
    reason = restorable(str(backup.facts["server"]["version"]), qdrant.version())
    if reason and not force:
        raise StoreFailed(
            f"{backup.path.name} cannot be restored here: {reason}",
            next_step="run a Qdrant of the backup's version (or its next minor), or add --force-version",
        )


def _upload(
    qdrant: Qdrant, name: str, backup: CollectionBackup, filename: str, progress: Progress | None
) -> None:
    def send(stream: IO[bytes]) -> None:
        upload_and_restore(
            qdrant,
            name,
            cast("BinaryIO", stream),
            size=backup.proof.archive.snapshot_size,
            filename=filename,
            checksum=backup.sha256,
            progress=steps_of(progress) if progress else None,
        )

    read_archive(backup.path, on_snapshot=send)


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
            recover(qdrant, collection, location, backup.sha256)
        else:
            _upload(qdrant, collection, backup, again, progress)
        snapshots.delete(qdrant, collection, again)  # also one that a killed run uploaded
        compare(backup, qdrant, collection)
        if not same_points(qdrant, collection, temporary, sample_ids(backup)):
            raise BackupDamaged(f"'{collection}' differs from the rehearsal {temporary} after the restore")
    except MigrationError:
        _drop_dead(qdrant, collection)
        raise
    put_aliases(qdrant, collection, free_aliases(qdrant, collection, wanted))
    journal.append(SWITCHED)


def _drop_dead(qdrant: Qdrant, collection: str) -> None:
    """Left dead it would keep a 1.11.3 server from starting again."""
    with suppress(MigrationError):  # what went wrong first is what the operator must read
        if is_dead(qdrant, collection):
            delete_collection(qdrant, collection)


def drop_temporary(qdrant: Qdrant, name: str) -> None:
    """Delete the uploaded file first (it cannot be reached afterwards), then the collection, dead or alive."""
    if name not in list_collections(qdrant):
        return
    try:
        for one in snapshots.list_snapshots(qdrant, name):
            snapshots.delete(qdrant, name, one.name)
    except MigrationError:
        pass  # the collection matters more: left dead, it keeps a 1.11.3 server from starting again
    delete_collection(qdrant, name)


def settle_collection(
    qdrant: Qdrant, collection: str, journal: Journal, backup: CollectionBackup | None
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
    drop_temporary(qdrant, name)
    return [f"removed the temporary collection {name}"]


def aliases_taken_off(journal: Journal) -> list[str]:
    """The aliases that a run, or one that it went on from, took off with the collection and did not put back."""
    return [] if journal.has_reached(SWITCHED) else list(journal.fact("aliases") or [])
