"""verify_migration.py: passes after a good migration, and each check fails when what it checks is broken."""

from __future__ import annotations

import subprocess
import uuid
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
import requests

from lib.backup.collection import STAMP_KEY
from lib.verify import checks
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, SMALL
from tests.reembed_support import embeddable, points_of, upgrade
from tests.sandbox.automem_server import AutoMemServer
from tests.sandbox.vectors import vectors_for

pytestmark = pytest.mark.qdrant

PASSED, FAILED, PENDING = "passed", "FAILED", "restart pending"
SERVICE_MODEL = "AutoMem's model"


@pytest.fixture
def migrated(operator):
    """Migrated; nobody has restarted AutoMem yet."""
    operator.load()
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    operator.run("reembed_embeddings")
    return operator


def verify(operator, *words: str, expect: int = 0) -> dict[str, dict[str, str]]:
    """The checks by name."""
    document = operator.run("verify_migration", "--json", *words, expect=expect).json
    checks = {one["name"]: one for one in document["checks"]}
    assert document["failed"] == sum(one["status"] == FAILED for one in checks.values())
    return checks


def failing(operator, *words: str) -> list[str]:
    """The names of the checks that fail; the exit code is 4."""
    checks = verify(operator, *words, expect=4)
    assert all(one["remedy"] for one in checks.values() if one["status"] == FAILED)
    return [name for name, one in checks.items() if one["status"] == FAILED]


def put_points(operator, rows) -> None:
    body = [{"id": one, "payload": payload, "vector": vector.tolist()} for one, (payload, vector) in rows.items()]
    operator.call("PUT", "/points?wait=true", {"points": body})


def put_vector(operator, one, vector) -> None:
    operator.call("PUT", "/points/vectors?wait=true", {"points": [{"id": one, "vector": vector.tolist()}]})


def set_payload(operator, one, **payload) -> None:
    operator.call("POST", "/points/payload?wait=true", {"points": [one], "payload": payload})


def drop_key(operator, one, key) -> None:
    operator.call("POST", "/points/payload/delete?wait=true", {"points": [one], "keys": [key]})


def test_each_check_fails_when_what_it_checks_is_broken(migrated):
    operator = migrated
    checks = verify(operator)
    stamped = "metadata" in operator.info()["config"]
    others = {name: one["status"] for name, one in checks.items() if name not in {"model stamp", SERVICE_MODEL}}
    assert checks[SERVICE_MODEL]["status"] == "not checked"  # it has embedded nothing since
    assert set(others.values()) == {PASSED}, checks
    assert checks["model stamp"]["status"] == (PASSED if stamped else "not checked")
    assert str(len(points_of(operator))) in checks["vectors"]["detail"]

    good = points_of(operator)
    strings = [one for one in good if isinstance(one, str)]
    one, other = strings[10], strings[11]
    special = next(one for one, (payload, _) in good.items() if "source_app" in payload)
    lonely = {77: ({"content": "nobody's"}, good[one][1])}
    nothing = np.zeros(NEW_SIZE, dtype=np.float32)
    breaks = {
        "a deleted point": (
            "ids",
            lambda: operator.call("POST", "/points/delete?wait=true", {"points": [one]}),
        ),
        "an orphan point": ("orphan points", lambda: put_points(operator, lonely)),
        "another content": ("content", lambda: set_payload(operator, one, content="somebody else's")),
        "a changed value": ("payloads", lambda: set_payload(operator, one, tags=["wrong"])),
        "a lost key of the old point": ("payloads", lambda: drop_key(operator, special, "source_app")),
        "a lost key that recall needs": ("payloads", lambda: drop_key(operator, one, "tag_prefixes")),
        "a vector of zeros": ("vectors", lambda: put_vector(operator, one, nothing)),
        "two vectors swapped": (
            "vectors",
            lambda: (put_vector(operator, one, good[other][1]), put_vector(operator, other, good[one][1])),
        ),
        "a missing index": ("payload indexes", lambda: operator.call("DELETE", "/index/tags?wait=true")),
    }
    if stamped:
        stamp = operator.info()["config"]["metadata"][STAMP_KEY]
        wrong = {"metadata": {STAMP_KEY: {**stamp, "model": "another"}}}
        breaks["another model's stamp"] = ("model stamp", lambda: operator.call("PATCH", "", wrong))
    for name, (check, do_break) in breaks.items():
        do_break()
        # A wrong vector may show in recall too.
        assert [one for one in failing(operator) if one != "recall"] == [check], name
        operator.call("POST", "/points/delete?wait=true", {"points": [77]})
        put_points(operator, {key: good[key] for key in (one, other, special)})
        operator.call("PUT", "/index?wait=true", {"field_name": "tags", "field_schema": "keyword"})
        if stamped:
            operator.call("PATCH", "", {"metadata": {STAMP_KEY: stamp}})
    verify(operator)


