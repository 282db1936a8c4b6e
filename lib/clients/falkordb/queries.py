"""Read a graph: values as JSON, results page by page, memories, counts, definitions. Nothing is written."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import redis

from lib.clients.falkordb.connection import command, place, translated
from lib.errors import MissingData, StoreFailed

NULL, STRING, INTEGER, BOOLEAN, DOUBLE, ARRAY, MAP, POINT, VECTOR = 1, 2, 3, 4, 5, 6, 10, 11, 12
DATETIME, DATE, TIME, DURATION = 13, 14, 15, 16
# The key under which a text, or a list of texts, is given whose bytes are no UTF-8; a property is never a map.
NOT_UTF8 = "not UTF-8"
# The key under which a vector, or a list of vectors, is given: JSON could not tell them from lists of doubles.
VECF32 = "vecf32"
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - FalkorDB's times have no zone


def plain_value(cell: list[Any]) -> Any:
    """A compact value as JSON has it; times as ISO 8601, in UTC.

    `{NOT_UTF8: ...}` with U+FFFD for unreadable text, `{VECF32: ...}` for vectors: see `plain`.

    Raises StoreFailed for a type that no property has.
    """
    readable = [True]
    value = _plain(cell, readable)
    if _has_float32s(cell):
        return {VECF32: value}
    return value if readable[0] else {NOT_UTF8: value}


def unreadable(value: object) -> bool:
    """Whether `plain_value` marked this value as text that is not UTF-8."""
    return isinstance(value, dict) and value.keys() == {NOT_UTF8}


def is_vector(value: object) -> bool:
    """Whether `plain_value` marked this value as a vector, or as a list of them."""
    return isinstance(value, dict) and value.keys() == {VECF32}


def plain(value: Any) -> Any:
    """A property's value without the mark that `plain_value` may have put on it."""
    return next(iter(value.values())) if is_vector(value) or unreadable(value) else value


def shortest_float32(number: float) -> float:
    """The double with the fewest digits that is the same 32-bit float."""
    try:
        wanted = struct.pack("f", number)
    except OverflowError:
        return number
    for digits in range(6, 10):
        short = float(f"{number:.{digits}g}")
        if struct.pack("f", short) == wanted:
            return short
    return number


def _has_float32s(cell: list[Any]) -> bool:
    kind, value = cell
    return kind == VECTOR or (kind == ARRAY and bool(value) and all(map(_has_float32s, value)))


def _plain(cell: list[Any], readable: list[bool]) -> Any:
    kind, value = cell
    if kind == STRING:
        return _text(value, readable)
    if kind == ARRAY:
        return [_plain(item, readable) for item in value]
    if kind == MAP:
        pairs = zip(value[::2], value[1::2], strict=True)
        return {_text(key, readable): _plain(item, readable) for key, item in pairs}
    if kind not in _SIMPLE:
        raise StoreFailed(
            f"the graph holds a value of a type (number {kind}) that is not known here",
            next_step="remove the property, or use a version of this tool that knows this FalkorDB",
        )
    return _SIMPLE[kind](value)


def _text(value: bytes, readable: list[bool]) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        readable[0] = False
        return value.decode("utf-8", "replace")


def _moment(seconds: int) -> datetime | None:
    try:
        return _EPOCH + timedelta(seconds=seconds)
    except OverflowError:
        return None  # a year that Python does not know


def _datetime(seconds: int) -> str:
    moment = _moment(seconds)
    return f"{moment.isoformat()}+00:00" if moment else str(seconds)


def _date(seconds: int) -> str:
    moment = _moment(seconds)
    return moment.date().isoformat() if moment else str(seconds)


def _time(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds % 86400)).time().isoformat()


def _duration(seconds: int) -> str:
    """ISO 8601, split as the server splits it: a calendar's years, months and days from 1970 on."""
    from dateutil.relativedelta import relativedelta  # type: ignore[import-untyped]

    moment = _moment(seconds)
    if moment is None:
        return f"PT{seconds}S"
    delta = relativedelta(moment, _EPOCH)
    days = [(delta.years, "Y"), (delta.months, "M"), (delta.days, "D")]
    times = [(delta.hours, "H"), (delta.minutes, "M"), (delta.seconds, "S")]
    day, clock = ("".join(f"{number}{unit}" for number, unit in part if number) for part in (days, times))
    return f"P{day}{'T' + clock if clock else ''}" if day or clock else "PT0S"


