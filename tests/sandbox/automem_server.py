"""AutoMem's stand-in: health, recall and remember over real stores, and the check of the vector size at its start."""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import re
import secrets
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import requests
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.sandbox.automem_embedding import Settings, VectorsUnavailable
from tests.sandbox.automem_recall import recall
from tests.sandbox.automem_stores import (
    DEFAULTS,
    MemoryGraph,
    VectorStore,
    decode_metadata,
    is_on,
    iso,
    parse_moment,
    point_payload,
    settings_from,
    tag_prefixes,
)
from tests.sandbox.process import PROJECT_ROOT, ServerProcess, free_port

HOST = "127.0.0.1"
CONTENT_LIMIT = 2000  # characters
MOST_RESULTS = 50
METHOD_NOT_ALLOWED = "The method is not allowed for the requested URL."
log = logging.getLogger("automem")


def parse_memory(body: object, vector_size: int) -> dict[str, Any]:
    """Build the node's properties from a request. Raises HTTPException (400) with AutoMem's texts."""
    if not isinstance(body, Mapping):
        raise HTTPException(400, "JSON body is required")
    if body.get("embedding"):  # the stand-in embeds every memory itself
        raise HTTPException(400, f"Embedding must contain exactly {vector_size} values")
    content = _content(body)
    tags = tag_list(body.get("tags"))
    created = _moment(body, "timestamp") or iso(datetime.now(timezone.utc))
    updated = _moment(body, "updated_at") or created
    return {
        "id": str(uuid.uuid4()),
        "content": content,
        "timestamp": created,
        "importance": _importance(body),
        "tags": tags,
        "tag_prefixes": tag_prefixes(tags),
        "type": body.get("type") or "Memory",  # the stand-in has no classifier
        "confidence": float(body.get("confidence") or 0.9) if body.get("type") else 0.3,
        "t_valid": _moment(body, "t_valid") or created,
        "t_invalid": _moment(body, "t_invalid"),
        "updated_at": updated,
        "last_accessed": _moment(body, "last_accessed") or updated,
        "metadata": json.dumps(body.get("metadata") or {}),
        "processed": False,
    }


def tag_list(raw: object) -> list[str]:
    """Read tags from a list or from a text with commas."""
    parts = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, list) else []
    return [part.strip() for part in parts if isinstance(part, str) and part.strip()]


def _content(body: Mapping[str, Any]) -> str:
    content = str(body.get("content") or "").strip()
    if not content:
        raise HTTPException(400, "'content' is required")
    if len(content) > CONTENT_LIMIT:
        raise HTTPException(
            400,
            f"Content exceeds maximum length of {CONTENT_LIMIT} characters ({len(content)} provided). "
            "Please split into smaller memories or summarize.",
        )
    return content


def _importance(body: Mapping[str, Any]) -> float:
    try:
        return 0.5 if body.get("importance") is None else float(body["importance"])
    except (TypeError, ValueError):
        raise HTTPException(400, "'importance' must be a number") from None


def _moment(body: Mapping[str, Any], name: str) -> str | None:
    moment = parse_moment(body.get(name))
    return iso(moment) if moment else None


