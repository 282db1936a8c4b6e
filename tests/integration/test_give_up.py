"""Unfinished runs that are given up or that clean up after themselves, and what a waiting run reports."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import requests

from lib.backup.phases import DELETING
from lib.console import Console
from lib.journal import open_journals, read_journal
from tests.faulty_proxy import Fault, FaultyProxy, answer
from tests.kill_support import ctrl_c
from tests.matrix import matrix
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, Operator
from tests.reembed_support import make_ready, points_of
from tests.restore_support import TIMEOUT, assert_tidy
from tests.script_process import ROOT

pytestmark = pytest.mark.qdrant


@pytest.fixture
def staged(operator):
    """A migration that stopped when the new collection was built."""
    make_ready(operator)
    operator.run("reembed_embeddings", "--no-switch", "--batch-size", "50")
    return operator


def notice(operator) -> str:
    return operator.run("backup_automem", "--list").err


def interrupt(*_args, **_more):
    raise KeyboardInterrupt


def test_the_notice_names_the_arguments_and_abort_ends_it(staged):
    before = points_of(staged)
    output = notice(staged)
    assert f"{ROOT}/scripts/reembed_embeddings.py --batch-size 50\n" in output  # all that --no-switch asks for is done
    assert f"{ROOT}/scripts/reembed_embeddings.py --abort\n" in output
    assert staged.collections() == [staged.collection, f"{staged.collection}__next"]
    paid = staged.servers.openai.stats()["texts"]
    done = staged.run("reembed_embeddings", "--abort", "--json").json
    assert done["removed"] == [f"collection {staged.collection}__next"]
    assert any(f"{len(before)} points of 48d" in one for one in done["left"])
    assert staged.collections() == [staged.collection]
    assert open_journals(staged.backups) == []
    assert "unfinished" not in notice(staged)
    assert "nothing to abort" in staged.run("reembed_embeddings", "--abort").out
    staged.run("reembed_embeddings")
    assert staged.servers.openai.stats()["texts"] == paid  # what was paid for was not discarded


def test_fresh_after_an_abort_pays_again(operator):
    """The aborted run's mark in the cache would make `--fresh` use its vectors without a word."""
    make_ready(operator)
    first = operator.run("reembed_embeddings", "--fresh", "--no-switch", "--json").json["bought"]["texts"]
    operator.run("reembed_embeddings", "--abort")
    assert first == operator.run("reembed_embeddings", "--fresh", "--json").json["bought"]["texts"] > 0


def test_no_switch_without_anything_to_stage_leaves_no_run(operator):
    """Neither a journal, which every command names, nor the mark of `--fresh`. What was paid is reported."""
    operator.load(60)
    operator.run("reembed_embeddings", "--no-switch")
    assert open_journals(operator.backups) == []
    for _ in range(2):
        done = operator.run("reembed_embeddings", "--fresh", "--no-switch")
        assert "nothing was staged. Paid for" in done.out
    assert open_journals(operator.backups) == []
    operator.call("DELETE", "")
    operator.servers.openai.reset()
    operator.cypher("MATCH (m:Memory) WITH m LIMIT 1 SET m.content = 'not paid for yet'")
    assert "nothing to wait for" in operator.run("reembed_embeddings", "--no-switch", expect=2).err
    assert operator.servers.openai.stats()["texts"] == 0
    assert open_journals(operator.backups) == []


PLACES = {"after staging": 0, "after live payloads read": 1, "before staged and proved": 1}


@pytest.mark.matrix
@pytest.mark.parametrize(("place", "staged"), matrix(PLACES.items(), ("before staged and proved", 1)))
def test_a_migration_ended_by_ctrl_c_before_the_delete_is_given_up(operator, place, staged):
    """`staged`: how many staged collections there are by then."""
    make_ready(operator)
    before, settings = operator.state(), operator.info()["config"]
    ctrl_c(operator, place, "reembed_embeddings")
    made = [f"{operator.collection}__next"] * staged
    assert operator.collections() == [operator.collection, *made]
    paid = operator.servers.openai.stats()["texts"]
    done = operator.run("reembed_embeddings", "--abort", "--json").json
    assert done["removed"] == [f"collection {one}" for one in made]
    assert operator.collections() == [operator.collection]
    assert (operator.state(), operator.info()["config"]) == (before, settings)
    assert open_journals(operator.backups) == []
    assert "unfinished" not in operator.run("backup_automem", "--only", "qdrant").err
    assert operator.run("reembed_embeddings", "--dry-run", "--json").json["plan"]["texts"] == 0
    operator.run("reembed_embeddings")
    assert operator.servers.openai.stats()["texts"] == paid