_SIMPLE: dict[int, Callable[[Any], Any]] = {
    NULL: lambda _value: None,
    INTEGER: int,
    BOOLEAN: lambda value: value == b"true",
    DOUBLE: float,
    POINT: lambda pair: dict(
        zip(("latitude", "longitude"), (shortest_float32(float(x)) for x in pair), strict=True)
    ),
    VECTOR: lambda numbers: [shortest_float32(float(number)) for number in numbers],
    DATETIME: _datetime,
    DATE: _date,
    TIME: _time,
    DURATION: _duration,
}


PAGE_ROWS = 2000
Row = list[Any]


@dataclass(frozen=True)
class Window:
    """One way to walk ids: `match` binds $low and $high, `more` finds whether anything lies at or above $low.

    `id_name` is what a window of one single id is called in the next, finer way.
    """

    match: str
    more: str
    id_name: str = ""


def nodes(label: str = "") -> list[Window]:
    """Nodes `n`, of `label` or all."""
    pattern = f"MATCH (n{':' + quoted(label) if label else ''})"
    return [Window(f"{pattern} WHERE id(n) >= $low AND id(n) < $high", f"{pattern} WHERE id(n) >= $low")]


def relationships() -> list[Window]:
    """Relationships `r` from `n` to `m`."""
    pattern, pair = "MATCH (n)-[r]->(m) WHERE", "id(n) = $source AND id(m) = $target"
    return [
        Window(f"{pattern} id(n) >= $low AND id(n) < $high", "MATCH (n) WHERE id(n) >= $low", "source"),
        Window(
            f"{pattern} id(n) = $source AND id(m) >= $low AND id(m) < $high",
            "MATCH (m) WHERE id(m) >= $low",
            "target",
        ),
        Window(
            f"{pattern} {pair} AND id(r) >= $low AND id(r) < $high", f"{pattern} {pair} AND id(r) >= $low"
        ),
    ]


def quoted(name: str) -> str:
    """A label or type for a query. FalkorDB's parser knows no way to write a backtick in one."""
    if "`" in name:
        raise StoreFailed(f"a name with a backtick cannot be asked for in a query: {name!r}")
    return f"`{name}`"


def raw_rows(conn: redis.Redis, graph: str, cypher: str, **numbers: int) -> list[Row]:
    """One read-only query's rows in the server's compact form: every value as [type, value], strings as bytes.

    Raises MissingData where the graph does not exist, StoreFailed.
    """
    bound = "".join(f"{name}={number} " for name, number in numbers.items())
    text = f"CYPHER {bound}{cypher}" if bound else cypher
    try:
        answer = command(conn, "GRAPH.RO_QUERY", graph, text, "--compact")
    except StoreFailed as error:
        raise missing_or(error, graph) from error
    with translated(place(conn)):
        return [list(row) for row in answer[1]] if len(answer) > 1 else []


def missing_or(error: StoreFailed, graph: str) -> MissingData | StoreFailed:
    """`error`, or MissingData where it says that the graph is not there."""
    return MissingData(f"graph '{graph}' does not exist") if "empty key" in str(error) else error


def single(conn: redis.Redis, graph: str, cypher: str) -> int:
    """The one number that a query returns."""
    return int(raw_rows(conn, graph, cypher)[0][0][1])


def row_cap(conn: redis.Redis, graph: str, rows: int) -> int:
    """How many of `rows` rows the server returns: fewer if RESULTSET_SIZE cuts the result."""
    return len(raw_rows(conn, graph, f"UNWIND range(1, {rows}) AS x RETURN x"))


def names(conn: redis.Redis, graph: str, procedure: str, column: str) -> list[str]:
    """All that a procedure such as db.labels() yields, in the order of the internal ids."""
    found: list[str] = []
    while True:
        page = f"CALL {procedure}() YIELD {column} RETURN {column} SKIP {len(found)} LIMIT {PAGE_ROWS}"
        rows = raw_rows(conn, graph, page)
        if not rows:
            return found
        found += [row[0][1].decode("utf-8", "backslashreplace") for row in rows]


def pages(
    conn: redis.Redis,
    graph: str,
    windows: Sequence[Window],
    returns: str,
    *,
    first: int = 0,
    size: int = PAGE_ROWS,
) -> Iterator[list[Row]]:
    """All rows of `returns`, from the id `first` on, in pages; windows ascend, the rows in one have no order."""
    walk = _Walk(conn, graph, f" RETURN {returns}", row_cap(conn, graph, 2) - 1)
    yield from walk.pages(windows, first, size, {})


