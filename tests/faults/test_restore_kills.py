"""A restore killed at every journal transition and destructive call: the same command again ends in the backup's state.

`KILLS_EACH=5 make faults` kills so many times in each window, those that differ in the journal alone included.
"""

from __future__ import annotations

import random
import time

import pytest
import requests

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.digest import graph_digest
from lib.clients.qdrant.collection import exists
from lib.errors import MigrationError
from tests.faulty_proxy import Fault, FaultyProxy, answer
from tests.gate import LONGEST_SECONDS, CancelToken, Gate
from tests.kill_support import KILLS_EACH, kill, left_by_kill, run_killed, start_held
from tests.matrix import matrix
from tests.operator_support import ROOT, Operator
from tests.restore_support import (
    TIMEOUT,
    assert_tidy,
    delete_printed_snapshots,
    faults,
    settings,
    spoil,
    wait_for,
)
from tests.sandbox.state import state_of

pytestmark = pytest.mark.qdrant
pytest_plugins = ["tests.backup_fixtures"]

OFTEN = KILLS_EACH > 1
RANDOM = 6 * KILLS_EACH if OFTEN else 3
# Each leaves a different state, in the order in which a run reaches them.
WINDOWS = [
    "called graph accepted",
    "after rehearsing the collection",
    "called copy uploaded",
    "before backup begun",
    "before snapshot announced",
    "after snapshot announced",
    "before snapshot made",
    "before snapshot removed",
    "after snapshot removed",
    "before safety backup",
    "after deleting the live collection",
    "called live collection deleted",
    "called copy recovered",
    "before collection restored",
    "before switching the graph",
    "after switching the graph",
    "called graph swapped in",
    "after graph switched",
    "before closed",
]
# These differ from one of the above only in the journal.
ALMOST = [
    "after started",
    "before rehearsing the graph",
    "after rehearsing the graph",
    "before rehearsing the collection",
    "before collection rehearsed",
    "after collection rehearsed",
    "after backup begun",
    "after snapshot made",
    "after safety backup",
    "called own address found",
    "before deleting the live collection",
    "called aliases written",
    "after collection restored",
    "before graph switched",
    "called old graph dropped",
]


@pytest.fixture(scope="module")
def loaded(session_servers, tmp_path_factory):
    someone = Operator(session_servers, tmp_path_factory.mktemp("loaded"))
    someone.load()
    alias = {"create_alias": {"collection_name": someone.collection, "alias_name": f"a_{someone.collection}"}}
    requests.post(
        f"{session_servers.qdrant_url}/collections/aliases", json={"actions": [alias]}, timeout=TIMEOUT
    ).raise_for_status()
    someone.run("backup_automem")
    yield someone
    someone.clean_up()


@pytest.fixture
def ready(loaded):
    """Stores that differ from the backup; its files, the state it holds, and the live one."""
    files = [loaded.rdb_of_first, loaded.archive_of_first] if hasattr(loaded, "rdb_of_first") else None
    if files is None:
        loaded.rdb_of_first, loaded.archive_of_first = files = [loaded.rdb(), loaded.archive()]
        loaded.wanted = loaded.state(), settings(loaded)
    spoil(loaded)
    return loaded, files, loaded.wanted, loaded.state()


def points_of(operator: Operator, name: str) -> str:
    return state_of(operator.servers.falkordb.address, operator.graph, operator.qdrant, name).collection


def assert_one_is_whole(operator: Operator, wanted, old) -> None:
    """Each store holds the old state or the backup's; the collection may be absent if its trial restore is complete."""
    with connect(operator.servers.falkordb.address) as conn:
        assert graph_digest(conn, operator.graph).digest in {old.graph, wanted.graph}

    def one_is_whole() -> bool:
        name = operator.collection
        try:
            if not exists(operator.qdrant, name):
                name = next(one for one in operator.collections() if "__try_" in one)
            return points_of(operator, name) in {old.collection, wanted.collection}
        except MigrationError:
            return False  # the server still works on what the killed run asked for

    assert wait_for(one_is_whole, pause=0.1)


def resume(operator: Operator, files) -> None:
    """Restore again; delete what may be the killed run's snapshot by the printed command."""
    delete_printed_snapshots(operator.run("restore_from_backup", *files).err)


@pytest.mark.parametrize(
    "where", matrix((WINDOWS + ALMOST) * KILLS_EACH if OFTEN else WINDOWS, "called live collection deleted")
)
def test_killed_there_it_resumes(ready, where):
    operator, files, (wanted, asset), old = ready
    run_killed(operator, where, "restore_from_backup", *files)
    assert_one_is_whole(operator, wanted, old)
    resume(operator, files)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)


@pytest.fixture(scope="module")
def usual_seconds(loaded):
    """How long a restore takes here."""
    files = loaded.rdb(), loaded.archive()
    begun = time.monotonic()
    loaded.run("restore_from_backup", *files)
    return time.monotonic() - begun


