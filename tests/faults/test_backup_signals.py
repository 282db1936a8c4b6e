"""The backup ended by a signal, in any phase: one Ctrl-C, two, or a closed terminal. Nothing is left incomplete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios

import pytest

from lib.backup.phases import ANNOUNCED
from lib.journal import open_journals
from tests.backup_support import (
    assert_final_files_verify,
    assert_no_scratch,
    assert_one_set,
    assert_sets,
    awaited,
    delete_server_file,
    files,
    server_files,
)
from tests.gate import CancelToken, Gate
from tests.kill_support import standing, start_held
from tests.matrix import matrix
from tests.operator_support import ROOT, Operator
from tests.restore_support import delete_printed_snapshots, wait_for
from tests.script_process import ScriptProcess

pytestmark = pytest.mark.qdrant
pytest_plugins = ["tests.backup_fixtures"]

PLACES = {
    "an engine is tried": "called scratch server started",
    "begun": "after backup begun",
    "the RDB is there": "called RDB streamed",
    "the scratch server loads": "entering scratch server loading",
    "the scratch server is asked": "entering scratch graph counted",
    "snapshot made": "before snapshot made",
    "snapshot noted": "after snapshot made",
    "downloaded": "called snapshot downloaded",
    "snapshot removed": "after snapshot removed",
    "segments are opened": "entering segments opened",
    "drift is counted": "entering drift counted",
    "before the manifest": "entering manifest written",
    "the snapshot goes": "entering snapshot deleted",
}


# Of the graph's thread. The collection's thread may have announced a snapshot by then, and not requested it.
DURING_GRAPH_BACKUP = {"the RDB is there", "the scratch server loads", "the scratch server is asked"}


def assert_undone(operator: Operator, process: ScriptProcess, *, may_await: bool = False) -> str:
    """Exit code 130, no file, snapshot, scratch or open journal left, and the next run works. Returns the output.

    `may_await`: a snapshot may have been announced, and requested without an answer yet: the next run names it.
    """
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "run the same command again" in err
    assert files(operator) == []
    assert_no_scratch(operator)
    left = open_journals(operator.backups) if operator.backups.exists() else []
    assert [one.phase for one in left] in ([[], [ANNOUNCED]] if may_await else [[]])
    assert len(server_files(operator)) <= len(left)
    delete_printed_snapshots(operator.run("backup_automem").err)
    assert server_files(operator) == []
    assert_sets(operator) if left else assert_one_set(operator)
    return err


@pytest.mark.parametrize("place", matrix(PLACES, "snapshot noted"))
def test_a_signal_leaves_nothing_incomplete(backing, place):
    number = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP][list(PLACES).index(place) % 3]
    held = start_held(backing, PLACES[place], "backup_automem")
    standing(held).send_signal(number)
    held.release()
    assert_undone(backing, held.process, may_await=place in DURING_GRAPH_BACKUP)


def ended_at(operator: Operator, place: str) -> None:
    held = start_held(operator, place, "backup_automem")
    standing(held).send_signal(signal.SIGTERM)
    held.release()
    held.process.communicate(timeout=300)
    assert held.process.returncode == 130


def test_a_signal_right_after_the_manifest_leaves_the_whole_set(backing):
    ended_at(backing, "called manifest written")
    assert_one_set(backing)
    assert_final_files_verify(backing)


def test_a_signal_before_the_snapshot_was_asked_for(backing):
    """Whether the server got the request cannot be known: every command reports that a snapshot may appear."""
    ended_at(backing, "after snapshot announced")
    assert files(backing) == []
    backing.run("backup_automem")
    assert_sets(backing)
    assert len(awaited(backing)) == 1


@pytest.mark.core
def test_a_signal_while_the_server_makes_the_snapshot(backing):
    """The snapshot's name never reaches the journal: the next run prints the command that deletes it."""
    with Gate(backing.servers.qdrant_url) as gate:
        backing.export(QDRANT_URL=gate.url)
        stop = CancelToken("POST", r"/snapshots\?", late=True)
        gate.stops.append(stop)
        process = backing.start("backup_automem")
        assert wait_for(stop.reached.is_set)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        stop.let_go.set()
        assert stop.ended.wait(300)
        assert files(backing) == []
        assert [one.phase for one in open_journals(backing.backups)] == [ANNOUNCED]
        names = server_files(backing)
        assert len(names) == 1
        assert delete_printed_snapshots(backing.run("backup_automem").err) == names
        assert_one_set(backing)


@pytest.mark.parametrize("clean_up", ["entering snapshot deleted", "entering unfinished files removed"])
def test_a_second_ctrl_c_lets_it_clean_up(backing, clean_up):
    held = start_held(backing, f"called snapshot downloaded; {clean_up}", "backup_automem")
    standing(held).send_signal(signal.SIGINT)
    held.release()
    standing(held, 1).send_signal(signal.SIGINT)
    held.release(1)
    assert "cleaning up" in assert_undone(backing, held.process)


@pytest.mark.parametrize("clean_up", ["entering snapshot deleted", "entering unfinished files removed"])
def test_a_third_ctrl_c_ends_it_and_the_next_run_cleans_up(backing, clean_up):
    held = start_held(backing, f"called snapshot downloaded; {clean_up}", "backup_automem")
    standing(held).send_signal(signal.SIGINT)
    held.release()
    process = standing(held, 1)
    process.send_signal(signal.SIGINT)
    while "cleaning up" not in process.stderr.readline():  # two signals of one number may arrive as one
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    held.release(1)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    backing.run("backup_automem")
    assert_one_set(backing)
    assert_no_scratch(backing)


def test_a_terminal_that_closes_leaves_nothing_incomplete(backing):
    """The kernel sends SIGHUP to the terminal's foreground, and every further write to the terminal fails."""
    master, slave = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with Gate(backing.servers.qdrant_url) as gate:
        backing.export(QDRANT_URL=gate.url)
        stop = CancelToken("GET", r"/snapshots/.+\.snapshot")
        gate.stops.append(stop)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "backup_automem.py")],
            cwd=backing.folder,
            env={**backing.environ, "TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=take_terminal,  # noqa: PLW1509 - the gate's threads hold nothing that it needs
        )
        os.close(slave)
        os.set_blocking(master, False)

        def reached() -> bool:
            with contextlib.suppress(BlockingIOError):  # a full pipe would block the process
                os.read(master, 65536)
            return stop.reached.is_set() or process.poll() is not None

        assert wait_for(reached)
        os.close(master)
        gate.open()
        process.wait(300)
    backing.export(QDRANT_URL=backing.servers.qdrant_url)
    assert process.returncode != 0
    assert files(backing) == []
    assert server_files(backing) == []
    assert open_journals(backing.backups) == []
    assert_no_scratch(backing)
    backing.run("backup_automem")
    assert_one_set(backing)


def test_nohup_continues_without_its_terminal(backing):
    held = start_held(backing, "after backup begun", "backup_automem", nohup=True)
    standing(held).send_signal(signal.SIGHUP)
    held.release()
    _, err = held.process.communicate(timeout=300)
    assert held.process.returncode == 0, err
    assert_one_set(backing)


@pytest.fixture(autouse=True)
def no_foreign_snapshot(backing):
    yield
    for name in server_files(backing):
        delete_server_file(backing, name)
