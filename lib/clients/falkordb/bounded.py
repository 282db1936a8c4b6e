"""Replies of a FalkorDB that end: another's server may announce gigabytes, or send a byte a minute for ever."""

from __future__ import annotations

import re
import resource
import socket
import sys
import time
from typing import Any

import redis
from redis.connection import DefaultParser

_LONG_LIST = re.compile(rb"[*~>%|]\d{5,}\r")  # or a text that holds the same
_HEADER_BYTES = 32
_MOST_ELEMENTS = 10_000_000  # of a reply: a page of rows has some 100,000
# What a reply may take in memory: a list costs thousands of times its bytes on the wire, if they nest.
_SPARE_MEMORY, _TIMES_ITS_BYTES, _LOOK_BYTES = 1 << 30, 8, 1 << 20


class BoundedSocket:
    """A socket on which what comes after each request is at most `limit` bytes, and whole in `seconds`."""

    def __init__(self, sock: socket.socket, limit: int, seconds: float) -> None:
        self._sock, self._limit, self._seconds = sock, limit, seconds
        self._timeout = sock.gettimeout()
        self._expect_reply()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def settimeout(self, seconds: float | None) -> None:
        """The longest wait for a byte."""
        self._timeout = seconds
        self._sock.settimeout(seconds)

    def sendall(self, data: bytes) -> None:
        """Send a request: what comes next is its reply."""
        self._sock.settimeout(self._timeout)
        self._sock.sendall(data)
        self._expect_reply()

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As the socket's."""
        if flags:  # a look that takes nothing away
            return self._sock.recv(size, flags)
        self._wait_no_longer()
        data = self._sock.recv(size)
        self._count(memoryview(data))
        return data

    def recv_into(self, buffer: bytearray) -> int:
        """As the socket's."""
        self._wait_no_longer()
        size = self._sock.recv_into(buffer)
        self._count(memoryview(buffer)[:size])
        return size

    def _expect_reply(self) -> None:
        self._received = self._looked = self._elements = 0
        self._in_string = 0  # bytes of a string that are still to come
        self._not_followed = bytearray()
        self._deadline = time.monotonic() + self._seconds
        self._memory = _peak_memory()

    def _wait_no_longer(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self._timeout != 0:
            self._sock.settimeout(left if self._timeout is None else min(left, self._timeout))

    def _count(self, data: memoryview) -> None:
        """Raise InvalidResponse for a reply that is, announces or takes more than any."""
        self._received += len(data)
        self._require(self._received, self._limit, "bytes")
        within = min(self._in_string, len(data))
        self._in_string -= within
        self._not_followed += data[within:]
        start = max(0, len(self._not_followed) - len(data) - _HEADER_BYTES)
        if self._not_followed.startswith(b"$") or _LONG_LIST.search(self._not_followed, start):
            self._follow()
        if self._received - self._looked >= _LOOK_BYTES:
            self._looked = self._received
            most = _SPARE_MEMORY + _TIMES_ITS_BYTES * self._received
            self._require(_peak_memory() - self._memory, most, "bytes of memory")

    def _follow(self) -> None:
        """Go through what came, header by header, as the protocol has it: within a string anything may be."""
        at, data = 0, self._not_followed
        while at < len(data) and (end := data.find(b"\r\n", at)) >= 0:
            kind, number = data[at : at + 1], bytes(data[at + 1 : min(end, at + _HEADER_BYTES)])
            at = end + 2
            if kind in b"$=!" and number.isdigit():
                self._require(int(number), self._limit, "bytes")
                at += int(number) + 2
            elif kind in b"*~>%|" and number.isdigit():
                self._elements += int(number)
                self._require(self._elements, _MOST_ELEMENTS, "elements")
        self._in_string = max(0, at - len(data))
        del data[:at]

    @staticmethod
    def _require(found: int, most: int, what: str) -> None:
        if found > most:
            raise redis.exceptions.InvalidResponse(
                f"a reply of {found:,} {what}, more than is taken ({most:,})"
            )


def _peak_memory() -> int:
    """The most bytes of memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bounded_parser(limit: int, seconds: float) -> type[Any]:
    """The `parser_class` of connections whose replies are at most `limit` bytes, and whole in `seconds`."""

    class BoundedParser(DefaultParser):  # type: ignore[misc,valid-type]  # redis-py has no types here
        def on_connect(self, connection: Any, **options: Any) -> None:
            # Every parser of redis-py is given the connection for the sake of its socket.
            connection._sock = BoundedSocket(connection._sock, limit, seconds)  # noqa: SLF001
            super().on_connect(connection, **options)

    return BoundedParser
