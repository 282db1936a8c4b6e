"""The staged cutover, and what may happen to the stores while it runs."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlsplit

import pytest

from lib.backup.phases import DROPPING_STAGED, RESTORING_STAGED, STAGED_RESTORED, VERIFIED
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.snapshots import _Form
from lib.clients.qdrant.transport import Qdrant, QdrantError
from lib.journal import open_journals, read_journal
from tests.gate import CancelToken, Gate
from tests.http_proxy import HttpProxy, Request
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, SMALL
from tests.reembed_rig import COMMAND, LIVE, RECOVER, Rig
from tests.reembed_support import assert_migrated, embeddable, make_ready, points_of, settings
from tests.restore_support import faults, wait_for
from tests.sandbox.vectors import vectors_for

pytestmark = pytest.mark.qdrant
REAL = "QDRANT_TEST_URL" in os.environ or "QDRANT_TEST_SERVER" in os.environ
on_the_stand_in = pytest.mark.skipif(REAL, reason="needs the stand-in's faults on demand")
FULL = "Service internal error: No space left on device: WAL buffer size exceeds available disk space"


@pytest.fixture
def rig(operator):
    with Gate(operator.servers.qdrant_url) as gate:
        yield Rig(operator, gate)


@pytest.fixture
def ready(operator):
    return make_ready(operator)


def refusal(text: str) -> dict[str, object]:
    """A 500 in the server's format."""
    return {"status": 500, "body": {"status": {"error": text}}}


def staged(operator) -> str:
    return f"{operator.collection}__next"


def remember(operator, text: str, *, point: bool = True, size: int = OLD_SIZE, **more: object) -> str:
    """A memory as the running AutoMem stores it: in the graph, and its point with the old model's vector."""
    one = str(uuid.uuid4())
    operator.cypher("CREATE (:Memory {id: $id, content: $text, tags: ['late']})", id=one, text=text)
    if point:
        payload = {"content": text, "tags": ["late"], **more}
        row = {"id": one, "vector": vectors_for(SMALL, [text], size)[0].tolist(), "payload": payload}
        operator.call("PUT", "/points?wait=true", {"points": [row]})
    return one


def age(operator, hours: float) -> None:
    """Move the start of the open run far back."""
    (journal,) = open_journals(operator.backups)
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    for line in lines:
        at = datetime.fromisoformat(line["at"]) - timedelta(hours=hours)
        line["at"] = at.astimezone(timezone.utc).isoformat(timespec="milliseconds")
    journal.path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- what happens between two steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["the plan's look at the collection", "before the guard's last look"])
def test_a_memory_stored_between_the_scan_and_the_read_of_the_points_is_no_orphan(rig, window):
    operator = rig.operator
    if window.startswith("the plan"):
        rig.gate.stops.append(CancelToken("POST", f"/{operator.collection}/points/scroll"))
        stop = rig.gate.stops[-1]
    else:
        stop = rig.stop_at(window)
    process = rig.start()
    assert stop.reached.wait(400)
    # More points than the backup may lack, and no backup holds them: as orphans they would be refused.
    late = [remember(operator, f"stored meanwhile {number}", only_here=number) for number in range(3)]
    rig.before |= {one: point for one, point in points_of(operator).items() if one in late}
    rig.gate.open()
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "have no memory in the graph" not in errors
    after = rig.finish()
    assert [after[one][0]["only_here"] for one in late] == [0, 1, 2]


