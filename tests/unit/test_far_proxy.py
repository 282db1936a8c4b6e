"""The proxy of a far server: content unchanged, bytes counted exactly, never faster than its delay and its rate."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.far_proxy import FarProxy

DELAY, RATE, SIZE = 0.05, 1_000_000, 300_000


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it receives, and ends a connection when its client does."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while data := client.recv(65536):
                client.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def opened(proxy: FarProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def exchanged(connection: socket.socket, data: bytes) -> bytes:
    """What comes back for the data, sent while it is received."""
    sender = threading.Thread(target=connection.sendall, args=(data,), daemon=True)
    sender.start()
    received = bytearray()
    while len(received) < len(data):
        piece = connection.recv(65536)
        assert piece, "the connection ended early"
        received += piece
    sender.join()
    return bytes(received)


def test_content_passes_unchanged_and_every_byte_is_counted(echo: int):
    data = os.urandom(SIZE * 10)
    with FarProxy(echo) as proxy, opened(proxy) as one, opened(proxy) as other:
        assert exchanged(one, data) == data
        assert exchanged(other, b"few") == b"few"
        assert (proxy.up.bytes, proxy.down.bytes, proxy.connections) == (len(data) + 3, len(data) + 3, 2)
        assert proxy.moved == 2 * (len(data) + 3)


def test_the_end_of_a_stream_is_passed_on(echo: int):
    with FarProxy(echo, DELAY) as proxy, opened(proxy) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b"last words"
        assert connection.recv(100) == b""


def test_a_server_that_is_gone_ends_the_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with FarProxy(port) as proxy, opened(proxy) as connection:
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        assert proxy.connections == 0


def test_each_round_trip_takes_the_delay_both_ways_and_the_first_one_also_opens_the_connection(echo: int):
    began = time.monotonic()
    with FarProxy(echo, DELAY) as proxy, opened(proxy) as connection:
        for number, least in enumerate((4 * DELAY, 2 * DELAY, 2 * DELAY), 1):
            assert exchanged(connection, b"x") == b"x"
            assert time.monotonic() - began >= least
            assert proxy.round_trips == number
            began = time.monotonic()


def test_the_delay_does_not_limit_the_throughput(echo: int):
    data = os.urandom(100_000)
    began = time.monotonic()  # the proxy's clock for a connection starts while it is opened
    with FarProxy(echo, DELAY) as proxy, opened(proxy) as connection:
        for at in range(0, len(data), 1000):  # a hundred pieces, which would take ten seconds one after the other
            connection.sendall(data[at : at + 1000])
        assert exchanged(connection, b"") == b""
        received = b""
        while len(received) < len(data):
            received += connection.recv(65536)
        assert received == data
        assert 4 * DELAY <= time.monotonic() - began < 100 * DELAY


def test_the_rate_of_a_direction_is_shared_by_all_connections(echo: int):
    data = os.urandom(SIZE)
    with FarProxy(echo, rate=RATE) as proxy, opened(proxy) as one, opened(proxy) as other:
        began = time.monotonic()
        threads = [threading.Thread(target=exchanged, args=(each, data), daemon=True) for each in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began >= 2 * SIZE / RATE
        assert proxy.moved == 4 * SIZE
