from __future__ import annotations

import contextlib
import hashlib
import resource
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import redis

from lib.clients.falkordb import psync
from lib.clients.falkordb.connection import GraphAddress, connect, list_graphs
from lib.clients.falkordb.digest import graph_digest
from lib.clients.falkordb.psync import PsyncRefused, stream_rdb
from lib.clients.falkordb.queries import counts
from lib.clients.falkordb.rdb import inspect_rdb
from lib.clients.falkordb.scratch import Engine, scratch_server
from lib.errors import AccessRefused, BackupDamaged, MigrationError, StoreFailed, StoreUnreachable
from tests.certificate import self_signed
from tests.graph_support import (
    fill,
    fill_rich,
    take,
    write,
)
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.process import free_port

pytest_plugins = ["tests.graph_fixtures"]

MARK = b"0123456789abcdefghij0123456789ABCDEFGHIJ"


def collect(address: GraphAddress) -> bytes:
    pieces: list[bytes] = []
    size, sha256 = stream_rdb(address, pieces.append)
    data = b"".join(pieces)
    assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())
    return data


@contextlib.contextmanager
def peer(*answers: bytes | Sequence[bytes], hold: float = 0.0) -> Iterator[GraphAddress]:
    """A server that gives its answers one by one, each when a command has come; pieces of one in separate packets."""
    listener, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            with client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for answer in answers:
                    client.recv(65536)
                    for piece in [answer] if isinstance(answer, bytes) else answer:
                        client.sendall(piece)
                        time.sleep(0.005)
                over.wait(hold)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield GraphAddress(host="127.0.0.1", port=listener.getsockname()[1])
    finally:
        listener.close()
        over.set()
        thread.join(5)


@pytest.mark.parametrize("diskless", ["yes", "no"])
def test_both_framings_bring_an_rdb_that_loads_to_the_same_graph(
    server: FalkorServer, conn: redis.Redis, engine: Engine, tmp_path: Path, diskless: str
):
    fill_rich(conn, "memories")
    fill(conn, "second", 300, 200)
    conn.set("telemetry{memories}", "an ordinary key")
    conn.config_set("repl-diskless-sync", diskless)
    seen: list[int] = []
    with (tmp_path / "all.rdb").open("wb") as file:
        size, sha256 = stream_rdb(server.address, file.write, progress=seen.append)
    facts = inspect_rdb(tmp_path / "all.rdb")
    assert sum(seen) == size == facts.size
    assert (facts.sha256, facts.crc_ok, facts.version) == (sha256, True, engine.rdb_version)
    assert (facts.redis_version, facts.graph_encoding) == (engine.redis_version, engine.graph_encoding)
    assert facts.dumped_graph is None
    with scratch_server(engine, tmp_path / "all.rdb") as scratch:
        assert list_graphs(scratch.conn) == ["memories", "second"]
        for graph in ("memories", "second"):
            assert graph_digest(scratch.conn, graph) == graph_digest(conn, graph)