def test_a_staged_collection_of_two_days_ago_catches_up(ready):
    before = points_of(ready)
    done = ready.run("reembed_embeddings", "--no-switch")
    assert "scripts/reembed_embeddings.py --abort\n" in done.out
    assert ready.collections() == [ready.collection, staged(ready)]
    assert points_of(ready).keys() == before.keys()
    assert points_of(ready, staged(ready)).keys() == embeddable(ready).keys()
    paid = ready.servers.openai.stats()["texts"]
    age(ready, 48)

    changed, tagged, keyed, dropped, gone = [one for one in before if isinstance(one, str)][30:35]
    added = [
        remember(ready, "two days later", only_here=1),
        remember(ready, "in the graph alone", point=False),
    ]
    ready.cypher("MATCH (m:Memory {id: $id}) SET m.content = 'said otherwise since'", id=changed)
    ready.cypher("MATCH (m:Memory {id: $id}) SET m.tags = ['moved-on'], m.archived = true", id=tagged)
    ready.cypher("MATCH (m:Memory {id: $id}) DELETE m", id=gone)
    own = {"payload": {"point_only": "of yesterday", "source_app": "since"}, "points": [keyed]}
    ready.call("POST", "/points/payload?wait=true", own)
    ready.call("POST", "/points/payload/delete?wait=true", {"points": [dropped], "keys": ["last_accessed"]})
    ready.run("backup_automem", "--only", "qdrant", env={"VECTOR_SIZE": str(OLD_SIZE)})
    before = points_of(ready)

    done = ready.run("reembed_embeddings", "--json")
    assert "resuming the run of" in done.err
    assert "the staged collection is verified, the live one is unchanged" in done.err
    after = assert_migrated(ready, before)
    assert after[keyed][0]["point_only"] == "of yesterday"
    assert "last_accessed" in before[keyed][0]
    assert "last_accessed" not in after[dropped][0]  # no key that recall reads: it stays away
    assert gone not in after
    assert set(added) <= after.keys()
    assert ready.servers.openai.stats()["texts"] - paid == 3
    assert ready.collections() == [ready.collection]


def test_what_is_written_to_the_points_after_the_last_sync_is_not_lost(rig):
    """The staged collection has the old values by then, and so has the new collection."""
    operator = rig.operator
    one, other = [one for one, (payload, _) in rig.before.items() if "source_app" in payload][:2]
    stop = rig.stop_at("before the method is verified")
    process = rig.start()
    assert stop.reached.wait(400)
    values = {"payload": {"source_app": "written late", "point_only": 7}, "points": [one]}
    operator.call("POST", "/points/payload?wait=true", values)
    rig.before |= {one: points_of(operator)[one]}
    stop.let_go.set()
    # In the new collection, by an AutoMem that found the same size.
    later = rig.stop_at("before the aliases")
    assert wait_for(lambda: later.reached.is_set() or process.poll() is not None, 400)
    operator.call("POST", "/points/payload?wait=true", {"payload": {"point_only": 8}, "points": [other]})
    rig.before[other] = ({**rig.before[other][0], "point_only": 8}, None)
    rig.gate.open()
    _, errors = process.communicate(timeout=400)
    assert process.returncode in {0, 1}, errors  # without an answer to the probe it is sent, or run again
    after = rig.finish()
    assert (after[one][0]["source_app"], after[one][0]["point_only"]) == ("written late", 7)
    assert after[other][0]["point_only"] == 8


def test_an_empty_collection_that_automem_made_after_the_delete_is_replaced(rig):
    rig.kill_at("deleted and noted")
    rig.operator.call("PUT", "", {"vectors": {"size": OLD_SIZE, "distance": "Cosine"}})
    rig.finish()
    assert rig.paid_twice() == 0


def test_the_operators_own_delete_after_the_staging_loses_nothing(ready):
    """AutoMem, restarted in the meantime, has recreated the collection."""
    was, before = settings(ready), points_of(ready)
    ready.run("reembed_embeddings", "--no-switch")
    ready.call("DELETE", "")
    ready.call("PUT", "", {"vectors": {"size": OLD_SIZE, "distance": "Cosine"}})
    ready.run("reembed_embeddings")
    assert_migrated(ready, before)
    assert settings(ready) == was


def test_a_collection_from_our_own_restore_is_adopted(rig):
    rig.kill_at("in place, not yet noted")
    live = LIVE.format(live=rig.operator.collection)
    again = [
        CancelToken("DELETE", live),
        CancelToken("PUT", RECOVER.format(live=rig.operator.collection)),
        CancelToken("PUT", live),
    ]
    rig.gate.stops += again
    rig.finish()
    assert not any(stop.reached.is_set() for stop in again)


