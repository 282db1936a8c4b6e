"""Backups by AutoMem's own scripts: restored, checked and listed by an operator."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lib.backup.automem_contents import read_points_apart
from lib.backup.automem_files import COLLECTION, AutoMemFile
from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.queries import counts, read_rows
from tests.operator_support import OLD_SIZE, Operator
from tests.restore_support import assert_tidy, spoil

pytestmark = pytest.mark.qdrant

STAMP = "20260101_020304"


def graph_document(operator: Operator) -> dict[str, Any]:
    """What AutoMem's export_falkordb_artifact writes of the operator's graph."""
    nodes = operator.cypher("MATCH (n) RETURN id(n), labels(n), properties(n)")
    links = operator.cypher("MATCH (a)-[r]->(b) RETURN id(a), type(r), id(b), properties(r)")
    return {
        "timestamp": STAMP,
        "graph_name": operator.graph,
        "nodes": [dict(zip(("id", "labels", "properties"), row, strict=True)) for row in nodes],
        "relationships": [
            dict(zip(("source_id", "type", "target_id", "properties"), row, strict=True)) for row in links
        ],
        "stats": {"node_count": len(nodes), "relationship_count": len(links)},
    }


def collection_document(operator: Operator) -> dict[str, Any]:
    """What AutoMem's export_qdrant_artifact writes of the operator's collection."""
    body = {"limit": 10_000, "with_payload": True, "with_vector": True}
    points = operator.call("POST", "/points/scroll", body)["points"]
    return {
        "timestamp": STAMP,
        "collection_name": operator.collection,
        "points": [{key: point[key] for key in ("id", "vector", "payload")} for point in points],
        "stats": {"points_count": len(points), "vector_size": OLD_SIZE},
    }


def written(document: dict[str, Any]) -> bytes:
    return gzip.compress(json.dumps(document, indent=2, default=str).encode(), 1)


def write_pair(operator: Operator, folder: Path, stamp: str = STAMP) -> tuple[Path, Path]:
    """AutoMem's pair of files below `folder`."""
    paths = folder / "falkordb" / f"falkordb_{stamp}.json.gz", folder / "qdrant" / f"qdrant_{stamp}.json.gz"
    for path, document in zip(paths, (graph_document(operator), collection_document(operator)), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(written(document))
    return paths


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def content(operator: Operator) -> tuple[Any, Any, Any]:
    """Every node and relationship without FalkorDB's ids, and every point."""

    def told(rows: list[list[Any]]) -> list[str]:
        return sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)

    with connect(operator.servers.falkordb.address) as conn:
        nodes = read_rows(conn, operator.graph, "MATCH (n) RETURN labels(n), properties(n)")
        links = read_rows(
            conn,
            operator.graph,
            "MATCH (a)-[r]->(b) RETURN labels(a), properties(a), type(r), properties(r), labels(b), properties(b)",
        )
    return told(nodes), told(links), operator.state().points


def ways(operator: Operator, folder: Path) -> dict[str, list[str]]:
    """The words of the restore, for each kind of file."""
    graph, collection = write_pair(operator, folder)
    plain = folder / "renamed.json"
    plain.write_bytes(gzip.decompress(graph.read_bytes()))
    members = {f"{one.parent.name}/{one.name}": one.read_bytes() for one in (graph, collection)}
    return {
        "folder": [str(folder)],
        "files": [str(graph), str(collection)],
        "plain": [str(plain), str(collection)],
        "tar": [str(write_tar(folder / "automem.tar.gz", members))],
    }


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["folder", "files", "plain", "tar"])
def test_each_kind_of_automems_backup_restores_both_stores(operator, tmp_path, kind):
    operator.load()
    operator.cypher("MATCH (m:Memory) WHERE id(m) = 0 SET m.place = point({latitude: 1.5, longitude: -2.25})")
    operator.cypher("CREATE ({name: 'no label, no id'})-[:ODD {w: 0.5}]->(:Thing:Other)")
    words, before = ways(operator, tmp_path / "automem")[kind], content(operator)
    spoil(operator)
    assert content(operator) != before
    said = operator.run("restore_from_backup", *words)
    assert content(operator) == before
    assert_tidy(operator)
    for text in (said.err, said.out):
        assert "AutoMem's backup of a graph does not hold: indexes" in text
        assert "AutoMem's backup of a collection does not hold: settings" in text
    assert set(operator.info()["payload_schema"]) == {"tags", "tag_prefixes"}
    indexes = operator.cypher("CALL db.indexes() YIELD label, properties RETURN label, properties")
    assert indexes == [["Memory", ["id", "timestamp"]]]
    operator.run("restore_from_backup", str(operator.manifests()[-1]))


def test_a_dry_run_a_check_and_a_list_know_them_and_change_nothing(operator):
    operator.load(60)
    graph, collection = write_pair(operator, operator.backups)
    before = operator.state()
    plan = operator.run("restore_from_backup", "--dry-run", "--json", str(operator.backups)).json
    with connect(operator.servers.falkordb.address) as conn:
        assert plan["graph"]["nodes"] == counts(conn, operator.graph).nodes
    assert plan["collection"]["points"] == before.points
    for path, text in ((graph, "nodes"), (collection, "points")):
        assert text in operator.run("backup_automem", "--check", str(path)).out
    listed = operator.run("backup_automem", "--list")
    assert str(graph) in listed.out
    assert str(collection) in listed.out
    document = operator.run("backup_automem", "--list", "--json").json
    assert document["sets"] == []
    assert document["automem"] == [str(graph), str(collection)]
    assert operator.state() == before


