"""What a graph holds: memories, counts, definitions. Nothing here is cut by the server's limits, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from lib.graph.paging import PAGE_ROWS, names, nodes, pages, quoted, raw_rows, single
from lib.graph.values import plain_value

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


def memory_ids_present(conn: redis.Redis, graph: str, ids: Sequence[str | int]) -> set[str | int]:
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
