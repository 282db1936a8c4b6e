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
from lib.errors import StoreFailed

_NULL, _BOOLEAN, _DOUBLE, _STRING, _INTEGER, _ARRAY = range(6)
_POINT = {"latitude": 90, "longitude": 180}  # the only property that JSON has as a map; its largest numbers
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


def add_nodes(conn: redis.Redis, graph: str, first: int, nodes: Iterable[tuple[Sequence[str], Properties]]) -> None:
    """Add nodes, given as labels and properties. The graph has `first` nodes and never lost one: its ids continue.

    Raises ValueError for a value that no property has.
    """
    rows = ((list(labels), _plain(properties), properties) for labels, properties in nodes)
    for (labels, has_values), group in groupby(rows, key=lambda row: (row[0], bool(row[1]))):
        page = list(group)
        values = [plain for _, plain, _ in page]
        if labels and has_values and not any(":" in label for label in labels):
            _bulk(conn, graph, ":".join(labels), [b""] * len(page), values, are_nodes=True)
        else:
            pattern = "".join(f":{quoted(label)}" for label in labels)
            for one in values:
                _create(conn, graph, f"CREATE (x{pattern})", one)
        for node_id, (_, _, properties) in enumerate(page, first):
            _set_points(conn, graph, f"MATCH (x) WHERE id(x) = {node_id}", properties)
        first += len(page)


def add_relationships(
    conn: redis.Redis, graph: str, first: int, rows: Iterable[tuple[int, int, str, Properties]]
) -> None:
    """Add relationships, given as the ids of both ends, type and properties. `first` and errors: see `add_nodes`."""
    for name, group in groupby(rows, key=lambda row: row[2]):
        page = list(group)
        if ":" not in name:
            heads = [struct.pack("<qq", source, target) for source, target, _, _ in page]
            _bulk(conn, graph, name, heads, [_plain(row[3]) for row in page], are_nodes=False)
        for own_id, (source, target, _, properties) in enumerate(page, first):
            if ":" in name:
                ends = f"MATCH (a) WHERE id(a) = {source} MATCH (b) WHERE id(b) = {target}"
                _create(conn, graph, f"{ends} CREATE (a)-[x:{quoted(name)}]->(b)", _plain(properties))
            match = f"MATCH (a)-[x]->(b) WHERE id(a) = {source} AND id(b) = {target} AND id(x) = {own_id}"
            _set_points(conn, graph, match, properties)
        first += len(page)


def points_in(properties: Properties) -> dict[str, str]:
    """The properties that JSON has as a map, or as a list of maps: points. Returns them as Cypher."""
    found = {}
    for key, value in properties.items():
        points = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
        if points and all(map(_is_point, points)):
            numbers = [(float(one["latitude"]), float(one["longitude"])) for one in points]
            texts = [f"point({{latitude: {latitude!r}, longitude: {longitude!r}}})" for latitude, longitude in numbers]
            found[key] = f"[{', '.join(texts)}]" if isinstance(value, list) else texts[0]
    return found


def require_values(page: Iterable[Properties]) -> None:
    """Raise ValueError for a value that no property has, or a name of one that UTF-8 cannot hold."""
    for properties in page:
        for key, value in _plain(properties).items():
            _text(key)
            _value(value)


def require_name(name: str) -> None:
    """Raise ValueError if a label or a relationship type cannot have this name. No query can name a backtick."""
    _text(name)
    if "`" in name:
        raise ValueError(f"a label or a relationship type with a backtick: {name!r}")


def _is_point(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != _POINT.keys():
        return False
    return all(type(value[key]) in {int, float} and abs(value[key]) <= most for key, most in _POINT.items())


def _set_points(conn: redis.Redis, graph: str, match: str, properties: Properties) -> None:
    """Set the points of the `x` that `match` finds; GRAPH.BULK has no type for them."""
    if points := points_in(properties):
        sets = ", ".join(f"x.{quoted(key)} = {value}" for key, value in points.items())
        command(conn, "GRAPH.QUERY", graph, f"{match} SET {sets}")


def _create(conn: redis.Redis, graph: str, create: str, plain: Properties) -> None:
    """Create one `x` that GRAPH.BULK cannot: a node without a label or property, a name with a colon."""
    from falkordb.helpers import stringify_param_value

    require_values([plain])
    command(conn, "GRAPH.QUERY", graph, f"CYPHER p={stringify_param_value(dict(plain))} {create} SET x += $p")


def _plain(properties: Properties) -> dict[str, Any]:
    """All properties but points; a null is none."""
    points = points_in(properties)
    return {key: value for key, value in properties.items() if value is not None and key not in points}


def _bulk(
    conn: redis.Redis, graph: str, name: str, heads: list[bytes], values: Sequence[Properties], *, are_nodes: bool
) -> None:
    """Send rows under one label (several with a colon between them) or type; a row is its head, then its values."""
    keys = list(dict.fromkeys(key for one in values for key in one))
    header = _text(name) + struct.pack("<I", len(keys)) + b"".join(map(_text, keys))
    rows = (head + b"".join(_value(one.get(key)) for key in keys) for head, one in zip(heads, values, strict=True))
    counts = (len(heads), 0, 1, 0) if are_nodes else (0, len(heads), 0, 1)
    command(conn, "GRAPH.BULK", graph, *counts, header + b"".join(rows))


def _text(text: str) -> bytes:
    data = text.encode()  # a lone surrogate is a ValueError: no client could read it back
    if b"\0" in data:
        raise ValueError(f"a text with a NUL byte is in no graph: {text[:80]!r}")
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
    raise ValueError(f"a value that no property has: {str(value)[:80]}")