def test_an_answer_of_the_restore_that_never_comes_is_waited_for_not_repeated(rig):
    lost, again = (
        rig.stop_at("in place, not yet noted"),
        CancelToken("PUT", RECOVER.format(live=rig.operator.collection), 2),
    )
    lost.let_go.set()
    rig.gate.stops.append(again)
    rig.operator.run("reembed_embeddings", *COMMAND)
    assert lost.reached.is_set()
    assert not again.reached.is_set()
    rig.finish()


def test_an_archived_flag_set_while_the_collection_is_away_arrives(rig):
    rig.kill_at("deleted and noted")
    some = [one for one in rig.before if isinstance(one, str)][40:43]
    for one in some:
        rig.operator.cypher("MATCH (m:Memory {id: $id}) SET m.archived = true, m.relevance_score = 0.01", id=one)
    after = rig.finish()
    assert all(after[one][0]["archived"] is True for one in some)


def test_what_the_old_service_writes_at_the_same_size_is_renewed(rig):
    operator = rig.operator
    operator.export(VECTOR_SIZE=OLD_SIZE, EMBEDDING_MODEL=LARGE)
    stop = rig.stop_at("before the aliases")
    process = rig.start()
    assert stop.reached.wait(400)
    new = [remember(operator, "by the old service"), remember(operator, "by the old service, too")]
    old = [one for one in rig.before if isinstance(one, str)][50:55]
    rows = [
        {
            "id": one,
            "vector": vectors_for(SMALL, [payload["content"]], OLD_SIZE)[0].tolist(),
            "payload": payload,
        }
        for one, (payload, _) in points_of(operator).items()
        if one in old
    ]
    operator.call("PUT", "/points?wait=true", {"points": rows})
    rig.before |= {one: points_of(operator)[one] for one in new}
    rig.gate.open()
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    after = assert_migrated(operator, rig.before, size=OLD_SIZE)
    assert set(new) <= after.keys()


def finished_after(rig: Rig, change: Callable[[], object]) -> int:
    """Migrate, and make a change when the new collection is in its place. Returns how many vectors were repaired."""
    stop = rig.stop_at("before the aliases")
    process = rig.start()
    assert stop.reached.wait(400)
    change()
    rig.gate.open()
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert_migrated(rig.operator, rig.before, size=rig.size)
    (report,) = (rig.operator.backups / "reports").glob("reembed_*.json")
    return int(json.loads(report.read_text())["mended"])


def overwrite(rig: Rig, some: slice, **more: object) -> None:
    """Give points of the new collection the old model's vectors, at its size."""
    found = list(points_of(rig.operator).items())[some]
    vectors = vectors_for(SMALL, [payload["content"] for _, (payload, _) in found], rig.size)
    rows = [
        {"id": one, "vector": vector.tolist(), "payload": {**payload, **more}}
        for (one, (payload, _)), vector in zip(found, vectors, strict=True)
    ]
    rig.operator.call("PUT", "/points?wait=true", {"points": rows})
    for row in rows:
        if row["id"] in rig.before:
            rig.before[row["id"]][0].update(more)


@pytest.mark.core
def test_a_wrong_collection_at_another_size_is_found_by_a_sample_and_repaired(rig):
    count = len(embeddable(rig.operator))
    assert finished_after(rig, lambda: overwrite(rig, slice(None))) == count


def test_at_another_size_each_point_that_was_written_since_the_staging_is_compared(rig):
    """The sample has 200 of the points: it may lack this one."""
    assert finished_after(rig, lambda: overwrite(rig, slice(77, 78), relevance_score=0.25)) == 1


