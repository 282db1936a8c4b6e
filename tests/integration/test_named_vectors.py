"""A collection with named vectors, which AutoMem never creates: it is backed up and restored, and not re-embedded."""

from __future__ import annotations

import json

import pytest

from lib.backup.archive import peek_facts
from lib.clients.falkordb.connection import connect
from tests.sandbox.sample_loading import load_graph
from tests.sandbox.sample_memories import generate

pytestmark = pytest.mark.qdrant
VECTORS = {"text": {"size": 8, "distance": "Cosine"}, "image": {"size": 4, "distance": "Dot"}}


@pytest.fixture
def named(operator):
    """20 points with two vectors each."""
    memories = list(generate(20))
    with connect(operator.servers.falkordb.address) as conn:
        load_graph(conn, operator.graph, memories)
    operator.call("PUT", "", {"vectors": VECTORS})
    points = [
        {
            "id": number,
            "vector": {"text": [1.0] * 7 + [number], "image": [number, 1.0, 2.0, 3.0]},
            "payload": {"n": number},
        }
        for number in range(1, 21)
    ]
    operator.call("PUT", "/points?wait=true", {"points": points})
    return operator


def contents(operator) -> list[dict]:
    body = {"limit": 100, "with_payload": True, "with_vector": True}
    return operator.call("POST", "/points/scroll", body)["points"]


def test_both_vectors_are_in_the_backup_and_come_back(named):
    before = contents(named)
    assert set(before[0]["vector"]) == set(VECTORS)
    named.run("backup_automem", "--only", "qdrant")
    component = json.loads(named.manifests()[-1].read_text())["collection"]
    assert component["points"] == component["promised_ids"] == 20
    assert component["proof"] in {"checked", "restored"}
    recorded = peek_facts(named.backups / component["file"]["name"])["config"]["params"]["vectors"]
    assert {name: {"size": one["size"], "distance": one["distance"]} for name, one in recorded.items()} == VECTORS
    assert "DAMAGED" not in named.run("backup_automem", "--check", "all").out
    named.call("POST", "/points/delete?wait=true", {"points": [1, 2, 3]})
    named.run("restore_from_backup", str(named.manifests()[-1]))
    assert contents(named) == before
    assert named.collections() == [named.collection]


def test_it_is_not_re_embedded(named):
    named.run("backup_automem", "--only", "qdrant")
    before = contents(named)
    refused = named.run("reembed_embeddings", expect=2)
    assert "named vectors" in refused.err
    assert contents(named) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vectors": VECTORS}, "named vectors: 'image', 'text'"),
        (
            {"vectors": {"size": 4, "distance": "Cosine", "multivector_config": {"comparator": "max_sim"}}},
            "a multivector",
        ),
        ({"vectors": {}, "sparse_vectors": {"bm25": {}}}, "no unnamed vector"),
    ],
    ids=["named", "multivector", "sparse only"],
)
def test_the_size_of_other_vectors_is_compared_with_nothing(operator, settings, message):
    """Neither `export VECTOR_SIZE` nor a re-embed, which refuses the collection, would help."""
    operator.cypher("CREATE (:Memory {id: 'one', content: 'text'})")
    operator.call("PUT", "", settings)
    for script, *words in (["verify_migration"], ["reembed_embeddings", "--only-missing"]):
        refused = operator.run(script, *words, expect=2).err
        assert f"the collection has {message}" in refused
        assert "set QDRANT_COLLECTION to AutoMem's collection" in refused
        assert "VECTOR_SIZE" not in refused


def test_no_size_is_put_back_for_a_collection_of_sparse_vectors_alone(operator):
    operator.call("PUT", "", {"vectors": {}, "sparse_vectors": {"bm25": {}}})
    points = [{"id": 1, "vector": {"bm25": {"indices": [3], "values": [0.5]}}, "payload": {"n": 1}}]
    operator.call("PUT", "/points?wait=true", {"points": points})
    before = contents(operator)
    operator.run("backup_automem", "--only", "qdrant")
    operator.call("POST", "/points/delete?wait=true", {"points": [1]})
    assert "VECTOR_SIZE=0" not in operator.run("restore_from_backup", str(operator.manifests()[-1])).out
    assert contents(operator) == before
