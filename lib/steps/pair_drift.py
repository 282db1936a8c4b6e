"""How far the two halves of a set are apart: ids on one side only, compared on disk rather than in memory."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType

import redis

from lib.backup_set.manifest import Drift
from lib.graph.read import iter_memories
from lib.steps.pages import pages
from lib.steps.payloads import PointId, point_id, unusable
from lib.steps.present import as_text, temporary_room

_EXAMPLES = 20
_PAGE = 2000
_GRAPH, _POINTS = "graph_ids", "point_ids"


def ids_for_points(conn: redis.Redis, graph: str) -> Iterator[PointId]:
    """The ids of the memories that should have a point."""
    for node in iter_memories(conn, graph, keys=("id", "content")):
        identity = point_id(node.properties.get("id"))
        if identity is not None and not unusable(node.properties):
            yield identity


class PairIds:
    """The ids of both halves in SQLite's own temporary file, gone when closed; each half may tell from its thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        with temporary_room():
            for table in (_GRAPH, _POINTS):
                self._db.execute(f"CREATE TABLE {table} (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def __enter__(self) -> PairIds:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def read_graph(self, conn: redis.Redis, graph: str) -> None:
        """Take the graph's ids, once: of several sources the first counts."""
        self._put(_GRAPH, map(as_text, ids_for_points(conn, graph)))

    def take_points(self, ids: Iterable[str]) -> None:
        """Take the collection's ids, one text each."""
        self._put(_POINTS, ids)

    @property
    def has_graph(self) -> bool:
        """Whether the graph's ids are here."""
        return _GRAPH in self._told

    @property
    def has_points(self) -> bool:
        """Whether the collection's ids are here."""
        return _POINTS in self._told

    def drift(self) -> Drift:
        """Memories without a point, points without a memory, with examples."""
        missing, left = self._only(_GRAPH, _POINTS), self._only(_POINTS, _GRAPH)
        return Drift(missing[0], left[0], missing[1], left[1])

    def _put(self, table: str, ids: Iterable[str]) -> None:
        for page in pages(((one,) for one in ids), _PAGE):
            with self._lock, temporary_room():
                self._db.execute("BEGIN")
                self._db.executemany(f"INSERT OR IGNORE INTO {table} VALUES (?)", page)  # noqa: S608 - a constant
                self._db.execute("COMMIT")
        self._told.add(table)

    def _only(self, table: str, other: str) -> tuple[int, list[str]]:
        where = f"FROM {table} t WHERE NOT EXISTS (SELECT 1 FROM {other} o WHERE o.id = t.id)"  # noqa: S608 - constants
        with temporary_room():
            number = int(self._db.execute(f"SELECT count(*) {where}").fetchone()[0])
            rows = self._db.execute(f"SELECT t.id {where} ORDER BY t.id LIMIT {_EXAMPLES}").fetchall()
        return number, [text for (text,) in rows]