def test_at_the_same_size_every_vector_is_compared(rig):
    rig.size = OLD_SIZE
    rig.operator.export(VECTOR_SIZE=OLD_SIZE, EMBEDDING_MODEL=LARGE)
    assert finished_after(rig, lambda: overwrite(rig, slice(77, 78))) == 1


@pytest.mark.parametrize(("size", "pages_of_vectors"), [(NEW_SIZE, 1), (OLD_SIZE, 3)])
def test_the_vectors_of_another_size_are_read_once(rig, size, pages_of_vectors):
    rig.operator.export(VECTOR_SIZE=size, EMBEDDING_MODEL=LARGE)
    path = f"/{rig.operator.collection}/points$"
    reading = CancelToken("POST", path, nth=1000, when=lambda: rig.phase() == STAGED_RESTORED)
    rig.gate.stops.append(reading)
    rig.operator.run("reembed_embeddings", *COMMAND)
    catch_up = 1  # the points of memories that have no text of their own
    pages_of_payloads = 1
    assert 1000 - reading.nth == catch_up + pages_of_payloads + pages_of_vectors
    assert_migrated(rig.operator, rig.before, size=size)


def test_a_graph_that_is_empty_after_the_staging_removes_nothing(ready):
    before = points_of(ready)
    ready.run("reembed_embeddings", "--no-switch")
    staged_before = points_of(ready, staged(ready))
    ready.cypher("MATCH (m:Memory) DELETE m")
    ready.run("reembed_embeddings", expect=1)
    assert points_of(ready).keys() == before.keys()
    assert points_of(ready, staged(ready)).keys() == staged_before.keys()


# --- what is refused, and what is left --------------------------------------------------------------------------


@pytest.mark.core
def test_a_staged_collection_that_no_journal_knows_is_refused(ready):
    url = f"{ready.servers.qdrant_url}/collections/{staged(ready)}"
    import requests

    requests.put(url, json={"vectors": {"size": NEW_SIZE, "distance": "Cosine"}}, timeout=30).raise_for_status()
    refused = ready.run("reembed_embeddings", expect=2)
    assert f"'{staged(ready)}' exists, and no unfinished run here made it" in refused.err
    assert f"curl -s -X DELETE {url}" in refused.err
    assert ready.servers.openai.stats()["requests"] == 0
    assert ready.collections() == [ready.collection, staged(ready)]
    # A run that stages nothing ignores the staged collection.
    ready.run("reembed_embeddings", "--in-place")
    assert ready.collections() == [ready.collection, staged(ready)]


def test_what_was_staged_with_other_settings_is_replaced(ready):
    before = points_of(ready)
    ready.run("reembed_embeddings", "--no-switch")
    done = ready.run("reembed_embeddings", env={"VECTOR_SIZE": "64"})
    assert f"UTC makes {NEW_SIZE}d with {LARGE} of {ready.servers.openai.base_url}. It cannot be resumed" in done.err
    assert_migrated(ready, before, size=64)
    assert ready.collections() == [ready.collection]
    assert open_journals(ready.backups) == []


def test_no_switch_reports_when_there_is_nothing_to_stage(ready):
    ready.run("reembed_embeddings", "--no-switch", "--in-place", expect=2)
    ready.run("reembed_embeddings")
    assert ready.run("reembed_embeddings", "--no-switch", "--json").json["staged"] is None
    ready.call("DELETE", "")
    assert "nothing to wait for" in ready.run("reembed_embeddings", "--no-switch", expect=2).err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"EMBEDDING_MODEL": SMALL}, "EMBEDDING_MODEL has changed"),
        ({"VECTOR_SIZE": "64"}, "VECTOR_SIZE has changed"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}, "OPENAI_BASE_URL has changed"),
    ],
)
def test_after_the_delete_each_other_setting_is_refused_by_its_name(rig, setting, message):
    rig.kill_at("deleted and noted")
    assert message in rig.operator.run("reembed_embeddings", expect=2, env=setting).err
    rig.finish()


