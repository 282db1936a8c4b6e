"""The SQLite files behind the embedding cache: schema, durable transactions, errors; and `--prune-spool`."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import orjson

from lib.dimensions import EmbeddingSpec
from lib.errors import GuardRefused, MigrationError
from lib.files import UsedFile, free_bytes, private_dir, private_file, sync_dir
from lib.journal import open_journals

# "AMSP" in the header of the file distinguishes a cache from any other SQLite file.
APPLICATION_ID = 0x414D5350
FORMAT_VERSION = 1
BUSY_SECONDS = 30
PREFIX_BYTES = 4  # of a key: endpoint, model and size
_LOG_BYTES = 1 << 20  # with less, SQLite may be unable to make its log's index, and reports an I/O error
VALUES_AT_ONCE = 500  # SQLite builds allow 999 bound values or more (https://www.sqlite.org/limits.html)

# Vectors are shared by all graphs and collections of this machine. A plan and saved points belong to one of them.
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

_Item = TypeVar("_Item")


class CacheDamaged(MigrationError):
    """The cache's file cannot be read or written, or is of another kind."""


class CacheFile:
    """The open files. One connection, used by the thread that opened it; SQLite allows one writer at a time.

    `path` is the plan, created if it is missing (0600 in a 0700 folder). The vectors are in `vectors.sqlite3` in the
    same folder, which all plans share. Raises CacheDamaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.vectors_path = path, path.with_name("vectors.sqlite3")
        private_dir(path.parent)
        for file in (self.path, self.vectors_path):
            new = not file.exists()
            private_file(file)
            if new:
                sync_dir(file.parent)  # SQLite syncs what it writes, not the name of the file
        # Held until close, not for each statement: vectors that a run relies on must not be pruned meanwhile.
        self.used_vectors = UsedFile(self.vectors_path.with_name(self.vectors_path.name + ".lock"))
        self.db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            with self.guarded():
                self.db.execute("ATTACH DATABASE ? AS shared", [str(self.vectors_path)])
                self._prepare("main", path, _PLAN_TABLES)
                self._prepare("shared", self.vectors_path, _VECTOR_TABLES)
        except BaseException:
            self.close()
            raise

    def _prepare(self, schema: str, path: Path, tables: str) -> None:
        count_tables = f"SELECT count(*) FROM {schema}.sqlite_master"  # noqa: S608 - a name of ours
        empty = self.number(count_tables) == 0
        # No cache has a view or a trigger. A foreign one would run its own SQL, which may never end.
        foreign = self.number(f"{count_tables} WHERE type NOT IN ('table', 'index') OR sql LIKE 'CREATE VIRTUAL%'")
        if foreign or (not empty and not self.is_of_this_version(schema, path)):
            step = f"move it away, then run the same command again:\n{moved(path, '.old')}"
            raise CacheDamaged(f"{path} is not an embedding cache of this version of the tool", next_step=step)
        self.db.execute(f"PRAGMA {schema}.journal_mode = WAL")
        # In WAL mode, FULL alone makes a commit survive a power cut. On macOS an fsync stops at the drive's cache
        # without the others (https://www.sqlite.org/pragma.html#pragma_synchronous, #pragma_fullfsync).
        self.db.execute(f"PRAGMA {schema}.synchronous = FULL")
        self.db.execute("PRAGMA fullfsync = ON")
        self.db.execute("PRAGMA checkpoint_fullfsync = ON")
        if empty:
            with self.transaction():
                if self.number(count_tables):
                    return  # another process created them meanwhile
                for statement in tables.format(schema=schema).split(";"):
                    self.db.execute(statement)
                self.db.execute(f"PRAGMA {schema}.application_id = {APPLICATION_ID}")
                self.db.execute(f"PRAGMA {schema}.user_version = {FORMAT_VERSION}")

    def is_of_this_version(self, schema: str, path: Path) -> bool:
        """Whether an attached file is a cache in the format of this version. Raises CacheDamaged for a newer one."""
        maker, version = (self.number(f"PRAGMA {schema}.{name}") for name in ("application_id", "user_version"))
        if maker == APPLICATION_ID and version > FORMAT_VERSION:
            raise CacheDamaged(
                f"{path} is of format {version}, this version reads up to {FORMAT_VERSION}",
                next_step="use the version of these scripts that made it, or a newer one: without it every text is"
                " paid for again",
            )
        return (maker, version) == (APPLICATION_ID, FORMAT_VERSION)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn an error of SQLite about the file into CacheDamaged."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if isinstance(error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
                raise  # a bug in this program
            damaged = self.path if isinstance(error, sqlite3.OperationalError) else self._damaged()
            cost = "its vectors are paid for again" if damaged == self.vectors_path else "no vector is paid for again"
            folder, again = quote(str(self.path.parent)), "then run the same command again"
            why = str(error)
            if "I/O" in why and free_bytes(self.path.parent) < _LOG_BYTES:
                why += ": its disk is full"
            if "full" in why:
                step = f"free some room:\ndf -h {folder}\n{again}"
            elif "locked" in why:
                step = (
                    f"another process holds it: wait until it has ended, {again}\n"
                    "if there is none, its disk cannot lock files: name a folder on a local disk with --backup-dir"
                )
            elif "I/O" in why:  # also if the disk cannot map a file, which SQLite's log needs
                step = f"look at its disk, and name a folder on a local one with --backup-dir:\ndf -T {folder}"
            elif isinstance(error, sqlite3.OperationalError):  # permissions, a read-only disk
                step = f"make it writable again, {again}:\nls -l {folder}"
            else:  # only if SQLite reports damage, vectors that were paid for are given up
                step = f"move it away, {again}; {cost}:\n{moved(damaged, '.damaged')}"
            raise CacheDamaged(f"the embedding cache {damaged} cannot be used: {why}", next_step=step) from error

    def _damaged(self) -> Path:
        """The file that is damaged: SQLite's error does not name it. `prune_cache` reads the other plans, too."""
        for path in (self.path, self.vectors_path, *sorted(self.path.parent.glob("*.sqlite3"))):
            with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as db:
                if db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
                    continue
            return path
        return self.path

    def decoded(self, payload: bytes) -> Any:
        """Decode a payload of the plan. Raises CacheDamaged: SQLite itself notices no damage within a row."""
        try:
            return orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            with self.guarded():
                raise sqlite3.DatabaseError(f"it holds a payload that is not JSON ({error})") from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, on the disk when the block ends. Raises CacheDamaged."""
        with self.guarded():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query. Raises CacheDamaged."""
        with self.guarded():
            return self.db.execute(sql, values).fetchall()

    def rows_in(self, sql: str, items: Iterable[object], before: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a query that ends with `IN`, for any number of `items`; `before`: the values left of it."""
        for part in chunks(items, VALUES_AT_ONCE):
            yield from self.rows(f"{sql} ({marks(part)})", [*before, *part])

    def number(self, sql: str, values: Sequence[object] = ()) -> int:
        """The number that a query returns."""
        return int(self.rows(sql, values)[0][0] or 0)

    def get_meta(self, name: str) -> str | None:
        """The text stored under `name`, or None."""
        rows = self.rows("SELECT value FROM meta WHERE name = ?", [name])
        return str(rows[0][0]) if rows else None

    def set_meta(self, name: str, value: str) -> None:
        """Store a text, replacing the one before; on the disk when it returns."""
        with self.transaction():
            self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [name, value])

    def size_bytes(self) -> int:
        """Bytes on the disk, the write-ahead logs included."""
        files = [Path(f"{file}{ending}") for file in (self.path, self.vectors_path) for ending in ("", "-wal")]
        return sum(each.stat().st_size for each in files if each.exists())

    def require_room(self, texts: int, size: int) -> None:
        """Raise MigrationError if the disk has no room for `texts` more vectors of `size` dimensions."""
        needed, free = room_of(texts, size), free_bytes(self.vectors_path)
        if needed > free:
            raise MigrationError(
                f"no room for {texts:,} embeddings of {size}d: they need {needed / 2**20:,.0f} MiB below"
                f" {self.vectors_path.parent}, {free / 2**20:,.0f} MiB are free; what does not fit is not embedded",
                next_step="free some room, or name a folder on a larger disk with --backup-dir:\n"
                f"df -h {quote(str(self.vectors_path.parent))}\nthen run the same command again",
            )

    def close(self) -> None:
        """Fold the log into the file and close it."""
        self.db.close()
        self.used_vectors.close()

    def __exit__(self, *_: object) -> None:
        self.close()


_PAGE_BYTES = 4096  # SQLite's default
_ROW_BYTES = 100  # of a row but for its vector: key, checksum, headers, and the key in the index
_LOG_BYTES = 8 << 20  # the log is folded into the file each 1,000 pages (4 MB)
_MOST_LOGGED = 3200  # texts that one transaction may bring into the log: all that are in flight


def room_of(texts: int, size: int) -> int:
    """The most bytes that `texts` vectors of `size` dimensions add to the file and its log."""
    row = 4 * size + _ROW_BYTES
    on_disk = row + min(row, _PAGE_BYTES)  # a page that has no room for another row stays partly empty
    return (texts + min(texts, _MOST_LOGGED)) * on_disk + _LOG_BYTES if texts else 0


def chunks(items: Iterable[_Item], size: int = VALUES_AT_ONCE) -> Iterator[list[_Item]]:
    """Yield the items in lists of `size`; the last one may be shorter, none is empty. Items are read as needed."""
    left = iter(items)
    while part := list(islice(left, size)):
        yield part


def marks(items: Sequence[object]) -> str:
    """As many `?` as items."""
    return ",".join("?" * len(items))


def moved(path: Path, ending: str) -> str:
    """The shell command that renames a file."""
    return f"mv {quote(str(path))} {quote(str(path) + ending)}"


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


def prune_cache(cache: CacheFile, folder: Path, *, dry_run: bool) -> Pruned:
    """Delete what no plan needs, or (`dry_run`) only count it.

    A plan is the last scan of a graph and collection; it needs the vectors of its memories. Raises GuardRefused while a
    run is unfinished, CacheDamaged if a plan cannot be read, LockHeld if another process uses the vectors.
    """
    own = {cache.path, cache.vectors_path}
    plans = [one for one in sorted(cache.path.parent.glob("*.sqlite3")) if one not in own]
    before = cache.size_bytes()
    if not dry_run:
        _require_no_open_run(folder)
    stored = _stored(cache, plans)
    if dry_run or not any(one.unneeded for one in stored):
        return Pruned(stored, 0, before, before, shrunk=False)
    with cache.used_vectors.alone():
        _note_needed(cache, plans)
        with cache.transaction():
            sql = "DELETE FROM vectors WHERE key NOT IN (SELECT key FROM temp.needed)"
            removed = cache.db.execute(sql).rowcount
    # The copy and the log that it goes through (https://www.sqlite.org/lang_vacuum.html).
    shrunk = free_bytes(cache.vectors_path) >= 2 * cache.vectors_path.stat().st_size
    if shrunk:
        with cache.used_vectors.alone(), cache.guarded():
            cache.db.execute("VACUUM shared")
            cache.db.execute("PRAGMA shared.wal_checkpoint(TRUNCATE)")
    return Pruned(stored, removed, before, cache.size_bytes(), shrunk)


def _require_no_open_run(folder: Path) -> None:
    for journal in open_journals(folder):
        step = "finish it, or give it up with --abort"
        if again := journal.fact("again"):
            step += f":\n{again}"
        if journal.undo:
            step += f"\nor undo it:\n{journal.undo}"
        text = f"a run is unfinished ({journal.path.name}): it may need what would be deleted"
        raise GuardRefused(text, next_step=step)


def _stored(cache: CacheFile, plans: Sequence[Path]) -> list[Stored]:
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


def _note_needed(cache: CacheFile, plans: Sequence[Path]) -> None:
    """Fill the table `temp.needed` with the keys of all plans."""
    with cache.guarded():
        cache.db.execute("DROP TABLE IF EXISTS temp.needed")
        cache.db.execute("CREATE TEMP TABLE needed (key BLOB PRIMARY KEY) WITHOUT ROWID")
        cache.db.execute("INSERT OR IGNORE INTO temp.needed SELECT key FROM main.memories")
        for plan in plans:
            cache.db.execute("ATTACH DATABASE ? AS other", [str(plan)])
            try:
                if not cache.is_of_this_version("other", plan):
                    raise CacheDamaged(
                        f"{plan} is no plan of this version of the tool: what it needs is unknown, nothing is removed",
                        next_step=f"move it away, then run the same command again:\n{moved(plan, '.old')}",
                    )
                cache.db.execute("INSERT OR IGNORE INTO temp.needed SELECT key FROM other.memories")
            finally:
                cache.db.execute("DETACH DATABASE other")
