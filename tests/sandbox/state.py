"""Both stores in a few numbers, to see whether anything changed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from lib.clients.falkordb.connection import GraphAddress, connect
from lib.clients.falkordb.digest import graph_digest
from lib.clients.qdrant.points import scroll
from lib.clients.qdrant.transport import Qdrant


@dataclass(frozen=True)
class State:
    """The graph's by-id digest, a hash of every point's id, payload and vector, and each point's payload keys."""

    graph: str
    points: int
    collection: str
    keys: frozenset[tuple[str, str]]


def state_of(address: GraphAddress, graph: str, qdrant: Qdrant, collection: str) -> State:
    """Read the state of both stores. Raises MissingData if one is absent."""
    digest, points, keys = hashlib.sha256(), 0, set()
    for page in scroll(qdrant, collection, payload=True, vector=True):
        for point in page:
            payload = sorted((point.payload or {}).items())
            vector = point.vector.tobytes() if point.vector is not None else b""
            digest.update(repr((point.id, payload)).encode() + vector)
            keys |= {(str(point.id), key) for key, _ in payload}
            points += 1
    with connect(address) as conn:
        found = graph_digest(conn, graph).digest
    return State(found, points, digest.hexdigest()[:16], frozenset(keys))
