"""Load sample memories into a real FalkorDB and into a Qdrant collection as AutoMem creates it."""

from __future__ import annotations

import itertools
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import requests

from tests.sandbox.automem_stores import KEYWORD_INDEXES
from tests.sandbox.sample_memories import REACH, SampleMemory

if TYPE_CHECKING:
    import numpy as np
    import redis

    Embed = Callable[[list[str]], "np.ndarray[Any, np.dtype[np.float32]]"]

GRAPH_BATCH = 500
POINT_BATCH = 200  # 200 points of 3,072 numbers are 8 MB of JSON; Qdrant takes 32 MiB
EMBED_BATCH = 100
INDEXES = (
    "CREATE INDEX FOR (m:Memory) ON (m.id)",
    "CREATE INDEX FOR (m:Memory) ON (m.timestamp)",
    "CREATE INDEX FOR (m:Memory) ON (m.type, m.importance)",
    "CREATE INDEX FOR (e:Entity) ON (e.slug)",
)
# The rows refer to positions in an ordered range of ids. A range of ids is a seek; a list of single ids or a variable
# is a scan of the whole graph (GRAPH.EXPLAIN, FalkorDB 4.16.3).
_LINK = (
    "MATCH (n) WHERE id(n) >= $low AND id(n) <= $high WITH n ORDER BY id(n) WITH collect(n) AS nodes, $low AS low "
    "UNWIND $rows AS row WITH nodes[row[0] - low] AS a, nodes[row[1] - low] AS b, row "
    "CREATE (a)-[r:{type}]->(b) SET r = row[2]"
)


@dataclass(frozen=True)
class LoadedGraph:
    """How much was written: all nodes, those labelled Memory, and relationships."""

    nodes: int
    memories: int
    relationships: int


def load_graph(conn: redis.Redis, graph: str, memories: Iterable[SampleMemory]) -> LoadedGraph:
    """Write the nodes and relationships, with range indexes, into a graph that does not exist yet.

    Raises ValueError if it exists, and RuntimeError if the server's counts differ from what was sent.
    """
    from falkordb.graph import Graph

    if conn.exists(graph):
        raise ValueError(f"graph '{graph}' exists already; samples are loaded into a new one")
    store = Graph(conn, graph)
    for statement in INDEXES:
        store.query(statement)
    node_ids: dict[int, int] = {}
    nodes = labelled = relationships = 0
    for batch in _batches(memories, GRAPH_BATCH):
        _create_nodes(store, batch, node_ids)
        relationships += _create_relationships(store, batch, node_ids)
        nodes += len(batch)
        labelled += sum("Memory" in memory.labels for memory in batch)
        node_ids = dict(list(node_ids.items())[-2 * REACH :])
    loaded = LoadedGraph(nodes, labelled, relationships)
    counted = LoadedGraph(
        _number(store, "MATCH (n) RETURN count(n)"),
        _number(store, "MATCH (n:Memory) RETURN count(n)"),
        _number(store, "MATCH ()-[r]->() RETURN count(r)"),
    )
    if counted != loaded:
        raise RuntimeError(f"graph '{graph}' contains {counted} after {loaded} were sent")
    return loaded


def _create_nodes(store: Any, batch: Sequence[SampleMemory], node_ids: dict[int, int]) -> None:
    """Create a batch in its order and record each node's internal id. One query for consecutive nodes with equal labels."""
    for labels, run in itertools.groupby(batch, key=lambda memory: memory.labels):
        group = list(run)
        statement = f"UNWIND $rows AS row CREATE (n:{':'.join(labels)}) SET n = row RETURN id(n)"
        answer = store.query(statement, {"rows": [memory.properties for memory in group]})
        node_ids.update((memory.sequence, row[0]) for memory, row in zip(group, answer.result_set, strict=True))


def _create_relationships(store: Any, batch: Sequence[SampleMemory], node_ids: dict[int, int]) -> int:
    by_type: defaultdict[str, list[list[object]]] = defaultdict(list)
    for memory in batch:
        for link in memory.relationships:
            by_type[link.type].append([node_ids[memory.sequence], node_ids[link.target], link.properties])
    bounds = {"low": min(node_ids.values()), "high": max(node_ids.values())}
    for type_, rows in by_type.items():
        store.query(_LINK.format(type=type_), {**bounds, "rows": rows})
    return sum(map(len, by_type.values()))


