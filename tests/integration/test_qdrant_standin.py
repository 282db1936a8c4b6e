"""What the stand-in does beyond the recordings: faults on demand, snapshots of other versions, several clients."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.qdrant_uploads import recorded_snapshots
from tests.restore_support import wait_for
from tests.sandbox.qdrant_server.process import QdrantServer

pytestmark = pytest.mark.matrix

TIMEOUT = 30


def _filled(server: QdrantServer, points: int = 50, name: str = "c") -> str:
    url = f"{server.url}/collections/{name}"
    made = {"vectors": {"size": 4, "distance": "Dot"}, "wal_config": {"wal_capacity_mb": 1}}
    requests.put(url, json=made, timeout=TIMEOUT).raise_for_status()
    rows = [{"id": one, "vector": [1, 2, 3, one], "payload": {"n": one}} for one in range(points)]
    requests.put(f"{url}/points?wait=true", json={"points": rows}, timeout=TIMEOUT).raise_for_status()
    return url


def _fault(server: QdrantServer, **rule: Any) -> None:
    requests.post(f"{server.url}/_sandbox/faults", json=[rule], timeout=TIMEOUT).raise_for_status()


def _upload(server: QdrantServer, name: str, content: bytes) -> requests.Response:
    where = f"{server.url}/collections/{name}/snapshots/upload?wait=true"
    return requests.post(where, files={"snapshot": ("up.snapshot", content)}, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with QdrantServer(tmp_path_factory.mktemp("qdrant") / "data") as running:
        yield running


@pytest.fixture(autouse=True)
def no_faults(server: QdrantServer):
    yield
    requests.delete(f"{server.url}/_sandbox/faults", timeout=TIMEOUT).raise_for_status()
    for one in requests.get(f"{server.url}/collections", timeout=TIMEOUT).json()["result"]["collections"]:
        requests.delete(f"{server.url}/collections/{one['name']}", timeout=TIMEOUT)


def test_a_fault_answers_as_often_as_it_says(server: QdrantServer) -> None:
    url = _filled(server)
    _fault(
        server,
        method="POST",
        path="/points/count",
        status=429,
        headers={"Retry-After": "1"},
        body="slow",
        times=2,
    )
    answers = [requests.post(f"{url}/points/count", json={}, timeout=TIMEOUT) for _ in range(3)]
    assert [one.status_code for one in answers] == [429, 429, 200]
    assert answers[0].headers["retry-after"] == "1"
    assert answers[0].text == "slow"


def test_a_fault_delays_and_hangs(server: QdrantServer) -> None:
    url = _filled(server)
    _fault(server, path="/points/count", delay_seconds=0.5, times=1)
    started = time.monotonic()
    assert requests.post(f"{url}/points/count", json={}, timeout=TIMEOUT).status_code == 200
    assert time.monotonic() - started >= 0.5
    _fault(server, path="/points/count", hang=True, times=1)
    with pytest.raises(requests.Timeout):
        requests.post(f"{url}/points/count", json={}, timeout=0.5)


def test_a_lost_answer_was_carried_out(server: QdrantServer) -> None:
    url = _filled(server)
    _fault(server, method="DELETE", path="/collections/c$", lose_answer=True, times=1)
    with pytest.raises(requests.Timeout):
        requests.delete(url, timeout=0.5)
    assert wait_for(lambda: requests.get(url, timeout=TIMEOUT).status_code == 404)


def test_a_cut_download_ends_early_and_resumes_with_range(server: QdrantServer) -> None:
    url = _filled(server)
    made = requests.post(f"{url}/snapshots", timeout=TIMEOUT).json()["result"]
    where, identity = f"{url}/snapshots/{made['name']}", {"Accept-Encoding": "identity"}
    _fault(server, path=r"/snapshots/.+\.snapshot", cut_after_bytes=5000, times=1)
    received = b""
    answer = requests.get(where, headers=identity, timeout=TIMEOUT, stream=True)
    with pytest.raises(requests.RequestException):  # noqa: PT012  # the pieces before the cut are preserved
        for piece in answer.iter_content(1000):
            received += piece
    assert len(received) == 5000
    rest = requests.get(where, headers={**identity, "Range": "bytes=5000-"}, timeout=TIMEOUT)
    assert rest.status_code == 206
    assert hashlib.sha256(received + rest.content).hexdigest() == made["checksum"]


def test_a_compressed_download_is_the_same_file(server: QdrantServer) -> None:
    url = _filled(server)
    made = requests.post(f"{url}/snapshots", timeout=TIMEOUT).json()["result"]
    answer = requests.get(f"{url}/snapshots/{made['name']}", headers={"Accept-Encoding": "gzip"}, timeout=TIMEOUT)
    assert answer.headers["content-encoding"] == "gzip"
    assert hashlib.sha256(answer.content).hexdigest() == made["checksum"]


@pytest.mark.parametrize("played", ["1.11.3", "1.18.3"])
def test_a_snapshot_brings_points_payloads_vectors_and_indexes_back(played: str, tmp_path: Path) -> None:
    with QdrantServer(tmp_path / "data", played) as server:
        url = _filled(server)
        index = {"field_name": "n", "field_schema": {"type": "integer", "lookup": True, "range": False}}
        requests.put(f"{url}/index?wait=true", json=index, timeout=TIMEOUT).raise_for_status()
        made = requests.post(f"{url}/snapshots", timeout=TIMEOUT).json()["result"]
        body = {"location": f"{url}/snapshots/{made['name']}", "checksum": made["checksum"]}
        other = f"{server.url}/collections/other"
        requests.put(f"{other}/snapshots/recover", json=body, timeout=TIMEOUT).raise_for_status()
        whole = {"limit": 100, "with_vector": True}
        pages = [
            requests.post(f"{one}/points/scroll", json=whole, timeout=TIMEOUT).json()["result"] for one in (url, other)
        ]
        assert pages[0] == pages[1]
        assert len(pages[0]["points"]) == 50
        schemas = [requests.get(one, timeout=TIMEOUT).json()["result"]["payload_schema"] for one in (url, other)]
        assert (
            schemas[0] == schemas[1] == {"n": {"data_type": "integer", "params": index["field_schema"], "points": 50}}
        )


def test_a_1_11_snapshot_kills_the_collection_on_1_18(server: QdrantServer) -> None:
    answer = _upload(server, "old", recorded_snapshots("1.11.3")["memories_4d.snapshot"])
    assert answer.status_code == 500
    assert requests.get(f"{server.url}/collections/old/exists", timeout=TIMEOUT).json()["result"]["exists"] is True
    assert requests.get(f"{server.url}/collections/old", timeout=TIMEOUT).status_code == 500
    assert requests.delete(f"{server.url}/collections/old", timeout=TIMEOUT).json()["result"] is True


def test_a_1_18_snapshot_is_refused_by_1_11(tmp_path: Path) -> None:
    with QdrantServer(tmp_path / "data", "1.11.3") as old:
        url = _filled(old)
        answer = _upload(old, "c", recorded_snapshots("1.18.3")["memories_4d.snapshot"])
        assert answer.status_code == 400
        assert "tar archive contains GNUSparse entry" in answer.json()["status"]["error"]
        assert requests.post(f"{url}/points/count", json={}, timeout=TIMEOUT).json()["result"]["count"] == 50


def test_what_the_stand_ins_made_does_not_cross_versions_either(server: QdrantServer, tmp_path: Path) -> None:
    with QdrantServer(tmp_path / "data", "1.11.3") as old:
        made = {}
        for one in (server, old):
            url = _filled(one)
            name = requests.post(f"{url}/snapshots", timeout=TIMEOUT).json()["result"]["name"]
            made[one] = requests.get(f"{url}/snapshots/{name}", timeout=TIMEOUT).content
        assert _upload(old, "new", made[server]).status_code == 400
        assert _upload(server, "old", made[old]).status_code == 500
        assert _upload(old, "again", made[old]).status_code == 200


def test_a_refused_upsert_without_wait_is_lost_in_silence_on_1_11(tmp_path: Path) -> None:
    with QdrantServer(tmp_path / "data", "1.11.3") as old:
        url = _filled(old, 3)
        rows = [
            {"id": 100, "vector": [1, 2, 3, 4]},
            {"id": 101, "vector": [1]},
            {"id": 102, "vector": [1, 2, 3, 4]},
        ]
        answer = requests.put(f"{url}/points?wait=false", json={"points": rows}, timeout=TIMEOUT)
        assert answer.json()["result"]["status"] == "acknowledged"
        assert requests.post(f"{url}/points/count", json={}, timeout=TIMEOUT).json()["result"]["count"] == 4


def test_reads_continue_while_others_write(server: QdrantServer) -> None:
    url = _filled(server, 0 + 1)
    failed: list[str] = []

    def write(first: int) -> None:
        for start in range(first, first + 500, 50):
            rows = [{"id": one, "vector": [1, 2, 3, one]} for one in range(start, start + 50)]
            answer = requests.put(f"{url}/points?wait=true", json={"points": rows}, timeout=TIMEOUT)
            if answer.status_code != 200:
                failed.append(answer.text)

    writers = [threading.Thread(target=write, args=(first,)) for first in (1000, 2000, 3000, 4000)]
    for one in writers:
        one.start()
    while any(one.is_alive() for one in writers):
        answer = requests.post(f"{url}/points/scroll", json={"limit": 100}, timeout=TIMEOUT)
        assert answer.status_code == 200
    assert failed == []
    assert requests.post(f"{url}/points/count", json={}, timeout=TIMEOUT).json()["result"]["count"] == 2001


def test_points_are_ordered_and_selected(server: QdrantServer) -> None:
    url = _filled(server, 20)
    index = {"field_name": "n", "field_schema": "integer"}
    requests.put(f"{url}/index?wait=true", json=index, timeout=TIMEOUT).raise_for_status()

    def scroll(**asked: Any) -> list[dict[str, Any]]:
        answer = requests.post(f"{url}/points/scroll", json=asked, timeout=TIMEOUT)
        assert answer.status_code == 200, answer.text
        return answer.json()["result"]["points"]

    newest = scroll(limit=3, order_by={"key": "n", "direction": "desc"})
    assert [one["id"] for one in newest] == [19, 18, 17]
    assert [one["order_value"] for one in newest] == [19, 18, 17]
    assert [one["id"] for one in scroll(filter={"must_not": {"key": "n", "range": {"lt": 18}}})] == [18, 19]
    assert [one["id"] for one in scroll(filter={"must": [{"has_id": [3, 5]}]})] == [3, 5]
    assert scroll(limit=1, with_payload={"exclude": ["n"]}, with_vector=False) == [{"id": 0, "payload": {}}]
    assert scroll(limit=1, with_payload=False, with_vector=True) == [{"id": 0, "vector": [1.0, 2.0, 3.0, 0.0]}]


def test_a_start_takes_under_two_seconds(tmp_path: Path) -> None:
    server = QdrantServer(tmp_path / "data")
    started = time.monotonic()
    with server:
        assert time.monotonic() - started < 30  # 0.7 s if nothing else runs
        assert server.restart().running
    assert not server.running


def test_a_snapshot_of_several_shards_is_not_partly_restored(server: QdrantServer) -> None:
    answer = _upload(server, "two", recorded_snapshots("1.18.3")["memories_two_shards.snapshot"])
    assert answer.status_code == 500
    assert requests.get(f"{server.url}/collections/two", timeout=TIMEOUT).status_code == 404


@pytest.mark.matrix
def test_a_kill_during_a_restore_leaves_the_other_collections_whole(tmp_path: Path) -> None:
    with QdrantServer(tmp_path / "data") as server:
        url = _filled(server)
        name = requests.post(f"{url}/snapshots", timeout=TIMEOUT).json()["result"]["name"]
        for number in range(5):
            where = f"{server.url}/collections/temporary/snapshots/recover?wait=false"
            requests.put(where, json={"location": f"{url}/snapshots/{name}"}, timeout=TIMEOUT).raise_for_status()
            time.sleep(0.05 * number)
            server.kill()
            server.start()
            assert requests.post(f"{url}/points/count", json={}, timeout=TIMEOUT).json()["result"]["count"] == 50
            requests.delete(f"{server.url}/collections/temporary", timeout=TIMEOUT).raise_for_status()