def test_after_the_delete_another_collection_is_refused(rig):
    rig.kill_at("deleted and noted")
    other = f"{rig.operator.collection}_other"
    refused = rig.operator.run("reembed_embeddings", expect=2, env={"QDRANT_COLLECTION": other})
    assert f"was making the collection '{rig.operator.collection}'" in refused.err
    rig.finish()


# --- a server that cannot restore the snapshot --------------------------------------------------------------------


@on_the_stand_in
@pytest.mark.parametrize("room", [True, False], ids=["sent", "filled"])
def test_a_server_that_cannot_fetch_from_itself_gets_it_from_here(ready, monkeypatch, room):
    """The snapshot if this machine has room for it, else the points."""
    before, was = points_of(ready), settings(ready)
    ready.run("reembed_embeddings", "--no-switch")
    if not room:
        monkeypatch.setattr("lib.reembed.cutover.free_bytes", lambda _folder: 64 << 20)
    faults(ready, {"method": "PUT", "path": "__next_probe/snapshots/recover", "status": 500, "body": "no"})
    result = ready.run("reembed_embeddings", "--json").json
    assert result["way"] == ("sent" if room else "filled from the embedding cache")
    assert_migrated(ready, before)
    assert settings(ready) == was
    assert ready.call("GET", "/snapshots") == []
    assert list((ready.backups / "embeddings").glob("*.partial")) == []


@on_the_stand_in
def test_an_upload_that_breaks_off_after_the_delete_is_tried_again(ready, monkeypatch):
    before, send, breaks = points_of(ready), _Form.__iter__, iter([True])

    def break_off(form: _Form) -> Iterator[bytes]:
        for number, piece in enumerate(send(form)):
            if number == 2 and form.len > 2000 and next(breaks, False):  # the second piece of a snapshot
                raise ConnectionResetError
            yield piece

    monkeypatch.setattr(_Form, "__iter__", break_off)
    monkeypatch.setattr("lib.clients.qdrant.snapshots._SENT_BYTES", 100_000)
    faults(ready, {"method": "PUT", "path": "__next_probe/snapshots/recover", "status": 500, "body": "no"})
    assert ready.run("reembed_embeddings", "--json").json["way"] == "sent"
    assert next(breaks, None) is None
    assert_migrated(ready, before)
    assert ready.call("GET", "/snapshots") == []


@on_the_stand_in
@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "__next/points"), ("POST", "__next/snapshots"), ("PUT", "__next_probe/snapshots/recover")],
)
def test_a_disk_that_fills_before_the_delete_leaves_the_live_collection_untouched(ready, method, path):
    before, paid = ready.state(), None
    faults(ready, {"method": method, "path": path, **refusal(FULL)})
    failed = ready.run("reembed_embeddings", expect=1)
    assert f"'{ready.collection}' is unchanged" in failed.err
    assert "MiB are needed" in failed.err
    assert ready.state() == before
    assert ready.collections() == [ready.collection]
    faults(ready)
    paid = ready.servers.openai.stats()["texts"]
    points = points_of(ready)
    ready.run("reembed_embeddings")
    assert ready.servers.openai.stats()["texts"] == paid
    assert_migrated(ready, points)


def test_a_disk_that_fills_while_the_index_is_built_leaves_the_live_collection_untouched(ready, monkeypatch):
    """The optimizer reports it to the thread that waits for the index, while the points are verified."""
    before, points = ready.state(), points_of(ready)

    def full(qdrant, *_: object) -> None:
        raise QdrantError(qdrant.display, 500, FULL)

    with monkeypatch.context() as patch:
        patch.setattr("lib.clients.qdrant.collection.wait_green", full)
        failed = ready.run("reembed_embeddings", expect=1)
    assert f"'{ready.collection}' is unchanged" in failed.err
    assert ready.state() == before
    assert ready.collections() == [ready.collection]
    paid = ready.servers.openai.stats()["texts"]
    ready.run("reembed_embeddings")
    assert ready.servers.openai.stats()["texts"] == paid
    assert_migrated(ready, points)


