"""A backup that is cut off, refused or out of room: no incomplete set is ever trusted, nothing stays on the server."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lib.backup.phases import own_snapshot, removed
from lib.journal import open_journals, start_journal
from tests.backup_support import assert_one_set, delete_server_file, files, server_files
from tests.gate import CancelToken, Gate
from tests.kill_support import start_held
from tests.operator_support import ROOT, Operator
from tests.restore_support import faults, wait_for
from tests.small_disk import fill, small_disk

pytestmark = pytest.mark.qdrant
pytest_plugins = ["tests.backup_fixtures"]


def test_two_targets_write_into_one_folder_at_once(session_servers, tmp_path):
    """One checkout backs up two AutoMems: neither run uses the other's stamp or removes its files."""
    both = [Operator(session_servers, tmp_path) for _ in range(2)]
    try:
        for one in both:
            one.load(60)
        for _ in range(2):
            runs = [one.start("backup_automem") for one in both]
            for run in runs:
                _, err = run.communicate(timeout=300)
                assert run.returncode == 0, err
        manifests = [json.loads(path.read_text()) for path in both[0].manifests()]
        assert len(manifests) == 4
        assert sorted(one["graph"]["graph"] for one in manifests) == sorted([both[0].graph, both[1].graph] * 2)
        both[0].run("backup_automem", "--check", "all")
    finally:
        for one in both:
            one.clean_up()


@pytest.mark.core
def test_a_cut_download_is_resumed(backing, stand_in):
    faults(backing, {"method": "GET", "path": r"/snapshots/.+\.snapshot", "cut_after_bytes": 300_000, "times": 3})
    manifest = backing.run("backup_automem", "--json").json
    assert manifest["collection"]["proof"] in {"checked", "restored"}
    assert_one_set(backing)


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "POST", "path": r"/snapshots\?", "status": 500},
        {"method": "GET", "path": r"/snapshots/.+\.snapshot", "status": 500},
        {"method": "POST", "path": "/points/scroll", "status": 500},
        {"method": "GET", "path": r"/collections/\w+$", "status": 500},
        {"method": "GET", "path": r"/snapshots/.+\.snapshot", "status": 404},
    ],
    ids=lambda rule: f"{rule['path']} {rule['status']}",
)
def test_a_server_error_ends_it_with_nothing_left(backing, stand_in, rule):
    faults(backing, {**rule, "body": {"status": {"error": "the disk of the server is on fire"}}})
    failed = backing.run("backup_automem", expect=1)
    faults(backing)
    assert "on fire" in failed.err or rule["status"] == 404
    assert files(backing) == []
    assert server_files(backing) == []
    assert open_journals(backing.backups) == []
    backing.run("backup_automem")
    assert_one_set(backing)


def test_a_lost_answer_to_the_snapshot_is_none(backing):
    """The answer to the snapshot request is lost: the list shows the snapshot, and it is used."""
    theirs = backing.call("POST", "/snapshots")["name"]
    with Gate(backing.servers.qdrant_url) as gate:
        stop = CancelToken("POST", r"/snapshots\?", carried_out=True)
        gate.stops.append(stop)
        backing.export(QDRANT_URL=gate.url)
        process = backing.start("backup_automem")
        assert wait_for(stop.reached.is_set)
        gate.open()  # the connection breaks without an answer
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert server_files(backing) == [theirs]
    delete_server_file(backing, theirs)
    assert_one_set(backing)


@pytest.mark.parametrize("only", ["falkordb", "qdrant"])
def test_a_file_size_limit_ends_it_with_nothing_left(backing, only):
    limit = 12_000  # bytes: more than the ids take, less than either file
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "backup_automem.py"), "--only", only],
        cwd=backing.folder,
        env=backing.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr
    assert "no room left" in done.stderr
    assert "Traceback" not in done.stderr
    assert files(backing) == []
    assert server_files(backing) == []
    assert open_journals(backing.backups) == []


@pytest.fixture
def small(tmp_path):
    with small_disk(tmp_path / "small", "96m") as folder:
        yield folder


def test_a_full_disk_is_reported_before_and_while_writing(backing, small):
    backing.export(AUTOMEM_BACKUP_DIR=small / "backups")
    filler = small / "filler"
    filler.write_bytes(bytes(60 << 20))
    early = backing.run("backup_automem", expect=1)
    assert "MiB free" in early.err
    filler.write_bytes(bytes(20 << 20))
    held = start_held(backing, "after backup begun", "backup_automem")
    assert wait_for(lambda: held.is_held_at() or held.process.poll() is not None)
    fill(small / "more")
    held.release()
    _, err = held.process.communicate(timeout=300)
    (small / "more").unlink()
    assert held.process.returncode == 1, err
    assert "no room left" in err
    left = [path for path in small.glob("backups/**/*") if path.is_file() and path.suffix != ".jsonl"]
    assert left == []
    assert server_files(backing) == []
    filler.unlink()
    backing.run("backup_automem")


def test_a_disk_without_room_for_the_journal_is_reported(backing, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "backup_automem.py")],
        cwd=backing.folder,
        env=backing.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_an_unfinished_backup_of_another_target_is_left_alone(backing):
    journal = start_journal(_made(backing), "backup", ["falkordb elsewhere", "qdrant elsewhere"])
    journal.append("backup begun", stamp="20200101_000000")
    theirs = backing.backups / "falkordb" / "memories_20200101_000000.rdb.partial"
    theirs.parent.mkdir()
    theirs.write_text("being written")
    backing.run("backup_automem")
    assert theirs.exists()
    assert [one.path for one in open_journals(backing.backups)] == [journal.path]


def _made(operator: Operator) -> Path:
    operator.backups.mkdir()
    return operator.backups


def test_a_run_that_makes_two_snapshots_leaves_neither(backing):
    journal = start_journal(_made(backing), "backup", ["one run"])
    for _ in range(2):
        with own_snapshot(backing.qdrant, backing.collection, journal) as made:
            assert made.name in server_files(backing)
            assert not removed(journal)
        assert removed(journal)
        assert server_files(backing) == []


def test_a_snapshot_made_in_the_same_second_stays(backing):
    """A server names snapshots by the second: one that the operator made a moment before would be replaced by ours."""
    journal = start_journal(_made(backing), "backup", ["one run"])
    theirs = backing.call("POST", "/snapshots")["name"]
    with own_snapshot(backing.qdrant, backing.collection, journal) as made:
        assert made.name != theirs
    assert server_files(backing) == [theirs]
    delete_server_file(backing, theirs)


@pytest.mark.core
@pytest.mark.parametrize("times", [1, 2])
def test_the_snapshot_of_a_safety_backup_does_not_stay_on_the_server(operator, stand_in, times):
    """A restore asks the server again at its end; if it refuses again, the next command does."""
    operator.load(60)
    operator.run("backup_automem", "--only", "qdrant")
    name = operator.collection
    refused = {"method": "DELETE", "path": rf"/collections/{name}/snapshots/{name}-", "status": 429, "times": times}
    faults(operator, refused)
    operator.run("restore_from_backup", operator.archive())
    assert len(server_files(operator)) == times - 1
    operator.run("backup_automem", "--only", "qdrant")
    assert server_files(operator) == []
    assert open_journals(operator.backups) == []