@dataclass
class _Walk:
    conn: redis.Redis
    graph: str
    returns: str
    uncut: int  # the server is known to return so many rows, and one more, uncut
    span_limit: int = sys.maxsize  # what one window may span, once the server has cut a result

    def pages(
        self, windows: Sequence[Window], first: int, size: int, fixed: dict[str, int]
    ) -> Iterator[list[Row]]:
        window, low, span = windows[0], first, size
        while True:
            rows = self._rows(window, low, low + span, fixed)
            if rows is None and span > 1:
                span //= 2
                continue
            if rows is None:
                yield from self._finer(windows, low, size, fixed)
            elif rows:
                yield rows
            elif not self._more(window, low + span, fixed):
                return
            low, span = low + span, min(size, span * 2, self.span_limit)

    def _rows(self, window: Window, low: int, high: int, fixed: dict[str, int]) -> list[Row] | None:
        """A window's rows; None where the server has cut them, by number or by time."""
        try:
            rows = raw_rows(self.conn, self.graph, window.match + self.returns, low=low, high=high, **fixed)
        except StoreFailed as error:
            if "timed out" not in str(error).lower():
                raise
            return None
        if len(rows) > self.uncut:
            # A cut result looks like a whole one: only a longer result shows that this one was not cut.
            self.uncut = row_cap(self.conn, self.graph, 2 * len(rows) + 1) - 1
            if len(rows) > self.uncut:
                self.span_limit = max(1, self.uncut)
                return None
        return rows

    def _finer(
        self, windows: Sequence[Window], low: int, size: int, fixed: dict[str, int]
    ) -> Iterator[list[Row]]:
        if len(windows) == 1:
            raise StoreFailed(
                f"graph '{self.graph}': the server cuts even the smallest result (RESULTSET_SIZE or TIMEOUT)",
                next_step="raise them: GRAPH.CONFIG SET RESULTSET_SIZE 10000, GRAPH.CONFIG SET TIMEOUT 1000",
            )
        yield from self.pages(windows[1:], 0, size, {**fixed, windows[0].id_name: low})

    def _more(self, window: Window, low: int, fixed: dict[str, int]) -> bool:
        return bool(raw_rows(self.conn, self.graph, f"{window.more} RETURN 1 LIMIT 1", low=low, **fixed))


MEMORY_LABEL = "Memory"
IDS_PER_QUERY = 500
_INDEX_COLUMNS = ("label", "entitytype", "properties", "types", "options", "language", "stopwords")
_CONSTRAINT_COLUMNS = ("label", "entitytype", "type", "properties")


@dataclass(frozen=True)
class MemoryNode:
    """A node of label Memory: FalkorDB's own id, and the properties as Python values."""

    node_id: int
    properties: dict[str, object]


@dataclass(frozen=True)
class GraphCounts:
    """`labels` and `types` name only what has nodes or relationships; a node counts under each of its labels."""

    nodes: int
    relationships: int
    labels: dict[str, int]
    types: dict[str, int]


@dataclass(frozen=True)
class GraphSchema:
    """Definitions, comparable with ==: indexes and constraints sorted, names in the order of their internal ids."""

    indexes: list[dict[str, str]]
    constraints: list[dict[str, str]]
    labels: list[str]
    relationship_types: list[str]
    property_keys: list[str]


def read_rows(
    conn: redis.Redis, graph: str, cypher: str, params: Mapping[str, object] | None = None
) -> list[list[Any]]:
    """One read-only query's rows as Python values; at most the server's RESULTSET_SIZE of them.

    Raises MissingData, StoreFailed, StoreUnreachable, AccessRefused.
    """
    from falkordb.helpers import stringify_param_value

    bound = "".join(f"{name}={stringify_param_value(value)} " for name, value in (params or {}).items())
    rows = raw_rows(conn, graph, f"CYPHER {bound}{cypher}" if bound else cypher)
    return [[plain_value(cell) for cell in row] for row in rows]


