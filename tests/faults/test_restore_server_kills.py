"""A server killed under a restore: it starts again, and one complete state is live or reachable by the same command.

The script is held at a place, let go, and the server is killed (SIGKILL) so many seconds later; or it is killed while
the script is stopped. QDRANT_TEST_SERVER names a real Qdrant; KILLS_EACH adds moments.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.digest import graph_digest
from lib.clients.qdrant.collection import exists
from lib.clients.qdrant.points import delete_points, scroll
from lib.restore.collection import RestorePlan
from tests.kill_support import KILLS_EACH, standing, start_held
from tests.operator_support import Operator
from tests.restore_support import assert_tidy, neighbours, settings, spoil, wait_for
from tests.sandbox.falkordb_server import FalkorServer

pytestmark = [pytest.mark.qdrant, pytest.mark.timeout(900)]

# Seconds after the script was let go; None: while it is held there.
QDRANT = [
    ("called live collection deleted", None),
    ("entering copy uploaded", 0.05),
    ("entering copy recovered", 0.05),
    ("entering copy recovered", 0.3),
    ("called copy recovered", None),
]
FALKORDB = [
    ("entering graph renamed and restored", 0.002),
    ("called graph renamed and restored", None),
    ("entering graph accepted", 0.01),
]
MORE = [0.0, 0.02, 0.1, 0.2, 0.5, 1.0][: KILLS_EACH - 1]


def moments(places: list[tuple[str, float | None]]) -> list[tuple[str, float | None]]:
    entered = dict.fromkeys(place for place, seconds in places if seconds is not None)
    return places + [(place, seconds) for place in entered for seconds in MORE]


@pytest.fixture
def falkordb(tmp_path) -> Iterator[FalkorServer]:
    server = FalkorServer(tmp_path / "falkordb", sync_delay_seconds=0)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def ready(session_servers, own_qdrant, falkordb, tmp_path):
    """Stores of this test alone that differ from their backup; the state it holds, and the live one."""
    servers = replace(session_servers, falkordb=falkordb, qdrant_url=own_qdrant.url)
    operator = Operator(servers, tmp_path / "work")
    operator.folder.mkdir()
    operator.load()
    operator.run("backup_automem")
    files = [operator.archive(), operator.rdb()]
    wanted = operator.state(), settings(operator)
    spoil(operator)
    return operator, files, wanted, operator.state()


def run_under(operator: Operator, where: str, seconds: float | None, files: list[str], server) -> tuple[int, str]:
    """A restore whose server is killed and started again; its exit code and its output."""
    held = start_held(operator, where, "restore_from_backup", *files)
    assert wait_for(held.is_held_at), held.process.communicate()
    if seconds is not None:
        held.release()
        time.sleep(seconds)
    server.kill()
    if seconds is None:
        held.release()
    time.sleep(0.5)
    server.start()  # raises if it does not come up again
    _, err = held.process.communicate(timeout=400)
    assert "Traceback" not in err, err
    return held.process.returncode, err


def assert_one_is_whole(operator: Operator, wanted, old) -> None:
    with connect(operator.servers.falkordb.address) as conn:
        assert graph_digest(conn, operator.graph).digest in {old.graph, wanted.graph}
    name = operator.collection
    if not exists(operator.qdrant, name):
        name = next(one for one in operator.collections() if "__try_" in one)
    there = replace_collection(operator, name).state().collection
    assert there in {old.collection, wanted.collection}


def replace_collection(operator: Operator, name: str) -> Operator:
    return Operator(operator.servers, operator.folder, operator.graph, name)


@pytest.mark.parametrize(("where", "seconds"), moments(QDRANT))
def test_qdrant_killed(ready, own_qdrant, where, seconds):
    operator, files, (wanted, asset), old = ready
    code, err = run_under(operator, where, seconds, files, own_qdrant)
    assert_one_is_whole(operator, wanted, old)
    if code:
        assert "error:" in err
        operator.run("restore_from_backup", *files)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)
    own_qdrant.kill()
    own_qdrant.start()
    assert operator.state() == wanted


@pytest.mark.parametrize(("where", "seconds"), moments(FALKORDB))
def test_falkordb_killed(ready, falkordb, where, seconds):
    operator, files, (wanted, asset), old = ready
    with neighbours(operator) as others:
        untouched = others()
        code, _ = run_under(operator, where, seconds, files, falkordb)
        assert_one_is_whole(operator, wanted, old)
        if code:
            operator.run("restore_from_backup", *files)
        assert operator.state() == wanted
        assert settings(operator) == asset
        assert_tidy(operator)
        falkordb.kill()
        falkordb.start()
        assert operator.state() == wanted
        assert others() == untouched


@pytest.mark.parametrize(
    ("where", "reported"),
    [
        ("called graph accepted", ""),
        ("called graph swapped in", "It probably restarted with the data of its last save"),
        ("called old graph compared", "It probably restarted with the data of its last save"),
    ],
)
def test_falkordb_restarts_without_what_it_had_not_saved(session_servers, tmp_path, where, reported):
    """A server without an AOF comes back as of its last save: here with the graph of before the backup."""
    with FalkorServer(tmp_path / "falkordb", settings=("appendonly no", 'save ""'), sync_delay_seconds=0) as falkordb:
        operator = Operator(replace(session_servers, falkordb=falkordb), tmp_path / "work")
        operator.folder.mkdir()
        operator.load()
        with connect(falkordb.address) as conn:
            conn.execute_command("SAVE")
        operator.cypher("MATCH (m:Memory) WHERE id(m) = 3 SET m.content = 'newer than the last save'")
        operator.run("backup_automem", "--only", "falkordb")
        wanted, file = operator.state().graph, operator.rdb()
        operator.cypher("MATCH (m:Memory) WHERE id(m) % 3 = 0 DETACH DELETE m")
        held = start_held(operator, where, "restore_from_backup", file)
        standing(held)
        falkordb.kill()
        falkordb.start()
        held.release()
        _, err = held.process.communicate(timeout=400)
        assert (held.process.returncode, "Traceback" in err) == (1 if reported else 0, False), err
        assert reported in err
        if reported:
            assert operator.state().graph != wanted
            operator.run("restore_from_backup", file)
        assert operator.state().graph == wanted
        assert operator.graphs() == [operator.graph]
        operator.clean_up()


@pytest.mark.core
@pytest.mark.parametrize(
    ("method", "is_live"),
    [("upload", False), ("copies", False), ("fetch", True)],
    ids=["trial", "before the cutover", "live"],
)
def test_what_qdrant_lost_as_it_restarted_is_not_blamed_on_the_backup(ready, own_qdrant, monkeypatch, method, is_live):
    """Seen on 1.11.3: killed during a restore, it comes back with the collection, and without its points."""
    operator, files, (wanted, _), old = ready
    step = getattr(RestorePlan, method)

    def killed(plan: RestorePlan, *args: object) -> object:
        done = step(plan, *args)
        own_qdrant.kill()
        own_qdrant.start()
        name = operator.collection if is_live else plan.trial
        delete_points(operator.qdrant, name, [point.id for page in scroll(operator.qdrant, name) for point in page])
        return done

    with monkeypatch.context() as patched:
        patched.setattr(RestorePlan, method, killed)
        more = [] if is_live else ["--no-safety-backup"]  # it would be disturbed, too
        err = operator.run("restore_from_backup", files[0], *more, expect=1).err
    assert "restarted after a restore and lost what it had restored" in err
    assert "run the same command again" in err
    assert "use another backup" not in err
    assert operator.state() == old
    operator.run("restore_from_backup", files[0])
    assert operator.state().collection == wanted.collection
    assert_tidy(operator)


def test_qdrant_stays_down_and_the_next_command_finishes(ready, own_qdrant):
    """The machine is gone for longer than the script waits for an answer: the journal and the safety backup remain."""
    operator, files, (wanted, asset), old = ready
    held = start_held(operator, "entering copy recovered", "restore_from_backup", *files)
    assert wait_for(held.is_held_at)
    own_qdrant.kill()
    held.process.kill()
    held.process.communicate(timeout=60)
    err = operator.run("restore_from_backup", *files, expect=1).err
    assert "docker compose up -d falkordb qdrant" in err
    own_qdrant.start()
    assert_one_is_whole(operator, wanted, old)
    operator.run("restore_from_backup", *files)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)
    safety = Path(operator.manifests()[1])  # what the killed run saved before it deleted anything
    operator.run("restore_from_backup", str(safety))
    assert operator.state() == old
