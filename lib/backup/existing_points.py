"""Ids, with or without payloads, in a temporary table on disk, compared by id."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from shlex import quote
from typing import Any

import orjson

from lib.backup.payloads import PointId
from lib.clients.embeddings.cache_file import chunks, marks
from lib.clients.qdrant.points import scroll
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import read_ahead
from lib.errors import MigrationError

_PAGE = 1000
_DIGITS = 20  # of the largest number that can be a point's id


def as_id(text: str) -> PointId:
    """The id that `str` made this text of: a number, or any text, such as a UUID."""
    is_number = text.isdecimal() and len(text) <= _DIGITS and str(int(text)) == text
    return int(text) if is_number else text


@contextlib.contextmanager
def room_or_error() -> Iterator[None]:
    """Report a temporary table that outgrew its disk as a MigrationError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise MigrationError(
            f"the temporary folder has no room for the ids of the collection: {error}",
            next_step=f"free some room there:\ndf -h {quote(tempfile.gettempdir())}\n"
            "or name a folder on a larger disk:\nexport SQLITE_TMPDIR=...",
        ) from error


class TemporaryIdTable(contextlib.AbstractContextManager["TemporaryIdTable"]):
    """Ids with payloads in SQLite's own temporary file, which is deleted when the table is closed or collected.

    Ids are stored as text, because SQLite's integers end at 2^63. One thread at a time may use it.
    """

    def __init__(self) -> None:
        self.complete = False  # whether `fill` has read all its ids
        self._db = sqlite3.connect("", check_same_thread=False)
        with room_or_error():
            self._db.execute("CREATE TABLE points (id TEXT PRIMARY KEY, payload BLOB) WITHOUT ROWID")

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def fill(self, ids: Iterable[PointId]) -> None:
        """Replace what is here by these ids."""
        self._db.execute("DELETE FROM points")
        self.complete = False
        for page in chunks(ids, _PAGE):
            self.put((one, None) for one in page)
        self.complete = True

    def put(self, rows: Iterable[tuple[PointId, dict[str, Any] | None]]) -> None:
        """Add ids; a known one gets the new payload."""
        texts = ((str(one), None if payload is None else orjson.dumps(payload)) for one, payload in rows)
        with room_or_error(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO points VALUES (?, ?)", texts)

    def payloads(self, ids: Sequence[PointId]) -> dict[PointId, dict[str, Any]]:
        """Return those of `ids` that are here, with their payloads."""
        found: dict[PointId, dict[str, Any]] = {}
        for part in chunks([str(one) for one in ids]):
            sql = f"SELECT id, payload FROM points WHERE id IN ({marks(part)})"  # noqa: S608 - only question marks
            for text, payload in self._db.execute(sql, part):
                found[as_id(text)] = orjson.loads(payload) if payload else {}
        return found

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM points").fetchone()[0])

    def ids(self) -> Iterator[list[PointId]]:
        """Yield all ids, in pages, ordered as text."""
        last = ""
        while True:
            page = self._db.execute("SELECT id FROM points WHERE id > ? ORDER BY id LIMIT ?", (last, _PAGE)).fetchall()
            if not page:
                return
            last = page[-1][0]
            yield [as_id(text) for (text,) in page]


def existing_points(qdrant: Qdrant, collection: str, *, payload: bool = True) -> TemporaryIdTable:
    """Read every point of a collection by one ordered scroll."""
    table = TemporaryIdTable()
    for page in read_ahead(scroll(qdrant, collection, payload=payload)):
        table.put((point.id, point.payload) for point in page)
    return table


def orphan_ids(
    existing: TemporaryIdTable, planned: Callable[[Sequence[PointId]], Collection[PointId]]
) -> Iterator[PointId]:
    """Yield the existing ids that are not planned. `planned` returns those of a page that are."""
    for page in existing.ids():
        known = planned(page)
        yield from (one for one in page if one not in known)
