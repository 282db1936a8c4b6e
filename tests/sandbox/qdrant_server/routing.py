"""Requests and answers: the routes to the endpoints, JSON bodies, uploaded and downloaded files."""

from __future__ import annotations

import io
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, unquote

import orjson
from isal import igzip, isal_zlib
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tests.sandbox.qdrant_server.points import NoSuchCondition
from tests.sandbox.qdrant_server.storage import Collection, Storage
from tests.sandbox.qdrant_server.versions import Refusal, Version, format_error, no_variant, parse_json

BODY_LIMIT = 32 * 1024 * 1024
DOWNLOAD_PIECE = 1 << 20
GZIP_WINDOW = 31
ACCEPTED = object()  # what a handler returns if the work continues after the answer (202)


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
    def version(self) -> Version:
        """The version that is emulated."""
        return self.storage.version

    @property
    def collection(self) -> Collection:
        """The collection that the path names. Raises Refusal (404)."""
        return self.storage.get(self.names["name"])

    def wait(self, *, default: bool) -> bool:
        """The `wait` parameter."""
        return self.query.get("wait", str(default).lower()) == "true"

    def done(self, operation: int) -> dict[str, Any]:
        """The result of a write, by the number of its operation."""
        status = "completed" if self.wait(default=False) else "acknowledged"
        return {"operation_id": operation, "status": status}


Handler = Callable[[Call], Any]


class Routes:
    """A table of handlers by method and pattern, such as `/collections/{name}/points`."""

    def __init__(self) -> None:
        self._table: list[tuple[str, re.Pattern[str], Handler, str]] = []

    def add(self, method: str, pattern: str, handler: Handler, body: str = "none") -> None:
        """Register a handler. `body` is "none", "json", or "stream" (the handler is a coroutine that reads it)."""
        path = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]*)", pattern))
        self._table.append((method, path, handler, body))

    async def answer(self, storage: Storage, request: Request) -> Response:
        """Find the route, read the body, run the handler in a thread, wrap its result."""
        started = time.perf_counter()
        found = self._find(request)
        if found is None:
            return Response(status_code=404)
        handler, body, names = found
        query = dict(parse_qsl(request.url.query, keep_blank_values=True))
        try:
            result = await _result(handler, body, Call(storage, request, names, query))
        except Refusal as refusal:
            return refused(refusal, started)
        return result if isinstance(result, Response) else _envelope(result, started)

    def _find(self, request: Request) -> tuple[Handler, str, dict[str, str]] | None:
        raw_path = request.scope["raw_path"].decode("ascii").partition("?")[0]
        for method, path, handler, body in self._table:
            match = path.fullmatch(raw_path) if method == request.method else None
            if match:
                return handler, body, {name: unquote(part) for name, part in match.groupdict().items()}
        return None


async def _result(handler: Handler, body: str, call: Call) -> Any:
    if "/" in call.names.get("name", ""):
        parameter = "collection_name" if call.version.modern else "name"
        problem = f'{parameter}: collection name cannot contain "/" char'
        raise Refusal(422, f"Validation error in path parameters: [{problem}]")
    if body == "stream":
        return await handler(call)
    declared = int(call.request.headers.get("content-length") or 0)
    if declared > BODY_LIMIT:
        problem = f"JSON payload ({declared} bytes) is larger than allowed (limit: {BODY_LIMIT} bytes)."
        raise Refusal(400, problem if call.version.modern else f"Payload error: {problem}")
    call.body = await call.request.body()
    if call.request.headers.get("content-encoding") == "gzip":
        call.body = igzip.decompress(call.body)
        if len(call.body) > BODY_LIMIT:
            problem = f"JSON payload has exceeded limit ({BODY_LIMIT} bytes)."
            raise Refusal(400, problem if call.version.modern else f"Payload error: {problem}")
    return await run_in_threadpool(_run, handler, body, call)


def _run(handler: Handler, body: str, call: Call) -> Any:
    if body == "json":
        call.json = parse_json(call.body)
    try:
        return handler(call)
    except NoSuchCondition:
        raise no_variant("MatchInterface" if call.version.modern else "Condition", call.body) from None
    except KeyError as error:  # a field that the request lacks
        raise format_error(f"missing field `{error.args[0]}`") from None


