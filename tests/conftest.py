"""Servers for the whole session, an operator with separate stores, and which tests belong to the matrices."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.operator_support import Operator, Servers
from tests.real_qdrant import RealQdrant, test_server
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.openai_server import OpenAIServer
from tests.sandbox.qdrant_server.process import QdrantServer
from tests.script_process import do_not_wait

STAND_IN_VERSION = "1.18.3"

# A suite in the background or under nohup ignores these signals, and its child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

LONGEST = ("guide", "faults", "integration")
RAM_DISK, ROOM_BYTES = Path("/dev/shm"), 4 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Temporary folders lie on the RAM disk if there is one with room: an fsync costs nothing there."""
    if config.option.basetemp or hasattr(config, "workerinput") or not os.access(RAM_DISK, os.W_OK):
        return
    if shutil.disk_usage(RAM_DISK).free < ROOM_BYTES:
        return
    config.option.basetemp = tempfile.mkdtemp(prefix="automem-", dir=RAM_DISK)
    config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of tests/faults is part of a matrix unless it is marked `core`.

    The longest files come first, so that no worker starts one after the others have finished: the guide, the faults.
    """
    items.sort(key=lambda item: next((at for at, name in enumerate(LONGEST) if name in item.path.parts), len(LONGEST)))
    for item in items:
        if "faults" in item.path.parts and item.get_closest_marker("core") is None:
            item.add_marker(pytest.mark.matrix)


def pytest_collection_finish() -> None:
    """Freeze the imported objects: the garbage collector need not scan them at every collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def qdrant_url(tmp_path_factory) -> Iterator[str]:
    """A running Qdrant: QDRANT_TEST_URL, else one started from QDRANT_TEST_SERVER, else the stand-in.

    A real server writes to the disk: on a RAM disk its files have no holes, and its snapshots are five times as large.
    """
    if os.environ.get("QDRANT_TEST_URL"):
        yield os.environ["QDRANT_TEST_URL"]
        return
    binary = test_server()
    place = None if binary else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(prefix="qdrant-", dir=place, ignore_cleanup_errors=True) as name:
        folder = Path(name) / "data"  # its log lies next to it
        with RealQdrant(binary, folder) if binary else QdrantServer(folder, STAND_IN_VERSION) as server:
            yield server.url


@pytest.fixture
def own_qdrant(tmp_path) -> Iterator[RealQdrant | QdrantServer]:
    """A server of this test alone, to be killed: QDRANT_TEST_SERVER's, else the stand-in."""
    binary = test_server()
    folder = tmp_path / "own_qdrant"
    with RealQdrant(binary, folder) if binary else QdrantServer(folder, STAND_IN_VERSION) as server:
        yield server


@pytest.fixture(scope="session")
def session_servers(tmp_path_factory, qdrant_url) -> Iterator[Servers]:
    """FalkorDB as the Docker image starts it (but without the pause before replication), Qdrant, embeddings."""
    do_not_wait()
    folder: Path = tmp_path_factory.mktemp("servers")
    falkordb = FalkorServer(folder / "falkordb", sync_delay_seconds=0, telemetry=True)
    openai = OpenAIServer(log=folder / "openai.log")
    try:
        falkordb.start()
        openai.start()
        yield Servers(falkordb, qdrant_url, openai)
    finally:
        openai.stop()
        falkordb.stop()


@pytest.fixture
def operator(session_servers, tmp_path) -> Iterator[Operator]:
    """An operator with a separate graph, collection and backup folder; nothing is left behind."""
    someone = Operator(session_servers, tmp_path)
    session_servers.openai.clear_faults()
    yield someone
    someone.clean_up()
    session_servers.openai.clear_faults()


@pytest.fixture
def clean_endpoint(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's embeddings endpoint without faults and counts; the client's first pause is short."""
    monkeypatch.setattr("lib.clients.embeddings.client.FIRST_PAUSE_SECONDS", 0.02)
    server.clear_faults()
    server.reset()