@pytest.mark.core
def test_settings_of_the_staged_collection_that_somebody_changed_are_not_taken_over(ready):
    before, wanted = points_of(ready), settings(ready)
    ready.run("reembed_embeddings", "--no-switch")
    ready.call("PATCH", "__next", {"hnsw_config": {"m": 77}})
    ready.run("reembed_embeddings")
    assert settings(ready) == wanted
    assert_migrated(ready, before)


class FailingOptimizer(HttpProxy):
    """A server that has too few open files for the optimizer of the staged collection, until it is `mended`."""

    mended = False

    def open(self) -> None:
        pass

    def answer(self, request: Request, body: bytes) -> None:
        status, headers, content = request.forward(body)
        if request.command == "GET" and request.path.endswith("__next"):
            answer = json.loads(content)
            if status == 200 and not self.mended:
                error = {"error": "Service internal error: Too many open files"}
                answer["result"] |= {"status": "red", "optimizer_status": error}
            content = json.dumps(answer).encode()
        request.reply(status, headers, content)


@pytest.mark.core
def test_a_collection_is_not_replaced_by_one_whose_index_cannot_be_built(ready, monkeypatch):
    monkeypatch.setattr("lib.clients.qdrant.collection.FAILING_SECONDS", 0.2)
    before, url = ready.state(), urlsplit(ready.servers.qdrant_url)
    with FailingOptimizer(url.hostname, url.port) as proxy:
        ready.export(QDRANT_URL=proxy.url)
        ready.run("backup_automem", "--only", "qdrant")
        failed = ready.run("reembed_embeddings", expect=1)
        assert "cannot build the index" in failed.err
        assert "Too many open files" in failed.err
        assert f"'{ready.collection}' is unchanged" in failed.err
        assert ready.state() == before
        points, proxy.mended = points_of(ready), True
        ready.run("reembed_embeddings")
        assert_migrated(ready, points)


def test_points_that_are_missing_end_the_wait_for_the_index(ready, monkeypatch):
    before, points = ready.state(), points_of(ready)

    def wait(_qdrant, _name: str, _seconds: float, stop) -> None:
        while True:
            stop.check()
            time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr("lib.clients.qdrant.collection.wait_green", wait)
        patch.setattr("lib.reembed.staging._different_ids", lambda *_: ([1], []))
        failed = ready.run("reembed_embeddings", expect=4)
    assert f"points of '{staged(ready)}' are missing: 1, such as 1" in failed.err
    assert ready.state() == before
    ready.run("reembed_embeddings")
    assert_migrated(ready, points)


@on_the_stand_in
def test_a_disk_that_fills_after_the_delete_is_given_room(ready):
    before = points_of(ready)
    faults(ready, {"method": "PUT", "path": f"/{ready.collection}/snapshots/recover", **refusal(FULL)})
    result = ready.run("reembed_embeddings", "--json").json
    assert result["way"] == "filled from the embedding cache"
    assert_migrated(ready, before)
    assert ready.collections() == [ready.collection]


@on_the_stand_in
def test_a_disk_that_is_full_without_a_word_of_it_is_given_room_once_it_is_reported(ready):
    """A restore that unpacks onto a full disk reports only that it failed to unpack (1.18.3)."""
    before = points_of(ready)
    unpack = refusal("Service runtime error: IO Error: failed to unpack")
    recover = {"method": "PUT", "path": f"/{ready.collection}/snapshots/recover", **unpack}
    faults(ready, recover, {"method": "PUT", "path": f"/{ready.collection}/points", **refusal(FULL), "times": 1})
    result = ready.run("reembed_embeddings", "--json").json
    assert result["way"] == "filled from the embedding cache"
    assert_migrated(ready, before)
    assert ready.collections() == [ready.collection]
    (path,) = ready.backups.glob("journal_*_reembed.jsonl")
    phases = [entry["phase"] for entry in read_journal(path).entries]
    assert phases.index(DROPPING_STAGED) < phases.index(VERIFIED)


