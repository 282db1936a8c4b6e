"""Qdrant restarts during a request that it would have finished without a client: nobody waits for it in vain."""

from __future__ import annotations

import threading

import pytest
import requests

from lib.clients.qdrant.restoring import can_fetch_itself, recover
from lib.clients.qdrant.snapshots import create, list_snapshots, restarted, startup
from lib.clients.qdrant.transport import Qdrant
from lib.errors import StoreFailed
from tests.gate import CancelToken, Gate

pytestmark = [pytest.mark.qdrant, pytest.mark.timeout(300)]


def put_points(url: str, collection: str) -> None:
    points = [{"id": one, "vector": [1, 2, 3, one]} for one in range(5)]
    for path, body in (
        ("", {"vectors": {"size": 4, "distance": "Cosine"}}),
        ("/points?wait=true", {"points": points}),
    ):
        requests.put(f"{url}/collections/{collection}{path}", json=body, timeout=60).raise_for_status()


def restart_when_reached(server, stop: CancelToken) -> threading.Thread:
    """Restart the server once a request is held at the gate; then close the request's connection."""

    def work() -> None:
        assert stop.reached.wait(60)
        server.kill()
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
