"""Memories that AutoMem's stand-in takes: written at once, or by its worker."""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from redis.exceptions import RedisError

from tests.sandbox.automem_store import (
    MemoryGraph,
    Vectors,
    VectorsUnavailable,
    decode_metadata,
    iso,
    point_payload,
    tag_prefixes,
)

CONTENT_LIMIT = 2000  # characters


class Refused(Exception):
    """An error answer: `status` and the text that goes with it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class NewMemory:
    """A memory as it goes into the graph, and the vector where the caller brought one."""

    properties: dict[str, Any]
    metadata: dict[str, Any]
    vector: list[float] | None

    @property
    def id(self) -> str:
        """Its new UUID."""
        return str(self.properties["id"])


def parse_memory(body: object, vector_size: int) -> NewMemory:
    """Check and clean the body. Raises Refused (400) with AutoMem's own texts."""
    if not isinstance(body, Mapping):
        raise Refused(400, "JSON body is required")
    content = _content(body)
    metadata = _metadata(body.get("metadata"))
    tags = tag_list(body.get("tags"))
    created = _moment(body, "timestamp") or iso(datetime.now(timezone.utc))
    updated = _moment(body, "updated_at") or created
    properties = {
        "id": str(uuid.uuid4()),
        "content": content,
        "timestamp": created,
        "importance": _importance(body.get("importance")),
        "tags": tags,
        "tag_prefixes": tag_prefixes(tags),
        "type": body.get("type") or "Memory",  # the stand-in has no classifier
        "confidence": _confidence(body),
        "t_valid": _moment(body, "t_valid") or created,
        "t_invalid": _moment(body, "t_invalid"),
        "updated_at": updated,
        "last_accessed": _moment(body, "last_accessed") or updated,
        "metadata": json.dumps(metadata),
        "processed": False,
    }
    return NewMemory(properties, metadata, _vector(body.get("embedding"), vector_size))


def stored_answer(memory: NewMemory, qdrant: str, started: float) -> dict[str, Any]:
    """The body of the 201; `qdrant` is "queued", "stored" or "failed"."""
    properties = memory.properties
    return {
        "status": "success",
        "memory_id": memory.id,
        "stored_at": properties["timestamp"],
        **{
            key: properties[key] for key in ("type", "confidence", "timestamp", "updated_at", "last_accessed")
        },
        "qdrant": qdrant,
        "embedding_status": "queued" if memory.vector is None else "provided",
        "enrichment": "queued",
        "metadata": memory.metadata,
        "query_time_ms": round((time.perf_counter() - started) * 1000, 2),
    }


def tag_list(raw: object) -> list[str]:
    """Tags as a list, from a list or from a text with commas."""
    parts = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, list) else []
    return [part.strip() for part in parts if isinstance(part, str) and part.strip()]


def _content(body: Mapping[str, Any]) -> str:
    content = str(body.get("content") or "").strip()
    if not content:
        raise Refused(400, "'content' is required")
    if len(content) > CONTENT_LIMIT:
        raise Refused(
            400,
            f"Content exceeds maximum length of {CONTENT_LIMIT} characters ({len(content)} provided). "
            "Please split into smaller memories or summarize.",
        )
    return content


def _metadata(raw: object) -> dict[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise Refused(400, "'metadata' must be an object")
    return raw


def _importance(raw: Any) -> float:
    try:
        value = 0.5 if raw is None else float(raw)
    except (TypeError, ValueError):
        raise Refused(400, "'importance' must be a number") from None
    if not 0 <= value <= 1:
        raise Refused(400, "'importance' must be between 0 and 1")
    return value


def _confidence(body: Mapping[str, Any]) -> float:
    if not body.get("type"):
        return 0.3
    return 0.9 if body.get("confidence") is None else _importance(body["confidence"])


def _moment(body: Mapping[str, Any], name: str) -> str | None:
    raw = body.get(name)
    if not raw:
        return None
    try:
        moment = datetime.fromisoformat(str(raw).strip().replace("Z", "+00:00"))
    except ValueError as error:
        raise Refused(400, str(error) if name == "timestamp" else f"Invalid {name}: {error}") from None
    return iso(moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc))


