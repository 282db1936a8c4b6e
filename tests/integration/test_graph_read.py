from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import redis

from lib.clients.falkordb.connection import GraphAddress, command, connect, list_graphs, require_graph, server_versions
from lib.clients.falkordb.queries import (
    NOT_UTF8,
    counts,
    existing_memory_ids,
    iter_memories,
    nodes,
    pages,
    read_rows,
    relationships,
    row_cap,
    schema,
)
from lib.clients.falkordb.scratch import Engine
from lib.errors import MissingData, StoreFailed
from tests.faulty_proxy import Fault, FaultyProxy
from tests.graph_support import (
    constrain,
    fill,
    fill_rich,
    load_backticks,
    rich_counts,
    write,
)
from tests.sandbox.falkordb_server import FalkorServer

pytest_plugins = ["tests.graph_fixtures"]


def test_the_sandbox_has_the_docker_images_limits(conn: redis.Redis):
    write(conn, "g", "CREATE (:A)")
    cut = conn.execute_command("GRAPH.RO_QUERY", "g", "UNWIND range(1, 20000) AS x RETURN x")
    assert len(cut[1]) == 10_000
    with pytest.raises(redis.ResponseError, match="timed out"):
        conn.execute_command(
            "GRAPH.RO_QUERY",
            "g",
            "UNWIND range(1, 30000) AS x UNWIND range(1, 30000) AS y RETURN count(x + y)",
        )


def test_versions_and_names(conn: redis.Redis, engine: Engine, server: FalkorServer):
    assert server_versions(conn).falkordb == engine.falkordb_version
    assert server_versions(conn).redis == engine.redis_version
    fill(conn, "memories", 3)
    conn.set("not a graph", "x")
    assert list_graphs(conn) == ["memories"]
    require_graph(conn, "memories")
    with pytest.raises(MissingData, match="its graphs: memories"):
        require_graph(conn, "other")


def test_every_memory_comes_once_and_in_order_far_above_the_row_cap(conn: redis.Redis):
    fill(conn, "g", 12_345)
    write(conn, "g", "MATCH (m:Memory) WHERE id(m) >= 3000 AND id(m) < 9500 DELETE m")
    write(conn, "g", "UNWIND range(1, 20) AS i CREATE (:Other {i: i})")  # fills some of the holes
    memories = list(iter_memories(conn, "g"))
    assert len(memories) == 12_345 - 6500
    assert [memory.node_id for memory in memories] == sorted({memory.node_id for memory in memories})
    assert {memory.properties["id"] for memory in memories} == {f"id-{i}" for i in [*range(3000), *range(9500, 12_345)]}


@pytest.mark.parametrize(("cap", "size"), [(2, 20), (7, 300), (100, 500)])
def test_a_smaller_cap_of_the_server_loses_nothing(conn: redis.Redis, cap: int, size: int):
    fill(conn, "g", size, 2 * size)
    conn.execute_command("GRAPH.CONFIG", "SET", "RESULTSET_SIZE", cap)
    assert row_cap(conn, "g", size) == cap
    assert len(list(iter_memories(conn, "g"))) == size
    found = [row[0][1] for page in pages(conn, "g", relationships(), "id(r)") for row in page]
    assert sorted(found) == list(range(2 * size))


def test_a_cap_that_allows_no_row_is_reported(conn: redis.Redis):
    fill(conn, "g", 5)
    conn.execute_command("GRAPH.CONFIG", "SET", "RESULTSET_SIZE", 1)
    with pytest.raises(StoreFailed, match="cuts even the smallest result") as caught:
        list(iter_memories(conn, "g"))
    before = int(conn.execute_command("GRAPH.CONFIG", "GET", "TIMEOUT")[1])  # Docker's
    this_server, _, newer = caught.value.next_step.partition("\nor, if it calls that one deprecated:\n")
    assert len(newer.splitlines()) == 2
    for line in this_server.splitlines()[1:]:
        conn.execute_command(*line.split())
    assert int(conn.execute_command("GRAPH.CONFIG", "GET", "TIMEOUT")[1]) > before
    assert len(list(iter_memories(conn, "g"))) == 5


