"""The phases of a re-embedding, and what the journals report about the last one of these stores."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from lib.dimensions import EmbeddingSpec, provider_fact, public_url
from lib.journal import Journal, read_journal

# In the staged collection; the live one serves all the time.
STAGING, READ, STAGED = "staging", "live payloads read", "staged and proved"
SNAPSHOT_MADE = "snapshot of the staged collection made"
# The cutover.
SETTINGS_RECOVERED = "settings taken from the backup"
PAYLOADS_SAVED = "payloads kept"
DELETING, DELETED = "deleting the live collection", "live collection deleted"
RESTORING_STAGED, STAGED_RESTORED = "putting the staged collection in place", "staged collection in place"
CREATED = "collection created"
# The end.
VERIFIED, DROPPING_STAGED = "proved", "removing the staged collection"

COMMAND = "reembed"


def spec_as_json(spec: EmbeddingSpec) -> dict[str, Any]:
    """What a journal records of the vectors that its run makes; no secret."""
    facts = {"model": spec.model, "size": spec.size, "endpoint": public_url(spec.base_url)}
    return facts | provider_fact(spec.provider)


def collection_of(targets: list[str]) -> str:
    """The collection's name in the targets of a run."""
    return targets[1].rsplit(" ", 1)[-1]


def last_migration(folder: Path, targets: list[str]) -> Journal | None:
    """The journal of the newest re-embedding of these stores that recreated the collection."""
    for path in sorted(folder.glob(f"journal_*_{COMMAND}.jsonl"), reverse=True):
        journal = read_journal(path)
        if journal and journal.targets == targets and journal.fact("settings"):
            return journal
    return None


def restored_since(folder: Path, migration: Journal) -> bool:
    """Whether a restore of the collection finished after this migration."""
    journals = map(read_journal, folder.glob("journal_*_restore.jsonl"))
    return any(
        one.run_id > migration.run_id and one.fact("temporary_collection") and not one.is_open
        for one in journals
        if one and one.targets == migration.targets
    )


def verified_at(folder: Path, targets: list[str]) -> datetime | None:
    """When the last migration verified its result, or None."""
    journal = last_migration(folder, targets)
    moments = [entry["at"] for entry in journal.entries if entry["phase"] == VERIFIED] if journal else []
    return datetime.fromisoformat(moments[-1]) if moments else None


def settings_before(folder: Path, targets: list[str]) -> dict[str, Any] | None:
    """The collection's raw info before its last migration."""
    journal = last_migration(folder, targets)
    return journal.fact("settings") if journal else None


def kept_the_size(folder: Path, targets: list[str], spec: EmbeddingSpec) -> bool:
    """Whether the last migration was to `spec` and did not change the size.

    AutoMem then writes vectors of the old model until it is restarted, and no dimension check notices.
    """
    journal = last_migration(folder, targets)
    if journal is None or journal.fact("spec") != spec_as_json(spec):
        return False
    return bool(journal.fact("settings")["config"]["params"]["vectors"].get("size") == spec.size)


def journalled_stamp(folder: Path, collection: str, size: int) -> dict[str, Any]:
    """The model stamp in the journal of the newest run that recreated this collection (address and name).

    For servers that store no metadata (before 1.16). Empty if that run was no migration, did not finish, or made
    vectors of another size.
    """
    for path in sorted(folder.glob("journal_*.jsonl"), reverse=True):
        journal = read_journal(path)
        if journal is None or journal.targets[-1:] != [collection]:
            continue
        if any(map(journal.has_reached, (DELETING, RESTORING_STAGED, CREATED))):
            finished = journal.command == COMMAND and journal.has_reached(VERIFIED)
            stamp = journal.fact("stamp") if finished else None
            made = next(iter(stamp.values())) if isinstance(stamp, dict) else {}
            return made if made.get("size") == size else {}
    return {}
