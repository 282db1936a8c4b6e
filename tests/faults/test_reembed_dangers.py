"""Cases in which a re-embedding could lose data although each of its steps is correct."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import requests

from lib.backup.phases import RESTORING_STAGED
from tests.operator_support import LARGE, OLD_SIZE, Operator
from tests.reembed_support import assert_migrated, embeddable, make_rich, points_of, upgrade
from tests.restore_support import faults, journal_of, phases, wait_for
from tests.sandbox.qdrant_server.process import QdrantServer

REAL = "QDRANT_TEST_URL" in os.environ or "QDRANT_TEST_SERVER" in os.environ
pytestmark = [pytest.mark.qdrant, pytest.mark.skipif(REAL, reason="needs the stand-in's faults on demand")]


def killed_after_delete(operator, *words: str, path: str = "/snapshots/recover") -> None:
    """A run is killed after the old collection is deleted and before the new one exists."""
    faults(operator, {"method": "PUT", "path": f"/collections/{operator.collection}{path}", "hang": True})
    process = operator.start("reembed_embeddings", *words)
    deleted = "live collection deleted"
    assert wait_for(lambda: process.poll() is not None or deleted in phases(journal_of(operator, "reembed")), 60)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    faults(operator)
    assert operator.collections() == ([] if words else [f"{operator.collection}__next"])


def test_an_absent_collection_takes_nothing_from_a_backup_of_another_server(operator, tmp_path):
    operator.load(60)
    make_rich(operator)
    operator.run("backup_automem", "--only", "qdrant")
    with QdrantServer(tmp_path / "second") as second:
        servers = replace(operator.servers, qdrant_url=second.url)
        other = Operator(servers, tmp_path, collection=operator.collection)
        other.load(30)
        other.call("DELETE", "")
        upgrade(other)
        undo = other.run("reembed_embeddings", "--json").json["undo"]
        assert operator.archive() not in undo
        assert other.info()["config"]["quantization_config"] is None
        assert other.call("GET", "/aliases")["aliases"] == []
        other.clean_up()


def test_a_resumed_run_goes_back_to_the_backup_it_began_with(operator):
    operator.load(60)
    operator.run("backup_automem", "--only", "qdrant")
    good = operator.archive()
    upgrade(operator)
    killed_after_delete(operator)
    operator.call("PUT", "", {"vectors": {"size": OLD_SIZE, "distance": "Cosine"}})
    operator.run("backup_automem", "--only", "qdrant")
    assert operator.archive() != good
    assert good in operator.run("reembed_embeddings", "--json").json["undo"]


def test_an_old_unfinished_run_does_not_waive_the_guard(operator):
    operator.load(60)
    before = points_of(operator)
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    killed_after_delete(operator)
    # Restored by hand and used for weeks; the journal is forgotten.
    operator.call("PUT", "", {"vectors": {"size": OLD_SIZE, "distance": "Cosine"}})
    memories = embeddable(operator)
    points = [
        {"id": one, "payload": payload, "vector": vector.tolist()}
        for one, (payload, vector) in before.items()
        if one in memories
    ]
    operator.call("PUT", "/points?wait=true", {"points": points})
    journal = journal_of(operator, "reembed")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line["at"] = "2026-01-02T03:04:05.000+00:00"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in [*operator.manifests(), *(operator.backups / "qdrant").glob("*.gz")]:
        path.unlink()
    refused = operator.run("reembed_embeddings", expect=2)
    assert "It is not changed without a verified backup" in refused.err
    assert operator.call("POST", "/points/count", {"exact": True})["count"] == len(points)


def test_another_spelling_of_the_address_does_not_lose_what_the_points_held(operator):
    operator.load(60)
    ids = list(points_of(operator))[:5]
    own = {"payload": {"mine_alone": 1}, "points": ids}
    operator.call("POST", "/points/payload?wait=true", own)
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    killed_after_delete(operator)
    url = operator.servers.qdrant_url
    refused = operator.run("reembed_embeddings", env={"QDRANT_URL": url.replace("127.0.0.1", "127.1")}, expect=2)
    assert "an unfinished run deleted" in refused.err
    operator.run("reembed_embeddings")
    after = points_of(operator)
    assert all("mine_alone" in after[one][0] for one in ids)


@pytest.mark.core
def test_an_alias_that_was_taken_meanwhile_is_left_there(operator):
    operator.load(60)
    alias = f"{operator.collection}_reader"
    create = {"create_alias": {"collection_name": operator.collection, "alias_name": alias}}
    aliases = f"{operator.servers.qdrant_url}/collections/aliases"
    requests.post(aliases, json={"actions": [create]}, timeout=30).raise_for_status()
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    killed_after_delete(operator)
    taken = {"vectors": {"size": 4, "distance": "Dot"}}
    requests.put(f"{operator.servers.qdrant_url}/collections/{alias}", json=taken, timeout=30).raise_for_status()
    assert f"alias '{alias}' was taken" in operator.run("reembed_embeddings", expect=3).err


def test_max_cost_holds_for_what_only_missing_compares_too(operator):
    operator.load(60)
    operator.run("backup_automem", "--only", "qdrant")
    operator.export(EMBEDDING_MODEL=LARGE)  # another model at the same size
    operator.run("reembed_embeddings")
    for path in (operator.backups / "embeddings").glob("*"):
        path.unlink()
    operator.servers.openai.reset()
    operator.run("reembed_embeddings", "--only-missing", "--max-cost", "0", expect=2)
    assert operator.servers.openai.stats()["texts"] == 0


def test_fresh_pays_once_however_often_it_is_started(operator):
    operator.load(60)
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    operator.run("reembed_embeddings", "--dry-run")
    operator.servers.openai.reset()
    path = f"/collections/{operator.collection}$"
    faults(operator, {"method": "DELETE", "path": path, "status": 500, "body": "no"})
    operator.run("reembed_embeddings", "--fresh", expect=1)
    faults(operator)
    operator.run("reembed_embeddings", "--fresh")
    texts = len({node["content"] for node in embeddable(operator).values()})
    assert operator.servers.openai.stats()["texts"] == texts + 1  # and one word to verify the key


@pytest.mark.core
def test_a_server_that_dies_after_the_delete_is_reported_with_what_is_missing(operator, own_qdrant):
    someone = replace(operator, servers=replace(operator.servers, qdrant_url=own_qdrant.url))
    someone.load(60)
    before = points_of(someone)
    someone.run("backup_automem", "--only", "qdrant")
    upgrade(someone)
    faults(someone, {"method": "PUT", "path": f"/collections/{someone.collection}/snapshots/recover", "hang": True})
    process = someone.start("reembed_embeddings", prelude="import lib.reembed.cutover as c\nc._TIMEOUT_SECONDS = 0.1")
    assert wait_for(lambda: RESTORING_STAGED in phases(journal_of(someone, "reembed")), 60)
    own_qdrant.kill()
    _, errors = process.communicate(timeout=120)
    own_qdrant.start()
    assert process.returncode == 1
    assert f"'{someone.collection}': the old collection is deleted; the staged one was being put in its place" in errors
    assert "to resume:\n  " in errors
    assert errors.rstrip().endswith("scripts/reembed_embeddings.py")
    someone.run("reembed_embeddings")
    assert_migrated(someone, before)


@pytest.mark.core
def test_a_provider_that_gives_one_vector_to_every_text_is_refused(operator, monkeypatch):
    from lib.clients.embeddings import client as clients
    from lib.dimensions import EmbeddingSpec
    from lib.errors import ProviderRefused

    made = clients.EmbeddingClient(EmbeddingSpec(operator.servers.openai.base_url, LARGE, 96), "sk-x")
    real = clients.answers.read_answer

    def one_for_all(*words):
        answer = real(*words)
        answer.vectors[:] = answer.vectors[0]
        return answer

    monkeypatch.setattr(clients.answers, "read_answer", one_for_all)
    with pytest.raises(ProviderRefused, match="every text with the same vector"):
        made.embed(["one", "two", "three"])


@pytest.mark.parametrize("words", [("--in-place",), ()])
def test_a_lost_plan_after_the_delete_never_drops_what_only_the_points_held(operator, words):
    operator.load(60)
    before = points_of(operator)
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    killed_after_delete(operator, *words, path="" if words else "/snapshots/recover")
    [plan] = (operator.backups / "embeddings").glob(f"{operator.collection}-*.sqlite3")
    aside = operator.folder / "aside"
    aside.mkdir()
    for path in plan.parent.glob(f"{plan.name}*"):  # with the log that the killed run left
        path.rename(aside / path.name)
    refused = operator.run("reembed_embeddings", *words, expect=2)
    assert f"{plan} had {len(before)} payloads" in refused.err
    assert operator.archive() in refused.err
    operator.run("reembed_embeddings", *words, expect=2)
    if words:
        for path in aside.iterdir():
            path.rename(plan.with_name(path.name))
    else:  # the printed undo
        operator.run("restore_from_backup", operator.backups / operator.archive())
        operator.call("DELETE", "__next")
    operator.run("reembed_embeddings", *words)
    assert_migrated(operator, before)