def iter_memories(
    conn: redis.Redis, graph: str, *, after: int = -1, page: int = PAGE_ROWS, keys: Sequence[str] = ()
) -> Iterator[MemoryNode]:
    """Every memory whose node id is above `after`, by ascending node id; `page` ids are asked for at a time.

    `keys` are the only properties wanted (default: all); one that a memory lacks comes as None.
    Values are plain JSON, see `plain_value`. Doubles arrive with 15 digits, as FalkorDB prints them.
    """
    wanted = [f"n.{quoted(key)}" for key in keys]
    columns = ", ".join(["id(n)", *(wanted or ["properties(n)"])])
    named = [key.encode() for key in keys]
    for rows in pages(conn, graph, nodes(MEMORY_LABEL), columns, first=after + 1, size=page):
        for node_id, *cells in sorted(rows, key=_first_number):
            pairs = (
                [part for pair in zip(named, cells, strict=True) for part in pair] if keys else cells[0][1]
            )
            yield MemoryNode(node_id[1], _python_properties(pairs))


def _first_number(row: list[Any]) -> int:
    return int(row[0][1])


def _python_properties(pairs: list[Any]) -> dict[str, object]:
    cells = zip(pairs[::2], pairs[1::2], strict=True)
    return {key.decode("utf-8", "replace"): plain_value(cell) for key, cell in cells}


def existing_memory_ids(conn: redis.Redis, graph: str, ids: Sequence[str | int]) -> set[str | int]:
    """Those of `ids` that are the `id` property of some memory right now; compared exactly, types included."""
    query = f"MATCH (m:{MEMORY_LABEL}) WHERE m.id IN $ids RETURN DISTINCT m.id"
    found: set[str | int] = set()
    for start in range(0, len(ids), IDS_PER_QUERY):
        part = list(ids[start : start + IDS_PER_QUERY])
        found.update(row[0] for row in read_rows(conn, graph, query, {"ids": part}))
    return found


def counts(conn: redis.Redis, graph: str) -> GraphCounts:
    """Exact numbers: the server keeps them, so each is one short query whatever the size of the graph."""
    labels = {
        label: single(conn, graph, f"MATCH (n:{quoted(label)}) RETURN count(n)")
        for label in names(conn, graph, "db.labels", "label")
    }
    types = {
        kind: single(conn, graph, f"MATCH ()-[r:{quoted(kind)}]->() RETURN count(r)")
        for kind in names(conn, graph, "db.relationshipTypes", "relationshipType")
    }
    return GraphCounts(
        nodes=single(conn, graph, "MATCH (n) RETURN count(n)"),
        relationships=single(conn, graph, "MATCH ()-[r]->() RETURN count(r)"),
        labels={name: number for name, number in labels.items() if number},
        types={name: number for name, number in types.items() if number},
    )


def schema(conn: redis.Redis, graph: str) -> GraphSchema:
    """Indexes, constraints and names. An index's progress and statistics are no part of its definition.

    A constraint that FAILED (some node broke it) enforces nothing and is in no RDB: it is left out.
    """
    return GraphSchema(
        indexes=_definitions(conn, graph, "db.indexes", _INDEX_COLUMNS),
        constraints=_definitions(
            conn, graph, "db.constraints", _CONSTRAINT_COLUMNS, "WHERE status <> 'FAILED'"
        ),
        labels=names(conn, graph, "db.labels", "label"),
        relationship_types=names(conn, graph, "db.relationshipTypes", "relationshipType"),
        property_keys=names(conn, graph, "db.propertyKeys", "propertyKey"),
    )


def _definitions(
    conn: redis.Redis, graph: str, procedure: str, columns: Sequence[str], condition: str = ""
) -> list[dict[str, str]]:
    listed = ", ".join(columns)
    yielded = f"{listed}, status" if condition else listed
    rows = raw_rows(conn, graph, f"CALL {procedure}() YIELD {yielded} {condition} RETURN {listed}")
    found = [{column: _canonical(cell) for column, cell in zip(columns, row, strict=True)} for row in rows]
    return sorted(found, key=lambda definition: sorted(definition.items()))


def _canonical(cell: list[Any]) -> str:
    """A compact value as text that does not depend on the order in which properties were indexed."""
    kind, value = cell
    if kind == 6:  # an array
        return "[" + ", ".join(sorted(_canonical(item) for item in value)) + "]"
    if kind == 10:  # a map
        pairs = zip(value[::2], value[1::2], strict=True)
        return "{" + ", ".join(sorted(f"{key.decode()}: {_canonical(item)}" for key, item in pairs)) + "}"
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