@pytest.mark.parametrize("place", matrix(["called graph accepted", "called copy uploaded"], "called copy uploaded"))
def test_a_restore_ended_by_ctrl_c_during_its_trial_is_given_up(operator, place):
    operator.load(60)
    operator.run("backup_automem")
    operator.cypher("MATCH (m:Memory) WITH m LIMIT 1 SET m.content = 'newer than the backup'")
    before, settings, files = operator.state(), operator.info()["config"], set(operator.backups.rglob("*"))
    ctrl_c(operator, place, "restore_from_backup", "latest")
    operator.run("restore_from_backup", "--abort")
    assert (operator.state(), operator.info()["config"]) == (before, settings)
    assert operator.collections() == [operator.collection]
    assert operator.graphs() == [operator.graph]
    assert open_journals(operator.backups) == []
    assert files <= set(operator.backups.rglob("*"))
    assert "unfinished" not in operator.run("backup_automem", "--only", "qdrant").err


def test_a_run_that_deleted_the_collection_is_not_given_up_while_none_is_in_its_place(staged):
    (journal,) = open_journals(staged.backups)
    journal.append(DELETING, undo="  the way back", settings=staged.info())
    before = points_of(staged)
    staged.call("DELETE", "")
    refused = staged.run("reembed_embeddings", "--abort", expect=2)
    assert "no complete one has replaced it: nothing was removed" in refused.err
    assert "the way back" in refused.err
    assert staged.collections() == [f"{staged.collection}__next"]
    assert [one.run_id for one in open_journals(staged.backups)] == [journal.run_id]
    env = {"VECTOR_SIZE": "48", "EMBEDDING_MODEL": "text-embedding-3-small"}
    staged.run("restore_from_backup", staged.archive(), env=env)
    assert points_of(staged).keys() == before.keys()


def test_the_collection_that_a_run_deleted_is_found_if_its_name_has_a_blank(operator):
    """Not the live one whose name is the last word: it would pass for the complete collection, and the run be closed."""
    operator.load()
    other = replace(operator, graph=f"{operator.graph} two", collection=f"{operator.collection} {operator.collection}")
    make_ready(other)
    other.run("reembed_embeddings", "--no-switch")
    (journal,) = open_journals(other.backups)
    journal.append(DELETING, undo="  the way back", settings=other.info())
    other.call("DELETE", "")
    refused = other.run("reembed_embeddings", "--abort", expect=2)
    assert f"deleted the collection '{other.collection}', and no complete one has replaced it" in refused.err
    assert [one.run_id for one in open_journals(other.backups)] == [journal.run_id]


def test_a_restore_removes_what_the_reembed_that_it_supersedes_had_staged(staged):
    """Else the next re-embed refuses `__next`: no open journal names it any more."""
    paid = staged.servers.openai.stats()["texts"]
    env = {"VECTOR_SIZE": "48", "EMBEDDING_MODEL": "text-embedding-3-small"}
    left = staged.backups / "embeddings" / f"{staged.collection}__next.snapshot.partial"
    left.write_bytes(b"sent when the run was killed")
    done = staged.run("restore_from_backup", staged.archive(), env=env)
    assert f"removed collection {staged.collection}__next, which an unfinished re-embed had staged" in done.err
    assert staged.collections() == [staged.collection]
    assert open_journals(staged.backups) == []
    assert not left.exists()
    staged.run("reembed_embeddings")
    assert staged.servers.openai.stats()["texts"] == paid


@pytest.mark.parametrize("how", matrix(["the next backup", "--abort"], "--abort"))
def test_a_trial_restore_that_was_interrupted_leaves_nothing(operator, monkeypatch, how):
    operator.load(60)
    operator.run("backup_automem")
    state, archive = operator.state(), operator.archive()  # not that of the safety backup, which may be complete
    with monkeypatch.context() as patched:
        patched.setattr("lib.restore.collection.verify_restored", interrupt)
        operator.run("restore_from_backup", archive, expect=130)
    assert operator.collections() == [operator.collection]
    assert f"restore_from_backup.py {archive}\n" in notice(operator)
    words = ("restore_from_backup", "--abort") if how == "--abort" else ("backup_automem", "--only", "qdrant")
    operator.run(*words)
    assert "unfinished" not in notice(operator)
    assert open_journals(operator.backups) == []
    assert operator.state() == state


