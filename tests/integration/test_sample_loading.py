"""Samples loaded into real stores: all of them, fast, and refused if the stores hold something already."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import requests

from lib.clients.falkordb.connection import connect
from tests import automem_support
from tests.automem_support import MODEL, Stores
from tests.sandbox.sample_loading import endpoint_embedder, load_graph, load_points
from tests.sandbox.sample_memories import generate
from tests.sandbox.vectors import vectors_for

pytestmark = pytest.mark.qdrant
servers, stores = automem_support.servers, automem_support.stores
COUNT = 700


def direct(texts: list[str]) -> np.ndarray:
    return vectors_for(MODEL, texts, 64)


def query(stores: Stores, statement: str) -> list[list]:
    return connect(stores.falkordb.address).execute_command("GRAPH.QUERY", "memories", statement)[1]


def test_the_graph_holds_every_node_and_relationship(stores: Stores):
    conn = connect(stores.falkordb.address)
    samples = list(generate(COUNT))
    loaded = load_graph(conn, "memories", iter(samples))
    assert (loaded.nodes, loaded.memories) == (len(samples), COUNT)
    types = Counter(link.type for sample in samples for link in sample.relationships)
    found = query(stores, "MATCH ()-[r]->() RETURN type(r), count(r)")
    assert {row[0].decode(): row[1] for row in found} == types
    indexes = query(stores, "CALL db.indexes() YIELD label, properties RETURN label, properties")
    assert {row[0] for row in indexes} == {b"Memory", b"Entity"}
    assert all(name in str(indexes) for name in ("id", "timestamp", "slug"))
    check_ends(stores, samples)


def check_ends(stores: Stores, samples: list) -> None:
    """Each relationship joins the two nodes that it should, self and parallel ones among them."""
    by_sequence = {sample.sequence: sample for sample in samples}
    found = query(stores, "MATCH (a:Memory)-[r:RELATES_TO]->(b:Memory) RETURN a.id, b.id, r.strength")
    ours = Counter((text(row[0]), text(row[1]), float(row[2])) for row in found)
    assert ours == Counter(
        (
            str(sample.properties.get("id")),
            str(by_sequence[link.target].properties.get("id")),
            link.properties["strength"],
        )
        for sample in samples
        for link in sample.relationships
        if link.type == "RELATES_TO"
    )


def text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def test_contents_and_odd_values_arrive_unchanged(stores: Stores):
    from falkordb.graph import Graph

    samples = list(generate(COUNT))
    load_graph(connect(stores.falkordb.address), "memories", iter(samples))
    import redis

    graph = Graph(redis.Redis(port=stores.falkordb.port, decode_responses=True), "memories")
    rows = graph.query("MATCH (n) RETURN n ORDER BY id(n)").result_set
    for row, sample in zip(rows, samples, strict=True):
        assert sorted(row[0].labels) == sorted(sample.labels)
        assert same(row[0].properties, sample.properties)


def same(found: dict, sent: dict) -> bool:
    """Equal, but for the last digit of a double: FalkorDB answers 15, and Qdrant reads JSON to the nearest but one."""
    return found.keys() == sent.keys() and all(
        found[key] == (pytest.approx(sent[key], rel=1e-14) if isinstance(sent[key], float) else sent[key])
        for key in sent
    )


def test_points_by_the_endpoint_equal_those_made_directly(stores: Stores):
    samples = list(generate(250))
    embed = endpoint_embedder(stores.openai.base_url, "sk-test", MODEL, 64)
    written = load_points(stores.qdrant_url, "", stores.collection, 64, embed, iter(samples), orphans=3)
    with_point = {str(s.point_id): s for s in samples if s.payload is not None}
    assert written == len(with_point) + 3
    body = {"limit": 1000, "with_payload": True, "with_vector": True}
    answer = requests.post(f"{stores.collection_url()}/points/scroll", json=body, timeout=30)
    points = {str(point["id"]): point for point in answer.json()["result"]["points"]}
    assert len(points.keys() - with_point.keys()) == 3
    for point_id, sample in with_point.items():
        assert same(points[point_id]["payload"], sample.payload)
        assert np.dot(points[point_id]["vector"], direct([sample.content])[0]) == pytest.approx(1, abs=1e-4)


def test_what_is_there_is_not_mixed_with_samples(stores: Stores):
    conn = connect(stores.falkordb.address)
    load_graph(conn, "memories", generate(1))
    with pytest.raises(ValueError, match="exists already"):
        load_graph(conn, "memories", generate(1))
    load_points(stores.qdrant_url, "", stores.collection, 64, direct, generate(3))
    with pytest.raises(requests.HTTPError, match="already exists"):
        load_points(stores.qdrant_url, "", stores.collection, 64, direct, generate(3))
