"""The file of the embedding cache: one private SQLite database that survives kill -9 and power loss."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from lib.dimensions import EmbeddingSpec
from lib.errors import MigrationError
from lib.files import UsedFile, free_bytes, private_dir, private_file, sync_dir

if TYPE_CHECKING:
    from typing_extensions import Self

APPLICATION_ID = (
    0x414D5350  # "AMSP" in the file's header: tells an embedding cache from any other SQLite file
)
FORMAT_VERSION = 1
BUSY_SECONDS = 30
_PAGE_BYTES = 4096  # SQLite's default
_LOCAL_BYTES = (
    512  # of a row that continues on overflow pages (https://www.sqlite.org/fileformat2.html#cell_payload)
)
_INDEX_BYTES = 64  # of a key in the index
_LOG_BYTES = 8 << 20  # the log is folded into the file each 1,000 pages (4 MB)
_MOST_LOGGED = 3200  # texts that one transaction may bring into the log: all that are in flight
VALUES_AT_ONCE = 500  # SQLite builds allow 999 bound values or more (https://www.sqlite.org/limits.html)

# What is bought belongs to every graph and collection of this machine, what was read belongs to one.
_VECTOR_TABLES = """
CREATE TABLE {schema}.specs (
    prefix BLOB PRIMARY KEY, base_url TEXT NOT NULL, model TEXT NOT NULL, size INTEGER NOT NULL);
CREATE TABLE {schema}.vectors (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, vector BLOB NOT NULL)
"""
_PLAN_TABLES = """
CREATE TABLE {schema}.meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE {schema}.memories (
    id INTEGER PRIMARY KEY, point_id TEXT NOT NULL UNIQUE, node_id INTEGER NOT NULL, key BLOB NOT NULL,
    content TEXT NOT NULL, payload BLOB NOT NULL, tokens INTEGER NOT NULL, scan INTEGER NOT NULL);
CREATE INDEX {schema}.memories_by_key ON memories (key, id);
CREATE TABLE {schema}.kept_points (
    id INTEGER PRIMARY KEY, point_id TEXT NOT NULL UNIQUE, payload BLOB NOT NULL, vector BLOB)
"""
_MAIN, _BOUGHT = "main", "bought"

_Item = TypeVar("_Item")


class CacheDamaged(MigrationError):
    """The embedding cache's file cannot be read, is of another kind, or its disk is full."""


