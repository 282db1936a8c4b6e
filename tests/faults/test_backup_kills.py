"""The backup killed (SIGKILL) in every window and at random moments, while others write to both stores.

At any moment: every file under its final name verifies, the next run works and cleans up, nothing stays on the server,
no scratch server or folder is left.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from lib.backup.catalog import backup_sets
from lib.backup.check import verify_named
from lib.clients.falkordb.scratch import installed_engines
from lib.journal import open_journals
from tests.backup_support import (
    age_journals,
    assert_final_files_verify,
    assert_no_scratch,
    assert_one_set,
    assert_sets,
    awaited,
    delete_server_file,
    files,
    server_files,
    writers,
)
from tests.gate import CancelToken, Gate
from tests.kill_support import KILLS_EACH, kill, run_killed
from tests.matrix import matrix
from tests.operator_support import Operator
from tests.restore_support import delete_printed_snapshots, journal_of, phases, wait_for

pytestmark = pytest.mark.qdrant
pytest_plugins = ["tests.backup_fixtures"]

WINDOWS = [
    "called scratch server started",  # an engine is tried, before anything else
    "after backup begun",
    "called RDB streamed",
    "called scratch graph counted",  # of the graph in the scratch server
    "called graph taken",
    "after snapshot announced",
    "before snapshot made",
    "after snapshot made",
    "called snapshot downloaded",
    "before snapshot removed",
    "after snapshot removed",
    "entering segments opened",
    "called collection taken",
    "called drift counted",
    "called manifest written",
]
# These differ from one of the above only in the journal.
ALMOST = [
    "after started",
    "before backup begun",
    "called RDB file written",
    "entering scratch server loading",
    "before snapshot announced",
    "entering snapshot deleted",
    "before closed",
]
NEVER_SENT = {"after snapshot announced"}
UNNAMED = {"before snapshot made"}  # the server made one, the journal does not name it
# Reached by the graph's thread. The state of the collection's thread depends on the moment.
DURING_GRAPH_BACKUP = {
    "called RDB streamed",
    "called RDB file written",
    "called scratch graph counted",
    "called graph taken",
}
DONE = {"called manifest written", "before closed"}
OFTEN = KILLS_EACH > 1
RANDOM = 6 * KILLS_EACH if OFTEN else 3


@pytest.fixture
def busy(backing):
    """Both stores, being written to."""
    with writers(backing, 2, pause=0.05):
        yield backing


def assert_recovered(
    operator: Operator, *, done: bool, awaiting: bool | None = False, unnamed: bool | None = False
) -> None:
    """After a kill: what exists verifies, the next run works, and nothing of the killed one is left anywhere.

    `awaiting`: a snapshot that was never asked for may still come. `unnamed`: the next run prints the command that
    deletes the killed one's snapshot. None: that depends on the moment.
    """
    assert_final_files_verify(operator)
    assert [one.stem[7:] for one in operator.manifests()] == [one.stamp for one in backup_sets(operator.backups)]
    printed = delete_printed_snapshots(operator.run("backup_automem").err)
    assert unnamed is None or len(printed) == unnamed
    assert_final_files_verify(operator)
    assert not [one for one in verify_named(operator.backups, "all", installed_engines({})) if one.fault]
    assert_sets(operator, 1 + done)
    left = awaited(operator)
    assert awaiting is None or len(left) == awaiting
    assert_no_scratch(operator)


def left_by_kill(operator: Operator) -> str:
    """Record what a kill left behind, for the report (--junitxml)."""
    journal = journal_of(operator, "backup")
    kinds = ["partial" if name.endswith(".partial") else Path(name).suffix[1:] for name in files(operator)]
    at = (phases(journal) or ["no journal"])[-1]
    return f"{at}; files: {' '.join(sorted(kinds)) or 'none'}; on the server: {len(server_files(operator))}"


@pytest.mark.parametrize("where", matrix((WINDOWS + ALMOST) * KILLS_EACH if OFTEN else WINDOWS, "after snapshot made"))
def test_killed_there_the_next_run_cleans_up_and_works(busy, where, record_property):
    run_killed(busy, where, "backup_automem")
    record_property("left", left_by_kill(busy))
    done = where in DONE
    assert len(busy.manifests()) == int(done)  # a set is complete, or no trusted set exists
    known = {"awaiting": where in NEVER_SENT, "unnamed": where in UNNAMED}
    assert_recovered(busy, done=done, **(dict.fromkeys(known) if where in DURING_GRAPH_BACKUP else known))


@pytest.fixture(scope="module")
def usual_seconds(loaded, tmp_path_factory):
    """How long a backup takes here."""
    someone = Operator(loaded.servers, tmp_path_factory.mktemp("usual"), loaded.graph, loaded.collection)
    begun = time.monotonic()
    someone.run("backup_automem")
    return time.monotonic() - begun


@pytest.mark.parametrize("number", range(RANDOM))
def test_killed_at_a_random_moment_the_next_run_cleans_up_and_works(busy, usual_seconds, number, record_property):
    chance = random.Random(number)
    for _ in range(20):  # a kill after the end does not count
        for old in busy.backups.rglob("*") if busy.backups.exists() else ():
            if old.is_file():
                old.unlink()
        process = busy.start("backup_automem")
        time.sleep(chance.uniform(0.05, 1.1) * usual_seconds)
        if kill(process):
            break
    else:
        pytest.fail("every run ended before its kill")
    record_property("left", left_by_kill(busy))
    assert_recovered(busy, done=bool(busy.manifests()), awaiting=None, unnamed=None)


SLOW_ANSWER = "POST", r"/snapshots\?"


def killed_at(operator: Operator, gate: Gate, stop: CancelToken) -> CancelToken:
    """A backup that is killed while a request is held at the gate."""
    gate.stops.append(stop)
    process = operator.start("backup_automem")
    assert wait_for(stop.reached.is_set)
    assert kill(process)
    return stop


@pytest.fixture
def gated(backing):
    with Gate(backing.servers.qdrant_url) as gate:
        backing.export(QDRANT_URL=gate.url)
        yield gate


def test_killed_while_the_server_makes_the_snapshot(backing, gated):
    """The server made the snapshot, and the client never received its name."""
    killed_at(backing, gated, CancelToken(*SLOW_ANSWER, carried_out=True))
    gated.open()
    (name,) = server_files(backing)
    assert delete_printed_snapshots(backing.run("backup_automem").err) == [name]
    assert_one_set(backing)


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_a_snapshot_that_appears_only_after_further_runs_is_named_all_the_same(backing, gated, runs):
    stop = killed_at(backing, gated, CancelToken(*SLOW_ANSWER, late=True))
    for _ in range(runs):
        backing.run("backup_automem")
        assert len(awaited(backing)) == 1
    stop.let_go.set()
    assert stop.ended.wait(300)
    (name,) = server_files(backing)
    output = backing.run("backup_automem").err
    assert ("if it still appears there, the next backup prints the command" in output) == (runs > 0)
    assert server_files(backing) == [name]
    assert delete_printed_snapshots(output) == [name]
    assert_sets(backing, runs + 1)
    assert open_journals(backing.backups) == []


def test_two_killed_runs_have_two_snapshots_named(backing, gated):
    stops = [killed_at(backing, gated, CancelToken(*SLOW_ANSWER, late=True)) for _ in range(2)]
    for stop in stops:
        stop.let_go.set()
        assert stop.ended.wait(300)
        time.sleep(1.1)  # two snapshots in one second are one file: the server names them by the second
    names = server_files(backing)
    assert len(names) == 2
    assert delete_printed_snapshots(backing.run("backup_automem").err) == names
    assert_one_set(backing)


def test_a_snapshot_that_never_comes_is_not_awaited_for_ever(backing):
    """The run was killed right before its request. That cannot be known, so one line reports it for an hour."""
    run_killed(backing, "after snapshot announced", "backup_automem")
    backing.run("backup_automem")
    (journal,) = awaited(backing)
    err = backing.run("backup_automem", "--list").err
    asked = f"a killed run ({journal.run_id}) had asked Qdrant for a snapshot of '{backing.collection}'"
    assert err == f"{asked}: if it still appears there, the next backup prints the command that deletes it\n"
    age_journals(backing, hours=2)
    backing.run("backup_automem")
    assert_sets(backing, 2)
    assert open_journals(backing.backups) == []


def test_an_operators_own_snapshot_stays(backing):
    """A snapshot made right after the kill, like ours: the names do not show the owner, so none is deleted."""
    run_killed(backing, "before snapshot made", "backup_automem")
    (ours,) = server_files(backing)
    time.sleep(1.1)  # as above
    theirs = backing.call("POST", "/snapshots")["name"]
    output = backing.run("backup_automem").err
    assert server_files(backing) == [ours, theirs]
    assert "Delete it, unless somebody else made it" in output
    assert delete_printed_snapshots(output) == [ours, theirs]
    assert server_files(backing) == []
    assert open_journals(backing.backups) == []
    assert "unless somebody else made it" not in backing.run("backup_automem").err


def test_an_operators_older_snapshot_stays(backing):
    """A snapshot from before the killed run, or from long after it, is not reported."""
    before = backing.call("POST", "/snapshots")["name"]
    run_killed(backing, "before snapshot made", "backup_automem")
    for journal in open_journals(backing.backups):  # the server made ours two minutes ago
        text = journal.path.read_text()
        asked = next(one for one in journal.entries if "server_time" in one)["server_time"]
        journal.path.write_text(text.replace(asked, "2024-05-01T00:00:00+00:00"))
    assert delete_printed_snapshots(backing.run("backup_automem").err) == []
    (later,) = set(server_files(backing)) - {before}
    for name in (before, later):
        delete_server_file(backing, name)


def test_killed_during_the_download(backing, gated):
    killed_at(backing, gated, CancelToken("GET", r"/snapshots/.+\.snapshot", carried_out=True))
    gated.open()
    assert any(name.endswith(".partial") for name in files(backing))
    assert "snapshot made" in phases(journal_of(backing, "backup"))
    backing.run("backup_automem")
    assert_one_set(backing)


def test_files_of_others_stay(backing):
    run_killed(backing, "before snapshot made", "backup_automem")
    theirs = [
        "falkordb/mine.rdb.partial",
        "falkordb/memories_20200101_000000.rdb",
        "qdrant/other.tar.gz.partial",
    ]
    for name in theirs:
        (backing.backups / name).write_text("of another run")
    backing.run("backup_automem")
    assert set(theirs) <= set(files(backing))
    assert len(json.loads(backing.run("backup_automem", "--list", "--json").out)["sets"]) == 1
