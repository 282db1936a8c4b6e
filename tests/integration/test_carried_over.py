"""What a re-embedding carries over of a collection: every field of its configuration and of a point, decided."""

from __future__ import annotations

import json

import pytest
import requests

from lib.clients.qdrant.collection import create_body, refuse_foreign
from lib.errors import UsageProblem
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, SMALL
from tests.reembed_support import assert_migrated, points_of, settings, upgrade
from tests.sandbox.vectors import vector_for

pytestmark = pytest.mark.qdrant

CARRIED, REFUSED, NEW, STATE = "carried over", "refused", "set by the migration", "state, not a setting"

# Every field of `GET /collections/{name}` and of a point, in 1.11.3, 1.18.3 and 1.19.0 (lib/collection/src/config.rs,
# operations/types.rs, lib/segment/src/types.rs). What lies deeper than a row is carried over with it.
DECISIONS = {
    "status": STATE,
    "optimizer_status": STATE,
    "warnings": STATE,
    "vectors_count": STATE,
    "indexed_vectors_count": STATE,
    "points_count": STATE,
    "segments_count": STATE,
    "update_queue": STATE,
    "config.params.vectors.size": NEW,
    "config.params.vectors.distance": CARRIED,
    "config.params.vectors.hnsw_config": CARRIED,
    "config.params.vectors.quantization_config": CARRIED,
    "config.params.vectors.on_disk": CARRIED,
    "config.params.vectors.memory": CARRIED,
    "config.params.vectors.datatype": CARRIED,  # uint8 is refused
    "config.params.vectors.multivector_config": REFUSED,
    "config.params.shard_number": CARRIED,
    "config.params.sharding_method": CARRIED,  # custom is refused
    "config.params.replication_factor": CARRIED,
    "config.params.write_consistency_factor": CARRIED,
    "config.params.read_fan_out_factor": CARRIED,
    "config.params.read_fan_out_delay_ms": CARRIED,
    "config.params.on_disk_payload": CARRIED,
    "config.params.payload": CARRIED,
    "config.params.sparse_vectors": REFUSED,
    "config.hnsw_config": CARRIED,
    "config.optimizer_config": CARRIED,
    "config.wal_config": CARRIED,
    "config.quantization_config": CARRIED,
    "config.strict_mode_config": CARRIED,
    "config.metadata": CARRIED,
    "payload_schema": CARRIED,
    "point.id": CARRIED,
    "point.payload": CARRIED,
    "point.vector": NEW,  # any further vector is refused
    "point.shard_key": REFUSED,  # exists under custom sharding alone
    "point.order_value": STATE,  # exists in answers to an ordered scroll alone
}
DEEPER = ("config", "config.params", "config.params.vectors")

# A value for every field of the configuration, as the info shows it.
WHOLE = {
    "params": {
        "vectors": {
            "size": 48,
            "distance": "Cosine",
            "hnsw_config": {"m": 20},
            "quantization_config": {"scalar": {"type": "int8"}},
            "on_disk": True,
            "memory": "cold",
            "datatype": "float16",
        },
        "shard_number": 2,
        "sharding_method": "auto",
        "replication_factor": 2,
        "write_consistency_factor": 2,
        "read_fan_out_factor": 1,
        "read_fan_out_delay_ms": 9,
        "on_disk_payload": True,
        "payload": {"memory": "cached"},
    },
    "hnsw_config": {"m": 24},
    "optimizer_config": {"flush_interval_sec": 7},
    "wal_config": {"wal_capacity_mb": 2},
    "quantization_config": {"binary": {}},
    "strict_mode_config": {"enabled": False},
    "metadata": {"mine": 1},
}


def fields(info: dict, prefix: str = "") -> list[str]:
    """The paths of an info's fields, as deep as the table goes."""
    found = []
    for key, value in info.items():
        path = f"{prefix}{key}"
        found += fields(value, f"{path}.") if path in DEEPER else [path]
    return found


def test_a_server_shows_no_field_that_is_not_decided(operator):
    operator.load(20)
    shown = fields(operator.info())
    assert "config.params.vectors.size" in shown
    assert [one for one in shown if one not in DECISIONS] == []
    body = {"limit": 1, "with_payload": True, "with_vector": True}
    (point,) = operator.call("POST", "/points/scroll", body)["points"]
    assert [key for key in point if f"point.{key}" not in DECISIONS] == []


