"""A backup of a collection, proved, and whether this server may take it; nothing on the server is touched."""

from __future__ import annotations

import secrets
from pathlib import Path
from shlex import quote

from lib.backup_set.archive import peek_facts
from lib.backup_set.manifest import CollectionHalf
from lib.errors import StoreFailed, UsageProblem
from lib.steps.bare_snapshot import prove_bare
from lib.steps.prove_collection import has_room, prove_collection
from lib.steps.restore_kept import KeptSnapshots, PromisedIds
from lib.steps.restored_points import CollectionBackup
from lib.steps.take_collection import CollectionSource
from lib.vectors.recreate import refuse_alias
from lib.vectors.restoring import preflight_upload
from lib.vectors.transport import Qdrant
from lib.vectors.versions import restorable

_TIMES = 3  # the room that a snapshot takes in the temporary folder: kept once, and twice while the engine opens it


def open_backup(path: Path, half: CollectionHalf | None) -> CollectionBackup:
    """Prove the archive; nothing on the target is touched. Raises BackupDamaged."""
    size = half.snapshot_size if half else peek_facts(path)["snapshot_size"]
    ids, kept = PromisedIds(), KeptSnapshots(room=isinstance(size, int) and has_room(_TIMES * size))
    proof = prove_collection(path, half=half, on_ids=ids.keep, passing=kept.passing)
    return CollectionBackup(path, proof, ids=ids, kept=kept)


def open_bare(path: Path, target: CollectionSource) -> CollectionBackup:
    """Prove a bare snapshot as far as it can be, nothing telling what it should hold. Raises BackupDamaged."""
    return CollectionBackup(path, prove_bare(path, target.collection, target.spec), bare=True)


def require_same_name(backup: CollectionBackup, target: CollectionSource) -> None:
    """Raise UsageProblem where the archive is of another collection than the one that it would replace."""
    name = backup.facts["collection"]
    if name != target.collection:
        raise UsageProblem(
            f"{backup.path} is of collection '{name}', and not put over '{target.collection}' (QDRANT_COLLECTION)",
            next_step=f"export QDRANT_COLLECTION={quote(name)}   if that is the collection to restore",
        )


def require_target(qdrant: Qdrant, collection: str) -> None:
    """Raise where this key may not put a collection in place, or where the name is an alias; nothing is changed."""
    refuse_alias(qdrant, collection)
    preflight_upload(qdrant, f"{collection}__try_{secrets.token_hex(4)}")


def check_version(backup: CollectionBackup, qdrant: Qdrant, *, force: bool) -> None:
    """Raise where this server cannot take the snapshot: it would leave a dead collection behind.

    A bare snapshot does not say which version made it: only its rehearsal tells.
    """
    if backup.bare:
        return
    reason = restorable(str(backup.facts["server"]["version"]), qdrant.version())
    if reason and not force:
        raise StoreFailed(
            f"{backup.path.name} cannot be restored here: {reason}",
            next_step="run a Qdrant of the backup's version (or its next minor), or add --force-version",
        )
