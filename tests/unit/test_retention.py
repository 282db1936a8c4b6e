"""Which sets a cleanup deletes, which it protects, and which one `latest` is."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from datetime import datetime, timedelta, timezone

import pytest

from lib.backup.catalog import backup_sets, latest
from lib.backup.copies import catalog_at
from lib.backup.manifest import SAFETY, UNVERIFIED, Drift, read_manifest, sealed, write_manifest
from lib.backup.retention import plan_cleanup
from lib.errors import MissingData, UsageProblem
from lib.journal import start_journal
from tests.unit.test_manifest import COLLECTION, GRAPH, HERE, make, stamp_of

TARGETS = ["t"]
GRAPH_HALF, COLLECTION_HALF = {"collection": None}, {"graph": None}


def name(number: int) -> str:
    return f"backup_{stamp_of(number)}.json"


def safety(folder, number: int, **components):
    made = make(folder, number, **components)
    return write_manifest(folder, dataclasses.replace(made, purpose=SAFETY))


def plan(folder, keep: int, targets=TARGETS):
    return plan_cleanup(catalog_at("", folder), {"--keep": keep}, HERE, folder, targets)


def deleted(folder, keep: int, targets=TARGETS) -> list[int]:
    """The numbers of the sets that a cleanup deletes."""
    return [int(one.stamp[-2:]) for one in plan(folder, keep, targets).delete]


def age(journal, days: float) -> None:
    """Move the end of the run back by so long."""
    for entry in journal.entries:
        entry["at"] = (datetime.now(timezone.utc) - timedelta(days=days)).isoformat()
    journal.path.write_text("".join(json.dumps(entry) + "\n" for entry in journal.entries))


def test_cleanup_keeps_the_newest_ones(tmp_path):
    for number in range(1, 6):
        make(tmp_path, number)
    assert deleted(tmp_path, 2) == [3, 2, 1]
    assert deleted(tmp_path, 9) == []
    for keep in (0, -1):
        with pytest.raises(UsageProblem, match="--keep must be at least 1"):
            plan(tmp_path, keep)


def test_sets_from_after_a_loss_push_none_out_and_are_not_the_latest(tmp_path):
    lost = dataclasses.replace(GRAPH, nodes=0, labels={})
    make(tmp_path, 1)
    make(tmp_path, 2)
    for number in (3, 4, 5):
        made = make(tmp_path, number, graph=lost)
        write_manifest(tmp_path, dataclasses.replace(made, drift=Drift(0, 7)))
    assert deleted(tmp_path, 1) == [1]
    assert deleted(tmp_path, 2) == []
    verdicts = {one.stamp[-2:]: reason for one, reason in plan(tmp_path, 1).verdicts}
    assert verdicts["05"] == "one of its stores is empty, but among the newest sets"
    with pytest.raises(UsageProblem, match="taken after a loss: graph 'g' holds no memory"):
        latest(tmp_path, HERE)


def test_each_kind_is_counted_apart(tmp_path):
    for number in (1, 2, 3):
        make(tmp_path, number)
    for number in (4, 5, 6):
        make(tmp_path, number, **GRAPH_HALF)
    for number in (7, 8, 9):
        make(tmp_path, number, **COLLECTION_HALF)
    for number in (10, 11, 12):
        safety(tmp_path, number)
    safety(tmp_path, 13, **COLLECTION_HALF)
    assert deleted(tmp_path, 2) == [11, 10, 7, 4, 1]
    assert deleted(tmp_path, 3) == [10]


def test_cleanup_never_takes_the_newest_verified_of_a_kind(tmp_path):
    unverified = dataclasses.replace(COLLECTION, proof=UNVERIFIED)
    make(tmp_path, 1)
    make(tmp_path, 2)
    make(tmp_path, 3, **COLLECTION_HALF)
    broken = make(tmp_path, 4)
    broken.file_of(broken.graph).unlink()
    make(tmp_path, 5, collection=unverified)
    make(tmp_path, 6, collection=unverified)
    make(tmp_path, 7, graph=None, collection=unverified)
    assert deleted(tmp_path, 1) == [5, 4, 1]


def test_a_set_with_a_missing_file_does_not_count(tmp_path):
    for number in range(1, 7):
        made = make(tmp_path, number)
        if number in {3, 5, 6}:
            made.file_of(made.graph).unlink()
    assert deleted(tmp_path, 2) == [1]  # 4 and 2 are the two newest complete ones; newer ones stay
    assert deleted(tmp_path, 1) == [3, 2, 1]


def test_what_an_open_journal_names_is_protected_however_old(tmp_path):
    for number in range(1, 6):
        make(tmp_path, number)
    running = start_journal(tmp_path, "reembed", ["others"], files=[f"qdrant/c_{stamp_of(3)}.tar.gz"])
    running.append("guarded", manifest=name(1))
    running.append("switching", undo=f"  restore_from_backup.py '/a b/backup_{stamp_of(2)}.json'")
    assert deleted(tmp_path, 1) == [4]
    age(running, 400)
    planned = plan(tmp_path, 1)
    assert set(planned.protected) == {name(1), name(2), name(3)}
    assert set(planned.protected.values()) == {f"the unfinished run {running.run_id} needs it"}


@pytest.mark.parametrize("command", ["reembed", "restore"])
def test_what_an_undo_of_the_last_30_days_names_is_protected(tmp_path, command):
    for number in range(1, 5):
        make(tmp_path, number)
    done = start_journal(tmp_path, command, ["others"])
    for number in (1, 2):
        undo = f"  restore_from_backup.py /b/qdrant/c_{stamp_of(number)}.tar.gz\n  export X=1"
        done.append("deleting", undo=undo)
    done.close("done")
    age(done, 29.9)
    assert deleted(tmp_path, 1) == [3]
    assert f"run {done.run_id}" in plan(tmp_path, 1).protected[name(1)]
    age(done, 30.1)
    assert deleted(tmp_path, 1) == [3, 2, 1]


def test_what_a_report_of_the_last_30_days_names_is_protected(tmp_path):
    for number in range(1, 5):
        make(tmp_path, number)
    (tmp_path / "reports").mkdir()
    report = tmp_path / "reports" / "reembed_20260101_000000_ab12.json"
    undo = f"  python scripts/restore_from_backup.py /b/qdrant/qdrant_snapshot_{stamp_of(1)}.tar.gz"
    report.write_text(json.dumps({"backup": name(2), "undo": undo}, indent=2))
    assert deleted(tmp_path, 1) == [3]
    os.utime(report, (time.time() - 31 * 86400,) * 2)
    assert deleted(tmp_path, 1) == [3, 2, 1]


def test_the_last_reembeddings_set_stays_until_a_newer_verified_one_exists(tmp_path):
    for number in range(1, 5):
        make(tmp_path, number, **(GRAPH_HALF if number > 1 else {}))
    done = start_journal(tmp_path, "reembed", TARGETS)
    done.append("guarded", manifest=name(1))
    done.close("done")
    age(done, 100)
    make(tmp_path, 0)  # older
    assert deleted(tmp_path, 1) == [3, 2, 0]
    make(tmp_path, 5, **COLLECTION_HALF)
    make(tmp_path, 6, collection=dataclasses.replace(COLLECTION, proof=UNVERIFIED))
    assert name(1) not in {one.name for one in plan(tmp_path, 1).delete}  # still verified


def test_latest_is_the_newest_full_set(tmp_path):
    wanted = make(tmp_path, 1)
    make(tmp_path, 2, **GRAPH_HALF)
    make(tmp_path, 3, **COLLECTION_HALF)
    safety(tmp_path, 4, **COLLECTION_HALF)
    safety(tmp_path, 5)
    assert latest(tmp_path, HERE) == wanted


def test_what_a_damaged_journal_names_is_protected(tmp_path):
    """Its first line is gone: it cannot be read as a run, and may belong to an unfinished one."""
    for number in range(1, 6):
        make(tmp_path, number)
    journal = start_journal(tmp_path, "reembed", TARGETS)
    journal.append("live collection deleted", manifest=name(2), undo=f"restore qdrant_snapshot_{stamp_of(1)}.tar.gz")
    lines = journal.path.read_bytes().split(b"\n")
    journal.path.write_bytes(b"\n".join([bytes(len(lines[0])), *lines[1:]]))
    planned = plan(tmp_path, 1)
    assert [one.name for one in planned.delete] == [name(4), name(3)]
    assert set(planned.protected) == {name(2), name(1)}
    assert journal.path.name in planned.protected[name(2)]


def test_a_set_from_the_future_is_neither_latest_nor_counted(tmp_path):
    """The clock was wrong when the set was taken: it may be older than all others."""
    for number in (1, 2, 3):
        make(tmp_path, number)
    ahead = make(tmp_path, 9, created=(datetime.now(timezone.utc) + timedelta(hours=30)).isoformat())
    with pytest.raises(UsageProblem, match=rf"{ahead.name} is dated 30 hours in the future") as caught:
        latest(tmp_path, HERE)
    assert str(ahead.path) in caught.value.next_step
    assert deleted(tmp_path, 1) == [2, 1]
    assert deleted(tmp_path, 3) == []


def test_if_all_sets_are_from_the_future_none_is_deleted(tmp_path):
    """The clock of this machine is wrong."""
    created = (datetime.now(timezone.utc) + timedelta(days=400)).isoformat()
    for number in range(1, 6):
        make(tmp_path, number, created=created)
    assert deleted(tmp_path, 1) == []


def test_a_set_from_the_future_does_not_replace_the_undo_of_the_last_migration(tmp_path):
    named = make(tmp_path, 1)
    for number in (2, 3):
        make(tmp_path, number, **GRAPH_HALF)
    make(tmp_path, 9, created=(datetime.now(timezone.utc) + timedelta(hours=30)).isoformat())
    migrated = start_journal(tmp_path, "reembed", TARGETS, manifest=named.name)
    migrated.close("done")
    age(migrated, 40)
    make(tmp_path, 4, collection=dataclasses.replace(COLLECTION, proof=UNVERIFIED))
    assert 1 not in deleted(tmp_path, 1)


def test_without_a_full_set_latest_names_the_others(tmp_path):
    for number in range(1, 5):
        make(tmp_path, number, **GRAPH_HALF)
    safety(tmp_path, 5)
    with pytest.raises(MissingData, match="no full backup set in") as caught:
        latest(tmp_path, HERE)
    assert f"{name(5)} (safety copy), {name(4)} (graph only), {name(3)} (graph only) and 2 more" in str(caught.value)
    assert str(tmp_path / name(5)) in caught.value.next_step


def test_a_safety_copy_of_an_earlier_version_is_known_by_its_journal(tmp_path):
    """Its manifest does not record what it was taken for."""
    wanted, old = make(tmp_path, 1), make(tmp_path, 2)
    raw = json.loads(old.path.read_text())
    del raw["purpose"]
    old.path.write_text(json.dumps(sealed(raw)))
    assert read_manifest(old.path).kind == "full"
    restoring = start_journal(tmp_path, "restore", TARGETS)
    restoring.append("safety backup", manifest=old.name)
    restoring.close("done")
    assert latest(tmp_path, HERE) == wanted
    assert [one.kind for one in backup_sets(tmp_path)] == ["safety copy", "full"]
    assert [one.kind for one, _ in catalog_at("", tmp_path).sets] == ["safety copy", "full"]
    assert deleted(tmp_path, 1) == []


# --- rules by day, week and month; pins ---------------------------------------------------------------------------


def dated(folder, *times: str, **components) -> None:
    """A set of each of these times (UTC), such as `2026-01-05 12:00`."""
    for text in times:
        moment = datetime.fromisoformat(text).replace(tzinfo=timezone.utc)
        make(folder, 0, created=moment.isoformat(), stamp=f"{moment:%Y%m%d_%H%M%S}", **components)


def kept(folder, **rules: int) -> dict[str, str]:
    """The sets that a cleanup keeps, newest first, as `2026-01-05 12:00` or with their kind, and why."""
    flags = {f"--{name.replace('_', '-')}": count for name, count in rules.items()}
    planned = plan_cleanup(catalog_at("", folder), flags, HERE, folder, TARGETS)
    assert [one for one, verdict in planned.verdicts if verdict == "delete"] == planned.delete
    return {
        f"{one.created[:16].replace('T', ' ')}{'' if one.kind == 'full' else f' {one.kind}'}": verdict
        for one, verdict in planned.verdicts
        if verdict != "delete"
    }


def test_the_newest_of_each_of_the_last_days_that_have_a_set_is_kept(tmp_path):
    dated(tmp_path, "2026-01-01 02:00", "2026-01-01 23:59", "2026-01-04 00:00", "2026-01-04 05:00", "2026-01-09 12:00")
    assert kept(tmp_path, keep_daily=3) == dict.fromkeys(
        ["2026-01-09 12:00", "2026-01-04 05:00", "2026-01-01 23:59"], "--keep-daily 3"
    )
    assert list(kept(tmp_path, keep_daily=1)) == ["2026-01-09 12:00"]
    assert len(kept(tmp_path, keep_daily=99)) == 3


def test_weeks_are_those_of_iso_and_months_those_of_the_calendar(tmp_path):
    """29 December 2025 is in the first week of 2026; 28 December is in the last one of 2025."""
    times = ["2025-11-30 01:00", "2025-12-28 23:00", "2025-12-29 00:00", "2026-01-01 00:00", "2026-01-04 23:59"]
    dated(tmp_path, *times, "2026-01-05 00:00")
    weekly = ["2026-01-05 00:00", "2026-01-04 23:59", "2025-12-28 23:00"]
    assert list(kept(tmp_path, keep_weekly=3)) == weekly
    assert list(kept(tmp_path, keep_weekly=2)) == weekly[:2]
    assert list(kept(tmp_path, keep_monthly=2)) == ["2026-01-05 00:00", "2025-12-29 00:00"]
    assert kept(tmp_path, keep=2, keep_daily=1, keep_monthly=3) == {
        "2026-01-05 00:00": "--keep 2, --keep-daily 1, --keep-monthly 3",
        "2026-01-04 23:59": "--keep 2",
        "2025-12-29 00:00": "--keep-monthly 3",
        "2025-11-30 01:00": "--keep-monthly 3",
    }


def test_days_are_those_of_utc(tmp_path):
    make(tmp_path, 0, stamp="20260104_233000", created="2026-01-05T01:30:00+02:00")
    make(tmp_path, 0, stamp="20260105_003000", created="2026-01-05T00:30:00+00:00")
    assert len(kept(tmp_path, keep_daily=9)) == 2


def test_rules_count_each_kind_apart(tmp_path):
    dated(tmp_path, "2026-01-01 01:00", "2026-01-01 02:00")
    dated(tmp_path, "2026-01-01 03:00", "2026-01-01 04:00", **GRAPH_HALF)
    assert list(kept(tmp_path, keep_daily=5)) == ["2026-01-01 04:00 graph only", "2026-01-01 02:00"]


def test_a_set_with_a_missing_file_counts_for_no_rule(tmp_path):
    dated(tmp_path, "2026-01-01 01:00", "2026-01-02 01:00", "2026-01-02 02:00", "2026-01-03 01:00", "2026-01-03 02:00")
    sets = {one.created[:16]: one for one in backup_sets(tmp_path)}
    for time_ in ("2026-01-02T02:00", "2026-01-03T02:00"):
        sets[time_].file_of(sets[time_].collection).unlink()
    assert kept(tmp_path, keep_daily=2) == {
        "2026-01-03 02:00": "incomplete, but among the newest sets",
        "2026-01-03 01:00": "--keep-daily 2",
        "2026-01-02 01:00": "--keep-daily 2",
    }


def test_rules_by_period_never_take_the_newest_verified_set_nor_one_from_the_future(tmp_path):
    unverified = dataclasses.replace(COLLECTION, proof=UNVERIFIED)
    dated(tmp_path, "2026-01-01 01:00", "2026-01-02 01:00")
    dated(tmp_path, "2026-01-03 01:00", "2026-01-03 02:00", collection=unverified)
    ahead = (datetime.now(timezone.utc) + timedelta(days=9)).isoformat()[:16].replace("T", " ")
    dated(tmp_path, ahead)
    assert kept(tmp_path, keep_monthly=1) == {
        ahead: "dated in the future, so its age is not known",
        "2026-01-03 02:00": "--keep-monthly 1",
        "2026-01-02 01:00": "the newest verified set of its kind",
    }


def test_a_pinned_set_stays_until_its_pin_is_removed(tmp_path):
    for number in range(1, 5):
        make(tmp_path, number)
    pin = tmp_path / f"backup_{stamp_of(2)}.pinned"
    pin.touch()
    assert deleted(tmp_path, 1) == [3, 1]
    assert plan(tmp_path, 1).protected == {name(2): "pinned"}
    assert plan(tmp_path, 3).protected == {}  # a rule keeps it
    assert read_manifest(tmp_path / name(2)).stamp == stamp_of(2)
    assert catalog_at("", tmp_path).pinned == {name(2)}
    pin.unlink()
    assert deleted(tmp_path, 1) == [3, 2, 1]


@pytest.mark.parametrize("flag", ["--keep", "--keep-daily", "--keep-weekly", "--keep-monthly"])
def test_a_rule_that_keeps_nothing_is_refused(tmp_path, flag):
    make(tmp_path, 1)
    with pytest.raises(UsageProblem, match=f"{flag} must be at least 1"):
        plan_cleanup(catalog_at("", tmp_path), {flag: 0}, HERE, tmp_path, TARGETS)
