"""Qdrant restarts during a request that it would have finished without a client: nobody waits for it in vain."""

from __future__ import annotations

import threading
import time

import pytest
import requests

from lib.clients.qdrant.snapshots import can_fetch_itself, create, list_snapshots, recover, restarted, startup
from lib.clients.qdrant.transport import Qdrant, QdrantError
from lib.errors import StoreFailed
from tests.faulty_proxy import Fault, FaultyProxy, answer
from tests.gate import CancelToken, Gate

pytestmark = [pytest.mark.qdrant, pytest.mark.timeout(300)]


def put_points(url: str, collection: str) -> None:
    points = [{"id": one, "vector": [1, 2, 3, one]} for one in range(5)]
    for path, body in (
        ("", {"vectors": {"size": 4, "distance": "Cosine"}}),
        ("/points?wait=true", {"points": points}),
    ):
        requests.put(f"{url}/collections/{collection}{path}", json=body, timeout=60).raise_for_status()


def restart_when_reached(server, stop: CancelToken, seconds: float = 0.0) -> threading.Thread:
    """Restart the server once a request is held at the gate; then close the request's connection.

    With `seconds` the connection is closed at once, and the server stays away for so long.
    """

    def work() -> None:
        assert stop.reached.wait(60)
        server.kill()
        if seconds:
            stop.let_go.set()
            time.sleep(seconds)
        server.start()
        stop.let_go.set()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_restarted_server_is_asked_again_for_the_snapshot(own_qdrant):
    put_points(own_qdrant.url, "c")
    with Gate(own_qdrant.url) as gate:
        gate.stops.append(CancelToken("POST", "/collections/c/snapshots"))
        thread = restart_when_reached(own_qdrant, gate.stops[0])
        made = create(Qdrant(gate.url), "c", seconds=60)
        thread.join()
    assert list_snapshots(Qdrant(own_qdrant.url), "c") == [made]


def test_a_server_that_takes_its_time_to_restart_is_waited_for(own_qdrant):
    put_points(own_qdrant.url, "c")
    with Gate(own_qdrant.url) as gate:
        gate.stops.append(CancelToken("POST", "/collections/c/snapshots"))
        thread = restart_when_reached(own_qdrant, gate.stops[0], seconds=8)
        made = create(Qdrant(gate.url), "c", seconds=60)
        thread.join()
    assert list_snapshots(Qdrant(own_qdrant.url), "c") == [made]


@pytest.mark.core
def test_a_server_that_stays_away_is_not_waited_for_to_the_end(own_qdrant, monkeypatch):
    monkeypatch.setattr("lib.clients.qdrant.snapshots.RESTART_SECONDS", 0.0)
    put_points(own_qdrant.url, "c")
    with FaultyProxy(own_qdrant.port, Fault(b"POST /collections/c/snapshots", answer=b"", hang_up=True)) as proxy:
        proxy.faults.append(Fault(b"GET /collections/c/snapshots", skip=1, times=None, answer=answer(502, "down")))
        with pytest.raises(QdrantError, match="502"):
            create(Qdrant(f"http://127.0.0.1:{proxy.port}", sleep=lambda _: None), "c", seconds=60)


def test_a_snapshot_that_was_complete_before_the_server_restarted_is_used(own_qdrant):
    put_points(own_qdrant.url, "c")
    with Gate(own_qdrant.url) as gate:
        gate.stops.append(CancelToken("POST", "/collections/c/snapshots", carried_out=True))
        thread = restart_when_reached(own_qdrant, gate.stops[0])
        made = create(Qdrant(gate.url), "c", seconds=60)
        thread.join()
    assert [one.name for one in list_snapshots(Qdrant(own_qdrant.url), "c")] == [made.name]


def test_a_restore_unknown_to_the_restarted_server_is_given_up(own_qdrant):
    put_points(own_qdrant.url, "c")
    q = Qdrant(own_qdrant.url)
    made = create(q, "c")
    location = can_fetch_itself(q, "c", made, "probe")
    with Gate(own_qdrant.url) as gate:
        gate.stops.append(CancelToken("PUT", "/collections/d/snapshots/recover"))
        thread = restart_when_reached(own_qdrant, gate.stops[0])
        with pytest.raises(StoreFailed, match="did not finish: the collection is missing"):
            recover(Qdrant(gate.url), "d", location, made.checksum, seconds=600)
        thread.join()


@pytest.mark.core
def test_another_process_is_distinguished_from_the_same_one(own_qdrant):
    q = Qdrant(own_qdrant.url)
    process = startup(q)
    assert process
    assert not restarted(q, process)
    assert not restarted(q, None)  # a server without a start time cannot be distinguished from another
    own_qdrant.kill()
    assert startup(q) is None
    assert not restarted(q, process)
    own_qdrant.start()
    assert restarted(q, process)
