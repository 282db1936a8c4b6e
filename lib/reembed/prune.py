"""`--prune-spool`: bought vectors that no plan of this backup folder needs are deleted from the embedding cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.embeddings.cache_file import Stored
from lib.errors import GuardRefused
from lib.journal import open_journals


@dataclass(frozen=True)
class Pruned:
    """What the cache held, `removed` vectors of it, bytes before and after; `shrunk` where the file gave back room."""

    stored: list[Stored]
    removed: int
    bytes_before: int
    bytes_after: int
    shrunk: bool


def prune_spool(cache: EmbeddingCache, folder: Path, *, dry_run: bool) -> Pruned:
    """Delete what no plan needs, or (`dry_run`) only count it.

    Plans are the last scans of every graph and collection that this folder knows. Raises GuardRefused while a run is
    unfinished, CacheDamaged where a plan cannot be read, LockHeld where another run uses the vectors.
    """
    plans = [one for one in sorted(cache.path.parent.glob("*.sqlite3")) if one != cache.vectors_path]
    before = cache.size_bytes()
    if not dry_run:
        _require_no_open_run(folder)
    stored = cache.stored(plans)
    if dry_run or not any(one.unneeded for one in stored):
        return Pruned(stored, 0, before, before, shrunk=False)
    removed = cache.prune(plans)
    shrunk = cache.give_back_room()
    return Pruned(stored, removed, before, cache.size_bytes(), shrunk)


def _require_no_open_run(folder: Path) -> None:
    for journal in open_journals(folder):
        raise GuardRefused(
            f"a run is unfinished ({journal.path.name}, at: {journal.phase}): it may need what would be deleted",
            next_step=f"finish it first; with --dry-run nothing is deleted\nits undo:\n{journal.undo or '  (none)'}",
        )
