"""reembed_embeddings.py as an operator runs it: the default cutover, what stays unchanged, what is never paid for."""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid

import pytest

from lib.clients.embeddings.cache import SUM_BYTES
from lib.reembed import run
from tests.automem_recordings.recordings import load_recording
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, SMALL
from tests.reembed_support import (
    assert_migrated,
    assert_vectors,
    embeddable,
    expected_payload,
    make_rich,
    points_of,
    settings,
    upgrade,
)
from tests.restore_support import wait_for
from tests.sandbox.vectors import vectors_for

pytestmark = pytest.mark.qdrant


def backed_up(operator, **how):
    """Sample memories in both stores, and a backup of the collection."""
    operator.load(**how)
    operator.run("backup_automem", "--only", "qdrant")
    return points_of(operator)


def journals(operator):
    return sorted(operator.backups.glob("journal_*_reembed.jsonl"))


@pytest.mark.matrix
def test_up_and_down_again_with_everything_but_the_size_as_it_was(operator):
    operator.load()
    make_rich(operator)
    operator.run("backup_automem", "--only", "qdrant")
    before, was = points_of(operator), settings(operator)
    upgrade(operator)
    operator.servers.openai.reset()
    result = operator.run("reembed_embeddings", "--json").json
    after = assert_migrated(operator, before)
    assert settings(operator) == was
    assert operator.collections() == [operator.collection]
    assert (result["points"], result["size"], result["model"]) == (len(after), NEW_SIZE, LARGE)
    assert operator.archive() in result["undo"]
    only_points = {key for payload, _ in after.values() for key in payload} - {"content"}
    assert {"source_app", "legacy_score"} <= only_points

    embedded = operator.servers.openai.stats()
    texts = {node["content"] for node in embeddable(operator).values()}
    assert len(texts) < len(after)
    assert (embedded["texts"], embedded["paid_twice"]) == (len(texts), 0)
    assert result["bought"]["texts"] == len(texts)
    assert result["bought"]["tokens"] == embedded["tokens"]

    assert_stamped(operator)

    # A second run finds nothing to do.
    state = operator.state()
    result = operator.run("reembed_embeddings", "--json").json
    assert (result["bought"]["texts"], result["mended"], result["absent_seconds"]) == (0, 0, 0.0)
    assert operator.state() == state

    # If the server stores no metadata, the run's journal records the model, even with the earlier settings.
    operator.export(VECTOR_SIZE=OLD_SIZE, EMBEDDING_MODEL=SMALL)
    operator.run("backup_automem", "--only", "qdrant")
    component = json.loads(operator.manifests()[-1].read_text())["collection"]
    assert (component["model"], component["model_known"]) == (LARGE, "stamped")
    operator.run("reembed_embeddings")
    assert_migrated(operator, after, model=SMALL, size=OLD_SIZE)
    assert settings(operator) == was


def assert_stamped(operator):
    """The collection records which model made it, if the server can store that (1.16 and later)."""
    major, minor = map(int, operator.qdrant.version().split(".")[:2])
    metadata = operator.info()["config"].get("metadata")
    if (major, minor) < (1, 16):
        assert metadata is None
        return
    stamps = [value for value in metadata.values() if isinstance(value, dict) and value.get("model") == LARGE]
    assert [one["size"] for one in stamps] == [NEW_SIZE]


def test_a_smaller_size_of_the_same_model_is_free(operator):
    before = backed_up(operator)
    upgrade(operator)
    operator.run("reembed_embeddings")
    operator.run("backup_automem", "--only", "qdrant")
    operator.export(VECTOR_SIZE=OLD_SIZE)
    operator.servers.openai.reset()
    operator.run("reembed_embeddings")
    assert operator.servers.openai.stats()["requests"] == 0
    assert_migrated(operator, before, size=OLD_SIZE)


@pytest.mark.matrix
def test_another_model_at_the_same_size_replaces_every_vector(operator):
    before = backed_up(operator)
    operator.export(EMBEDDING_MODEL=LARGE)
    operator.run("reembed_embeddings")
    assert_migrated(operator, before, size=OLD_SIZE)


