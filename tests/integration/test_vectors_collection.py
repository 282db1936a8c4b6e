from __future__ import annotations

import hashlib
import io
from urllib.parse import urlsplit

import orjson
import pytest

from lib.clients.qdrant import cluster, collection, points, snapshots
from lib.clients.qdrant import collection as recreate
from lib.clients.qdrant import points as upsert
from lib.clients.qdrant.snapshot_format import inspect_snapshot, vector_params
from lib.clients.qdrant.transport import Qdrant, QdrantError
from lib.errors import BackupDamaged, MigrationError, MissingData, UsageProblem
from lib.verify.checks import PASSED, check_status
from tests.http_proxy import HttpProxy, Request
from tests.qdrant_uploads import content
from tests.vectors_support import (
    vectors_of,
)

pytest_plugins = ["tests.vectors_fixtures"]
pytestmark = pytest.mark.qdrant


def named(state: collection.CollectionState) -> bool:
    return vector_params(state.raw["config"]["params"]["vectors"])[2]


RICH = {
    "vectors": {"size": 8, "distance": "Dot", "on_disk": True},
    "shard_number": 2,
    "on_disk_payload": False,
    "hnsw_config": {"m": 32, "ef_construct": 64},
    "optimizers_config": {"indexing_threshold": 5000, "default_segment_number": 2},
    "wal_config": {"wal_capacity_mb": 4},
    "quantization_config": {"scalar": {"type": "int8", "always_ram": True}},
}
INDEXES = {
    "tags": {"data_type": "keyword"},
    "timestamp": {"data_type": "datetime", "params": {"type": "datetime", "is_principal": True}},
    "content": {"data_type": "text", "params": {"type": "text", "tokenizer": "word", "lowercase": True}},
    "importance": {"data_type": "float"},
}


def test_the_state_of_a_collection(q: Qdrant, filled: str):
    state = collection.get_state(q, filled)
    assert (state.size, state.distance, state.points, named(state)) == (8, "Cosine", 50, False)
    assert state.raw["payload_schema"]["tags"]["data_type"] == "keyword"
    assert collection.wait_green(q, filled, 30).optimized
    assert collection.health(q, filled) == "live"
    assert collection.exists(q, filled)


class IdleOptimizer(HttpProxy):
    """After a restart of the server its optimizers wait for an update, in the words of 1.11.3 and 1.18.3."""

    def __init__(self, q: Qdrant, status: str) -> None:
        place = urlsplit(q.base_url)
        super().__init__(str(place.hostname), int(place.port or 0))
        self.status, self.woken = status, False

    def open(self) -> None:
        pass

    def answer(self, request: Request, body: bytes) -> None:
        self.woken |= request.command == "PATCH"
        status, headers, content = request.forward(body)
        if request.command == "GET" and not self.woken:
            answer = orjson.loads(content)
            answer["result"]["status"] = self.status
            answer["result"]["optimizer_status"] = {"error": "optimizations pending, awaiting update operation"}
            content = orjson.dumps(answer)
        request.reply(status, headers, content)


@pytest.mark.parametrize("status", ["green", "grey"])
def test_an_idle_optimizer_is_started(q: Qdrant, filled: str, status: str):
    with IdleOptimizer(q, status) as proxy:
        near = Qdrant(proxy.url)
        check = check_status(collection.get_state(near, filled))
        assert (check.status, check.detail) == (PASSED, f"{status} (indexing continues with the next write)")
        assert collection.wait_green(near, filled, 30).optimized
        assert proxy.woken


def test_a_missing_collection_names_those_that_exist(q: Qdrant, filled: str, names: list[str]):
    with pytest.raises(MissingData, match=f"no collection '{names[1]}'.*{filled}"):
        collection.get_state(q, names[1])
    assert collection.health(q, names[1]) == "missing"
    assert not collection.delete_collection(q, names[1])


def test_a_collection_is_recreated_in_another_size_with_all_its_settings(q: Qdrant, names: list[str]):
    old, new = names[:2]
    q.json("PUT", f"/collections/{old}", RICH)
    q.json("PATCH", f"/collections/{old}", {"params": {"read_fan_out_factor": 3}})
    recreate.put_indexes(q, old, INDEXES)
    before = collection.get_state(q, old).raw
    recreate.create_like(q, new, before, 16, {"embedding_model": "text-embedding-3-large"})
    after = collection.get_state(q, new).raw
    metadata = after["config"].pop("metadata", None)
    assert after["config"]["params"].pop("vectors") == {"size": 16, "distance": "Dot", "on_disk": True}
    assert before["config"]["params"].pop("vectors")["size"] == 8
    assert after["config"] == before["config"]
    assert after["config"]["params"]["read_fan_out_factor"] == 3
    assert after["payload_schema"] == before["payload_schema"]
    assert set(after["payload_schema"]) == set(INDEXES)
    if q.version() >= "1.16":
        assert metadata == {"embedding_model": "text-embedding-3-large"}


def test_the_size_may_not_be_changed_if_vectors_are_named(q: Qdrant, names: list[str]):
    q.json("PUT", f"/collections/{names[0]}", {"vectors": {"a": {"size": 4, "distance": "Cosine"}}})
    state = collection.get_state(q, names[0])
    assert (state.size, named(state)) == (4, True)
    with pytest.raises(UsageProblem, match="named vectors"):
        recreate.create_like(q, names[1], state.raw, 8)
    assert not collection.exists(q, names[1])