@pytest.mark.matrix
def test_the_default_delay_of_the_server_is_survived(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    falkor = FalkorServer(tmp_path / "slow", engine=engine, sync_delay_seconds=3).start()
    try:
        with connect(falkor.address) as conn:
            fill(conn, "g", 10)
        start = time.monotonic()
        monkeypatch.setattr(psync, "IDLE_SECONDS", 2.0)
        collect(falkor.address)  # newlines keep it alive
        assert time.monotonic() - start > 2.0
    finally:
        falkor.kill()


def test_a_graph_that_is_written_to_is_taken_at_one_moment(
    server: FalkorServer, conn: redis.Redis, engine: Engine, tmp_path: Path
):
    fill(conn, "g", 20_000, characters=200)
    stop, begun = threading.Event(), threading.Event()

    def keep_writing() -> None:
        with connect(server.address) as other:
            number = 0
            while not stop.is_set():
                write(other, "g", f"CREATE (:Pair {{n: {number}, side: 1}}), (:Pair {{n: {number}, side: 2}})")
                number += 1
                begun.set()

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        assert begun.wait(60)
        taken = [take(server.address, tmp_path / f"{number}.rdb") for number in range(3)]
    finally:
        stop.set()
        writer.join()
    pairs = []
    for path in taken:
        with scratch_server(engine, path) as scratch:
            found = counts(scratch.conn, "g")
            assert found.labels["Memory"] == 20_000
            pairs.append(found.labels.get("Pair", 0))
    assert all(number % 2 == 0 for number in pairs)
    assert pairs[-1] > 0


def test_an_empty_server_gives_an_rdb_without_graphs(server: FalkorServer, engine: Engine, tmp_path: Path):
    path = take(server.address, tmp_path / "empty.rdb")
    with scratch_server(engine, path) as scratch:
        assert list_graphs(scratch.conn) == []


def test_a_password_is_needed_and_used(engine: Engine, tmp_path: Path):
    secret = 'pass "word\\ #ä'
    falkor = FalkorServer(tmp_path / "locked", password=secret, engine=engine, sync_delay_seconds=0).start()
    try:
        with connect(falkor.address) as conn:
            write(conn, "g", "CREATE (:A)")
        assert collect(falkor.address).startswith(b"REDIS")
        listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert secret not in listing
        assert (tmp_path / "locked" / "falkordb.conf").stat().st_mode & 0o777 == 0o600
        for wrong in ("", "wrong"):
            address = GraphAddress("127.0.0.1", falkor.port, password=wrong)
            for attempt in (collect, connect):
                with pytest.raises(AccessRefused, match="refused the login") as refusal:
                    attempt(address)
                assert not isinstance(refusal.value, PsyncRefused)
                assert "FALKORDB_PASSWORD" in refusal.value.next_step
        assert secret not in repr(falkor.address)
    finally:
        falkor.kill()


def test_a_missing_permission_is_reported_by_name(server: FalkorServer, conn: redis.Redis):
    conn.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@all", "-psync", "-replconf")
    address = GraphAddress("127.0.0.1", server.port, username="reader", password="pw")
    with pytest.raises(PsyncRefused) as refusal:
        collect(address)
    assert "+psync +replconf" in refusal.value.next_step
    conn.execute_command("ACL", "SETUSER", "reader", "+psync", "+replconf")
    assert collect(address).startswith(b"REDIS")


def test_a_user_without_a_password_logs_in(server: FalkorServer, conn: redis.Redis):
    conn.execute_command("ACL", "SETUSER", "open", "on", "nopass", "~*", "+@all")
    conn.execute_command("ACL", "SETUSER", "default", "-psync")
    try:
        assert collect(GraphAddress("127.0.0.1", server.port, username="open")).startswith(b"REDIS")
    finally:
        conn.execute_command("ACL", "SETUSER", "default", "+psync")


def test_disabled_commands_point_to_dump(engine: Engine, tmp_path: Path):
    settings = ('rename-command PSYNC ""',)
    falkor = FalkorServer(tmp_path / "hosted", engine=engine, settings=settings).start()
    try:
        with pytest.raises(PsyncRefused, match="switched off"):
            collect(falkor.address)
    finally:
        falkor.kill()


def test_a_replica_without_its_master_is_reported(server: FalkorServer, conn: redis.Redis):
    conn.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
    with pytest.raises(StoreFailed, match="name the master instead") as refused:
        collect(server.address)
    assert "REPLICAOF NO ONE), then run the same command again" in refused.value.next_step


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "still loading"),
        (b"-BUSY Redis is busy running a script\r\n", "busy with a script"),
        (b"-MISCONF Errors writing to disk\r\n", "MISCONF"),
        (b"+CONTINUE\r\n", "answered PSYNC with"),
    ],
)
def test_other_refusals_are_reported(line: bytes, words: str):
    with peer(b"+OK\r\n", b"+OK\r\n", line) as address, pytest.raises(StoreFailed, match=words):
        collect(address)


def test_no_listener_is_reported():
    with pytest.raises(StoreUnreachable, match="cannot be reached") as refusal:
        collect(GraphAddress("127.0.0.1", free_port()))
    assert "docker compose up -d falkordb" in refusal.value.next_step


def test_a_silent_peer_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psync, "IDLE_SECONDS", 0.5)
    start = time.monotonic()
    with (
        peer(b"+OK\r\n", b"+OK\r\n", b"+FULLRESYNC x 0\r\n$EOF:" + MARK + b"\r\nREDIS0012", hold=60) as address,
        pytest.raises(StoreUnreachable, match=r"has sent nothing for 0\.5 s"),
    ):
        collect(address)
    assert time.monotonic() - start < 30


def test_a_peer_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch):
    """Each byte arrives in time; at that pace the RDB would take years."""
    monkeypatch.setattr(psync, "PIECE_SECONDS", 0.5)
    head = b"+FULLRESYNC x 0\r\n$EOF:" + MARK + b"\r\nREDIS0012"
    start = time.monotonic()
    with (
        peer(b"+OK\r\n", b"+OK\r\n", [head, *[b"x"] * 3000]) as address,
        pytest.raises(StoreUnreachable, match=r"sent less than 1 MiB of its RDB in 0\.5 s") as given_up,
    ):
        collect(address)
    assert time.monotonic() - start < 20
    assert "run the same command again" in given_up.value.next_step


def rdb_of(server: FalkorServer) -> bytes:
    return collect(server.address)


