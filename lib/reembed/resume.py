"""A re-embedding that never came to its end: found, gone on with, given up, or refused."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from lib.backup.last_migration import (
    COMMAND,
    CREATED,
    DELETED,
    DELETING,
    PLACED,
    PLACING,
    STAGED,
    STAGING,
    VERIFIED,
    collection_of,
    spec_as_json,
)
from lib.backup.manifest import Manifest, read_manifest
from lib.clients.qdrant.collection import exists
from lib.clients.qdrant.restoring import drop_temporary
from lib.clients.qdrant.transport import Qdrant, curl_line
from lib.dimensions import EmbeddingSpec
from lib.errors import BackupDamaged, BadFile, GuardRefused
from lib.journal import Journal, open_journals

_SETTINGS = {"size": "dimension (VECTOR_SIZE)", "model": "EMBEDDING_MODEL", "endpoint": "OPENAI_BASE_URL"}
_VERIFIED = "the staged collection is proved, the live one is untouched"
_BEGUN = "the staged collection is begun, the live one is untouched"
# The furthest first.
_WHERE = (
    (VERIFIED, "all is in place and proved, what is left is to clean up"),
    (PLACED, "the staged collection is in place, what is left is to catch up and to prove"),
    (CREATED, "the new collection is created, what is left is to fill and to prove it"),
    (PLACING, "the old collection is deleted, the staged one was on its way into its place"),
    (DELETED, "the old collection is deleted"),
    (DELETING, "the old collection was about to be deleted"),
    (STAGED, _VERIFIED),
    (STAGING, _BEGUN),
)


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


def give_up_others(folder: Path, targets: list[str], spec: EmbeddingSpec, qdrant: Qdrant) -> None:
    """Close the runs of other settings that never deleted anything; right before the first write of this one.

    What they staged is removed: the vectors stay in the embedding cache.
    """
    for journal in _open_here(folder, targets):
        if journal.fact("spec") != spec_as_json(spec) and not journal.has_reached(DELETING):
            staged = journal.fact("staged_collection")
            if staged:
                drop_temporary(qdrant, staged)
            journal.close("given up before anything was deleted: other settings now")


def going_on(journal: Journal) -> str:
    """In one line, where an unfinished run is gone on with."""
    where = next(
        (text for phase, text in _WHERE if journal.has_reached(phase)), "nothing was begun on a server"
    )
    if where is _VERIFIED and not journal.fact("proved"):
        where = _BEGUN
    return f"going on with the run of {str(journal.entries[0]['at'])[:16]} UTC: {where}"


def refuse_stranger(folder: Path, targets: list[str]) -> None:
    """Raise GuardRefused where an unfinished run deleted this collection at another address, or this graph's other one.

    For a collection that is absent or empty: its payloads may be in that run's part of the cache alone. The address
    may be the same one in another spelling.
    """
    for journal in open_journals(folder):
        if journal.command != COMMAND or journal.targets == targets or not journal.has_reached(DELETING):
            continue
        if collection_of(journal.targets) == collection_of(targets):
            raise GuardRefused(
                f"an unfinished run deleted '{collection_of(targets)}' at another address: {journal.targets[1]}, graph"
                f" {journal.targets[0]}; here it is {targets[1]}, graph {targets[0]}",
                next_step="if that is the same server, spell QDRANT_URL, FALKORDB_HOST and FALKORDB_GRAPH as that run"
                f" did and run this again;\nif it is another one, finish or undo that run first:\n{journal.undo}",
            )
        if journal.targets[0] == targets[0]:
            raise GuardRefused(
                f"an unfinished run of this graph was making the collection '{collection_of(journal.targets)}';"
                f" QDRANT_COLLECTION is '{collection_of(targets)}' now, and there is nothing in that",
                next_step=f"finish it:  export QDRANT_COLLECTION={quote(collection_of(journal.targets))} &&"
                f" python scripts/reembed_embeddings.py\nor go back:\n{journal.undo}",
            )


def refuse_stranger_staged(folder: Path, targets: list[str], qdrant: Qdrant, staged: str) -> None:
    """Raise GuardRefused where a staged collection stands there that no open run of these targets has made."""
    made = [one.fact("staged_collection") for one in _open_here(folder, targets)]
    if staged in made or not exists(qdrant, staged):
        return
    others = [one for one in open_journals(folder) if one.fact("staged_collection") == staged]
    if others:
        raise GuardRefused(
            f"'{staged}' was made by an unfinished run on other stores, or another spelling of these:"
            f" {' and '.join(others[0].targets)}; here it is {' and '.join(targets)}",
            next_step="spell QDRANT_URL, FALKORDB_HOST and FALKORDB_GRAPH as that run did and run this again",
        )
    raise GuardRefused(
        f"'{staged}' exists, and no unfinished run here made it: it is not taken over",
        next_step=f"look whose it is, then delete it and run this again:\n  {curl_line(qdrant, 'DELETE', staged)}",
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
    other = ", ".join(name for key, name in _SETTINGS.items() if was[key] != now[key])
    return GuardRefused(
        f"an unfinished run was making '{collection_of(targets)}' {was['size']}d with {was['model']} of"
        f" {was['endpoint']}; it cannot be gone on with: another {other} ({now['size']}d, {now['model']} of"
        f" {now['endpoint']})",
        next_step=f"finish it:  export VECTOR_SIZE={was['size']} EMBEDDING_MODEL={quote(was['model'])}"
        f" OPENAI_BASE_URL={quote(was['endpoint'])} && python scripts/reembed_embeddings.py\n"
        f"or go back:\n{journal.undo}",
    )