@on_the_stand_in
def test_a_disk_without_room_for_the_new_collection_alone_reports_how_to_resume(ready):
    before = points_of(ready)
    faults(ready, {"method": "PUT", "path": f"/{ready.collection}/points", **refusal(FULL)})
    failed = ready.run("reembed_embeddings", "--in-place", expect=1)
    assert "disk is full" in failed.err
    assert "not complete" in failed.err
    assert "make room on the server" in failed.err
    paid = ready.servers.openai.stats()["texts"]
    faults(ready)
    ready.run("reembed_embeddings", "--in-place")
    assert ready.servers.openai.stats()["texts"] == paid
    assert_migrated(ready, before)


@on_the_stand_in
def test_a_restore_that_fails_twice_ends_in_the_embedding_cache(ready):
    before = points_of(ready)
    broken = refusal("Service internal error: something broke")
    faults(ready, {"method": "PUT", "path": f"/{ready.collection}/snapshots/recover", **broken})
    assert ready.run("reembed_embeddings", "--json").json["way"] == "filled from the embedding cache"
    assert_migrated(ready, before)


@on_the_stand_in
@pytest.mark.parametrize("words", [(), ("--abort",)], ids=["resume", "abort"])
def test_a_sent_snapshot_that_the_server_does_not_delete_is_reported_and_removed_later(ready, words):
    before = points_of(ready)
    broken = refusal("Service internal error: something broke")
    deletion = {"method": "DELETE", "path": rf"/collections/{ready.collection}/snapshots/", "times": 2}
    faults(ready, {"method": "PUT", "path": "__next_probe/snapshots/recover", **broken}, {**broken, **deletion})
    assert "something broke" in ready.run("reembed_embeddings", expect=1).err
    assert len(ready.call("GET", "/snapshots")) == 1
    ready.run("reembed_embeddings", *words)
    assert ready.call("GET", "/snapshots") == []
    assert_migrated(ready, before)


@on_the_stand_in
def test_a_sent_snapshot_whose_restore_is_reported_as_failed_does_not_stay_on_the_server(ready, monkeypatch):
    before, send = points_of(ready), snapshots.upload_and_restore

    def failing(q: Qdrant, *args: Any, **options: Any) -> bool:
        send(q, *args, **options)
        raise QdrantError(q.display, 500, "Service internal error: something broke")

    monkeypatch.setattr(snapshots, "upload_and_restore", failing)
    faults(ready, {"method": "PUT", "path": "__next_probe/snapshots/recover", **refusal("something broke")})
    ready.run("reembed_embeddings")
    assert ready.call("GET", "/snapshots") == []
    assert_migrated(ready, before)


# --- a server that is killed ------------------------------------------------------------------------------------

KILLS = int(os.environ.get("SERVER_KILLS", "3"))


@pytest.mark.skipif("QDRANT_TEST_SERVER" not in os.environ, reason="kills a real server")
def test_a_server_killed_while_it_restores_starts_again_and_the_run_continues(operator, tmp_path):
    from dataclasses import replace

    from tests.real_qdrant import RealQdrant, test_server

    binary = test_server()
    assert binary is not None
    for turn in range(KILLS):
        with RealQdrant(binary, tmp_path / f"killed{turn}") as server:
            folder = tmp_path / f"operator{turn}"
            folder.mkdir()
            someone = replace(
                operator,
                servers=replace(operator.servers, qdrant_url=server.url),
                folder=folder,
                exports={},
            )
            with Gate(server.url) as gate:
                rig = Rig(someone, gate)
                process = rig.start()
                while process.poll() is None and rig.phase() not in {RESTORING_STAGED, STAGED_RESTORED}:
                    time.sleep(0.001)
                time.sleep(0.02 * turn)
                server.kill()
                _, errors = process.communicate(timeout=300)
                assert process.returncode in {0, 1}, errors
                server.start()
                rig.finish()
            someone.clean_up()
