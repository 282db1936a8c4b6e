"""AutoMem at work during a run: it stores memories in both stores, archives some, and continues if a store refuses."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import uuid
from types import TracebackType

import requests

from lib.clients.falkordb.connection import connect
from tests.operator_support import Operator
from tests.sandbox.vectors import vectors_for

SECONDS_BETWEEN = 0.5


class AutoMemAtWork:
    """A thread that writes as AutoMem does, with the model and size it was started with (`configure`)."""

    def __init__(self, operator: Operator, model: str, size: int) -> None:
        self._operator = operator
        self._configured = (model, size)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.stored = 0

    def configure(self, model: str, size: int) -> None:
        """Restart AutoMem with other settings."""
        self._configured = (model, size)

    def __enter__(self) -> AutoMemAtWork:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        from falkordb.graph import Graph

        with connect(self._operator.servers.falkordb.address) as conn, requests.Session() as http:
            graph = Graph(conn, self._operator.graph)
            for number in itertools.count():
                if self._stop.wait(SECONDS_BETWEEN):
                    return
                memory = _memory(number)
                graph.query("CREATE (m:Memory) SET m = $memory", {"memory": memory})
                self.stored += 1
                self._put_point(http, memory)
                if number % 5 == 4:
                    graph.query("MATCH (m:Memory {id: $id}) SET m.archived = true", {"id": memory["id"]})

    def _put_point(self, http: requests.Session, memory: dict[str, object]) -> None:
        model, size = self._configured
        payload = {key: value for key, value in memory.items() if key != "id"}
        payload["metadata"] = json.loads(str(memory["metadata"]))
        vector = vectors_for(model, [str(memory["content"])], size)[0].tolist()
        point = {"id": memory["id"], "vector": vector, "payload": payload}
        url = f"{self._operator.servers.qdrant_url}/collections/{self._operator.collection}/points?wait=true"
        # AutoMem logs it: the memory is stored in the graph
        with contextlib.suppress(requests.RequestException):
            http.put(url, json={"points": [point]}, timeout=30)


def _memory(number: int) -> dict[str, object]:
    return {
        "id": str(uuid.uuid4()),
        "content": f"memory {number} was stored while the migration ran ({uuid.uuid4().hex})",
        "tags": ["meanwhile", f"n/{number}"],
        "tag_prefixes": ["meanwhile", "n", f"n/{number}"],
        "importance": number % 10 / 10,
        "timestamp": "2026-01-02T03:04:05+00:00",
        "type": "Context",
        "confidence": 0.6,
        "updated_at": "2026-01-02T03:04:05+00:00",
        "last_accessed": "2026-01-02T03:04:05+00:00",
        "metadata": '{"source": "meanwhile"}',
    }
