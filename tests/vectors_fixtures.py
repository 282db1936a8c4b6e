"""Fixtures of the tests of lib/clients/qdrant, loaded by `pytest_plugins`."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from lib.clients.qdrant import collection, snapshots
from lib.clients.qdrant.transport import Qdrant
from tests.matrix import matrix
from tests.vectors_support import STAND_INS, create_small, fill, own_server

REAL_URL = os.environ.get("QDRANT_TEST_URL", "")


@pytest.fixture(scope="session", params=["real"] if REAL_URL else matrix(STAND_INS, STAND_INS[-1]))
def q(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qdrant]:
    if request.param == "real":
        yield Qdrant(REAL_URL)
        return
    with own_server(request.param, tmp_path_factory.mktemp("qdrant")) as own:
        yield own


@pytest.fixture
def names(q: Qdrant) -> Iterator[list[str]]:
    """Three unused names; collections of these names are deleted in the end, their snapshot files first."""
    own = [f"test_{uuid.uuid4().hex[:12]}" for _ in range(3)]
    yield own
    for name in own:
        if collection.exists(q, name):
            for snapshot in snapshots.list_snapshots(q, name):
                snapshots.delete(q, name, snapshot.name)
            collection.delete_collection(q, name)


@pytest.fixture
def filled(q: Qdrant, names: list[str]) -> str:
    """A collection as AutoMem's, of 50 points of 8 dimensions."""
    create_small(q, names[0], 8)
    fill(q, names[0], 50, 8)
    return names[0]