def test_an_interrupted_trial_restore_of_the_graph_closes_its_journal(operator, monkeypatch):
    operator.load(60)
    operator.run("backup_automem")
    state = operator.state()
    with monkeypatch.context() as patched:
        patched.setattr("lib.restore.graph.verify_acceptance", interrupt)
        operator.run("restore_from_backup", operator.rdb(), expect=130)
    assert "unfinished" not in notice(operator)
    assert operator.graphs() == [operator.graph]
    assert operator.state() == state


def test_abort_takes_no_file_and_no_dry_run(operator):
    for words in (["--abort", "latest"], ["--abort", "--dry-run"]):
        operator.run("restore_from_backup", *words, expect=2)


def test_a_manual_backup_of_a_real_redis_cli_is_restored(operator):
    """MIGRATION's own block, with the 40 bytes that end a diskless sync."""
    if not shutil.which("redis-cli"):
        pytest.skip("there is no redis-cli here (Debian: redis-tools)")
    operator.load(60)
    before = operator.state()
    port = operator.servers.falkordb.port
    file = operator.folder / "by_hand.rdb"
    with file.open("wb") as stream:
        subprocess.run(["redis-cli", "-p", str(port), "--rdb", "-"], stdout=stream, check=True, timeout=60)
    operator.cypher("MATCH (m:Memory) WITH m LIMIT 5 DETACH DELETE m")
    operator.run("restore_from_backup", str(file))
    assert operator.state() == before


@pytest.mark.parametrize("damage", ["none", "cut", "bit", "short mark", "other mark"])
def test_the_mark_of_a_diskless_sync_hides_no_damage(operator, damage):
    operator.load(30)
    operator.run("backup_automem", "--only", "falkordb")
    whole = (operator.folder / "backups/falkordb").glob("*.rdb").__next__().read_bytes()
    mark = b"0123456789abcdef" * 2 + b"01234567"
    content = {
        "none": whole + mark,
        "cut": whole[:-100] + mark,
        "bit": whole[:500] + bytes([whole[500] ^ 1]) + whole[501:] + mark,
        "short mark": whole + mark[:-1],
        "other mark": whole + mark[:-1] + b"Z",
    }[damage]
    file = operator.folder / "by_hand.rdb"
    file.write_bytes(content)
    operator.run("restore_from_backup", str(file), "--dry-run", expect=0 if damage == "none" else 4)


@pytest.mark.matrix
def test_a_rate_limit_reports_when_the_next_try_is(operator):
    make_ready(operator)
    operator.servers.openai.fault(status=429, retry_after=3, times=1, after=1)
    output = operator.run("reembed_embeddings", "--dry-run", "--batch-size", "5").err
    operator.servers.openai.clear_faults()
    operator.servers.openai.fault(status=429, retry_after=3, times=1)
    output += operator.run("reembed_embeddings", "--limit", "20", "--batch-size", "5").err
    assert re.search(r"embed: rate limited, next try in [123] s", output)


def test_a_rate_limit_is_reported_also_while_a_single_request_waits(operator):
    """The first step of the guide, and `--fresh`, printed nothing for up to ten minutes."""
    make_ready(operator)
    for words in (("--dry-run",), ("--fresh", "--no-switch")):
        operator.servers.openai.clear_faults()
        operator.servers.openai.fault(status=429, retry_after=3, times=1)
        result = operator.run("reembed_embeddings", *words)
        assert re.search(r"embed: rate limited, next try in [123] s", result.err), words


def test_a_quiet_run_reports_it_every_five_minutes(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    quiet, loud = Console(quiet=True), Console()
    for _ in range(61):  # ten minutes
        quiet.waiting("quiet waits")
        loud.waiting("loud waits")
        now += 10.0
    output = capsys.readouterr().err.splitlines()
    assert output.count("quiet waits") == 3
    assert output.count("loud waits") == 61


@pytest.mark.parametrize(
    ("total", "steps", "shown"),
    [(None, [], "0 points"), (0, [], "0 points"), (5, [2, 3], "5/5 points"), (None, [7], "7 points")],
)
def test_a_bar_shows_what_was_done_and_no_invented_total(total, steps, shown):
    from lib import console as live_bars

    with live_bars.bar("stage", total, lambda count: f"{count:.0f}", "points") as advance:
        for step in steps:
            advance(step)
        display = live_bars._OPEN[0]
    assert display.columns[2].render(display.tasks[0]).plain.startswith(shown)


def test_a_damaged_journal_is_named_by_every_command(operator):
    """Its first line is gone: nothing records which run it was, or that it is unfinished."""
    operator.backups.mkdir()
    file = operator.backups / "journal_20260101_000000_abcd_reembed.jsonl"
    file.write_bytes(b"")  # a crash before the first entry: nothing was made
    assert "damaged" not in notice(operator)
    file.write_bytes(bytes(80) + b'\n{"phase": "deleting the live collection"}\n')
    assert f"{file} is damaged: its run may be unfinished" in notice(operator)


def test_another_users_journal_is_a_refusal_with_a_remedy(operator, monkeypatch):
    operator.backups.mkdir()
    file = operator.backups / "journal_20260101_000000_abcd_reembed.jsonl"
    file.write_text("{}")
    real = os.open

    def refuse(path, *more, **options):
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)  # root may read everything
    refused = operator.run("backup_automem", "--list", expect=2)
    assert f"cannot write to the folder {operator.backups}: {file.name}: Permission denied" in refused.err
    assert f"sudo chown -R $(id -un) {operator.backups}" in refused.err


