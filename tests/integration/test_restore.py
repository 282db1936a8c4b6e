"""restore_from_backup.py as an operator runs it."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import requests

from lib.backup.manifest import sealed
from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.digest import graph_digest
from lib.clients.falkordb.swap import drop_graph
from tests.faulty_proxy import Fault, FaultyProxy
from tests.graph_support import load_backticks
from tests.matrix import matrix
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, ROOT, SMALL, Operator
from tests.qdrant_uploads import repacked
from tests.reembed_support import points_of
from tests.restore_support import TIMEOUT, assert_tidy, neighbours, settings, spoil
from tests.sandbox.automem_server import AutoMemServer

pytestmark = pytest.mark.qdrant


def upgrade(operator) -> None:
    operator.export(VECTOR_SIZE=NEW_SIZE, EMBEDDING_MODEL=LARGE)
    operator.run("reembed_embeddings", "--batch-size", "100")


def test_a_graph_with_names_that_no_query_can_quote_is_backed_up_and_restored(operator):
    operator.load(20)
    with connect(operator.servers.falkordb.address) as conn:
        load_backticks(conn, operator.graph)
        before = graph_digest(conn, operator.graph)
        operator.run("backup_automem")
        (manifest,) = operator.manifests()
        assert json.loads(manifest.read_text())["graph"]["labels"]["tick`ed"] == 2
        upgrade(operator)
        drop_graph(conn, operator.graph)
        operator.run("restore_from_backup", operator.rdb())
        assert graph_digest(conn, operator.graph) == before


def test_the_guides_rollback_brings_both_stores_back_and_its_undo_undoes(operator):
    operator.load(orphans=2)
    operator.call("PUT", "/index?wait=true", {"field_name": "importance", "field_schema": "float"})
    actions = [{"create_alias": {"collection_name": operator.collection, "alias_name": f"a_{operator.collection}"}}]
    requests.post(
        f"{operator.servers.qdrant_url}/collections/aliases", json={"actions": actions}, timeout=TIMEOUT
    ).raise_for_status()
    before, asset = operator.state(), settings(operator)
    with neighbours(operator) as others:
        untouched = others()
        operator.run("backup_automem")
        archive, rdb = operator.archive(), operator.rdb()
        upgrade(operator)
        upgraded = operator.state()
        assert operator.info()["config"]["params"]["vectors"]["size"] == NEW_SIZE
        first = operator.run("restore_from_backup", f"backups/qdrant/{archive.rsplit('/', 1)[1]}")
        assert f"export VECTOR_SIZE={OLD_SIZE}\n" in first.out
        assert f"export EMBEDDING_MODEL={SMALL}\n" in first.out
        undo = re.search(rf"{ROOT}/scripts/restore_from_backup.py (\S+)", first.err)
        assert undo, first.err
        operator.cypher("MATCH (m:Memory) WHERE id(m) < 20 SET m.content = 'changed since'")
        operator.run("restore_from_backup", f"backups/falkordb/{rdb.rsplit('/', 1)[1]}")
        assert operator.state() == before
        assert settings(operator) == asset
        assert others() == untouched
        assert_tidy(operator)
        safety = json.loads(Path(undo[1]).read_text())
        assert safety["collection"]["proof"] in {"checked", "restored"}
        assert safety["collection"]["size"] == NEW_SIZE
        operator.run("restore_from_backup", undo[1])
        assert operator.state() == upgraded
        assert others() == untouched


def test_a_set_is_named_by_its_time(operator):
    operator.load(60)
    operator.run("backup_automem")
    time = operator.manifests()[0].stem.removeprefix("backup_")
    assert operator.archive() in operator.run("backup_automem", "--check", time).out
    for words in (("restore_from_backup", "20010101_000000"), ("backup_automem", "--check", "20010101_000000")):
        refused = operator.run(*words, expect=1)
        assert "no backup set 20010101_000000 in" in refused.err
        assert "--list" in refused.err
    assert f"backup_{time}.json" in operator.run("reembed_embeddings", "--dry-run").err
    before = operator.state()
    spoil(operator)
    operator.run("restore_from_backup", time)
    assert operator.state() == before


@pytest.mark.matrix
@pytest.mark.parametrize("words", matrix(["manifest", "latest", "time", "rdb archive", "archive rdb"], "time"))
def test_the_pair_comes_back(operator, words):
    operator.load()
    before, asset = operator.state(), settings(operator)
    operator.run("backup_automem")
    names = {
        "manifest": str(operator.manifests()[0]),
        "latest": "latest",
        "time": operator.manifests()[0].stem.removeprefix("backup_"),
        "rdb": operator.rdb(),
        "archive": operator.archive(),
    }
    spoil(operator)
    spoilt = operator.state()
    done = operator.run("restore_from_backup", "--json", *(names[word] for word in words.split())).json
    assert operator.state() == before
    assert settings(operator) == asset
    assert_tidy(operator)
    assert done["collection"]["points"] == before.points
    assert done["graph"]["digest"] == before.graph
    safety = json.loads((operator.backups / done["safety_backup"]).read_text())
    assert safety["graph"]["digest"] == spoilt.graph
    assert safety["graph"]["proof"] == "restored"
    operator.run("restore_from_backup", "-q", str(operator.backups / done["safety_backup"]))
    assert operator.state() == spoilt


@pytest.mark.matrix
def test_latest_is_never_the_safety_copy_of_a_rollback(operator):
    """One component restored, then both: each restore leaves a safety copy, which is newer than the backup."""
    operator.load(60)
    before = operator.state()
    operator.run("backup_automem")
    wanted = operator.manifests()[0].name
    for words in (operator.archive(), operator.rdb(), "latest"):
        spoil(operator)
        operator.run("restore_from_backup", words)
    assert operator.state() == before
    kinds = {one["kind"] for one in operator.run("backup_automem", "--list", "--json").json["sets"]}
    assert kinds == {"full", "safety copy"}
    table = operator.run("backup_automem", "--list").out
    assert table.count("  safety copy: a restore took it of what it replaced\n") == 3
    assert "`latest` is the newest full set" in table
    assert max(map(len, table.splitlines())) <= 80

    operator.run("backup_automem", "--only", "qdrant")
    spoil(operator)
    plan = operator.run("restore_from_backup", "latest", "--dry-run", "--json").json
    assert Path(plan["graph"]["file"]).stem[-15:] == wanted[7:22]
    assert Path(plan["collection"]["file"]).name[-22:-7] == wanted[7:22]
    operator.run("restore_from_backup", "latest")
    assert operator.state() == before

    cleaned = operator.run("backup_automem", "--cleanup", "--keep", "1", "--json").json
    assert cleaned["sets"] == []
    assert len(cleaned["protected"]) == 3  # of four safety copies, which undo a restore of the last 30 days
    operator.manifests()[0].unlink()
    assert "\n  collection only\n" in operator.run("backup_automem", "--list").out
    refused = operator.run("restore_from_backup", "latest", expect=1)
    assert "no full backup set in" in refused.err
    assert "(collection only)" in refused.err


@pytest.mark.parametrize("harm", matrix(["manifest", "file", "future", "one component"], "manifest"))
def test_the_check_of_latest_verifies_no_older_set_instead(operator, harm):
    """`--check latest` checks the set that `restore latest` would use, or fails."""
    operator.load(20)
    operator.run("backup_automem")
    first = operator.rdb()
    operator.run("backup_automem", *(("--only", "falkordb") if harm == "one component" else ()))
    newest = operator.manifests()[-1]
    if harm == "manifest":
        newest.write_bytes(newest.read_bytes().replace(b'"nodes": ', b'"nodes": 1'))
    if harm == "file":
        Path(operator.rdb()).unlink()
    if harm == "future":
        raw = json.loads(newest.read_text()) | {"created": "2999-01-01T00:00:00+00:00"}
        newest.write_text(json.dumps(sealed(raw)))
    expect = {"manifest": 4, "file": 4, "future": 2, "one component": 0}[harm]
    checked = operator.run("backup_automem", "--check", "latest", expect=expect)
    assert (first in checked.out) == (harm == "one component")
    operator.run("restore_from_backup", "latest", "--dry-run", expect=expect)


@pytest.mark.matrix
def test_the_check_of_latest_is_of_these_stores(operator):
    operator.load(20)
    operator.run("backup_automem")
    own = operator.rdb()
    other = f"{operator.graph}_other"
    operator.copy_graph(other)
    operator.run("backup_automem", env={"FALKORDB_GRAPH": other})
    assert own in operator.run("backup_automem", "--check", "latest").out


@pytest.mark.matrix
def test_a_restore_ends_what_the_migration_knew_of_the_points_that_it_replaces(operator):
    """The older pair lacks a key and an index that the migration carried over. Nothing brings them back."""
    operator.load(20)
    operator.run("backup_automem")
    older, before, had = operator.archive(), points_of(operator), settings(operator)
    one = next(iter(before))
    operator.call("POST", "/points/payload?wait=true", {"points": [one], "payload": {"added_later": 5}})
    operator.call("PUT", "/index?wait=true", {"field_name": "added_later", "field_schema": "integer"})
    operator.run("backup_automem", "--only", "qdrant")
    export = dict(operator.exports)
    upgrade(operator)
    assert points_of(operator)[one][0]["added_later"] == 5
    operator.run("restore_from_backup", older)
    operator.exports = export
    operator.run("verify_migration")
    operator.run("reembed_embeddings", "--only-missing")
    assert "added_later" not in points_of(operator)[one][0]
    assert settings(operator) == had
    operator.run("verify_migration")


def test_files_of_two_backups_are_named_as_such(operator):
    operator.load(20)
    operator.run("backup_automem")
    first = operator.archive()
    operator.run("backup_automem")
    rdb, second = operator.rdb(), operator.archive()
    said = operator.run("restore_from_backup", rdb, first, "--dry-run").err
    assert f"warning: {Path(rdb).name} and {Path(first).name} were not taken together" in said
    assert "were not taken" not in operator.run("restore_from_backup", rdb, second, "--dry-run").err


def test_onto_stores_that_hold_nothing(operator):
    operator.load()
    before, asset = operator.state(), settings(operator)
    operator.run("backup_automem")
    requests.delete(f"{operator.servers.qdrant_url}/collections/{operator.collection}", timeout=TIMEOUT)
    with connect(operator.servers.falkordb.address) as conn:
        drop_graph(conn, operator.graph)
    done = operator.run("restore_from_backup", "latest", "--json").json
    assert operator.state() == before
    assert settings(operator) == asset
    assert done["safety_backup"] is None
    assert_tidy(operator)


def test_no_safety_backup_and_dry_run(operator):
    operator.load()
    before = operator.state()
    operator.run("backup_automem")
    spoil(operator)
    spoilt, files = operator.state(), sorted(operator.backups.rglob("*"))
    result = operator.run("restore_from_backup", "latest", "--dry-run")
    assert f"/{operator.graph} and Qdrant {operator.servers.qdrant_url}/{operator.collection}:" in result.out
    plan = operator.run("restore_from_backup", "latest", "--dry-run", "--json").json
    assert plan["collection"]["points"] == before.points
    assert (operator.state(), sorted(operator.backups.rglob("*"))) == (spoilt, files)
    operator.run("restore_from_backup", "latest", "--no-safety-backup")
    assert operator.state() == before
    assert len(operator.manifests()) == 1
    assert_tidy(operator)


def test_the_env_file_that_disagrees_is_named(operator):
    operator.load()
    operator.run("backup_automem")
    file = operator.folder / "automem.env"
    file.write_text(f"VECTOR_SIZE={NEW_SIZE}\nEMBEDDING_MODEL={LARGE}\n")
    operator.export(VECTOR_SIZE="", EMBEDDING_MODEL="")
    text = operator.run("restore_from_backup", operator.archive(), "--env-file", str(file)).out
    assert f"and in {file}:\n  VECTOR_SIZE={OLD_SIZE}\n  EMBEDDING_MODEL={SMALL}\n" in text


def kill_collection(operator) -> None:
    """A restore that fails late leaves a failed collection under the live name."""
    url = f"{operator.servers.qdrant_url}/collections/{operator.collection}"
    made = requests.post(f"{url}/snapshots", timeout=TIMEOUT).json()["result"]["name"]
    whole = requests.get(f"{url}/snapshots/{made}", timeout=TIMEOUT).content
    requests.delete(f"{url}/snapshots/{made}", timeout=TIMEOUT).raise_for_status()
    bad = repacked(whole, lambda name, body: b"x" * len(body) if re.match(r"0/wal/(open|closed)-", name) else body)
    requests.delete(url, timeout=TIMEOUT)
    answer = requests.post(
        f"{url}/snapshots/upload?wait=true", files={"snapshot": ("bad.snapshot", bad)}, timeout=TIMEOUT
    )
    assert answer.status_code == 500, answer.text
    requests.delete(f"{url}/snapshots/bad.snapshot", timeout=TIMEOUT)
    assert requests.post(f"{url}/points/count", json={}, timeout=TIMEOUT).status_code == 500


def test_a_failed_collection_is_replaced_and_reported_as_lost(operator):
    operator.load()
    before, asset = operator.state(), settings(operator)
    operator.run("backup_automem")
    kill_collection(operator)
    operator.run("restore_from_backup", operator.archive(), "--dry-run")
    result = operator.run("restore_from_backup", operator.archive())
    assert "has failed and cannot be read" in result.err
    assert operator.state() == before
    assert settings(operator) == asset
    assert_tidy(operator)


@pytest.mark.matrix
def test_an_alias_that_moved_to_another_collection_stays_there(operator):
    operator.load()
    name, other = f"a_{operator.collection}", f"{operator.collection}_other"
    server = operator.servers.qdrant_url
    alias = {"create_alias": {"collection_name": operator.collection, "alias_name": name}}
    requests.post(f"{server}/collections/aliases", json={"actions": [alias]}, timeout=TIMEOUT).raise_for_status()
    operator.run("backup_automem", "--only", "qdrant")
    requests.put(f"{server}/collections/{other}", json={"vectors": {"size": 4, "distance": "Dot"}}, timeout=TIMEOUT)
    moved = {"create_alias": {"collection_name": other, "alias_name": name}}
    requests.post(f"{server}/collections/aliases", json={"actions": [moved]}, timeout=TIMEOUT).raise_for_status()
    restored = operator.run("restore_from_backup", operator.archive())
    assert f"alias '{name}' is another collection's now: it was left there" in restored.out
    aliases = requests.get(f"{server}/aliases", timeout=TIMEOUT).json()["result"]["aliases"]
    assert {"alias_name": name, "collection_name": other} in aliases
    assert operator.call("GET", "/aliases")["aliases"] == []


def test_a_running_automem_keeps_its_graph(operator):
    operator.load()
    with AutoMemServer(env={**operator.environ, "AUTOMEM_API_TOKEN": "t"}) as automem:
        operator.export(AUTOMEM_API_URL=automem.url, AUTOMEM_API_TOKEN="t")
        before = operator.state()
        operator.run("backup_automem")
        rdb = operator.rdb()
        operator.cypher("MATCH (m:Memory) WHERE id(m) < 10 SET m.content = 'changed since'")
        changed = operator.state()
        refused = operator.run("restore_from_backup", rdb, expect=2)
        assert "docker compose stop flask-api" in refused.err
        assert "AutoMem is running" in refused.err
        operator.run("restore_from_backup", "latest", expect=2)
        assert operator.state() == changed
        operator.run("restore_from_backup", operator.archive())
        operator.run("restore_from_backup", rdb, "--while-running")
        assert operator.state() == before
        operator.cypher("MATCH (m:Memory) WHERE id(m) < 3 SET m.a_key_of_its_own = 1")
        other = operator.state()
        refused = operator.run("restore_from_backup", rdb, "--while-running", expect=2)
        assert "property keys" in refused.err
        assert operator.state() == other
    operator.run("restore_from_backup", rdb)
    assert operator.state() == before


def of_version(source: str, target, version: str) -> str:
    """A copy of an archive with another server version in it, outside of any set."""
    target.parent.mkdir()
    with tarfile.open(source, "r:gz") as old, tarfile.open(target, "w:gz") as new:
        for member in old:
            body = old.extractfile(member).read()
            if member.name == "collection.json":
                facts = json.loads(body)
                facts["server"]["version"] = version
                body = json.dumps(facts).encode()
            member.size = len(body)
            new.addfile(member, io.BytesIO(body))
    return str(target)


@pytest.mark.matrix
def test_a_version_jump_is_refused_before_anything_is_touched(operator):
    operator.load()
    before = operator.state()
    operator.run("backup_automem")
    far = of_version(operator.archive(), operator.folder / "far" / "qdrant_snapshot.tar.gz", "1.5.0")
    spoil(operator)
    spoilt, files = operator.state(), sorted(operator.backups.rglob("*"))
    refused = operator.run("restore_from_backup", far, operator.rdb(), expect=1)
    assert "1.5.0" in refused.err
    assert "--force-version" in refused.err
    assert refused.err.rstrip().endswith("scripts/reembed_embeddings.py")
    assert (operator.state(), sorted(operator.backups.rglob("*"))) == (spoilt, files)
    operator.run("restore_from_backup", far, operator.rdb(), "--force-version")
    assert operator.state() == before


@pytest.mark.matrix
def test_a_file_moved_away_from_its_manifest_restores_by_the_checksums_in_it(operator):
    operator.load()
    before = operator.state()
    operator.run("backup_automem")
    elsewhere = operator.folder / "elsewhere"
    elsewhere.mkdir()
    files = [shutil.move(path, elsewhere) for path in (operator.rdb(), operator.archive())]
    spoil(operator)
    operator.run("restore_from_backup", *files)
    assert operator.state() == before


@pytest.mark.matrix
def test_another_deployment_in_the_same_folder_is_never_taken_or_deleted(operator):
    other = Operator(operator.servers, operator.folder)
    try:
        operator.load(60)
        other.load(60)
        operator.run("backup_automem")
        mine, before = operator.manifests()[0], operator.state()
        for _ in range(2):
            other.run("backup_automem")
        theirs = other.archive()
        planned = other.run("backup_automem", "--cleanup", "--keep", "1", "--json").json["sets"]
        assert len(planned) == 1
        assert mine.exists()
        done = operator.run("restore_from_backup", "latest", "--json").json
        assert done["collection"]["points"] == before.points
        assert operator.state() == before
        refused = operator.run("restore_from_backup", theirs, expect=2)
        assert f"export QDRANT_COLLECTION={other.collection}" in refused.err
        operator.run("restore_from_backup", theirs, "--dry-run", expect=2)
        assert operator.state() == before
    finally:
        other.clean_up()


def test_a_backup_of_another_server_is_reported_before_the_cutover(operator):
    operator.load(60)
    operator.run("backup_automem", "--only", "falkordb")
    manifest = operator.manifests()[0]
    document = json.loads(manifest.read_text())
    document["graph"]["server"]["address"] = "10.1.2.3:6379"
    manifest.write_text(json.dumps(sealed(document)))
    for more in (["--dry-run"], ["-q"]):
        err = operator.run("restore_from_backup", str(manifest), *more).err
        assert "was taken from 10.1.2.3:6379, it goes to 127.0.0.1" in err
    safety = str(operator.manifests()[-1])
    assert "was taken from" not in operator.run("restore_from_backup", safety, "--dry-run").err


def test_a_trial_that_cannot_be_removed_is_named_and_the_next_run_removes_it(operator):
    operator.load(60)
    operator.run("backup_automem", "--only", "falkordb")
    loading = b"-LOADING Redis is loading the dataset in memory\r\n"
    trial = Fault(rb"GRAPH\.(RO_QUERY|DELETE)\r\n\$\d+\r\n\S+__try_", skip=1, times=None, answer=loading)
    with FaultyProxy(operator.servers.falkordb.port, trial) as proxy:
        through = {"FALKORDB_PORT": str(proxy.port)}
        failed = operator.run("restore_from_backup", operator.rdb(), env=through, expect=1)
        (left,) = [name for name in operator.graphs() if name != operator.graph]
        assert f"may be left on the servers: {left}. The next restore removes it" in failed.err
        assert "still loading its data" in failed.err
        trial.times = trial.hits
        operator.run("restore_from_backup", operator.rdb(), env=through)
    assert operator.graphs() == [operator.graph]
