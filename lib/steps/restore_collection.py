"""Put a collection back from a snapshot: rehearsed under a temporary name, then in the live one's place.

A restore can destroy the collection that it restores onto, and a dead collection keeps a 1.11.3 server from
starting again: so never onto a live one, and a temporary one whose restore failed is deleted at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lib.backup_set.archive import read_archive
from lib.backup_set.manifest import CollectionHalf
from lib.errors import BackupDamaged, MigrationError, StoreFailed
from lib.journal import Journal
from lib.steps.present import as_id, points_present
from lib.steps.progress import Progress, steps_of
from lib.steps.prove import CollectionProof, prove_collection
from lib.vectors import snapshots
from lib.vectors.collection import delete_collection, exists, get_state, list_collections
from lib.vectors.points import retrieve
from lib.vectors.recreate import aliases_of, put_aliases
from lib.vectors.restoring import can_fetch_itself, recover, upload_and_restore
from lib.vectors.transport import Qdrant
from lib.vectors.versions import restorable

REHEARSED, SWITCHING, SWITCHED = "collection rehearsed", "deleting the live collection", "collection restored"
_SAMPLE = 200
_PAGE = 500


@dataclass(frozen=True)
class CollectionBackup:
    """A proved archive."""

    path: Path
    proof: CollectionProof

    @property
    def facts(self) -> dict[str, Any]:
        """`collection.json` of the archive."""
        return self.proof.archive.facts

    @property
    def sha256(self) -> str:
        """The snapshot's own checksum."""
        return self.proof.archive.snapshot_sha256

    @property
    def size(self) -> int:
        """The dimension of the vectors inside."""
        return self.proof.snapshot.size


def open_backup(path: Path, half: CollectionHalf | None) -> CollectionBackup:
    """Prove the archive; nothing on the target is touched. Raises BackupDamaged."""
    return CollectionBackup(path, prove_collection(path, half=half))


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
    """Restore under a temporary name and compare; returns that name. A failed one is deleted at once.

    The rehearsal that a killed run proved (its name holds the snapshot's checksum) is used again.
    """
    name = temporary_name(collection, backup)
    journal.append("rehearsing the collection", temporary_collection=name)
    try:
        if name not in list_collections(qdrant):
            _upload(qdrant, name, backup, f"{name}.snapshot", progress)
        compare(backup, qdrant, name)
    except BaseException:
        drop_temporary(qdrant, name)
        raise
    journal.append(REHEARSED)
    return name


def compare(backup: CollectionBackup, qdrant: Qdrant, name: str) -> int:
    """Size, distance and every promised id; the number of points. Raises BackupDamaged."""
    state = get_state(qdrant, name)
    if (state.size, state.distance) != (backup.size, backup.proof.snapshot.distance):
        raise BackupDamaged(f"restored as {state.size}d {state.distance}, the snapshot says {backup.size}d")
    missing = 0
    with points_present(qdrant, name, payload=False) as present:

        def count(ids: Iterator[str]) -> None:
            nonlocal missing
            while page := [as_id(one) for one in islice(ids, _PAGE)]:
                missing += len(page) - len(present.payloads(page))

        read_archive(backup.path, on_ids=count)
    if missing:
        raise BackupDamaged(
            f"{backup.path.name} restores without an error, "
            f"but {missing} of {backup.proof.archive.ids} points are lost",
            next_step="use another backup: python scripts/backup_automem.py --list",
        )
    return state.points


def sample_ids(backup: CollectionBackup) -> list[int | str]:
    """Ids spread over the whole backup, to compare point by point."""
    step = max(1, backup.proof.archive.ids // _SAMPLE)
    found: list[int | str] = []
    read_archive(
        backup.path, on_ids=lambda ids: found.extend(as_id(one) for one in islice(ids, 0, None, step))
    )
    return found[:_SAMPLE]


def same_points(qdrant: Qdrant, left: str, right: str, ids: list[int | str]) -> bool:
    """Whether these points are equal in both collections, payloads and vectors."""
    import numpy as np

    def points(name: str) -> dict[int | str, Any]:
        return {point.id: point for point in retrieve(qdrant, name, ids, payload=True, vector=True)}

    one, other = points(left), points(right)
    return one.keys() == other.keys() and all(
        one[key].payload == other[key].payload and np.array_equal(one[key].vector, other[key].vector)
        for key in one
    )


def replace_live(
    backup: CollectionBackup,
    qdrant: Qdrant,
    collection: str,
    temporary: str,
    journal: Journal,
    progress: Progress | None,
    *,
    undo: str,
) -> None:
    """Delete the live collection and restore under its name from the copy that the server already holds.

    The way is proved before the delete: where the server cannot fetch from itself, the file is uploaded again.
    """
    held = snapshots.Snapshot(f"{temporary}.snapshot", backup.proof.archive.snapshot_size, backup.sha256, "")
    location = can_fetch_itself(qdrant, temporary, held, f"{temporary}_probe")
    aliases = set(backup.facts["aliases"])
    if exists(qdrant, collection):
        aliases |= set(aliases_of(qdrant, collection))
        journal.append(SWITCHING, undo=undo, aliases=sorted(aliases))
        delete_collection(qdrant, collection)
    if location:
        recover(qdrant, collection, location, backup.sha256)
    else:
        _upload(qdrant, collection, backup, f"{temporary}-again.snapshot", progress)
        snapshots.delete(qdrant, collection, f"{temporary}-again.snapshot")
    compare(backup, qdrant, collection)
    if not same_points(qdrant, collection, temporary, sample_ids(backup)):
        raise BackupDamaged(f"'{collection}' differs from the rehearsal {temporary} after the restore")
    put_aliases(qdrant, collection, sorted(aliases))
    journal.append(SWITCHED)


@contextmanager
def temporary_collection(qdrant: Qdrant, name: str) -> Iterator[None]:
    """The temporary collection and its uploaded file go when the block ends, however it ends."""
    try:
        yield
    finally:
        drop_temporary(qdrant, name)


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
    name = journal.fact("temporary_collection")
    if name is None or name not in list_collections(qdrant):
        return []
    if backup is not None and journal.has_reached(REHEARSED) and name == temporary_name(collection, backup):
        return [f"going on from {name}, which an earlier run proved"]
    drop_temporary(qdrant, name)
    return [f"removed the temporary collection {name}"]