def test_every_carried_field_is_in_the_create_call():
    """Except for fields that the create call does not accept: `create_like` sets them by PATCH."""
    decided = {path for path, what in DECISIONS.items() if path.startswith("config.") and what != REFUSED}
    assert set(fields({"config": WHOLE})) == decided
    body = create_body({"config": WHOLE}, 96)
    params = dict(WHOLE["params"])
    vectors = {**params.pop("vectors"), "size": 96}
    rest = {key: value for key, value in WHOLE.items() if key not in {"params", "optimizer_config"}}
    by_patch = {"read_fan_out_factor", "read_fan_out_delay_ms"}
    taken = {key: value for key, value in params.items() if key not in by_patch}
    assert body == {"vectors": vectors, **taken, **rest, "optimizers_config": WHOLE["optimizer_config"]}


@pytest.mark.parametrize("where", ["params", "config"])
def test_a_setting_of_a_newer_server_is_refused_by_name(where):
    raw = json.loads(json.dumps({"config": WHOLE}))
    (raw["config"]["params"] if where == "params" else raw["config"])["time_travel"] = {"on": True}
    name = "config.params.time_travel" if where == "params" else "config.time_travel"
    with pytest.raises(UsageProblem, match=name):
        refuse_foreign(raw)
    (raw["config"]["params"] if where == "params" else raw["config"])["time_travel"] = None
    refuse_foreign(raw)


DENSE = {"size": OLD_SIZE, "distance": "Cosine"}
FOREIGN = {
    "sparse vectors": ({"vectors": DENSE, "sparse_vectors": {"bm25": {}}}, "sparse vectors: 'bm25'"),
    "named vectors": ({"vectors": {"text": DENSE, "image": DENSE}}, "named vectors: 'image', 'text'"),
    "a multivector": (
        {"vectors": {**DENSE, "multivector_config": {"comparator": "max_sim"}}},
        "a multivector",
    ),
    "uint8": ({"vectors": {**DENSE, "datatype": "uint8"}}, "datatype uint8"),
    "custom sharding": ({"vectors": DENSE, "sharding_method": "custom"}, "custom sharding"),
}


def make_foreign(operator, kind: str) -> None:
    """The operator's collection once more, as `kind`; with its points, and a sparse vector each, for sparse vectors."""
    points = points_of(operator)
    operator.call("DELETE", "")
    url = f"{operator.servers.qdrant_url}/collections/{operator.collection}"
    answer = requests.put(url, json=FOREIGN[kind][0], timeout=60)
    if not answer.ok and kind == "custom sharding":
        pytest.skip(f"a server alone takes no shard keys: {answer.text}")
    answer.raise_for_status()
    if kind == "sparse vectors":
        sparse = {"bm25": {"indices": [1, 7], "values": [0.5, 2.0]}}
        rows = [
            {"id": one, "payload": payload, "vector": {"": vector.tolist(), **sparse}}
            for one, (payload, vector) in points.items()
        ]
        operator.call("PUT", "/points?wait=true", {"points": rows})


def everything(operator) -> list[dict]:
    body = {"limit": 1000, "with_payload": True, "with_vector": True}
    return operator.call("POST", "/points/scroll", body)["points"]


COMMANDS = [("--dry-run",), ("--in-place",), ("--only-missing",), ("--limit", "5")]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *((kind, ()) for kind in FOREIGN),
        ("sparse vectors", ("--only-missing",)),
        *(pytest.param(kind, words, marks=pytest.mark.matrix) for kind in FOREIGN for words in COMMANDS),
    ],
)
def test_what_is_not_carried_over_is_refused_before_anything_is_paid_for(operator, kind, words):
    operator.load(40)
    make_foreign(operator, kind)
    if kind != "custom sharding":  # without a shard key it has no shard that could be backed up
        operator.run("backup_automem", "--only", "qdrant")
    if words != ("--only-missing",):
        upgrade(operator)
    operator.servers.openai.reset()
    before, config = everything(operator), operator.info()["config"]
    refused = operator.run("reembed_embeddings", *words, expect=2)
    assert FOREIGN[kind][1] in refused.err
    assert operator.servers.openai.stats()["texts"] == 0
    assert everything(operator) == before
    assert operator.info()["config"] == config
    assert operator.collections() == [operator.collection]