@pytest.mark.matrix
def test_verify_counts_each_difference_once(operator):
    operator.load(60)
    operator.export(VECTOR_SIZE=NEW_SIZE, EMBEDDING_MODEL=LARGE)
    operator.run("backup_automem")
    operator.run("reembed_embeddings")
    plain = [one for one in points_of(operator) if isinstance(one, str)]
    query = "MATCH (m:Memory {id: $id}) SET m.content = $text, m.updated_at = '2099-01-01T00:00:00+00:00'"
    for one in plain[:3]:
        operator.cypher(query, id=one, text=f"newer {one}")
    body = {"points": [plain[5]], "payload": {"content": "a wrong content"}}
    operator.call("POST", "/points/payload?wait=true", body)
    checks = {one["name"]: one for one in operator.run("verify_migration", "--json", expect=4).json["checks"]}
    assert checks["content"]["detail"].startswith("1 points hold another content")
    assert plain[5] in checks["content"]["detail"]


def test_verify_reports_what_only_missing_will_renew(operator):
    operator.load(60)
    operator.run("reembed_embeddings", "--only-missing")
    ids = [one for one in points_of(operator) if isinstance(one, str)][:7]
    for one in ids:
        operator.cypher("MATCH (m:Memory {id: $id}) SET m.last_accessed = '2031-01-01T00:00:00+00:00'", id=one)
    # Consolidation, whose scores AutoMem writes into the points later or never, and drops when it updates a memory.
    operator.cypher("MATCH (m:Memory) WHERE m.id IN $ids SET m.relevance_score = 0.25", ids=ids[5:])
    checks = {one["name"]: one for one in operator.run("verify_migration", "--json", expect=None).json["checks"]}
    assert checks["payloads"]["status"] == "passed"
    moving = int(re.search(r"relevance_score of (\d+)", checks["payloads"]["detail"])[1])
    renewed = operator.run("reembed_embeddings", "--only-missing", "--json").json["payloads"]
    assert moving == renewed >= 1


def test_an_error_of_automem_leaves_the_other_checks(operator, monkeypatch):
    from lib.errors import StoreFailed

    def fail(_api):
        raise StoreFailed("AutoMem answered 500 to /health", next_step="look at its log")

    operator.load(60)
    monkeypatch.setattr("lib.verify.checks.ask_health", fail)
    checks = operator.run("verify_migration", "--json", expect=4).json["checks"]
    assert [one["name"] for one in checks][:3] == ["size and distance", "status", "model stamp"]
    assert checks[-1] == {
        "name": "recall",
        "status": "FAILED",
        "detail": "AutoMem answered 500 to /health",
        "remedy": "look at its log",
    }


@pytest.mark.matrix
def test_a_bug_in_the_recall_comparison_is_no_server_that_cannot_be_searched(operator, monkeypatch):
    from lib.reembed import quality as neighbours

    def bug(*_args):
        raise KeyError("a bug")

    make_ready(operator)
    monkeypatch.setattr("lib.reembed.quality.search", bug)
    with pytest.raises(KeyError, match="a bug"):
        operator.run("reembed_embeddings")
    assert (LookupError, TypeError) not in neighbours._FAILURES
    assert operator.info()["config"]["params"]["vectors"]["size"] == 48  # the live one was not touched


def test_that_other_clients_cannot_be_listed_is_reported(operator, monkeypatch):
    from lib.errors import AccessRefused

    def refuse(_conn):
        raise AccessRefused("FalkorDB: NOPERM this user has no permissions to run the 'client|list' command")

    operator.load(30)
    operator.run("backup_automem")
    monkeypatch.setattr("lib.restore.preflight.other_clients", refuse)
    output = operator.run("restore_from_backup", operator.rdb(), "--dry-run").err
    assert "warning: the other clients of FalkorDB cannot be listed" in output
    assert "NOPERM" in output


