"""What AutoMem's stand-in stores: its settings, memories in the graph and as points."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import requests

VARIABLES = (
    "FALKORDB_HOST",
    "FALKORDB_PORT",
    "FALKORDB_PASSWORD",
    "FALKORDB_GRAPH",
    "QDRANT_URL",
    "QDRANT_HOST",
    "QDRANT_PORT",
    "QDRANT_API_KEY",
    "QDRANT_COLLECTION",
    "VECTOR_SIZE",
    "VECTOR_SIZE_AUTODETECT",
    "EMBEDDING_MODEL",
    "OPENAI_BASE_URL",
    "OPENAI_API_KEY",
    "AUTOMEM_API_TOKEN",
    "AUTOMEM_POST_RECALL",
)
_NO = ("0", "false", "no", "off", "")


@dataclass(frozen=True)
class AutoMemSettings:
    """Addresses, names, sizes; no secret is in its repr."""

    falkordb_host: str
    falkordb_port: int
    graph: str
    qdrant_url: str
    collection: str
    vector_size: int
    model: str
    openai_url: str
    falkordb_password: str = field(default="", repr=False)
    qdrant_api_key: str = field(default="", repr=False)
    openai_api_key: str = field(default="", repr=False)
    api_token: str = field(default="", repr=False)
    autodetect_size: bool = (
        False  # later versions adopt the collection's size; the guide's version refuses to start
    )
    post_recall: bool = False  # a version that takes POST /recall, as the guide writes it


def settings_from(env: Mapping[str, str]) -> AutoMemSettings:
    """Read the variables as AutoMem does: an empty one counts as unset. Raises ValueError for a bad number."""
    given = {name: value for name, value in env.items() if value}
    host, port = given.get("QDRANT_HOST", "localhost"), given.get("QDRANT_PORT", "6333")
    return AutoMemSettings(
        falkordb_host=given.get("FALKORDB_HOST", "localhost"),
        falkordb_port=int(given.get("FALKORDB_PORT", "6379")),
        falkordb_password=given.get("FALKORDB_PASSWORD", ""),
        graph=given.get("FALKORDB_GRAPH", "memories"),
        qdrant_url=given.get("QDRANT_URL", f"http://{host}:{port}").rstrip("/"),
        qdrant_api_key=given.get("QDRANT_API_KEY", ""),
        collection=given.get("QDRANT_COLLECTION", "memories"),
        vector_size=int(given.get("VECTOR_SIZE", "3072")),
        model=given.get("EMBEDDING_MODEL", "text-embedding-3-large"),
        openai_url=given.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/"),
        openai_api_key=given.get("OPENAI_API_KEY", ""),
        api_token=given.get("AUTOMEM_API_TOKEN", ""),
        autodetect_size=given.get("VECTOR_SIZE_AUTODETECT", "false").lower() not in _NO,
        post_recall=given.get("AUTOMEM_POST_RECALL", "0").lower() not in _NO,
    )


# What a Qdrant payload holds of a node, in AutoMem's order. Every other property stays in the graph alone.
PAYLOAD_KEYS = (
    "content",
    "tags",
    "tag_prefixes",
    "importance",
    "timestamp",
    "type",
    "confidence",
    "updated_at",
    "last_accessed",
    "metadata",
    "relevance_score",
)
KEYWORD_INDEXES = ("tags", "tag_prefixes")


def tag_prefixes(tags: Sequence[str]) -> list[str]:
    """Every prefix of every tag: lower-cased, split at `:` or `/`, joined with `:`, each once."""
    prefixes: dict[str, None] = {}
    for tag in tags:
        parts = [part for part in re.split(r"[:/]", tag.strip().lower()) if part]
        for length in range(1, len(parts) + 1):
            prefixes[":".join(parts[:length])] = None
    return list(prefixes)


def decode_metadata(text: object) -> dict[str, object]:
    """The metadata of a node (a JSON string) as a point holds it: {} where the string is malformed."""
    try:
        decoded = json.loads(text) if isinstance(text, str) else {}
    except json.JSONDecodeError:
        return {}
    return decoded if isinstance(decoded, dict) else {}


def point_payload(properties: Mapping[str, object]) -> dict[str, object]:
    """The payload that AutoMem's worker writes for a node; `relevance_score` is null until consolidation."""
    payload = {key: properties.get(key) for key in PAYLOAD_KEYS}
    payload["metadata"] = decode_metadata(properties.get("metadata"))
    return payload


