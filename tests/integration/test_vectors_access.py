from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.clients.qdrant import collection, points, snapshots
from lib.clients.qdrant import collection as recreate
from lib.clients.qdrant import points as upsert
from lib.clients.qdrant.transport import Qdrant
from lib.errors import AccessRefused
from tests.matrix import matrix
from tests.vectors_support import REAL_SERVER, STAND_INS, fill, own_server, payload_of, vectors_of

pytestmark = pytest.mark.qdrant

KEY = "k3y-nobody-may-see"
WRONG = "wr0ng-k3y-neither"
NAME = "guarded"


@pytest.fixture(scope="module", params=["real"] if REAL_SERVER else matrix(STAND_INS, STAND_INS[-1]))
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qdrant]:
    with own_server(request.param, tmp_path_factory.mktemp("guarded"), KEY) as q:
        recreate.create_like(q, NAME, recreate.AUTOMEM_INFO, 8)
        fill(q, NAME, 50, 8)
        yield q


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.snapshot"
    path.write_bytes(bytes(40 * 1024 * 1024))
    return path


def test_with_the_key_all_goes_as_without_one(guarded: Qdrant):
    made = snapshots.create(guarded, NAME)
    data = io.BytesIO()
    assert snapshots.download(guarded, NAME, made, data.write) == made.checksum
    location = snapshots.can_fetch_itself(guarded, NAME, made, probe="probe")
    assert location is not None
    snapshots.recover(guarded, "copy", location, made.checksum)
    assert points.count(guarded, "copy") == 50
    (hit,) = points.search(guarded, "copy", vectors_of(50, 8)[4], 1)
    assert points.retrieve(guarded, "copy", [hit.id], payload=True)[0].payload == payload_of(4)
    assert collection.delete_collection(guarded, "copy")


@pytest.mark.parametrize("key", ["", WRONG])
def test_without_it_every_request_is_refused_and_no_key_is_shown(guarded: Qdrant, key: str):
    stranger = Qdrant(guarded.base_url, key)
    assert stranger.version() == guarded.version()
    attempts = [
        lambda: collection.get_state(stranger, NAME),
        lambda: list(points.scroll(stranger, NAME)),
        lambda: upsert.upsert(stranger, NAME, [1], vectors_of(1, 8), [{}]),
        lambda: upsert.preflight_write(stranger, NAME),
        lambda: snapshots.create(stranger, NAME),
        lambda: snapshots.download(stranger, NAME, snapshots.Snapshot("x", 1, None, ""), lambda _: None),
        lambda: snapshots.preflight_upload(stranger, NAME),
        lambda: snapshots.can_fetch_itself(stranger, NAME, snapshots.Snapshot("x", 1, "0" * 64, ""), "probe"),
        lambda: collection.delete_collection(stranger, NAME),
    ]
    for attempt in attempts:
        with pytest.raises(AccessRefused, match="401") as caught:
            attempt()
        assert WRONG not in f"{caught.value} {caught.value.next_step}"
        assert "QDRANT_API_KEY" in caught.value.next_step
    assert points.count(guarded, NAME) == 50


def test_a_large_upload_with_a_wrong_key_ends_before_it_begins(guarded: Qdrant, large: Path):
    """The server answers from the headers and leaves the body unread: a naive client waits for ever."""
    began = time.monotonic()
    with pytest.raises(AccessRefused):
        snapshots.upload_and_restore(
            Qdrant(guarded.base_url, WRONG),
            "fresh",
            large,
            size=large.stat().st_size,
            filename=snapshots.unique_filename("x"),
            checksum="0" * 64,
        )
    assert time.monotonic() - began < 25


def test_large_upserts_with_a_wrong_key_report_it(guarded: Qdrant, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lib.clients.qdrant.transport.SEND_SECONDS", 0.5)
    stranger = Qdrant(guarded.base_url, WRONG, sleep=lambda _: None)
    payloads = [{"content": "x" * 1_000_000}] * 20
    with pytest.raises(AccessRefused):
        upsert.upsert(stranger, NAME, list(range(20)), vectors_of(20, 8), payloads)
    assert points.count(guarded, NAME) == 50
