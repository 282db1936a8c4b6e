from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.digest import graph_digest
from lib.clients.falkordb.psync import stream_rdb
from lib.clients.falkordb.scratch import Engine, scratch_server
from lib.errors import MissingData
from tests.graph_support import (
    constrain,
    fill,
    fill_rich,
    take,
    write,
)
from tests.sandbox.falkordb_server import FalkorServer

pytest_plugins = ["tests.graph_fixtures"]

# What a query separates by "; " is written in two, as FalkorDB leaves a value alone that equals the new one (-5 = -5.0).
CHANGES = {
    "a string": "MATCH (m:Memory {id: 'm2'}) SET m.content = 'x'",
    "an integer": "MATCH (m:Memory {id: 'm1'}) SET m.minus = -6",
    "a type that prints alike": "MATCH (m:Memory {id: 'm1'}) SET m.minus = '-5'",
    "an integer made a double": "MATCH (m:Memory {id: 'm1'}) SET m.minus = null; MATCH (m:Memory {id: 'm1'}) SET m.minus = -5.0",
    "a truth made a text": "MATCH (m:Memory {id: 'm1'}) SET m.yes = 'true'",
    "deep in an array": "MATCH (m:Memory {id: 'm1'}) SET m.nested = [1, [2.5, ['deeper', 'er']], true]",
    "the order of an array": "MATCH (m:Memory {id: 'm1'}) SET m.tags = ['y/z', 'x']",
    "a split moved in an array": "MATCH (m:Memory {id: 'm1'}) SET m.tags = ['xy', '/z']",
    "a vector": "MATCH (m:Memory {id: 'm1'}) SET m.vector = null; MATCH (m:Memory {id: 'm1'}) SET m.vector = vecf32([0.1, 2.5, -3.5])",
    "a vector made an array": "MATCH (m:Memory {id: 'm1'}) SET m.vector = [0.1, 2.5, -3.0]",
    "a point": "MATCH (m:Memory {id: 'm1'}) SET m.place = point({latitude: 1.5, longitude: -2.5})",
    "a date": "MATCH (m:Memory {id: 'm1'}) SET m.day = date('2024-01-03')",
    "a date made a moment": "MATCH (m:Memory {id: 'm1'}) SET m.day = localdatetime('2024-01-02T00:00:00')",
    "a property gone": "MATCH (m:Memory {id: 'm1'}) SET m.empty = null",
    "a property more": "MATCH (n) WHERE n.lonely = 1 SET n.more = 0",
    "a property under another name": "MATCH (n) WHERE n.lonely = 1 SET n.lone = n.lonely SET n.lonely = null",
    "a label more": "MATCH (m:Memory {id: 'm2'}) SET m:Entity",
    "a label less": "MATCH (m:Memory {id: 'm2'}) REMOVE m:Archived",
    "an empty node more": "CREATE ()",
    "a node less": "MATCH (h:Hole {i: 40}) DELETE h",
    "a parallel relationship more": "MATCH (a:Memory {id: 'm1'}), (b:Memory {id: 'm2'}) CREATE (a)-[:RELATES_TO {strength: 0.5}]->(b)",
    "a parallel relationship less": "MATCH (:Memory)-[r:RELATES_TO]->() WHERE r.strength = 0.5 WITH r LIMIT 1 DELETE r",
    "a relationship's property": "MATCH ()-[r:PRECEDED_BY]->() SET r.at = date('2020-01-02')",
    "a relationship turned round": "MATCH (a)-[r:PRECEDED_BY]->(b) CREATE (b)-[:PRECEDED_BY {at: r.at}]->(a) DELETE r",
    "a relationship's end": "MATCH (a)-[r:PRECEDED_BY]->(b), (c:Memory {id: 'm3'}) CREATE (a)-[:PRECEDED_BY {at: r.at}]->(c) DELETE r",
    "a relationship's type": "MATCH (a)-[r:`odd type!`]->(b) CREATE (a)-[:`even type`]->(b) DELETE r",
    "an index more": "CREATE INDEX FOR (m:Memory) ON (m.timestamp)",
    "an index less": "DROP INDEX FOR (m:Memory) ON (m.importance)",
    "an index of relationships less": "DROP INDEX FOR ()-[r:RELATES_TO]->() ON (r.strength)",
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_change_makes_another_digest(conn: redis.Redis, change: str):
    fill_rich(conn, "g")
    before = graph_digest(conn, "g")
    assert graph_digest(conn, "g") == before
    write(conn, "g", *CHANGES[change].split("; "))
    assert graph_digest(conn, "g").digest != before.digest


def test_a_constraint_is_part_of_it(conn: redis.Redis):
    fill_rich(conn, "g")
    before = graph_digest(conn, "g")
    constrain(conn, "g", "MANDATORY", "NODE", "Hole", "i")
    assert graph_digest(conn, "g").digest != before.digest


def test_two_equal_swaps_of_nodes_do_not_cancel(conn: redis.Redis):
    write(conn, "one", "CREATE (:A {x: 1}), (:A {x: 1}), (:B {x: 2})")
    write(conn, "two", "CREATE (:A {x: 3}), (:A {x: 3}), (:B {x: 2})")
    assert graph_digest(conn, "one").digest != graph_digest(conn, "two").digest


def test_names_cannot_run_into_each_other(conn: redis.Redis):
    write(conn, "one", "CREATE (:A {ab: 'c'})")
    write(conn, "two", "CREATE (:A {a: 'bc'})")
    write(conn, "three", "CREATE (:A:B)")
    write(conn, "four", "CREATE (:AB)")
    digests = {graph_digest(conn, name).digest for name in ("one", "two", "three", "four")}
    assert len(digests) == 4


def test_internal_ids_are_part_of_it_and_the_order_of_labels_and_properties_is_not(conn: redis.Redis):
    first, last = "CREATE (:A:C {x: 1, y: 2})", "MATCH (a:A), (b:B) CREATE (a)-[:R]->(b)"
    write(conn, "one", first, "CREATE (:B {z: 3})", last)
    write(conn, "two", "CREATE (:C:A {y: 2, x: 1})", "CREATE (:B {z: 3})", last)
    write(conn, "three", "CREATE (:B {z: 3})", first, last)
    assert graph_digest(conn, "one") == graph_digest(conn, "two")
    assert graph_digest(conn, "one") != graph_digest(conn, "three")


def test_counts_are_of_what_was_read(conn: redis.Redis):
    fill(conn, "g", 11_000, 12_500)
    digest = graph_digest(conn, "g")
    assert (digest.nodes, digest.relationships) == (11_000, 12_500)


def test_a_missing_graph_has_no_digest(conn: redis.Redis):
    with pytest.raises(MissingData):
        graph_digest(conn, "absent")


@pytest.mark.matrix
def test_throughput_of_rdb_and_digest(server: FalkorServer, conn: redis.Redis, engine: Engine, tmp_path: Path, capsys):
    fill(conn, "g", 50_000, 50_000, characters=300)
    write(conn, "g", "CREATE INDEX FOR (m:Memory) ON (m.id)")
    start = time.monotonic()
    with (tmp_path / "g.rdb").open("wb") as file:
        size, _ = stream_rdb(server.address, file.write)
    streamed = time.monotonic() - start
    with scratch_server(engine, tmp_path / "g.rdb") as scratch, connect(scratch.address) as other:
        loaded = time.monotonic() - start - streamed
        start = time.monotonic()
        with ThreadPoolExecutor() as both:
            here, there = both.map(lambda side: graph_digest(side, "g"), (conn, other))
        digested = time.monotonic() - start
    assert here == there
    with capsys.disabled():
        print(
            f"\n{engine.display}: 50k nodes, 50k relationships: PSYNC {size / 2**20:.1f} MiB in {streamed:.2f} s, "
            f"load {loaded:.2f} s, digest of both sides {digested:.2f} s"
        )
    assert take(server.address, tmp_path / "again.rdb").stat().st_size > 0
