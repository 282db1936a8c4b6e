"""A real Qdrant whose disk fills at every stage of a migration or a restore: nothing is lost, the same command resumes.

The room that each stage needs is found by trying: 4,000 points of 3072d, from too little for anything to almost enough.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import pytest

from lib.journal import open_journals
from tests.operator_support import LARGE
from tests.real_qdrant import RealQdrant, test_server
from tests.reembed_support import assert_migrated, points_of
from tests.small_disk import fill, leave_free, small_disk

pytestmark = [
    pytest.mark.qdrant,
    pytest.mark.timeout(900),
    pytest.mark.skipif(test_server() is None, reason="fills the disk of a real server (QDRANT_TEST_SERVER)"),
]
MEMORIES, SIZE, PLENTY_MIB = 4_000, 3072, 2_000
FLUSHED_SECONDS, LEFT_BYTES = 6.0, 16 << 20


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", f"{PLENTY_MIB}m") as folder:
        yield folder


@pytest.fixture
def crowded(operator, disk):
    """An operator with a backup, whose server has a separate disk; and the server."""
    binary = test_server()
    assert binary is not None
    with RealQdrant(binary, disk / "qdrant") as real:
        someone = replace(operator, servers=replace(operator.servers, qdrant_url=real.url), exports={})
        someone.load(MEMORIES)
        someone.run("backup_automem", "--only", "qdrant")
        someone.export(VECTOR_SIZE=SIZE, EMBEDDING_MODEL=LARGE)
        someone.servers.openai.reset()
        yield someone, real


@pytest.mark.parametrize("free", [70, 140, 245, 315, 385, 420, 455])
def test_a_staged_migration(crowded, disk, free):
    operator, _ = crowded
    before, was = points_of(operator), operator.state()
    leave_free(disk, free)
    first = operator.run("reembed_embeddings", expect=None)
    if "is unchanged" in first.err:
        assert operator.state() == was
        assert operator.collections() == [operator.collection]
        assert "MiB are needed in addition to the live collection" in first.err
    assert free > 100 or "is unchanged" in first.err
    resume(operator, disk, (), first, before)


@pytest.mark.parametrize("free", [70, 140, 210, 280])
def test_a_migration_in_place(crowded, disk, free):
    operator, _ = crowded
    before = points_of(operator)
    leave_free(disk, free)
    first = operator.run("reembed_embeddings", "--in-place", expect=None)
    assert free > 100 or "not complete" in first.err
    resume(operator, disk, ("--in-place",), first, before)


@pytest.mark.parametrize("free", [80, 180, 280, 380])
def test_a_restore(crowded, disk, free):
    """A failure is reported before anything is replaced, and leaves nothing on the server."""
    operator, _ = crowded
    operator.run("reembed_embeddings")
    time.sleep(FLUSHED_SECONDS)
    operator.run("backup_automem", "--only", "qdrant")
    archive = max((operator.backups / "qdrant").glob("*.tar.gz"))
    saved = points_of(operator).keys()
    operator.call("POST", "/points/delete?wait=true", {"points": list(saved)[:50]})
    was = operator.state()
    leave_free(disk, free)
    used = shutil.disk_usage(disk).used
    failed = operator.run("restore_from_backup", archive, expect=1)
    assert "free disk space" in failed.err or "its disk" in failed.err
    assert operator.state() == was
    assert operator.collections() == [operator.collection]
    assert shutil.disk_usage(disk).used - used < LEFT_BYTES
    assert open_journals(operator.backups) == []
    leave_free(disk, PLENTY_MIB)
    operator.run("restore_from_backup", archive)
    assert points_of(operator).keys() == saved
    assert operator.collections() == [operator.collection]
    assert operator.call("GET", "/snapshots") == []


def test_what_reports_a_full_disk_further_is_replaced_without_a_restart(operator, disk):
    """1.11.3 could not flush, and its files are incomplete: most of the time it would not start again."""
    binary = test_server()
    assert binary is not None
    with RealQdrant(binary, disk / "qdrant") as real:
        if not real.version.startswith("1.11."):
            pytest.skip("later versions end on such a disk, and start again")
        someone = replace(operator, servers=replace(operator.servers, qdrant_url=real.url), exports={})
        someone.load()
        someone.run("backup_automem")
        before = someone.state()
        time.sleep(FLUSHED_SECONDS)
        page = someone.call("POST", "/points/scroll", {"limit": 30, "with_payload": True, "with_vector": True})
        someone.call("PUT", "/points?wait=true", {"points": page["points"]})
        leave_free(disk, 0)
        fill(disk / "full")
        time.sleep(FLUSHED_SECONDS)
        (disk / "full").unlink()
        leave_free(disk, PLENTY_MIB)
        failed = someone.run("backup_automem", expect=1)
        assert "docs/worst-day.md" in failed.err
        someone.run("restore_from_backup", someone.archive(), "--no-safety-backup")
        real.restart()
        assert someone.state() == before


def resume(operator, disk, words, first, before):
    """Follow the printed next step."""
    assert "Traceback" not in first.err
    assert first.code == 0 or (first.code == 1 and "disk is full" in first.err), first.err
    if first.code:
        leave_free(disk, PLENTY_MIB)
        operator.run("reembed_embeddings", *words)
    assert_migrated(operator, before, size=SIZE)
    assert operator.collections() == [operator.collection]
    assert operator.call("GET", "/snapshots") == []
    assert open_journals(operator.backups) == []
    assert operator.servers.openai.stats()["paid_twice"] == 0
