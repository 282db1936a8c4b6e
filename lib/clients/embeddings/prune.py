"""`--prune-spool`: delete vectors from the embedding cache that no plan of this backup folder needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from lib.clients.embeddings.cache import PREFIX_BYTES, EmbeddingCache
from lib.clients.embeddings.cache_file import CacheDamaged
from lib.dimensions import EmbeddingSpec
from lib.errors import GuardRefused
from lib.files import free_bytes
from lib.journal import open_journals


@dataclass(frozen=True)
class Stored:
    """The vectors of one endpoint, model and size: all of them, and those that no plan needs, with their bytes."""

    spec: EmbeddingSpec
    vectors: int
    unneeded: int
    unneeded_bytes: int


@dataclass(frozen=True)
class Pruned:
    """What the cache held, the number `removed`, bytes before and after; `shrunk`: whether the file became smaller."""

    stored: list[Stored]
    removed: int
    bytes_before: int
    bytes_after: int
    shrunk: bool


def prune_cache(cache: EmbeddingCache, folder: Path, *, dry_run: bool) -> Pruned:
    """Delete what no plan needs, or (`dry_run`) only count it.

    A plan is the last scan of a graph and collection that this folder knows; it needs the vectors of its memories.
    Raises GuardRefused while a run is unfinished, CacheDamaged if a plan cannot be read, LockHeld if another process
    uses the vectors.
    """
    plans = [one for one in sorted(cache.path.parent.glob("*.sqlite3")) if one != cache.vectors_path]
    before = cache.size_bytes()
    if not dry_run:
        _require_no_open_run(folder)
    stored = _stored(cache, plans)
    if dry_run or not any(one.unneeded for one in stored):
        return Pruned(stored, 0, before, before, shrunk=False)
    with cache.exclusive():
        _note_needed(cache, plans)
        with cache.transaction():
            sql = "DELETE FROM vectors WHERE key NOT IN (SELECT key FROM temp.needed)"
            removed = cache.db.execute(sql).rowcount
    shrunk = _shrink(cache)
    return Pruned(stored, removed, before, cache.size_bytes(), shrunk)


def _require_no_open_run(folder: Path) -> None:
    for journal in open_journals(folder):
        step = "finish it, or give it up with --abort"
        if again := journal.fact("again"):
            step += f":\n{again}"
        if journal.undo:
            step += f"\nor undo it:\n{journal.undo}"
        raise GuardRefused(
            f"a run is unfinished ({journal.path.name}): it may need what would be deleted", next_step=step
        )


def _stored(cache: EmbeddingCache, plans: Sequence[Path]) -> list[Stored]:
    """Count by endpoint, model and size."""
    _note_needed(cache, plans)
    rows = cache.rows(
        f"""SELECT s.base_url, s.model, s.size, count(*), coalesce(sum(n.key IS NULL), 0),
              coalesce(sum(CASE WHEN n.key IS NULL THEN length(v.vector) END), 0)
            FROM vectors v JOIN specs s ON s.prefix = substr(v.key, 1, {PREFIX_BYTES})
            LEFT JOIN temp.needed n ON n.key = v.key
            GROUP BY s.prefix ORDER BY s.model, s.size, s.base_url"""  # noqa: S608 - a constant
    )
    return [Stored(EmbeddingSpec(url, model, size), *counts) for url, model, size, *counts in rows]


def _note_needed(cache: EmbeddingCache, plans: Sequence[Path]) -> None:
    """Fill the table `temp.needed` with the keys of all plans."""
    with cache.guarded():
        cache.db.execute("DROP TABLE IF EXISTS temp.needed")
        cache.db.execute("CREATE TEMP TABLE needed (key BLOB PRIMARY KEY) WITHOUT ROWID")
        cache.db.execute("INSERT OR IGNORE INTO temp.needed SELECT key FROM main.memories")
    for plan in plans:
        if plan == cache.path:
            continue
        with cache.guarded():
            cache.db.execute("ATTACH DATABASE ? AS other", [str(plan)])
            try:
                if not cache.is_of_this_version("other"):
                    raise CacheDamaged(
                        f"{plan} is no plan of this version of the tool: what it needs is unknown, nothing is removed",
                        next_step="move it away, then run the same command again:\n"
                        f"mv {quote(str(plan))} {quote(str(plan) + '.old')}",
                    )
                cache.db.execute("INSERT OR IGNORE INTO temp.needed SELECT key FROM other.memories")
            finally:
                cache.db.execute("DETACH DATABASE other")


def _shrink(cache: EmbeddingCache) -> bool:
    """Shrink the file to what it holds; False if the disk has no room for the copy that this takes."""
    # The copy and the log that it goes through (https://www.sqlite.org/lang_vacuum.html).
    if free_bytes(cache.vectors_path) < 2 * cache.vectors_path.stat().st_size:
        return False
    with cache.exclusive(), cache.guarded():
        cache.db.execute(f"VACUUM {cache.vectors_schema}")
        cache.db.execute(f"PRAGMA {cache.vectors_schema}.wal_checkpoint(TRUNCATE)")
    return True
