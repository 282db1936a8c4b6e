"""Too little room, on this machine or the server's: reported in advance if possible, and nothing left incomplete."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lib.backup import collection as verify_collection
from lib.backup import graph as graph_backup
from lib.backup.check import verify_named
from lib.backup.run import run_backup
from lib.clients.falkordb import scratch
from lib.clients.falkordb.scratch import installed_engines
from lib.errors import MigrationError
from lib.journal import open_journals
from tests.backup_support import assert_one_set, files, server_files
from tests.faults.test_backup_network import CREATE, qdrant_proxy
from tests.faulty_proxy import Fault, answer
from tests.operator_support import LARGE, ROOT, Operator
from tests.restore_support import site, targets, wait_for
from tests.small_disk import fill, small_disk

pytestmark = pytest.mark.qdrant
pytest_plugins = ["tests.backup_fixtures"]

ENGINES = installed_engines({})


def levels(operator: Operator) -> list[tuple[str, str]]:
    return [(one.level, one.note) for one in verify_named(operator.backups, "all", ENGINES)]


# --- a machine with one disk ---------------------------------------------------------------------------------------

# What the scripts need of /tmp, which the disk hides: a virtual environment or a checkout there stays visible.
KEPT = [str(one.relative_to("/tmp")) for one in (Path(sys.prefix), ROOT) if one.is_relative_to("/tmp")]
ON_THE_DISK = f"""
for kept in {shlex.join(KEPT)}; do mount --bind "/tmp/$kept" "$kept" || exit 77; done
for folder in /tmp /var/tmp /usr/tmp; do [ ! -d $folder ] || mount --rbind . $folder || exit 77; done
exec "$@"
"""


def on_the_disk(operator: Operator, disk: Path, script: str, *words: str) -> tuple[int, str]:
    """Run a script for which every folder of temporary files, and that of the locks, is `disk`. Exit code and stderr."""
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--backup-dir", str(disk / "backups"), *words]
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", ON_THE_DISK, "sh", *command],
        cwd=disk,
        env=operator.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode == 77 or "unshare" in ran.stderr:
        pytest.skip(f"no folder can be mounted here: {ran.stderr.strip()}")
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.returncode, ran.stderr


@pytest.mark.core
def test_what_makes_room_works_if_the_only_disk_is_full(operator, tmp_path):
    """docs/worst-day.md names these commands. The backup folder, /tmp and the locks are on one disk on most machines."""
    if tmp_path.is_relative_to("/tmp"):
        pytest.skip("/tmp of the test would hide its folder")
    operator.load(60)
    operator.run("backup_automem")
    first = operator.manifests()
    wait_for(lambda: time.time() > first[0].stat().st_mtime + 1.1)
    operator.run("backup_automem")
    operator.run("reembed_embeddings", "--limit", "5", env={"VECTOR_SIZE": "96", "EMBEDDING_MODEL": LARGE})
    with small_disk(tmp_path / "disk", "20m") as disk:
        disk.chmod(0o1777)
        shutil.copytree(operator.backups, disk / "backups")
        for kept in KEPT:
            (disk / kept).mkdir(parents=True, exist_ok=True)
        fill(disk / "full")
        code, err = on_the_disk(operator, disk, "backup_automem")
        assert (code, "error: no room left for temporary files" in err) == (1, True), err
        code, err = on_the_disk(operator, disk, "verify_migration")
        assert (code, "its disk is full" in err, "df -h" in err, "name a folder" in err) == (1, True, True, False), err
        assert on_the_disk(operator, disk, "backup_automem", "--cleanup", "--keep", "1", "--dry-run")[0] == 0
        assert on_the_disk(operator, disk, "backup_automem", "--cleanup", "--keep", "1")[0] == 0
        assert [one.name for one in disk.glob("backups/backup_*.json")] == [operator.manifests()[-1].name]
        assert on_the_disk(operator, disk, "reembed_embeddings", "--prune-spool", "--dry-run")[0] == 0
        assert on_the_disk(operator, disk, "reembed_embeddings", "--prune-spool")[0] == 0


# --- the folder for temporary files -------------------------------------------------------------------------------


def test_little_room_for_temporary_files_lowers_the_verification_level_and_is_reported(backing, tmp_path):
    with small_disk(tmp_path / "t", "600k") as place:
        backing.export(TMPDIR=place)
        result = backing.run("backup_automem", "--json")
    for component in ("graph", "collection"):
        assert result.json[component]["proof"] == "checked"
        if component == "graph" or "engine here does not open" not in result.json[component]["proof_note"]:
            assert f"no room in {place}" in result.json[component]["proof_note"]
    assert result.err.count("CHECKED only") == 2
    assert_one_set(backing)
    assert levels(backing)[0][0] == "restored"


def test_a_full_folder_for_temporary_files_is_passed_over(backing, tmp_path):
    """Python uses the system's next temporary folder."""
    with small_disk(tmp_path / "t", "64k") as place:
        fill(place / "full")
        backing.export(TMPDIR=place)
        backing.run("backup_automem")
    assert_one_set(backing)


