"""What a restore prints: both sides before it begins, what is newer than the file, how to restart AutoMem."""

from __future__ import annotations

import uuid

import pytest
import requests

from tests.operator_support import OLD_SIZE, ROOT
from tests.restore_support import TIMEOUT

pytestmark = pytest.mark.qdrant


def test_what_is_newer_than_the_files_is_counted_named_and_preserved(operator):
    operator.load()
    operator.run("backup_automem")
    fresh = [str(uuid.UUID(int=number)) for number in range(3)]
    operator.cypher("UNWIND $ids AS id CREATE (:Memory {id: id, content: 'since the backup'})", ids=fresh)
    operator.cypher("MATCH (m:Memory) WHERE m.id IS NOT NULL WITH m LIMIT 2 SET m.content = 'rewritten since'")
    point = {"id": fresh[0], "vector": [0.5] * OLD_SIZE, "payload": {"content": "since the backup"}}
    operator.call("PUT", "/points?wait=true", {"points": [point]})
    plan = operator.run("restore_from_backup", "latest", "--dry-run", "--json").json
    graph, collection = plan["graph"], plan["collection"]
    assert (graph["newer"]["added"], graph["newer"]["changed"]) == (3, 2)
    assert set(fresh) < set(graph["newer"]["ids"])
    assert (collection["newer"]["added"], collection["newer"]["ids"]) == (1, fresh[:1])
    assert graph["live"]["nodes"] == graph["nodes"] + 3
    assert collection["live"]["points"] == collection["points"] + 1
    assert graph["bytes"] > 0 < collection["snapshot_bytes"]
    text = operator.run("restore_from_backup", "latest", "--dry-run").out
    assert "memories newer than the backup: 3, with another content than in it: 2 (" in text
    assert "remain in the safety backup that a restore takes" in text
    done = operator.run("restore_from_backup", "latest")
    assert all(identity in done.out for identity in fresh)
    saved = operator.manifests()[-1]
    assert f"remain in {saved}" in done.out
    assert operator.cypher("MATCH (m:Memory) WHERE m.id IN $ids RETURN count(m)", ids=fresh) == [[0]]
    operator.run("restore_from_backup", "-q", str(saved))
    assert operator.cypher("MATCH (m:Memory) WHERE m.id IN $ids RETURN count(m)", ids=fresh) == [[3]]


def test_ids_that_only_resemble_numbers_are_counted_as_they_are(operator):
    operator.load(20)
    operator.cypher("UNWIND ['7', '007', '\u00b2', '9'] AS id CREATE (:Memory {id: id, content: id})")
    operator.run("backup_automem", "--only", "falkordb")
    operator.cypher("MATCH (m:Memory {id: '007'}) SET m.content = 'rewritten since'")
    newer = operator.run("restore_from_backup", operator.rdb(), "--dry-run", "--json").json["graph"]["newer"]
    assert (newer["added"], newer["changed"], newer["ids"]) == (0, 1, ["007"])


@pytest.mark.matrix
def test_points_newer_than_the_file_remain_in_the_graph_too(operator):
    operator.load(60)
    operator.run("backup_automem", "--only", "qdrant")
    point = {"id": 10**12, "vector": [0.5] * OLD_SIZE, "payload": {"content": "since the backup"}}
    operator.call("PUT", "/points?wait=true", {"points": [point]})
    text = operator.run("restore_from_backup", operator.archive()).out
    assert "points newer than the backup: 1 (1000000000000)" in text
    assert "reembed_embeddings.py --only-missing" in text


@pytest.mark.matrix
def test_after_the_graph_alone_no_setting_is_printed(operator):
    operator.load(60)
    operator.run("backup_automem")
    text = operator.run("restore_from_backup", operator.rdb()).out
    assert "VECTOR_SIZE" not in text
    assert "docker compose up -d --force-recreate flask-api" in text
    assert "verify_migration.py" in text
    assert "newer" not in text
    assert "VECTOR_SIZE" in operator.run("restore_from_backup", operator.archive()).out


def test_a_store_that_is_absent_is_shown_in_the_plan(operator):
    operator.load(60)
    operator.run("backup_automem")
    requests.delete(f"{operator.servers.qdrant_url}/collections/{operator.collection}", timeout=TIMEOUT)
    operator.cypher("MATCH (n) DETACH DELETE n")
    from lib.clients.falkordb.connection import connect

    with connect(operator.servers.falkordb.address) as conn:
        conn.execute_command("GRAPH.DELETE", operator.graph)
    plan = operator.run("restore_from_backup", "latest", "--dry-run", "--json").json
    assert plan["graph"]["live"] is None
    assert plan["collection"]["live"] is None


@pytest.mark.matrix
def test_stopped_stores_are_reported_with_how_to_start_just_them_and_the_same_line(operator):
    operator.load(60)
    operator.run("backup_automem")
    words = ["--no-safety-backup", operator.archive(), operator.rdb()]
    for setting in ({"FALKORDB_PORT": "1"}, {"QDRANT_URL": "http://127.0.0.1:1"}):
        text = operator.run("restore_from_backup", *words, env=setting, expect=1).err
        assert "docker compose up -d falkordb qdrant" in text
        assert f"{ROOT}/scripts/restore_from_backup.py {' '.join(words)}\n" in text


@pytest.mark.matrix
def test_a_file_that_the_environment_beats_is_named_while_it_disagrees(operator):
    operator.load(60)
    operator.run("backup_automem", "--only", "qdrant")
    file = operator.folder / "automem.env"
    for size, named in ((2 * OLD_SIZE, True), (OLD_SIZE, False)):
        file.write_text(f"VECTOR_SIZE={size}\n")
        text = operator.run("restore_from_backup", operator.archive(), "--env-file", str(file)).out
        assert (f"and in {file}:\n  VECTOR_SIZE={OLD_SIZE}\n" in text) == named
        assert ("a file says otherwise" in text) == named
