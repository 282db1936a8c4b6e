"""Migrations up and down, killed at random moments while AutoMem writes: the script in one test, Qdrant in the other.

`KILLS_EACH=5 make faults` kills the script 60 times and the server 20 times.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from lib.journal import open_journals
from tests.automem_writer import AutoMemAtWork
from tests.kill_support import KILLS_EACH, left_by_kill
from tests.operator_support import NEW_SIZE, OLD_SIZE, SMALL, Operator
from tests.reembed_rig import BATCH, COMMAND, MEMORIES, MODELS, WORKERS
from tests.reembed_support import assert_migrated, points_of, upgrade
from tests.script_process import ScriptProcess

pytestmark = [pytest.mark.qdrant, pytest.mark.timeout(3600)]

SCRIPT_KILLS = 6 * KILLS_EACH if KILLS_EACH > 1 else 3
SERVER_KILLS = 2 * KILLS_EACH if KILLS_EACH > 1 else 1
CUTOVERS = pytest.mark.parametrize("words", [(), ("--in-place",)], ids=["staged", "in-place"])


class Seesaw:
    """An operator who changes the size back and forth."""

    def __init__(self, operator: Operator, words: tuple[str, ...]) -> None:
        self.operator = operator
        self.words = (*COMMAND, *words)
        operator.load(MEMORIES)
        operator.run("backup_automem", "--only", "qdrant")
        self.before = points_of(operator)
        upgrade(operator)
        operator.servers.openai.reset()
        self.automem = AutoMemAtWork(operator, SMALL, OLD_SIZE)
        self.size = NEW_SIZE
        self.states: Counter[str] = Counter()
        self.longest = 0.0

    def start(self) -> ScriptProcess:
        return self.operator.start("reembed_embeddings", *self.words)

    def go_through(self) -> None:
        """Run undisturbed. If so much was written that the run asks for another backup, take one."""
        for _ in range(10):
            begun = time.monotonic()
            result = self.operator.run("reembed_embeddings", *self.words, expect=None)
            if result.code == 0:
                self.longest = max(self.longest, time.monotonic() - begun)
                return
            assert result.code == 2, result.err
            self.back_up(result.err)
        pytest.fail("AutoMem writes faster than a backup and a migration follow each other here")

    def back_up(self, errors: str) -> None:
        """Take the backup that the run asked for."""
        assert "It is not changed without a verified backup" in errors, errors
        self.operator.run("backup_automem", "--only", "qdrant")

    def turn(self) -> None:
        """After a finished run, start AutoMem with these settings; the next change goes in the opposite direction."""
        self.automem.configure(MODELS[self.size], self.size)
        self.operator.run("backup_automem", "--only", "qdrant")
        self.size = OLD_SIZE if self.size == NEW_SIZE else NEW_SIZE
        self.operator.export(VECTOR_SIZE=self.size, EMBEDDING_MODEL=MODELS[self.size])


def swing(seesaw: Seesaw, kills: int, strike: Callable[[ScriptProcess], bool], rng: random.Random) -> int:
    """Start runs and call `strike` at a random moment of each, until `kills` hit a run; returns their number."""
    seesaw.go_through()
    seesaw.turn()
    struck = 0
    while struck < kills:
        begun = time.monotonic()
        process = seesaw.start()
        until = begun + rng.uniform(0.2, seesaw.longest)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        if process.poll() is None:
            struck += strike(process)
        _, errors = process.communicate(timeout=600)
        assert "Traceback" not in errors, errors
        if process.returncode == 0:
            seesaw.turn()
        elif process.returncode == 2:
            seesaw.back_up(errors)
    return struck


def finish(seesaw: Seesaw, kills: int) -> None:
    """The last run is undisturbed: every memory has its point, no orphan is left, and little was paid for twice."""
    operator = seesaw.operator
    seesaw.go_through()
    assert_migrated(operator, seesaw.before, model=MODELS[seesaw.size], size=seesaw.size)
    assert operator.call("GET", "/snapshots") == []
    assert operator.collections() == [operator.collection]
    assert open_journals(operator.backups) == []
    assert seesaw.automem.stored > 3
    assert operator.servers.openai.stats()["paid_twice"] <= kills * WORKERS * BATCH


@CUTOVERS
def test_the_script_is_killed_at_random_moments(operator, words, record_property):
    seesaw = Seesaw(operator, words)
    operator.servers.openai.fault(hang_seconds=0.05)

    def strike(process: ScriptProcess) -> bool:
        process.kill()
        process.wait()
        seesaw.states[left_by_kill(seesaw.operator)] += 1
        return process.returncode == -signal.SIGKILL

    with seesaw.automem:
        kills = swing(seesaw, SCRIPT_KILLS, strike, random.Random(f"script {words}"))
    finish(seesaw, kills)
    record_property("states", json.dumps(seesaw.states))


@CUTOVERS
def test_the_server_is_killed_at_random_moments(operator, own_qdrant, words, record_property):
    someone = replace(operator, servers=replace(operator.servers, qdrant_url=own_qdrant.url), exports={})
    seesaw = Seesaw(someone, words)
    rng = random.Random(f"server {words}")

    def strike(process: ScriptProcess) -> bool:
        own_qdrant.kill()
        time.sleep(rng.uniform(0.0, 1.0))
        own_qdrant.start()  # raises if it does not come up again
        seesaw.states[left_by_kill(seesaw.operator)] += 1
        return True

    with seesaw.automem:
        kills = swing(seesaw, SERVER_KILLS, strike, rng)
    finish(seesaw, kills)
    record_property("states", json.dumps(seesaw.states))