def test_a_mark_in_pieces_and_newlines_between_are_understood(server: FalkorServer, conn: redis.Redis):
    fill(conn, "g", 100)
    data = rdb_of(server)
    framed = b"\n\n+FULLRESYNC abc 1\r\n\n\n$EOF:" + MARK + b"\r\n" + data + MARK
    sizes = [1, 7, 39, 40, 41, 500]
    for size in sizes:
        tail = [framed[-120:][at : at + size] for at in range(0, 120, size)]
        with peer(b"+OK\r\n", b"\n+OK\r\n", [framed[:-120], *tail]) as address:
            assert collect(address) == data


def test_a_connection_that_ends_early_is_an_error(server: FalkorServer, conn: redis.Redis):
    fill(conn, "g", 100)
    data = rdb_of(server)
    for header in (b"$EOF:" + MARK + b"\r\n", b"$%d\r\n" % len(data)):
        for cut in (0, 1, 100, len(data) - 1):
            answer = b"+FULLRESYNC abc 1\r\n" + header + data[:cut]
            with (
                peer(b"+OK\r\n", b"+OK\r\n", answer) as address,
                pytest.raises(StoreUnreachable, match="closed"),
            ):
                collect(address)
    with (
        peer(b"+OK\r\n", b"+OK\r\n", b"+FULLRESYNC a 1\r\n") as address,
        pytest.raises(StoreUnreachable, match="instead of sending an RDB") as failure,
    ):
        collect(address)
    assert "memory to fork" in failure.value.next_step


def test_damage_in_transfer_is_noticed(server: FalkorServer, conn: redis.Redis):
    fill(conn, "g", 100)
    data = bytearray(rdb_of(server))
    for at in (0, 50, len(data) // 2, len(data) - 3):
        broken = bytes(data[:at]) + bytes([data[at] ^ 4]) + bytes(data[at + 1 :])
        answer = b"+FULLRESYNC abc 1\r\n$%d\r\n" % len(broken) + broken
        with peer(b"+OK\r\n", b"+OK\r\n", answer) as address, pytest.raises(BackupDamaged):
            collect(address)


def test_an_rdb_without_a_checksum_is_received(engine: Engine, tmp_path: Path):
    falkor = FalkorServer(tmp_path / "s", engine=engine, sync_delay_seconds=0, settings=("rdbchecksum no",)).start()
    try:
        assert collect(falkor.address).endswith(b"\xff" + bytes(8))
    finally:
        falkor.kill()


def test_an_announcement_that_makes_no_sense_is_refused():
    for line in (b"$EOF:short\r\n", b"$-1\r\n", b"$abc\r\n"):
        answer = b"+FULLRESYNC abc 1\r\n" + line
        with (
            peer(b"+OK\r\n", b"+OK\r\n", answer) as address,
            pytest.raises(StoreFailed, match="in an unknown form"),
        ):
            collect(address)


def test_a_failing_writer_is_not_taken_for_a_failing_server(server: FalkorServer, conn: redis.Redis):
    fill(conn, "g", 10)

    def full(_piece: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as failure:
        stream_rdb(server.address, full)
    assert not isinstance(failure.value, MigrationError)


def test_memory_does_not_grow_with_the_data(tmp_path: Path):
    """64 MiB through a peer: the process grows by a few pieces of 1 MiB."""
    body = b"REDIS0012" + bytes(64 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        peer(b"+OK\r\n", b"+OK\r\n", [b"+FULLRESYNC a 1\r\n$%d\r\n" % len(body), body]) as address,
        (tmp_path / "x").open("wb") as file,
    ):
        stream_rdb(address, file.write)
    assert (tmp_path / "x").stat().st_size == len(body)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 * 1024


def test_tls_is_used_and_its_certificate_checked(
    server: FalkorServer, conn: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fill(conn, "g", 50)
    certificate, key = self_signed(tmp_path)
    with tls_proxy(server.port, certificate, key) as port:
        address = GraphAddress("localhost", port, tls=True)
        for attempt in (collect, connect):
            with pytest.raises(StoreUnreachable, match=r"(?i)certificate") as untrusted:
                attempt(address)
        assert "SSL_CERT_FILE" in untrusted.value.next_step  # of `connect`, which every command calls first
        assert "docker compose" not in untrusted.value.next_step
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert collect(address).startswith(b"REDIS")
        with connect(address) as through:
            assert list_graphs(through) == ["g"]
        # The other way round, both ways.
        for wrong in (GraphAddress("localhost", port), GraphAddress("localhost", server.port, tls=True)):
            with pytest.raises(StoreUnreachable) as refused:
                connect(wrong, 1.0)
            assert "FALKORDB_TLS" in refused.value.next_step


@contextlib.contextmanager
def tls_proxy(port: int, certificate: Path, key: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                outer = context.wrap_socket(plain, server_side=True)
                inner = socket.create_connection(("127.0.0.1", port))
                for pair in ((outer, inner), (inner, outer)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
