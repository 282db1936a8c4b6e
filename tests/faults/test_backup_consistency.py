"""Backups of stores that are written to: each graph is consistent, and the reported drift is the actual drift."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from lib.backup.manifest import Manifest
from lib.backup.run import run_backup
from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.queries import read_rows
from lib.clients.falkordb.scratch import installed_engines, scratch_server
from lib.journal import open_journals
from tests.backup_support import server_files, writers
from tests.operator_support import Operator
from tests.restore_support import site, targets, wait_for

pytestmark = pytest.mark.qdrant

BACKUPS, WRITERS, PAUSE_SECONDS = 20, 4, 0.005
NODES = "MATCH (p:Pair) RETURN p.key, p.side"
TWINS = "MATCH (a:Pair {side: 1})-[t:TWIN]->(b:Pair {side: 2}) WHERE a.key = b.key AND t.key = a.key RETURN t.key"
IDS = "MATCH (m:Memory) RETURN m.id"


def components(nodes: list[list[object]], twins: list[list[object]]) -> list[object]:
    """Return the keys of incomplete pairs; raises if a pair exists twice."""
    sides = [(key, side) for key, side in nodes]
    assert len(set(sides)) == len(sides)
    assert len({key for (key,) in twins}) == len(twins)
    whole = {(key, side) for (key,) in twins for side in (1, 2)}
    return sorted({key for key, _ in whole ^ set(sides)})


@pytest.fixture(scope="module")
def taken(session_servers, tmp_path_factory):
    """Twenty backups, taken while four others write: the operator, the sets, the memories that never get a point."""
    operator = Operator(session_servers, tmp_path_factory.mktemp("consistent"))
    operator.load(60)
    place, never = site(operator), without_point(operator)
    try:
        with writers(operator, WRITERS, PAUSE_SECONDS) as another_pair:
            sets = []
            for _ in range(BACKUPS):
                assert another_pair()
                sets.append(
                    run_backup(
                        place.graph,
                        place.collection,
                        place.folder,
                        targets(operator),
                        place.engines,
                        place.bar,
                    )
                )
        assert server_files(operator) == []
        assert open_journals(operator.backups) == []
        yield operator, sets, never
    finally:
        operator.clean_up()


def without_point(operator: Operator) -> set[str]:
    """The sample memories that cannot be embedded: no id, no content."""
    points = operator.call("POST", "/points/scroll", {"limit": 1000})["points"]
    return {str(one) for (one,) in operator.cypher(IDS)} - {str(one["id"]) for one in points}


def promised_ids(archive: Path) -> set[str]:
    with tarfile.open(archive) as stream:
        return set(stream.extractfile("ids.txt").read().decode().split())


def test_no_backup_holds_an_incomplete_pair_and_the_reported_drift_is_correct(taken):
    operator, sets, never = taken
    keys, drifts = [], []
    for manifest in sets:
        with scratch_server(installed_engines({})[-1], manifest.file_of(manifest.graph)) as scratch:

            def ask(query: str, conn=scratch.conn) -> list[list[object]]:
                return read_rows(conn, operator.graph, query)

            nodes, twins = ask(NODES), ask(TWINS)
            assert components(nodes, twins) == []
            assert manifest.graph.labels["Pair"] == len(nodes)
            assert manifest.graph.types["TWIN"] == len(twins)
            keys.append({key for (key,) in twins})
            drifts.append(assert_drift(manifest, {str(one) for (one,) in ask(IDS)} - never))
    assert all(keys)
    assert len({frozenset(one) for one in keys}) == BACKUPS  # each backup is a different moment: the writers did write
    assert any(map(any, drifts))  # and what they wrote between the two snapshots is reported


def assert_drift(manifest: Manifest, memories: set[str]) -> tuple[int, int]:
    """Check that the drift in the manifest is that of its two files."""
    points = promised_ids(manifest.file_of(manifest.collection))
    counted = manifest.drift
    assert (counted.only_graph, counted.only_collection) == (len(memories - points), len(points - memories))
    assert set(counted.examples_graph) <= memories - points
    assert set(counted.examples_collection) <= points - memories
    return counted.only_graph, counted.only_collection


def test_an_export_by_queries_would_hold_incomplete_pairs(operator):
    """With the same writers, the check detects an export that reads nodes and relationships one after the other."""
    operator.load(60)
    with writers(operator, WRITERS, PAUSE_SECONDS), connect(operator.servers.falkordb.address) as conn:

        def torn() -> bool:
            nodes = read_rows(conn, operator.graph, NODES)
            return bool(components(nodes, read_rows(conn, operator.graph, TWINS)))

        assert wait_for(torn)


def test_drift_made_before_the_backup_is_reported(operator):
    operator.load(60)
    gone = operator.cypher("MATCH (m:Memory) WHERE m.content <> '' RETURN m.id LIMIT 1")[0][0]
    operator.call("POST", "/points/delete?wait=true", {"points": [gone]})
    operator.cypher("CREATE (:Memory {id: '00000000-0000-4000-8000-00000000abcd', content: 'no point yet'})")
    result = operator.run("backup_automem", "--json")
    assert result.json["drift"]["only_graph"] == 2
    assert str(gone) in result.json["drift"]["examples_graph"]
    assert json.loads(operator.manifests()[0].read_text())["drift"] == result.json["drift"]
