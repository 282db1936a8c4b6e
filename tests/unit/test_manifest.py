"""The manifest and the sets on disk: written last, read strictly, deleted completely."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from lib.backup.catalog import (
    Deployment,
    backup_sets,
    delete_set,
    find_set,
    is_complete,
    latest,
    newest_with,
)
from lib.backup.check import _verify_set
from lib.backup.copies import catalog_at
from lib.backup.manifest import (
    CHECKED,
    RESTORED,
    UNVERIFIED,
    BackupFile,
    CollectionComponent,
    Drift,
    GraphComponent,
    Manifest,
    read_manifest,
    sealed,
    write_manifest,
)
from lib.backup.retention import plan_cleanup
from lib.errors import USAGE, VERIFICATION_FAILED, BackupDamaged, BadFile, MissingData

GRAPH = GraphComponent(
    file=BackupFile("falkordb/g.rdb", 3, "00"),
    kind="rdb",
    graph="g",
    server={"address": "localhost:6379", "redis": "8.2.3", "falkordb": "4.16.3"},
    nodes=2,
    relationships=1,
    labels={"Memory": 2, "\u2603": 0},
    types={"RELATES_TO": 1},
    indexes=[],
    constraints=[],
    digest="d",
    proof=RESTORED,
    proof_note="loaded",
)
COLLECTION = CollectionComponent(
    file=BackupFile("qdrant/c.tar.gz", 4, "11"),
    collection="c",
    server={"address": "http://localhost:6333", "version": "1.18.3"},
    points=2,
    size=3,
    distance="Cosine",
    payload_schema={"tags": {"data_type": "keyword"}},
    aliases=["a"],
    model="text-embedding-3-small",
    model_known="stamped",
    snapshot_name="s",
    snapshot_size=1,
    snapshot_sha256="22",
    promised_ids=2,
    proof=CHECKED,
)
HERE = Deployment("localhost:6379", "g", "http://localhost:6333", "c")


def stamp_of(number: int) -> str:
    return f"20260101_0000{number:02d}"


def make(
    folder: Path, number: int, *, graph=GRAPH, collection=COLLECTION, created="2026-01-01T00:00:00+00:00", stamp=""
):
    """A set with its files."""
    stamp = stamp or stamp_of(number)
    components = {"graph": graph, "collection": collection}
    for name, content in (("graph", b"rdb"), ("collection", b"arch")):
        component = components[name]
        if component is not None:
            file = f"falkordb/g_{stamp}.rdb" if name == "graph" else f"qdrant/qdrant_snapshot_{stamp}.tar.gz"
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
            components[name] = dataclasses.replace(component, file=dataclasses.replace(component.file, name=file))
    return write_manifest(
        folder,
        Manifest(stamp, created, components["graph"], components["collection"], Drift(1, 2, ["x"], [])),
    )


@pytest.mark.parametrize("components", [{}, {"graph": None}, {"collection": None}])
def test_what_is_written_is_what_is_read(tmp_path, components):
    written = make(tmp_path, 1, **components)
    assert written.path == tmp_path / f"backup_{stamp_of(1)}.json"
    assert read_manifest(written.path) == written
    assert json.loads(written.path.read_text()) == written.as_json()
    assert "path" not in written.as_json()


def test_the_verification_of_a_set_is_that_of_its_weaker_component(tmp_path):
    assert make(tmp_path, 1).proof == CHECKED
    assert make(tmp_path, 2, collection=None).proof == RESTORED
    unverified = dataclasses.replace(COLLECTION, proof=UNVERIFIED)
    assert make(tmp_path, 3, collection=unverified).proof == UNVERIFIED


def test_the_age_is_in_hours(tmp_path):
    created = datetime.now(timezone.utc) - timedelta(hours=25)
    assert make(tmp_path, 1, created=created.isoformat()).age_hours == pytest.approx(25, abs=0.01)


def test_what_a_later_version_adds_to_a_component_is_ignored(tmp_path):
    written = make(tmp_path, 1)
    raw = json.loads(written.path.read_text())
    raw["graph"]["news"] = raw["news"] = 1
    written.path.write_text(json.dumps(sealed(raw)))
    assert read_manifest(written.path) == written


def test_a_newer_format_is_reported_as_such(tmp_path):
    written = make(tmp_path, 1)
    raw = json.loads(written.path.read_text())
    written.path.write_text(json.dumps({**raw, "format": 2}))
    with pytest.raises(BadFile, match="is of format 2, this version reads up to 1") as caught:
        read_manifest(written.path)
    assert "newer" in caught.value.next_step
    (checked,) = _verify_set(written.path, [])
    assert (checked.level, checked.fault) == ("unknown", str(caught.value))


@pytest.mark.parametrize("content", [[], {}, "text", 1, None, {"format": "1"}, {"format": 1}, {"name": "package"}])
def test_another_programs_json_is_no_manifest(tmp_path, content):
    path = tmp_path / "backup_x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadFile, match="no manifest") as caught:
        read_manifest(path)
    assert caught.value.exit_code == USAGE


def _without(name):
    def change(raw):
        del raw[name]

    return change


def _component_without(component, name):
    def change(raw):
        del raw[component][name]

    return change


@pytest.mark.parametrize(
    "change",
    [
        _without("created"),
        _without("graph"),
        _without("collection"),
        _component_without("graph", "file"),
        _component_without("graph", "digest"),
        _component_without("collection", "promised_ids"),
        lambda raw: raw.update(graph=[1]),
        lambda raw: raw.update(graph="text"),
        lambda raw: raw.update(drift={"other": 1}),
        lambda raw: raw["graph"].update(file={"name": "x"}),
    ],
)
def test_a_manifest_that_lacks_something_is_damaged(tmp_path, change):
    written = make(tmp_path, 1)
    raw = json.loads(written.path.read_text())
    change(raw)
    written.path.write_text(json.dumps(sealed(raw)))
    with pytest.raises(BackupDamaged, match="is broken") as caught:
        read_manifest(written.path)
    assert caught.value.exit_code == VERIFICATION_FAILED


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_a_cut_manifest_is_damaged(tmp_path, quarter):
    path = make(tmp_path, 1).path
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * quarter // 4])
    with pytest.raises(BackupDamaged, match="cannot be read"):
        read_manifest(path)


def test_sets_are_found_newest_first_and_others_files_are_not_sets(tmp_path):
    made = [make(tmp_path, number) for number in (2, 1, 3)]
    (tmp_path / "backup_of_my_notes.json").write_text('{"format": 1}')
    (tmp_path / "backup_20260101_000099.json").write_text("{")
    assert [one.stamp for one in backup_sets(tmp_path)] == [stamp_of(3), stamp_of(2), stamp_of(1)]
    assert backup_sets(tmp_path / "nowhere") == []
    assert find_set(tmp_path, tmp_path / made[0].graph.file.name) == made[0]
    assert find_set(tmp_path, tmp_path / "falkordb" / "other.rdb") is None


def test_a_file_is_found_next_to_its_manifest_if_the_folder_is_another(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    theirs = make(tmp_path / "there", 1)
    assert find_set(tmp_path / "here", tmp_path / "there" / theirs.graph.file.name) == theirs


def test_latest_is_never_an_older_set_in_silence(tmp_path):
    with pytest.raises(MissingData, match="no backup in"):
        latest(tmp_path, HERE)
    make(tmp_path, 1)
    newest = make(tmp_path, 2)
    assert latest(tmp_path, HERE) == newest
    newest.path.write_bytes(newest.path.read_bytes()[:100])
    with pytest.raises(BackupDamaged):
        latest(tmp_path, HERE)


def test_the_newest_whole_set_that_holds_a_collection(tmp_path):
    wanted = make(tmp_path, 1)
    make(tmp_path, 2, collection=dataclasses.replace(COLLECTION, collection="other"))
    make(tmp_path, 3, collection=None)
    incomplete = make(tmp_path, 4)
    incomplete.file_of(incomplete.collection).write_bytes(b"longer")
    assert not is_complete(incomplete)
    assert newest_with(tmp_path, "c", COLLECTION.server["address"]) == wanted
    assert newest_with(tmp_path, "none", COLLECTION.server["address"]) is None
    assert newest_with(tmp_path, "c", "http://elsewhere:6333") is None


def test_deleting_a_set_removes_only_its_files(tmp_path):
    one, other = make(tmp_path, 1), make(tmp_path, 2)
    delete_set(one)
    assert backup_sets(tmp_path) == [other]
    assert is_complete(other)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
    delete_set(one)  # deleting again is no error


def test_an_edited_manifest_is_damaged(tmp_path):
    written = make(tmp_path, 1)
    raw = json.loads(written.path.read_text())
    raw["created"] = "2026-01-02T00:00:00+00:00"
    written.path.write_text(json.dumps(raw))
    with pytest.raises(BackupDamaged, match="damaged or edited"):
        read_manifest(written.path)


def test_another_deployments_sets_are_neither_latest_nor_cleaned_up(tmp_path):
    own = [make(tmp_path, number) for number in (1, 2)]
    other = dataclasses.replace(COLLECTION, collection="theirs")
    theirs = [make(tmp_path, number, collection=other) for number in (3, 4)]
    away = dataclasses.replace(GRAPH, server={**GRAPH.server, "address": "10.0.0.1:6379"})
    make(tmp_path, 5, graph=away)
    assert latest(tmp_path, HERE) == own[1]
    sets, theirs_alone = catalog_at("", tmp_path), dataclasses.replace(HERE, collection="theirs")
    assert plan_cleanup(sets, {"--keep": 1}, HERE, tmp_path, []).delete == [own[0]]
    assert plan_cleanup(sets, {"--keep": 1}, theirs_alone, tmp_path, []).delete == [theirs[0]]
