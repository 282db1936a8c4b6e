"""Read a graph: values as JSON, results page by page, memories, counts, definitions. Nothing is written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import redis

from lib.clients.falkordb.connection import RAISE_TIME_LIMIT, name_text, read_commands, translated
from lib.errors import MissingData, StoreFailed

# The types of values in the server's compact form.
NULL, STRING, INTEGER, BOOLEAN, DOUBLE, ARRAY, MAP, POINT, VECTOR = 1, 2, 3, 4, 5, 6, 10, 11, 12
DATETIME, DATE, TIME, DURATION = 13, 14, 15, 16
# The key of a text, or of a list of texts, with bytes that are not UTF-8. No property is a map.
NOT_UTF8 = "not UTF-8"
# The key of a vector, or of a list of vectors, which JSON cannot distinguish from lists of doubles.
VECF32 = "vecf32"
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - FalkorDB's times have no zone
PAGE_ROWS = 2000
_MOST_ROWS = 20_000  # of a page, whatever the server returns: as Python objects, a relationship takes a kilobyte
Row = list[Any]
# One row each, which RESULTSET_SIZE does not cut: all names, in the order of their internal ids.
LABELS = "CALL db.labels() YIELD label RETURN collect(label)"
TYPES = "CALL db.relationshipTypes() YIELD relationshipType RETURN collect(relationshipType)"
KEYS = "CALL db.propertyKeys() YIELD propertyKey RETURN collect(propertyKey)"
MEMORY_LABEL = "Memory"
IDS_PER_QUERY = 500
_INDEX_COLUMNS = ("label", "entitytype", "properties", "types", "options", "language", "stopwords")
_CONSTRAINT_COLUMNS = ("label", "entitytype", "type", "properties")
_INDEXES = f"CALL db.indexes() YIELD {', '.join(_INDEX_COLUMNS)} RETURN {', '.join(_INDEX_COLUMNS)}"
_CONSTRAINTS = (
    f"CALL db.constraints() YIELD {', '.join(_CONSTRAINT_COLUMNS)}, status WHERE status <> 'FAILED'"
    f" RETURN {', '.join(_CONSTRAINT_COLUMNS)}"
)


def plain_value(cell: list[Any]) -> Any:
    """Return a compact value as JSON has it; times as ISO 8601, in UTC.

    Text that is not UTF-8 is `{NOT_UTF8: ...}` with U+FFFD, a vector is `{VECF32: ...}`; `plain` removes both marks.
    Raises StoreFailed for a type that no property has.
    """
    try:
        value = _plain(cell, "strict")
    except UnicodeDecodeError:
        return {NOT_UTF8: _plain(cell, "replace")}
    return {VECF32: value} if _has_float32s(cell) else value


def unreadable(value: object) -> bool:
    """Whether `plain_value` marked this value as text that is not UTF-8."""
    return isinstance(value, dict) and value.keys() == {NOT_UTF8}


def is_vector(value: object) -> bool:
    """Whether `plain_value` marked this value as a vector, or as a list of vectors."""
    return isinstance(value, dict) and value.keys() == {VECF32}


def plain(value: Any) -> Any:
    """Return a property's value without the mark that `plain_value` may have added."""
    return next(iter(value.values())) if is_vector(value) or unreadable(value) else value


def _has_float32s(cell: list[Any]) -> bool:
    kind, value = cell
    return kind == VECTOR or (kind == ARRAY and bool(value) and all(map(_has_float32s, value)))


def _plain(cell: list[Any], errors: str) -> Any:
    kind, value = cell
    if kind == STRING:
        return value.decode(errors=errors)
    if kind == ARRAY:
        return [_plain(item, errors) for item in value]
    if kind == MAP:
        pairs = zip(value[::2], value[1::2], strict=True)
        return {key.decode(errors=errors): _plain(item, errors) for key, item in pairs}
    if kind in {DATETIME, DATE, TIME, DURATION}:
        return _time_text(kind, value)
    if kind not in _SIMPLE:
        step = "remove the property, or use a version of this tool that knows this FalkorDB"
        raise StoreFailed(f"the graph holds a value of an unknown type (number {kind})", next_step=step)
    return _SIMPLE[kind](value)


def _float32(number: Any) -> float:
    """Return the double with the fewest digits that is the same 32-bit float."""
    import numpy as np  # 0.1 s, and hardly any graph has a point or a vector

    return float(str(np.float32(float(number))))


