"""Backups that other programs made: redis-cli's, as MIGRATION.md takes it by hand, and AutoMem's own."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.rdb import inspect_rdb
from lib.errors import BackupDamaged
from tests.guide.documents import MIGRATION, blocks
from tests.matrix import matrix
from tests.restore_support import spoil

MARK = b"0123456789abcdef0123456789abcdef01234567"


def by_hand(operator) -> Path:
    """MIGRATION's own lines, as they are; `docker exec` runs the redis-cli of this machine."""
    if shutil.which("redis-cli") is None:
        pytest.skip("there is no redis-cli here: apt-get install redis-tools")
    (block,) = [one.text for one in blocks(MIGRATION) if "redis-cli --rdb -" in one.text]
    tools = operator.folder / "tools"
    tools.mkdir(exist_ok=True)
    docker = tools / "docker"
    docker.write_text(f'#!/bin/sh\nshift 2\nexec "$@" -p {operator.servers.falkordb.port}\n')
    docker.chmod(0o700)
    (operator.backups / "falkordb").mkdir(parents=True, exist_ok=True)
    path = f"{tools}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-ec", block],
        cwd=operator.folder,
        env={"PATH": path},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return operator.backups / "falkordb" / "by_hand.rdb"


@pytest.mark.parametrize("diskless", matrix(["yes", "no"], "yes"))
def test_the_backup_by_hand_of_the_guide_comes_back(operator, diskless):
    operator.load(60)
    before = operator.state()
    with connect(operator.servers.falkordb.address) as conn:
        usual = conn.config_get("repl-diskless-sync")["repl-diskless-sync"]
        conn.config_set("repl-diskless-sync", diskless)
        try:
            path = by_hand(operator)
        finally:
            conn.config_set("repl-diskless-sync", usual)
    assert inspect_rdb(path).crc_ok
    spoil(operator)
    plan = operator.run("restore_from_backup", str(path), "--dry-run", "--json").json
    assert plan["graph"]["nodes"] > 0
    operator.run("restore_from_backup", str(path))
    assert operator.state().graph == before.graph


@pytest.fixture
def marked(operator):
    """An RDB with the end mark of a diskless transfer behind it."""
    operator.load(40)
    operator.run("backup_automem", "--only", "falkordb")
    path = operator.folder / "marked.rdb"
    path.write_bytes(Path(operator.rdb()).read_bytes() + MARK)
    return path


@pytest.mark.matrix
def test_an_rdb_with_its_end_mark_is_restored(operator, marked):
    before = operator.state()
    operator.cypher("MATCH (m:Memory) WHERE id(m) % 3 = 0 DETACH DELETE m")
    operator.run("restore_from_backup", str(marked))
    assert operator.state().graph == before.graph


def test_what_is_no_end_mark_is_damage_all_the_same(operator, marked):
    whole = marked.read_bytes()
    plain = whole[: -len(MARK)]
    for data in (
        plain + MARK[:-1],
        plain + MARK + b"0",
        plain + MARK.upper(),
        plain[:-20] + MARK,
        plain[:200] + bytes([plain[200] ^ 1]) + plain[201:] + MARK,
        plain + MARK[:20] + b"\xff" + MARK[21:],
    ):
        marked.write_bytes(data)
        with pytest.raises(BackupDamaged):
            inspect_rdb(marked)
    before = operator.state()
    assert "error" in operator.run("restore_from_backup", str(marked), expect=4).err
    assert operator.state() == before


# --- AutoMem's own backups ---------------------------------------------------------------------------------------

GRAPH = {
    "timestamp": "2026-01-01T00:00:00+00:00",
    "graph_name": "memories",
    "nodes": [{"id": 0, "labels": ["Memory"], "properties": {"id": "a", "content": "x" * 9000}}],
    "relationships": [],
    "stats": {"node_count": 1, "relationship_count": 0},
}
COLLECTION = {
    "timestamp": "2026-01-01T00:00:00+00:00",
    "collection_name": "memories",
    "points": [{"id": "9d1f6a4e-0c1b-4b0e-8a55-0a7b3f6c2d11", "vector": [0.5] * 3000, "payload": {"content": "x"}}],
    "stats": {"points_count": 1, "vector_size": 3000},
}


def tar(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def automems() -> dict[str, bytes]:
    graph, collection = (gzip.compress(json.dumps(one, indent=2).encode()) for one in (GRAPH, COLLECTION))
    return {
        "falkordb_20260101_000000.json.gz": graph,
        "qdrant_20260101_000000.json.gz": collection,
        "compact.json.gz": gzip.compress(json.dumps(GRAPH, separators=(",", ":")).encode()),
        "falkordb_20260101_000000.json": json.dumps(GRAPH).encode(),
        "automem_backup.tar.gz": tar(("falkordb/falkordb_20260101_000000.json.gz", graph)),
        "qdrant_first.tar.gz": tar(("qdrant/qdrant_20260101_000000.json.gz", collection)),
        "with_folders.tar.gz": tar(("./falkordb/x.json.gz", graph)),
    }


@pytest.mark.parametrize("name", automems())
def test_a_backup_of_automems_own_is_recognised_by_its_content(operator, name):
    path = operator.folder / name
    path.write_bytes(automems()[name])
    held = "1 points of 3000d" if name.startswith("qdrant") else "1 nodes, 0 relationships"
    if name in {"compact.json.gz", "falkordb_20260101_000000.json"}:  # not laid out in lines as AutoMem writes it
        said = operator.run("backup_automem", "--check", str(path), expect=4).out
        assert "its lines are not those that AutoMem writes" in said
    else:
        said = operator.run("backup_automem", "--check", str(path)).out
        assert f"AutoMem's own backup, not loaded: {held}" in said
    assert not list(operator.backups.glob("*.jsonl"))