def _vector(raw: Any, size: int) -> list[float] | None:
    if raw is None or raw == "":
        return None
    parts = [part for part in raw.split(",") if part.strip()] if isinstance(raw, str) else raw
    if not isinstance(parts, list):
        raise Refused(400, "Embedding must be a list of floats or a comma-separated string")
    if len(parts) != size:
        raise Refused(400, f"Embedding must contain exactly {size} values")
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError):
        raise Refused(400, "Embedding must contain numeric values") from None


SUMMARY_CHARACTERS = 240
log = logging.getLogger("automem")


class Worker:
    """One thread that works through the stored memories in order. A failure is logged, nothing more.

    So a memory whose vector could not be written stays in the graph alone, as in AutoMem (which has a repair every
    hour; the stand-in has none).
    """

    def __init__(self, graph: MemoryGraph, vectors: Vectors) -> None:
        self._graph = graph
        self._vectors = vectors
        self._jobs: queue.Queue[tuple[str, bool]] = queue.Queue()
        self._busy = False
        self.processed = 0
        self.failed = 0
        self._thread = threading.Thread(target=self._run, name="automem-worker", daemon=True)

    def start(self) -> None:
        """Begin to work; the thread ends with the process."""
        self._thread.start()

    def enqueue(self, memory_id: str, *, embed: bool) -> None:
        """Embed (unless its vector was given) and enrich this memory soon."""
        self._jobs.put((memory_id, embed))

    def state(self) -> dict[str, object]:
        """As `/health` tells it, under `enrichment`."""
        return {
            "failed": self.failed,
            "inflight": int(self._busy),
            "pending": self._jobs.qsize(),
            "processed": self.processed,
            "queue_depth": self._jobs.qsize(),
            "status": "running" if self._thread.is_alive() else "stopped",
        }

    def _run(self) -> None:
        while True:
            memory_id, embed = self._jobs.get()
            self._busy = True
            if embed:
                self._attempt("Qdrant upsert", memory_id, self._embed)
            if self._attempt("Enrichment", memory_id, self._enrich):
                self.processed += 1
            else:
                self.failed += 1
            self._busy = False

    def _attempt(self, what: str, memory_id: str, step: Callable[[str], None]) -> bool:
        try:
            step(memory_id)
        except (RedisError, VectorsUnavailable) as error:
            log.error("%s failed for %s: %s", what, memory_id, error)
            return False
        return True

    def _embed(self, memory_id: str) -> None:
        properties = self._graph.get(memory_id)
        if properties is None:
            return
        vector = self._vectors.embed(str(properties["content"]))
        self._vectors.upsert(memory_id, vector, point_payload(properties))

    def _enrich(self, memory_id: str) -> None:
        """Link, summarise and mark a memory as processed; the point gets the new metadata and tags."""
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
        changed: dict[str, Any] = {
            "metadata": json.dumps(metadata),
            "summary": summarize(str(properties["content"])),
            "enriched": True,
            "enriched_at": iso(datetime.now(timezone.utc)),
            "processed": True,
        }
        self._graph.update(memory_id, changed)
        shared = {
            "tags": properties["tags"],
            "tag_prefixes": properties["tag_prefixes"],
            "metadata": metadata,
        }
        try:
            self._vectors.set_payload(memory_id, shared)
        except VectorsUnavailable as error:
            log.warning("Qdrant payload sync failed for %s: %s", memory_id, error)


def summarize(content: str) -> str:
    """The first sentence, cut at a word after 240 characters."""
    first = re.split(r"(?<=[.!?])\s+", content.strip())[0]
    if len(first) <= SUMMARY_CHARACTERS:
        return first
    return first[:SUMMARY_CHARACTERS].rsplit(" ", 1)[0].strip()
