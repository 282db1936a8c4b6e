"""An embeddings endpoint with minimal cost: its answers are rendered once, so that only the client is measured.

`python -m tests.bench.cheap_endpoint --latency 0.3 --size 3072 --tokens-per-minute 0` prints its port. Every batch of n
texts gets the same n random vectors of length 1; the content of answers is checked by other tests. One thread a
connection: a whole answer is one system call.
"""

from __future__ import annotations

import argparse
import base64
import functools
import json
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from tests.sandbox.openai_requests import Limits, estimated_tokens

ROOT = Path(__file__).resolve().parents[2]
SEND_BUFFER = 4 << 20


class CheapEndpoint:
    """Run the endpoint in a child process; a context manager."""

    def __init__(self, *, latency_seconds: float = 0.3, size: int = 3072, tokens_per_minute: float = 0.0) -> None:
        self._argv = [sys.executable, "-m", "tests.bench.cheap_endpoint", "--latency", str(latency_seconds)]
        self._argv += ["--size", str(size), "--tokens-per-minute", str(tokens_per_minute)]

    def __enter__(self) -> CheapEndpoint:
        self._child = subprocess.Popen(self._argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.port = int(self._child.stdout.readline())
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._child.terminate()
        self._child.wait()
        self._child.stdout.close()

    def counts(self) -> dict[str, int]:
        """Requests, refused ones, and estimated tokens that were accepted."""
        import requests

        return requests.get(f"http://127.0.0.1:{self.port}/counts", timeout=10).json()


@dataclass
class Served:
    """The requests so far, and the limits that apply to them."""

    size: int
    latency: float
    limits: Limits
    turn: threading.Lock = field(default_factory=threading.Lock)
    requests: int = 0
    refused: int = 0
    tokens: int = 0

    def answer(self, texts: list[str]) -> tuple[bytes, bytes]:
        """Head and body; the latency has passed when a good one returns."""
        tokens = estimated_tokens(texts)
        with self.turn:
            refusal = self.limits.take(tokens)
            announced = self.limits.headers()
            self.requests += 1
            self.refused += refusal is not None
            self.tokens += 0 if refusal else tokens
        if refusal:
            announced["retry-after-ms"] = str(round(refusal.retry_seconds * 1000))
            return head_of(429, 2, announced), b"{}"
        time.sleep(self.latency)
        ready = body_of(len(texts), self.size)
        return head_of(200, len(ready), announced), ready

    def talk(self, connection: socket.socket) -> None:
        """Answer one connection until it ends."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as stream:
            while (body := read_request(stream)) is not None:
                if body:
                    head, ready = self.answer(orjson.loads(body)["input"])
                else:
                    shown = {"requests": self.requests, "refused": self.refused, "tokens": self.tokens}
                    ready = json.dumps(shown).encode()
                    head = head_of(200, len(ready), {})
                connection.sendall(head)
                connection.sendall(ready)


def read_request(stream: BinaryIO) -> bytes | None:
    """Return the body of the next request, empty if it has none; None at the end."""
    length = 0
    if not stream.readline():
        return None
    while (line := stream.readline().strip().lower()) != b"":
        if line.startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    return stream.read(length)


def head_of(status: int, length: int, more: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} -", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in more.items()), "", ""]).encode()


@functools.lru_cache(maxsize=64)
def body_of(count: int, size: int) -> bytes:
    rows = np.random.default_rng(count).standard_normal((count, size), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    data = [
        {"object": "embedding", "index": at, "embedding": base64.b64encode(row.tobytes()).decode()}
        for at, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return orjson.dumps({"object": "list", "data": data, "model": "text-embedding-3-large", "usage": usage})


def serve(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            connection, _ = server.accept()
            threading.Thread(target=served.talk, args=[connection], daemon=True).start()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--tokens-per-minute", type=float, required=True)
    given = parser.parse_args()
    serve(Served(given.size, given.latency, Limits(given.tokens_per_minute or None, None)))