class CacheFile:
    """The open database. One connection, used by the thread that opened it; at most one writer at a time.

    Args:
        path: made where missing (0600, its folder 0700), with SQLite's `-wal` and `-shm` beside it while open.
        vectors: a file for what was bought, shared by several embedding cache; None: kept in `path` too.
        read_only: for a second connection that reads while another writes.
    """

    def __init__(self, path: Path, *, vectors: Path | None = None, read_only: bool = False) -> None:
        self.path = path
        self._files = [path] if vectors is None else [path, vectors]
        self._bought_schema = _MAIN if vectors is None else _BOUGHT
        self.vectors_path = vectors or path
        self._read_only = read_only
        for file in [] if read_only else self._files:
            private_dir(file.parent)
            new = not file.exists()
            private_file(file)
            for ending in ("-wal", "-shm"):
                private_file(file.with_name(file.name + ending), create=False)
            if new:
                sync_dir(file.parent)  # SQLite syncs what it writes, not the name of the file
        # Through the run's end, not for each statement: what a run relies on must not be pruned under it.
        self._used = UsedFile(self.vectors_path.with_name(self.vectors_path.name + ".lock"))
        self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            with self._guarded():
                self._open(vectors)
        except BaseException:
            self.close()
            raise

    def _open(self, vectors: Path | None) -> None:
        if vectors is None:
            self._prepare(_MAIN, self.path, _VECTOR_TABLES + ";" + _PLAN_TABLES)
        else:
            self._db.execute(f"ATTACH DATABASE ? AS {_BOUGHT}", [str(vectors)])
            self._prepare(_MAIN, self.path, _PLAN_TABLES)
            self._prepare(_BOUGHT, vectors, _VECTOR_TABLES)
        if self._read_only:
            self._db.execute("PRAGMA query_only = ON")

    def _prepare(self, schema: str, path: Path, tables: str) -> None:
        found = tuple(self._number(f"PRAGMA {schema}.{name}") for name in ("application_id", "user_version"))
        tables_there = f"SELECT count(*) FROM {schema}.sqlite_master"  # noqa: S608 - a name of ours
        empty = self._number(tables_there) == 0
        # A view or a trigger, which no embedding cache has, runs what it holds: it may never end.
        foreign = self._number(
            f"{tables_there} WHERE type NOT IN ('table', 'index') OR sql LIKE 'CREATE VIRTUAL%'"
        )
        if foreign or (not empty and found != (APPLICATION_ID, FORMAT_VERSION)):
            raise CacheDamaged(
                f"{path} is not an embedding cache of this version of the tool",
                next_step=f"move it away and run again:  mv {quote(str(path))} {quote(str(path) + '.old')}",
            )
        if self._read_only:
            return
        self._db.execute(f"PRAGMA {schema}.journal_mode = WAL")
        # In WAL mode, FULL alone makes a commit survive a power cut (https://www.sqlite.org/pragma.html#pragma_synchronous).
        self._db.execute(f"PRAGMA {schema}.synchronous = FULL")
        # On macOS an fsync stops at the drive's cache without these (https://www.sqlite.org/pragma.html#pragma_fullfsync).
        self._db.execute("PRAGMA fullfsync = ON")
        self._db.execute("PRAGMA checkpoint_fullfsync = ON")
        if empty:
            with self._transaction():
                if self._number(tables_there):
                    return  # another run on another target made them meanwhile
                for statement in tables.format(schema=schema).split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA {schema}.application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA {schema}.user_version = {FORMAT_VERSION}")

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn what SQLite says about the file into an error with a next step."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if isinstance(error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
                raise  # a fault of this program, not of the file
            raise CacheDamaged(
                f"the embedding cache {self.path} cannot be used: {error}", next_step=self._remedy(error)
            ) from error

    def _remedy(self, error: sqlite3.DatabaseError) -> str:
        """What helps; to give up what was paid for only where SQLite says that the file is damaged."""
        file, folder = str(self.path), self.path.parent
        if "full" in str(error):
            return f"make room on the disk of {folder}, then run the same command again"
        if "locked" in str(error):
            return "another process holds it: wait until it has ended, then run the same command again"
        if isinstance(error, sqlite3.OperationalError):  # rights, a disk mounted read-only, an I/O error
            return f"ls -l {quote(str(folder))}   and make it writable again, then run the same command again"
        return (
            "move it away and run again (its vectors are paid for again):  "
            f"mv {quote(file)} {quote(file + '.damaged')}"
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, on the disk when the block ends. Raises CacheDamaged."""
        with self._guarded():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple[object, ...]]:
        with self._guarded():
            return self._db.execute(sql, values).fetchall()

    def _number(self, sql: str, values: Sequence[object] = ()) -> int:
        with self._guarded():
            return int(self._db.execute(sql, values).fetchone()[0] or 0)

    def get_meta(self, name: str) -> str | None:
        """The fact stored under `name`, or None."""
        rows = self._rows("SELECT value FROM meta WHERE name = ?", [name])
        return str(rows[0][0]) if rows else None

    def set_meta(self, name: str, value: str) -> None:
        """Store a fact, replacing the one before."""
        with self._transaction():
            self._put_meta(name, value)

    def _put_meta(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [name, value])

    def size_bytes(self) -> int:
        """Bytes on the disk, SQLite's logs beside the files included."""
        files = [file.with_name(file.name + ending) for file in self._files for ending in ("", "-wal")]
        return sum(each.stat().st_size for each in files if each.exists())

    def require_room(self, texts: int, size: int) -> None:
        """Raise MigrationError if the disk has no room for so many more vectors of this size."""
        needed, free = room_of(texts, size), free_bytes(self.vectors_path)
        if needed > free:
            raise MigrationError(
                f"no room for {texts:,} embeddings of {size}d: they need {needed / 2**20:,.0f} MiB below"
                f" {self.vectors_path.parent}, {free / 2**20:,.0f} MiB are free; what does not fit is not bought",
                next_step=f"df -h {quote(str(self.vectors_path.parent))}   and free some room, or name a larger"
                " disk with --backup-dir, then run the same command again",
            )

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Nobody else uses the vectors during the block. Raises LockHeld."""
        return self._used.alone()

    def close(self) -> None:
        """Fold the log into the file and close it."""
        self._db.close()
        self._used.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def room_of(texts: int, size: int) -> int:
    """The most bytes that so many vectors of this size add to the file, its log included."""
    row = 4 * size + 36
    if row <= _PAGE_BYTES - 35:
        on_disk = _PAGE_BYTES // ((_PAGE_BYTES - 35) // row)
    else:
        on_disk = -(-(row - _LOCAL_BYTES) // (_PAGE_BYTES - 4)) * _PAGE_BYTES + _LOCAL_BYTES
    logged = min(texts, _MOST_LOGGED)
    return (texts + logged) * (on_disk + _INDEX_BYTES) + _LOG_BYTES if texts else 0


def chunks(items: Sequence[_Item], size: int = VALUES_AT_ONCE) -> Iterator[Sequence[_Item]]:
    """`items` in slices small enough to bind to one statement."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def marks(items: Sequence[object]) -> str:
    """As many `?` as items."""
    return ",".join("?" * len(items))


PREFIX_BYTES = 4  # of a key: endpoint, model and size


@dataclass(frozen=True)
class Stored:
    """The vectors of one endpoint, model and size: all of them, and those that no plan needs, with their bytes."""

    spec: EmbeddingSpec
    vectors: int
    unneeded: int
    unneeded_bytes: int


class Pruning(CacheFile):
    """What is needed is what the plans name: each memory of their last scan, for their model and size."""

    def stored(self, plans: Sequence[Path]) -> list[Stored]:
        """Count by endpoint, model and size. Raises CacheDamaged where one of the `plans` cannot be read."""
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
                raise CacheDamaged(
                    f"{plan} is no plan of this version of the tool: what it needs cannot be told, nothing is removed",
                    next_step=f"move it away and run again:  mv {quote(str(plan))} {quote(str(plan) + '.old')}",
                )
            with self._guarded():
                self._db.execute("INSERT OR IGNORE INTO temp.needed SELECT key FROM other.memories")
        finally:
            with self._guarded():
                self._db.execute("DETACH DATABASE other")
