"""The stand-in's way to Qdrant and to the embeddings endpoint: plain HTTP, one try each."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import requests

from lib.sandbox.automem_schema import KEYWORD_INDEXES
from lib.sandbox.automem_settings import AutoMemSettings

TIMEOUT_SECONDS = 20.0
EXCLUDED_TYPES = ("MetaPattern",)  # consolidation's own notes: neither counted nor recalled


class VectorsUnavailable(Exception):
    """Qdrant or the endpoint did not do what was asked: AutoMem logs it and goes on without vectors."""


class Vectors:
    """AutoMem's collection, and the model that makes its vectors.

    `effective_size` is VECTOR_SIZE, or the collection's where AutoMem may adopt it.
    """

    def __init__(self, settings: AutoMemSettings) -> None:
        self._settings = settings
        self._base = f"{settings.qdrant_url}/collections"
        self._collection = f"{self._base}/{settings.collection}"
        self._local = threading.local()
        self.effective_size = settings.vector_size
        self.ready = False  # the collection was found or made since the start

    def prepare(self) -> None:
        """Once after the start: create the collection where its name is missing, with its keyword indexes.

        Raises ValueError ("VECTOR DIMENSION MISMATCH ...") where it has another size and must keep it, and
        VectorsUnavailable where Qdrant does not answer: it is tried again then.
        """
        names = [row["name"] for row in self._qdrant("GET", self._base)["collections"]]
        if self._settings.collection in names:
            self._agree_on_size(self.collection_size())
        else:
            vectors = {"size": self._settings.vector_size, "distance": "Cosine"}
            self._qdrant("PUT", self._collection, {"vectors": vectors})
        for name in KEYWORD_INDEXES:
            body = {"field_name": name, "field_schema": "keyword"}
            self._qdrant("PUT", f"{self._collection}/index?wait=true", body)
        self.ready = True

    def _agree_on_size(self, actual: int) -> None:
        configured = self._settings.vector_size
        if actual != configured and not self._settings.autodetect_size:
            raise ValueError(
                "VECTOR DIMENSION MISMATCH\n"
                f"Qdrant collection '{self._settings.collection}': {actual}d\n"
                f"Config VECTOR_SIZE: {configured}d"
            )
        self.effective_size = actual

    def collection_size(self) -> int:
        """The live collection's dimension."""
        config = self._qdrant("GET", self._collection)["config"]
        return int(config["params"]["vectors"]["size"])

    def count(self) -> int:
        """Points that stand for a memory."""
        body = {"exact": True, "filter": {"must_not": [_any_of("type", EXCLUDED_TYPES)]}}
        return int(self._qdrant("POST", f"{self._collection}/points/count", body)["count"])

    def search(
        self, vector: Sequence[float], limit: int, tags: Sequence[str], mode: str, match: str
    ) -> list[Any]:
        """Hits with `id`, `score` and `payload`, the nearest first."""
        key = "tag_prefixes" if match == "prefix" else "tags"
        every = [{"key": key, "match": {"value": tag}} for tag in tags]
        must = every if mode == "all" else ([_any_of(key, tags)] if tags else [])
        body = {
            "vector": list(vector),
            "limit": limit,
            "with_payload": True,
            "filter": {"must": must, "must_not": [_any_of("type", EXCLUDED_TYPES)]},
        }
        return list(self._qdrant("POST", f"{self._collection}/points/search", body))

    def upsert(self, point_id: str, vector: Sequence[float], payload: dict[str, Any]) -> None:
        """Write one point and wait for it."""
        body = {"points": [{"id": point_id, "vector": list(vector), "payload": payload}]}
        self._qdrant("PUT", f"{self._collection}/points?wait=true", body)

    def set_payload(self, point_id: str, payload: dict[str, Any]) -> None:
        """Overwrite some keys of a point's payload."""
        body = {"points": [point_id], "payload": payload}
        self._qdrant("POST", f"{self._collection}/points/payload?wait=true", body)

    def embed(self, text: str) -> list[float]:
        """The text's vector by the configured model, `effective_size` wide."""
        body: dict[str, Any] = {"model": self._settings.model, "input": text, "encoding_format": "float"}
        if self._settings.model.startswith("text-embedding-3-"):
            body["dimensions"] = self.effective_size
        headers = {"Authorization": f"Bearer {self._settings.openai_api_key}"}
        answer = self._send("POST", f"{self._settings.openai_url}/embeddings", body, headers)
        vector = [float(component) for component in answer["data"][0]["embedding"]]
        if len(vector) != self.effective_size:
            raise VectorsUnavailable(
                f"{self._settings.model} made {len(vector)}d, not {self.effective_size}d"
            )
        return vector

    def _qdrant(self, method: str, url: str, body: Any = None) -> Any:
        key = self._settings.qdrant_api_key
        return self._send(method, url, body, {"api-key": key} if key else {})["result"]

    def _send(self, method: str, url: str, body: Any, headers: dict[str, str]) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        try:
            answer = self._session().request(method, url, data=data, headers=headers, timeout=TIMEOUT_SECONDS)
        except requests.RequestException as error:
            raise VectorsUnavailable(f"{method} {url}: {type(error).__name__}") from error
        if not answer.ok:
            raise VectorsUnavailable(f"{method} {url}: {answer.status_code} {answer.text[:300]}")
        return answer.json()

    def _session(self) -> requests.Session:
        """One session a thread: requests does not promise that threads may share one."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        session: requests.Session = self._local.session
        return session


def _any_of(key: str, values: Sequence[str]) -> dict[str, Any]:
    return {"key": key, "match": {"any": list(values)}}
