"""What AutoMem's own restore does, step by step, as the reference of `restore.automem_json_vs_peer`.

`python -m tests.bench.automem_peer FALKORDB_FILE QDRANT_FILE` restores into the stores that the environment names.
Written from the steps of AutoMem 0.16.1's scripts/restore_from_backup.py, with its clients and its batch sizes. Its
progress lines and its retries after an error are left out.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from falkordb import FalkorDB
from falkordb.graph import Graph
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

NODES, RELATIONSHIPS, POINTS = 250, 500, 250  # in one request
QUERY_MILLISECONDS, CLIENT_SECONDS, POLL_SECONDS = 300_000, 60, 2.0


def main() -> int:
    """Restore the graph, then the collection."""
    graph_file, collection_file = sys.argv[1:]
    client = FalkorDB(host=os.environ["FALKORDB_HOST"], port=int(os.environ["FALKORDB_PORT"]))
    restore_graph(client.select_graph(os.environ["FALKORDB_GRAPH"]), graph_file)
    qdrant = QdrantClient(url=os.environ["QDRANT_URL"], timeout=CLIENT_SECONDS)
    restore_collection(qdrant, os.environ["QDRANT_COLLECTION"], collection_file)
    return 0


def restore_graph(graph: Graph, path: str) -> None:
    """Delete everything, index the ids, create the nodes by labels, then the relationships between nodes with ids."""
    data = _load(path)
    if graph.query("MATCH (n) RETURN count(*)", timeout=QUERY_MILLISECONDS).result_set[0][0]:
        graph.query("MATCH (n) DETACH DELETE n", timeout=QUERY_MILLISECONDS)
    existing = {row[0] for row in graph.query("CALL db.indexes() YIELD label RETURN label").result_set}
    for label in sorted({node["labels"][0] for node in data["nodes"] if node["labels"]} - existing):
        graph.query(f"CREATE INDEX FOR (n:`{label}`) ON (n.id)", timeout=QUERY_MILLISECONDS)
    known = _create_nodes(graph, data["nodes"])
    _create_relationships(graph, data["relationships"], known)


def _create_nodes(graph: Graph, nodes: list[dict[str, Any]]) -> dict[int, tuple[str, Any]]:
    """The first label and the `id` of each node, by its internal id in the file."""
    known: dict[int, tuple[str, Any]] = {}
    groups: defaultdict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    now = datetime.now(timezone.utc).isoformat()
    for node in nodes:
        labels, properties = tuple(node["labels"]), dict(node["properties"])
        if not labels:
            continue
        if "Memory" in labels:
            properties["last_accessed"] = now
            if properties.get("relevance_score") is None:
                properties["relevance_score"] = max(0.3, float(properties.get("importance") or 0.5))
        known[node["id"]] = labels[0], properties.get("id")
        groups[labels].append({"props": properties})
    for labels, rows in groups.items():
        named = ":".join(f"`{label}`" for label in labels)
        for batch in _batches(rows, NODES):
            query = f"UNWIND $rows AS row CREATE (n:{named}) SET n += row.props"
            graph.query(query, {"rows": batch}, timeout=QUERY_MILLISECONDS)
    return known


def _create_relationships(graph: Graph, relationships: list[dict[str, Any]], known: dict[int, tuple[str, Any]]) -> None:
    groups: defaultdict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in relationships:
        (source_label, source), (target_label, target) = known[one["source_id"]], known[one["target_id"]]
        if source and target:
            row = {"source_id": source, "target_id": target, "props": one["properties"] or {}}
            groups[source_label, target_label, one["type"]].append(row)
    for (source_label, target_label, type_), rows in groups.items():
        query = (
            f"UNWIND $rows AS row MATCH (a:`{source_label}` {{id: row.source_id}})"
            f" MATCH (b:`{target_label}` {{id: row.target_id}}) CREATE (a)-[r:`{type_}`]->(b) SET r += row.props"
        )
        for batch in _batches(rows, RELATIONSHIPS):
            graph.query(query, {"rows": batch}, timeout=QUERY_MILLISECONDS)


def restore_collection(qdrant: QdrantClient, name: str, path: str) -> None:
    """Delete the collection, create it without indexes, upsert the points one batch after the other."""
    data = _load(path)
    qdrant.get_collection(name)
    qdrant.delete_collection(name)
    size = data["stats"]["vector_size"]
    qdrant.create_collection(name, vectors_config=VectorParams(size=size, distance=Distance.COSINE))
    for batch in _batches(data["points"], POINTS):
        points = [PointStruct(id=one["id"], vector=one["vector"], payload=one["payload"]) for one in batch]
        qdrant.upsert(name, points=points, wait=True)
    while (qdrant.get_collection(name).points_count or 0) < len(data["points"]):
        time.sleep(POLL_SECONDS)


def _load(path: str) -> dict[str, Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        data: dict[str, Any] = json.load(file)
    return data


def _batches(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


if __name__ == "__main__":
    raise SystemExit(main())
