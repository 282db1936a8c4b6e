"""One digest for a whole graph, equal on two servers exactly if they hold the same graph.

It covers the sum of the nodes' hashes (128 bits each, over internal id, sorted labels and sorted typed properties),
that of the relationships' hashes (over internal id, type, the hashes of both ends, and properties), the counts per
label and type, and the definitions of indexes and constraints. Doubles have the 15 digits that the server prints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import redis

from lib.clients.falkordb import queries
from lib.clients.falkordb.queries import counts, names, nodes, pages, relationships, schema
from lib.errors import StoreFailed

HASH_BYTES = 16
_MODULUS = 1 << (8 * HASH_BYTES)
_PLAIN = {queries.NULL: b"0", queries.INTEGER: b"i", queries.BOOLEAN: b"b", queries.DOUBLE: b"f"}
_PLAIN |= {queries.DATETIME: b"D", queries.DATE: b"d", queries.TIME: b"t", queries.DURATION: b"u"}
_STRING, _ARRAY, _MAP = queries.STRING, queries.ARRAY, queries.MAP
_NUMBER_LISTS = {queries.POINT: b"p", queries.VECTOR: b"v"}


@dataclass(frozen=True)
class GraphDigest:
    """The digest in hex, and how many nodes and relationships were read."""

    digest: str
    nodes: int
    relationships: int


def graph_digest(conn: redis.Redis, graph: str) -> GraphDigest:
    """Compute the digest of a graph that nobody writes to.

    Holds 16 bytes per node id in memory. Raises MissingData, StoreFailed, StoreUnreachable, AccessRefused.
    """
    reader = _Reader(conn, graph)
    sums = reader.add_nodes(), reader.add_relationships()
    known = schema(conn, graph)
    covered = {
        "sums": [f"{one:032x}" for one in sums],
        "read": [reader.nodes, reader.relationships],
        "counts": asdict(counts(conn, graph)),
        "definitions": [known.indexes, known.constraints],
        "by_id": True,  # as in the digests of all manifests
    }
    text = json.dumps(covered, sort_keys=True, ensure_ascii=False).encode()
    return GraphDigest(blake2b(text, digest_size=HASH_BYTES).hexdigest(), reader.nodes, reader.relationships)


class _Reader:
    """Reads all nodes first, and saves the hash of each under its id, then relationships."""

    def __init__(self, conn: redis.Redis, graph: str) -> None:
        self.nodes = self.relationships = 0
        self._conn, self._graph = conn, graph
        self._hashes = bytearray()
        self._keys = _Names(conn, graph, queries.KEYS)
        self._labels = _Names(conn, graph, queries.LABELS)
        self._types = _Names(conn, graph, queries.TYPES)

    def add_nodes(self) -> int:
        """Return the sum of all nodes' hashes."""
        total = 0
        for rows in pages(self._conn, self._graph, nodes(), "n"):
            for ((_kind, (node_id, label_ids, properties)),) in rows:
                labels = b"".join(sorted(self._labels[label] for label in label_ids))
                value = _hash(b"N%d;%s|%s" % (node_id, labels, self._properties(properties)))
                at = node_id * HASH_BYTES
                self._hashes.extend(bytes(max(0, at - len(self._hashes))))
                self._hashes[at : at + HASH_BYTES] = value
                total += int.from_bytes(value, "big")
            self.nodes += len(rows)
        return total % _MODULUS

    def add_relationships(self) -> int:
        """Return the sum of all relationships' hashes."""
        total = 0
        for rows in pages(self._conn, self._graph, relationships(), "r"):
            for ((_kind, (own_id, type_id, source, target, properties)),) in rows:
                ends = self._hash_of(source) + self._hash_of(target)
                value = _hash(b"R%d;" % own_id + self._types[type_id] + ends + self._properties(properties))
                total += int.from_bytes(value, "big")
            self.relationships += len(rows)
        return total % _MODULUS

    def _properties(self, properties: Iterable[list[Any]]) -> bytes:
        known = self._keys.known
        try:
            # Strings are most of a graph: they are written here without a call.
            parts = [
                known[key] + (b"s%d:%s" % (len(value), value) if kind == _STRING else _typed(kind, value))
                for key, kind, value in properties
            ]
        except IndexError:  # a key that was added meanwhile
            parts = [self._keys[key] + _typed(kind, value) for key, kind, value in properties]
        parts.sort()
        return b"".join(parts)

    def _hash_of(self, node_id: int) -> bytes:
        """Return a node's hash; empty for a node that was created after the nodes were read."""
        return bytes(self._hashes[node_id * HASH_BYTES : (node_id + 1) * HASH_BYTES])


class _Names:
    """Names by internal id, each with its length, so that it cannot be mixed up with what follows; reads new ones."""

    def __init__(self, conn: redis.Redis, graph: str, query: str) -> None:
        self._lookup = (conn, graph, query)
        self.known: list[bytes] = []

    def __getitem__(self, number: int) -> bytes:
        if number >= len(self.known):
            self.known = [_text(b"k", name.encode()) for name in names(*self._lookup)]
            if number >= len(self.known):
                procedure = self._lookup[2].removeprefix("CALL ").partition("()")[0]
                raise StoreFailed(f"graph '{self._lookup[1]}' uses a name that {procedure} does not list")
        return self.known[number]


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()


def _text(kind: bytes, value: bytes) -> bytes:
    return b"%s%d:%s" % (kind, len(value), value)


def _typed(kind: int, value: Any) -> bytes:
    """Return a compact value with its type, unambiguously. Raises StoreFailed for an unknown type."""
    if kind == _STRING:
        return b"s%d:%s" % (len(value), value)
    if kind in _PLAIN:
        return _PLAIN[kind] + (value if isinstance(value, bytes) else str(value).encode()) + b";"
    if kind == _ARRAY:
        return b"[" + b"".join(_typed(type_, one) for type_, one in value) + b"]"
    if kind == _MAP:
        pairs = zip(value[::2], value[1::2], strict=True)
        return b"{" + b"".join(sorted(_text(b"k", key) + _typed(*item) for key, item in pairs)) + b"}"
    if kind in _NUMBER_LISTS:
        return _NUMBER_LISTS[kind] + b",".join(str(number).encode() for number in value) + b";"
    raise StoreFailed(f"the graph holds a value of an unknown type (number {kind})")