_SIMPLE: dict[int, Callable[[Any], Any]] = {
    NULL: lambda _value: None,
    INTEGER: int,
    BOOLEAN: lambda value: value == b"true",
    DOUBLE: float,
    POINT: lambda pair: dict(zip(("latitude", "longitude"), map(_float32, pair), strict=True)),
    VECTOR: lambda numbers: [_float32(number) for number in numbers],
}


def _time_text(kind: int, seconds: int) -> str:
    """Return a time, given in seconds since 1970, as ISO 8601."""
    try:
        moment = _EPOCH + timedelta(seconds=seconds)
    except OverflowError:  # a year that Python does not know
        return f"PT{seconds}S" if kind == DURATION else str(seconds)
    if kind != DURATION:
        date, time = moment.date().isoformat(), moment.time().isoformat()
        return {DATETIME: f"{date}T{time}+00:00", DATE: date, TIME: time}[kind]
    # A duration is the time since 1970 in calendar years, months and days, as the server splits it.
    from dateutil.relativedelta import relativedelta  # type: ignore[import-untyped]

    delta = relativedelta(moment, _EPOCH)
    days = [(delta.years, "Y"), (delta.months, "M"), (delta.days, "D")]
    times = [(delta.hours, "H"), (delta.minutes, "M"), (delta.seconds, "S")]
    day, clock = ("".join(f"{number}{unit}" for number, unit in part if number) for part in (days, times))
    return f"P{day}{'T' + clock if clock else ''}" if day or clock else "PT0S"


@dataclass(frozen=True)
class Window:
    """A query over a range of ids: `match` binds $low and $high, `more` finds whether any id is at or above $low.

    `id_name` is the parameter that holds the id of a window of one id in the next, finer window.
    """

    match: str
    more: str
    id_name: str = ""


def nodes(label: str = "") -> list[Window]:
    """Return the window over the nodes `n`, of `label` or all."""
    pattern = f"MATCH (n{':' + quoted(label) if label else ''})"
    return [Window(f"{pattern} WHERE id(n) >= $low AND id(n) < $high", f"{pattern} WHERE id(n) >= $low")]


def relationships() -> list[Window]:
    """Return the windows over the relationships `r` from `n` to `m`: by source, by target, by their own id."""
    pattern, pair = "MATCH (n)-[r]->(m) WHERE", "id(n) = $source AND id(m) = $target"
    return [
        Window(f"{pattern} id(n) >= $low AND id(n) < $high", "MATCH (n) WHERE id(n) >= $low", "source"),
        Window(
            f"{pattern} id(n) = $source AND id(m) >= $low AND id(m) < $high", "MATCH (m) WHERE id(m) >= $low", "target"
        ),
        Window(f"{pattern} {pair} AND id(r) >= $low AND id(r) < $high", f"{pattern} {pair} AND id(r) >= $low"),
    ]


def quoted(name: str) -> str:
    """Return a label or type as a query takes it. FalkorDB's parser has no escape for a backtick."""
    if "`" in name:
        step = "give that label or relationship type another name"
        raise StoreFailed(f"a name with a backtick cannot be used in a query: {name!r}", next_step=step)
    return f"`{name}`"


def raw_rows(conn: redis.Redis, graph: str, cypher: str, **params: object) -> list[Row]:
    """Return a read-only query's rows in the server's compact form: each value as [type, value], strings as bytes.

    The server returns at most RESULTSET_SIZE rows. Raises MissingData if there is no such graph, and like `command`.
    """
    return several_rows(conn, graph, [_bound(cypher, **params)])[0]


def _bound(cypher: str, **params: object) -> str:
    from falkordb.helpers import stringify_param_value

    values = "".join(f"{name}={stringify_param_value(value)} " for name, value in params.items())
    return f"CYPHER {values}{cypher}" if values else cypher


def several_rows(conn: redis.Redis, graph: str, queries: Sequence[str]) -> list[list[Row]]:
    """Return the rows of each of several read-only queries, which are sent together; see `raw_rows`."""
    try:
        answers = read_commands(conn, [("GRAPH.RO_QUERY", graph, one, "--compact") for one in queries])
    except StoreFailed as error:
        if "empty key" in str(error):
            raise MissingData(f"graph '{graph}' does not exist") from error
        raise
    with translated(conn):
        return [[list(row) for row in answer[1]] if len(answer) > 1 else [] for answer in answers]