def test_room_lost_while_the_segments_are_opened_lowers_the_verification_level(backing, tmp_path, monkeypatch):
    pytest.importorskip("qdrant_edge")
    backing.run("backup_automem")
    monkeypatch.setattr(verify_collection, "free_bytes", lambda _path: 1 << 60)
    with small_disk(tmp_path / "t", "32k") as place:
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        (verified,) = (one for one in verify_named(backing.backups, "all", []) if "qdrant" in str(one.path))
    assert (verified.level, verified.fault) == ("checked", "")
    assert "no room" in verified.note


# --- memory -------------------------------------------------------------------------------------------------------


def test_too_little_memory_for_a_scratch_server_lowers_the_verification_level(backing, monkeypatch):
    backing.run("backup_automem")
    monkeypatch.setattr(graph_backup, "free_memory", lambda: 20 << 20)
    level, note = levels(backing)[0]
    assert level == "checked"
    assert "20 MiB of memory are free" in note
    monkeypatch.setattr(graph_backup, "free_memory", lambda: None)  # unknown, as on macOS: tried
    assert levels(backing)[0][0] == "restored"


@pytest.mark.parametrize("when", ["while it loads", "while it is read"])
def test_a_killed_scratch_server_reports_no_fault_of_the_file(backing, monkeypatch, when):
    """Fail as the kernel does when memory runs out after all."""
    backing.run("backup_automem")
    if when == "while it loads":
        start = scratch._start

        def start_and_kill(*words):
            child = start(*words)
            os.kill(child.pid, signal.SIGKILL)
            return child

        monkeypatch.setattr(scratch, "_start", start_and_kill)
    else:
        real = graph_backup.graph_digest

        def digest_of_a_dying_one(conn, graph, **more):
            os.kill(int(conn.info("server")["process_id"]), signal.SIGKILL)
            return real(conn, graph, **more)

        monkeypatch.setattr(graph_backup, "graph_digest", digest_of_a_dying_one)
    level, note = levels(backing)[0]
    assert level == "checked"
    assert "killed from outside" in note


# --- the folder for backups ---------------------------------------------------------------------------------------


@pytest.mark.core
def test_a_graph_that_cannot_fit_is_reported_before_the_transfer(backing, monkeypatch):
    monkeypatch.setattr("lib.backup.run.memory_used", lambda _conn: 1 << 50)
    place = site(backing)
    with pytest.raises(MigrationError, match="MiB free, the backup may need"):
        run_backup(place.graph, None, place.folder, targets(backing), place.engines, place.bar)
    assert files(backing) == []


@pytest.mark.parametrize("only", ["falkordb", "qdrant"])
def test_a_disk_that_fills_while_a_file_is_written(backing, tmp_path, only):
    """The early check passes: the disk is filled when the transfer begins."""
    with small_disk(tmp_path / "b", "96m") as disk:
        backing.export(AUTOMEM_BACKUP_DIR=disk / "backups")
        runner = tmp_path / "runner.py"
        runner.write_text(FILLS_FIRST.format(path=str(disk / "full")))
        words = [sys.executable, str(runner), "--only", only]
        done = subprocess.run(
            words, cwd=tmp_path, env=backing.environ, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 1, done.stderr
        assert "no room left" in done.stderr
        assert "Traceback" not in done.stderr
        left = [path for path in (disk / "backups").rglob("*") if path.is_file() and path.suffix != ".jsonl"]
        assert left == []
        assert server_files(backing) == []
        (disk / "full").unlink()
        backing.run("backup_automem")


FILLS_FIRST = f"""
import contextlib, runpy, sys
from pathlib import Path
root = {str(Path(__file__).resolve().parents[2])!r}
sys.path.insert(0, root)
import lib.backup.graph as graph, lib.backup.collection as collection
def filling(real):
    def call(*words, **named):
        with open({{path!r}}, "wb", buffering=0) as stream, contextlib.suppress(OSError):
            while stream.write(bytes(1 << 16)):
                pass
        return real(*words, **named)
    return call
graph.stream_rdb = filling(graph.stream_rdb)
collection.snapshots.download = filling(collection.snapshots.download)
sys.argv[0] = root + "/scripts/backup_automem.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# --- the server's disk --------------------------------------------------------------------------------------------


def test_a_server_without_room_for_the_snapshot(backing):
    """With the message of a real server."""
    words = "Service internal error: No space left on device: WAL buffer size exceeds available disk space"
    refusal = answer(500, json.dumps({"status": {"error": words}}), "Content-Type: application/json\r\n")
    with qdrant_proxy(backing, Fault(CREATE, answer=refusal)):
        failed = backing.run("backup_automem", expect=1)
    assert "No space left on device" in failed.err
    assert "free disk space on the Qdrant server" in failed.err
    assert files(backing) == []
    assert server_files(backing) == []
    assert open_journals(backing.backups) == []
    backing.run("backup_automem")
    assert_one_set(backing)