def test_what_automem_itself_wrote_migrates_by_the_rule(operator):
    from lib.clients.falkordb.connection import connect

    with connect(operator.servers.falkordb.address) as conn:
        load_recording(
            conn,
            operator.graph,
            operator.servers.qdrant_url,
            operator.collection,
            lambda texts: vectors_for(SMALL, texts, OLD_SIZE),
        )
    before = points_of(operator)
    operator.run("backup_automem")
    upgrade(operator)
    operator.run("reembed_embeddings")
    assert_migrated(operator, before)


def test_points_without_a_memory_leave_the_collection_and_stay_in_the_backup(operator):
    before = backed_up(operator, orphans=3)
    upgrade(operator)
    result = operator.run("reembed_embeddings")
    assert "points without a memory in the graph: 3 (" in result.err
    after = assert_migrated(operator, before)
    assert len(before) - len(after) == 3


def test_memories_without_points_get_one_and_what_cannot_be_embedded_is_listed(operator):
    operator.load()
    some = list(points_of(operator))[:20]
    operator.call("POST", "/points/delete?wait=true", {"points": some})
    operator.run("backup_automem", "--only", "qdrant")
    before = points_of(operator)
    assert len(before) < len(embeddable(operator))
    upgrade(operator)
    result = operator.run("reembed_embeddings")
    assert_migrated(operator, before)
    assert "skipped, blank content: 3" in result.err
    assert "\nNot embedded: 3 (blank content), " in result.out
    assert "legacy-42" in result.err


@pytest.mark.matrix
def test_two_memories_with_one_id_get_one_point(operator):
    operator.load()
    twin = str(next(one for one in points_of(operator) if isinstance(one, str)))
    operator.cypher("CREATE (:Memory {id: $id, content: 'a later twin'})", id=twin)
    operator.run("backup_automem", "--only", "qdrant")
    before = points_of(operator)
    upgrade(operator)
    result = operator.run("reembed_embeddings")
    assert "skipped, id used twice: 1" in result.err
    assert_migrated(operator, before)
    operator.run("verify_migration")


def test_a_collection_that_is_gone_is_made_as_the_newest_backup_has_it(operator):
    operator.load()
    make_rich(operator)
    operator.run("backup_automem", "--only", "qdrant")
    was = settings(operator)
    operator.call("DELETE", "")
    upgrade(operator)
    operator.run("reembed_embeddings")
    assert_migrated(operator, {})
    assert settings(operator) == was


@pytest.mark.matrix
def test_an_empty_collection_with_other_settings_than_the_backup_is_reported(operator):
    """AutoMem recreates a deleted collection, with its own settings, before anybody runs the migration."""
    operator.load()
    make_rich(operator)
    operator.run("backup_automem", "--only", "qdrant")
    was = settings(operator)
    operator.call("DELETE", "")
    operator.call("PUT", "", {"vectors": {"size": NEW_SIZE, "distance": "Cosine"}})
    upgrade(operator)
    planned = operator.run("reembed_embeddings", "--dry-run", "--json")
    assert planned.json["plan"]["settings_unlike"] == operator.manifests()[0].name
    assert f"not those of {operator.manifests()[0].name}: it keeps its own" in planned.err
    line = next(one.strip() for one in planned.err.splitlines() if "curl" in one)
    assert line == f"curl -s -X DELETE {operator.servers.qdrant_url}/collections/{operator.collection}"
    operator.call("DELETE", "")
    done = operator.run("reembed_embeddings")
    assert "keeps its own" not in done.err
    assert settings(operator) == was
    assert_migrated(operator, {})


def test_a_collection_that_is_gone_without_a_backup_is_made_as_automem_makes_it(operator):
    operator.load()
    was = settings(operator)
    operator.call("DELETE", "")
    upgrade(operator)
    result = operator.run("reembed_embeddings")
    assert_migrated(operator, {})
    assert settings(operator) == was
    assert "none: no collection was replaced" in result.out


def test_an_empty_collection_of_the_new_size_is_filled(operator):
    operator.load()
    operator.call("DELETE", "")
    operator.call("PUT", "", {"vectors": {"size": NEW_SIZE, "distance": "Cosine"}})
    upgrade(operator)
    operator.run("reembed_embeddings")
    assert_migrated(operator, {})