def test_an_index_with_other_parameters_is_reported_and_made_again_as_printed(operator):
    operator.load(20)
    tenant = {"type": "keyword", "is_tenant": True}
    operator.call("PUT", "/index?wait=true", {"field_name": "tags", "field_schema": tenant})
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    operator.run("reembed_embeddings")
    for schema in (None, "keyword"):
        operator.call("DELETE", "/index/tags?wait=true")
        if schema:
            operator.call("PUT", "/index?wait=true", {"field_name": "tags", "field_schema": schema})
        assert failing(operator) == ["payload indexes"]
        found = verify(operator, expect=4)["payload indexes"]
        assert found["detail"] == f"missing{' or with other parameters' if schema else ''}: tags (keyword)"
        subprocess.run(["bash", "-ec", found["remedy"]], check=True, timeout=60, capture_output=True)
        assert operator.info()["payload_schema"]["tags"]["params"]["is_tenant"] is True
        verify(operator)


def test_a_stamp_that_these_scripts_did_not_write_is_no_stamp(operator):
    """A client may write any metadata."""
    operator.load(20)
    for stamp in ("text", 7, {"model": 5}, {"model": "red\x1b[31m"}, {"size": OLD_SIZE}):
        operator.call("PATCH", "", {"metadata": {STAMP_KEY: stamp}})
        assert verify(operator)["model stamp"]["status"] == "not checked"
        shown = operator.run("verify_migration", "--show-config", "--json").json["live"]["collection"]
        assert shown.endswith(f"{SMALL} (configured)")
        operator.run("reembed_embeddings", "--only-missing")
        operator.run("backup_automem", "--only", "qdrant")


@pytest.mark.matrix
def test_what_verify_calls_drift_only_missing_repairs(migrated):
    good = points_of(migrated)
    one, other, third = [one for one in good if isinstance(one, str)][10:13]
    special = next(one for one, (payload, _) in good.items() if "source_app" in payload)
    migrated.call("POST", "/points/delete?wait=true", {"points": [one]})
    set_payload(migrated, other, content="somebody else's")
    drop_key(migrated, third, "tags")
    drop_key(migrated, special, "legacy_score")
    put_points(migrated, {77: ({"content": "nobody's"}, good[one][1])})
    assert failing(migrated) == ["ids", "orphan points", "content", "payloads"]
    migrated.run("reembed_embeddings", "--only-missing")
    with migrated.restarted():
        verify(migrated, "--after-restart")
    assert points_of(migrated)[special][0] == good[special][0]


@pytest.fixture
def dotted(operator):
    """A collection with another distance than AutoMem's."""
    operator.load(20)
    rows = points_of(operator)
    operator.call("DELETE", "")
    operator.call("PUT", "", {"vectors": {"size": OLD_SIZE, "distance": "Dot"}})
    put_points(operator, rows)
    return operator


def test_another_distance(dotted):
    assert "size and distance" in failing(dotted)


@pytest.mark.matrix
def test_what_helps_against_another_distance_works_as_printed(dotted):
    """A re-embed, which was printed, keeps the distance."""
    before = points_of(dotted).keys()
    text = dotted.run("verify_migration", expect=4).out
    assert f"{OLD_SIZE}d Dot, AutoMem uses Cosine" in text
    (line,) = (one for one in text.splitlines() if " -X DELETE " in one)
    subprocess.run(["bash", "-ec", line], cwd=dotted.folder, env=dotted.environ, check=True, timeout=200)
    assert points_of(dotted).keys() == before
    assert failing(dotted) == ["payload indexes"]


def test_a_red_status(operator, session_servers):
    operator.load(20)
    url = f"{session_servers.qdrant_url}/_sandbox/faults"
    if not requests.get(url, timeout=10).ok:
        pytest.skip("a real server cannot be made red")
    info = {**operator.info(), "status": "red", "optimizer_status": {"error": "no space left on device"}}
    rule = {
        "method": "GET",
        "path": f"/collections/{operator.collection}$",
        "status": 200,
        "body": {"result": info},
    }
    requests.post(url, json=[rule], timeout=10).raise_for_status()
    try:
        assert failing(operator, "--after-restart")[0] == "status"
    finally:
        requests.delete(url, timeout=10)