def iso(moment: datetime) -> str:
    """A moment as AutoMem writes it: UTC with an offset of +00:00."""
    return moment.astimezone(timezone.utc).isoformat()


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


RELATIONS_SHOWN = 5
PRECEDING_LINKED = 5
PRECEDING_DAYS = 7
_CURRENT = "coalesce(m.archived, false) = false AND NOT coalesce(m.type, '') IN $excluded"
_TAGS = "[tag IN coalesce(m.tags, []) | toLower(tag)]"
_KEYWORD_SEARCH = (
    "MATCH (m:Memory) WHERE m.content IS NOT NULL AND {where} "
    f"WITH m, toLower(m.content) AS content, {_TAGS} AS tags "
    "UNWIND $keywords AS kw WITH m, content, tags, "
    "CASE WHEN content CONTAINS kw THEN 2 ELSE 0 END + "
    "CASE WHEN any(tag IN tags WHERE tag CONTAINS kw) THEN 1 ELSE 0 END AS hit "
    "WITH m, content, tags, sum(hit) AS hits WITH m, hits + "
    "CASE WHEN content CONTAINS $phrase THEN 2 ELSE 0 END + "
    "CASE WHEN any(tag IN tags WHERE tag CONTAINS $phrase) THEN 1 ELSE 0 END AS score "
    "WHERE score > 0 RETURN m, score ORDER BY score DESC, m.importance DESC, m.timestamp DESC LIMIT $limit"
)
_TRENDING = (
    "MATCH (m:Memory) WHERE {where} RETURN m ORDER BY m.importance DESC, m.timestamp DESC LIMIT $limit"
)
_RELATIONS = (
    "MATCH (m:Memory {id: $id})-[r]->(related:Memory) RETURN type(r), "
    "coalesce(r.strength, r.score, r.confidence, r.similarity, toFloat(r.count), 0.0), related "
    "ORDER BY coalesce(r.updated_at, related.timestamp) DESC LIMIT $limit"
)
_PRECEDING = (
    "MATCH (m:Memory {id: $id}) WITH m MATCH (earlier:Memory) WHERE earlier.id <> m.id "
    "AND earlier.timestamp < m.timestamp AND earlier.timestamp > $cutoff "
    "WITH m, earlier ORDER BY earlier.timestamp DESC LIMIT $limit "
    "MERGE (m)-[r:PRECEDED_BY]->(earlier) ON CREATE SET r.updated_at = $now, r.count = 1 RETURN count(r)"
)
Row = dict[str, Any]