def test_a_collection_that_is_gone_is_refused_by_its_backup(operator):
    """Deleted by hand: the recreated one would lack what only the backup still has."""
    operator.load(20)
    make_foreign(operator, "sparse vectors")
    before = everything(operator)
    operator.run("backup_automem", "--only", "qdrant")
    operator.call("DELETE", "")
    upgrade(operator)
    operator.servers.openai.reset()
    refused = operator.run("reembed_embeddings", expect=2)
    assert "sparse vectors: 'bm25'" in refused.err
    assert operator.servers.openai.stats()["texts"] == 0
    operator.run("restore_from_backup", operator.archive())
    assert everything(operator) == before


def test_sparse_vectors_are_no_obstacle_to_verify(operator):
    operator.load(40)
    make_foreign(operator, "sparse vectors")
    found = operator.run("verify_migration", "--json", expect=None).json["checks"]
    assert {one["name"]: one["status"] for one in found}["vectors"] == "passed"


@pytest.mark.parametrize(
    ("datatype", "distance", "method"),
    [
        ("float16", "Cosine", ("--in-place",)),
        *(
            pytest.param(datatype, distance, method, marks=pytest.mark.matrix)
            for datatype in ("float32", "float16", "turbo4")
            for distance in ("Cosine", "Dot")
            for method in ((), ("--in-place",))
        ),
    ],
)
def test_every_datatype_is_migrated_and_compared_as_it_is_stored(operator, datatype, distance, method):
    operator.load(60)
    points = points_of(operator)
    operator.call("DELETE", "")
    vectors = {"size": OLD_SIZE, "distance": distance, "datatype": datatype}
    url = f"{operator.servers.qdrant_url}/collections/{operator.collection}"
    answer = requests.put(url, json={"vectors": vectors}, timeout=60)
    if not answer.ok and datatype == "turbo4":
        pytest.skip(f"this server does not know it: {answer.text}")
    for field in ("tags", "tag_prefixes"):
        operator.call("PUT", "/index?wait=true", {"field_name": field, "field_schema": "keyword"})
    rows = [{"id": one, "payload": payload, "vector": vector.tolist()} for one, (payload, vector) in points.items()]
    operator.call("PUT", "/points?wait=true", {"points": rows})
    operator.run("backup_automem")
    had = settings(operator)
    upgrade(operator)
    done = operator.run("reembed_embeddings", *method, "--json").json
    assert done["mended"] == 0
    assert settings(operator) == had
    assert operator.info()["config"]["params"]["vectors"]["datatype"] == datatype
    if datatype == "float32" and distance == "Cosine":
        assert_migrated(operator, points)
    assert points_of(operator).keys() == points.keys()
    # The same command again finds its own result; a vector of another model is found, too.
    assert operator.run("reembed_embeddings", "--only-missing", "--json").json["mended"] == 0
    checks = {one["name"]: one for one in operator.run("verify_migration", "--json", expect=None).json["checks"]}
    assert checks["vectors"]["status"] == "passed"
    assert f"{len(points)} equal to the embedding cache's" in checks["vectors"]["detail"]
    one = next(iter(points))
    wrong = points[one][1].tolist() * (NEW_SIZE // OLD_SIZE)
    operator.call("PUT", "/points/vectors?wait=true", {"points": [{"id": one, "vector": wrong}]})
    checks = {one["name"]: one for one in operator.run("verify_migration", "--json", expect=4).json["checks"]}
    assert checks["vectors"]["status"] == "FAILED"


def test_a_collection_whose_strict_mode_permits_nothing_exact_is_migrated(operator):
    """Strict mode also forbids an exact count, on which every command relies."""
    if operator.qdrant.version() < "1.13":
        pytest.skip("strict mode came with 1.13")
    operator.load(40)
    points = points_of(operator)
    operator.call("PATCH", "", {"strict_mode_config": {"enabled": True, "search_allow_exact": False}})
    operator.run("backup_automem")
    had = settings(operator)
    upgrade(operator)
    refused = operator.run("reembed_embeddings", "--limit", "5", expect=1)
    assert "permit it there while these scripts run (strict_mode_config)" in refused.err
    operator.run("reembed_embeddings")
    assert_migrated(operator, points)
    assert settings(operator) == had
    operator.run("verify_migration")
    operator.run("restore_from_backup", operator.archive())
    assert points_of(operator).keys() == points.keys()


def require_later_vectors(operator) -> None:
    """Skip if the server cannot add a vector to a collection: it answers as for an unknown address."""
    url = f"{operator.servers.qdrant_url}/collections/nobody/vectors/later"
    if "doesn't exist" not in requests.put(url, json={"sparse": {}}, timeout=60).text:
        pytest.skip("this server adds no vector to an existing collection (1.18 and later)")


LATER = {
    "sparse": ({"sparse": {}}, {"indices": [1, 7], "values": [0.5, 2.0]}, "sparse vectors: 'later'"),
    "dense": ({"dense": {"size": 3, "distance": "Dot"}}, [1.0, 2.0, 3.0], "named vectors: '', 'later'"),
}


@pytest.mark.parametrize("kind", LATER)
def test_a_vector_added_to_a_collection_with_points_is_refused_and_restored(operator, kind):
    """Neither the re-embedding nor --only-missing continues; a backup has it, and --no-switch does not hide it."""
    require_later_vectors(operator)
    config, value, reason = LATER[kind]
    operator.load(20)
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    operator.run("reembed_embeddings", "--no-switch")  # before it was added
    operator.call("PUT", "/vectors/later?wait=true", config)
    rows = [{"id": one, "vector": {"later": value}} for one in points_of_ids(operator)]
    operator.call("PUT", "/points/vectors?wait=true", {"points": rows})
    operator.servers.openai.reset()
    before, settings_then = everything(operator), operator.info()["config"]
    assert all("later" in one["vector"] for one in before)
    operator.run("backup_automem", "--only", "qdrant")
    for words in ((), ("--in-place",)):
        assert reason in operator.run("reembed_embeddings", *words, expect=2).err
    repair = {"VECTOR_SIZE": str(OLD_SIZE), "EMBEDDING_MODEL": SMALL}
    refused = operator.run("reembed_embeddings", "--only-missing", expect=2, env=repair)
    assert reason.partition(":")[0] in refused.err
    assert operator.servers.openai.stats()["texts"] == 0
    assert everything(operator) == before
    operator.run("restore_from_backup", operator.archive(), env=repair)
    assert everything(operator) == before
    assert operator.info()["config"] == settings_then


def points_of_ids(operator) -> list:
    return [one["id"] for one in operator.call("POST", "/points/scroll", {"limit": 1000})["points"]]


SET_LATER = {"read_fan_out_factor": 2, "read_fan_out_delay_ms": 5}
# Only in 1.19.
PLACED = {"vectors": {"memory": "cold"}, "payload": {"memory": "cold"}, "metadata": {"mine": {"n": 1 << 62}}}


def make_placed(operator) -> None:
    """The operator's collection once more, with what a snapshot's restore forgets, and what is new in 1.19."""
    points = points_of(operator)
    operator.call("DELETE", "")
    url = f"{operator.servers.qdrant_url}/collections/{operator.collection}"
    body = {**PLACED, "vectors": {**DENSE, **PLACED["vectors"]}}
    requests.put(url, json=body, timeout=60).raise_for_status()
    for name in ("tags", "tag_prefixes"):
        operator.call("PUT", "/index?wait=true", {"field_name": name, "field_schema": "keyword"})
    operator.call("PATCH", "", {"params": SET_LATER})
    rows = [{"id": one, "payload": payload, "vector": vector.tolist()} for one, (payload, vector) in points.items()]
    operator.call("PUT", "/points?wait=true", {"points": rows})


@pytest.mark.parametrize("method", [(), pytest.param(("--in-place",), marks=pytest.mark.matrix)])
def test_what_a_restored_snapshot_forgets_is_set_again(operator, method):
    operator.load(20)
    make_placed(operator)
    had, metadata = settings(operator), operator.info()["config"].get("metadata")
    params = had["config"]["params"]
    assert params["read_fan_out_factor"] == 2  # 1.11.3 has no delay, and ignores fields of 1.19
    if "payload" in params:
        assert (params["payload"], params["vectors"]["memory"]) == ({"memory": "cold"}, "cold")
    operator.run("backup_automem", "--only", "qdrant")
    archive = operator.archive()
    upgrade(operator)
    operator.run("reembed_embeddings", *method)
    assert settings(operator) == had
    assert metadata is None or operator.info()["config"]["metadata"].items() >= metadata.items()
    operator.run("restore_from_backup", archive)
    assert settings(operator) == had
    assert operator.info()["config"].get("metadata") == metadata


def change_settings(operator, seconds: int) -> None:
    """Every kind of setting that may change while a collection is in use; metadata if the server stores it."""
    body = {"optimizers_config": {"flush_interval_sec": seconds}, "metadata": {"mine": seconds}}
    operator.call("PATCH", "", {**body, "params": {"read_fan_out_factor": seconds}})
    tenant = {"type": "keyword", "is_tenant": True}
    operator.call("PUT", "/index?wait=true", {"field_name": "tags", "field_schema": tenant})


def test_settings_that_change_during_the_run_are_carried_over(operator, monkeypatch):
    """After --no-switch the collection is staged again; right before the delete nothing is replaced."""
    from lib.reembed import cutover

    operator.load(20)
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    operator.run("reembed_embeddings", "--no-switch")
    change_settings(operator, 7)

    def late(*args):
        change_settings(operator, 8)
        return verify_method(*args)

    verify_method = cutover.verify_method
    monkeypatch.setattr(cutover, "verify_method", late)
    refused = operator.run("reembed_embeddings", expect=1)
    assert f"the settings of '{operator.collection}' changed" in refused.err
    monkeypatch.undo()
    had, metadata = settings(operator), operator.info()["config"].get("metadata")
    assert had["config"]["optimizer_config"]["flush_interval_sec"] == 8
    assert operator.info()["config"]["params"]["vectors"]["size"] == OLD_SIZE
    operator.run("reembed_embeddings")
    assert settings(operator) == had
    assert metadata is None or operator.info()["config"]["metadata"]["mine"] == 8
    assert operator.collections() == [operator.collection]


def stop_after_the_delete(monkeypatch) -> None:
    """The run is killed between the delete and the next step."""
    from lib.reembed import cutover

    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cutover, "_journal_old_settings", killed)


