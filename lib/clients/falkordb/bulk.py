"""Fill a graph on a scratch server with nodes and relationships, by GRAPH.BULK.

Cypher would need a scan of all nodes to find a relationship's ends by their ids, and it takes no NaN. The format is
that of https://github.com/FalkorDB/falkordb-bulk-loader; written and read back on 4.16.3 and 4.22.1.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import redis

from lib.clients.falkordb.connection import command
from lib.clients.falkordb.queries import quoted, read_rows
from lib.errors import BackupDamaged, StoreFailed

_NULL, _BOOLEAN, _DOUBLE, _STRING, _INTEGER, _ARRAY = range(6)
_POINT = {"latitude", "longitude"}  # the only property that JSON has as a map
_INDEXED = ("id", "timestamp")  # of a memory, as AutoMem creates them
_POLL_SECONDS, _INDEX_SECONDS = 0.02, 600.0

Properties = Mapping[str, Any]


def create_indexes(conn: redis.Redis, graph: str, label: str) -> None:
    """Create AutoMem's range indexes, on `id` and `timestamp` of `label`, and wait until they are built."""
    for key in _INDEXED:
        command(conn, "GRAPH.QUERY", graph, f"CREATE INDEX FOR (n:{quoted(label)}) ON (n.{key})")
    deadline = time.monotonic() + _INDEX_SECONDS
    while any(row != ["OPERATIONAL"] for row in read_rows(conn, graph, "CALL db.indexes() YIELD status RETURN status")):
        if time.monotonic() > deadline:
            raise StoreFailed(f"the scratch FalkorDB has not built the indexes after {_INDEX_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)


def create_graph(conn: redis.Redis, graph: str) -> None:
    """Create an empty graph."""
    command(conn, "GRAPH.QUERY", graph, "RETURN 1")


def add_nodes(conn: redis.Redis, graph: str, nodes: Iterable[tuple[Sequence[str], Properties]]) -> None:
    """Add nodes, given as labels and properties. In a graph that lost none, their ids continue those that it has.

    Raises BackupDamaged for a value that no property has.
    """
    for (labels, has_points), group in groupby(nodes, key=lambda node: (list(node[0]), bool(_points(node[1])))):
        page = [properties for _, properties in group]
        if labels and _keys(page) and not has_points and not any(":" in label for label in labels):
            _bulk(conn, graph, ":".join(labels), [b""] * len(page), page, are_nodes=True)
            continue
        pattern = "".join(f":{quoted(label)}" for label in labels)
        for properties in page:
            _query(conn, graph, f"CREATE (x{pattern})", properties)


def add_relationships(conn: redis.Redis, graph: str, rows: Iterable[tuple[int, int, str, Properties]]) -> None:
    """Add relationships, given as the ids of both ends, type and properties. Raises BackupDamaged like `add_nodes`."""
    for (name, has_points), group in groupby(rows, key=lambda row: (row[2], bool(_points(row[3])))):
        page = list(group)
        if ":" not in name and not has_points:
            heads = [struct.pack("<qq", source, target) for source, target, _, _ in page]
            _bulk(conn, graph, name, heads, [row[3] for row in page], are_nodes=False)
            continue
        for source, target, _, properties in page:
            pattern = (
                f"MATCH (a) WHERE id(a) = {source} MATCH (b) WHERE id(b) = {target} CREATE (a)-[x:{quoted(name)}]->(b)"
            )
            _query(conn, graph, pattern, properties)


def _query(conn: redis.Redis, graph: str, create: str, properties: Properties) -> None:
    """Create one `x` that GRAPH.BULK cannot: a node without a label or property, a point, a name with a colon."""
    from falkordb.helpers import stringify_param_value

    points = _points(properties)
    plain = stringify_param_value({key: value for key, value in properties.items() if key not in points})
    sets = "".join(f", x.{quoted(key)} = {value}" for key, value in points.items())
    command(conn, "GRAPH.QUERY", graph, f"CYPHER p={plain} {create} SET x += $p{sets}")


def _points(properties: Properties) -> dict[str, str]:
    """The properties that are points, as Cypher."""
    return {
        key: "point({{latitude: {latitude}, longitude: {longitude}}})".format(**value)
        for key, value in properties.items()
        if isinstance(value, dict) and value.keys() == _POINT
    }


def _keys(page: Iterable[Properties]) -> list[str]:
    """The names of all properties; a null is none."""
    return list(dict.fromkeys(key for one in page for key, value in one.items() if value is not None))


def _bulk(
    conn: redis.Redis, graph: str, name: str, heads: list[bytes], properties: list[Properties], *, are_nodes: bool
) -> None:
    """Send rows under one label (several with a colon between them) or type; a row is its head, then its values."""
    keys = _keys(properties)
    header = _text(name) + struct.pack("<I", len(keys)) + b"".join(map(_text, keys))
    rows = (head + b"".join(_value(one.get(key)) for key in keys) for head, one in zip(heads, properties, strict=True))
    blob = header + b"".join(rows)
    counts = (len(heads), 0, 1, 0) if are_nodes else (0, len(heads), 0, 1)
    command(conn, "GRAPH.BULK", graph, *counts, blob)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    if b"\0" in data:
        raise BackupDamaged(f"a text with a NUL byte is in no graph: {text[:80]!r}")
    return data + b"\0"


def _value(value: object) -> bytes:
    """Return a property's value with its type."""
    if isinstance(value, str):
        return bytes([_STRING]) + _text(value)
    if value is None:
        return bytes([_NULL])
    if isinstance(value, bool):
        return struct.pack("<BB", _BOOLEAN, value)
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return struct.pack("<Bq", _INTEGER, value)
    if isinstance(value, float):
        return struct.pack("<Bd", _DOUBLE, value)
    if isinstance(value, list):
        return struct.pack("<Bq", _ARRAY, len(value)) + b"".join(map(_value, value))
    raise BackupDamaged(f"a value that no property has: {str(value)[:80]}")
