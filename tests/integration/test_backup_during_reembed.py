"""Backups while a re-embed runs: they exclude only the phases that change the live collection."""

from __future__ import annotations

import random
import re
import time

import pytest
import requests

from lib.backup.phases import DELETING, STAGED
from lib.config import load_config
from lib.files import lock_targets
from tests.gate import Gate
from tests.reembed_rig import COMMAND, Rig

pytestmark = pytest.mark.qdrant
HANG_SECONDS = 0.3  # of each request to the provider: embedding takes some seconds
BACKUPS = 20


@pytest.fixture
def rig(operator):
    with Gate(operator.servers.qdrant_url) as gate:
        yield Rig(operator, gate)


def start_embedding(rig: Rig):
    """The re-embed as a process that waits for the provider."""
    openai = rig.operator.servers.openai
    openai.fault(hang_seconds=HANG_SECONDS)
    asked = openai.stats()["requests"]
    process = rig.start()
    while process.poll() is None and openai.stats()["requests"] == asked:
        time.sleep(0.01)
    return process


def finished(process) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def test_a_backup_and_a_cleanup_while_texts_are_embedded(rig):
    process = start_embedding(rig)
    before = set(rig.operator.manifests())
    rig.operator.run("backup_automem")
    rig.operator.run("backup_automem", "--cleanup", "--keep", "1")
    assert process.poll() is None
    finished(process)
    rig.operator.servers.openai.clear_faults()
    (new,) = set(rig.operator.manifests()) - before
    assert rig.journal().fact("manifest") == new.name  # the guard accepted it
    rig.operator.run("backup_automem", "--check", "all")
    rig.finish()


@pytest.mark.matrix
def test_other_runs_that_change_a_store_are_refused_and_told_by_whom(rig):
    process = start_embedding(rig)
    for words in (("restore_from_backup", rig.operator.archive()), ("reembed_embeddings",)):
        refused = rig.operator.run(*words, expect=5)
        assert re.search(
            rf"another run is working on falkordb \S+ \S+ \(\w+.*, process {process.pid} on \S+, since \d{{4}}-",
            refused.err,
        ), refused.err
    finished(process)


def test_the_cutover_waits_for_a_backup_that_is_being_taken(rig):
    targets = load_config(rig.operator.environ).targets()
    with lock_targets(targets[:1], holder="backup_automem.py, process 1 on host"):
        process = rig.start()
        while rig.operator.collections() == [rig.operator.collection] or not (
            rig.journal() and rig.journal().fact("proved")
        ):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        assert process.poll() is None
        assert not rig.journal().has_reached(DELETING)
    errors = finished(process)
    assert errors.count("waiting until it has ended") == 1
    assert "(backup_automem.py, process 1 on host)" in errors


def test_a_backup_during_a_cutover_names_the_run_and_not_the_missing_collection(rig):
    targets = load_config(rig.operator.environ).targets()
    live = f"{rig.operator.servers.qdrant_url}/collections/{rig.operator.collection}"
    with lock_targets(targets[1:], holder="reembed_embeddings.py, process 1 on host"):
        assert requests.delete(live, timeout=30).ok
        refused = rig.operator.run("backup_automem", expect=5)
        assert "(reembed_embeddings.py, process 1 on host)" in refused.err
        assert "has no collection" in rig.operator.run("backup_automem", "--dry-run", expect=1).err


@pytest.mark.matrix
def test_twenty_backups_at_random_moments(rig):
    chance, taken = random.Random(20), 0
    rig.words = (*COMMAND, "--fresh")
    while taken < BACKUPS:
        process = start_embedding(rig)
        while process.poll() is None:
            time.sleep(chance.uniform(0, 1))
            done = rig.operator.run("backup_automem", expect=None)
            taken += done.code == 0
            if done.code:  # by the cutover alone, however long it takes
                assert done.code == 5, done.err
                assert "another run is working on" in done.err
                assert rig.journal().has_reached(STAGED)
        finished(process)
        rig.operator.servers.openai.clear_faults()
        rig.words = COMMAND
        rig.finish()
        rig.words = (*COMMAND, "--fresh")
        rig.turn()
    rig.operator.run("backup_automem", "--check", "all")