def test_an_index_that_is_new_since_the_staging_stays_though_many_orphans_were_removed_before(operator):
    """Their saved payloads are more than the collection has points: it must not be taken for a recreated one."""
    operator.load(60, orphans=100)
    operator.run("backup_automem", "--only", "qdrant")
    operator.run("reembed_embeddings", "--only-missing")
    upgrade(operator)
    operator.run("reembed_embeddings", "--no-switch")
    operator.call("PUT", "/index?wait=true", {"field_name": "importance", "field_schema": "float"})
    operator.run("backup_automem", "--only", "qdrant")
    operator.run("reembed_embeddings")
    assert set(operator.info()["payload_schema"]) == {"tags", "tag_prefixes", "importance"}


@pytest.mark.parametrize("method", [(), pytest.param(("--in-place",), marks=pytest.mark.matrix)])
@pytest.mark.parametrize("first", [1, pytest.param(0, marks=pytest.mark.matrix)])
def test_what_automem_recreated_after_the_delete_gets_the_old_settings(operator, monkeypatch, method, first):
    """AutoMem's collection has the right size and one right vector. It still is not a result of the run."""
    operator.load(20)
    change_settings(operator, 7)
    operator.run("backup_automem", "--only", "qdrant")
    had, before = settings(operator), points_of(operator)
    upgrade(operator)
    stop_after_the_delete(monkeypatch)
    operator.run("reembed_embeddings", *method, expect=130)
    monkeypatch.undo()
    operator.call("PUT", "", {"vectors": {"size": NEW_SIZE, "distance": "Cosine"}})
    for name in ("tags", "tag_prefixes"):
        operator.call("PUT", "/index?wait=true", {"field_name": name, "field_schema": "keyword"})
    late, text = "abcdef00-0000-4000-8000-000000000000", "the first memory after the restart"
    if first:
        operator.cypher("CREATE (:Memory {id: $id, content: $text, tags: []})", id=late, text=text)
        row = {"id": late, "payload": {"content": text, "only": "here"}}
        row["vector"] = vector_for(LARGE, text, NEW_SIZE).tolist()
        operator.call("PUT", "/points?wait=true", {"points": [row]})
    operator.run("reembed_embeddings", *method)
    assert settings(operator) == had
    after = points_of(operator)
    assert after.keys() == before.keys() | ({late} if first else set())
    assert not first or after[late][0]["only"] == "here"