def test_the_journal_records_how_the_run_was_started(staged):
    (path,) = staged.backups.glob("journal_*_reembed.jsonl")
    journal = read_journal(path)
    assert journal is not None
    assert json.loads(path.read_text().splitlines()[0])["again"] == journal.fact("again")
    assert journal.fact("again") == "python scripts/reembed_embeddings.py --no-switch --batch-size 50"


@contextmanager
def refused_once(operator: Operator) -> Iterator[None]:
    """The server refuses once to delete a snapshot of a temporary collection."""
    deletion = rb"^DELETE /collections/\S+(__try_|__next)\S*/snapshots/"
    fault = Fault(deletion, answer=answer(500, '{"status": {"error": "Service internal error: try again"}}'))
    with FaultyProxy(int(operator.servers.qdrant_url.rpartition(":")[2]), fault) as proxy:
        operator.export(QDRANT_URL=f"http://127.0.0.1:{proxy.port}")
        yield
    del operator.exports["QDRANT_URL"]


def assert_no_files(operator: Operator, name: str) -> None:
    """The server has no snapshot of this collection. It lists those of a deleted one when the name exists again."""
    url = f"{operator.servers.qdrant_url}/collections/{name}"
    body = {"vectors": {"size": 1, "distance": "Dot"}}
    requests.put(url, json=body, timeout=TIMEOUT).raise_for_status()
    try:
        assert requests.get(f"{url}/snapshots", timeout=TIMEOUT).json()["result"] == []
    finally:
        requests.delete(url, timeout=TIMEOUT).raise_for_status()


@pytest.mark.parametrize("command", ["restore", "reembed"])
def test_a_snapshot_that_the_server_does_not_delete_is_reported_and_removed_by_the_same_command(operator, command):
    """Without its collection no request lists or deletes it any more: it would stay on the server's disk."""
    with refused_once(operator):
        make_ready(operator)
        words = ("reembed_embeddings",)
        if command == "restore":
            operator.export(VECTOR_SIZE=OLD_SIZE)
            words = ("restore_from_backup", operator.archive())
        failed = operator.run(*words, expect=1)
        assert "try again" in failed.err
        assert "to resume:" in failed.err
        (left,) = set(operator.collections()) - {operator.collection}
        done = operator.state()
        operator.run(*words)
        assert operator.state() == done
    assert_tidy(operator)
    assert_no_files(operator, left)


def test_an_abort_leaves_no_snapshot_on_the_server(operator):
    with refused_once(operator):
        make_ready(operator)
        operator.run("reembed_embeddings", "--no-switch")
        staged = f"{operator.collection}__next"
        url = f"{operator.servers.qdrant_url}/collections/{staged}/snapshots"
        requests.post(url, timeout=TIMEOUT).raise_for_status()
        assert "try again" in operator.run("reembed_embeddings", "--abort", expect=1).err
        done = operator.run("reembed_embeddings", "--abort", "--json").json
        assert done["removed"] == [f"collection {staged}"]
    assert_tidy(operator)
    assert_no_files(operator, staged)


@pytest.mark.parametrize("after_the_delete", [False, True])
def test_a_collection_that_cannot_be_read_is_not_taken_for_a_missing_one(operator, after_the_delete):
    """It would be restored from a backup for nothing; a complete one would be replaced by an older one."""
    of_the_live_one = rb"^GET /collections/c_[0-9a-f]+ HTTP"
    fault = Fault(of_the_live_one, times=0, answer=answer(500, '{"status": {"error": "Service internal error"}}'))
    with FaultyProxy(int(operator.servers.qdrant_url.rpartition(":")[2]), fault) as proxy:
        operator.export(QDRANT_URL=f"http://127.0.0.1:{proxy.port}")
        make_ready(operator)
        operator.run("reembed_embeddings", "--no-switch")
        (journal,) = open_journals(operator.backups)
        if after_the_delete:
            journal.append(DELETING, undo="  the way back", settings=operator.info())
        fault.times = None
        result = operator.run("reembed_embeddings", "--abort", expect=int(after_the_delete))
        assert "Service internal error" in result.err + result.out
        assert "there is no collection" not in result.out
        assert "no complete one" not in result.err
        assert bool(open_journals(operator.backups)) is after_the_delete
        assert (f"removed: collection {operator.collection}__next" in result.out) is not after_the_delete
