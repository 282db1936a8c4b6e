"""Bare implementations of what the tools do, and a stopwatch for a part of them."""

from __future__ import annotations

import functools
import socket
import sys
import time
from pathlib import Path
from types import ModuleType

from lib.backup.collection import CollectionSource
from lib.clients.falkordb.connection import GraphAddress
from lib.clients.qdrant import snapshots


def raw_rdb(address: GraphAddress, path: Path) -> None:
    """A bare PSYNC: the stream is written until the end mark; nothing is checked or fsynced."""
    with socket.create_connection((address.host, address.port), timeout=60) as wire, path.open("wb") as out:
        for words in (b"REPLCONF capa eof", b"REPLCONF rdb-only 1"):
            wire.sendall(words + b"\r\n")
            assert _line(wire) == b"+OK"
        wire.sendall(b"PSYNC ? -1\r\n")
        while not (line := _line(wire)).startswith(b"$EOF:"):
            assert not line.startswith(b"-"), line
        mark, tail = line.removeprefix(b"$EOF:"), b""
        while tail != mark:
            piece = wire.recv(1 << 20)
            if not piece:
                raise ConnectionError("the server hung up before the end mark")
            out.write(piece)
            tail = (tail + piece)[-len(mark) :]


def _line(wire: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += wire.recv(1)
    return line.strip()


def raw_snapshot(source: CollectionSource, path: Path) -> None:
    """Create, download, delete."""
    made = snapshots.create(source.qdrant, source.collection)
    with path.open("wb") as out:
        snapshots.download(source.qdrant, source.collection, made, out.write, None)
    snapshots.delete(source.qdrant, source.collection, made.name)


class Stopwatch:
    """Adds up the time spent in a function, wherever it was imported to."""

    def __init__(self, home: ModuleType, name: str) -> None:
        self.seconds = 0.0
        original = getattr(home, name)

        @functools.wraps(original)
        def timed(*args: object, **named: object) -> object:
            began = time.perf_counter()
            try:
                return original(*args, **named)
            finally:
                self.seconds += time.perf_counter() - began

        self._swap = [(module, name, original, timed) for module in _users_of(name, original)]

    def __enter__(self) -> Stopwatch:
        for module, name, _, timed in self._swap:
            setattr(module, name, timed)
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, original, _ in self._swap:
            setattr(module, name, original)


def _users_of(name: str, function: object) -> list[ModuleType]:
    modules = [module for key, module in sys.modules.items() if key.startswith("lib.")]
    return [module for module in modules if getattr(module, name, None) is function]
