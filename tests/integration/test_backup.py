"""backup_automem.py as an operator runs it."""

from __future__ import annotations

import json
import os
import stat

import pytest

from tests.far_proxy import FarProxy

pytestmark = pytest.mark.qdrant


def test_makes_a_verified_pair_with_the_manifest_last(operator):
    operator.load()
    before = operator.state()
    result = operator.run("backup_automem", "--json")
    manifest = json.loads(operator.manifests()[0].read_text())
    assert result.json == manifest
    assert manifest["graph"]["proof"] == "restored"
    assert manifest["collection"]["proof"] in {"checked", "restored"}
    assert manifest["collection"]["points"] == before.points == manifest["collection"]["promised_ids"]
    assert manifest["graph"]["digest"] == before.graph
    for component in (manifest["graph"], manifest["collection"]):
        path = operator.backups / component["file"]["name"]
        assert path.stat().st_size == component["file"]["size"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert operator.state() == before
    assert operator.call("GET", "/snapshots") == []


def test_a_far_server_is_not_asked_for_each_label_and_type(operator):
    operator.load()
    with FarProxy(operator.servers.falkordb.port) as proxy:
        operator.export(FALKORDB_PORT=proxy.port)
        graph = operator.run("backup_automem", "--json").json["graph"]
    assert graph["proof"] == "restored"
    assert len(graph["labels"]) + len(graph["types"]) > 10
    assert 0 < proxy.round_trips <= 24


@pytest.mark.parametrize(("only", "component"), [("falkordb", "graph"), ("qdrant", "collection")])
def test_only_writes_a_manifest_with_one_component(operator, only, component):
    operator.load()
    manifest = operator.run("backup_automem", "--only", only, "--json").json
    assert manifest[component] is not None
    assert [manifest["graph"], manifest["collection"]].count(None) == 1


def test_a_folder_of_another_run_that_vanishes_meanwhile_stops_no_backup(operator, monkeypatch):
    operator.load()
    gone = operator.backups / "outgoing" / "20260101_000000_other"
    gone.mkdir(parents=True)
    real = os.scandir

    def scandir(path="."):
        if str(path) == str(gone):
            raise FileNotFoundError(2, "No such file or directory", str(gone))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    operator.run("backup_automem", "-q")


def test_drift_is_counted(operator):
    operator.load(orphans=3)
    gone = operator.cypher("MATCH (m:Memory) WHERE m.content <> '' RETURN m.id LIMIT 1")[0][0]
    operator.call("POST", "/points/delete?wait=true", {"points": [gone]})
    drift = operator.run("backup_automem", "--json").json["drift"]
    assert (drift["only_graph"], drift["only_collection"]) == (1, 3)
    assert drift["examples_graph"] == [str(gone)]


def test_an_unverified_backup_is_reported_and_exits_3(operator):
    operator.load()
    result = operator.run("backup_automem", "--no-verify", expect=3)
    assert "not verified" in result.err


@pytest.mark.parametrize("missing", ["graph", "collection"])
def test_a_missing_source_is_an_error_that_leaves_nothing(operator, missing):
    operator.load()
    operator.export(**{"FALKORDB_GRAPH" if missing == "graph" else "QDRANT_COLLECTION": "no_such_name"})
    result = operator.run("backup_automem", expect=1)
    assert "no_such_name" in result.err
    files = [path for path in operator.backups.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    assert files == []


@pytest.mark.parametrize("what", ["rdb", "archive"])
def test_check_finds_one_flipped_byte(operator, what):
    operator.load()
    operator.run("backup_automem")
    operator.run("backup_automem", "--check", "all")
    path = operator.backups / (operator.rdb() if what == "rdb" else operator.archive())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = operator.run("backup_automem", "--check", str(operator.manifests()[0]), expect=4)
    assert "sha256" in result.out


def test_cleanup_deletes_complete_sets_and_never_the_newest_verified(operator):
    operator.load()
    for _ in range(3):
        operator.run("backup_automem")
    operator.run("backup_automem", "--no-verify", expect=3)
    foreign = operator.backups / "falkordb" / "mine.rdb"
    foreign.write_text("not ours")
    sets = [path.name for path in operator.manifests()]
    planned = operator.run("backup_automem", "--cleanup", "--keep", "1", "--dry-run", "--json").json["sets"]
    assert planned == [sets[1], sets[0]]
    assert len(operator.manifests()) == 4
    operator.run("backup_automem", "--cleanup", "--keep", "1")
    assert [path.name for path in operator.manifests()] == [sets[2], sets[3]]
    assert len(list((operator.backups / "falkordb").glob("*.rdb"))) == 3
    assert foreign.exists()
    operator.run("backup_automem", "--cleanup", "--keep", "0", expect=2)


def test_list_shows_the_sets(operator):
    operator.load()
    operator.run("backup_automem")
    manifest = json.loads(operator.manifests()[0].read_text())
    graph, collection = manifest["graph"], manifest["collection"]
    table = operator.run("backup_automem", "--list").out
    day = manifest["created"][:16].replace("T", " ")
    figures = [
        f"{graph['nodes']:,}",
        f"{collection['points']:,}",
        "48d",
        min(graph["proof"], collection["proof"]),
    ]
    for shown in (manifest["stamp"], day, *figures, collection["model"]):
        assert shown in table
    assert max(map(len, table.splitlines())) <= 80
    (listed,) = operator.run("backup_automem", "--list", "--json").json["sets"]
    assert listed.items() >= manifest.items()
    assert (listed["proof"], listed["complete"]) == (min(graph["proof"], collection["proof"]), True)
    (operator.backups / graph["file"]["name"]).unlink()
    assert "INCOMPLETE" in operator.run("backup_automem", "--list").out
    assert not operator.run("backup_automem", "--list", "--json").json["sets"][0]["complete"]


def test_the_list_of_a_large_deployment_fits_a_terminal_of_80_columns(capsys):
    """Millions of memories, the longest of OpenAI's model names, drift."""
    from lib.backup import manifest as sets
    from lib.backup.copies import Catalog
    from lib.backup.output import show_sets
    from lib.console import Console

    rdb, archive = (sets.BackupFile(f"qdrant/{one}", 99_999_999_999, "0" * 64) for one in ("a", "b"))
    server = {"address": "host:6379"}
    graph = sets.GraphComponent(rdb, "rdb", "memories", server, 9_999_999, 99_999_999, {}, {}, [], [], "", "restored")
    collection = sets.CollectionComponent(
        archive, "memories", server, 9_999_999, 3072, "Cosine", {}, [], "text-embedding-3-large", "guessed", "s", 1,
        "0" * 64, 9_999_999, "restored",
    )  # fmt: skip
    drift = sets.Drift(99_999, 99_999)
    one = sets.Manifest("20261122_235959", "2026-11-22T23:59:59+00:00", graph, collection, drift)
    show_sets(Catalog("backups", [(one, False)], []), Console())
    out = capsys.readouterr().out
    assert "199,998" in out
    assert max(map(len, out.splitlines())) <= 80, out


def test_a_pinned_set_outlives_every_cleanup_until_it_is_unpinned(operator):
    operator.load(40)
    for _ in range(3):
        operator.run("backup_automem", "--only", "falkordb")
    oldest, middle, newest = (path.stem.removeprefix("backup_") for path in operator.manifests())
    files = sorted(operator.backups.rglob("*"))
    sealed = operator.manifests()[0].read_bytes()

    done = operator.run("backup_automem", "--pin", oldest)
    assert done.out == f"{oldest} in {operator.backups} is pinned: no cleanup deletes it\n"
    operator.run("backup_automem", "--pin", oldest)
    assert sorted(operator.backups.rglob("*")) == sorted([*files, operator.backups / f"backup_{oldest}.pinned"])
    assert operator.manifests()[0].read_bytes() == sealed
    listed = operator.run("backup_automem", "--list", "--json").json["sets"]
    assert [(one["stamp"], one["pinned"]) for one in listed] == [(newest, False), (middle, False), (oldest, True)]
    assert operator.run("backup_automem", "--list").out.count("pinned") == 1

    words = ("backup_automem", "--cleanup", "--keep", "1")
    shown = operator.run(*words, "--dry-run").out
    assert [line.split(None, 1) for line in shown.splitlines()[2:5]] == [
        [newest, "graph only  --keep 1"],
        [middle, "graph only  delete"],
        [oldest, "graph only  pinned"],
    ]
    assert "would delete 1 of 3" in shown
    document = operator.run(*words, "--dry-run", "--json").json
    assert document["sets"] == [f"backup_{middle}.json"]
    assert document["kept"] == {f"backup_{newest}.json": "--keep 1", f"backup_{oldest}.json": "pinned"}
    assert (
        operator.run(*words).out == f"deleted backup_{middle}.json and its files\nkept backup_{oldest}.json: pinned\n"
    )
    assert operator.run(*words, "--json").json["protected"] == {f"backup_{oldest}.json": "pinned"}

    assert "not pinned" in operator.run("backup_automem", "--unpin", oldest).out
    operator.run(*words)
    assert [path.stem for path in operator.manifests()] == [f"backup_{newest}"]
    refused = operator.run("backup_automem", "--pin", oldest, expect=2)
    assert f"no set {oldest} in {operator.backups}" in refused.err


def test_a_cleanup_by_days_keeps_the_newest_of_each(operator):
    """The default of --keep does not apply if another rule is given."""
    operator.load(40)
    for _ in range(3):
        operator.run("backup_automem", "--only", "falkordb")
    first, *newer = operator.manifests()
    today = {path.name[7:15] for path in newer}
    planned = operator.run("backup_automem", "--cleanup", "--keep-daily", "2", "--keep-monthly", "1", "--json").json
    assert first.name in planned["sets"]
    assert len(operator.manifests()) == len(today)
    assert planned["kept"][newer[-1].name] == "--keep-daily 2, --keep-monthly 1"
