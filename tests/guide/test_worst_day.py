"""docs/worst-day.md: each situation is provoked, each block is typed, and each message shown there is printed."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import requests
from falkordb.graph import Graph as FalkorGraph

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.swap import drop_graph
from tests.automem_json import write_samples
from tests.graph_support import unable_to_save
from tests.guide.documents import SHELL, WORST_DAY, Block, blocks
from tests.guide.site import LARGE, MEMORIES, SMALL, Ran, Site
from tests.kill_support import prelude
from tests.restore_support import wait_for
from tests.sandbox.stack import COLLECTION, GRAPH, TOKEN, Stack
from tests.small_disk import leave_free, small_disk

pytestmark = pytest.mark.qdrant
# What a real server answers (tests/faults/test_qdrant_disk.py fills its disk). The stand-in would be killed.
FULL = "Service internal error: No space left on device: WAL buffer size exceeds available disk space"
FAILURES = ("error:", "FAILED")
Provoke = Callable[[Site], Ran | None]


@pytest.fixture
def site(tmp_path) -> Iterator[Site]:
    """A deployment with a backup, a copy of it elsewhere, and a memory that is newer than both; AutoMem runs."""
    with Stack(tmp_path / "servers") as stack:
        someone = Site(tmp_path, stack)
        someone.set_up(*SMALL)
        shutil.copy(someone.automem_env, someone.checkout / ".env")
        activate = someone.checkout / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.touch()
        yield someone


def memories(site: Site) -> dict[str, str]:
    """The text of each memory in the graph. (Recall changes `last_accessed`, so the digest differs afterwards.)"""
    with connect(site.stack.falkordb.address) as conn:
        rows = FalkorGraph(conn, GRAPH).ro_query("MATCH (m:Memory) RETURN m.id, m.content").result_set
    return {str(key): text for key, text in rows}


def back_up(site: Site) -> dict[str, str]:
    """Back up, copy it elsewhere, then store another memory. Returns the memories that the backup holds."""
    saved, points = memories(site), site.state().points
    assert site.script("backup_automem", "--upload", str(site.folder / "copies")).code == 0
    site.stamp = site.manifests()[-1].stem.removeprefix("backup_")
    answer = requests.post(
        f"{site.stack.automem.url}/memory",
        json={"content": "stored after the backup", "tags": ["late"]},
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=30,
    )
    assert answer.status_code == 201
    assert wait_for(lambda: site.state().points == points + 1)
    return saved


def lose_graph(site: Site) -> None:
    with connect(site.stack.falkordb.address) as conn:
        drop_graph(conn, GRAPH)


def lose_collection(site: Site) -> None:
    requests.delete(f"{site.stack.qdrant.url}/collections/{COLLECTION}", timeout=30).raise_for_status()


def lose_both(site: Site) -> None:
    lose_graph(site)
    lose_collection(site)


def automem_recreates(site: Site) -> None:
    """AutoMem is started and asked, as any monitor would, and then stopped."""
    site.do("the service is restarted")
    requests.get(f"{site.stack.automem.url}/health", timeout=30).raise_for_status()
    site.stack.stop_automem()


def an_emptied_graph_is_backed_up(site: Site) -> Ran:
    automem_recreates(site)
    ran = site.script("backup_automem")
    assert ran.code == 3
    site.manifests()[-1].unlink()
    return ran


def an_emptied_collection_is_verified(site: Site) -> Ran:
    automem_recreates(site)
    ran = site.script("verify_migration")
    assert ran.code == 4
    return ran


def regular(site: Site, text: str) -> re.Pattern[str]:
    """A pattern for one line of the page: numbers may differ, `...` is anything, blanks are of any number."""
    text = site.here(text).replace("localhost:6379", site.stack.falkordb.address.display)
    words = [re.sub(r"\d+", r"\\d+", re.escape(word).replace(r"\.\.\.", ".*")) for word in text.split()]
    return re.compile(r"\s+".join(words))


def assert_shown(site: Site, block: Block, ran: Ran) -> None:
    """Every line of the block is printed, in this order; an error is the first thing after progress and warnings."""
    printed = (ran.err + ran.out).replace(sys.executable, "python")
    place = 0
    for line in block.text.splitlines():
        found = regular(site, line).search(printed, place)
        assert found, f"{block.name}: {line}\n--- printed:\n{printed}"
        place = found.end()


def type_section(site: Site, heading: str, before: Mapping[str, Provoke] | None = None) -> None:
    """Type the section; `before` has what happens before a block that has this part."""
    ran, left = Ran(0, "", ""), dict(before or {})
    typed = [block for block in blocks(WORST_DAY) if block.heading == heading]
    assert typed, heading
    for block, following in pairwise([*typed, None]):
        provoked = next((part for part in left if part in block.text), None)
        if provoked is not None:
            ran = left.pop(provoked)(site) or ran
        if block.not_run:
            site.do(block.not_run)
        elif block.language != SHELL:
            assert_shown(site, block, ran)
        else:
            ran = site.shell(block)
            may_fail = following is not None and any(word in following.text for word in FAILURES)
            assert ran.code == 0 or may_fail, f"{block.name}: exit {ran.code}\n{ran.err}\n{ran.out}"
            assert "Traceback" not in ran.err
    assert not left, f"a block that is looked for is gone: {left}"


@pytest.mark.matrix
def test_the_graph_is_gone(site):
    saved = back_up(site)
    lose_graph(site)
    type_section(site, "First")
    type_section(site, "The graph is gone", {"warning: graph": an_emptied_graph_is_backed_up})
    assert memories(site) == saved
    assert "stored after the backup" in (site.checkout / "points.json").read_text()


@pytest.mark.matrix
def test_the_collection_is_gone(site):
    back_up(site)
    before, points = memories(site), site.state().points
    lose_collection(site)
    type_section(
        site,
        "The collection is gone",
        {"FAILED": an_emptied_collection_is_verified, "--dry-run": lose_collection},
    )
    assert (memories(site), site.state().points) == (before, points)


@pytest.mark.matrix
def test_both_are_gone(site):
    saved = back_up(site)
    site.do("the service is stopped")
    lose_both(site)
    type_section(site, "Both are gone")
    assert memories(site) == saved


@pytest.mark.matrix
def test_the_disk_of_this_machine_is_full(site):
    shutil.rmtree(site.backups, ignore_errors=True)
    with small_disk(site.backups, "2g") as disk:
        disk.chmod(0o700)
        for _ in range(4):
            back_up(site)
            time.sleep(1)  # a set is named by its second
        before = site.state()
        leave_free(disk, 0)
        type_section(site, "The disk of this machine is full")
        assert site.state() == before
        assert len(list(disk.glob("backup_*.json"))) == 2


@pytest.mark.matrix
def test_the_disk_of_the_qdrant_server_is_full(site):
    faults = f"{site.stack.qdrant.url}/_sandbox/faults"
    back_up(site)
    before, points = memories(site), site.state().points
    full = {"method": "POST", "path": "/snapshots", "status": 500, "body": {"status": {"error": FULL}}}
    requests.post(faults, json=[full], timeout=30).raise_for_status()
    room = {"backup_automem.py\npython scripts/reembed": lambda _site: requests.delete(faults, timeout=30) and None}
    type_section(site, "The disk of the Qdrant server is full", room)
    assert (memories(site), site.state().points) == (before, points)


@pytest.mark.matrix
def test_the_disk_of_the_falkordb_server_is_full(site):
    before, points = memories(site), site.state().points
    with ExitStack() as stack:
        stack.enter_context(unable_to_save(site.stack.falkordb))
        room = {"BGSAVE\n": lambda _site: stack.close()}
        type_section(site, "The disk of the FalkorDB server is full", room)
    assert "cannot save" not in site.script("backup_automem").err
    assert (memories(site), site.state().points) == (before, points)


@pytest.mark.matrix
def test_a_run_was_killed(site):
    back_up(site)
    before, points = memories(site), site.state().points
    site.environ |= {"VECTOR_SIZE": LARGE[0], "EMBEDDING_MODEL": LARGE[1]}
    script = "scripts/reembed_embeddings.py"
    line = f"import runpy, sys\nsys.path.insert(0, '.')\nsys.argv = [{script!r}]\n"
    line += prelude("after live collection deleted") + f"runpy.run_path({script!r}, run_name='__main__')\n"
    assert site.run(["python", "-c", line]).code == -signal.SIGKILL
    type_section(site, "A run was killed")
    assert site.size() == int(LARGE[0])
    assert (memories(site), site.state().points) == (before, points)


@pytest.mark.matrix
def test_only_a_manual_backup_exists(site):
    """BGSAVE and a copy of dump.rdb; a snapshot by Qdrant's API."""
    before, points = memories(site), site.state().points
    with connect(site.stack.falkordb.address) as conn:
        conn.execute_command("SAVE")
        folder = Path(conn.config_get("dir")["dir"])
    shutil.copy(folder / "dump.rdb", site.checkout / "by_hand.rdb")
    snapshots = f"{site.stack.qdrant.url}/collections/{COLLECTION}/snapshots"
    name = requests.post(snapshots, timeout=60).json()["result"]["name"]
    (site.checkout / "by_hand.snapshot").write_bytes(requests.get(f"{snapshots}/{name}", timeout=60).content)
    site.do("the service is stopped")
    lose_both(site)
    type_section(site, "Only a manual backup exists")
    assert (memories(site), site.state().points) == (before, points)


@pytest.mark.matrix
def test_only_a_backup_by_automem_exists(site):
    before, points = memories(site), site.state().points
    write_samples(site.folder / "automem" / "backups", GRAPH, COLLECTION, MEMORIES, int(SMALL[0]), SMALL[1])
    site.do("the service is stopped")
    lose_both(site)
    type_section(site, "Only a backup by AutoMem exists")
    assert (memories(site), site.state().points) == (before, points)
    assert site.recall("database decision for the project")


def test_every_section_with_a_command_has_its_test():
    source = Path(__file__).read_text()
    for heading in {block.heading for block in blocks(WORST_DAY)}:
        assert f'"{heading}"' in source, heading
