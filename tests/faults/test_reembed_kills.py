"""The re-embedding killed at every step, and resumed by the same command."""

from __future__ import annotations

import random
import signal
import time

import pytest

from lib.backup.phases import (
    DELETED,
    DELETING,
    DROPPING_STAGED,
    READ,
    RESTORING_STAGED,
    SNAPSHOT_MADE,
    STAGED,
    STAGED_RESTORED,
    STAGING,
    VERIFIED,
)
from lib.journal import open_journals, read_journal
from tests.gate import Gate
from tests.kill_support import KILLS_EACH, left_by_kill
from tests.matrix import matrix
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE
from tests.reembed_rig import BATCH, COMMAND, DEFAULT_WINDOWS, IN_PLACE_WINDOWS, WINDOWS, WORKERS, Rig
from tests.reembed_support import assert_migrated, points_of

pytestmark = pytest.mark.qdrant


@pytest.fixture
def rig(operator):
    with Gate(operator.servers.qdrant_url) as gate:
        yield Rig(operator, gate)


# The last window of each phase: the server has done it, the journal does not say so.
PHASES = {phases: name for name, (_, _, phases, _, carried_out) in DEFAULT_WINDOWS.items() if carried_out}


@pytest.mark.parametrize(
    "windows",
    matrix([list(PHASES.values()), DEFAULT_WINDOWS, IN_PLACE_WINDOWS], list(PHASES.values())),
    ids=["one of each phase", "staged", "in-place"],
)
def test_one_migration_killed_in_every_window(rig, windows):
    if windows is IN_PLACE_WINDOWS:
        rig.words = (*COMMAND, "--in-place")
    for window in windows:
        assert rig.kill_at(window) == -signal.SIGKILL, window
    rig.finish()
    assert rig.paid_twice() == 0


@pytest.mark.skipif(KILLS_EACH == 1, reason="minutes: `KILLS_EACH=5 make faults` hits each window five times")
@pytest.mark.parametrize("window", WINDOWS)
def test_killed_in_a_named_window(rig, window, record_property):
    if window in IN_PLACE_WINDOWS:
        rig.words = (*COMMAND, "--in-place")
    for _ in range(KILLS_EACH):
        assert rig.kill_at(window) == -signal.SIGKILL
        record_property("left", left_by_kill(rig.operator))
        rig.finish()
        rig.turn()
    assert rig.paid_twice() == 0


def test_killed_while_embedding(rig):
    openai = rig.operator.servers.openai
    for answered in (0, 8):
        openai.fault(hang_seconds=600, after=answered)
        at = openai.stats()["requests"] + answered + 1
        assert rig.kill_when(lambda at=at: openai.stats()["requests"] >= at) == -signal.SIGKILL
        openai.clear_faults()
    assert rig.journal() is None
    rig.finish()
    assert rig.paid_twice() <= 2 * WORKERS * BATCH


def test_killed_as_soon_as_a_phase_is_noted(rig):
    for phase in (
        "started",
        STAGING,
        READ,
        STAGED,
        SNAPSHOT_MADE,
        DELETING,
        DELETED,
        RESTORING_STAGED,
        STAGED_RESTORED,
        VERIFIED,
        DROPPING_STAGED,
    ):
        rig.kill_when(lambda phase=phase: _reached(rig, phase))
    rig.finish()
    assert rig.paid_twice() == 0


def _reached(rig: Rig, phase: str) -> bool:
    journal = rig.journal()
    return journal is not None and journal.has_reached(phase)


def test_killed_at_random_moments(rig):
    rng = random.Random(11)
    rig.operator.servers.openai.fault(hang_seconds=0.1)
    kills = 0
    for longest in (
        1.2,
        4.0,
        4.0,
        4.0,
    ):  # the first one ends while it embeds, which takes at least 1.3 s
        deadline = time.monotonic() + rng.uniform(0.3, longest)
        kills += rig.kill_when(lambda deadline=deadline: time.monotonic() > deadline) == -signal.SIGKILL
    assert kills
    rig.finish()
    assert rig.paid_twice() <= kills * WORKERS * BATCH


def test_interrupted_and_resumed(rig):
    assert rig.kill_at("delete announced, not sent", signal.SIGINT) == 130
    assert rig.kill_at("deleted and noted", signal.SIGTERM) == 130
    assert open_journals(rig.operator.backups)
    rig.finish()
    assert rig.paid_twice() == 0


def test_ctrl_c_while_embedding_saves_what_is_in_flight(rig):
    openai = rig.operator.servers.openai
    openai.fault(hang_seconds=0.4)
    assert rig.kill_when(lambda: openai.stats()["requests"] >= 5, signal.SIGINT) == 130
    openai.clear_faults()
    rig.finish()
    assert rig.paid_twice() == 0


