"""Routes: one call, its limits, its answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from tests.sandbox.qdrant_server import request as json_body
from tests.sandbox.qdrant_server.collection import Collection
from tests.sandbox.qdrant_server.points import NoSuchCondition
from tests.sandbox.qdrant_server.request import Refusal, bad_request, format_error, no_variant
from tests.sandbox.qdrant_server.settings import Dialect
from tests.sandbox.qdrant_server.storage import Storage

MINUTE = 60.0


def check_write(collection: Collection, points: int) -> None:
    """Refusal (400, 429) for a write of `points` points that strict mode forbids."""
    strict = _strict(collection)
    largest = strict.get("upsert_max_batchsize")
    if largest is not None and points > largest:
        raise bad_request(_too_many(points, largest, "upsert limit"))
    _spend(collection, "Write", strict.get("write_rate_limit"), points)


def check_read(collection: Collection, request: dict[str, Any]) -> None:
    """Refusal (400, 429) for a read that strict mode forbids."""
    strict = _strict(collection)
    asked, largest = request.get("limit"), strict.get("max_query_limit")
    if largest is not None and asked is not None and asked > largest:
        raise bad_request(_too_many(asked, largest, "limit"))
    _spend(collection, "Read", strict.get("read_rate_limit"), 1)


def _strict(collection: Collection) -> dict[str, Any]:
    strict: dict[str, Any] = collection.config.get("strict_mode_config", {})
    return strict if strict.get("enabled") else {}


def _too_many(asked: int, largest: int, what: str) -> str:
    advice = f'Help: Reduce the "{what}" parameter to or below {largest}.'
    return f'Limit exceeded {asked} > {largest} for "{what}". {advice}'


def _spend(collection: Collection, kind: str, per_minute: int | None, cost: int) -> None:
    if per_minute is None:
        return
    refused = f"Rate limiting exceeded: {kind} rate limit exceeded"
    if cost > per_minute:
        raise Refusal(
            429, f"{refused}, request larger than rate limiter capacity, please try to split your request"
        )
    with collection.lock:
        at_first = per_minute - 1 if kind == "Write" else per_minute  # as seen: the creation has spent one
        tokens, then = collection.rate_tokens.get(kind, (float(at_first), time.monotonic()))
        now = time.monotonic()
        tokens = min(per_minute, tokens + (now - then) * per_minute / MINUTE)
        if tokens < cost:
            seconds = math.ceil((cost - tokens) * MINUTE / per_minute)
            said = f"Operation requires {cost} tokens but only {tokens:.1f} were available. Retry after {seconds}s"
            raise Refusal(429, f"{refused}: {said}", headers={"retry-after": str(seconds)})
        collection.rate_tokens[kind] = (tokens - cost, now)


ACCEPTED = object()  # what a handler returns for work that goes on after the answer (202)


@dataclass
class Call:
    """One request as the handlers see it."""

    storage: Storage
    request: Request
    names: Mapping[str, str]  # the variable parts of the path, decoded
    query: Mapping[str, str]
    body: bytes = b""
    json: dict[str, Any] = field(default_factory=dict)

    @property
    def dialect(self) -> Dialect:
        """The version that is played."""
        return self.storage.dialect

    def wait(self, *, default: bool) -> bool:
        """The `wait` parameter."""
        return self.query.get("wait", str(default).lower()) == "true"


Handler = Callable[[Call], Any]


@dataclass(frozen=True)
class Route:
    """`takes` is "json" (a body is needed), "nothing", or "stream" (the handler is a coroutine that reads it)."""

    handler: Handler
    takes: str
    plain_errors: bool


class Routes:
    """A table of patterns such as `/collections/{name}/points`."""

    def __init__(self) -> None:
        self._table: list[tuple[str, list[str], Route]] = []

    def add(
        self,
        method: str,
        pattern: str,
        handler: Handler,
        *,
        takes: str = "nothing",
        plain_errors: bool = False,
    ) -> None:
        """Register a handler; `takes` and `plain_errors` as in Route."""
        self._table.append((method, pattern.split("/"), Route(handler, takes, plain_errors)))

    def find(self, method: str, raw_path: str) -> tuple[Route, dict[str, str]] | None:
        """The route for a request and the decoded variable parts of its path."""
        parts = raw_path.split("/")
        for wanted, pattern, route in self._table:
            names = _match(pattern, parts) if wanted == method else None
            if names is not None:
                return route, names
        return None


def _match(pattern: list[str], parts: list[str]) -> dict[str, str] | None:
    if len(pattern) != len(parts):
        return None
    names = {}
    for wanted, given in zip(pattern, parts, strict=True):
        if wanted.startswith("{"):
            names[wanted[1:-1]] = unquote(given)
        elif wanted != given:
            return None
    return names


async def answer(storage: Storage, routes: Routes, request: Request) -> Response:
    """Find the route, read the body, run the handler in a thread, wrap its result."""
    started = time.perf_counter()
    raw_path = request.scope["raw_path"].decode("ascii").partition("?")[0]
    found = routes.find(request.method, raw_path)
    if found is None:
        return Response(status_code=404)
    route, names = found
    try:
        _check_name(names, storage.dialect)
        query = dict(parse_qsl(request.url.query, keep_blank_values=True))
        call = Call(storage, request, names, query)
        result = await _result(route, call)
    except Refusal as refusal:
        return refused(refusal, started, plain=route.plain_errors)
    return result if isinstance(result, Response) else _envelope(result, started)


async def _result(route: Route, call: Call) -> Any:
    if route.takes == "stream":
        return await route.handler(call)
    call.body = await _body(call.request, call.dialect)
    return await run_in_threadpool(_run, route, call)


def _run(route: Route, call: Call) -> Any:
    if route.takes == "json":
        call.json = json_body.parse(call.body)
    try:
        return route.handler(call)
    except NoSuchCondition:
        raise no_variant(call.dialect.filter_enum, call.body) from None
    except KeyError as error:  # a field that the request lacks
        raise format_error(f"missing field `{error.args[0]}`") from None


async def _body(request: Request, dialect: Dialect) -> bytes:
    declared = int(request.headers.get("content-length") or 0)
    if declared > json_body.BODY_LIMIT:
        limit = f"(limit: {json_body.BODY_LIMIT} bytes)"
        said = f"JSON payload ({declared} bytes) is larger than allowed {limit}."
        raise Refusal(400, dialect.oversize_prefix + said)
    return await request.body()


def _check_name(names: Mapping[str, str], dialect: Dialect) -> None:
    if "/" in names.get("name", ""):
        said = f'{dialect.name_parameter}: collection name cannot contain "/" char'
        raise Refusal(422, f"Validation error in path parameters: [{said}]")


def _envelope(result: Any, started: float) -> Response:
    spent = time.perf_counter() - started
    if result is ACCEPTED:
        return json_response({"status": "accepted", "time": spent}, 202)
    return json_response({"result": result, "status": "ok", "time": spent})


def refused(refusal: Refusal, started: float, *, plain: bool = False) -> Response:
    """The answer for a refusal, in the JSON envelope or as plain text."""
    if plain or refusal.plain:
        return Response(
            refusal.text,
            refusal.status,
            headers={"content-type": "text/plain; charset=utf-8", **refusal.headers},
        )
    body = {"status": {"error": refusal.text}, "time": time.perf_counter() - started}
    return json_response(body, refusal.status, refusal.headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer; numpy arrays and scalars become numbers."""
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, headers={"content-type": "application/json", **(headers or {})})
