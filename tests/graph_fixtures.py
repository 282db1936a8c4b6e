"""A pytest plugin: real FalkorDB servers of every engine of this machine (pytest_plugins = ["tests.graph_fixtures"]).

If there are two engines, `make test` takes the newer one: the older one is the only one of another Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.scratch import Engine, installed_engines
from tests.matrix import matrix
from tests.sandbox.falkordb_server import FalkorServer

ENGINES = installed_engines({})


@pytest.fixture(params=matrix(ENGINES, *ENGINES[-1:]), ids=[engine.falkordb_version for engine in ENGINES])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


@pytest.fixture
def server(engine: Engine, tmp_path: Path) -> Iterator[FalkorServer]:
    """A server as AutoMem starts it, but quick to answer PSYNC."""
    falkor = FalkorServer(tmp_path / "server", engine=engine, sync_delay_seconds=0).start()
    yield falkor
    falkor.kill()


@pytest.fixture
def target(engine: Engine, tmp_path: Path) -> Iterator[FalkorServer]:
    falkor = FalkorServer(tmp_path / "target", engine=engine, sync_delay_seconds=0).start()
    yield falkor
    falkor.kill()


@pytest.fixture
def conn(server: FalkorServer) -> Iterator[redis.Redis]:
    with connect(server.address) as connection:
        yield connection


@pytest.fixture
def target_conn(target: FalkorServer) -> Iterator[redis.Redis]:
    with connect(target.address) as connection:
        yield connection