def test_an_answer_that_never_comes_costs_at_most_one_more_start(rig):
    lost = [
        "staged collection there, no index yet",
        "first batch staged",
        "snapshot made, not yet noted",
        "deleted, not yet noted",
        "in place, not yet noted",
    ]
    stops = [rig.stop_at(window) for window in lost]
    for stop in stops:
        stop.let_go.set()
    first = rig.operator.run("reembed_embeddings", *COMMAND, expect=None)
    assert first.code in {0, 1}, first.err
    second = rig.operator.run("reembed_embeddings", *COMMAND)
    assert [stop.reached.is_set() for stop in stops] == [True] * 5, second.err
    rig.finish()


def test_another_run_meanwhile_has_to_wait(rig):
    stop = rig.stop_at("before the guard's last look")
    process = rig.start()
    assert stop.reached.wait(300)
    for words in ((), ("--only-missing",), ("--dry-run",)):
        other = rig.operator.run("reembed_embeddings", *words, expect=5)
        assert "another run is working on" in other.err
    rig.gate.open()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    rig.finish()


def test_other_settings_after_the_delete_are_refused_and_name_both_ways_out(rig):
    rig.kill_at("deleted and noted")
    refused = rig.operator.run("reembed_embeddings", expect=2, env={"VECTOR_SIZE": "64"})
    assert f"cannot resume the unfinished run of '{rig.operator.collection}': VECTOR_SIZE has changed" in refused.err
    assert f"It was making {NEW_SIZE}d with {LARGE}" in refused.err
    assert f"export VECTOR_SIZE={NEW_SIZE} EMBEDDING_MODEL={LARGE}" in refused.err
    assert rig.operator.archive() in refused.err
    assert rig.operator.collections() == [f"{rig.operator.collection}__next"]
    listed = rig.operator.run("backup_automem", "--list")
    assert "reembed_embeddings.py is unfinished" in listed.err
    with rig.journal().path.open("ab") as stream:
        stream.write(b'{"phase": "closed", "at"')  # a line cut by a crash does not end the run
    rig.finish()


def test_other_settings_before_the_delete_begin_again(rig):
    rig.kill_at("before the guard's last look")
    rig.operator.run("reembed_embeddings", *COMMAND, env={"VECTOR_SIZE": "64"})
    assert_migrated(rig.operator, rig.before, size=64)
    outcomes = [read_journal(path) for path in rig.operator.backups.glob("journal_*_reembed.jsonl")]
    assert sorted(str(one.fact("outcome"))[:8] for one in outcomes) == ["done", "given up"]


@pytest.mark.parametrize("size", [OLD_SIZE, NEW_SIZE])
@pytest.mark.parametrize("prefix", ["", "in place: "], ids=["staged", "in-place"])
def test_what_automem_recreated_meanwhile_is_no_obstacle_and_no_loss(rig, size, prefix):
    """AutoMem was restarted while the collection was away: it recreated the collection and repaired some points."""
    if prefix:
        rig.words = (*COMMAND, "--in-place")
    rig.kill_at(f"{prefix}deleted and noted")
    operator = rig.operator
    operator.call("PUT", "", {"vectors": {"size": size, "distance": "Cosine"}})
    special = [one for one, (payload, _) in rig.before.items() if "source_app" in payload]
    repaired = [*special, *list(rig.before)[:5]]
    own = {"content", "tags", "tag_prefixes", "importance"}
    rows = [
        {
            "id": one,
            "vector": [1.0] + [0.0] * (size - 1),
            "payload": {key: value for key, value in rig.before[one][0].items() if key in own},
        }
        for one in repaired
    ]
    operator.call("PUT", "/points?wait=true", {"points": rows})
    # No new backup is needed: every id is in the graph.
    rig.finish()


def test_a_point_that_only_the_new_collection_holds_is_not_deleted_unprotected(rig):
    rig.kill_at("deleted and noted")
    operator = rig.operator
    operator.call("PUT", "", {"vectors": {"size": OLD_SIZE, "distance": "Cosine"}})
    lonely = {"id": 99, "vector": [1.0] + [0.0] * (OLD_SIZE - 1), "payload": {"content": "mine alone"}}
    operator.call("PUT", "/points?wait=true", {"points": [lonely]})
    refused = operator.run("reembed_embeddings", *COMMAND, expect=2)
    assert "It is not changed without a verified backup" in refused.err
    assert list(points_of(operator)) == [99]
    operator.run("backup_automem", "--only", "qdrant", env={"VECTOR_SIZE": str(OLD_SIZE)})
    rig.finish()


def test_a_delete_that_was_announced_but_never_came_is_guarded_again(rig):
    rig.kill_at("delete announced, not sent")
    operator = rig.operator
    (operator.backups / operator.archive()).unlink()
    before = operator.state()
    refused = operator.run("reembed_embeddings", *COMMAND, expect=2)
    assert "already exists with different dimension" in refused.err
    assert operator.state() == before
    operator.run("backup_automem", "--only", "qdrant", env={"VECTOR_SIZE": str(OLD_SIZE)})
    rig.finish()
