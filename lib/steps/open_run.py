"""A re-embedding that never came to its end: found, gone on with, given up, or refused."""

from __future__ import annotations

from pathlib import Path

from lib.backup_set.manifest import Manifest, read_manifest
from lib.dimensions import EmbeddingSpec
from lib.errors import BackupDamaged, BadFile, GuardRefused
from lib.journal import Journal, open_journals
from lib.steps.last_run import COMMAND, spec_as_json
from lib.steps.switch import DELETING


def open_run(folder: Path, targets: list[str], spec: EmbeddingSpec) -> Journal | None:
    """The open journal of these targets with these settings; nothing is written.

    Raises GuardRefused where one had deleted the collection for another model, size or endpoint: going on with
    these settings would throw away what it had begun.
    """
    for journal in _open_here(folder, targets):
        if journal.fact("spec") == spec_as_json(spec):
            return journal
        if journal.has_reached(DELETING):
            raise _other_settings(journal, targets, spec)
    return None


def give_up_others(folder: Path, targets: list[str], spec: EmbeddingSpec) -> None:
    """Close the runs of other settings that never deleted anything; right before the first write of this one."""
    for journal in _open_here(folder, targets):
        if journal.fact("spec") != spec_as_json(spec) and not journal.has_reached(DELETING):
            journal.close("given up before anything was deleted: other settings now")


def refuse_stranger(folder: Path, targets: list[str]) -> None:
    """Raise GuardRefused where a collection of this name was deleted by a run on another spelling of the address.

    For a collection that is absent or empty: its payloads may be in that run's part of the spool alone.
    """
    name = targets[1].rsplit(" ", 1)[-1]
    for journal in open_journals(folder):
        other = journal.command == COMMAND and journal.targets != targets
        if other and journal.targets[1].rsplit(" ", 1)[-1] == name and journal.has_reached(DELETING):
            raise GuardRefused(
                f"an unfinished run deleted '{name}' at another address: {journal.targets[1]}, graph"
                f" {journal.targets[0]}; here it is {targets[1]}, graph {targets[0]}",
                next_step="if that is the same server, spell QDRANT_URL, FALKORDB_HOST and FALKORDB_GRAPH as that run"
                f" did and run this again;\nif it is another one, finish or undo that run first:\n{journal.undo}",
            )


def manifest_of(folder: Path, journal: Journal | None) -> Manifest | None:
    """The backup that the guard accepted when this run began to delete, where it still reads."""
    path = folder / str(journal.fact("manifest") if journal else None)
    try:
        return read_manifest(path) if path.is_file() else None
    except (BackupDamaged, BadFile):
        return None


def _open_here(folder: Path, targets: list[str]) -> list[Journal]:
    found = [one for one in open_journals(folder) if one.command == COMMAND and one.targets == targets]
    return list(reversed(found))


def _other_settings(journal: Journal, targets: list[str], spec: EmbeddingSpec) -> GuardRefused:
    was, now = journal.fact("spec"), spec_as_json(spec)
    return GuardRefused(
        f"an unfinished run was making '{targets[1].rsplit(' ', 1)[-1]}' {was['size']}d with {was['model']} of"
        f" {was['endpoint']}; VECTOR_SIZE is {now['size']} and EMBEDDING_MODEL {now['model']} of"
        f" {now['endpoint']} now",
        next_step=f"finish it:  export VECTOR_SIZE={was['size']} EMBEDDING_MODEL={was['model']}"
        f" OPENAI_BASE_URL={was['endpoint']} && python scripts/reembed_embeddings.py\n"
        f"or go back:\n{journal.undo}",
    )
