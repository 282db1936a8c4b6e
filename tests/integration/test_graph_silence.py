"""A FalkorDB that falls silent: reads time out, writes are waited for."""

from __future__ import annotations

import socketserver
import threading
import time

import pytest

from lib.clients.falkordb import connection
from lib.clients.falkordb.connection import GraphAddress, command, connect, function_libraries, list_graphs
from lib.clients.falkordb.queries import counts, raw_rows, read_rows
from lib.errors import StoreFailed, StoreUnreachable

READ_SECONDS, SLOW_SECONDS = 0.8, 2.0
BUSY = b"-BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.\r\n"
ANSWERS = {b"PING": b"+PONG\r\n", b"GRAPH.LIST": b"*0\r\n", b"INFO": BUSY}


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.silent, self.deaf = threading.Event(), threading.Event()
        self.asked: list[bytes] = []


class _Handler(socketserver.StreamRequestHandler):
    """Speak only the part of the protocol that a connection needs; DUMP is slow."""

    def handle(self) -> None:
        while words := self._words():
            name = words[0].upper()
            self.server.asked.append(name)
            if self.server.silent.is_set() and name != b"DUMP":
                continue
            if name == b"DUMP":
                time.sleep(SLOW_SECONDS)
            self.wfile.write(ANSWERS.get(name, b"+OK\r\n"))

    def _words(self) -> list[bytes]:
        head = self.rfile.readline()
        words = []
        for _ in range(int(head[1:] or 0)):
            size = int(self.rfile.readline()[1:])
            if size > 1 << 20 and self.server.deaf.wait(0):
                time.sleep(50 * SLOW_SECONDS)
            words.append(self.rfile.read(size + 2)[:-2])
        return words


@pytest.fixture
def server():
    with _Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def conn(server, monkeypatch):
    monkeypatch.setattr(connection, "READ_SECONDS", READ_SECONDS)
    address = GraphAddress("127.0.0.1", server.server_address[1])
    with connect(address) as opened:
        assert list_graphs(opened) == []
        yield opened


@pytest.mark.parametrize(
    "ask",
    [
        list_graphs,
        lambda conn: raw_rows(conn, "g", "RETURN 1"),
        lambda conn: read_rows(conn, "g", "RETURN 1"),
        lambda conn: counts(conn, "g"),
        lambda conn: command(conn, "EXISTS", "g"),
        lambda conn: command(conn, "MODULE", "LIST"),
        function_libraries,
    ],
)
def test_a_query_times_out_and_names_the_server(server, conn, ask):
    server.silent.set()
    began = time.monotonic()
    with pytest.raises(StoreUnreachable, match=f"FalkorDB at 127.0.0.1:{server.server_address[1]} does not answer"):
        ask(conn)
    assert READ_SECONDS * 0.9 < time.monotonic() - began < 60


def test_what_takes_long_is_waited_for(conn):
    began = time.monotonic()
    assert command(conn, "DUMP", "g") == b"OK"
    assert time.monotonic() - began > SLOW_SECONDS > 2 * READ_SECONDS


@pytest.mark.parametrize("payload", [b"small", bytes(64 << 20)], ids=["not answered", "not read"])
def test_a_write_to_a_server_that_stops_ends(server, monkeypatch, payload):
    """The peer keeps the connection open, so that keep-alive notices nothing."""
    monkeypatch.setattr(connection, "WRITE_SECONDS", READ_SECONDS)
    with connect(GraphAddress("127.0.0.1", server.server_address[1])) as conn:
        command(conn, "RENAME", "g", "h")  # opens the connection for writes
        server.silent.set()
        server.deaf.set()
        began = time.monotonic()
        with pytest.raises(StoreUnreachable, match="does not answer"):
            command(conn, "RESTORE", "g", 0, payload)
    assert READ_SECONDS * 0.9 < time.monotonic() - began < 60


def test_a_server_that_is_busy_with_a_script_is_named(conn):
    with pytest.raises(StoreFailed, match="is busy with a script: BUSY Redis") as busy:
        command(conn, "INFO")
    assert "SCRIPT KILL" in busy.value.next_step


def test_a_query_is_sent_once_and_the_next_one_reconnects(server, conn):
    server.silent.set()
    with pytest.raises(StoreUnreachable):
        raw_rows(conn, "g", "RETURN 1")
    assert server.asked.count(b"GRAPH.RO_QUERY") == 1
    server.silent.clear()
    assert list_graphs(conn) == []
