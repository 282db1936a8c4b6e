"""The AutoMem stand-in against what AutoMem itself answered and wrote."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
import requests

from lib.clients.falkordb.connection import connect
from tests import automem_support
from tests.automem_recordings.recordings import differences, load_recording, rows
from tests.automem_support import MODEL, TOKEN, Stores
from tests.sandbox.automem_server import AutoMemServer
from tests.sandbox.process import ServerStartError
from tests.sandbox.sample_loading import endpoint_embedder, load_graph, load_points
from tests.sandbox.sample_memories import generate
from tests.sandbox.vectors import vectors_for

pytestmark = [pytest.mark.qdrant, pytest.mark.matrix]
servers, stores = automem_support.servers, automem_support.stores
LEFT_OUT = {
    "associate": "no tool of ours writes relationships: the test writes the one that recall shows",
    "get one": "no tool of ours reads single memories through the API",
    "get missing": "as above",
    "update": "changes of memories are made in the stores by the tests themselves",
    "delete": "as above",
}
NOT_JSON = "store, not JSON"
KEY_IN_OTHER_HEADER = "recall, X-API-Key"
RECORDED = {row["title"]: row for row in rows("title")}
# Values, not only types, that must be the recorded ones.
FRAME = frozenset(
    {
        "status",
        "code",
        "message",
        "query",
        "keywords",
        "count",
        "dedup_removed",
        "state_filter",
        "state_mode",
        "sort",
    }
    | {"tag_match", "tag_mode", "vector_search"}
)
MEMORY = frozenset({"type", "confidence", "importance", "tags", "metadata", "match_type", "embedding_status", "qdrant"})
HEALTH = frozenset(
    {"falkordb", "graph", "memory_count", "vector_count", "sync_status", "vector_dimensions", "enrichment"}
)


@pytest.fixture
def automem(stores: Stores, tmp_path) -> Iterator[AutoMemServer]:
    server = AutoMemServer(env=stores.env(), log=tmp_path / "automem.log")
    yield server
    server.stop()


def replay(server: AutoMemServer, title: str) -> requests.Response:
    sent = RECORDED[title]["request"]
    return send(server, title, sent)


def send(server: AutoMemServer, title: str, sent: dict[str, Any]) -> requests.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"} if sent["authorized"] else {}
    if title == KEY_IN_OTHER_HEADER:
        headers = {"X-API-Key": TOKEN}
    if title == "recall, wrong token":
        headers = {"Authorization": "Bearer something-else"}
    extra: dict[str, Any] = {"json": sent["json"]} if "json" in sent else {}
    if title == NOT_JSON:
        extra = {"data": "not json"}
    url = server.url + sent["path"]
    return requests.request(sent["method"], url, headers=headers, params=sent.get("params"), timeout=30, **extra)


def wait_idle(server: AutoMemServer, memories: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        state = server.health()["enrichment"]
        if state["processed"] + state["failed"] >= memories and not state["inflight"]:
            return
        time.sleep(0.05)
    pytest.fail(f"the worker did not finish: {server.log_tail()}")


def compare(title: str, ours: requests.Response, recorded: dict[str, Any], same: frozenset[str]) -> None:
    assert ours.status_code == recorded["status"], f"{title}: {ours.text}"
    assert ours.headers["content-type"] == recorded["content-type"]
    assert list(differences(ours.json(), recorded["json"], same=same)) == [], title


def test_the_requests_in_their_order_on_empty_stores(automem: AutoMemServer, stores: Stores):
    automem.start()
    compared = stored = 0
    for row in rows("title"):
        title = row["title"]
        if title.startswith("collection "):
            break
        if title == "associate":
            associate(stores)
        if title in LEFT_OUT:
            continue
        if title == "health, with memories":
            wait_idle(automem, stored)
        ours = send(automem, title, row["request"])
        stored += ours.status_code == 201
        compare(
            title,
            ours,
            row["response"],
            FRAME if row["request"]["path"] == "/recall" else FRAME | MEMORY | HEALTH,
        )
        compared += 1
    assert compared == len(RECORDED_BEFORE) - len(LEFT_OUT)
    wait_idle(automem, stored)
    check_what_was_written(stores)


def associate(stores: Stores) -> None:
    """Write the recorded relationship: without it the first memory has none, whose shape recall is compared by."""
    contents = {row["node"]["properties"]["id"]: row["node"]["properties"]["content"] for row in rows("node")}
    sent = RECORDED["associate"]["request"]["json"]
    query = (
        "MATCH (a:Memory {content: $from}) MATCH (b:Memory {content: $to}) "
        "CREATE (a)-[r:RELATES_TO {strength: $strength, updated_at: $now}]->(b) RETURN count(r)"
    )
    from falkordb.graph import Graph

    made = Graph(connect_decoded(stores), "memories").query(
        query,
        {
            "from": contents[sent["memory1_id"]],
            "to": contents[sent["memory2_id"]],
            "strength": sent["strength"],
            "now": datetime.now(timezone.utc).isoformat(),
        },
    )
    assert made.result_set == [[1]]


RECORDED_BEFORE = [row for row in rows("title") if not row["title"].startswith("collection ")]


def check_what_was_written(stores: Stores) -> None:
    """Nodes, relationships and points have the recorded keys, and the values that depend on nothing else."""
    recorded_nodes = {row["node"]["properties"]["content"]: row["node"]["properties"] for row in rows("node")}
    from falkordb.graph import Graph

    graph = Graph(connect_decoded(stores), "memories")
    nodes = {row[0].properties["content"]: row[0].properties for row in graph.query("MATCH (m) RETURN m").result_set}
    assert nodes.keys() >= recorded_nodes.keys()
    patched = "Alice prefers short stand-ups on Monday mornings."
    for content, recorded in recorded_nodes.items():
        assert nodes[content].keys() == recorded.keys(), content
        same = frozenset({"content", "type", "confidence", "summary", "enriched", "processed"})
        assert list(differences(nodes[content], recorded, same=same)) == []
        if content != patched and "PostgreSQL" not in content:
            assert nodes[content]["tags"] == recorded["tags"]
            assert nodes[content]["tag_prefixes"] == recorded["tag_prefixes"]
    links = graph.query("MATCH ()-[r:PRECEDED_BY]->() RETURN r").result_set
    assert {frozenset(row[0].properties) for row in links} == {frozenset({"count", "updated_at"})}
    check_points(stores, patched, nodes)


def check_points(stores: Stores, patched: str, nodes: dict[str, Any]) -> None:
    body = {"limit": 100, "with_payload": True}
    found = requests.post(f"{stores.collection_url()}/points/scroll", json=body, timeout=30).json()["result"]["points"]
    payloads = {point["payload"]["content"]: point for point in found}
    assert payloads.keys() == nodes.keys()
    for row in rows("point"):
        recorded = row["point"]["payload"]
        if recorded["content"] == patched:
            continue  # a PATCH, left out above, changed its keys
        point = payloads[recorded["content"]]
        assert point["payload"].keys() == recorded.keys()
        assert list(differences(point["payload"], recorded, same=frozenset({"relevance_score", "importance"}))) == []
        assert point["id"] == nodes[recorded["content"]]["id"]
        added = {"entities", "enrichment"}
        assert {k: v for k, v in point["payload"]["metadata"].items() if k not in added} == {
            k: v for k, v in recorded["metadata"].items() if k not in added
        }


def connect_decoded(stores: Stores):
    import redis

    return redis.Redis(port=stores.falkordb.port, decode_responses=True)


def load(stores: Stores) -> int:
    conn = connect(stores.falkordb.address)
    return load_recording(
        conn, "memories", stores.qdrant_url, stores.collection, lambda texts: vectors_for(MODEL, texts, 768)
    )


def test_the_collection_made_at_the_start_is_the_recorded_one(automem: AutoMemServer, stores: Stores):
    automem.start()
    made = requests.get(stores.collection_url(), timeout=30).json()["result"]
    recorded = rows("collection")[0]
    assert made["config"]["params"] == recorded["collection"]["params"]
    assert {name: field["data_type"] for name, field in made["payload_schema"].items()} == {
        name: field["data_type"] for name, field in recorded["payload_schema"].items()
    }


def test_without_the_collection_and_with_one_of_another_size_on_the_recorded_data(
    automem: AutoMemServer, stores: Stores
):
    assert load(stores) == 9
    automem.start()
    requests.delete(stores.collection_url(), timeout=30).raise_for_status()
    stored = 0
    for row in rows("title"):
        title = row["title"]
        if not title.startswith("collection "):
            continue
        if title.endswith("size: store"):
            body = {"vectors": {"size": 3072, "distance": "Cosine"}}
            requests.put(stores.collection_url(), json=body, timeout=30).raise_for_status()
        if title.endswith("health"):
            wait_idle(automem, stored)
        ours = send(automem, title, row["request"])
        stored += ours.status_code == 201
        compare(title, ours, row["response"], (FRAME | MEMORY | HEALTH | {"match_score"}) - {"enrichment"})
    log = automem.log_tail()
    assert "Qdrant upsert failed" in log
    assert automem.health()["vector_dimensions"] == {
        "collection": 3072,
        "configured": 768,
        "effective": 768,
        "mismatch": True,
    }


def test_recall_shows_the_recorded_payloads_and_relations(automem: AutoMemServer, stores: Stores):
    load(stores)
    automem.start()
    ours = {r["id"]: r for r in ask(automem, "database choice PostgreSQL", limit=9)["results"]}
    compared = 0
    for theirs in RECORDED["recall"]["response"]["json"]["results"]:
        mine = ours[theirs["id"]]
        assert mine["match_type"] == theirs["match_type"] == "vector"
        assert {**mine["memory"], "last_accessed": 0} == {**theirs["memory"], "last_accessed": 0}
        assert [(r["type"], r["strength"]) for r in mine["relations"]] == [
            (r["type"], r["strength"]) for r in theirs["relations"]
        ]
        assert mine["score_components"]["keyword"] == theirs["score_components"]["keyword"]
        compared += 1
    assert compared == 3


def ask(server: AutoMemServer, query: str, **more: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = requests.get(f"{server.url}/recall", params={"query": query, **more}, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_memory_is_recalled_by_its_own_content_and_only_by_vectors_of_the_configured_model(
    automem: AutoMemServer, stores: Stores
):
    load(stores)
    automem.start()
    for row in rows("point"):
        first = ask(automem, row["point"]["payload"]["content"], limit=3)["results"][0]
        assert (first["id"], first["match_type"]) == (row["point"]["id"], "vector")
        assert first["match_score"] > 0.99
    automem.restart({"EMBEDDING_MODEL": "text-embedding-3-large"})
    scores = [
        ask(automem, row["point"]["payload"]["content"], limit=1)["results"][0]["match_score"] for row in rows("point")
    ]
    assert max(scores) < 0.5


def test_recall_moves_last_accessed_in_the_graph_alone(automem: AutoMemServer, stores: Stores):
    load(stores)
    automem.start()
    content = "Weekly review happens every Friday at four."
    found = ask(automem, content, limit=1)["results"][0]
    query = f"MATCH (m:Memory {{id: '{found['id']}'}}) RETURN m.last_accessed"
    after = connect_decoded(stores).execute_command("GRAPH.QUERY", "memories", query)[1][0][0]
    assert after > found["memory"]["last_accessed"]
    point = requests.get(f"{stores.collection_url()}/points/{found['id']}", timeout=30).json()["result"]
    assert point["payload"]["last_accessed"] == found["memory"]["last_accessed"]


def test_archived_and_expired_memories_are_not_recalled(automem: AutoMemServer, stores: Stores):
    load(stores)
    ids = [row["point"]["id"] for row in rows("point")][:2]
    url = f"{stores.collection_url()}/points/payload?wait=true"
    changes = ({"archived": True}, {"t_invalid": "2020-01-01T00:00:00Z"})
    for point_id, payload in zip(ids, changes, strict=True):
        requests.post(url, json={"points": [point_id], "payload": payload}, timeout=30).raise_for_status()
    automem.start()
    contents = [row["point"]["payload"]["content"] for row in rows("point")][:2]
    for point_id, content in zip(ids, contents, strict=True):
        vector_hits = [r["id"] for r in ask(automem, content, limit=9)["results"] if r["match_type"] == "vector"]
        assert vector_hits
        assert point_id not in vector_hits


def test_it_refuses_to_start_on_another_size_and_adopts_it_if_configured(automem: AutoMemServer, stores: Stores):
    load(stores)
    automem.start()
    with pytest.raises(ServerStartError) as refused:
        automem.restart({"VECTOR_SIZE": "3072"})
    assert (
        "ValueError: VECTOR DIMENSION MISMATCH\n"
        f"Qdrant collection '{stores.collection}': 768d\n"
        "Config VECTOR_SIZE: 3072d" in str(refused.value)
    )
    automem.restart({"VECTOR_SIZE_AUTODETECT": "true", "EMBEDDING_MODEL": MODEL})
    assert automem.health()["vector_dimensions"] == {
        "collection": 768,
        "configured": 3072,
        "effective": 768,
        "mismatch": True,
    }
    assert ask(automem, "chocolate", limit=1)["results"][0]["match_type"] == "vector"


def test_a_later_version_takes_post_recall(automem: AutoMemServer, stores: Stores):
    load(stores)
    automem.start()
    assert replay(automem, "POST recall, as the guide writes it").status_code == 405
    automem.restart({"AUTOMEM_POST_RECALL": "1"})
    answer = replay(automem, "POST recall, as the guide writes it")
    assert answer.status_code == 200
    assert [r["match_type"] for r in answer.json()["results"]] == ["vector"] * 5


VOYAGE_KEY = "pa-sandbox"


@pytest.mark.parametrize(("provider", "found"), [("auto", False), ("openai", True)])
def test_a_key_of_voyage_makes_recall_of_openais_vectors_noise(stores: Stores, tmp_path, provider, found):
    """Of one size, so that every check of dimensions passes."""
    large, size, memories = "text-embedding-3-large", 1024, list(generate(150))
    with connect(stores.falkordb.address) as conn:
        load_graph(conn, "memories", memories)
    embed = endpoint_embedder(stores.openai.base_url, "sk-test", large, size)
    load_points(stores.qdrant_url, "", stores.collection, size, embed, memories)
    settings = {"VECTOR_SIZE": str(size), "EMBEDDING_MODEL": large, "EMBEDDING_PROVIDER": provider}
    voyage = {"VOYAGE_API_KEY": VOYAGE_KEY, "VOYAGE_BASE_URL": stores.openai.voyage_url}
    asked = [one for one in memories if one.labels == ("Memory",) and len(str(one.properties.get("content"))) > 60][:5]
    with AutoMemServer(env=stores.env(**settings, **voyage), log=tmp_path / "automem.log") as automem:
        assert not automem.health()["vector_dimensions"]["mismatch"]
        stores.openai.reset()
        first = [first_by_vector(automem, str(one.properties["content"])) == one.properties["id"] for one in asked]
    assert first == [found] * 5
    assert list(stores.openai.stats()["models"]) == [large if found else "voyage-4"]


def first_by_vector(automem: AutoMemServer, text: str) -> str:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = requests.get(f"{automem.url}/recall", params={"query": text, "limit": 50}, headers=headers, timeout=30)
    by_vector = [one for one in answer.json()["results"] if one["match_type"] == "vector"]
    return max(by_vector, key=lambda one: one["match_score"])["id"]