@pytest.mark.parametrize("number", range(RANDOM))
def test_killed_at_a_random_moment_it_resumes(usual_seconds, ready, number, record_property):
    operator, files, (wanted, asset), old = ready
    chance = random.Random(number)
    for _ in range(20):  # a kill after the end does not count
        process = operator.start("restore_from_backup", *files)
        time.sleep(chance.uniform(0.05, 1.0) * usual_seconds)
        if kill(process):
            break
        spoil(operator)
        old = operator.state()
    else:
        pytest.fail("every run ended before its kill")
    assert_one_is_whole(operator, wanted, old)
    record_property("left", left_by_kill(operator))
    resume(operator, files)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)


def test_killed_twice_in_different_windows_it_still_resumes(ready):
    operator, files, (wanted, asset), _ = ready
    for where in (
        "called live collection deleted",
        "after snapshot made",
        "called graph swapped in",
    ):
        if where == "after snapshot made":
            requests.put(
                f"{operator.servers.qdrant_url}/collections/{operator.collection}",
                json={"vectors": {"size": 48, "distance": "Cosine"}},
                timeout=TIMEOUT,
            )  # AutoMem recreated it, empty
        run_killed(operator, where, "restore_from_backup", *files)
    operator.run("restore_from_backup", *files)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)


def test_another_restore_does_not_close_what_it_cannot_reach(ready):
    operator, files, (wanted, asset), _ = ready
    run_killed(operator, "called live collection deleted", "restore_from_backup", *files)
    operator.run("restore_from_backup", files[0])
    assert any("__try_" in name for name in operator.collections())
    operator.run("restore_from_backup", files[1])
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)


def test_what_stood_there_before_the_killed_run_is_named_by_the_rerun(ready):
    operator, files, _, old = ready
    run_killed(operator, "called graph swapped in", "restore_from_backup", *files)
    safety = operator.manifests()[-1]
    rerun = operator.run("restore_from_backup", *files)
    assert f"safety backup of an unfinished run, with the state before it: {safety}" in rerun.out
    operator.run("restore_from_backup", str(safety))
    assert operator.state() == old


IN_FLIGHT = {
    "upload": ("POST", r"upload\?.*checksum=(?!0000)"),
    "recover": ("PUT", r"/collections/c_\w{10}/snapshots/recover"),
    "delete": ("DELETE", r"/collections/c_\w{10}$"),
    "snapshot": ("POST", r"/snapshots\?"),
    "compare": ("POST", "__try_.*/points/scroll"),
}


@pytest.fixture
def gate(ready):
    """A proxy with a gate between the script and Qdrant."""
    operator, direct = ready[0], ready[0].environ["QDRANT_URL"]
    with Gate(direct) as found:
        operator.export(QDRANT_URL=found.url)
        yield found
        operator.export(QDRANT_URL=direct)


@pytest.mark.parametrize("late", [True, False], ids=["the server hears of it later", "the answer is lost"])
@pytest.mark.parametrize("request_", IN_FLIGHT)
def test_killed_while_a_request_is_in_flight(ready, gate, request_, late):
    operator, files, (wanted, asset), _ = ready
    stop = CancelToken(*IN_FLIGHT[request_], late=late, carried_out=not late)
    gate.stops.append(stop)
    process = operator.start("restore_from_backup", *files)
    assert stop.reached.wait(LONGEST_SECONDS), process.communicate()
    assert kill(process)
    gate.open()
    assert not late or stop.ended.wait(LONGEST_SECONDS)
    resume(operator, files)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)


def resume_as_printed(ready, through: dict[str, str]) -> None:
    """A restore that fails after its collection was restored, and again, by the command that the error names."""
    operator, files, (wanted, asset), _ = ready
    failed = operator.run("restore_from_backup", *files, expect=1, env=through)
    assert "the collection is restored already" in failed.err
    assert " ".join(files) in failed.err.split("to resume:")[1].split("or undo it:")[0]
    operator.run("restore_from_backup", *files, env=through)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)


def test_a_lost_answer_to_the_graphs_cutover_is_resumed_by_the_printed_command(ready):
    lost = Fault(rb"EXEC\r\n", skip=1, cut=0)  # the first one only tests what this user may do
    with FaultyProxy(ready[0].servers.falkordb.port, lost) as proxy:
        resume_as_printed(ready, {"FALKORDB_PORT": str(proxy.port)})


def test_a_refused_delete_of_the_trial_restore_is_resumed_by_the_printed_command(ready):
    direct = ready[0].environ["QDRANT_URL"]
    refusal = Fault(rb"DELETE /collections/[^/ ]+__try_[^/ ]+ HTTP", answer=answer(500, "the disk failed"))
    with FaultyProxy(int(direct.rpartition(":")[2]), refusal) as proxy:
        resume_as_printed(ready, {"QDRANT_URL": f"http://127.0.0.1:{proxy.port}"})
    assert refusal.hits == 1