def test_without_an_embedding_cache_a_difference_cannot_wait_for_the_restart(operator):
    operator.load()
    checks = verify(operator)
    assert checks["recall"]["status"] == "not checked"
    operator.cypher("CREATE (:Memory {id: $id, content: 'new here'})", id=str(uuid.uuid4()))
    assert failing(operator) == ["ids"]


@pytest.mark.matrix
def test_what_is_newer_than_the_migration_waits_for_the_restart_but_not_longer(migrated):
    changed, tagged = [one for one in points_of(migrated) if isinstance(one, str)][5:7]
    now = datetime.now(timezone.utc).isoformat()
    migrated.cypher("CREATE (:Memory {id: $id, content: 'new here', timestamp: $now})", id=str(uuid.uuid4()), now=now)
    since = "MATCH (m:Memory {id: $id}) SET m.updated_at = $now, "
    migrated.cypher(since + "m.content = 'changed since'", id=changed, now=now)
    migrated.cypher(since + "m.tags = ['since']", id=tagged, now=now)
    # Reading the graph again does not make it older.
    migrated.run("reembed_embeddings", "--dry-run")
    checks = verify(migrated)
    waiting = [name for name, one in checks.items() if one["status"] == PENDING]
    assert waiting == ["ids", "content", "payloads"]
    with migrated.restarted():
        assert failing(migrated, "--after-restart") == waiting
    migrated.run("reembed_embeddings", "--only-missing")
    with migrated.restarted():
        verify(migrated, "--after-restart")


@pytest.mark.matrix
def test_a_memory_of_a_moment_to_come_is_not_newer_than_the_migration(migrated):
    """Its timestamp would excuse any fault of its point until the restart."""
    operator = migrated
    deleted, changed, tagged = [one for one in embeddable(operator) if isinstance(one, str)][:3]
    for one in (deleted, changed, tagged):
        operator.cypher("MATCH (m:Memory {id: $id}) SET m.timestamp = '2099-01-01T00:00:00Z'", id=one)
    operator.run("reembed_embeddings", "--only-missing")
    verify(operator)
    operator.call("POST", "/points/delete?wait=true", {"points": [deleted]})
    set_payload(operator, changed, content="broken")
    set_payload(operator, tagged, tags=["broken"])
    assert {"ids", "content", "payloads"} <= set(failing(operator))


@pytest.mark.matrix
def test_a_point_that_automem_has_rewritten_is_no_failure(migrated):
    """PATCH /memory replaces the payload: AutoMem itself drops what only the old point held."""
    special = next(one for one, (payload, _) in points_of(migrated).items() if "source_app" in payload)
    migrated.cypher("MATCH (m:Memory {id: $id}) SET m.importance = 0.11, m.updated_at = '2027'", id=special)
    drop_key(migrated, special, "source_app")
    set_payload(migrated, special, importance=0.11, updated_at="2027")
    with migrated.restarted():
        verify(migrated, "--after-restart")


@pytest.mark.parametrize("stays_wrong", [False, True])
def test_what_automem_writes_meanwhile_is_no_failure_but_what_stays_wrong_is_one(migrated, monkeypatch, stays_wrong):
    """The points are read before the graph."""
    before = points_of(migrated)
    added, read_points = str(uuid.uuid4()), checks.read_points
    changed, deleted, wrong = [one for one in before if isinstance(one, str)][:3]

    def write(identity: str, text: str) -> None:
        migrated.cypher("MERGE (m:Memory {id: $id}) SET m.content = $text", id=identity, text=text)
        payload = {**before.get(identity, [{}])[0], "content": text}
        put_points(migrated, {identity: (payload, vectors_for(LARGE, [text], NEW_SIZE)[0])})

    def automem_writes_meanwhile(*arguments):
        read = read_points(*arguments)
        write(added, "stored while the stores are verified")
        write(changed, "changed while the stores are verified")
        migrated.cypher("MATCH (m:Memory {id: $id}) DETACH DELETE m", id=deleted)
        migrated.call("POST", "/points/delete?wait=true", {"points": [deleted]})
        if stays_wrong:
            migrated.cypher("MATCH (m:Memory {id: $id}) DETACH DELETE m", id=wrong)
        return read

    monkeypatch.setattr(checks, "read_points", automem_writes_meanwhile)
    with migrated.restarted():
        if stays_wrong:
            assert failing(migrated, "--after-restart") == ["orphan points"]
        else:
            verify(migrated, "--after-restart")


@pytest.mark.matrix
def test_a_memory_deleted_since_is_no_sample(migrated):
    for one in [one for one in points_of(migrated) if isinstance(one, str)][::2]:
        migrated.cypher("MATCH (m:Memory {id: $id}) DELETE m", id=one)
        migrated.call("POST", "/points/delete?wait=true", {"points": [one]})
    assert verify(migrated)["recall"]["status"] == PASSED


