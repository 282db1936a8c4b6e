"""One number for a whole graph, equal on two servers exactly when they hold the same graph.

A hash of 128 bits per node over its sorted labels and typed properties, one per relationship over its type, both
ends' hashes and its properties; their sums, which no order changes and in which duplicates count; the counts per
label and type; the definitions of indexes and constraints. Doubles are taken as the server prints them (15 digits).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import redis

from lib.clients.falkordb.queries import counts, names, nodes, pages, relationships, schema
from lib.errors import StoreFailed

HASH_BYTES = 16
_MODULUS = 1 << (8 * HASH_BYTES)
_PLAIN = {1: b"0", 3: b"i", 4: b"b", 5: b"f", 13: b"D", 14: b"d", 15: b"t", 16: b"u"}
_STRING, _ARRAY, _MAP = 2, 6, 10
_NUMBER_LISTS = {11: b"p", 12: b"v"}  # a point, a vector


@dataclass(frozen=True)
class GraphDigest:
    """`by_id`: internal ids were hashed too, so that it also tells whether they are the same."""

    digest: str
    nodes: int
    relationships: int
    by_id: bool


def graph_digest(
    conn: redis.Redis, graph: str, *, by_id: bool = False, progress: Callable[[int], None] | None = None
) -> GraphDigest:
    """The digest of a graph at rest; `progress` gets the number of nodes and relationships read so far.

    Holds 16 bytes per node id in memory. Raises MissingData, StoreFailed, StoreUnreachable, AccessRefused.
    """
    reader = _Reader(conn, graph, by_id=by_id, progress=progress or (lambda _done: None))
    node_sum = reader.add_nodes()
    relationship_sum = reader.add_relationships()
    known = schema(conn, graph)
    whole = {
        "sums": [f"{node_sum:032x}", f"{relationship_sum:032x}"],
        "read": [reader.nodes, reader.relationships],
        "counts": asdict(counts(conn, graph)),
        "definitions": [known.indexes, known.constraints],
        "by_id": by_id,
    }
    text = json.dumps(whole, sort_keys=True, ensure_ascii=False).encode()
    return GraphDigest(
        blake2b(text, digest_size=HASH_BYTES).hexdigest(), reader.nodes, reader.relationships, by_id
    )


class _Reader:
    """Reads nodes first, keeping each one's hash under its id, then relationships."""

    def __init__(
        self, conn: redis.Redis, graph: str, *, by_id: bool, progress: Callable[[int], None]
    ) -> None:
        self.nodes = 0
        self.relationships = 0
        self._conn = conn
        self._graph = graph
        self._by_id = by_id
        self._progress = progress
        self._hashes = bytearray()
        self._keys = _Names(conn, graph, "db.propertyKeys", "propertyKey")
        self._labels = _Names(conn, graph, "db.labels", "label")
        self._types = _Names(conn, graph, "db.relationshipTypes", "relationshipType")

    def add_nodes(self) -> int:
        """The sum of all nodes' hashes."""
        total = 0
        for rows in pages(self._conn, self._graph, nodes(), "n"):
            for ((_kind, (node_id, label_ids, properties)),) in rows:
                labels = b"".join(sorted(self._labels[label] for label in label_ids))
                identity = b"%d;" % node_id if self._by_id else b""
                value = _hash(b"N" + identity + labels + b"|" + self._properties(properties))
                self._keep(node_id, value)
                total += int.from_bytes(value, "big")
            self.nodes += len(rows)
            self._progress(self.nodes)
        return total % _MODULUS

    def add_relationships(self) -> int:
        """The sum of all relationships' hashes."""
        total = 0
        for rows in pages(self._conn, self._graph, relationships(), "r"):
            for ((_kind, (own_id, type_id, source, target, properties)),) in rows:
                identity = b"%d;" % own_id if self._by_id else b""
                ends = self._hash_of(source) + self._hash_of(target)
                value = _hash(b"R" + identity + self._types[type_id] + ends + self._properties(properties))
                total += int.from_bytes(value, "big")
            self.relationships += len(rows)
            self._progress(self.nodes + self.relationships)
        return total % _MODULUS

    def _properties(self, properties: Iterable[list[Any]]) -> bytes:
        known = self._keys.known
        try:
            parts = [
                known[key] + (b"s%d:%s" % (len(value), value) if kind == _STRING else _typed(kind, value))
                for key, kind, value in properties
            ]
        except IndexError:
            parts = [self._keys[key] + _typed(kind, value) for key, kind, value in properties]
        parts.sort()
        return b"".join(parts)

    def _keep(self, node_id: int, value: bytes) -> None:
        at = node_id * HASH_BYTES
        if len(self._hashes) < at:
            self._hashes.extend(bytes(at - len(self._hashes)))
        self._hashes[at : at + HASH_BYTES] = value

    def _hash_of(self, node_id: int) -> bytes:
        """A node's hash; empty for a node that was made after the nodes were read."""
        return bytes(self._hashes[node_id * HASH_BYTES : (node_id + 1) * HASH_BYTES])


class _Names:
    """Names under their internal ids, written so that one cannot run into what follows; new ones are looked up."""

    def __init__(self, conn: redis.Redis, graph: str, procedure: str, column: str) -> None:
        self._lookup = (conn, graph, procedure, column)
        self.known: list[bytes] = []

    def __getitem__(self, number: int) -> bytes:
        try:
            return self.known[number]
        except IndexError:
            self.known = [_text(b"k", name.encode()) for name in names(*self._lookup)]
        if number >= len(self.known):
            raise StoreFailed(f"graph '{self._lookup[1]}' uses a name that {self._lookup[2]} does not list")
        return self.known[number]


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()


def _text(kind: bytes, value: bytes) -> bytes:
    return b"%s%d:%s" % (kind, len(value), value)


def _typed(kind: int, value: Any) -> bytes:
    """A compact value with its type, unambiguous. Raises StoreFailed for a type that is not known."""
    if kind == _STRING:
        return b"s%d:%s" % (len(value), value)
    if kind in _PLAIN:
        return _PLAIN[kind] + (value if isinstance(value, bytes) else str(value).encode()) + b";"
    if kind == _ARRAY:
        items = [
            b"s%d:%s" % (len(one), one) if type_ == _STRING else _typed(type_, one) for type_, one in value
        ]
        return b"[" + b"".join(items) + b"]"
    if kind == _MAP:
        pairs = zip(value[::2], value[1::2], strict=True)
        return b"{" + b"".join(sorted(_text(b"k", key) + _typed(*item) for key, item in pairs)) + b"}"
    if kind in _NUMBER_LISTS:
        return _NUMBER_LISTS[kind] + b",".join(str(number).encode() for number in value) + b";"
    raise StoreFailed(f"the graph holds a value of a type (number {kind}) that is not known here")
