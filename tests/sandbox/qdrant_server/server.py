"""A stand-in for a Qdrant server, over the storage engine of the real server (qdrant-edge-py).

It is for tests and for quickstart, not for data that matters. It emulates one node of version 1.11.3 or 1.18.3 as
recordings of real servers show them. It stores all points of a collection in one shard, whatever `shard_number` is,
builds no vector index (searches are exact), and does not know JWT.

    python -m tests.sandbox.qdrant_server.server --version 1.18.3 --data DIR --port 6333

The API keys are read from QDRANT__SERVICE__API_KEY and QDRANT__SERVICE__READ_ONLY_API_KEY, as by the real server, so
that they are not in the list of processes.

Tests can cause faults: `POST /_sandbox/faults` with a list of them (see Fault), `DELETE` removes them all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import os
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import orjson
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.sandbox.qdrant_server import endpoints, point_endpoints
from tests.sandbox.qdrant_server.routing import Routes, json_response, refused
from tests.sandbox.qdrant_server.storage import Storage
from tests.sandbox.qdrant_server.versions import VERSIONS, Refusal, StartRefused, Version

HOST = "127.0.0.1"
BACKLOG = 256
START_REFUSED = 101  # the exit code of the real server when it panics
PATHS_WITHOUT_KEY = ("/", "/healthz", "/readyz", "/livez")
READS = ("count", "scroll", "query", "search", "points")  # the last part of a POST that changes nothing
FAULTS_PATH = "/_sandbox/faults"
UNREAD_LIMIT = 3 * 1024 * 1024
SMALL_BODY = 64 * 1024  # it is in the buffers when the answer is sent


@dataclass(frozen=True)
class Keys:
    """The keys that the server accepts. Without any, every request is allowed."""

    full: str | None = field(repr=False)
    read_only: str | None = field(repr=False)

    def check(self, request: Request, version: Version) -> None:
        """Raise Refusal (401, 403) if the request is not allowed."""
        path = request.url.path
        if not (self.full or self.read_only) or path in PATHS_WITHOUT_KEY:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = request.headers.get("api-key", token if scheme.lower() == "bearer" else None)
        if given is None:
            raise Refusal(401, "Must provide an API key or an Authorization bearer token", plain=True)
        if _equal(given, self.full):
            return
        if not _equal(given, self.read_only):
            raise Refusal(401, "Invalid API key or JWT", plain=True)
        if _changes(request.method, path):
            plain = version.modern and path.endswith("/snapshots/upload")
            raise Refusal(403, "Forbidden: Global manage access is required", plain=plain)


def _equal(given: str, key: str | None) -> bool:
    return key is not None and hmac.compare_digest(given.encode(), key.encode())


def _changes(method: str, path: str) -> bool:
    if method == "POST" and "/points" in path:
        return path.rpartition("/")[2] not in READS
    return method not in ("GET", "HEAD")


class _Cut(Exception):
    """The connection has to be closed in the middle of an answer."""


@dataclass
class Fault:
    """One fault. The first one whose `method` and `path` match a request is applied to it.

    Args:
        path: a regular expression, searched in the path with its query.
        status, body, headers: answer this without running the request.
        delay_seconds: wait first.
        cut_after_bytes: send that many bytes of the body, then close the connection.
        hang: neither run the request nor answer it.
        lose_answer: run the request, never answer.
        times: how often it is applied; None: always.
    """

    method: str | None = None
    path: str = ""
    status: int | None = None
    body: Any = ""
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    cut_after_bytes: int | None = None
    hang: bool = False
    lose_answer: bool = False
    times: int | None = None

    def matches(self, method: str, path: str) -> bool:
        """Whether the fault applies to this request."""
        right_method = self.method is None or self.method.upper() == method
        return self.times != 0 and right_method and re.search(self.path, path) is not None

    async def before_answer(self) -> Response | None:
        """Wait or hang. Returns the answer to give instead of the server's, if any."""
        await asyncio.sleep(self.delay_seconds)
        if self.hang:
            await asyncio.Event().wait()
        if self.status is None:
            return None
        if isinstance(self.body, str):
            return Response(self.body, self.status, headers=self.headers)
        return json_response(self.body, self.status, self.headers)

    async def around(self, send: Send) -> Send:
        """Wrap `send` to cut the answer. Does not return if the answer is lost."""
        if self.lose_answer:
            await asyncio.Event().wait()
        return send if self.cut_after_bytes is None else _cutting(send, self.cut_after_bytes)