class Worker:
    """One thread that enriches and embeds stored memories in their order.

    A failure is only logged: a memory whose vector could not be written exists in the graph only. AutoMem repairs
    such memories every hour, the stand-in never does.
    """

    def __init__(self, graph: MemoryGraph, vectors: VectorStore) -> None:
        self._graph = graph
        self._vectors = vectors
        self._jobs: queue.Queue[str] = queue.Queue()
        self._busy = False
        self._processed = self._failed = 0
        self.enqueue = self._jobs.put
        threading.Thread(target=self._run, name="automem-worker", daemon=True).start()

    def state(self) -> dict[str, object]:
        """Report its counts as `/health` shows them, under `enrichment`."""
        return {
            "failed": self._failed,
            "inflight": int(self._busy),
            "pending": self._jobs.qsize(),
            "processed": self._processed,
            "queue_depth": self._jobs.qsize(),
            "status": "running",
        }

    def _run(self) -> None:
        while True:
            memory_id = self._jobs.get()
            self._busy = True
            try:
                self._process(memory_id)
                self._processed += 1
            except RedisError as error:
                log.error("Enrichment failed for %s: %s", memory_id, error)
                self._failed += 1
            self._busy = False

    def _process(self, memory_id: str) -> None:
        properties = self._graph.get(memory_id)
        if properties is None:
            return
        now = datetime.now(timezone.utc)
        metadata = decode_metadata(properties.get("metadata"))
        metadata.setdefault("entities", {})  # the stand-in recognises none
        metadata["enrichment"] = {
            "last_run": iso(now),
            "forced": False,
            "temporal_links": self._graph.link_preceding(memory_id, now),
            "patterns_detected": [],
            "semantic_neighbors": [],
        }
        properties["metadata"] = json.dumps(metadata)
        changed = {
            "metadata": properties["metadata"],
            "summary": re.split(r"(?<=[.!?])\s+", properties["content"])[0],  # the first sentence
            "enriched": True,
            "enriched_at": iso(now),
            "processed": True,
        }
        self._graph.update(memory_id, changed)
        try:
            self._vectors.upsert(memory_id, properties["content"], point_payload(properties))
        except VectorsUnavailable as error:
            log.error("Qdrant upsert failed for %s: %s", memory_id, error)


