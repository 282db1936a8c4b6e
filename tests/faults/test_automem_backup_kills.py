"""A restore of AutoMem's own backup, killed: the live stores are whole, and the same command again finishes it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from lib.clients.qdrant.collection import exists
from lib.errors import MigrationError
from tests.automem_json import sample_points, write_samples
from tests.automem_json_support import (
    DATA,
    KEPT_GRAPH,
    KEPT_POINTS,
    assert_restored,
    automem_operator,
    graph_in_store,
    make_live,
    points_in_store,
    points_of_rows,
)
from tests.kill_support import KILLS_EACH, kill, run_killed
from tests.matrix import matrix
from tests.operator_support import OLD_SIZE, Operator
from tests.restore_support import assert_tidy, delete_printed_snapshots, wait_for

pytestmark = pytest.mark.qdrant

# In the order in which a run reaches them.
WINDOWS = [
    "called AutoMem's points read",
    "called AutoMem's graph read",
    "called AutoMem's graph loaded",
    "after started",
    "after rehearsing the graph",
    "called graph accepted",
    "after rehearsing the collection",
    "called trial's collection created",
    "called points written",
    "before collection rehearsed",
    "after collection rehearsed",
    "after backup begun",
    "after snapshot made",
    "after safety backup",
    "entering snapshot of the points made",
    "called snapshot of the points made",
    "before deleting the live collection",
    "after deleting the live collection",
    "called live collection deleted",
    "called copy recovered",
    "after collection restored",
    "after switching the graph",
    "called graph swapped in",
    "after graph switched",
    "before closed",
]
RANDOM = 3 * KILLS_EACH


@pytest.fixture(scope="module")
def _operator(session_servers, tmp_path_factory) -> Iterator[Operator]:
    with automem_operator(session_servers, tmp_path_factory.mktemp("automem")) as someone:
        yield someone


@pytest.fixture
def live(_operator) -> Operator:
    make_live(_operator)
    return _operator


def assert_one_is_whole(operator: Operator, old) -> None:
    """Each store holds the old state or the file's; the collection may be absent if its trial restore is complete."""
    assert graph_in_store(operator) in (old[0], KEPT_GRAPH)

    def one_is_whole() -> bool:
        try:
            name = operator.collection
            if not exists(operator.qdrant, name):
                name = next(one for one in operator.collections() if "__try_" in one)
            return points_in_store(operator, name) in (old[1], KEPT_POINTS)
        except MigrationError:
            return False  # the server still works on what the killed run asked for

    assert wait_for(one_is_whole, pause=0.1)


def resume(operator: Operator) -> None:
    """The same command again; what may be the killed run's snapshot is deleted by the printed command."""
    delete_printed_snapshots(operator.run("restore_from_backup", DATA).err)
    assert_restored(operator)
    assert_tidy(operator)


@pytest.mark.parametrize("where", matrix(WINDOWS * KILLS_EACH))
def test_killed_there_it_resumes(live, where):
    old = graph_in_store(live), points_in_store(live)
    run_killed(live, where, "restore_from_backup", str(DATA))
    assert_one_is_whole(live, old)
    resume(live)


@pytest.fixture(scope="module")
def usual_seconds(_operator) -> float:
    """How long a restore takes here."""
    make_live(_operator)
    began = time.monotonic()
    _operator.run("restore_from_backup", DATA)
    return time.monotonic() - began


@pytest.mark.parametrize("number", range(RANDOM))
def test_killed_at_a_random_moment_it_resumes(usual_seconds, live, number):
    chance = random.Random(number)
    for _ in range(20):  # a kill after the end does not count
        make_live(live)
        old = graph_in_store(live), points_in_store(live)
        process = live.start("restore_from_backup", str(DATA))
        time.sleep(chance.uniform(0.05, 1.0) * usual_seconds)
        if kill(process):
            break
    else:
        pytest.fail("every run ended before its kill")
    assert_one_is_whole(live, old)
    resume(live)


def test_a_trial_with_a_part_of_the_points_is_not_taken_for_complete(live, tmp_path):
    """Killed after the first of several batches."""
    count = 600
    words = list(map(str, write_samples(tmp_path / "files", live.graph, live.collection, count, OLD_SIZE)))
    # A safety backup, taken at the same time, may leave a snapshot whose name no journal has.
    run_killed(live, "called points written", "restore_from_backup", *words, "--no-safety-backup")
    left = next(one for one in live.collections() if "__try_" in one)
    wanted = points_of_rows(sample_points(count, OLD_SIZE))
    assert 0 < len(points_in_store(live, left)) < len(wanted)
    live.run("restore_from_backup", *words)
    assert points_in_store(live) == wanted
    assert_tidy(live)


def test_another_file_after_a_kill_cleans_up_first(live):
    """The killed run's temporary collection is not taken for that of another file."""
    run_killed(live, "after collection rehearsed", "restore_from_backup", str(DATA), "--no-safety-backup")
    live.run("backup_automem")
    before = live.state()
    make_live(live)
    live.run("restore_from_backup", live.manifests()[-1])
    assert live.state() == before
    assert_tidy(live)