def test_a_dry_run_embeds_one_batch_and_changes_nothing(operator):
    operator.load()
    before = operator.state()
    upgrade(operator)
    operator.servers.openai.reset()
    result = operator.run("reembed_embeddings", "--dry-run", "--batch-size", "30", "--json").json
    assert operator.servers.openai.stats()["texts"] == 30
    assert (result["dry_run"]["texts"], result["dry_run"]["size"]) == (30, NEW_SIZE)
    assert operator.state() == before
    assert journals(operator) == []
    operator.run("backup_automem", "--only", "qdrant")
    operator.run("reembed_embeddings", "--batch-size", "30")
    stats = operator.servers.openai.stats()
    assert (stats["paid_twice"], stats["largest_batch"]) == (0, 30)
    assert stats["texts"] == 30 + result["left"]["texts"]


def test_a_dry_run_with_a_model_that_cannot_make_the_size_reports_it_and_samples_at_the_models_size(operator):
    operator.load()
    operator.export(VECTOR_SIZE=3072)
    result = operator.run("reembed_embeddings", "--dry-run", "--json")
    assert "makes at most 1536d" in result.err
    assert result.json["dry_run"]["size"] == 1536
    assert "makes at most 1536d" in operator.run("reembed_embeddings", expect=2).err


def test_max_cost_refuses_before_anything_is_spent(operator):
    backed_up(operator)
    before = operator.state()
    upgrade(operator)
    operator.servers.openai.reset()
    refused = operator.run("reembed_embeddings", "--max-cost", "0.0001", expect=2)
    assert "nothing was spent" in refused.err
    operator.export(EMBEDDING_MODEL="nomic-embed-text", VECTOR_SIZE=768)
    assert "unknown" in operator.run("reembed_embeddings", "--max-cost", "5", expect=2).err
    assert operator.servers.openai.stats()["requests"] == 0
    assert operator.state() == before
    upgrade(operator)
    operator.run("reembed_embeddings", "--max-cost", "5")
    assert_vectors(points_of(operator))


@pytest.mark.matrix
def test_fresh_embeds_everything_again_and_forgets_nothing_if_it_is_refused(operator):
    before = backed_up(operator)
    upgrade(operator)
    operator.run("reembed_embeddings")
    texts = len({node["content"] for node in embeddable(operator).values()})
    assert cached(operator) == texts
    operator.servers.openai.reset()
    operator.run("reembed_embeddings", "--fresh", "--dry-run", expect=2)
    operator.run("reembed_embeddings", "--fresh", "--max-cost", "0.0001", expect=2)
    # The existing collection was made from vectors that no longer count: it is replaced, so it must be protected.
    operator.run("reembed_embeddings", "--fresh", expect=2)
    assert cached(operator) == texts
    operator.run("backup_automem", "--only", "qdrant")
    assert operator.run("reembed_embeddings", "--fresh", "--json").json["bought"]["texts"] == texts
    # One more word: the provider must answer before paid vectors are deleted.
    assert operator.servers.openai.stats()["texts"] == texts + 1
    assert_migrated(operator, before)


@pytest.mark.matrix
def test_a_stopped_run_with_fresh_cuts_nothing_from_larger_vectors(operator):
    """They were paid for earlier: `--fresh` discards what is cut from them."""
    backed_up(operator)
    upgrade(operator)
    operator.run("reembed_embeddings")
    operator.run("backup_automem", "--only", "qdrant")
    operator.export(VECTOR_SIZE=NEW_SIZE - 1)
    operator.servers.openai.reset()
    operator.servers.openai.fault(status=401, after=3)  # the first request is one word
    flow = ("--batch-size", "10", "--workers", "1")
    operator.run("reembed_embeddings", "--fresh", *flow, expect=6)
    operator.servers.openai.clear_faults()
    operator.run("reembed_embeddings", *flow)
    assert operator.servers.openai.stats()["texts"] == 1 + len(
        {one["content"] for one in embeddable(operator).values()}
    )


def cached(operator) -> int:
    """Vectors of the new size that are paid for."""
    with sqlite3.connect(operator.backups / "embeddings" / "vectors.sqlite3") as db:
        stored = [4 * NEW_SIZE + SUM_BYTES]
        return db.execute("SELECT count(*) FROM vectors WHERE length(vector) = ?", stored).fetchone()[0]


@pytest.mark.matrix
def test_workers_are_as_many_as_asked(operator):
    backed_up(operator)
    upgrade(operator)
    openai = operator.servers.openai
    openai.fault(hang_seconds=0.15)
    openai.reset()
    operator.run("reembed_embeddings", "--batch-size", "10", "--workers", "4")
    assert 1 < openai.stats()["peak_in_flight"] <= 4