def cut_text(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-2000]))


def cut_gzip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def trailing(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"{}"))


def edited(path: Path, change: Any) -> None:
    document = json.loads(gzip.decompress(path.read_bytes()))
    change(document)
    path.write_bytes(written(document))


def repeat_a_point(document: dict[str, Any]) -> None:
    document["points"][1] = document["points"][0]


def compact(path: Path) -> None:
    path.write_bytes(json.dumps(json.loads(gzip.decompress(path.read_bytes()))).encode())


DAMAGE = {
    "cut": (0, cut_text, "is cut"),
    "cut gzip": (1, cut_gzip, "is damaged at byte"),
    "trailing": (1, trailing, "something follows"),
    "count": (0, lambda path: edited(path, lambda one: one["nodes"].pop(0)), "its stats say"),
    "points": (1, lambda path: edited(path, lambda one: one["points"].pop(0)), "its stats say"),
    "twice": (1, lambda path: edited(path, repeat_a_point), "is in it twice"),
    "size": (1, lambda path: edited(path, lambda one: one["points"][3]["vector"].pop()), "others are of 48d"),
    "compact": (0, compact, "json.tool"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_backup_is_refused_before_anything_is_touched(operator, kind):
    operator.load(60)
    which, damage, text = DAMAGE[kind]
    path = write_pair(operator, operator.folder)[which]
    damage(path)
    before = operator.state()
    refused = operator.run("restore_from_backup", str(path), expect=4)
    assert text in refused.err
    assert path.name in operator.run("backup_automem", "--check", str(path), expect=4).out
    assert operator.state() == before
    assert_tidy(operator)


def test_a_path_is_shown_as_it_was_given(operator):
    """The points are read by another process, which has another working directory at first."""
    operator.load(60)
    _, collection = write_pair(operator, operator.folder)
    collection.write_bytes(collection.read_bytes()[:-20])
    given = str(collection.relative_to(operator.folder))
    refused = operator.run("restore_from_backup", given, expect=4)
    assert f"error: {given} is damaged" in refused.err


def test_the_points_are_read_from_a_folder_whose_name_is_not_utf8(operator, tmp_path, monkeypatch):
    operator.load(60)
    _, collection = write_pair(operator, operator.folder)
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    monkeypatch.chdir(odd)
    table, facts = read_points_apart(AutoMemFile(collection.rename(odd / collection.name), COLLECTION))
    with table:
        assert len(table) == facts.points > 0


def test_a_reader_of_points_that_is_killed_is_not_blamed_on_the_file(operator, tmp_path, monkeypatch):
    operator.load(60)
    _, collection = write_pair(operator, operator.folder)
    before = content(operator)
    (tmp_path / "dying.py").write_text("import os\ninput()\nos.kill(os.getpid(), 9)\n")
    with monkeypatch.context() as patched:
        patched.setattr("lib.backup.automem_contents._READER", "dying")
        patched.setattr("lib.child_process._ROOT", tmp_path)
        refused = operator.run("restore_from_backup", str(collection), expect=1)
    assert "the process that reads the backup of the collection was killed" in refused.err
    assert "run the same command again" in refused.err
    assert content(operator) == before
    operator.run("restore_from_backup", str(collection))


def test_a_backup_that_lost_rows_needs_force_incomplete(operator):
    operator.load(60)
    graph, _ = write_pair(operator, operator.folder)

    def cut(document: dict[str, Any]) -> None:
        document["nodes"] = document["nodes"][:40]
        document["stats"]["node_count"] = 40

    edited(graph, cut)
    refused = operator.run("restore_from_backup", str(graph), expect=4)
    assert "lead to nodes that the file lacks" in refused.err
    assert "--force-incomplete" in refused.err
    said = operator.run("restore_from_backup", str(graph), "--force-incomplete")
    assert "is incomplete" in said.err
    assert operator.cypher("MATCH (n) RETURN count(n)") == [[40]]


def test_a_server_that_cannot_fetch_from_itself_is_filled_again(operator, monkeypatch):
    operator.load(60)
    _, collection = write_pair(operator, operator.folder)
    before = content(operator)
    spoil(operator)
    optimizers = operator.info()["config"]["optimizer_config"]
    monkeypatch.setattr("lib.clients.qdrant.snapshots.can_fetch_itself", lambda *_words: None)
    operator.run("restore_from_backup", str(collection))
    assert operator.info()["config"]["optimizer_config"] == optimizers
    assert content(operator)[2] == before[2]
    assert set(operator.info()["payload_schema"]) == {"tags", "tag_prefixes"}
    assert_tidy(operator)


def test_a_folder_with_an_unequal_pair_is_refused_as_mixed(operator):
    operator.load(60)
    folder = operator.folder / "automem"
    write_pair(operator, folder)
    write_pair(operator, folder, "20260101_030000")[0].unlink()
    refused = operator.run("restore_from_backup", str(folder), expect=2)
    assert "were not taken together" in refused.err
