"""The phases of a re-embedding, and what the journal of the last one of these stores reports."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from lib.dimensions import EmbeddingSpec, public_url
from lib.journal import Journal, read_journal

# Beside the live collection, which serves all the while.
STAGING, READ, STAGED = "staging", "live payloads read", "staged and proved"
SNAPPED = "snapshot of the staged collection made"
# The live collection is exchanged.
RECOVERED = "settings taken from the backup"
KEPT = "payloads kept"
DELETING, DELETED = "deleting the live collection", "live collection deleted"
PLACING, PLACED = "putting the staged collection in place", "staged collection in place"
CREATED = "collection created"
# The end.
VERIFIED, TIDYING = "proved", "removing the staged collection"


COMMAND = "reembed"


def spec_as_json(spec: EmbeddingSpec) -> dict[str, Any]:
    """What a journal says of the vectors that its run makes; no secret."""
    return {"model": spec.model, "size": spec.size, "endpoint": public_url(spec.base_url)}


def collection_of(targets: list[str]) -> str:
    """The collection's name in the targets of a run."""
    return targets[1].rsplit(" ", 1)[-1]


def last_migration(folder: Path, targets: list[str]) -> Journal | None:
    """The journal of the newest re-embedding of these stores that made the collection anew."""
    for path in sorted(folder.glob(f"journal_*_{COMMAND}.jsonl"), reverse=True):
        journal = read_journal(path)
        if journal and journal.targets == targets and journal.fact("settings"):
            return journal
    return None


def restored_since(folder: Path, migration: Journal) -> bool:
    """Whether a restore of the collection came to its end after this migration."""
    found = map(read_journal, folder.glob("journal_*_restore.jsonl"))
    later = [
        one for one in found if one and one.targets == migration.targets and one.run_id > migration.run_id
    ]
    return any(one.fact("temporary_collection") and not one.is_open for one in later)


def verified_at(folder: Path, targets: list[str]) -> datetime | None:
    """When the last migration had proved its result; None where none did."""
    journal = last_migration(folder, targets)
    entries = [entry for entry in journal.entries if entry["phase"] == VERIFIED] if journal else []
    return datetime.fromisoformat(entries[-1]["at"]) if entries else None


def settings_before(folder: Path, targets: list[str]) -> dict[str, Any] | None:
    """The collection's raw info before its last migration."""
    journal = last_migration(folder, targets)
    return journal.fact("settings") if journal else None


def kept_the_size(folder: Path, targets: list[str], spec: EmbeddingSpec) -> bool:
    """Whether the last migration was to `spec` and left the size as it was.

    AutoMem then goes on writing the old model's vectors until it is restarted, and no dimension check tells.
    """
    journal = last_migration(folder, targets)
    if journal is None or journal.fact("spec") != spec_as_json(spec):
        return False
    return bool(journal.fact("settings")["config"]["params"]["vectors"].get("size") == spec.size)


def journalled_model(folder: Path, collection: str, size: int) -> str | None:
    """The model that the newest run which put this collection (address and name) in place stamped into its journal.

    For servers that keep no metadata (before 1.16). None where that run was no migration, never came to its end, or
    made vectors of another size.
    """
    for path in sorted(folder.glob("journal_*.jsonl"), reverse=True):
        journal = read_journal(path)
        if journal is None or journal.targets[-1:] != [collection]:
            continue
        if not any(map(journal.has_reached, (DELETING, PLACING, CREATED))):
            continue
        stamped = (
            journal.fact("stamp") if journal.command == COMMAND and journal.has_reached(VERIFIED) else None
        )
        made = next(iter(stamped.values())) if isinstance(stamped, dict) else {}
        return str(made["model"]) if made.get("size") == size else None
    return None
