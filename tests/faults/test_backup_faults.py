"""A backup that is killed, cut off, refused or out of room: no half set is ever trusted, nothing stays on the server."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests

from lib.graph.client import connect
from lib.graph.engine import installed_engines, scratch_server
from lib.graph.read import read_rows
from lib.journal import open_journals, start_journal
from lib.steps.run_backup import run_backup
from tests.kill_support import kill, run_killed
from tests.operator_support import ROOT, Operator
from tests.restore_support import TIMEOUT, faults, journal_of, phases, site, targets, wait_for

pytestmark = pytest.mark.qdrant

KILLS = int(os.environ.get("AUTOMEM_KILLS", "1"))
WINDOWS = [
    "before backup begun",
    "after backup begun",
    "called lib.steps.take_graph.stream_rdb",
    "called lib.steps.take_pair.take_graph",
    "after snapshot announced",
    "before snapshot made",
    "after snapshot made",
    "called lib.vectors.snapshots.download",
    "before snapshot removed",
    "after snapshot removed",
    "called lib.steps.take_pair.take_collection",
    "called lib.steps.take_pair.write_manifest",
]


@pytest.fixture(scope="module")
def loaded(session_servers, tmp_path_factory):
    someone = Operator(session_servers, tmp_path_factory.mktemp("loaded"))
    someone.load()
    yield someone
    someone.clean_up()


@pytest.fixture
def backing(loaded, tmp_path):
    """The loaded stores, with a backup folder of the test's own."""
    return Operator(loaded.servers, tmp_path, loaded.graph, loaded.collection)


@pytest.fixture
def stand_in(qdrant_url):
    """Fault rules are the stand-in's own."""
    if requests.delete(f"{qdrant_url}/_sandbox/faults", timeout=TIMEOUT).status_code == 404:
        pytest.skip("a real server takes no fault rules")
    yield
    requests.delete(f"{qdrant_url}/_sandbox/faults", timeout=TIMEOUT)


def files(operator: Operator) -> list[str]:
    """Every file of the backup folder but the journals."""
    found = (path for path in operator.backups.rglob("*") if path.is_file() and path.suffix != ".jsonl")
    return sorted(str(path.relative_to(operator.backups)) for path in found)


def assert_one_set(operator: Operator) -> None:
    """One set with its two files, nothing else here, nothing on the server, no open journal."""
    manifest = json.loads(operator.manifests()[0].read_text())
    names = [manifest[half]["file"]["name"] for half in ("graph", "collection")]
    assert files(operator) == sorted([operator.manifests()[0].name, *names])
    assert operator.call("GET", "/snapshots") == []
    assert operator.collections() == [operator.collection]
    assert open_journals(operator.backups) == []


@pytest.mark.parametrize("where", WINDOWS * KILLS)
def test_killed_there_the_next_run_cleans_up_and_works(backing, where):
    run_killed(backing, where, "backup_automem")
    done = where.endswith("write_manifest")
    assert len(backing.manifests()) == int(done)  # a set is whole, or none is there to be trusted
    if not done:
        assert backing.run("backup_automem", "--list", "--json").json["sets"] == []
        backing.run("restore_from_backup", "latest", expect=1)
    backing.run("backup_automem")
    if done:
        backing.run("backup_automem", "--check", "all")
        backing.run("backup_automem", "--cleanup", "--keep", "1")
    assert_one_set(backing)


@pytest.mark.parametrize("seconds", [0.05, 0.4, 0.8])
def test_killed_while_the_server_makes_the_snapshot(backing, stand_in, seconds):
    faults(backing, {"method": "POST", "path": r"/snapshots\?", "delay_seconds": 0.6, "times": 1})
    process = backing.start("backup_automem")
    assert wait_for(lambda: "snapshot announced" in phases(journal_of(backing, "backup")))
    time.sleep(seconds)
    kill(process)
    backing.run("backup_automem")
    assert_one_set(backing)


def test_killed_during_the_download(backing, stand_in):
    faults(backing, {"method": "GET", "path": r"/snapshots/.+\.snapshot", "delay_seconds": 1.0, "times": 1})
    process = backing.start("backup_automem")
    assert wait_for(lambda: "snapshot made" in phases(journal_of(backing, "backup")))
    time.sleep(0.2)
    assert kill(process)
    assert any(name.endswith(".partial") for name in files(backing))
    backing.run("backup_automem")
    assert_one_set(backing)


