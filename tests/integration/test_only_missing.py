"""reembed_embeddings.py --only-missing: a collection synchronized with the graph, and never two models in one."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

from lib.backup.points import point_id
from lib.reembed import run, sync
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, ROOT, SMALL
from tests.reembed_support import assert_migrated, assert_vectors, embeddable, make_ready, points_of
from tests.sandbox.vectors import vector_for

pytestmark = pytest.mark.qdrant


@pytest.fixture
def level(operator):
    """Sample memories in both stores, synchronized once: stale values of `last_accessed` are up to date."""
    operator.load()
    operator.run("reembed_embeddings", "--only-missing")
    operator.servers.openai.reset()
    return operator


def repair(operator, **expected: int) -> dict[str, int]:
    """What --only-missing did, as (added, changed, ...); what is not named must be 0."""
    done = operator.run("reembed_embeddings", "--only-missing", "--json").json
    counts = {name: done[name] for name in ("added", "changed", "payloads", "mended", "removed")}
    counts["embedded"] = done["bought"]["texts"]
    assert counts == dict.fromkeys(counts, 0) | expected
    return done


def some_ids(operator, count: int) -> list[str]:
    """Plain memories with unique content."""
    memories = embeddable(operator)
    contents = [one["content"] for one in memories.values()]
    plain = [one for one, node in memories.items() if isinstance(one, str) and contents.count(node["content"]) == 1]
    return plain[20 : 20 + count]


def test_drift_of_every_kind_is_repaired_and_only_what_is_new_is_paid_for(level):
    before = points_of(level)
    missing, changed, tagged, keyless = some_ids(level, 4)
    added = str(uuid.uuid4())
    level.call("POST", "/points/delete?wait=true", {"points": [missing]})
    level.cypher("MATCH (m:Memory {id: $id}) SET m.content = 'another content altogether'", id=changed)
    level.cypher("MATCH (m:Memory {id: $id}) SET m.tags = ['renamed'], m.archived = true", id=tagged)
    level.call("POST", "/points/payload/delete?wait=true", {"points": [keyless], "keys": ["tags"]})
    level.cypher("CREATE (:Memory {id: $id, content: 'a memory that never had a point'})", id=added)
    orphans = {
        "id": 99,
        "vector": [1.0] + [0.0] * (OLD_SIZE - 1),
        "payload": {"content": "deleted from the graph"},
    }
    level.call("PUT", "/points?wait=true", {"points": [orphans]})

    repair(level, added=2, changed=1, payloads=2, removed=1, embedded=3)
    # Three unchanged points verify the model, three texts are new.
    assert level.servers.openai.stats()["texts"] == 6
    del before[missing]
    after = points_of(level)
    assert after[tagged][0]["tags"] == ["renamed"]
    assert after[tagged][0]["archived"] is True
    assert "tags" in after[keyless][0]
    assert 99 not in after
    assert_migrated(level, {**before, keyless: after[keyless]}, model=SMALL, size=OLD_SIZE)
    repair(level)
    with level.restarted():
        level.run("verify_migration", "--after-restart")


def test_a_payload_alone_costs_nothing_and_leaves_the_vector(level):
    one, *_ = some_ids(level, 1)
    # A vector that no model made is renewed when the content changes, and not when only the payload changes.
    odd = np.eye(OLD_SIZE, dtype=np.float32)[5]
    level.call("PUT", "/points/vectors?wait=true", {"points": [{"id": one, "vector": odd.tolist()}]})
    level.cypher("MATCH (m:Memory {id: $id}) SET m.importance = 0.123", id=one)
    repair(level, payloads=1)
    payload, vector = points_of(level)[one]
    assert payload["importance"] == 0.123
    assert np.allclose(vector, odd)


def test_a_point_that_automem_deletes_right_before_its_payload_is_written(level, monkeypatch):
    one, *_ = some_ids(level, 1)
    level.cypher("MATCH (m:Memory {id: $id}) SET m.importance = 0.123", id=one)
    update = sync.update_payload

    def automem_deletes_first(qdrant, name, point, *payloads):
        level.cypher("MATCH (m:Memory {id: $id}) DETACH DELETE m", id=point)
        level.call("POST", "/points/delete?wait=true", {"points": [point]})
        update(qdrant, name, point, *payloads)

    monkeypatch.setattr(sync, "update_payload", automem_deletes_first)
    level.run("reembed_embeddings", "--only-missing")
    assert one not in points_of(level)


def test_what_automem_writes_into_a_point_right_before_its_payload_is_written_stays(level, monkeypatch):
    one, *_ = some_ids(level, 1)
    level.cypher("MATCH (m:Memory {id: $id}) SET m.importance = 0.123", id=one)
    update, text = sync.update_payload, "changed while --only-missing wrote"

    def automem_writes_first(qdrant, name, point, *payloads):
        level.cypher("MATCH (m:Memory {id: $id}) SET m.content = $text, m.tags = ['new']", id=point, text=text)
        payload = {**points_of(level)[point][0], "content": text, "tags": ["new"]}
        written = {"id": point, "vector": vector_for(SMALL, text, OLD_SIZE).tolist(), "payload": payload}
        level.call("PUT", "/points?wait=true", {"points": [written]})
        update(qdrant, name, point, *payloads)

    monkeypatch.setattr(sync, "update_payload", automem_writes_first)
    level.run("reembed_embeddings", "--only-missing")
    payload, _ = points_of(level)[one]
    assert (payload["content"], payload["tags"], payload["importance"]) == (text, ["new"], 0.123)
    repair(level)


def test_what_automem_writes_into_both_stores_while_they_are_read_is_not_written_back(level, monkeypatch):
    one, *_ = some_ids(level, 1)
    scan_graph = run.scan_graph

    def automem_writes_then(*arguments, **title):
        scan = scan_graph(*arguments, **title)
        level.cypher("MATCH (m:Memory {id: $id}) SET m.tags = ['new']", id=one)
        level.call("POST", "/points/payload?wait=true", {"points": [one], "payload": {"tags": ["new"]}})
        return scan

    monkeypatch.setattr(run, "scan_graph", automem_writes_then)
    repair(level)
    assert points_of(level)[one][0]["tags"] == ["new"]


def test_a_dry_run_pays_only_for_what_the_run_would_embed(level):
    dry_run = ("--only-missing", "--dry-run", "--json")
    tried = level.run("reembed_embeddings", *dry_run).json
    assert (tried["dry_run"]["texts"], tried["left"]["texts"], level.servers.openai.stats()["texts"]) == (0, 0, 0)
    gone, *_ = some_ids(level, 1)
    level.call("POST", "/points/delete?wait=true", {"points": [gone]})
    tried = level.run("reembed_embeddings", *dry_run).json
    assert (tried["plan"]["texts"], tried["dry_run"]["texts"], tried["left"]["texts"]) == (1, 1, 0)
    assert level.servers.openai.stats()["texts"] == 1
    repair(level, added=1)


def test_an_orphan_point_is_saved_before_it_is_removed(level):
    from lib.clients.embeddings.cache import EmbeddingCache

    vector = np.eye(OLD_SIZE, dtype=np.float32)[3]
    lonely = {"id": 99, "vector": vector.tolist(), "payload": {"content": "mine alone", "note": "dear"}}
    level.call("PUT", "/points?wait=true", {"points": [lonely]})
    repair(level, removed=1)
    folder = level.backups / "embeddings"
    [path] = folder.glob(f"{level.collection}*.sqlite3")
    with EmbeddingCache(path) as cache:
        saved = cache.saved_points([99])[99]
    assert b'"note":"dear"' in saved.payload
    assert np.array_equal(np.frombuffer(saved.vector, dtype="<f4"), vector)


def test_many_orphan_points_need_a_backup(level):
    rows = [{"id": n, "vector": vector_for(SMALL, str(n), OLD_SIZE).tolist(), "payload": {}} for n in range(1, 9)]
    level.call("PUT", "/points?wait=true", {"points": rows})
    gone, *_ = some_ids(level, 1)
    level.call("POST", "/points/delete?wait=true", {"points": [gone]})
    before = points_of(level).keys()
    tried = level.run("reembed_embeddings", "--only-missing", "--dry-run", "--json")
    assert "points without a memory in the graph: 8 (1, 2, 3, 4, 5, 6, 7, 8). They leave the collection" in tried.err
    [reason] = tried.json["will_be_refused"]
    assert "8 of the" in reason
    texts = level.servers.openai.stats()["texts"]
    refused = level.run("reembed_embeddings", "--only-missing", expect=2)
    assert level.servers.openai.stats()["texts"] == texts
    assert f"{ROOT}/scripts/backup_automem.py" in refused.err
    assert f"{ROOT}/scripts/reembed_embeddings.py --only-missing" in refused.err
    assert f"8 of the {len(before)} points of '{level.collection}' have no memory in the graph" in refused.err
    assert "would be replaced" not in refused.err
    assert points_of(level).keys() == before
    level.run("backup_automem", "--only", "qdrant")
    repair(level, added=1, removed=8)
    assert points_of(level).keys() == (before | {gone}) - set(range(1, 9))


def test_points_whose_memory_has_no_text_stay_without_a_backup(level):
    ids = some_ids(level, 3)
    for one in ids:
        level.cypher("MATCH (m:Memory {id: $id}) SET m.content = ''", id=one)
    level.call("POST", "/points/payload/delete?wait=true", {"keys": ["content"], "points": list(ids)})
    before = points_of(level).keys()
    repair(level)
    assert points_of(level).keys() == before >= set(ids)


def test_what_automem_changes_and_deletes_meanwhile_is_not_written_back(operator, monkeypatch):
    """After a migration the cache has every vector, those of the texts before the change, too."""
    make_ready(operator).run("reembed_embeddings")
    changed, deleted, missing = some_ids(operator, 3)
    operator.call("POST", "/points/delete?wait=true", {"points": [missing]})
    text, embed_texts = "changed while --only-missing ran", run.embed_texts

    def automem_writes_meanwhile(*arguments):
        embed_texts(*arguments)
        operator.cypher("MATCH (m:Memory {id: $id}) SET m.content = $text", id=changed, text=text)
        point = {"id": changed, "vector": vector_for(LARGE, text, NEW_SIZE).tolist(), "payload": {"content": text}}
        operator.call("PUT", "/points?wait=true", {"points": [point]})
        operator.cypher("MATCH (m:Memory {id: $id}) DETACH DELETE m", id=deleted)
        operator.call("POST", "/points/delete?wait=true", {"points": [deleted]})

    monkeypatch.setattr(run, "embed_texts", automem_writes_meanwhile)
    operator.run("reembed_embeddings", "--only-missing")
    after = points_of(operator)
    assert after[changed][0]["content"] == text
    assert deleted not in after
    assert missing in after
    assert_vectors(after)


@pytest.mark.matrix
def test_the_point_of_a_memory_that_cannot_be_embedded_is_left_alone(level):
    one, *_ = some_ids(level, 1)
    level.cypher("MATCH (m:Memory {id: $id}) SET m.content = '  '", id=one)
    repair(level)
    assert one in points_of(level)
    with level.restarted():
        level.run("verify_migration", "--after-restart")


def test_another_model_at_the_same_size_is_refused(level):
    gone, *_ = some_ids(level, 1)
    level.call("POST", "/points/delete?wait=true", {"points": [gone]})
    before = level.state()
    refused = level.run("reembed_embeddings", "--only-missing", expect=2, env={"EMBEDDING_MODEL": LARGE})
    assert "would mix two models" in refused.err
    assert level.state() == before


@pytest.mark.parametrize("fault", [{"nan": True}, {"status": 400, "message": "no model is loaded"}])
def test_an_endpoint_whose_answers_cannot_be_used_is_named(level, fault):
    level.servers.openai.fault(**fault)
    refused = level.run("reembed_embeddings", "--only-missing", expect=6)
    assert "cannot embed even a plain word" in refused.err


def test_texts_that_the_provider_refuses_do_not_identify_the_model(level):
    first = next(iter(points_of(level).values()))[0]["content"]
    level.servers.openai.fault(poisoned_text=first)
    repair(level)
    level.servers.openai.fault(poisoned_text=" ")
    refused = level.run("reembed_embeddings", "--only-missing", expect=2)
    assert "cannot be checked: the provider refuses the texts of points" in refused.err
    assert "reembed_embeddings.py" in refused.err.splitlines()[-1]


def test_a_point_whose_text_is_longer_than_the_model_takes_identifies_the_model(operator):
    operator.load()
    long, text = 1, "many words " * 5000
    operator.cypher("CREATE (:Memory {id: $id, content: $text, tags: []})", id=long, text=text)
    operator.run("reembed_embeddings", "--only-missing")
    assert next(iter(points_of(operator))) == long  # the first of those that are embedded again
    operator.servers.openai.reset()
    repair(operator)
    assert operator.servers.openai.stats()["texts"] == 3


@pytest.mark.matrix
def test_vectors_of_another_model_below_the_right_stamp_are_refused_with_what_replaces_them(operator):
    """A re-embed without --fresh would find the collection up to date."""
    make_ready(operator)
    operator.run("reembed_embeddings")
    if not operator.info()["config"].get("metadata"):
        pytest.skip("this server keeps no metadata: a re-embed replaces the vectors")
    late, text = str(uuid.uuid4()), "written by AutoMem with another model"
    operator.cypher("CREATE (:Memory {id: $id, content: $text, tags: []})", id=late, text=text)
    payloads = {one: payload for one, (payload, _) in points_of(operator).items()} | {
        late: {"content": text, "tags": []}
    }
    rows = [
        {"id": one, "vector": vector_for(SMALL, payload["content"], NEW_SIZE).tolist(), "payload": payload}
        for one, payload in payloads.items()
    ]
    operator.call("PUT", "/points?wait=true", {"points": rows})
    refused = operator.run("reembed_embeddings", "--only-missing", expect=2)
    assert "would mix two models" in refused.err
    assert refused.err.rstrip().endswith("reembed_embeddings.py --fresh")
    operator.run("backup_automem", "--only", "qdrant")
    assert "is already" in operator.run("reembed_embeddings").out
    operator.run("reembed_embeddings", "--fresh")
    assert_vectors(points_of(operator))


@pytest.mark.parametrize("script", ["reembed_embeddings", "verify_migration"])
def test_a_dimension_mismatch_is_reported_in_the_words_that_operators_know(operator, script):
    operator.load(20)
    operator.export(VECTOR_SIZE=3072, EMBEDDING_MODEL=LARGE)
    words = ["--only-missing"] if script == "reembed_embeddings" else []
    result = operator.run(script, *words, expect=2)
    assert result.err.startswith(
        "ValueError: VECTOR DIMENSION MISMATCH\n"
        f"Qdrant collection '{operator.collection}': {OLD_SIZE}d\n"
        "Config VECTOR_SIZE: 3072d\n"
    )
    assert f"export VECTOR_SIZE={OLD_SIZE}" in result.err


def test_a_missing_collection_is_an_error(operator):
    operator.load(20)
    operator.call("DELETE", "")
    result = operator.run("reembed_embeddings", "--only-missing", expect=1)
    assert operator.collection in result.err
    assert operator.collections() == []


@pytest.mark.matrix
def test_after_a_migration_to_the_same_size_the_old_models_late_vectors_are_found(operator):
    """AutoMem writes vectors of the old model until it is restarted; no dimension check notices."""
    operator.load()
    operator.run("backup_automem", "--only", "qdrant")
    operator.export(EMBEDDING_MODEL=LARGE)
    operator.run("reembed_embeddings")
    late, text = str(uuid.uuid4()), "written by the old service after the migration"
    operator.cypher("CREATE (:Memory {id: $id, content: $text, tags: []})", id=late, text=text)
    vector = vector_for(SMALL, text, OLD_SIZE).tolist()
    operator.call(
        "PUT",
        "/points?wait=true",
        {"points": [{"id": late, "vector": vector, "payload": {"content": text, "tags": []}}]},
    )
    known, *_ = some_ids(operator, 1)
    stale = vector_for(SMALL, embeddable(operator)[known]["content"], OLD_SIZE).tolist()
    operator.call("PUT", "/points/vectors?wait=true", {"points": [{"id": known, "vector": stale}]})
    done = operator.run("reembed_embeddings", "--only-missing", "--json").json
    assert (done["mended"], done["added"], done["bought"]["texts"]) == (2, 0, 1)
    assert_vectors(points_of(operator), LARGE, OLD_SIZE)
    assert point_id(late) in points_of(operator)


def test_a_point_without_its_vector_does_not_identify_the_model(level):
    """The vectors of a point may be deleted and the point stays."""
    one = min(points_of(level), key=str)
    row = {"id": one, "vector": {}, "payload": points_of(level)[one][0]}
    level.call("PUT", "/points?wait=true", {"points": [row]})
    assert points_of(level)[one][1] is None
    repair(level)
    checks = {one["name"]: one for one in level.run("verify_migration", "--json", expect=4).json["checks"]}
    assert f"1 are unusable (width, zero or not finite): {one}" in checks["vectors"]["detail"]
