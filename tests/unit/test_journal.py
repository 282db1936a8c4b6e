"""The journal: an entry is on disk before its step, and readable after any crash."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lib.errors import BadFile, UsageProblem
from lib.journal import journals, open_journals, read_journal, start_journal, unfinished
from tests.ordinary_user import closed

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["falkordb 127.0.0.1:6379 g", "qdrant 127.0.0.1:6333 c"]


@pytest.fixture
def journal(tmp_path):
    return start_journal(tmp_path, "reembed", TARGETS, spec={"size": 3})


def test_an_entry_is_on_the_disk_when_append_returns(journal, monkeypatch):
    """The synced file holds the entry by then: an announced step survives a power cut."""
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, os.pread(descriptor, 1 << 20, 0)))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    journal.append("deleting", undo="first")
    inode, content = synced[-1]
    assert inode == journal.path.stat().st_ino
    assert json.loads(content.splitlines()[-1])["phase"] == "deleting"


def test_what_is_written_is_what_is_read(journal):
    journal.append("deleting", undo="first", name="c__next")
    journal.append("deleted", name=None, text="\u2603 \U0001f600 \u2028 line")
    read = read_journal(journal.path)
    assert read.entries == journal.entries
    assert (read.command, read.targets, read.phase) == ("reembed", TARGETS, "deleted")
    assert read.run_id == journal.run_id
    assert read.run_id in journal.path.name
    assert read.fact("spec") == {"size": 3}
    assert read.fact("name") is None  # the latest value, though an earlier one was set
    assert read.fact("nothing") is None
    assert read.undo == "first"
    assert read.has_reached("deleting")
    assert not read.has_reached("created")


def test_it_is_private_and_one_line_an_entry(journal):
    journal.append("deleting", text="two\nlines")
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    lines = journal.path.read_text().split("\n")
    assert [json.loads(line)["phase"] for line in lines[:-1]] == ["started", "deleting"]
    assert lines[-1] == ""


def test_every_cut_of_the_last_line_leaves_a_journal_that_continues(journal):
    journal.append("deleting", name="c__next")
    whole = journal.path.read_bytes()
    end_of_first = whole.index(b"\n") + 1
    for cut in range(end_of_first, len(whole)):
        journal.path.write_bytes(whole[:cut])
        torn = read_journal(journal.path)
        complete = cut == len(whole) - 1  # only the newline is missing
        assert torn.phase == ("deleting" if complete else "started"), cut
        torn.append("again")
        after = read_journal(journal.path)
        assert [entry["phase"] for entry in after.entries[-2:]][-1] == "again"
        assert after.has_reached("deleting") == complete
        assert after.run_id == journal.run_id


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b'{"at": "x", "pha',
        b"not json\n",
        b"[1]\n",
        b'{"phase": "started"}\n',
        b"\xff\xfe\n",
        b'"phase"\n',
    ],
)
def test_an_empty_torn_or_foreign_file_is_no_journal(tmp_path, content):
    path = tmp_path / "journal_20260101_000000_ab_reembed.jsonl"
    path.write_bytes(content)
    assert read_journal(path) is None
    assert open_journals(tmp_path) == []


def test_open_journals_are_those_that_never_ended_oldest_first(tmp_path):
    made = [start_journal(tmp_path, command, TARGETS) for command in ("backup", "restore", "reembed")]
    for index, journal in enumerate(made):
        renamed = tmp_path / f"journal_2026010{index + 1}_000000_ab_{journal.command}.jsonl"
        journal.path.rename(renamed)
        journal.path = renamed
    made[1].close("done")
    assert [one.command for one in open_journals(tmp_path)] == ["backup", "reembed"]
    assert read_journal(made[1].path).fact("outcome") == "done"
    assert open_journals(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "others", [[], ["20991231_235958_ffff"], ["99991231_235959_ffff", "20260230_000000_0000", "x"]]
)
def test_a_later_run_sorts_later_whatever_the_clock_says(tmp_path, others):
    """The last migration is found by the names; a clock that was ahead, or two runs in a second, change no order."""
    for one in others:
        (tmp_path / f"journal_{one}_reembed.jsonl").touch()
    ids = [start_journal(tmp_path, "reembed", ["g", "c"]).run_id for _ in range(20)]
    assert ids == sorted(ids)
    assert all(one[:8] != "99991231" for one in ids)
    assert ids[0] > max((one for one in others if one.startswith("2099")), default="")


def test_two_runs_in_one_second_have_two_journals(tmp_path):
    paths = {start_journal(tmp_path, "backup", TARGETS).path for _ in range(20)}
    assert len(paths) == 20


def test_kill_9_loses_no_announced_phase(tmp_path):
    code = """