def test_automems_own_collection(q: Qdrant, names: list[str]):
    recreate.create_like(q, names[0], recreate.AUTOMEM_INFO, 8, {"embedding_model": "m"})
    state = collection.get_state(q, names[0])
    assert (state.size, state.distance, state.points) == (8, "Cosine", 0)
    assert {key: entry["data_type"] for key, entry in state.raw["payload_schema"].items()} == {
        "tags": "keyword",
        "tag_prefixes": "keyword",
    }
    with pytest.raises(QdrantError, match="already exists"):
        recreate.create_like(q, names[0], recreate.AUTOMEM_INFO, 8)


def test_metadata_is_stored_if_the_server_knows_it(q: Qdrant, filled: str):
    knows = q.version() >= "1.16"
    collection.set_metadata(q, filled, {"embedding_model": "m"})
    assert collection.get_state(q, filled).raw["config"].get("metadata", {}) == (
        {"embedding_model": "m"} if knows else {}
    )


def test_aliases_are_put_back_and_never_deleted_through(q: Qdrant, filled: str, names: list[str]):
    aliases = [f"{filled}_a", f"{filled}_b"]
    assert recreate.restore_aliases(q, filled, [*aliases, filled]) == [filled]
    assert recreate.aliases_of(q, filled) == aliases
    assert not collection.exists(q, aliases[0])
    assert not collection.delete_collection(q, aliases[0])
    assert points.count(q, filled) == 50
    recreate.create_like(q, names[1], recreate.AUTOMEM_INFO, 4)
    assert recreate.restore_aliases(q, names[1], aliases[:1]) == aliases[:1]
    assert recreate.aliases_of(q, filled) == aliases
    assert collection.delete_collection(q, filled)
    assert collection.health(q, filled) == "missing"


class Gateway(HttpProxy):
    """Answers every DELETE by an error; the server carries it out only if `passed_on`."""

    def __init__(self, target: str, *, passed_on: bool) -> None:
        place = urlsplit(target)
        super().__init__(str(place.hostname), int(place.port or 0))
        self.passed_on = passed_on

    def open(self) -> None:
        """Nothing is held."""

    def answer(self, request: Request, body: bytes) -> None:
        answer = request.forward(body) if self.passed_on or request.command != "DELETE" else None
        request.reply(*(answer if answer and request.command != "DELETE" else (504, [], b"upstream timed out")))


def test_a_delete_that_a_gateway_did_not_wait_for_is_looked_up(q: Qdrant, filled: str):
    with Gateway(q.base_url, passed_on=False) as gateway, pytest.raises(QdrantError, match="504"):
        collection.delete_collection(Qdrant(gateway.url), filled)
    assert collection.exists(q, filled)
    with Gateway(q.base_url, passed_on=True) as gateway:
        assert collection.delete_collection(Qdrant(gateway.url), filled)
    assert not collection.exists(q, filled)


def test_a_collection_whose_restore_failed_is_failed_and_can_be_deleted(q: Qdrant, filled: str, names: list[str]):
    """On 1.11.3 a server that stops with a failed collection does not start again."""
    whole = io.BytesIO()
    snapshots.download(q, filled, snapshots.create(q, filled), whole.write)
    data = content("a.snapshot with the WAL 'x'", {"a.snapshot": whole.getvalue()}, recorded=False)
    with pytest.raises(BackupDamaged, match="WAL"):
        inspect_snapshot(io.BytesIO(data))
    with pytest.raises(QdrantError, match="Wal error"):
        send(q, names[1], data)
    assert collection.health(q, names[1]) == "failed"
    assert collection.exists(q, names[1])
    with pytest.raises(MigrationError, match="is failed"):
        snapshots.wait_restored(q, names[1], 1)
    for snapshot in snapshots.list_snapshots(q, names[1]):
        snapshots.delete(q, names[1], snapshot.name)
    assert collection.delete_collection(q, names[1])
    assert collection.health(q, names[1]) == "missing"


def test_rights_to_write_are_asked_for_without_a_trace(q: Qdrant, filled: str, names: list[str]):
    upsert.preflight_write(q, filled)
    assert points.count(q, filled) == 50
    snapshots.preflight_upload(q, filled)
    snapshots.preflight_upload(q, names[1])
    assert collection.get_state(q, filled).points == 50
    assert snapshots.list_snapshots(q, filled) == []
    assert not collection.exists(q, names[1])
    with pytest.raises(MissingData):
        upsert.preflight_write(q, names[1])


def test_a_single_node_holds_every_shard(q: Qdrant, filled: str):
    shards = cluster.topology(q, filled)
    assert shards.holders == {shards.this_peer}
    assert [shard.shard_id for shard in shards.shards] == [0]
    cluster.refuse_partial(shards)


def send(q: Qdrant, name: str, data: bytes) -> None:
    snapshots.upload_and_restore(
        q,
        name,
        io.BytesIO(data),
        size=len(data),
        filename=snapshots.unique_filename("test"),
        checksum=hashlib.sha256(data).hexdigest(),
    )


def test_points_of_another_dimension_do_not_get_in(q: Qdrant, filled: str):
    with pytest.raises(QdrantError):
        upsert.upsert(q, filled, [1], vectors_of(1, 4), [{}])
    assert collection.get_state(q, filled).points == 50
