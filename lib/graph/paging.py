"""Whole results from servers that cut them: the Docker image stops a query at one second and a result at 10,000 rows.

Rows come by windows of internal ids, so that a window's answer always stays under the server's own cap. A window
that would not is halved; one id with too many relationships is read by the other end's ids, and too many
relationships between two nodes by their own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from lib.errors import MissingData, StoreFailed
from lib.graph.client import command, place, translated

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
