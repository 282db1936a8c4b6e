"""No memory yet: an empty graph and an empty collection are backed up, migrated, verified and restored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lib.backup.phases import DELETED, DELETING
from lib.journal import open_journals
from tests.kill_support import run_killed
from tests.matrix import matrix
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE
from tests.reembed_support import upgrade

pytestmark = pytest.mark.qdrant


@pytest.fixture
def empty(operator):
    """Stores as after AutoMem's first start: an index in the graph, the collection with its two indexes."""
    operator.cypher("CREATE INDEX FOR (m:Memory) ON (m.id)")
    operator.call("PUT", "", {"vectors": {"size": OLD_SIZE, "distance": "Cosine"}})
    for field in ("tags", "tag_prefixes"):
        operator.call("PUT", "/index?wait=true", {"field_name": field, "field_schema": "keyword"})
    return operator


@pytest.mark.parametrize("words", [(), pytest.param(("--in-place",), marks=pytest.mark.matrix)])
def test_an_empty_collection_is_recreated_with_the_new_dimension(empty, words):
    empty.run("backup_automem")
    upgrade(empty)
    empty.servers.openai.reset()
    done = empty.run("reembed_embeddings", *words, "--json").json
    assert (done["points"], done["size"], done["model"]) == (0, NEW_SIZE, LARGE)
    assert empty.info()["config"]["params"]["vectors"]["size"] == NEW_SIZE
    assert set(empty.info()["payload_schema"]) == {"tags", "tag_prefixes"}
    assert empty.collections() == [empty.collection]
    assert open_journals(empty.backups) == []
    assert empty.servers.openai.stats()["texts"] == 0
    empty.run("verify_migration")
    again = empty.run("reembed_embeddings", "--only-missing", "--json").json
    assert again["added"] == 0


@pytest.mark.parametrize(("where", "words"), matrix([(f"after {DELETING}", ()), (f"after {DELETED}", ("--in-place",))]))
def test_a_run_that_was_killed_after_the_empty_collection_was_deleted_is_finished(empty, where, words):
    empty.run("backup_automem")
    upgrade(empty)
    run_killed(empty, where, "reembed_embeddings", *words)
    empty.run("reembed_embeddings", *words)
    assert empty.info()["config"]["params"]["vectors"]["size"] == NEW_SIZE
    assert empty.collections() == [empty.collection]
    assert open_journals(empty.backups) == []


@pytest.mark.matrix
def test_a_lost_embedding_cache_makes_no_full_collection_an_empty_one(operator):
    """After the delete the graph is emptied and the cache lost. The journal records that the collection held points."""
    operator.load(20)
    operator.run("backup_automem")
    upgrade(operator)
    run_killed(operator, f"after {DELETED}", "reembed_embeddings", "--in-place")
    shutil.rmtree(operator.backups / "embeddings")
    operator.cypher("MATCH (m:Memory) DETACH DELETE m")
    refused = operator.run("reembed_embeddings", "--in-place", expect=None)
    assert refused.code != 0
    assert operator.collections() == []


def test_an_empty_graph_is_restored(empty):
    empty.run("backup_automem")
    component = json.loads(empty.manifests()[-1].read_text())["graph"]
    assert (component["nodes"], component["proof"]) == (0, "restored")
    before = empty.state()
    empty.cypher("CREATE (:Memory {id: 'x', content: 'later'})")
    empty.run("restore_from_backup", "latest", "--dry-run")
    empty.run("restore_from_backup", "latest")
    assert empty.state() == before
    assert empty.graphs() == [empty.graph]
    assert len(empty.cypher("CALL db.indexes() YIELD label RETURN label")) == 1


def test_an_empty_graph_in_a_bare_rdb_replaces_nothing(empty, tmp_path):
    empty.run("backup_automem", "--only", "falkordb")
    bare = tmp_path / "by_hand.rdb"
    bare.write_bytes(Path(empty.rdb()).read_bytes())
    empty.cypher("CREATE (:Memory {id: 'x', content: 'later'})")
    before = empty.state()
    refused = empty.run("restore_from_backup", str(bare), expect=4)
    assert "no manifest says that it was empty" in refused.err
    assert empty.state() == before


@pytest.mark.parametrize("words", [(), ("--in-place",)])
def test_a_graph_without_memories_still_empties_no_collection(operator, words):
    operator.load(20)
    operator.run("backup_automem")
    operator.cypher("MATCH (m:Memory) DETACH DELETE m")
    upgrade(operator)
    before = operator.state()
    refused = operator.run("reembed_embeddings", *words, expect=1)
    assert "holds no memory that can be embedded" in refused.err
    assert operator.state() == before


def test_a_backup_reports_that_the_graph_seems_to_be_lost(operator):
    """`--only-missing` would remove the points, which alone hold the texts then."""
    operator.load(20)
    operator.cypher("MATCH (n) DETACH DELETE n")
    result = operator.run("backup_automem", expect=3)
    assert f"graph '{operator.graph}' holds no memory, and collection" in result.err
    assert "docs/worst-day.md" in result.err
    assert "--only-missing" not in result.out
    verified = operator.run("verify_migration", expect=4)
    assert "docs/worst-day.md" in verified.out
    assert "--only-missing" not in verified.out


def test_a_backup_reports_that_the_collection_seems_to_be_lost(operator):
    operator.load(20)
    ids = [point["id"] for point in operator.call("POST", "/points/scroll", {"limit": 100})["points"]]
    operator.call("POST", "/points/delete?wait=true", {"points": ids})
    result = operator.run("backup_automem", expect=3)
    assert f"collection '{operator.collection}' has no point, and graph" in result.err
    assert "docs/worst-day.md" in result.err
    operator.run("backup_automem", "--only", "qdrant")
