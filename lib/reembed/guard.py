"""The guard: no live collection is deleted without a proved backup of it, in place right now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.backup.archive import read_archive
from lib.backup.catalog import backup_sets
from lib.backup.existing_points import TemporaryIdTable, as_id, pages
from lib.backup.manifest import CHECKED, VERIFICATION_LEVELS, CollectionComponent, Manifest, check_file
from lib.clients.qdrant.collection import CollectionState
from lib.errors import BackupDamaged, GuardRefused
from lib.network import same_server

MAX_AGE_HOURS = 24.0
_PAGE = 500
_SAME_SHARE = 0.9  # a day's new memories are fewer; another deployment's ids are others


@dataclass(frozen=True)
class Wanted:
    """What the backup must be of: server, live state, all live ids, and those of them that the graph does not hold."""

    server: str
    state: CollectionState
    live: TemporaryIdTable
    only_live: TemporaryIdTable


def refusal(state: CollectionState, configured: int, why: str) -> GuardRefused:
    """The refusal in the words that operators know."""
    how = "with different dimension" if state.size != configured else "and would be replaced"
    return GuardRefused(
        f"Collection '{state.name}' already exists {how}\n"
        f"({state.size}d, {state.points} points; VECTOR_SIZE is {configured}d).\n"
        f"It is not touched without a proved backup: {why}",
        next_step="python scripts/backup_automem.py\npython scripts/reembed_embeddings.py",
    )


def require_backup(folder: Path, wanted: Wanted, configured: int) -> Manifest:
    """The newest set whose collection half fits; raises GuardRefused with the reason why none does."""
    found = fitting_backup(folder, wanted)
    if isinstance(found, str):
        raise refusal(wanted.state, configured, found)
    return found


def fitting_backup(folder: Path, wanted: Wanted) -> Manifest | str:
    """The newest set whose collection half fits, or the reason why none does."""
    why = f"there is none in {folder}"
    for manifest in backup_sets(folder):
        fault = _fault(manifest, wanted)
        if fault is None:
            return manifest
        if why.startswith("there is none"):
            why = f"the newest, {manifest.name}, {fault}"
    return why


def _fault(manifest: Manifest, wanted: Wanted) -> str | None:
    """Why this set does not protect the collection, or None."""
    component = manifest.collection
    if component is None:
        return "holds no collection"
    fault = _unfit(manifest, component, wanted)
    if fault:
        return fault
    try:
        path = manifest.file_of(component)
        check_file(path, component.file)
        expected, alone = _expected(path, wanted)
    except BackupDamaged as error:
        return str(error)
    if expected < _SAME_SHARE * len(wanted.live):
        return f"is of other data: it holds {expected} of the {len(wanted.live)} points that stand there"
    missing = len(wanted.only_live) - alone
    return f"does not hold {missing} point(s) that are in the collection alone" if missing else None


def _unfit(manifest: Manifest, component: CollectionComponent, wanted: Wanted) -> str | None:
    if component.collection != wanted.state.name or not same_server(
        component.server["address"], wanted.server
    ):
        return f"is of '{component.collection}' on {component.server['address']}"
    if component.size != wanted.state.size:
        return f"is of {component.size}d vectors"
    if manifest.age_hours > MAX_AGE_HOURS:
        return f"is {manifest.age_hours:.0f} hours old (at most {MAX_AGE_HOURS:.0f})"
    if manifest.is_from_future:
        return f"is dated {-manifest.age_hours:.0f} hours in the future"
    if VERIFICATION_LEVELS.index(component.proof) < VERIFICATION_LEVELS.index(CHECKED):
        return "was never proved (--no-verify)"
    return None


def _expected(path: Path, wanted: Wanted) -> tuple[int, int]:
    """How many of the live ids the archive promises, and how many of those that only the collection holds."""
    live = alone = 0

    def count(ids: Iterator[str]) -> None:
        nonlocal live, alone
        for page in pages(map(as_id, ids), _PAGE):
            live += len(wanted.live.payloads(page))
            alone += len(wanted.only_live.payloads(page))

    read_archive(path, on_ids=count)
    return live, alone
