"""AutoMem's stand-in as a server: routes, start and stop."""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.sandbox.automem_memory import NewMemory, Refused, Worker, parse_memory, stored_answer, tag_list
from tests.sandbox.automem_recall import RecallQuery, recall
from tests.sandbox.automem_store import (
    PAYLOAD_KEYS,
    VARIABLES,
    AutoMemSettings,
    MemoryGraph,
    Vectors,
    VectorsUnavailable,
    iso,
    settings_from,
)
from tests.sandbox.process import ServerProcess, free_port

MOST_RESULTS = 50
_TEXTS = {
    404: "The requested URL was not found on the server. If you entered the URL manually please check your spelling "
    "and try again.",
    405: "The method is not allowed for the requested URL.",
}
log = logging.getLogger("automem")


class Service:
    """The running stand-in: its stores, its worker and its routes."""

    def __init__(self, settings: AutoMemSettings) -> None:
        self._settings = settings
        self._graph = MemoryGraph(settings)
        self._vectors = Vectors(settings)
        self._worker = Worker(self._graph, self._vectors)

    def start(self) -> None:
        """Create what is missing in both stores, then begin to work.

        Raises ValueError where the collection has another size than VECTOR_SIZE; a store that does not answer is
        only logged, and tried again when it is needed.
        """
        try:
            self._vectors.prepare()
        except VectorsUnavailable as error:
            log.error("Failed to initialize Qdrant client: %s", error)
        try:
            self._graph.ensure_indexes()
        except RedisError as error:
            log.error("Failed to initialize FalkorDB connection: %s", error)
        self._worker.start()

    def application(self) -> Starlette:
        """The ASGI application."""
        ways = ["GET", "POST"] if self._settings.post_recall else ["GET"]
        return Starlette(
            routes=[
                Route("/health", self._route(self._health), methods=["GET"]),
                Route("/recall", self._route(self._recall), methods=ways),
                Route("/memory", self._route(self._store), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _plain_error},
        )

    def authorized(self, request: Request) -> bool:
        """Whether the request carries the token: as a bearer, as X-API-Key or as `api_key`. /health needs none."""
        token = self._settings.api_token
        if not token or request.url.path == "/health":
            return True
        header = request.headers.get("authorization", "")
        bearer = header[7:].strip() if header.lower().startswith("bearer ") else ""
        given = bearer or request.headers.get("x-api-key", "") or request.query_params.get("api_key", "")
        return secrets.compare_digest(given.strip().encode(), token.encode())

    def _route(self, work: Callable[[Request, Any], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            body = _json_or_none(request, await request.body())
            try:
                return await run_in_threadpool(partial(work, request, body))
            except Refused as refused:
                return error_answer(refused.status, refused.message)
            except RedisError as error:
                log.error("FalkorDB: %s", error)
                return error_answer(503, "FalkorDB is unavailable")

        return endpoint

    def _health(self, _request: Request, _body: object) -> Response:
        memories, points, size = self._memory_count(), None, None
        self._find_qdrant()
        try:
            size, points = self._vectors.collection_size(), self._vectors.count()
        except VectorsUnavailable as error:
            log.info("health: %s", error)
        sync = _sync_status(memories, points)
        whole = memories is not None and self._vectors.ready and sync != "drift_detected"
        return json_answer(
            {
                "status": "healthy" if whole else "degraded",
                "falkordb": "disconnected" if memories is None else "connected",
                "qdrant": "connected" if self._vectors.ready else "disconnected",
                "memory_count": memories,
                "vector_count": points,
                "sync_status": sync,
                "vector_dimensions": {
                    "configured": self._settings.vector_size,
                    "effective": self._vectors.effective_size,
                    "collection": size,
                    "mismatch": size is not None and size != self._settings.vector_size,
                },
                "enrichment": self._worker.state(),
                "timestamp": iso(datetime.now(timezone.utc)),
                "graph": self._settings.graph,
            }
        )

    def _recall(self, request: Request, body: object) -> Response:
        self._find_qdrant()
        if request.method == "POST" and isinstance(body, dict):
            return json_answer(recall(self._graph, self._vectors, _query_from(body, body.get("tags"))))
        params = request.query_params
        return json_answer(
            recall(self._graph, self._vectors, _query_from(dict(params), params.getlist("tags")))
        )

    def _store(self, _request: Request, body: object) -> Response:
        started = time.perf_counter()
        memory = parse_memory(body, self._vectors.effective_size)
        self._graph.store(memory.properties)
        self._find_qdrant()
        qdrant = "queued" if memory.vector is None else self._write_given_vector(memory, memory.vector)
        self._worker.enqueue(memory.id, embed=memory.vector is None)
        return json_answer(stored_answer(memory, qdrant, started), 201)

    def _write_given_vector(self, memory: NewMemory, vector: Sequence[float]) -> str:
        """A caller's own vector is written at once; its payload has the two dates of validity as well."""
        keys = (
            *(key for key in PAYLOAD_KEYS if key not in {"metadata", "relevance_score"}),
            "t_valid",
            "t_invalid",
        )
        payload = {**{key: memory.properties[key] for key in keys}, "metadata": memory.metadata}
        try:
            self._vectors.upsert(memory.id, vector, payload)
        except VectorsUnavailable as error:
            log.error("Qdrant upsert failed for %s: %s", memory.id, error)
            return "failed"
        return "stored"

    def _memory_count(self) -> int | None:
        try:
            return self._graph.count()
        except RedisError as error:
            log.info("health: %s", error)
            return None

    def _find_qdrant(self) -> None:
        """A Qdrant that did not answer at the start is prepared when it does; a made collection is not made again."""
        if self._vectors.ready:
            return
        try:
            self._vectors.prepare()
        except (VectorsUnavailable, ValueError) as error:
            log.error("Failed to initialize Qdrant client: %s", error)


def json_answer(body: object, status: int = 200) -> Response:
    """A body with sorted keys, as Flask writes it."""
    return Response(json.dumps(body, sort_keys=True), status, media_type="application/json")


def error_answer(status: int, message: str) -> Response:
    """AutoMem's one shape of an error."""
    return json_answer({"code": status, "message": message, "status": "error"}, status)


def _plain_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return error_answer(status, _TEXTS.get(status, str(error)))


def _sync_status(memories: int | None, points: int | None) -> str:
    if memories is None or points is None:
        return "unknown"
    if memories == points:
        return "synced"
    return "drift_detected" if points < memories else "orphaned_vectors"


def _json_or_none(request: Request, body: bytes) -> object:
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        return None
    try:
        return json.loads(body)
    except ValueError:
        return None


def _query_from(given: dict[str, Any], tags: object) -> RecallQuery:
    raw = tags if isinstance(tags, list) else [tags]
    wanted = [tag for part in raw for tag in tag_list(part)]
    try:
        limit = int(given.get("limit", 5))
    except (TypeError, ValueError):
        limit = 5
    return RecallQuery(
        text=str(given.get("query") or "").strip(),
        limit=max(1, min(limit, MOST_RESULTS)),
        tags=tuple(tag.lower() for tag in wanted),
        tag_mode="all" if given.get("tag_mode") == "all" else "any",
        tag_match="exact" if given.get("tag_match") == "exact" else "prefix",
    )


HOST = "127.0.0.1"
PROJECT_ROOT = Path(__file__).resolve().parents[2]


class AutoMemServer:
    """Handle on the service as a child process; also a context manager.

    Args:
        port: a free one where None.
        env: AutoMem's variables (FALKORDB_HOST, QDRANT_URL, VECTOR_SIZE, EMBEDDING_MODEL, ...).
        log: the child's output; a temporary file where None.
    """

    def __init__(
        self, port: int | None = None, env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        self.port = port or free_port()
        # Empty counts as unset: the parent's own variables do not leak into the service.
        self._env = {**dict.fromkeys(VARIABLES, ""), **(env or {})}
        self._log_dir = None if log else tempfile.TemporaryDirectory(prefix="automem-sandbox-")
        self._log = log or Path(self._log_dir.name if self._log_dir else "", "server.log")
        self._process: ServerProcess | None = None

    @property
    def url(self) -> str:
        """For AUTOMEM_API_URL."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._running().pid

    def start(self) -> AutoMemServer:
        """Start it and wait for its /health. Raises ServerStartError, with the log's end, where it refuses."""
        argv = [sys.executable, "-m", "tests.sandbox.automem_server", "--port", str(self.port)]
        self._process = ServerProcess(argv, self._log, self._env, PROJECT_ROOT)
        self._process.start().wait_ready(lambda: bool(self.health()))
        return self

    def stop(self) -> None:
        """SIGTERM; nothing happens if it does not run."""
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """SIGKILL; nothing happens if it does not run."""
        if self._process is not None:
            self._process.kill()

    def restart(self, env: Mapping[str, str] | None = None) -> AutoMemServer:
        """Stop it and start it again on the same port, with some variables changed."""
        self.stop()
        self._env.update(env or {})
        return self.start()

    def health(self) -> dict[str, Any]:
        """GET /health. Raises OSError where it does not answer."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
            return dict(json.load(answer))

    def log_tail(self) -> str:
        """The end of its log."""
        return self._running().log_tail()

    def __enter__(self) -> AutoMemServer:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise RuntimeError("this AutoMem was not started")
        return self._process


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM."""
    import uvicorn
    from starlette.requests import Request

    parser = argparse.ArgumentParser(description="AutoMem stand-in; its settings come from the environment")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--host", default=HOST)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(levelname)s | %(message)s")
    service = Service(settings_from(os.environ))
    service.start()
    routes = service.application()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        """The token comes before the route: a wrong one answers 401 even where there is none."""
        if scope["type"] == "http" and not service.authorized(Request(scope)):
            await error_answer(401, "Unauthorized")(scope, receive, send)
        else:
            await routes(scope, receive, send)

    uvicorn.run(application, host=arguments.host, port=arguments.port, log_level="warning", lifespan="off")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