class MemoryGraph:
    """AutoMem's graph over one client that lives as long as the service, with that client's caches.

    Every method raises redis.exceptions.RedisError where FalkorDB does not answer or refuses.
    """

    def __init__(self, settings: AutoMemSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._graph: Any = None

    def _query(self, statement: str, **params: Any) -> list[list[Any]]:
        with self._lock:
            if self._graph is None:
                self._graph = self._connect()
        return list(self._graph.query(statement, params).result_set)

    def _connect(self) -> Any:
        from falkordb import FalkorDB

        password = self._settings.falkordb_password
        client = FalkorDB(
            host=self._settings.falkordb_host,
            port=self._settings.falkordb_port,
            username="default" if password else None,
            password=password or None,
        )
        return client.select_graph(self._settings.graph)

    def count(self) -> int:
        """Memories, apart from consolidation's own notes."""
        statement = "MATCH (m:Memory) WHERE NOT coalesce(m.type, '') IN $excluded RETURN count(m)"
        return int(self._query(statement, excluded=list(EXCLUDED_TYPES))[0][0])

    def ensure_indexes(self) -> None:
        """The range indexes of Memory, where they are missing."""
        from redis.exceptions import ResponseError

        for name in ("id", "timestamp"):
            try:
                self._query(f"CREATE INDEX FOR (m:Memory) ON (m.{name})")
            except ResponseError as error:
                if "already indexed" not in str(error):
                    raise

    def store(self, properties: Mapping[str, Any]) -> None:
        """Create one memory; null values make no property."""
        self._query("CREATE (m:Memory) SET m = $properties", properties=dict(properties))

    def get(self, memory_id: str) -> Row | None:
        """A memory's properties."""
        rows = self._query("MATCH (m:Memory {id: $id}) RETURN m", id=memory_id)
        return dict(rows[0][0].properties) if rows else None

    def update(self, memory_id: str, properties: Mapping[str, Any]) -> None:
        """Set some properties of a memory."""
        self._query(
            "MATCH (m:Memory {id: $id}) SET m += $properties", id=memory_id, properties=dict(properties)
        )

    def touch(self, ids: Sequence[str]) -> None:
        """Recall moves `last_accessed` on, in the graph alone."""
        moment = iso(datetime.now(timezone.utc))
        statement = "UNWIND $ids AS one MATCH (m:Memory {id: one}) SET m.last_accessed = $moment"
        self._query(statement, ids=list(ids), moment=moment)

    def trending(self, limit: int, tags: Sequence[str], mode: str, match: str) -> list[tuple[Row, float]]:
        """The most important memories with their importance, for a recall without words."""
        statement = _TRENDING.format(where=_where(tags, mode, match))
        rows = self._query(statement, limit=limit, tags=list(tags), excluded=list(EXCLUDED_TYPES))
        nodes = [dict(row[0].properties) for row in rows]
        return [(node, float(node.get("importance") or 0.0)) for node in nodes]

    def keyword_search(
        self, words: Sequence[str], phrase: str, limit: int, tags: Sequence[str], mode: str, match: str
    ) -> list[tuple[Row, float]]:
        """Memories that hold the words or the phrase, with a score from 0 to 1."""
        most = 3 * len(words) + 3
        rows = self._query(
            _KEYWORD_SEARCH.format(where=_where(tags, mode, match)),
            keywords=list(words),
            phrase=phrase,
            limit=limit,
            tags=list(tags),
            excluded=list(EXCLUDED_TYPES),
        )
        return [(dict(row[0].properties), min(1.0, row[1] / most)) for row in rows]

    def relations(self, memory_id: str) -> list[tuple[str, float, Row]]:
        """Type, strength and other end of a memory's outgoing relationships, the newest first."""
        rows = self._query(_RELATIONS, id=memory_id, limit=RELATIONS_SHOWN)
        return [(row[0], row[1], dict(row[2].properties)) for row in rows]

    def summaries(self, ids: Sequence[str]) -> dict[str, str]:
        """The summaries that enrichment made."""
        statement = (
            "UNWIND $ids AS one MATCH (m:Memory {id: one}) WHERE m.summary IS NOT NULL RETURN m.id, m.summary"
        )
        return {row[0]: row[1] for row in self._query(statement, ids=list(ids))}

    def link_preceding(self, memory_id: str, now: datetime) -> int:
        """Link a new memory to those stored just before it; how many there were."""
        cutoff = iso(now - timedelta(days=PRECEDING_DAYS))
        rows = self._query(_PRECEDING, id=memory_id, cutoff=cutoff, now=iso(now), limit=PRECEDING_LINKED)
        return int(rows[0][0]) if rows else 0


def _where(tags: Sequence[str], mode: str, match: str) -> str:
    if not tags:
        return _CURRENT
    held = "coalesce(m.tag_prefixes, [])" if match == "prefix" else _TAGS
    return f"{_CURRENT} AND {'ALL' if mode == 'all' else 'ANY'}(wanted IN $tags WHERE wanted IN {held})"