@pytest.mark.matrix
def test_recall_straight_from_qdrant_if_no_api_answers(migrated):
    checks = verify(migrated, "--sample", "7")
    assert checks["recall"]["detail"].startswith("7 samples come first, straight from Qdrant")
    turn_vectors(migrated)
    assert failing(migrated) == ["vectors", "recall"]


def turn_vectors(operator) -> None:
    """Every point gets its neighbour's vector."""
    points = points_of(operator)
    vectors = [vector for _, vector in points.values()]
    turned = zip(points, [*vectors[1:], vectors[0]], strict=True)
    put_points(operator, {one: (points[one][0], vector) for one, vector in turned})


@pytest.mark.parametrize(
    ("fault", "why"), [({"nan": True}, "cannot embed even"), ({"poisoned_text": "since the"}, "refused a text")]
)
def test_without_a_vector_of_the_providers_automems_model_is_not_known(migrated, fault, why):
    since, now = str(uuid.uuid4()), datetime.now(timezone.utc).isoformat()
    payload = {"content": "written since the migration", "timestamp": now, "tags": [], "tag_prefixes": []}
    migrated.cypher("CREATE (m:Memory {id: $id}) SET m += $payload", id=since, payload=payload)
    point = {"id": since, "vector": [1.0] + [0.0] * (NEW_SIZE - 1), "payload": payload}
    migrated.call("PUT", "/points?wait=true", {"points": [point]})
    migrated.servers.openai.fault(**fault)
    checked = verify(migrated)[SERVICE_MODEL]
    assert checked["status"] == "not checked"
    assert why in checked["detail"]


def test_recall_alone_tells_whether_an_automem_before_0_14_was_restarted(operator, tmp_path, monkeypatch):
    """Its /health shows no sizes."""

    def older(api):
        answer = ask_health(api)
        return replace(
            answer, health={key: value for key, value in answer.health.items() if key != "vector_dimensions"}
        )

    ask_health = checks.ask_health
    monkeypatch.setattr(checks, "ask_health", older)
    operator.load(20)
    operator.run("backup_automem", "--only", "qdrant")
    with AutoMemServer(env=operator.environ, log=tmp_path / "automem.log") as automem:
        operator.export(AUTOMEM_API_URL=automem.url)
        upgrade(operator)
        operator.run("reembed_embeddings")
        recall = verify(operator)["recall"]
        assert recall["status"] == PENDING
        assert "not found first by vector" in recall["detail"]
        assert failing(operator, "--after-restart") == ["recall"]
        automem.restart({"VECTOR_SIZE": str(NEW_SIZE), "EMBEDDING_MODEL": LARGE})
        verify(operator, "--after-restart")


def test_recall_through_automem_before_and_after_its_restart(operator, tmp_path):
    operator.load()
    operator.run("backup_automem", "--only", "qdrant")
    with AutoMemServer(env=operator.environ, log=tmp_path / "automem.log") as automem:
        operator.export(AUTOMEM_API_URL=automem.url)
        upgrade(operator)
        operator.run("reembed_embeddings")
        checks = verify(operator)
        assert checks["recall"]["status"] == PENDING
        assert f"configured {OLD_SIZE}" in checks["recall"]["detail"]
        refused = operator.run("verify_migration", "--record", expect=3)
        assert "not stored before every check has passed" in refused.err
        assert failing(operator, "--after-restart") == ["recall"]

        automem.restart({"VECTOR_SIZE": str(NEW_SIZE), "EMBEDDING_MODEL": LARGE})
        before = len(embeddable(operator))
        content = next(iter(embeddable(operator).values()))["content"]
        result = operator.run("verify_migration", "--after-restart", "--record", "--recall", content, "--json")
        checks = {one["name"]: one for one in result.json["checks"]}
        assert checks["recall"]["status"] == checks["recall latency"]["status"] == PASSED
        assert "GET /recall" in checks["recall latency"]["detail"]
        assert "vector" in result.json["recalled"][0]
        assert len(embeddable(operator)) == before + 1
        assert f"{NEW_SIZE}d" in embeddable(operator)[result.json["recorded"]]["content"]
        shown = operator.run("verify_migration", "--recall", content).out
        assert "recalled:" in shown

        turn_vectors(operator)
        assert verify(operator, expect=4)["recall"]["status"] == PENDING
        assert failing(operator, "--after-restart") == ["vectors", SERVICE_MODEL, "recall"]