def assert_undone(operator: Operator, process: subprocess.Popen[str]) -> None:
    """Exit code 130, no file and no snapshot left, and the next run leaves nothing open."""
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "run the same command again" in err
    assert files(operator) == []
    assert operator.call("GET", "/snapshots") == []
    operator.run("backup_automem")
    assert_one_set(operator)


@pytest.mark.parametrize(
    ("number", "window"),
    [
        (signal.SIGTERM, "backup begun"),
        (signal.SIGTERM, "snapshot announced"),
        (signal.SIGINT, "snapshot made"),
        (signal.SIGTERM, "snapshot made"),
        (signal.SIGTERM, "snapshot removed"),
    ],
)
def test_a_signal_leaves_nothing_half_done(backing, number, window):
    process = backing.start("backup_automem")
    assert wait_for(lambda: window in phases(journal_of(backing, "backup")))
    process.send_signal(number)
    assert_undone(backing, process)


def test_a_signal_while_the_server_makes_the_snapshot(backing, stand_in):
    faults(backing, {"method": "POST", "path": r"/snapshots\?", "delay_seconds": 1.0, "times": 1})
    process = backing.start("backup_automem")
    assert wait_for(lambda: "snapshot announced" in phases(journal_of(backing, "backup")))
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert backing.call("GET", "/snapshots") == []  # it was waited for
    assert open_journals(backing.backups) == []
    assert_undone(backing, process)


def test_snapshots_and_files_of_others_stay(backing, stand_in):
    """A snapshot that the operator made while ours was being made, and files that are in no set."""
    faults(backing, {"method": "POST", "path": r"/snapshots\?", "delay_seconds": 0.8, "times": 1})
    run = backing.start("backup_automem")
    assert wait_for(lambda: "snapshot announced" in phases(journal_of(backing, "backup")))
    theirs = backing.call("POST", "/snapshots")["name"]
    run.communicate(timeout=60)
    assert run.returncode == 0
    assert [one["name"] for one in backing.call("GET", "/snapshots")] == [theirs]
    run_killed(backing, "before snapshot made", "backup_automem")
    for name in (
        "falkordb/mine.rdb.partial",
        "falkordb/memories_20200101_000000.rdb",
        "qdrant/other.tar.gz.partial",
    ):
        (backing.backups / name).write_text("of another run")
    backing.run("backup_automem")
    assert {
        "falkordb/mine.rdb.partial",
        "falkordb/memories_20200101_000000.rdb",
        "qdrant/other.tar.gz.partial",
    } <= set(files(backing))
    names = [one["name"] for one in backing.call("GET", "/snapshots")]
    assert names == [theirs]
    requests.delete(
        f"{backing.servers.qdrant_url}/collections/{backing.collection}/snapshots/{theirs}", timeout=TIMEOUT
    )


def test_two_targets_write_into_one_folder_at_once(session_servers, tmp_path):
    """Two AutoMems backed up by one checkout: neither takes the other's stamp or removes its files."""
    both = [Operator(session_servers, tmp_path) for _ in range(2)]
    try:
        for one in both:
            one.load(60)
        for _ in range(2):
            runs = [one.start("backup_automem") for one in both]
            for run in runs:
                _, err = run.communicate(timeout=120)
                assert run.returncode == 0, err
        manifests = [json.loads(path.read_text()) for path in both[0].manifests()]
        assert len(manifests) == 4
        assert sorted(one["graph"]["graph"] for one in manifests) == sorted(
            [both[0].graph, both[1].graph] * 2
        )
        both[0].run("backup_automem", "--check", "all")
    finally:
        for one in both:
            one.clean_up()


def test_a_cut_download_is_resumed(backing, stand_in):
    faults(
        backing, {"method": "GET", "path": r"/snapshots/.+\.snapshot", "cut_after_bytes": 300_000, "times": 3}
    )
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
    assert backing.call("GET", "/snapshots") == []
    assert open_journals(backing.backups) == []
    backing.run("backup_automem")
    assert_one_set(backing)


