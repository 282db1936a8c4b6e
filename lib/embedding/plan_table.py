"""The plan in the spool: every embeddable memory as the last scan of the graph found it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lib.embedding.spool_file import SpoolFile, chunks, marks

_COLUMNS = "id, point_id, node_id, key, content, payload, tokens"
# Of several memories with one text the first stands for all; those whose vector is there are left out.
_DISTINCT = "FROM memories m WHERE NOT EXISTS (SELECT 1 FROM memories f WHERE f.key = m.key AND f.id < m.id)"
_MISSING = f"{_DISTINCT} AND NOT EXISTS (SELECT 1 FROM vectors v WHERE v.key = m.key)"  # noqa: S608 - constants


@dataclass(frozen=True)
class MemoryRow:
    """One memory of the graph: its point id, its node, and what its point should hold.

    `key` is the vector's key in the spool, `payload` the JSON of the graph's values, `tokens` those of
    the whole content.
    """

    point_id: str | int
    node_id: int
    key: bytes
    content: str
    payload: bytes
    tokens: int


@dataclass(frozen=True)
class TextRow:
    """A text to embed: `label` names it to the operator (the memory's id); `tokens` where they are counted."""

    key: bytes
    text: str
    label: str
    tokens: int = 0


@dataclass(frozen=True)
class Missing:
    """Distinct texts of the plan without a vector, and the tokens that they are billed for."""

    texts: int
    tokens: int


def stored_id(point_id: str | int) -> str:
    """A point id as TEXT: an unsigned 64-bit number does not fit SQLite's signed INTEGER."""
    return str(point_id)


def point_id_of(stored: object) -> str | int:
    """The point id again: a UUID is never all digits."""
    text = str(stored)
    return int(text) if text.isdigit() else text


class PlanTable(SpoolFile):
    """Scans replace the plan: what a scan did not see is gone when it ends."""

    def begin_scan(self) -> None:
        """Start a scan of the graph. One that never ended is simply replaced by the next."""
        self.set_meta("scan", str(self._scan() + 1))

    def _scan(self) -> int:
        return int(self.get_meta("scan") or 0)

    def put_memories(self, rows: Sequence[MemoryRow]) -> None:
        """Add or replace memories by point id, in one transaction."""
        scan = self._scan()
        with self._transaction():
            self._db.executemany(
                """INSERT INTO memories (point_id, node_id, key, content, payload, tokens, scan)
                   VALUES (?, ?, ?, ?, ?, ?, ?)
                   ON CONFLICT (point_id) DO UPDATE SET node_id = excluded.node_id, key = excluded.key,
                     content = excluded.content, payload = excluded.payload, tokens = excluded.tokens,
                     scan = excluded.scan""",
                (
                    (
                        stored_id(row.point_id),
                        row.node_id,
                        row.key,
                        row.content,
                        row.payload,
                        row.tokens,
                        scan,
                    )
                    for row in rows
                ),
            )

    def end_scan(self) -> int:
        """Drop the memories this scan did not see; returns how many."""
        with self._transaction():
            return self._db.execute("DELETE FROM memories WHERE scan < ?", [self._scan()]).rowcount

    def memory_count(self) -> int:
        """Memories of the plan."""
        return self._number("SELECT count(*) FROM memories")

    def memories(self, after: int = 0, page: int = 1000) -> Iterator[MemoryRow]:
        """Every memory of the plan, read page by page."""
        for _, row in self._pages("FROM memories m WHERE 1", after, page):
            yield row

    def sample(self, count: int) -> list[MemoryRow]:
        """Some memories of distinct texts, the same ones each time: keys are hashes, the first are like any others."""
        sql = f"SELECT {_COLUMNS} {_DISTINCT} ORDER BY m.key, m.id LIMIT ?"
        return [_memory_row(values) for values in self._rows(sql, [count])]

    def memories_of(self, point_ids: Sequence[str | int]) -> dict[str | int, MemoryRow]:
        """Those of `point_ids` that the plan knows."""
        found: dict[str | int, MemoryRow] = {}
        for part in chunks([stored_id(each) for each in point_ids]):
            sql = f"SELECT {_COLUMNS} FROM memories WHERE point_id IN ({marks(part)})"  # noqa: S608 - only marks
            for values in self._rows(sql, part):
                row = _memory_row(values)
                found[row.point_id] = row
        return found

    def scanned(self, point_ids: Sequence[str | int]) -> set[str | int]:
        """Those of `point_ids` that the current scan has put already."""
        found: set[str | int] = set()
        for part in chunks([stored_id(each) for each in point_ids]):
            sql = f"SELECT point_id FROM memories WHERE scan = ? AND point_id IN ({marks(part)})"  # noqa: S608 - only marks
            found.update(point_id_of(stored) for (stored,) in self._rows(sql, [self._scan(), *part]))
        return found

    def tokens_of(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """The tokens of those texts that the plan holds already."""
        found: dict[bytes, int] = {}
        for part in chunks(list(keys)):
            sql = f"SELECT key, tokens FROM memories WHERE key IN ({marks(part)})"  # noqa: S608 - only marks
            found.update(
                {key: int(str(count)) for key, count in self._rows(sql, part) if isinstance(key, bytes)}
            )
        return found

    def missing_rows(self, page: int = 500) -> Iterator[TextRow]:
        """Distinct texts of the plan that have no vector yet; vectors may be stored while this is read."""
        for _, row in self._pages(_MISSING, 0, page):
            yield TextRow(row.key, row.content, str(row.point_id), row.tokens)

    def missing_total(self) -> Missing:
        """How many texts `missing_rows` would give, and their tokens."""
        return self._total(_MISSING)

    def text_total(self) -> Missing:
        """How many distinct texts the plan has, whether or not they have vectors, and their tokens."""
        return self._total(_DISTINCT)

    def _total(self, source: str) -> Missing:
        rows = self._rows(
            f"SELECT count(*), coalesce(sum(CASE WHEN m.tokens > ? THEN ? ELSE m.tokens END), 0) {source}",
            self._most_tokens(),
        )
        return Missing(*(int(str(value)) for value in rows[0]))

    def _most_tokens(self) -> tuple[int, int]:
        """The most tokens that a text of this plan may have, and what it is cut to where it has more."""
        return 1 << 62, 1 << 62

    def _pages(self, source: str, after: int, page: int) -> Iterator[tuple[int, MemoryRow]]:
        # Each page is a statement of its own: no read transaction stays open while the caller works.
        sql = f"SELECT {_COLUMNS} {source} AND m.id > ? ORDER BY m.id LIMIT ?"
        while rows := self._rows(sql, [after, page]):
            for values in rows:
                after = int(str(values[0]))
                yield after, _memory_row(values)


def _memory_row(values: tuple[object, ...]) -> MemoryRow:
    _, point_id, node_id, key, content, payload, tokens = values
    assert isinstance(key, bytes)
    assert isinstance(payload, bytes)
    return MemoryRow(point_id_of(point_id), int(str(node_id)), key, str(content), payload, int(str(tokens)))