def _cutting(send: Send, left: int) -> Send:
    async def limited(message: Message) -> None:
        nonlocal left
        if message["type"] == "http.response.body":
            body = message.get("body", b"")[:left]
            left -= len(body)
            await send({**message, "body": body, "more_body": True})
            if left == 0:
                raise _Cut
        else:
            await send(message)

    return limited


class Faults:
    """The faults in force."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    async def control(self, request: Request) -> Response:
        """Answer a request to FAULTS_PATH: POST adds faults, DELETE removes them all, GET lists them."""
        if request.method == "POST":
            self._faults += [Fault(**fault) for fault in orjson.loads(await request.body())]
        elif request.method == "DELETE":
            self._faults = []
        return json_response([vars(fault) for fault in self._faults])

    def take(self, request: Request) -> Fault:
        """Find the fault for this request and count it as used; one without effect if there is none."""
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        for fault in self._faults:
            if fault.matches(request.method, path):
                fault.times = None if fault.times is None else fault.times - 1
                return fault
        return Fault()


class ClosingProtocol(H11Protocol):
    """Closes a connection if its request was answered before its body was read, as 1.18 does."""

    def on_response_complete(self) -> None:
        """Continue with the next request, or close."""
        if _body_outstanding(self):
            self.transport.close()
            return
        super().on_response_complete()


class StallingProtocol(H11Protocol):
    """Stops reading a connection `UNREAD_LIMIT` bytes after an answer that did not wait for its body, as 1.11 does."""

    _unread: int | None = None  # bytes received since such an answer

    def data_received(self, data: bytes) -> None:
        """Hand bytes to the parser, or discard those of a refused body."""
        if self._unread is None:
            super().data_received(data)
            return
        self._unread += len(data)
        if self._unread > UNREAD_LIMIT:
            self.transport.pause_reading()

    def on_response_complete(self) -> None:
        """Continue with the next request, or count what is still received of this one."""
        if _body_outstanding(self) and not self.transport.is_closing():
            self._unread = 0
            self.flow.resume_reading()
            return
        super().on_response_complete()


def _body_outstanding(connection: H11Protocol) -> bool:
    declared = dict(connection.headers).get(b"content-length")
    large = declared is None or int(declared) > SMALL_BODY
    return large and connection.conn.their_state is h11.SEND_BODY


def build(storage: Storage, keys: Keys) -> ASGIApp:
    """Build the application over an opened storage."""
    routes, faults = Routes(), Faults()
    endpoints.add_to(routes)
    point_endpoints.add_to(routes)

    async def answer(request: Request) -> Response:
        started = time.perf_counter()
        try:
            keys.check(request, storage.version)
        except Refusal as refusal:
            if refusal.status == 401:  # by the real server's middleware, which sends no content type
                return Response(refusal.text, refusal.status)
            return refused(refusal, started)
        return await routes.answer(storage, request)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if request.url.path == FAULTS_PATH:
            await (await faults.control(request))(scope, receive, send)
            return
        fault = faults.take(request)
        if fault.delay_seconds:
            await request.body()  # if the client disconnects meanwhile, the request is run all the same
        response = await fault.before_answer() or await answer(request)
        with contextlib.suppress(_Cut):
            await response(scope, receive, await fault.around(send))

    return app


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal. Returns 0, or 101 if the version does not start with the data directory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else "")
    parser.add_argument("--version", choices=sorted(VERSIONS), required=True, help="the version to emulate")
    parser.add_argument("--port", type=int, required=True, help="the port to listen on")
    parser.add_argument("--data", type=Path, required=True, help="the data directory, created if missing")
    options = parser.parse_args(argv)
    s3 = os.environ.get("QDRANT__STORAGE__SNAPSHOTS_CONFIG__SNAPSHOTS_STORAGE") == "s3"
    storage = Storage(options.data, VERSIONS[options.version], s3=s3)
    try:
        storage.open()
    except StartRefused as refused_start:
        sys.stderr.write(f"Panic: {refused_start}\n")
        return START_REFUSED
    keys = Keys(
        os.environ.get("QDRANT__SERVICE__API_KEY") or None,
        os.environ.get("QDRANT__SERVICE__READ_ONLY_API_KEY") or None,
    )
    try:
        _serve(storage, keys, options.port)
    finally:
        storage.close()
    return 0


def _serve(storage: Storage, keys: Keys, port: int) -> None:
    # The protocol is named so that asyncio sets TCP_NODELAY: without it every answer waits 40 ms for an ACK.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(BACKLOG)
        config = uvicorn.Config(
            build(storage, keys),
            http=ClosingProtocol if storage.version.modern else StallingProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    raise SystemExit(main())
