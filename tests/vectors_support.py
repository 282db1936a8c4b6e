"""Shared by the tests of lib/clients/qdrant: a server, a separate collection, a proxy that breaks."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lib.clients.qdrant import collection
from lib.clients.qdrant import collection as recreate
from lib.clients.qdrant import points as upsert
from lib.clients.qdrant.transport import Qdrant

REAL_SERVER = os.environ.get("QDRANT_TEST_SERVER", "")
STAND_INS = ["1.11.3", "1.18.3"]


@contextlib.contextmanager
def own_server(version: str, folder: Path, api_key: str = "") -> Iterator[Qdrant]:
    """A server of this test alone: the binary of QDRANT_TEST_SERVER for "real", else the stand-in as `version`."""
    if version != "real":
        from tests.sandbox.qdrant_server.process import QdrantServer

        with QdrantServer(folder / "data", version, api_key=api_key or None) as server:
            yield Qdrant(server.url, api_key)
        return
    from tests.real_qdrant import RealQdrant

    with RealQdrant(Path(REAL_SERVER), folder / "real", api_key=api_key or None) as server:
        yield Qdrant(server.url, api_key)


def create_small(q: Qdrant, name: str, size: int, **more: object) -> None:
    """As AutoMem creates it, with a small WAL and one more index."""
    body = {"vectors": {"size": size, "distance": "Cosine"}, "wal_config": {"wal_capacity_mb": 1}, **more}
    q.json("PUT", collection.collection_path(name), body)
    recreate.put_indexes(q, name, {"tags": {"data_type": "keyword"}, "importance": {"data_type": "float"}})


def ids_of(n: int) -> list[str]:
    return [f"00000000-0000-4000-8000-{index:012x}" for index in range(n)]


def vectors_of(n: int, size: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, size)).astype(np.float32)


def payload_of(index: int) -> dict:
    return {
        "content": f"memory number {index} \u2603",
        "tags": ["a", f"t{index % 3}"],
        "importance": index / 100,
        "metadata": {"n": None, "deep": [1, {"y": 2.5}]},
        "relevance_score": None,
    }


def fill(q: Qdrant, name: str, n: int, size: int) -> None:
    rejected = upsert.upsert(q, name, ids_of(n), vectors_of(n, size), [payload_of(i) for i in range(n)])
    assert rejected == []


class BreakingProxy:
    """A TCP proxy to the server. `cut_after` lists, per connection, the bytes of answers let through before it breaks
    (None: all). `swallow` drops the answer to the next request whose head holds it, and closes.
    """

    def __init__(self, q: Qdrant) -> None:
        host, port = q.base_url.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self.cut_after: list[int | None] = []
        self.swallow = b""
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> BreakingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                limit = self.cut_after.pop(0) if self.cut_after else None
                self.connections += 1
                threading.Thread(target=self._serve, args=(client, limit), daemon=True).start()

    def _serve(self, client: socket.socket, limit: int | None) -> None:
        with client, socket.create_connection(self._target) as upstream:
            drop = threading.Event()
            up = threading.Thread(target=self._forward, args=(client, upstream, drop), daemon=True)
            up.start()
            sent = 0
            with contextlib.suppress(OSError):
                while piece := upstream.recv(65536):
                    if drop.is_set():
                        break
                    if limit is not None and sent + len(piece) > limit:
                        client.sendall(piece[: limit - sent])
                        break
                    client.sendall(piece)
                    sent += len(piece)
            for end in (client, upstream):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            up.join(5)

    def _forward(self, client: socket.socket, upstream: socket.socket, drop: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while piece := client.recv(65536):
                if self.swallow and self.swallow in piece:
                    self.swallow = b""
                    drop.set()
                upstream.sendall(piece)