import sys
from pathlib import Path
from lib.errors import BadFile
from lib.journal import start_journal
journal = start_journal(Path(sys.argv[1]), "reembed", ["t"])
for number in range(10**6):
    journal.append(f"phase {number}")
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    last_line = [process.stdout.readline() for _ in range(50)][-1]
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate()
    last = int((last_line + rest).split()[-1])
    (journal,) = open_journals(tmp_path)
    assert journal.has_reached(f"phase {last}")
    journal.append("goes on")
    assert read_journal(journal.path).phase == "goes on"


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("side", "c"),
        ("side", "another__check_20260101_000000_abcd"),
        ("staged_collection", "c__next/../c"),
        ("temporary_collection", "c"),
        ("throwaway_graph", "g"),
        ("safety_graph", "g__pre_x; DROP"),
        ("collection", "another"),
        ("stamp", "*"),
        ("manifest", "../backup_20260101_000000.json"),
        ("snapshot", "../../other/snapshots/s"),
    ],
)
def test_a_name_that_no_run_can_have_written_is_refused(journal, fact, value):
    """A journal names what is removed from the servers: one from elsewhere removes nothing."""
    journal.append("announced", **{fact: value})
    with pytest.raises(BadFile, match="was not written by these scripts") as caught:
        open_journals(journal.path.parent)
    assert str(journal.path) in caught.value.next_step


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("side", "c__check_20260101_000000_abcd"),
        ("staged_collection", "c__next"),
        ("collection", "c__next"),
        ("temporary_collection", "c__try_0123456789abcdef"),
        ("throwaway_graph", "g__try_20260101_000000_abcd"),
        ("safety_graph", "{g}__pre_20260101_000000_abcd"),
        ("stamp", "20260101_000000"),
        ("manifest", "backup_20260101_000000.json"),
        ("snapshot", "c-1-2026-01-01-00-00-00.snapshot"),
        ("stamp", {"model": "m", "size": 3}),
    ],
)
def test_what_a_run_writes_is_read(journal, fact, value):
    journal.append("announced", **{fact: value})
    assert read_journal(journal.path).fact(fact) == value


def test_a_run_id_from_elsewhere_is_refused(journal):
    text = journal.path.read_text().replace(journal.run_id, "../../home/x")
    journal.path.write_text(text)
    with pytest.raises(BadFile, match="as its run id"):
        read_journal(journal.path)


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(tmp_path):
    """Every command looks for unfinished runs first; `--list` reported that there is no backup, with exit code 0."""
    folder = tmp_path / "backups"
    assert unfinished(folder) == ([], [])
    folder.mkdir()
    with closed(folder), pytest.raises(UsageProblem, match=f"cannot read the folder {folder}: ") as refused:
        unfinished(folder)
    assert f"chown -R $(id -un) {folder}" in refused.value.next_step


@pytest.mark.parametrize("end", [" (conflicted copy 2026-11-29).jsonl", ".sync-conflict-20261129-ABC.jsonl"])
def test_an_older_copy_of_a_journal_is_no_run(journal, end):
    """A folder that synchronizes itself leaves such copies: a finished run was resumed, and `--abort` refused it."""
    copy = journal.path.with_name(journal.path.stem + end)
    journal.append("deleting the live collection", undo="first")
    copy.write_bytes(journal.path.read_bytes())
    journal.close("done")
    assert open_journals(journal.folder) == []
    assert [one.path for one in journals(journal.folder)] == [journal.path]
    assert [one.path for one in journals(journal.folder, "reembed")] == [journal.path]


def test_the_longest_copy_of_a_journal_counts_also_under_another_name(journal):
    """It may be the older state that kept the name."""
    copy = journal.path.with_name(f"{journal.path.stem} (conflicted copy).jsonl")
    older = journal.path.read_bytes()
    journal.append("deleting the live collection", undo="first")
    copy.write_bytes(journal.path.read_bytes())
    assert [one.path for one in open_journals(journal.folder)] == [journal.path]
    journal.path.write_bytes(older)
    assert [one.path for one in open_journals(journal.folder)] == [copy]
    assert [one.path for one in journals(journal.folder, "reembed")] == [copy]


def test_the_undo_names_the_backup_where_the_folder_was_moved_to(tmp_path, journal):
    archive, manifest = "qdrant/qdrant_snapshot_20261126_220840.tar.gz", "backup_20261126_220840.json"
    lines = [f"  python scripts/restore_from_backup.py '/old place/{one}'" for one in (archive, manifest)]
    lines += ["  export VECTOR_SIZE=768", "  # it's no command"]
    journal.append("deleting the live collection", undo="\n".join(lines))
    assert journal.undo.splitlines() == lines  # neither exists: as it was written
    (tmp_path / "qdrant").mkdir()
    (tmp_path / archive).touch()
    (tmp_path / manifest).touch()
    here = [f"  python scripts/restore_from_backup.py {tmp_path}/{one}" for one in (archive, manifest)]
    assert journal.undo.splitlines() == [*here, *lines[2:]]
