"""Shared by the tests of lib/clients/falkordb: sample graphs with every feature."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from lib.clients.falkordb.connection import GraphAddress, connect
from lib.clients.falkordb.psync import stream_rdb
from lib.clients.falkordb.queries import counts
from tests.restore_support import wait_for
from tests.sandbox.falkordb_server import FalkorServer


def write(conn: redis.Redis, graph: str, *queries: str) -> None:
    for query in queries:
        conn.execute_command("GRAPH.QUERY", graph, query)


def take(address: GraphAddress, path: Path) -> Path:
    """The server's RDB in a file."""
    with path.open("wb") as file:
        stream_rdb(address, file.write)
    return path


def fill(conn: redis.Redis, graph: str, memories: int, relationships: int = 0, characters: int = 0) -> None:
    """A plain graph of any size, in queries that end well within a second."""
    text = "m" * characters
    for low in range(0, memories, 5000):
        high = min(low + 5000, memories)
        write(
            conn,
            graph,
            f"UNWIND range({low}, {high - 1}) AS i "
            f"CREATE (:Memory {{id: 'id-' + toString(i), content: toString(i) + '{text}', importance: i / 7.0}})",
        )
    for low in range(0, relationships, 2500):
        high = min(low + 2500, relationships)
        write(
            conn,
            graph,
            f"UNWIND range({low}, {high - 1}) AS i WITH i, i % {memories} AS source, (i * 7 + 1) % {memories} AS target "
            "MATCH (a), (b) WHERE id(a) = source AND id(b) = target "
            "CREATE (a)-[:RELATES_TO {strength: i / 3.0}]->(b)",
        )


AWKWARD = r"a\"b'c\n\\ tab\t 漢字 😀 `tick`"


def fill_rich(conn: redis.Redis, graph: str) -> None:
    """Every property type, several labels, none, parallel and self relationships, holes, indexes, constraints."""
    write(
        conn,
        graph,
        f'CREATE (:Memory {{id: "m1", content: "{AWKWARD}", tags: ["x", "y/z"], importance: 0.1 + 0.2, big: 9223372036854775807,'
        "  minus: -5, yes: true, no: false, empty: '', none: [], nested: [1, [2.5, ['deep', 'er']], true],"
        "  huge: 1e300, zero: -0.0, endless: 1.0 / 0, place: point({latitude: 1.5, longitude: -2.25}),"
        "  vector: vecf32([0.1, 2.5, -3]), day: date('2024-01-02'), hour: localtime('12:30:01'),"
        "  moment: localdatetime('2024-01-02T03:04:05'), span: duration('P1Y2M3DT4H')})",
        "CREATE (:Memory:Archived {id: 'm2', content: ''}), (:Memory:Entity:Third {id: 'm3'}), ({lonely: 1}), ()",
        "UNWIND range(1, 40) AS i CREATE (:Hole {i: i})",
        "MATCH (h:Hole) WHERE h.i % 3 = 0 DELETE h",
        "MATCH (a:Memory {id: 'm1'}), (b:Memory {id: 'm2'}) CREATE (a)-[:RELATES_TO {strength: 0.5}]->(b), "
        "(a)-[:RELATES_TO {strength: 0.5}]->(b), (a)-[:RELATES_TO {strength: 0.7}]->(b), (a)-[:`odd type!`]->(a), "
        "(b)-[:PRECEDED_BY {at: date('2020-01-01')}]->(a)",
        "MATCH (a:Hole), (b:Hole) WHERE a.i = b.i + 1 CREATE (a)-[:NEXT {i: a.i}]->(b)",
        "MATCH (:Hole)-[r:NEXT]->() WHERE r.i % 4 = 0 DELETE r",
        "CREATE INDEX FOR (m:Memory) ON (m.id, m.importance)",
        "CREATE INDEX FOR ()-[r:RELATES_TO]->() ON (r.strength)",
        "CREATE FULLTEXT INDEX FOR (m:Memory) ON (m.content)",
        "CREATE VECTOR INDEX FOR (m:Memory) ON (m.vector) OPTIONS {dimension: 3, similarityFunction: 'cosine'}",
        "CALL db.idx.fulltext.createNodeIndex({label: 'Entity', language: 'german', stopwords: ['der']}, 'title')",
    )
    constrain(conn, graph, "UNIQUE", "NODE", "Memory", "id")
    constrain(conn, graph, "MANDATORY", "RELATIONSHIP", "NEXT", "i")


def load_backticks(conn: redis.Redis, graph: str) -> None:
    """Two nodes and a relationship whose label and type no query can name, as FalkorDB's bulk loader makes them."""
    first = conn.execute_command("GRAPH.QUERY", graph, "MATCH (n) RETURN coalesce(max(id(n)), -1) + 1")[1][0][0]

    def part(name: str, key: str, *rows: bytes) -> bytes:
        return name.encode() + b"\0" + struct.pack("<I", 1) + key.encode() + b"\0" + b"".join(rows)

    nodes = part("tick`ed", "k`ey", b"\x03one\0", b"\x03two\0")
    edges = part("ti`ck", "key", struct.pack("<QQ", first, first + 1) + b"\x03between\0")
    conn.execute_command("GRAPH.BULK", graph, 2, 1, 1, 1, nodes, edges)


def constrain(conn: redis.Redis, graph: str, kind: str, entity: str, label: str, key: str) -> None:
    """Make a constraint and wait until the server has enforced it, or given it up."""
    conn.execute_command("GRAPH.CONSTRAINT", "CREATE", graph, kind, entity, label, "PROPERTIES", "1", key)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        rows = conn.execute_command("GRAPH.RO_QUERY", graph, "CALL db.constraints()")[1]
        if rows and all(row[-1] != b"UNDER CONSTRUCTION" for row in rows):
            return
        time.sleep(0.02)
    pytest.fail("the constraint stays pending")


def rich_counts(conn: redis.Redis, graph: str) -> None:
    found = counts(conn, graph)
    assert found.labels == {"Memory": 3, "Archived": 1, "Entity": 1, "Third": 1, "Hole": 27}
    assert found.nodes == 3 + 2 + 27
    assert found.types["RELATES_TO"] == 3
    assert found.types["odd type!"] == 1


@contextmanager
def unable_to_save(server: FalkorServer, **config: object) -> Iterator[redis.Redis]:
    """A file cannot replace a folder: its BGSAVE fails, and redis then refuses what writes, and PING."""
    path = server.data / "dump.rdb"
    with connect(server.address) as conn:
        before = {name: conn.config_get(name)[name] for name in config}
        for name, value in config.items():
            conn.config_set(name, value)
        path.unlink(missing_ok=True)
        path.mkdir()
        conn.bgsave()
        assert wait_for(lambda: conn.info("persistence")["rdb_last_bgsave_status"] == "err", 30, 0.05)
        with pytest.raises(redis.exceptions.ResponseError, match="MISCONF"):
            conn.ping()
        try:
            yield conn
        finally:
            path.rmdir()
            conn.bgsave()
            assert wait_for(lambda: conn.info("persistence")["rdb_last_bgsave_status"] == "ok", 30, 0.05)
            for name, value in before.items():
                conn.config_set(name, value)
