from __future__ import annotations

import hashlib
import io

import pytest

from lib.errors import BackupDamaged, MigrationError, MissingData, UsageProblem
from lib.vectors import cluster, collection, points, recreate, restoring, snapshots, upsert
from lib.vectors.refusals import QdrantError
from lib.vectors.snapshot_tar import inspect_snapshot
from lib.vectors.transport import Qdrant
from tests.qdrant_uploads import content
from tests.vectors_support import (
    filled,  # noqa: F401
    names,  # noqa: F401
    server,  # noqa: F401
    vectors_of,
)

pytestmark = pytest.mark.qdrant

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


def test_the_state_of_a_collection(server: Qdrant, filled: str):
    state = collection.get_state(server, filled)
    assert (state.size, state.distance, state.points, state.vectors_named) == (8, "Cosine", 50, False)
    assert state.payload_schema["tags"]["data_type"] == "keyword"
    assert collection.wait_green(server, filled, 30).settled
    assert collection.health(server, filled) == "live"
    assert collection.exists(server, filled)


def test_a_missing_collection_names_those_that_exist(server: Qdrant, filled: str, names: list[str]):
    with pytest.raises(MissingData, match=f"no collection '{names[1]}'.*{filled}"):
        collection.get_state(server, names[1])
    assert collection.health(server, names[1]) == "missing"
    assert not collection.delete_collection(server, names[1])


def test_a_collection_is_made_anew_in_another_size_with_all_its_settings(server: Qdrant, names: list[str]):
    old, new = names[:2]
    server.json("PUT", f"/collections/{old}", RICH)
    server.json("PATCH", f"/collections/{old}", {"params": {"read_fan_out_factor": 3}})
    recreate.put_indexes(server, old, INDEXES)
    before = collection.get_state(server, old).raw
    recreate.create_like(server, new, before, 16, {"embedding_model": "text-embedding-3-large"})
    after = collection.get_state(server, new).raw
    metadata = after["config"].pop("metadata", None)
    assert after["config"]["params"].pop("vectors") == {"size": 16, "distance": "Dot", "on_disk": True}
    assert before["config"]["params"].pop("vectors")["size"] == 8
    assert after["config"] == before["config"]
    assert after["config"]["params"]["read_fan_out_factor"] == 3
    assert after["payload_schema"] == before["payload_schema"]
    assert set(after["payload_schema"]) == set(INDEXES)
    if server.version() >= "1.16":
        assert metadata == {"embedding_model": "text-embedding-3-large"}


def test_the_size_may_not_be_changed_where_vectors_are_named(server: Qdrant, names: list[str]):
    server.json("PUT", f"/collections/{names[0]}", {"vectors": {"a": {"size": 4, "distance": "Cosine"}}})
    state = collection.get_state(server, names[0])
    assert (state.size, state.vectors_named) == (4, True)
    with pytest.raises(UsageProblem, match="named vectors"):
        recreate.create_like(server, names[1], state.raw, 8)
    assert not collection.exists(server, names[1])


def test_automems_own_collection(server: Qdrant, names: list[str]):
    recreate.create_default(server, names[0], 8, {"embedding_model": "m"})
    state = collection.get_state(server, names[0])
    assert (state.size, state.distance, state.points) == (8, "Cosine", 0)
    assert {key: entry["data_type"] for key, entry in state.payload_schema.items()} == {
        "tags": "keyword",
        "tag_prefixes": "keyword",
    }
    with pytest.raises(QdrantError, match="already exists"):
        recreate.create_default(server, names[0], 8)


def test_metadata_is_kept_where_the_server_knows_it(server: Qdrant, filled: str):
    knows = server.version() >= "1.16"
    assert collection.set_metadata(server, filled, {"embedding_model": "m"}) is knows
    assert collection.get_state(server, filled).metadata == ({"embedding_model": "m"} if knows else {})


def test_aliases_are_put_back_and_never_deleted_through(server: Qdrant, filled: str, names: list[str]):
    aliases = [f"{filled}_a", f"{filled}_b"]
    recreate.put_aliases(server, filled, aliases)
    assert recreate.aliases_of(server, filled) == aliases
    assert not collection.exists(server, aliases[0])
    assert not collection.delete_collection(server, aliases[0])
    assert points.count(server, filled) == 50
    recreate.create_default(server, names[1], 4)
    recreate.put_aliases(server, names[1], aliases[:1])
    assert recreate.aliases_of(server, filled) == aliases[1:]
    assert collection.delete_collection(server, filled)
    assert collection.health(server, filled) == "missing"


def test_a_collection_whose_restore_failed_is_dead_and_can_be_deleted(
    server: Qdrant, filled: str, names: list[str]
):
    """On 1.11.3 a server that stops with a dead collection does not start again."""
    whole = io.BytesIO()
    snapshots.download(server, filled, snapshots.create(server, filled), whole.write)
    data = content("a.snapshot with the WAL 'x'", {"a.snapshot": whole.getvalue()}, recorded=False)
    with pytest.raises(BackupDamaged, match="WAL"):
        inspect_snapshot(io.BytesIO(data))
    with pytest.raises(QdrantError, match="Wal error"):
        send(server, names[1], data)
    assert collection.is_dead(server, names[1])
    assert collection.exists(server, names[1])
    with pytest.raises(MigrationError, match="is dead"):
        restoring.wait_restored(server, names[1], 1)
    for snapshot in snapshots.list_snapshots(server, names[1]):
        assert snapshots.delete(server, names[1], snapshot.name)
    assert collection.delete_collection(server, names[1])
    assert collection.health(server, names[1]) == "missing"


def test_rights_to_write_are_asked_for_without_a_trace(server: Qdrant, filled: str, names: list[str]):
    upsert.preflight_write(server, filled)
    assert points.count(server, filled) == 50
    restoring.preflight_upload(server, filled)
    restoring.preflight_upload(server, names[1])
    assert collection.get_state(server, filled).points == 50
    assert snapshots.list_snapshots(server, filled) == []
    assert not collection.exists(server, names[1])
    with pytest.raises(MissingData):
        upsert.preflight_write(server, names[1])


def test_a_single_node_holds_every_shard(server: Qdrant, filled: str):
    shards = cluster.topology(server, filled)
    assert shards.holders == {shards.this_peer}
    assert [shard.points for shard in shards.shards] == [50]
    cluster.refuse_partial(shards)


def send(q: Qdrant, name: str, data: bytes) -> None:
    restoring.upload_and_restore(
        q,
        name,
        io.BytesIO(data),
        size=len(data),
        filename=restoring.unique_filename("test"),
        checksum=hashlib.sha256(data).hexdigest(),
    )


def test_points_of_another_dimension_do_not_get_in(server: Qdrant, filled: str):
    with pytest.raises(QdrantError):
        upsert.upsert(server, filled, [1], vectors_of(1, 4), [{}])
    assert collection.get_state(server, filled).points == 50
