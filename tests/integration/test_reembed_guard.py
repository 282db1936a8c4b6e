"""The guard: nothing is deleted without a verified backup; and how provider errors end a run."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest

from lib.backup.manifest import sealed
from lib.backup.points import TemporaryIdTable
from lib.clients.qdrant.collection import get_state
from lib.errors import GuardRefused
from lib.reembed import cutover, run
from lib.reembed.assess import GuardedCollection, require_backup
from tests.operator_support import NEW_SIZE, ROOT
from tests.reembed_support import assert_migrated, embeddable, points_of, upgrade
from tests.restore_support import wait_for

pytestmark = pytest.mark.qdrant


@pytest.fixture
def ready(operator):
    """Sample memories, a backup of the collection, settings for another size."""
    operator.load()
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    return operator


def unprotected(operator, why: str) -> None:
    """No backup protects the collection, for this reason."""
    state = get_state(operator.qdrant, operator.collection)
    with TemporaryIdTable() as nothing, pytest.raises(GuardRefused) as refusal:
        require_backup(
            operator.backups,
            GuardedCollection(operator.servers.qdrant_url, state, nothing, nothing),
            NEW_SIZE,
        )
    assert why in str(refusal.value), refusal.value


def refused(operator, why: str) -> None:
    """The run is refused for this reason, before anything was paid for or changed."""
    before = operator.state()
    operator.servers.openai.reset()
    result = operator.run("reembed_embeddings", expect=2)
    assert f"Collection '{operator.collection}' already exists with different dimension" in result.err
    assert why in result.err, result.err
    assert f"{ROOT}/scripts/backup_automem.py" in result.err
    assert operator.servers.openai.stats()["requests"] == 0
    assert operator.state() == before


def test_without_a_backup(operator):
    operator.load()
    upgrade(operator)
    refused(operator, "there is none in")
    operator.run("backup_automem", "--only", "falkordb")
    refused(operator, "holds no collection")
    operator.run("backup_automem", "--only", "qdrant", "--no-verify", expect=3, env={"VECTOR_SIZE": "48"})
    refused(operator, "was never verified")
    planned = operator.run("reembed_embeddings", "--dry-run")
    assert " old, not verified: no re-embed relies on it" in planned.err


def test_only_a_backup_of_this_very_collection_that_is_whole_and_young_protects(ready):
    manifest = ready.manifests()[0]
    good, archive = (
        manifest.read_text(),
        ready.backups / json.loads(manifest.read_text())["collection"]["file"]["name"],
    )
    data = archive.read_bytes()

    def edited(change) -> None:
        document = json.loads(good)
        change(document)
        manifest.write_text(json.dumps(sealed(document)))

    old = (datetime.now(timezone.utc) - timedelta(hours=25)).isoformat()
    ahead = (datetime.now(timezone.utc) + timedelta(hours=2)).isoformat()
    for change, why in (
        (lambda one: one["collection"].update(collection="another"), "is of 'another'"),
        (
            lambda one: one["collection"]["server"].update(address="http://10.0.0.1:6333"),
            "on http://10.0.0.1:6333",
        ),
        (lambda one: one["collection"].update(size=NEW_SIZE), f"is of {NEW_SIZE}d vectors"),
        (lambda one: one.update(created=old), "hours old (at most 24)"),
        (lambda one: one.update(created=ahead), "in the future"),
        (lambda one: one["collection"].update(proof="unproved"), "was never verified"),
    ):
        edited(change)
        unprotected(ready, why)
    manifest.write_text("{}")
    unprotected(ready, "there is none in")
    manifest.write_text(good)

    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damage, why in ((bytes(flipped), "sha256"), (data[:-1], "bytes"), (b"", "bytes")):
        archive.write_bytes(damage)
        unprotected(ready, why)
    archive.unlink()
    refused(ready, archive.name)
    archive.write_bytes(data)
    ready.run("reembed_embeddings")
    assert ready.info()["config"]["params"]["vectors"]["size"] == NEW_SIZE


@pytest.mark.matrix
def test_a_point_that_only_the_collection_holds_must_be_in_the_backup(ready):
    before = points_of(ready)
    lonely = {"id": 7, "vector": [1.0] + [0.0] * 47, "payload": {"content": "mine alone"}}
    ready.call("PUT", "/points?wait=true", {"points": [lonely]})
    refused(ready, "does not hold points that are in the collection alone: 1")
    ready.call("POST", "/points/delete?wait=true", {"points": [7]})
    # The point of a memory may be newer than the backup: it can be embedded again.
    ready.cypher("CREATE (:Memory {id: 8, content: 'newer than the backup', tags: []})")
    ready.call("PUT", "/points?wait=true", {"points": [{**lonely, "id": 8, "payload": {"content": "x", "mine": 1}}]})
    ready.run("reembed_embeddings")
    after = assert_migrated(ready, {**before, 8: ({"content": "x", "mine": 1}, None)})
    assert after[8][0] == {"content": "newer than the backup", "mine": 1, "tags": []}


def test_the_guard_is_asked_again_before_the_delete(ready):
    """The state may change between the start of the embedding and the delete."""
    before = ready.state()
    ready.servers.openai.fault(hang_seconds=300, times=1)
    ready.servers.openai.reset()
    process = ready.start("reembed_embeddings")
    assert wait_for(lambda: ready.servers.openai.stats()["requests"] or process.poll() is not None)
    (ready.backups / ready.archive()).unlink()
    assert process.poll() is None
    ready.servers.openai.clear_faults()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert "already exists with different dimension" in errors
    assert ready.state() == before
    ready.run("backup_automem", "--only", "qdrant", env={"VECTOR_SIZE": "48"})
    ready.servers.openai.reset()
    ready.run("reembed_embeddings")
    assert ready.servers.openai.stats()["texts"] == 0


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (
            {"status": 429, "code": "insufficient_quota", "error_type": "insufficient_quota"},
            "insufficient_quota",
        ),
        pytest.param({"status": 401, "code": "invalid_api_key"}, "OPENAI_API_KEY", marks=pytest.mark.matrix),
    ],
)
def test_a_provider_that_refuses_stops_the_run_and_the_vectors_stay(ready, fault, expected):
    before, openai = ready.state(), ready.servers.openai
    openai.fault(**fault, after=5)
    openai.reset()
    result = ready.run("reembed_embeddings", "--batch-size", "20", "--workers", "2", expect=6)
    assert expected in result.err
    assert "nothing is paid for twice" in result.err
    assert ready.state() == before
    paid = openai.stats()["texts"]
    assert paid >= 80
    openai.clear_faults()
    left = ready.run("reembed_embeddings", "--json").json["bought"]["texts"]
    assert openai.stats()["paid_twice"] == 0
    assert openai.stats()["texts"] == paid + left == len({one["content"] for one in embeddable(ready).values()})


@pytest.mark.matrix
def test_what_passes_is_survived_and_nothing_wrong_is_stored(ready):
    before, openai = points_of(ready), ready.servers.openai
    for after, fault in enumerate(
        (
            {"status": 429, "retry_after": 0.2, "times": 2},
            {"status": 500, "times": 1},
            {"status": 503, "times": 1},
            {"cut": 0.5, "times": 1},
            {"wrong_count": True, "times": 1},
            {"nan": True, "times": 1},
            {"not_unit": 3.0, "times": 1},
            {"wrong_order": True},
            {"no_base64": True},
        )
    ):
        openai.fault(**fault, after=2 * after)
    openai.reset()
    ready.run("reembed_embeddings", "--batch-size", "10", "--workers", "3")
    statuses = openai.stats()["statuses"]
    assert (statuses["429"], statuses["500"], statuses["503"]) == (2, 1, 1)
    assert_migrated(ready, before)


def test_vectors_of_another_width_are_not_stored(ready):
    before = ready.state()
    ready.servers.openai.fault(wrong_width=NEW_SIZE // 2)
    result = ready.run("reembed_embeddings", expect=2)
    assert f"{NEW_SIZE // 2}" in result.err
    assert ready.state() == before


@pytest.mark.matrix
def test_a_text_that_the_provider_refuses_is_named_and_the_rest_is_done(ready):
    before = points_of(ready)
    poisoned, node = next(iter(embeddable(ready).items()))
    ready.servers.openai.fault(poisoned_text=node["content"])
    twins = {one for one, other in embeddable(ready).items() if node["content"] in other["content"]}
    result = ready.run("reembed_embeddings", "--json", expect=3)
    assert str(poisoned) in result.err
    assert [one["label"] for one in result.json["refused"]] == [str(poisoned)]
    after = assert_migrated(ready, before, but=twins)
    assert result.json["points"] == len(after)
    assert ready.run("verify_migration", "--json", expect=4)
    ready.servers.openai.clear_faults()
    ready.run("reembed_embeddings")
    assert_migrated(ready, before)
    ready.run("verify_migration")


def test_a_backup_of_other_data_behind_the_same_address_protects_nothing(ready):
    """The backup was taken through a tunnel to another server: same name, same size, other ids."""
    state = get_state(ready.qdrant, ready.collection)
    with TemporaryIdTable() as live, TemporaryIdTable() as nothing:
        live.put((f"00000000-0000-4000-8000-{number:012x}", None) for number in range(state.points))
        guarded = GuardedCollection(ready.servers.qdrant_url, state, live, nothing)
        with pytest.raises(GuardRefused, match=r"holds only 0 of the .* points: it is of other data, or too old"):
            require_backup(ready.backups, guarded, NEW_SIZE)


def test_a_graph_that_empties_while_texts_are_embedded_empties_no_collection(ready):
    before = ready.state()
    ready.servers.openai.reset()
    ready.servers.openai.fault(hang_seconds=300)
    process = ready.start("reembed_embeddings", "--workers", "1")
    assert wait_for(lambda: ready.servers.openai.stats()["requests"] or process.poll() is not None)
    ready.cypher("MATCH (m:Memory) SET m.content = ''")
    assert process.poll() is None
    ready.servers.openai.clear_faults()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "memories since the plan was made" in err
    assert ready.state().collection == before.collection


def test_a_resumed_run_removes_the_points_of_deleted_memories_too(ready, monkeypatch):
    """AutoMem deleted the memory with its old point alone, or the removal was refused for want of a backup."""
    gone = next(iter(embeddable(ready)))

    def refused(*_args, **_options):
        ready.cypher("MATCH (m:Memory {id: $id}) DETACH DELETE m", id=gone)
        raise GuardRefused("so many are not removed")

    with monkeypatch.context() as first:
        first.setattr(run, "remove_orphans", refused)
        ready.run("reembed_embeddings", expect=2)
    assert gone in points_of(ready)
    assert ready.run("reembed_embeddings", "--json").json["removed"] == 1
    assert gone not in points_of(ready)


@pytest.mark.parametrize(("count", "code"), [(3, 0), (12, 2)])
def test_memories_that_automem_deletes_while_the_collection_is_replaced_lose_their_points(
    ready, monkeypatch, count, code
):
    """A few are removed by the run itself. More could be a graph that was lost: they need a backup of the new points."""
    gone = list(embeddable(ready))[:count]

    def delete_meanwhile(*args):
        ready.cypher("MATCH (m:Memory) WHERE m.id IN $ids DETACH DELETE m", ids=gone)
        ready.call("POST", "/points/delete?wait=true", {"points": gone})
        return verify_method(*args)

    verify_method = cutover.verify_method
    with monkeypatch.context() as first:
        first.setattr(cutover, "verify_method", delete_meanwhile)
        result = ready.run("reembed_embeddings", "--json", expect=code)
    if code:
        assert f"{count} of the" in result.err
        ready.run("backup_automem", "--only", "qdrant")
        result = ready.run("reembed_embeddings", "--json")
    assert result.json["removed"] == count
    assert points_of(ready).keys() == embeddable(ready).keys()
    ready.run("verify_migration")
