"""The ASGI application: faults first, then the key, then the endpoint."""

from __future__ import annotations

import contextlib
import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.sandbox.qdrant_server import faults, routes_collections, routes_points, routes_snapshots
from lib.sandbox.qdrant_server.auth import Keys
from lib.sandbox.qdrant_server.errors import Refusal
from lib.sandbox.qdrant_server.routing import Routes, answer, refused
from lib.sandbox.qdrant_server.storage import Storage


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