def _number(store: Any, statement: str) -> int:
    return int(store.query(statement).result_set[0][0])


def load_points(
    qdrant_url: str,
    api_key: str,
    collection: str,
    size: int,
    embed: Embed,
    memories: Iterable[SampleMemory],
    *,
    orphans: int = 0,
) -> int:
    """Create `collection` as AutoMem does (unnamed, Cosine, keyword indexes) and write the points. Returns how many.

    Args:
        embed: maps texts to an (n, size) float32 array.
        orphans: so many more points have ids that no node has, as after a deletion in the graph only.

    Raises requests.HTTPError if Qdrant refuses, and RuntimeError if its count differs from what was sent.
    """
    with requests.Session() as session:
        session.headers.update({"content-type": "application/json", **({"api-key": api_key} if api_key else {})})
        base = f"{qdrant_url.rstrip('/')}/collections/{collection}"
        create_collection(session, base, size)
        written = 0
        for batch in _batches(itertools.chain(_points(memories), _orphans(orphans)), POINT_BATCH):
            texts = [str(payload["content"]) for _, payload in batch]
            vectors = [row for part in _batches(texts, EMBED_BATCH) for row in embed(part)]
            _upsert(session, base, batch, vectors)
            written += len(batch)
        answer = _send(session, "POST", f"{base}/points/count", {"exact": True})
    if answer["result"]["count"] != written:
        raise RuntimeError(f"collection '{collection}' contains {answer['result']['count']} of {written} points")
    return written


def create_collection(session: requests.Session, base: str, size: int) -> None:
    """Create a collection as AutoMem does. `base` is its URL."""
    _send(session, "PUT", base, {"vectors": {"size": size, "distance": "Cosine"}})
    for field_name in KEYWORD_INDEXES:
        body = {"field_name": field_name, "field_schema": "keyword"}
        _send(session, "PUT", f"{base}/index?wait=true", body)


def endpoint_embedder(base_url: str, api_key: str, model: str, size: int) -> Embed:
    """Create an `embed` for `load_points` that uses an OpenAI-compatible endpoint."""
    import base64

    import numpy as np

    session = requests.Session()
    session.headers.update({"content-type": "application/json", "authorization": f"Bearer {api_key}"})

    def embed(texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        body = {"model": model, "input": texts, "dimensions": size, "encoding_format": "base64"}
        answer = _send(session, "POST", f"{base_url.rstrip('/')}/embeddings", body)
        rows = sorted(answer["data"], key=lambda row: int(row["index"]))
        joined = b"".join(base64.b64decode(row["embedding"]) for row in rows)
        return np.frombuffer(joined, dtype="<f4").reshape(len(texts), size)

    return embed


def _points(memories: Iterable[SampleMemory]) -> Iterator[tuple[str | int, dict[str, object]]]:
    for memory in memories:
        if memory.point_id is not None and memory.payload is not None:
            yield memory.point_id, memory.payload


def _orphans(count: int) -> Iterator[tuple[str, dict[str, object]]]:
    for number in range(count):
        content = f"Deleted from the graph, still in the collection: note {number} about the old wiki."
        yield (
            str(uuid.uuid5(uuid.NAMESPACE_URL, f"orphan {number}")),
            {
                "content": content,
                "tags": ["orphan"],
                "tag_prefixes": ["orphan"],
                "importance": 0.1,
                "type": "Memory",
            },
        )


def _upsert(session: requests.Session, base: str, batch: Sequence[tuple[Any, Any]], vectors: Sequence[Any]) -> None:
    points = [
        {"id": point_id, "vector": vector, "payload": payload}
        for (point_id, payload), vector in zip(batch, vectors, strict=True)
    ]
    _send(session, "PUT", f"{base}/points?wait=true", {"points": points})


def _send(session: requests.Session, method: str, url: str, body: object) -> Any:
    data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    answer = session.request(method, url, data=data, timeout=60)
    if not answer.ok:
        raise requests.HTTPError(f"{method} {url}: {answer.status_code} {answer.text[:500]}", response=answer)
    return orjson.loads(answer.content)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
