"""A graph with every FalkorDB feature is restored exactly: other engines, a save and restart, a second graph.

RESTORE_NODES=150000 makes it as large as a large deployment's (with as many relationships).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.digest import graph_digest
from lib.clients.falkordb.queries import counts, schema
from lib.clients.falkordb.scratch import Engine, installed_engines
from tests.matrix import matrix
from tests.operator_support import Operator
from tests.restore_support import keys_of
from tests.sandbox.falkordb_server import FalkorServer

NODES = int(os.environ.get("RESTORE_NODES", "3000"))
BATCH = 5000
NO_LIMITS = "MAX_QUEUED_QUERIES 25 RESULTSET_SIZE 10000"
ENGINES = installed_engines({})
PAIRS = [(one, other) for one in ENGINES for other in ENGINES if other.graph_encoding >= one.graph_encoding]
TO_THE_NEWEST = [pair for pair in PAIRS if pair[1] == ENGINES[-1]]
EVERY_TYPE = """
CREATE (:Memory:Odd {id: 'every-type', t: true, f: false, i: -9007199254740993, d: 0.30000000000000004, s: 'ä "q" \\' \\n',
  empty: '', a: [1, 'two', 3.5, [true, false]], p: point({latitude: 51.5, longitude: -0.1}),
  v: vecf32([0.1, 0.2, 0.3])}),
 ({no_label: 1}), (:A:B:C {many: 'labels'}), (:Memory {id: 'self'})
"""
SCHEMA = [
    "CREATE INDEX FOR (m:Memory) ON (m.id, m.timestamp)",
    "CREATE INDEX FOR ()-[r:RELATES_TO]-() ON (r.strength)",
    "CREATE VECTOR INDEX FOR (o:Odd) ON (o.v) OPTIONS {dimension: 3, similarityFunction: 'cosine'}",
    "CALL db.idx.fulltext.createNodeIndex({label: 'Memory', language: 'german', stopwords: ['und']}, 'content')",
]


@contextmanager
def running(folder: Path, engine: Engine) -> Iterator[FalkorServer]:
    server = FalkorServer(folder, engine=engine, sync_delay_seconds=0, limits=NO_LIMITS)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def fill(operator: Operator, nodes: int) -> None:
    """Every type, label-less nodes, parallel and self relationships, holes, all kinds of indexes, a constraint."""
    for query in (*SCHEMA, EVERY_TYPE):
        operator.cypher(query)
    with connect(operator.servers.falkordb.address) as conn:
        conn.execute_command(
            "GRAPH.CONSTRAINT", "CREATE", operator.graph, "UNIQUE", "NODE", "Memory", "PROPERTIES", 1, "id"
        )
    for start in range(0, nodes, BATCH):
        operator.cypher(
            "UNWIND range($start, $stop - 1) AS i CREATE (:Memory {id: 'm' + i, content: 'memory ' + i + ' und '"
            " + (i * 7919 % 10007), timestamp: '2026-01-' + (i % 28), importance: i / 7.0, tags: ['a:' + (i % 50)]})",
            start=start,
            stop=min(nodes, start + BATCH),
        )
    for start in range(0, nodes, BATCH):
        operator.cypher(
            "MATCH (m:Memory) WHERE id(m) >= $start AND id(m) < $stop MATCH (o:Memory {id: 'm' + (id(m) * 31 % $n)})"
            " CREATE (m)-[:RELATES_TO {strength: id(m) / 9.0}]->(o)",
            start=start,
            stop=start + BATCH,
            n=nodes,
        )
    operator.cypher("MATCH (m:Memory {id: 'self'}) CREATE (m)-[:LOOPS]->(m), (m)-[:LOOPS {again: true}]->(m)")
    operator.cypher("MATCH (m:Memory) WHERE id(m) % 97 = 5 DETACH DELETE m")


def picture(operator: Operator) -> object:
    """By-id digest, counts, definitions and names in their order, and what each index answers."""
    with connect(operator.servers.falkordb.address) as conn:
        found = graph_digest(conn, operator.graph), counts(conn, operator.graph)
        defined = schema(conn, operator.graph)
    asked = [
        operator.cypher("MATCH (m:Memory {id: 'm8'}) RETURN id(m), m.content"),
        operator.cypher(
            "CALL db.idx.fulltext.queryNodes('Memory', '7919') YIELD node RETURN id(node) ORDER BY id(node)"
        ),
        operator.cypher(
            "CALL db.idx.vector.queryNodes('Odd', 'v', 1, vecf32([0.1, 0.2, 0.3])) YIELD node RETURN id(node)"
        ),
        operator.cypher("MATCH ()-[r:RELATES_TO]->() WHERE r.strength > 40 AND r.strength < 41 RETURN count(r)"),
    ]
    return found, defined, asked


@pytest.mark.parametrize(
    ("source", "target"), matrix(PAIRS, *TO_THE_NEWEST), ids=lambda engine: engine.falkordb_version
)
def test_exactly_the_same_graph(session_servers, tmp_path, source, target):
    mine = Operator(session_servers, tmp_path)
    with running(tmp_path / "source", source) as first:
        mine.servers = replace(session_servers, falkordb=first)
        fill(mine, NODES)
        before = picture(mine)
        mine.run("backup_automem", "--only", "falkordb")
    file = mine.rdb()
    with running(tmp_path / "target", target) as second:
        mine.servers = replace(session_servers, falkordb=second)
        neighbour = Operator(mine.servers, tmp_path, "somebody_else")
        neighbour.cypher("UNWIND range(1, 500) AS i CREATE (:Memory {id: i, other: 'x'})-[:R]->(:B)")
        mine.cypher("UNWIND range(1, 300) AS i CREATE (:Other {id: i, of: 'another order of names'})")
        untouched = keys_of(mine)
        mine.run("restore_from_backup", file)
        assert picture(mine) == before
        assert keys_of(mine) == untouched
        with connect(second.address) as conn:
            conn.execute_command("SAVE")
        second.restart()
        assert picture(mine) == before
        second.kill()  # and by its log of commands alone
        second.start()
        assert picture(mine) == before
        assert keys_of(mine) == untouched
        assert mine.graphs() == [mine.graph]
        with pytest.raises(Exception, match="unique"):
            mine.cypher("CREATE (:Memory {id: 'm8'})")