@pytest.mark.matrix
def test_a_hub_and_crowded_pairs_are_read_whole(conn: redis.Redis):
    fill(conn, "g", 3000)
    write(conn, "g", "MATCH (a), (b) WHERE id(a) = 5 CREATE (a)-[:OUT]->(b), (b)-[:IN]->(a)")
    for _ in range(2):
        write(
            conn,
            "g",
            "MATCH (a), (b) WHERE id(a) = 5 AND id(b) = 6 UNWIND range(1, 6000) AS i CREATE (a)-[:SAME]->(b)",
        )
    found = [row[0][1] for page in pages(conn, "g", relationships(), "id(r)") for row in page]
    assert sorted(found) == list(range(18_000))


def test_a_server_without_a_cap_returns_no_page_of_any_size(conn: redis.Redis):
    """A digest is read from such a server, too: the scratch one."""
    fill(conn, "g", 2)
    conn.execute_command("GRAPH.CONFIG", "SET", "RESULTSET_SIZE", -1)
    write(conn, "g", "MATCH (a), (b) WHERE id(a) = 0 AND id(b) = 1 UNWIND range(1, 45000) AS i CREATE (a)-[:SAME]->(b)")
    found = [len(page) for page in pages(conn, "g", relationships(), "id(r)")]
    assert sum(found) == 45_000
    assert max(found) < 20_000


def test_a_window_that_takes_too_long_is_halved(conn: redis.Redis):
    fill(conn, "g", 2000, characters=20)
    conn.execute_command("GRAPH.CONFIG", "SET", "TIMEOUT", 60)
    slow = "id(n), size([x IN range(1, 2000) WHERE x % 7 = id(n) % 7])"
    with pytest.raises(redis.ResponseError, match="timed out"):
        conn.execute_command("GRAPH.RO_QUERY", "g", f"MATCH (n) WHERE id(n) < 2000 RETURN {slow}")
    found = [row[0][1] for page in pages(conn, "g", nodes(), slow) for row in page]
    assert sorted(found) == list(range(2000))


def test_the_next_step_after_a_query_that_the_server_cut_by_its_time_limit_lets_it_end(conn: redis.Redis):
    """As a look-up of ids does in a large graph without an index on them."""
    write(conn, "g", "CREATE (:A)")
    command(conn, "GRAPH.CONFIG", "SET", "TIMEOUT", 20)
    slow = "UNWIND range(1, 1000000) AS x RETURN sum(x % 7)"
    with pytest.raises(StoreFailed, match="timed out") as caught:
        read_rows(conn, "g", slow)
    command(conn, *caught.value.next_step.splitlines()[1].split())
    assert len(read_rows(conn, "g", slow)) == 1


def test_the_step_also_helps_on_a_server_with_the_newer_time_limits(engine: Engine, tmp_path: Path):
    limits = "TIMEOUT_MAX 20 TIMEOUT_DEFAULT 20"
    with FalkorServer(tmp_path, engine=engine, limits=limits) as server, closing(connect(server.address)) as conn:
        write(conn, "g", "CREATE (:A)")
        slow = "UNWIND range(1, 1000000) AS x RETURN sum(x % 7)"
        with pytest.raises(StoreFailed, match="timed out") as caught:
            read_rows(conn, "g", slow)
        older, *newer = (line.split() for line in caught.value.next_step.splitlines() if line.startswith("GRAPH"))
        with pytest.raises(StoreFailed, match="deprecated"):
            command(conn, *older)
        for words in newer:
            command(conn, *words)
        assert len(read_rows(conn, "g", slow)) == 1


def test_the_next_step_after_a_query_that_took_too_much_memory_lets_it_end(conn: redis.Redis):
    write(conn, "g", "CREATE (:A)")
    large = "UNWIND range(1, 300000) AS x WITH collect(x) AS all RETURN size(all)"
    command(conn, "GRAPH.CONFIG", "SET", "QUERY_MEM_CAPACITY", 1 << 20)
    with pytest.raises(StoreFailed, match="mem consumption exceeded") as caught:
        read_rows(conn, "g", large)
    command(conn, *caught.value.next_step.splitlines()[1].split())
    assert read_rows(conn, "g", large) == [[300000]]