def test_a_silent_server_is_not_waited_for_for_ever(backing, stand_in):
    """The answer to the snapshot is lost: the list tells that it is there, and it is used."""
    faults(backing, {"method": "POST", "path": r"/snapshots\?", "status": 504, "body": "gateway", "times": 1})
    backing.call("POST", "/snapshots")
    theirs = [one["name"] for one in backing.call("GET", "/snapshots")]
    process = backing.start("backup_automem")
    assert wait_for(lambda: "snapshot announced" in phases(journal_of(backing, "backup")))
    time.sleep(1.5)
    backing.call("POST", "/snapshots")  # what the server made after the gateway gave up
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [one["name"] for one in backing.call("GET", "/snapshots")] == theirs
    for name in theirs:
        requests.delete(
            f"{backing.servers.qdrant_url}/collections/{backing.collection}/snapshots/{name}", timeout=TIMEOUT
        )
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
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr
    assert "no room left" in done.stderr
    assert "Traceback" not in done.stderr
    assert files(backing) == []
    assert backing.call("GET", "/snapshots") == []
    assert open_journals(backing.backups) == []


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_before_and_while_writing(backing, small_disk):
    backing.export(AUTOMEM_BACKUP_DIR=small_disk / "backups")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(60 << 20))
    early = backing.run("backup_automem", expect=1)
    assert "MiB free" in early.err
    filler.write_bytes(bytes(20 << 20))
    process = backing.start("backup_automem")
    assert wait_for(lambda: "backup begun" in phases(max(small_disk.glob("backups/journal_*"), default=None)))
    fill(small_disk / "more")
    _, err = process.communicate(timeout=60)
    (small_disk / "more").unlink()
    assert process.returncode == 1, err
    assert "no room left" in err
    left = [path for path in small_disk.glob("backups/**/*") if path.is_file() and path.suffix != ".jsonl"]
    assert left == []
    assert backing.call("GET", "/snapshots") == []
    filler.unlink()
    backing.run("backup_automem")


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(1 << 16)):
            pass


def test_a_disk_without_room_for_the_journal_says_so(backing, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "backup_automem.py")],
        cwd=backing.folder,
        env=backing.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


BACKUPS, WRITERS = 8, 4


def write_pairs(operator: Operator, number: int, stop: threading.Event) -> None:
    """Two nodes and the relationship between them, in one query."""
    from falkordb.graph import Graph

    with connect(operator.servers.falkordb.address) as conn:
        graph, count = Graph(conn, operator.graph), 0
        while not stop.is_set():
            key = f"{number}-{count}"
            graph.query(
                "CREATE (:Pair {key: $key, side: 1})-[:TWIN {key: $key}]->(:Pair {key: $key, side: 2})",
                {"key": key},
            )
            count += 1
            time.sleep(0.002)


def test_backups_under_writers_never_hold_half_a_pair(operator):
    operator.load(60)
    stop = threading.Event()
    writers = [threading.Thread(target=write_pairs, args=(operator, one, stop)) for one in range(WRITERS)]
    for one in writers:
        one.start()
    place, seen = site(operator), []
    try:
        for _ in range(BACKUPS):
            manifest = run_backup(
                place.graph, place.collection, place.folder, targets(operator), place.engines, place.bar
            )
            seen.append(manifest)
    finally:
        stop.set()
        for one in writers:
            one.join()
    engine = installed_engines({})[0]
    pairs = []
    for manifest in seen:
        with scratch_server(engine, manifest.file_of(manifest.graph)) as scratch:
            rows = read_rows(
                scratch.conn,
                operator.graph,
                "MATCH (p:Pair) RETURN count(p), count(DISTINCT p.key)",
            )
            twins = read_rows(
                scratch.conn,
                operator.graph,
                "MATCH (a:Pair {side: 1})-[t:TWIN]->(b:Pair {side: 2}) WHERE a.key = b.key AND t.key = a.key RETURN count(t)",
            )
            nodes, keys = rows[0]
            assert nodes == 2 * keys == 2 * twins[0][0]
            assert manifest.graph.labels["Pair"] == nodes  # the manifest tells what the file holds
            pairs.append(keys)
    assert pairs == sorted(pairs)
    assert pairs[-1] > pairs[0] > 0


def test_drift_made_while_the_backup_runs_is_reported(operator):
    operator.load(60)
    gone = operator.cypher("MATCH (m:Memory) WHERE m.content <> '' RETURN m.id LIMIT 1")[0][0]
    operator.call("POST", "/points/delete?wait=true", {"points": [gone]})
    operator.cypher("CREATE (:Memory {id: '00000000-0000-4000-8000-00000000abcd', content: 'no point yet'})")
    result = operator.run("backup_automem", "--json")
    assert result.json["drift"]["only_graph"] == 2
    assert str(gone) in result.json["drift"]["examples_graph"]


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