def row_cap(conn: redis.Redis, graph: str, rows: int) -> int:
    """Return how many of `rows` rows the server returns: fewer if RESULTSET_SIZE cuts the result."""
    return len(raw_rows(conn, graph, f"UNWIND range(1, {rows}) AS x RETURN x"))


def names(conn: redis.Redis, graph: str, query: str) -> list[str]:
    """Return the names that LABELS, TYPES or KEYS finds."""
    return _names_in(raw_rows(conn, graph, query))


def _names_in(rows: list[Row]) -> list[str]:
    (((_kind, listed),),) = rows
    return [name_text(name) for _kind, name in listed]


def pages(conn: redis.Redis, graph: str, windows: Sequence[Window], returns: str) -> Iterator[list[Row]]:
    """Yield all rows of `returns`. Pages ascend by id; rows within a page have no order."""
    reader = _PageReader(conn, graph, f" RETURN {returns} LIMIT {_MOST_ROWS}", row_cap(conn, graph, 2) - 1)
    yield from reader.pages(windows, {})


@dataclass
class _PageReader:
    """Reads windows, and narrows them if the server cuts a result.

    `uncut` rows, and one more, are known to arrive. `span_limit`: the most ids of a window, once a result was cut.
    """

    conn: redis.Redis
    graph: str
    returns: str
    uncut: int
    span_limit: int = sys.maxsize

    def pages(self, windows: Sequence[Window], fixed: dict[str, int]) -> Iterator[list[Row]]:
        window, low, span = windows[0], 0, PAGE_ROWS
        while True:
            rows = self._rows(window, low, low + span, fixed)
            if rows is None and span > 1:
                span //= 2
                continue
            if rows is None:
                if len(windows) == 1:
                    raise StoreFailed(
                        f"graph '{self.graph}': the server cuts even the smallest result (RESULTSET_SIZE or TIMEOUT)",
                        next_step="raise both limits, in redis-cli:\n"
                        f"GRAPH.CONFIG SET RESULTSET_SIZE 10000\n{RAISE_TIME_LIMIT}",
                    )
                yield from self.pages(windows[1:], {**fixed, window.id_name: low})
            elif rows:
                yield rows
            else:
                more = f"{window.more} RETURN 1 LIMIT 1"
                if not raw_rows(self.conn, self.graph, more, low=low + span, **fixed):
                    return
            low, span = low + span, min(PAGE_ROWS, span * 2, self.span_limit)

    def _rows(self, window: Window, low: int, high: int, fixed: dict[str, int]) -> list[Row] | None:
        """Return a window's rows; None if the server has cut them, by number or by time."""
        try:
            rows = raw_rows(self.conn, self.graph, window.match + self.returns, low=low, high=high, **fixed)
        except StoreFailed as error:
            if "timed out" not in str(error).lower():
                raise
            return None
        if len(rows) == _MOST_ROWS:
            return None
        if len(rows) > self.uncut:
            # A cut result looks complete. Only a longer result shows that this one was not cut.
            self.uncut = row_cap(self.conn, self.graph, 2 * len(rows) + 1) - 1
            if len(rows) > self.uncut:
                self.span_limit = max(1, self.uncut)
                return None
        return rows


@dataclass(frozen=True)
class MemoryNode:
    """A node of label Memory: FalkorDB's internal id, and the properties as plain JSON, see `plain_value`."""

    node_id: int
    properties: dict[str, object]


@dataclass(frozen=True)
class GraphCounts:
    """Numbers in all, by label and by type, without zeros. A node counts under each of its labels."""

    nodes: int
    relationships: int
    labels: dict[str, int]
    types: dict[str, int]


@dataclass(frozen=True)
class GraphSchema:
    """Definitions, comparable with ==. Indexes and constraints are sorted; names are in the order of their ids."""

    indexes: list[dict[str, str]]
    constraints: list[dict[str, str]]
    labels: list[str]
    relationship_types: list[str]
    property_keys: list[str]


def read_rows(conn: redis.Redis, graph: str, cypher: str, **params: object) -> list[list[Any]]:
    """Return one read-only query's rows as plain JSON; see `raw_rows`."""
    return [[plain_value(cell) for cell in row] for row in raw_rows(conn, graph, cypher, **params)]


