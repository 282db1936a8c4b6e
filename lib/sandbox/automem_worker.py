"""What AutoMem does a moment after it has answered: embed a new memory, then enrich it."""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from redis.exceptions import RedisError

from lib.sandbox.automem_graph import MemoryGraph
from lib.sandbox.automem_schema import decode_metadata, iso, point_payload
from lib.sandbox.automem_vectors import Vectors, VectorsUnavailable

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
            log.error("%s failed for %s: %s", what, memory_id, error)  # noqa: TRY400 - the cause says it all
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
