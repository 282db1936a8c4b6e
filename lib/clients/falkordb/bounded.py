"""Bounds for a server's replies: a hostile one may announce gigabytes, or send a byte a minute without end."""

from __future__ import annotations

import re
import resource
import socket
import sys
import time
from typing import Any

import redis
from redis.connection import DefaultParser

_LONG_LIST = re.compile(rb"[*~>%|]\d{5,}\r")  # a text may match, too
_HEADER_BYTES = 32
_MOST_ELEMENTS = 10_000_000  # in a reply: a page of rows has some 100,000
# Memory for a reply: nested lists can cost thousands of times their bytes on the wire.
_SPARE_MEMORY, _TIMES_ITS_BYTES, _CHECK_BYTES = 1 << 30, 8, 1 << 20


class BoundedSocket:
    """A socket that takes at most `limit` bytes after each request, all of them within `seconds`."""

    def __init__(self, sock: socket.socket, limit: int, seconds: float) -> None:
        self._sock, self._limit, self._seconds = sock, limit, seconds
        self._timeout = sock.gettimeout()
        self._expect_reply()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def settimeout(self, seconds: float | None) -> None:
        """Set the longest wait for a byte."""
        self._timeout = seconds
        self._sock.settimeout(seconds)

    def sendall(self, data: bytes) -> None:
        """Send a request; what is received next is its reply."""
        self._sock.settimeout(self._timeout)
        self._sock.sendall(data)
        self._expect_reply()

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive as a socket does, within the bounds."""
        if flags:  # MSG_PEEK consumes nothing
            return self._sock.recv(size, flags)
        self._limit_wait()
        data = self._sock.recv(size)
        self._count(memoryview(data))
        return data

    def recv_into(self, buffer: bytearray) -> int:
        """Receive as a socket does, within the bounds."""
        self._limit_wait()
        size = self._sock.recv_into(buffer)
        self._count(memoryview(buffer)[:size])
        return size

    def _expect_reply(self) -> None:
        self._received = self._checked = self._elements = 0
        self._in_string = 0  # bytes of a string that are still expected
        self._unparsed = bytearray()
        self._deadline = time.monotonic() + self._seconds
        self._memory = _peak_memory()

    def _limit_wait(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self._timeout != 0:
            self._sock.settimeout(left if self._timeout is None else min(left, self._timeout))

    def _count(self, data: memoryview) -> None:
        """Raise InvalidResponse if a reply has, announces or takes in memory more than a reply may."""
        self._received += len(data)
        self._require(self._received, self._limit, "bytes")
        within = min(self._in_string, len(data))
        self._in_string -= within
        self._unparsed += data[within:]
        start = max(0, len(self._unparsed) - len(data) - _HEADER_BYTES)
        if self._unparsed.startswith(b"$") or _LONG_LIST.search(self._unparsed, start):
            self._parse_headers()
        if self._received - self._checked >= _CHECK_BYTES:
            self._checked = self._received
            most = _SPARE_MEMORY + _TIMES_ITS_BYTES * self._received
            self._require(_peak_memory() - self._memory, most, "bytes of memory")

    def _parse_headers(self) -> None:
        """Parse the headers received so far. The bytes of a string are skipped: they may look like headers."""
        at, data = 0, self._unparsed
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
            raise redis.exceptions.InvalidResponse(f"a reply of {found:,} {what}, more than is accepted ({most:,})")


def _peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bounded_parser(limit: int, seconds: float) -> type[Any]:
    """Make a `parser_class` for connections whose replies are at most `limit` bytes, and complete within `seconds`."""

    class BoundedParser(DefaultParser):  # type: ignore[misc,valid-type]  # redis-py has no types here
        def on_connect(self, connection: Any, **options: Any) -> None:
            # Each parser of redis-py takes its socket from the connection.
            connection._sock = BoundedSocket(connection._sock, limit, seconds)  # noqa: SLF001
            super().on_connect(connection, **options)

    return BoundedParser
