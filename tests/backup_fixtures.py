"""Fixtures of the tests of failing backups, loaded by `pytest_plugins`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest
import requests

from tests.operator_support import Operator, Servers
from tests.restore_support import TIMEOUT


@pytest.fixture(scope="module")
def loaded(session_servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    someone = Operator(session_servers, tmp_path_factory.mktemp("loaded"))
    someone.load()
    yield someone
    someone.clean_up()


@pytest.fixture
def backing(loaded: Operator, tmp_path) -> Iterator[Operator]:
    """The loaded stores, with a backup folder and a folder for temporary files of this test alone.

    The latter has a short name: a socket in it must not be longer than about 100 characters.
    """
    place = tempfile.mkdtemp(prefix="bk-", dir="/tmp")
    someone = Operator(loaded.servers, tmp_path, loaded.graph, loaded.collection)
    someone.export(TMPDIR=place)
    yield someone
    shutil.rmtree(place)


@pytest.fixture
def stand_in(qdrant_url: str) -> Iterator[None]:
    """Fault rules exist only in the stand-in."""
    if requests.delete(f"{qdrant_url}/_sandbox/faults", timeout=TIMEOUT).status_code == 404:
        pytest.skip("a real server takes no fault rules")
    yield
    requests.delete(f"{qdrant_url}/_sandbox/faults", timeout=TIMEOUT)