class Service:
    """The running stand-in: its stores, its worker and its routes.

    A new Service creates what is missing in both stores. Raises ValueError if the collection has another size than
    VECTOR_SIZE, and VectorsUnavailable or RedisError if a store does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._graph = MemoryGraph(settings)
        self._vectors = VectorStore(settings)
        self._vectors.prepare()
        self._graph.ensure_indexes()
        self._worker = Worker(self._graph, self._vectors)

    def application(self) -> Starlette:
        """Build the ASGI application, without the check of the token."""
        recall_methods = ["GET", "POST"] if is_on(self._settings["AUTOMEM_POST_RECALL"]) else ["GET"]
        return Starlette(
            routes=[
                Route("/health", partial(_answer, self._health), methods=["GET"]),
                Route("/recall", partial(_answer, self._recall), methods=recall_methods),
                Route("/memory", partial(_answer, self._store), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _http_error, RedisError: _graph_error},
        )

    def authorized(self, request: Request) -> bool:
        """Whether the request carries the token, as a bearer or as X-API-Key. /health needs none."""
        token = self._settings["AUTOMEM_API_TOKEN"]
        if not token or request.url.path == "/health":
            return True
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        return secrets.compare_digest(given.strip().encode(), token.encode())

    def _health(self, _request: Request, _body: object) -> JSONResponse:
        memories = points = size = None
        try:
            size, points = self._vectors.collection_size(), self._vectors.count()
        except VectorsUnavailable as error:
            log.info("health: %s", error)
        try:
            memories = self._graph.count()
        except RedisError as error:
            log.info("health: %s", error)
        sync = _sync_status(memories, points)
        healthy = memories is not None and sync != "drift_detected"
        answer = {
            "status": "healthy" if healthy else "degraded",
            "falkordb": "disconnected" if memories is None else "connected",
            "qdrant": "connected",
            "memory_count": memories,
            "vector_count": points,
            "sync_status": sync,
            "vector_dimensions": {
                "configured": self._vectors.configured_size,
                "effective": self._vectors.effective_size,
                "collection": size,
                "mismatch": size is not None and size != self._vectors.configured_size,
            },
            "enrichment": self._worker.state(),
            "timestamp": iso(datetime.now(timezone.utc)),
            "graph": self._settings["FALKORDB_GRAPH"],
        }
        return JSONResponse(answer)

    def _recall(self, request: Request, body: object) -> JSONResponse:
        given: dict[str, Any] = dict(request.query_params)
        given["tags"] = request.query_params.getlist("tags")
        if request.method == "POST" and isinstance(body, dict):
            given = body
        tags = given.get("tags")
        listed = [tag for part in (tags if isinstance(tags, list) else [tags]) for tag in tag_list(part)]
        limit = max(1, min(int(given.get("limit", 5)), MOST_RESULTS))
        text = str(given.get("query") or "").strip()
        return JSONResponse(recall(self._graph, self._vectors, text, limit, [tag.lower() for tag in listed]))

    def _store(self, _request: Request, body: object) -> JSONResponse:
        started = time.perf_counter()
        memory = parse_memory(body, self._vectors.effective_size)
        self._graph.store(memory)
        self._worker.enqueue(memory["id"])
        shown = ("type", "confidence", "timestamp", "updated_at", "last_accessed")
        answer = {
            "status": "success",
            "memory_id": memory["id"],
            "stored_at": memory["timestamp"],
            **{key: memory[key] for key in shown},
            "qdrant": "queued",
            "embedding_status": "queued",
            "enrichment": "queued",
            "metadata": json.loads(memory["metadata"]),
            "query_time_ms": round((time.perf_counter() - started) * 1000, 2),
        }
        return JSONResponse(answer, 201)


def _sync_status(memories: int | None, points: int | None) -> str:
    if memories is None or points is None:
        return "unknown"
    if memories == points:
        return "synced"
    return "drift_detected" if points < memories else "orphaned_vectors"


async def _answer(work: Callable[[Request, object], JSONResponse], request: Request) -> JSONResponse:
    """Read the body, then answer in a thread."""
    try:
        body = json.loads(await request.body())
    except ValueError:
        body = None
    return await run_in_threadpool(work, request, body)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"code": status, "message": message, "status": "error"}, status)


def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, METHOD_NOT_ALLOWED if error.status_code == 405 else error.detail)


def _graph_error(_request: Request, error: Exception) -> JSONResponse:
    log.error("FalkorDB: %s", error)
    return _error(503, "FalkorDB is unavailable")


class AutoMemServer(ServerProcess):
    """The service as a child process.

    Args:
        port: a free one if None.
        env: AutoMem's variables (FALKORDB_HOST, QDRANT_URL, VECTOR_SIZE, EMBEDDING_MODEL, ...).
    """

    def __init__(self, port: int | None = None, env: Mapping[str, str] | None = None, log: Path | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        # Empty counts as unset: the parent's variables do not reach the service.
        settings = {**dict.fromkeys(DEFAULTS, ""), **(env or {})}
        argv = [sys.executable, "-m", "tests.sandbox.automem_server", "--port", str(self.port)]
        super().__init__(argv, log, settings, PROJECT_ROOT)

    def start(self) -> AutoMemServer:
        """Start it and wait for its /health. Raises ServerStartError, with the log's end, if it refuses."""
        return super().start().wait_ready(lambda: bool(self.health()))

    def restart(self, env: Mapping[str, str] | None = None) -> AutoMemServer:
        """Stop it and start it again on the same port, with some variables changed."""
        self._env.update(env or {})
        return super().restart()

    def health(self) -> dict[str, Any]:
        """Ask for /health. Raises OSError if it does not answer."""
        return dict(requests.get(f"{self.url}/health", timeout=10).json())


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM."""
    import uvicorn

    parser = argparse.ArgumentParser(description="AutoMem stand-in; its settings come from the environment")
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(levelname)s | %(message)s")
    service = Service(settings_from(os.environ))
    routes = service.application()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        """Check the token before the route: a wrong token is answered 401 even if there is no such route."""
        if service.authorized(Request(scope)):
            await routes(scope, receive, send)
        else:
            await _error(401, "Unauthorized")(scope, receive, send)

    uvicorn.run(application, host=HOST, port=arguments.port, log_level="warning", lifespan="off")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
