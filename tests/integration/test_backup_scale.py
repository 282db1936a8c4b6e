"""A graph beyond every limit of the Docker image: more than 10,000 rows per label, several virtual keys in its RDB."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.digest import graph_digest
from tests.graph_fixtures import ENGINES
from tests.graph_support import write
from tests.operator_support import Operator, Servers
from tests.sandbox.falkordb_server import FalkorServer

pytestmark = pytest.mark.matrix
LABELS = {"Memory": 50_000, "Entity": 40_000, "Tag": 15_000}
TYPES = {"RELATES_TO": 12_000, "PRECEDED_BY": 10_500}
STEP = 5_000  # made well within the second that a query has


@pytest.fixture(scope="module", params=ENGINES, ids=[engine.falkordb_version for engine in ENGINES])
def big(request: pytest.FixtureRequest, session_servers: Servers, tmp_path_factory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("big")
    falkor = FalkorServer(folder / "falkordb", engine=request.param, sync_delay_seconds=0).start()
    someone = Operator(Servers(falkor, session_servers.qdrant_url, session_servers.openai), folder)
    with connect(falkor.address) as conn:
        for label, number in LABELS.items():
            for low in range(0, number, STEP):
                write(
                    conn,
                    someone.graph,
                    f"UNWIND range({low}, {low + STEP - 1}) AS i CREATE (:{label} {{id: '{label}-' + toString(i), "
                    f"content: 'number ' + toString(i), importance: i / 7.0}})",
                )
        for kind, number in TYPES.items():
            for low in range(0, number, STEP):
                high = min(low + STEP, number) - 1
                write(
                    conn,
                    someone.graph,
                    f"UNWIND range({low}, {high}) AS i WITH i, i AS source, i * 3 + 1 AS target "
                    "MATCH (a), (b) WHERE id(a) = source AND id(b) = target "
                    f"CREATE (a)-[:{kind} {{strength: i / 3.0}}]->(b)",
                )
    yield someone
    falkor.kill()


def assert_exact(operator: Operator, manifest: dict) -> None:
    component = manifest["graph"]
    assert component["labels"] == LABELS
    assert component["types"] == TYPES
    assert (component["nodes"], component["relationships"]) == (sum(LABELS.values()), sum(TYPES.values()))
    assert component["proof"] == "restored"
    with connect(operator.servers.falkordb.address) as conn:
        assert component["digest"] == graph_digest(conn, operator.graph).digest


def test_the_rdb_holds_it_all_and_verifies(big):
    manifest = big.run("backup_automem", "--only", "falkordb", "--json").json
    assert_exact(big, manifest)
    assert manifest["graph"]["kind"] == "rdb"
    data = (big.backups / manifest["graph"]["file"]["name"]).read_bytes()
    at = data.index(b"\xfe\x00\xfb")  # the database's number, and how many keys it has
    assert data[at + 3] == 2  # a virtual key in addition to the graph's key
    checks = big.run("backup_automem", "--check", "all", "--json").json["proofs"]
    assert [one["level"] for one in checks] == ["restored"]


def test_a_dump_holds_it_all_and_verifies(big):
    """If replication is refused, one key holds what an RDB spreads over several."""
    with connect(big.servers.falkordb.address) as conn:
        conn.execute_command("ACL", "SETUSER", "dumper", "on", ">pw", "~*", "+@all", "-psync", "-replconf")
    big.export(FALKORDB_USERNAME="dumper", FALKORDB_PASSWORD="pw")
    manifest = big.run("backup_automem", "--only", "falkordb", "--json").json
    assert_exact(big, manifest)
    assert manifest["graph"]["kind"] == "dump"
    assert "taken with DUMP: its RDB is refused" in manifest["graph"]["proof_note"]
    assert json.loads(big.manifests()[-1].read_text())["graph"] == manifest["graph"]