def test_a_short_query_that_a_busy_server_cut_is_sent_once_more(conn: redis.Redis):
    write(conn, "g", "CREATE (:A)")
    address = conn.connection_pool.connection_kwargs
    cut = Fault(rb"GRAPH\.RO_QUERY", answer=b"-Query timed out\r\n")
    with FaultyProxy(address["port"], cut) as proxy, closing(connect(GraphAddress("127.0.0.1", proxy.port))) as through:
        assert read_rows(through, "g", "MATCH (n) RETURN count(n)") == [[1]]
    assert cut.hits == 1


def test_values_arrive_as_python_values(conn: redis.Redis):
    fill_rich(conn, "g")
    first = next(iter_memories(conn, "g")).properties
    assert first["content"] == "a\"b'c\n\\ tab\t 漢字 😀 `tick`"
    assert (first["tags"], first["big"], first["yes"], first["empty"]) == (["x", "y/z"], 2**63 - 1, True, "")
    assert first["nested"] == [1, [2.5, ["deep", "er"]], True]


def test_bytes_that_are_no_text_do_not_stop_the_reading(conn: redis.Redis):
    fill(conn, "g", 3)
    conn.execute_command(
        "GRAPH.QUERY", "g", b"CREATE (:Memory {id: 'bad', content: 'ab\xffcd', tags: ['x\xfe'], ok: 1})"
    )
    bad = list(iter_memories(conn, "g"))[-1].properties
    marked = {"content": {NOT_UTF8: "ab\ufffdcd"}, "tags": {NOT_UTF8: ["x\ufffd"]}}
    assert bad == {"id": "bad", "ok": 1, **marked}
    assert read_rows(conn, "g", "MATCH (m:Memory {id: 'bad'}) RETURN m.content") == [[marked["content"]]]


def test_names_that_are_no_text_do_not_stop_the_reading(conn: redis.Redis):
    fill(conn, "g", 3)
    conn.execute_command("GRAPH.QUERY", "g", b"CREATE INDEX FOR (m:`L\xe9`) ON (m.`k\xe9`)")
    conn.execute_command("GRAPH.QUERY", b"caf\xe9", "CREATE (:Memory)")
    assert list_graphs(conn) == ["caf\\xe9", "g"]
    (index,) = (one for one in schema(conn, "g").indexes if "L" in one["label"])
    assert index["properties"] == "[k\ufffd]"
    assert "k\\xe9" in index["types"]


# Every type that FalkorDB stores (its documentation: data types), and what a payload has of it.
TYPES = {
    "'text \u2603'": "text \u2603",
    "''": "",
    "9223372036854775807": 9223372036854775807,
    "-5": -5,
    "true": True,
    "false": False,
    "0.25": 0.25,
    "1e300": 1e300,
    "[]": [],
    "[1, 'a', true, 2.5]": [1, "a", True, 2.5],
    "[[1], ['b']]": [[1], ["b"]],
    "point({latitude: 52.52, longitude: 13.4})": {"latitude": 52.52, "longitude": 13.4},
    "[point({latitude: -1.5, longitude: 0})]": [{"latitude": -1.5, "longitude": 0.0}],
    "vecf32([0.1, -2.5])": {"vecf32": [0.1, -2.5]},
    "[vecf32([0.1]), vecf32([0.2])]": {"vecf32": [[0.1], [0.2]]},
    "[vecf32([0.1]), 0.2]": [[0.1], 0.2],
    "localdatetime('2024-05-06T07:08:09')": "2024-05-06T07:08:09+00:00",
    "localdatetime('0001-01-01T00:00:00')": "0001-01-01T00:00:00+00:00",
    "localdatetime('9999-12-31T23:59:59')": "9999-12-31T23:59:59+00:00",
    "date('2024-05-06')": "2024-05-06",
    "date('1850-05-06')": "1850-05-06",
    "localtime('07:08:09')": "07:08:09",
    "duration('P30D')": "P30D",
    "duration('P1Y2M3DT4H5M6S')": "P1Y2M3DT4H5M6S",
    "duration('P0D')": "PT0S",
    "[duration('PT90S'), date('2024-01-01')]": ["PT1M30S", "2024-01-01"],
}


def test_every_type_of_a_property_arrives_as_a_plain_value(conn: redis.Redis):
    import orjson

    sets = ", ".join(f"k{number}: {cypher}" for number, cypher in enumerate(TYPES))
    write(conn, "g", f"CREATE (:Memory {{{sets}}})")
    (node,) = iter_memories(conn, "g")
    wanted = {f"k{number}": value for number, value in enumerate(TYPES.values())}
    assert node.properties == wanted
    assert orjson.loads(orjson.dumps(node.properties)) == wanted
    (row,) = read_rows(conn, "g", f"MATCH (n) RETURN {', '.join(f'n.{key}' for key in wanted)}")
    assert row == list(wanted.values())


