"""The stand-in as an ASGI application: keys, connections, routes."""

from __future__ import annotations

import contextlib
import hmac
import time
from dataclasses import dataclass, field

import h11
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.sandbox.qdrant_server import faults, routes_collections, routes_points, routes_snapshots
from tests.sandbox.qdrant_server.request import Refusal
from tests.sandbox.qdrant_server.routing import Routes, answer, refused
from tests.sandbox.qdrant_server.settings import Dialect
from tests.sandbox.qdrant_server.storage import Storage

OPEN_PATHS = ("/", "/healthz", "/readyz", "/livez")
READS = (
    "count",
    "scroll",
    "query",
    "search",
    "batch",
    "points",
)  # the last part of a POST that changes nothing


@dataclass(frozen=True)
class Keys:
    """The keys that the server knows; without the first, everything is allowed to everyone."""

    full: str | None = field(default=None, repr=False)
    read_only: str | None = field(default=None, repr=False)

    def check(self, request: Request, dialect: Dialect) -> None:
        """Refusal (401, 403) where the request may not be sent."""
        path = request.url.path
        if (self.full is None and self.read_only is None) or path in OPEN_PATHS:
            return
        given = _given(request)
        if given is None:
            raise Refusal(401, "Must provide an API key or an Authorization bearer token", plain=True)
        if _equal(given, self.full):
            return
        if not _equal(given, self.read_only):
            raise Refusal(401, "Invalid API key or JWT", plain=True)
        if _changes(request.method, path):
            plain = dialect.plain_upload_refusal and path.endswith("/snapshots/upload")
            raise Refusal(403, "Forbidden: Global manage access is required", plain=plain)


def _given(request: Request) -> str | None:
    key = request.headers.get("api-key")
    if key is not None:
        return key
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else None


def _equal(given: str, key: str | None) -> bool:
    return key is not None and hmac.compare_digest(given.encode(), key.encode())


def _changes(method: str, path: str) -> bool:
    if method == "POST" and "/points" in path:
        return path.rpartition("/")[2] not in READS
    return method not in ("GET", "HEAD")


UNREAD_LIMIT = 3 * 1024 * 1024
ARRIVES_ANYWAY = 64 * 1024  # a body this small is in the buffers by the time of the answer


class ClosingProtocol(H11Protocol):
    """Closes a connection whose request was answered before its body was read."""

    def on_response_complete(self) -> None:
        """Go on with the next request, or close."""
        if _body_outstanding(self):
            self.transport.close()
            return
        super().on_response_complete()


class StallingProtocol(H11Protocol):
    """Stops reading a connection once `UNREAD_LIMIT` bytes came after an answer that did not wait for them."""

    _unread: int | None = None  # bytes that came since such an answer

    def data_received(self, data: bytes) -> None:
        """Hand bytes to the parser, or drop those of a body that was refused."""
        if self._unread is None:
            super().data_received(data)
            return
        self._unread += len(data)
        if self._unread > UNREAD_LIMIT:
            self.transport.pause_reading()

    def on_response_complete(self) -> None:
        """Go on with the next request, or count what still comes of this one."""
        if _body_outstanding(self) and not self.transport.is_closing():
            self._unread = 0
            self.flow.resume_reading()
            return
        super().on_response_complete()


def _body_outstanding(connection: H11Protocol) -> bool:
    declared = dict(connection.headers).get(b"content-length")
    large = declared is None or int(declared) > ARRIVES_ANYWAY
    return large and connection.conn.their_state is h11.SEND_BODY


def protocol(dialect: Dialect) -> type[H11Protocol]:
    """The protocol of the version that is played."""
    return ClosingProtocol if dialect.closes_refused_bodies else StallingProtocol


def build(storage: Storage, keys: Keys) -> ASGIApp:
    """The application over an opened storage."""
    routes = Routes()
    for part in (routes_collections, routes_points, routes_snapshots):
        part.add_to(routes)
    rules = faults.Faults()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        if request.url.path == faults.PATH:
            await (await rules.control(request))(scope, receive, send)
            return
        rule = rules.take(request) or faults.NO_FAULT
        if rule.delay_seconds:
            await request.body()  # a client that hangs up meanwhile stops nothing, as on the real server
        response = await faults.before_answer(rule) or await _allowed(storage, keys, routes, request)
        with contextlib.suppress(faults.Cut):
            await response(scope, receive, await faults.around(send, rule))

    return app


async def _allowed(storage: Storage, keys: Keys, routes: Routes, request: Request) -> Response:
    started = time.perf_counter()
    try:
        keys.check(request, storage.dialect)
    except Refusal as refusal:
        if refusal.status == 401:  # the real server's own middleware, which names no content type
            return Response(refusal.text, refusal.status)
        return refused(refusal, started)
    return await answer(storage, routes, request)
