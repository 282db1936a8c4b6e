"""Bought vectors that no plan needs any more, and their removal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from lib.dimensions import EmbeddingSpec
from lib.embedding.spool_file import APPLICATION_ID, FORMAT_VERSION, SpoolDamaged, SpoolFile
from lib.files import free_bytes

PREFIX_BYTES = 4  # of a key: endpoint, model and size


@dataclass(frozen=True)
class Stored:
    """The vectors of one endpoint, model and size: all of them, and those that no plan needs, with their bytes."""

    spec: EmbeddingSpec
    vectors: int
    unneeded: int
    unneeded_bytes: int


class Pruning(SpoolFile):
    """What is needed is what the plans name: each memory of their last scan, for their model and size."""

    def stored(self, plans: Sequence[Path]) -> list[Stored]:
        """Count by endpoint, model and size. Raises SpoolDamaged where one of the `plans` cannot be read."""
        self._note_needed(plans)
        rows = self._rows(
            f"""SELECT s.base_url, s.model, s.size, count(*), coalesce(sum(n.key IS NULL), 0),
                  coalesce(sum(CASE WHEN n.key IS NULL THEN length(v.vector) END), 0)
                FROM vectors v JOIN specs s ON s.prefix = substr(v.key, 1, {PREFIX_BYTES})
                LEFT JOIN temp.needed n ON n.key = v.key
                GROUP BY s.prefix ORDER BY s.model, s.size, s.base_url"""  # noqa: S608 - a constant
        )
        return [
            Stored(EmbeddingSpec(str(url), str(model), int(str(size))), *(int(str(one)) for one in counts))
            for url, model, size, *counts in rows
        ]

    def prune(self, plans: Sequence[Path]) -> int:
        """Remove what no plan needs, all or nothing; returns how many. Nobody else may use the vectors meanwhile."""
        with self.alone():
            self._note_needed(plans)
            with self._transaction():
                sql = "DELETE FROM vectors WHERE key NOT IN (SELECT key FROM temp.needed)"
                return self._db.execute(sql).rowcount

    def give_back_room(self) -> bool:
        """Shrink the file to what it holds; False where the disk has no room for the copy that this takes."""
        path = self._files[-1]
        # The copy and the log that it goes through (https://www.sqlite.org/lang_vacuum.html).
        if free_bytes(path) < 2 * path.stat().st_size:
            return False
        with self.alone(), self._guarded():
            self._db.execute(f"VACUUM {self._bought_schema}")
            self._db.execute(f"PRAGMA {self._bought_schema}.wal_checkpoint(TRUNCATE)")
        return True

    def _note_needed(self, plans: Sequence[Path]) -> None:
        with self._guarded():
            self._db.execute("DROP TABLE IF EXISTS temp.needed")
            self._db.execute("CREATE TEMP TABLE needed (key BLOB PRIMARY KEY) WITHOUT ROWID")
            self._db.execute("INSERT OR IGNORE INTO temp.needed SELECT key FROM main.memories")
        for plan in plans:
            if plan != self.path:
                self._note_plan(plan)

    def _note_plan(self, plan: Path) -> None:
        with self._guarded():
            self._db.execute("ATTACH DATABASE ? AS other", [str(plan)])
        try:
            found = tuple(self._number(f"PRAGMA other.{name}") for name in ("application_id", "user_version"))
            if found != (APPLICATION_ID, FORMAT_VERSION):
                raise SpoolDamaged(
                    f"{plan} is no plan of this version of the tool: what it needs cannot be told, nothing is removed",
                    next_step=f"move it away and run again:  mv {quote(str(plan))} {quote(str(plan) + '.old')}",
                )
            with self._guarded():
                self._db.execute("INSERT OR IGNORE INTO temp.needed SELECT key FROM other.memories")
        finally:
            with self._guarded():
                self._db.execute("DETACH DATABASE other")