def test_infinite_numbers_are_no_json_and_stop_nothing(conn: redis.Redis):
    write(conn, "g", "CREATE (:Memory {a: 1.0 / 0.0, b: [-1.0 / 0.0]})")
    (node,) = iter_memories(conn, "g")
    assert node.properties == {"a": float("inf"), "b": [float("-inf")]}


def test_ids_are_looked_up_exactly(conn: redis.Redis):
    fill(conn, "g", 1200)
    write(conn, "g", "CREATE (:Memory {id: 7}), (:Other {id: 'elsewhere'}), (:Memory {id: 'it\\'s \"odd\"'})")
    asked = [f"id-{i}" for i in range(0, 2400, 2)] + [7, "7", "elsewhere", 'it\'s "odd"']
    assert existing_memory_ids(conn, "g", asked) == {f"id-{i}" for i in range(0, 1200, 2)} | {
        7,
        'it\'s "odd"',
    }
    assert existing_memory_ids(conn, "g", []) == set()


def test_counts_are_exact_with_many_labels_and_none(conn: redis.Redis):
    fill_rich(conn, "g")
    rich_counts(conn, "g")
    creates = ", ".join(f"(:L{i} {{k{i}: 1}})-[:T{i}]->(:L{i})" for i in range(600))
    write(conn, "many", f"CREATE {creates}", "UNWIND range(1, 9000) AS i CREATE ()")
    write(conn, "many", "UNWIND range(1, 9000) AS i CREATE (:Full)")
    found = counts(conn, "many")
    assert found.nodes == 1200 + 18_000
    assert found.labels == {f"L{i}": 2 for i in range(600)} | {"Full": 9000}
    assert found.types == {f"T{i}": 1 for i in range(600)}
    assert len(schema(conn, "many").property_keys) == 600


def test_names_without_nodes_are_not_counted_but_are_part_of_the_schema(conn: redis.Redis):
    write(conn, "g", "CREATE (:A)-[:R]->(:B)", "MATCH (b:B) DELETE b", "CREATE (:C)")
    assert counts(conn, "g").labels == {"A": 1, "C": 1}
    assert counts(conn, "g").types == {}
    assert schema(conn, "g").labels == ["A", "B", "C"]


def test_names_with_a_backtick_are_counted(conn: redis.Redis):
    """No query can quote them. An index's label is one although no node has it, and cannot be removed again."""
    fill(conn, "g", 3)
    load_backticks(conn, "g")
    write(conn, "g", "CALL db.idx.fulltext.createNodeIndex('an index`s', 'x')")
    found = counts(conn, "g")
    assert found.labels == {"Memory": 3, "tick`ed": 2}
    assert found.types == {"ti`ck": 1}
    assert (found.nodes, found.relationships) == (5, 1)


def test_a_constraint_that_failed_is_no_part_of_the_schema(conn: redis.Redis):
    fill_rich(conn, "g")
    before = schema(conn, "g")
    constrain(conn, "g", "MANDATORY", "NODE", "Memory", "big")
    assert [c["type"] for c in before.constraints] == ["UNIQUE", "MANDATORY"]
    assert schema(conn, "g").constraints == before.constraints


def test_a_missing_graph_is_named(conn: redis.Redis):
    for read in (
        counts,
        schema,
        lambda *where: list(iter_memories(*where)),
        lambda *where: read_rows(*where, "RETURN 1"),
    ):
        with pytest.raises(MissingData, match="graph 'absent' does not exist"):
            read(conn, "absent")
    assert list_graphs(conn) == []


def test_reading_writes_nothing(conn: redis.Redis):
    fill(conn, "g", 3)
    with pytest.raises(StoreFailed, match="read-only"):
        read_rows(conn, "g", "CREATE (:Sneaky)")


def test_an_empty_graph_reads_as_empty(conn: redis.Redis):
    write(conn, "g", "CREATE (a:A)", "MATCH (a) DELETE a")
    assert list(iter_memories(conn, "g")) == []
    assert counts(conn, "g").nodes == 0
