"""A FalkorDB that is not ours: what it announces, sends without end, or sends in another form than FalkorDB's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from lib.clients.falkordb import connection as client
from lib.clients.falkordb import psync
from lib.clients.falkordb.connection import (
    GraphAddress,
    command,
    connect,
    expires_at,
    function_libraries,
    list_graphs,
    save_failure,
    server_versions,
)
from lib.clients.falkordb.queries import raw_rows
from lib.errors import StoreFailed, StoreUnreachable

pytestmark = pytest.mark.qdrant
Reply = Callable[[socket.socket], None]


@contextmanager
def serving(reply: Reply, *, always: bool = False) -> Iterator[int]:
    """A server that answers PING and its like as redis does, and anything else (or `always`) by `reply`: its port."""

    def talk(peer: socket.socket) -> None:
        with peer:
            try:
                while asked := peer.recv(65536).upper():
                    if not always and (b"PING" in asked or b"CLIENT" in asked or b"REPLCONF" in asked):
                        peer.sendall(b"+PONG\r\n" * asked.count(b"*"))
                    else:
                        reply(peer)
            except OSError:
                pass

    def listen() -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(peer,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=listen, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)


def sending(data: bytes) -> Reply:
    return lambda peer: peer.sendall(data)


def without_end(start: bytes, unit: bytes, pause: float = 0.0) -> Reply:
    def reply(peer: socket.socket) -> None:
        peer.sendall(start)
        with_end = time.monotonic() + 60
        while time.monotonic() < with_end:
            peer.sendall(unit)
            time.sleep(pause)

    return reply


MANY_PUSHES = b">2\r\n+a\r\n+b\r\n" * 5000 + b"+OK\r\n"
REPLIES = {
    "a text of gigabytes": without_end(b"$4000000000\r\n", b"x" * 65536),
    "lists as deep as a well": sending(b"*1\r\n" * 100_000),
    "pushes": sending(MANY_PUSHES),
    "a move to nowhere": sending(b"-MOVED\r\n"),
    "a page of the web": sending(b"HTTP/1.1 200 OK\r\n\r\n"),
}


@pytest.mark.parametrize("kind", list(REPLIES))
def test_a_reply_of_another_measure_is_no_graph(operator, kind):
    with serving(REPLIES[kind]) as port:
        operator.export(FALKORDB_PORT=port)
        began = time.monotonic()
        result = operator.run("backup_automem", expect=1)
        assert time.monotonic() - began < 30  # it is sent for 60 s
    assert f"what answers at 127.0.0.1:{port} is not FalkorDB" in result.err


@pytest.mark.parametrize("kind", ["lists as deep as a well", "pushes"])
def test_so_is_one_to_a_command_that_may_take_hours(kind):
    with serving(REPLIES[kind]) as port:
        conn = connect(GraphAddress("127.0.0.1", port))
        with pytest.raises(StoreFailed, match="is not FalkorDB"):
            command(conn, "DUMP", "g")


def test_a_login_is_answered_shortly():
    fails = pytest.raises(StoreFailed, match=r"a reply of 1,\d{3},\d{3} bytes, more than is accepted")
    with serving(REPLIES["a text of gigabytes"], always=True) as port, fails:
        connect(GraphAddress("127.0.0.1", port))


def test_a_text_that_looks_like_a_large_list_is_a_text():
    """A memory may hold any bytes, and may arrive in pieces."""
    text = b"*1000000000\r\n$4000000000\r\n" * 3000

    def in_pieces(peer: socket.socket) -> None:
        reply = b"*2\r\n*0\r\n*1\r\n*2\r\n$%d\r\n%b\r\n$2\r\n\r\n\r\n" % (len(text), text)
        for at in range(0, len(reply), 4999):
            peer.sendall(reply[at : at + 4999])

    with serving(in_pieces) as port:
        conn = connect(GraphAddress("127.0.0.1", port))
        assert raw_rows(conn, "g", "RETURN 1") == [[text, b"\r\n"]]
        assert raw_rows(conn, "g", "RETURN 1") == [[text, b"\r\n"]]


def test_a_long_list_is_a_list():
    reply = b"*2\r\n*0\r\n*1\r\n*2\r\n*200000\r\n" + b":1\r\n" * 200_000 + b"$3\r\nend\r\n"
    with serving(sending(reply)) as port:
        assert raw_rows(connect(GraphAddress("127.0.0.1", port)), "g", "RETURN 1") == [[[1] * 200_000, b"end"]]


@pytest.mark.parametrize("unit", [b"a", b"\r\n+"], ids=["line", "replies"])
def test_a_reply_that_drips_is_given_up(monkeypatch, unit):
    monkeypatch.setattr(client, "_WHOLE_READ_SECONDS", 0.4)
    monkeypatch.setattr(client, "_WHOLE_WRITE_SECONDS", 0.4)
    monkeypatch.setattr(client, "READ_SECONDS", 0.2)
    with serving(without_end(b"*100000\r\n+", unit, 0.05)) as port:
        conn = connect(GraphAddress("127.0.0.1", port))
        for words in (["GRAPH.LIST"], ["DUMP", "g"]):
            with pytest.raises(StoreUnreachable, match="does not answer"):
                command(conn, *words)


@pytest.mark.parametrize("unit", [b"\n", b"x"], ids=["newlines", "line"])
def test_an_rdb_that_never_begins_is_given_up(monkeypatch, unit):
    monkeypatch.setattr(psync, "PREPARE_SECONDS", 0.4)
    fails = pytest.raises(StoreUnreachable, match="has not begun to send its RDB")
    with serving(without_end(b"+FULLRESYNC x 0\r\n", unit, 0.05)) as port, fails:
        psync.stream_rdb(GraphAddress("127.0.0.1", port), lambda _piece: None)


def test_an_rdb_of_a_length_as_long_as_a_book_is_refused():
    fails = pytest.raises(StoreFailed, match="in an unknown form")
    with serving(sending(b"+FULLRESYNC x 0\r\n$" + b"9" * 5000 + b"\r\n")) as port, fails:
        psync.stream_rdb(GraphAddress("127.0.0.1", port), lambda _piece: None)


FORMS = {
    "nil": b"$-1\r\n",
    "a number": b":5\r\n",
    "numbers": b"*3\r\n:5\r\n:6\r\n:7\r\n",
    "an error within": b"*1\r\n-ERR x\r\n",
    "no text": b"*1\r\n$2\r\n\xff\xfe\r\n",
    "a map": b"%1\r\n+a\r\n*0\r\n",
    "a number as long as a book": b"(" + b"9" * 5000 + b"\r\n",
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_reply_of_another_form_is_no_traceback(form):
    with serving(sending(FORMS[form])) as port:
        conn = connect(GraphAddress("127.0.0.1", port))
        for ask in (
            list_graphs,
            server_versions,
            save_failure,
            function_libraries,
            lambda conn: expires_at(conn, "g"),
            lambda conn: raw_rows(conn, "g", "RETURN 1"),
        ):
            with suppress(StoreFailed):  # answers that other servers could give are accepted
                ask(conn)