def _envelope(result: Any, started: float) -> Response:
    seconds = time.perf_counter() - started
    if result is ACCEPTED:
        return json_response({"status": "accepted", "time": seconds}, 202)
    return json_response({"result": result, "status": "ok", "time": seconds})


def refused(refusal: Refusal, started: float) -> Response:
    """Answer with a refusal, in the JSON envelope or as plain text."""
    if refusal.plain:
        kind = {"content-type": "text/plain; charset=utf-8"}
        return Response(refusal.text, refusal.status, headers={**kind, **refusal.headers})
    body = {"status": {"error": refusal.text}, "time": time.perf_counter() - started}
    return json_response(body, refusal.status, refusal.headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with JSON. Numpy arrays and scalars become numbers."""
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, headers={"content-type": "application/json", **(headers or {})})


async def receive_file(request: Request, boundary: str, name: str, target: Path) -> str | None:
    """Store the field `name` of a multipart body in `target`. Reads the body to its end.

    Returns the file name that the client gave, without any folder; None if the body has no such field.
    """
    delimiter = b"\r\n--" + boundary.encode()
    body, filename = _Body(request.stream()), None
    await body.copy_until(delimiter, io.BytesIO())
    while await body.copy_until(b"\r\n\r\n", head := io.BytesIO()):
        text = head.getvalue().decode("utf-8", "replace")
        wanted = re.search(rf'[;\s]name="{name}"', text)
        with (target if wanted else target.with_name("ignored")).open("wb") as out:
            await body.copy_until(delimiter, out)
        if wanted:
            given = re.search(r'filename="([^"]*)"', text)
            filename = Path(given[1] if given else name).name
    return filename


class _Body:
    """A body that is read up to one delimiter after the other, with little more than a chunk of it in memory."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = stream
        self._buffer = b"\r\n"  # the first delimiter has no line before it

    async def copy_until(self, delimiter: bytes, out: BinaryIO) -> bool:
        """Write what precedes the delimiter to `out` and skip the delimiter. False if the body ends before it."""
        overlap = len(delimiter) - 1
        while (found := self._buffer.find(delimiter)) < 0:
            chunk = await anext(self._stream, None)
            if chunk is None:
                return False
            out.write(self._buffer[:-overlap])
            self._buffer = self._buffer[-overlap:] + chunk
        out.write(self._buffer[:found])
        self._buffer = self._buffer[found + len(delimiter) :]
        return True


def download(path: Path, request: Request) -> Response:
    """Send a snapshot file: status 200, 206 for a range, or 416.

    A compressed answer is gzip; the real server prefers br if the client accepts it.
    """
    stat = path.stat()
    size = stat.st_size
    headers = {
        "content-disposition": f'attachment; filename="{path.name}"',
        "content-type": "application/octet-stream",
        "accept-ranges": "bytes",
        "last-modified": formatdate(stat.st_mtime, usegmt=True),
        "etag": f'"{stat.st_ino:x}:{size:x}:{int(stat.st_mtime):x}:{stat.st_mtime_ns % 10**9:x}"',
    }
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if wanted:
        first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if first >= size:
            return Response(status_code=416, headers={**headers, "content-range": f"bytes */{size}"})
        headers["content-encoding"] = "identity"
        headers["content-range"] = f"bytes {first}-{last}/{size}"
        headers["content-length"] = str(last + 1 - first)
        return StreamingResponse(_pieces(path, first, last + 1 - first), 206, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["content-encoding"] = "gzip"
        return StreamingResponse(_gzipped(_pieces(path, 0, size)), headers=headers)
    return StreamingResponse(_pieces(path, 0, size), headers={**headers, "content-length": str(size)})


def download_from_s3(path: Path) -> Response:
    """Send a file as a server with its snapshots in S3: always whole, and without a length."""
    return StreamingResponse(_pieces(path, 0, path.stat().st_size), media_type="application/octet-stream")


def _pieces(path: Path, start: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (piece := file.read(min(DOWNLOAD_PIECE, length))):
            length -= len(piece)
            yield piece


def _gzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    packer = isal_zlib.compressobj(1, isal_zlib.DEFLATED, GZIP_WINDOW)
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()