@pytest.mark.core
def test_a_refused_recover_puts_the_old_collection_back(ready, stand_in):
    operator, files, (wanted, asset), old = ready
    faults(operator, {**REFUSED_RECOVER, "path": f"{operator.collection}/snapshots/recover"})
    failed = operator.run("restore_from_backup", *files, expect=1)
    assert "disk on fire" in failed.err
    assert "the old one was restored from the safety backup" in failed.err
    assert operator.state() == old
    assert settings(operator) == asset
    assert_tidy(operator)
    operator.run("restore_from_backup", *files)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)


@pytest.mark.core
def test_an_error_after_the_new_collection_is_in_place_does_not_deny_it(ready, stand_in):
    operator, files, (wanted, _), _ = ready
    path = f"/{operator.collection}/snapshots/.*-again"
    faults(operator, {**REFUSED_RECOVER, "method": "DELETE", "path": path})
    failed = operator.run("restore_from_backup", *files, expect=1)
    assert f"'{operator.collection}' exists, but was not compared with it" in failed.err
    assert "either" not in failed.err
    operator.run("restore_from_backup", *files)
    assert operator.state() == wanted
    assert_tidy(operator)


REFUSED_RECOVER = {
    "method": "PUT",
    "status": 500,
    "times": 1,
    "body": {"status": {"error": "disk on fire"}},
}


@pytest.mark.parametrize("how", ["no safety backup", "the upload fails too"])
def test_a_permanently_refused_recover_prints_the_commands(ready, stand_in, how):
    operator, files, (wanted, asset), old = ready
    words = [*files, *(["--no-safety-backup"] if how == "no safety backup" else [])]
    upload = {"method": "POST", "status": 500, "body": {"status": {"error": "no space either"}}}
    faults(
        operator,
        {**REFUSED_RECOVER, "path": f"{operator.collection}/snapshots/recover"},
        {**upload, "path": rf"{operator.collection}/snapshots/upload\?.*checksum=(?!0000)"},
    )
    failed = operator.run("restore_from_backup", *words, expect=1)
    faults(operator)
    assert "disk on fire" in failed.err
    assert ("no space either" in failed.err) == (how != "no safety backup")
    step = failed.err.split("next:")[1]
    assert f"{ROOT}/scripts/restore_from_backup.py {' '.join(words)}\n" in step
    if how != "no safety backup":
        assert f"{ROOT}/scripts/restore_from_backup.py {operator.manifests()[-1]}" in step
    assert not exists(operator.qdrant, operator.collection)
    temporary = next(one for one in operator.collections() if "__try_" in one)
    assert points_of(operator, temporary) == wanted.collection
    with connect(operator.servers.falkordb.address) as conn:
        assert graph_digest(conn, operator.graph).digest == old.graph
    operator.run("restore_from_backup", *words)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)


@pytest.mark.parametrize("which", ["trial restore", "last"])
def test_a_refused_upload_leaves_the_old_state_or_reports_how_to_resume(ready, stand_in, which):
    operator, files, (wanted, asset), old = ready
    upload = {"method": "POST", "status": 500, "times": 1, "body": {"status": {"error": "no space"}}}
    if which == "trial restore":
        faults(operator, {**upload, "path": r"__try_.*upload\?.*checksum=(?!0000)"})
        failed = operator.run("restore_from_backup", *files, expect=1)
        assert operator.state() == old
        assert_tidy(operator)
    else:  # the server cannot fetch from itself, and the second upload fails
        faults(
            operator,
            {"method": "PUT", "path": "snapshots/recover", "status": 403, "body": "Forbidden"},
            {**upload, "path": rf"{operator.collection}/.*upload\?.*checksum=(?!0000)"},
        )
        failed = operator.run("restore_from_backup", *files, expect=None)
        assert failed.code in {1, 2}, failed.err
    assert "no space" in failed.err or "Forbidden" in failed.err
    faults(operator)
    operator.run("restore_from_backup", *files)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)


def test_a_server_that_cannot_fetch_from_itself_gets_a_second_upload(ready, stand_in):
    operator, files, (wanted, asset), _ = ready
    refused = {"status": {"error": "Wrong input: Failed to download snapshot: connection refused"}}
    faults(operator, {"method": "PUT", "path": "snapshots/recover", "status": 400, "body": refused})
    operator.run("restore_from_backup", *files)
    faults(operator)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)


@pytest.mark.parametrize("number", [15, 2])
def test_a_signal_leaves_the_old_state_or_prints_how_to_resume(ready, number):
    operator, files, (wanted, asset), _ = ready
    for phase in ("snapshot announced", "deleting the live collection"):
        held = start_held(operator, f"after {phase}", "restore_from_backup", *files)
        assert wait_for(held.is_held_at), held.process.communicate()
        held.process.send_signal(number)
        _, err = held.process.communicate(timeout=300)
        assert held.process.returncode == 130, err
        assert "the same command again" in err
        assert "Traceback" not in err
    operator.run("restore_from_backup", *files)
    assert operator.state() == wanted
    assert settings(operator) == asset
    assert_tidy(operator)