@pytest.mark.parametrize("words", [(), ("--only-missing",)])
def test_an_empty_graph_touches_nothing(operator, words):
    backed_up(operator)
    before = points_of(operator).keys()
    operator.cypher("MATCH (m:Memory) DELETE m")
    if not words:
        upgrade(operator)
    result = operator.run("reembed_embeddings", *words, expect=1)
    assert "holds no memory that can be embedded" in result.err
    assert points_of(operator).keys() == before


def test_a_graph_that_is_not_there_is_an_error_before_anything_is_touched(operator):
    backed_up(operator)
    before = operator.state()
    upgrade(operator)
    result = operator.run("reembed_embeddings", expect=1, env={"FALKORDB_GRAPH": "no_such_graph"})
    assert "no_such_graph" in result.err
    assert operator.state() == before


def test_memories_written_during_the_run_are_embedded_or_caught_afterwards(operator):
    before = backed_up(operator)
    upgrade(operator)
    operator.servers.openai.fault(hang_seconds=0.1)
    written: list[str] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.05):
            one = str(uuid.uuid4())
            operator.cypher("CREATE (:Memory {id: $id, content: $text, tags: ['late']})", id=one, text=f"late {one}")
            written.append(one)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        operator.run("reembed_embeddings", "--batch-size", "20", "--workers", "2")
    finally:
        stop.set()
        writer.join()
    caught = points_of(operator).keys() & set(written)
    assert caught
    operator.servers.openai.clear_faults()
    added = operator.run("reembed_embeddings", "--only-missing", "--json").json["added"]
    assert len(caught) + added == len(written)
    assert_migrated(operator, before)


def test_a_change_of_content_or_payload_during_the_run_is_in_the_new_collection(operator):
    before = backed_up(operator)
    changed, tagged, gone = [one for one in before if isinstance(one, str)][:3]
    upgrade(operator)
    operator.servers.openai.fault(hang_seconds=300, times=1)
    process = operator.start("reembed_embeddings", "--batch-size", "50", "--workers", "1", "--json")
    assert wait_for(lambda: operator.servers.openai.stats()["requests"] or process.poll() is not None)
    operator.cypher("MATCH (m:Memory {id: $id}) SET m.content = 'said otherwise'", id=changed)
    operator.cypher("MATCH (m:Memory {id: $id}) SET m.tags = ['moved-on'], m.archived = true", id=tagged)
    operator.cypher("MATCH (m:Memory {id: $id}) DELETE m", id=gone)
    assert process.poll() is None
    operator.servers.openai.clear_faults()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    after = assert_migrated(operator, before)
    assert after[changed][0]["content"] == "said otherwise"
    assert after[tagged][0]["archived"] is True
    assert gone not in after


def test_what_automem_writes_into_both_stores_after_the_last_reading_of_the_graph_stays(operator, monkeypatch):
    """It writes payloads into the new collection, and deletes its points, whatever the size of its vectors."""
    before = backed_up(operator)
    changed, gone = [one for one in before if isinstance(one, str)][:2]
    upgrade(operator)
    catch_up, sizes = run.catch_up, []

    def automem_writes_then(*arguments):
        scan = catch_up(*arguments)
        sizes.append(len(points_of(operator)[changed][1]))
        if sizes[-1] == NEW_SIZE:
            operator.cypher("MATCH (m:Memory {id: $id}) SET m.tags = ['new']", id=changed)
            operator.call("POST", "/points/payload?wait=true", {"points": [changed], "payload": {"tags": ["new"]}})
            operator.cypher("MATCH (m:Memory {id: $id}) DETACH DELETE m", id=gone)
            operator.call("POST", "/points/delete?wait=true", {"points": [gone]})
        return scan

    monkeypatch.setattr(run, "catch_up", automem_writes_then)
    operator.run("reembed_embeddings")
    assert sizes == [NEW_SIZE]
    after = points_of(operator)
    assert after[changed][0]["tags"] == ["new"]
    assert gone not in after


def test_expected_payload_is_not_the_code_under_test():
    # The second implementation of the rule must itself distinguish a wrong payload from a right one.
    old, node = {"content": "a", "mine": 1}, {"content": "b", "summary": "s", "archived": True}
    assert expected_payload(old, node) == {"content": "b", "mine": 1, "archived": True}
