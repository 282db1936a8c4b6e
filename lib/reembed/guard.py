"""The guard: no live collection is deleted without a verified backup of it, whose file is unchanged now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from lib.backup.archive import read_archive
from lib.backup.catalog import backup_sets
from lib.backup.manifest import CHECKED, VERIFICATION_LEVELS, CollectionComponent, Manifest, check_file
from lib.backup.points import TemporaryIdTable, as_id
from lib.clients.embeddings.cache_file import chunks
from lib.clients.qdrant.collection import CollectionState
from lib.dimensions import UNKNOWN_MODEL
from lib.errors import BackupDamaged, GuardRefused
from lib.network import same_server
from lib.providers import model_settings

MAX_AGE_HOURS = 24.0
_PAGE = 500
_SAME_SHARE = 0.9  # a day's new memories are fewer; another deployment has other ids
_ONLY_MISSING = "python scripts/reembed_embeddings.py --only-missing"


@dataclass(frozen=True)
class GuardedCollection:
    """What a backup must hold: the server's address, the collection, all its ids, and those without a memory."""

    server: str
    state: CollectionState
    live: TemporaryIdTable
    only_live: TemporaryIdTable


def require_backup(folder: Path, guarded: GuardedCollection, configured: int) -> Manifest:
    """Return the newest backup set that protects the collection. Raises GuardRefused with the reason why none does."""
    found = find_backup(folder, guarded)
    if isinstance(found, Manifest):
        return found
    state = guarded.state
    how = "with different dimension" if state.size != configured else "and would be replaced"
    raise GuardRefused(
        f"Collection '{state.name}' already exists {how}\n"
        f"({state.size}d, {state.points} points; VECTOR_SIZE is {configured}d).\n"
        f"It is not changed without a verified backup: {found}",
        next_step="python scripts/backup_automem.py\npython scripts/reembed_embeddings.py",
    )


def find_backup(folder: Path, guarded: GuardedCollection) -> Manifest | str:
    """Return the newest backup set that protects the collection, or why the newest one does not."""
    why = ""
    for manifest in backup_sets(folder):
        fault = _fault(manifest, guarded)
        if fault is None:
            return manifest
        why = why or f"the newest, {manifest.name}, {fault}"
    return why or f"there is none in {folder}"


def _fault(manifest: Manifest, guarded: GuardedCollection) -> str | None:
    """Return why this set does not protect the collection, or None."""
    component = manifest.collection
    if component is None:
        return "holds no collection"
    fault = _fault_in_manifest(manifest, component, guarded)
    if fault:
        return fault
    try:
        path = manifest.file_of(component)
        check_file(path, component.file)
        live, alone = _count_expected(path, guarded)
    except BackupDamaged as error:
        return str(error)
    if live < _SAME_SHARE * len(guarded.live):
        return f"is of other data: it holds {live} of the collection's {len(guarded.live)} points"
    missing = len(guarded.only_live) - alone
    return f"does not hold points that are in the collection alone: {missing}" if missing else None


def _fault_in_manifest(manifest: Manifest, component: CollectionComponent, guarded: GuardedCollection) -> str | None:
    server = component.server["address"]
    if component.collection != guarded.state.name or not same_server(server, guarded.server):
        return f"is of '{component.collection}' on {server}"
    if component.size != guarded.state.size:
        return f"is of {component.size}d vectors"
    if manifest.age_hours > MAX_AGE_HOURS:
        return f"is {manifest.age_hours:.0f} hours old (at most {MAX_AGE_HOURS:.0f})"
    if manifest.is_from_future:
        return f"is dated {-manifest.age_hours:.0f} hours in the future"
    if VERIFICATION_LEVELS.index(component.proof) < VERIFICATION_LEVELS.index(CHECKED):
        return "was never verified (--no-verify)"
    return None


def _count_expected(path: Path, guarded: GuardedCollection) -> tuple[int, int]:
    """Return how many live ids are among the archive's expected ids, and how many of those without a memory."""
    live = alone = 0

    def count(ids: Iterator[str]) -> None:
        nonlocal live, alone
        for page in chunks(map(as_id, ids), _PAGE):
            live += len(guarded.live.payloads(page))
            alone += len(guarded.only_live.payloads(page))

    read_archive(path, on_ids=count)
    return live, alone


def undo_of(manifest: Manifest | None, *, named: bool) -> str:
    """Return the commands that restore the collection of this backup; the graph was not changed.

    `named`: they set EMBEDDING_PROVIDER even if it is OpenAI.
    """
    if manifest is None or manifest.collection is None:
        return "  (none: no collection was replaced)"
    component = manifest.collection
    lines = [
        f"  python scripts/restore_from_backup.py {quote(str(manifest.file_of(component)))}",
        f"  export VECTOR_SIZE={component.size}",
    ]
    if component.model == UNKNOWN_MODEL:
        # With the new vectors' model --only-missing would mix two models.
        lines += [
            "  # The backup does not record the model of the old vectors. Set it, then add newer memories:",
            "  # export EMBEDDING_MODEL=...",
            f"  # {_ONLY_MISSING}",
        ]
    else:
        settings = model_settings(component.provider, component.model, named=named)
        lines += [*(f"  export {name}={quote(value)}" for name, value in settings.items()), f"  {_ONLY_MISSING}"]
    return "\n".join(lines)