def iter_memories(conn: redis.Redis, graph: str, *, keys: Sequence[str] = ()) -> Iterator[MemoryNode]:
    """Yield every memory by ascending node id. Doubles have the 15 digits that FalkorDB prints.

    `keys`: the properties to read (default: all); a missing one is None.
    """
    columns = ", ".join(["id(n)", *(f"n.{quoted(key)}" for key in keys)] if keys else ["id(n)", "properties(n)"])
    for rows in pages(conn, graph, nodes(MEMORY_LABEL), columns):
        for node_id, *cells in sorted(rows, key=lambda row: int(row[0][1])):
            if keys:
                found = dict(zip(keys, map(plain_value, cells), strict=True))
            else:
                pairs = zip(cells[0][1][::2], cells[0][1][1::2], strict=True)
                found = {key.decode("utf-8", "replace"): plain_value(cell) for key, cell in pairs}
            yield MemoryNode(node_id[1], found)


def existing_memory_ids(conn: redis.Redis, graph: str, ids: Sequence[str | int]) -> set[str | int]:
    """Return those of `ids` that are now the `id` of a memory. They are compared exactly, types included."""
    query = f"MATCH (m:{MEMORY_LABEL}) WHERE m.id IN $ids RETURN DISTINCT m.id"
    found: set[str | int] = set()
    for start in range(0, len(ids), IDS_PER_QUERY):
        part = list(ids[start : start + IDS_PER_QUERY])
        found.update(row[0] for row in read_rows(conn, graph, query, ids=part))
    return found


def counts(conn: redis.Redis, graph: str) -> GraphCounts:
    """Return exact counts. The server maintains them, so each is one short query."""
    labels, types = map(_names_in, several_rows(conn, graph, [LABELS, TYPES]))
    queries = ["MATCH (n) RETURN count(n)", "MATCH ()-[r]->() RETURN count(r)"]
    queries += [_count_of(label, "(n:{})", "(n) WHERE hasLabels(n, [$name])") for label in labels]
    queries += [_count_of(kind, "()-[n:{}]->()", "()-[n]->() WHERE type(n) = $name") for kind in types]
    numbers = iter(int(rows[0][0][1]) for rows in several_rows(conn, graph, queries))
    nodes, relationships = next(numbers), next(numbers)
    # Both lines read from the same iterator: first the numbers of the labels, then those of the types.
    by_label = {name: number for name, number in zip(labels, numbers, strict=False) if number}
    by_type = {name: number for name, number in zip(types, numbers, strict=True) if number}
    return GraphCounts(nodes, relationships, by_label, by_type)


def _count_of(name: str, pattern: str, scan: str) -> str:
    """Return the query that counts what has this label or type: by a scan of all if the name cannot be quoted."""
    if "`" not in name:
        return f"MATCH {pattern.format(quoted(name))} RETURN count(n)"
    return _bound(f"MATCH {scan} RETURN count(n)", name=name)


def schema(conn: redis.Redis, graph: str) -> GraphSchema:
    """Return the definitions and all names. A constraint that FAILED enforces nothing: it is left out."""
    indexes, constraints, *named = several_rows(conn, graph, [_INDEXES, _CONSTRAINTS, LABELS, TYPES, KEYS])
    definitions = _definitions(indexes, _INDEX_COLUMNS), _definitions(constraints, _CONSTRAINT_COLUMNS)
    return GraphSchema(*definitions, *map(_names_in, named))


def _definitions(rows: list[Row], columns: Sequence[str]) -> list[dict[str, str]]:
    found = [{column: _canonical(cell) for column, cell in zip(columns, row, strict=True)} for row in rows]
    return sorted(found, key=lambda definition: sorted(definition.items()))


def _canonical(cell: list[Any]) -> str:
    """Return a compact value as text that does not depend on the order in which properties were indexed."""
    kind, value = cell
    if kind == ARRAY:
        return "[" + ", ".join(sorted(_canonical(item) for item in value)) + "]"
    if kind == MAP:
        pairs = zip(value[::2], value[1::2], strict=True)
        return "{" + ", ".join(sorted(f"{name_text(key)}: {_canonical(item)}" for key, item in pairs)) + "}"
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
