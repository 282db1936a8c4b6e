"""What AutoMem's stand-in reads and writes: its settings, memories in the graph, and their points in Qdrant."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import Any

from tests.sandbox.automem_embedding import EMBEDDING_DEFAULTS, Embedder, Settings, send

# AutoMem's variables and their defaults. The last two select the behaviour of other versions: adopt the collection's
# size instead of refusing to start, and accept `POST /recall`, as the guide writes it.
DEFAULTS = {
    "FALKORDB_HOST": "localhost",
    "FALKORDB_PORT": "6379",
    "FALKORDB_PASSWORD": "",
    "FALKORDB_GRAPH": "memories",
    "QDRANT_URL": "http://localhost:6333",
    "QDRANT_API_KEY": "",
    "QDRANT_COLLECTION": "memories",
    "VECTOR_SIZE": "3072",
    **EMBEDDING_DEFAULTS,
    "AUTOMEM_API_TOKEN": "",
    "VECTOR_SIZE_AUTODETECT": "false",
    "AUTOMEM_POST_RECALL": "false",
}

# The properties of a node that AutoMem copies to the point's payload, in its order.
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


def settings_from(env: Mapping[str, str]) -> Settings:
    """Read AutoMem's variables. An empty one counts as unset, as in AutoMem."""
    return {name: env.get(name) or default for name, default in DEFAULTS.items()}


def is_on(value: str) -> bool:
    """Read a setting that is either on or off."""
    return value.lower() in {"1", "true", "yes", "on"}


def tag_prefixes(tags: Sequence[str]) -> list[str]:
    """List every prefix of every tag once: lower-cased, split at `:` or `/`, joined with `:`."""
    prefixes: dict[str, None] = {}
    for tag in tags:
        parts = [part for part in re.split(r"[:/]", tag.strip().lower()) if part]
        for length in range(1, len(parts) + 1):
            prefixes[":".join(parts[:length])] = None
    return list(prefixes)


def decode_metadata(text: object) -> dict[str, object]:
    """Decode a node's metadata (a JSON string) for a point's payload: {} if the string is malformed."""
    try:
        decoded = json.loads(text) if isinstance(text, str) else {}
    except json.JSONDecodeError:
        return {}
    return decoded if isinstance(decoded, dict) else {}


def point_payload(properties: Mapping[str, object]) -> dict[str, object]:
    """Build the payload that AutoMem's worker writes for a node; `relevance_score` is null until consolidation."""
    payload = {key: properties.get(key) for key in PAYLOAD_KEYS}
    payload["metadata"] = decode_metadata(properties.get("metadata"))
    return payload


def iso(moment: datetime) -> str:
    """Format a moment as AutoMem does: UTC with an offset of +00:00."""
    return moment.astimezone(timezone.utc).isoformat()


def parse_moment(text: object) -> datetime | None:
    """Read an ISO 8601 moment, UTC if it has no offset; None if it is missing or malformed."""
    try:
        moment = datetime.fromisoformat(str(text).strip().replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


class VectorStore:
    """AutoMem's collection, and the model that embeds its memories.

    `effective_size` is VECTOR_SIZE, or the collection's size if AutoMem may adopt it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._base = f"{settings['QDRANT_URL'].rstrip('/')}/collections"
        self._collection = f"{self._base}/{settings['QDRANT_COLLECTION']}"
        self.effective_size = self.configured_size = int(settings["VECTOR_SIZE"])
        self._embedder: Embedder

    def prepare(self) -> None:
        """Create the collection and its keyword indexes if its name is missing; once per start.

        Raises ValueError ("VECTOR DIMENSION MISMATCH ...") if it has another size that AutoMem may not adopt or that
        the provider cannot make, and VectorsUnavailable if Qdrant does not answer.
        """
        names = [row["name"] for row in self._qdrant("GET", self._base)["collections"]]
        if self._settings["QDRANT_COLLECTION"] in names:
            self._agree_on_size(self.collection_size())
        else:
            vectors = {"size": self.configured_size, "distance": "Cosine"}
            self._qdrant("PUT", self._collection, {"vectors": vectors})
        self._embedder = Embedder(self._settings, self.effective_size)
        for name in KEYWORD_INDEXES:
            body = {"field_name": name, "field_schema": "keyword"}
            self._qdrant("PUT", f"{self._collection}/index?wait=true", body)

    def _agree_on_size(self, actual: int) -> None:
        if actual != self.configured_size and not is_on(self._settings["VECTOR_SIZE_AUTODETECT"]):
            raise ValueError(
                "VECTOR DIMENSION MISMATCH\n"
                f"Qdrant collection '{self._settings['QDRANT_COLLECTION']}': {actual}d\n"
                f"Config VECTOR_SIZE: {self.configured_size}d"
            )
        self.effective_size = actual

    def collection_size(self) -> int:
        """Read the live collection's dimension."""
        config = self._qdrant("GET", self._collection)["config"]
        return int(config["params"]["vectors"]["size"])

    def count(self) -> int:
        """Count the points."""
        return int(self._qdrant("POST", f"{self._collection}/points/count", {"exact": True})["count"])

    def search(self, text: str, limit: int, tags: list[str]) -> list[dict[str, Any]]:
        """Find the points nearest to a text: `id`, `score` and `payload` of each."""
        body = {
            "vector": self._embedder.embed(text),
            "limit": limit,
            "with_payload": True,
            "filter": {"must": [{"key": "tag_prefixes", "match": {"any": tags}}]} if tags else None,
        }
        return list(self._qdrant("POST", f"{self._collection}/points/search", body))

    def upsert(self, point_id: str, text: str, payload: dict[str, Any]) -> None:
        """Embed a text, write its point, and wait until it is stored."""
        body = {"points": [{"id": point_id, "vector": self._embedder.embed(text), "payload": payload}]}
        self._qdrant("PUT", f"{self._collection}/points?wait=true", body)

    def _qdrant(self, method: str, url: str, body: object = None) -> Any:
        key = self._settings["QDRANT_API_KEY"]
        return send(method, url, body, {"api-key": key} if key else {})["result"]


RELATIONS_SHOWN = 5
PRECEDING_LINKED = 5
PRECEDING_DAYS = 7
_RECALLABLE = "coalesce(m.archived, false) = false AND (size($tags) = 0 OR any(tag IN $tags WHERE tag IN coalesce(m.tag_prefixes, [])))"
_TAGS = "[tag IN coalesce(m.tags, []) | toLower(tag)]"
_KEYWORD_SEARCH = (
    f"MATCH (m:Memory) WHERE m.content IS NOT NULL AND {_RECALLABLE} "
    f"WITH m, toLower(m.content) AS content, {_TAGS} AS tags "
    "UNWIND $keywords AS kw WITH m, content, tags, "
    "CASE WHEN content CONTAINS kw THEN 2 ELSE 0 END + "
    "CASE WHEN any(tag IN tags WHERE tag CONTAINS kw) THEN 1 ELSE 0 END AS hit "
    "WITH m, content, tags, sum(hit) AS hits WITH m, hits + "
    "CASE WHEN content CONTAINS $phrase THEN 2 ELSE 0 END + "
    "CASE WHEN any(tag IN tags WHERE tag CONTAINS $phrase) THEN 1 ELSE 0 END AS score "
    "WHERE score > 0 RETURN m, score ORDER BY score DESC, m.importance DESC, m.timestamp DESC LIMIT $limit"
)
_TRENDING = f"MATCH (m:Memory) WHERE {_RECALLABLE} RETURN m ORDER BY m.importance DESC, m.timestamp DESC LIMIT $limit"
_RELATIONS = (
    "MATCH (m:Memory {id: $id})-[r]->(related:Memory) RETURN type(r), "
    "coalesce(r.strength, r.score, r.confidence, r.similarity, toFloat(r.count), 0.0), related "
    "ORDER BY coalesce(r.updated_at, related.timestamp) DESC LIMIT $limit"
)
_LINK_PRECEDING = (
    "MATCH (m:Memory {id: $id}) WITH m MATCH (earlier:Memory) WHERE earlier.id <> m.id "
    "AND earlier.timestamp < m.timestamp AND earlier.timestamp > $cutoff "
    "WITH m, earlier ORDER BY earlier.timestamp DESC LIMIT $limit "
    "MERGE (m)-[r:PRECEDED_BY]->(earlier) ON CREATE SET r.updated_at = $now, r.count = 1 RETURN count(r)"
)
Row = dict[str, Any]


class MemoryGraph:
    """AutoMem's graph. One client is used for the life of the service, with its cache of names.

    Every method raises redis.exceptions.RedisError if FalkorDB does not answer or refuses.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def _graph(self) -> Any:
        from falkordb import FalkorDB

        password = self._settings["FALKORDB_PASSWORD"]
        client = FalkorDB(
            host=self._settings["FALKORDB_HOST"],
            port=int(self._settings["FALKORDB_PORT"]),
            username="default" if password else None,
            password=password or None,
        )
        return client.select_graph(self._settings["FALKORDB_GRAPH"])

    def _query(self, statement: str, **params: Any) -> list[list[Any]]:
        return list(self._graph.query(statement, params).result_set)

    def ensure_indexes(self) -> None:
        """Create the missing range indexes of Memory."""
        from redis.exceptions import ResponseError

        for name in ("id", "timestamp"):
            try:
                self._query(f"CREATE INDEX FOR (m:Memory) ON (m.{name})")
            except ResponseError as error:
                if "already indexed" not in str(error):
                    raise

    def count(self) -> int:
        """Count the memories."""
        return int(self._query("MATCH (m:Memory) RETURN count(m)")[0][0])

    def store(self, properties: Row) -> None:
        """Create one memory. A null value creates no property."""
        self._query("CREATE (m:Memory) SET m = $properties", properties=properties)

    def get(self, memory_id: str) -> Row | None:
        """Read a memory's properties."""
        rows = self._query("MATCH (m:Memory {id: $id}) RETURN m", id=memory_id)
        return dict(rows[0][0].properties) if rows else None

    def update(self, memory_id: str, properties: Row) -> None:
        """Set some properties of a memory."""
        self._query("MATCH (m:Memory {id: $id}) SET m += $properties", id=memory_id, properties=properties)

    def touch(self, ids: Sequence[str]) -> None:
        """Set `last_accessed` to now, as a recall does. The points are not changed."""
        statement = "UNWIND $ids AS one MATCH (m:Memory {id: one}) SET m.last_accessed = $now"
        self._query(statement, ids=ids, now=iso(datetime.now(timezone.utc)))

    def trending(self, limit: int, tags: list[str]) -> list[tuple[Row, float]]:
        """List the most important memories, each with its importance, for a recall without words."""
        rows = self._query(_TRENDING, limit=limit, tags=tags)
        nodes = [dict(row[0].properties) for row in rows]
        return [(node, float(node.get("importance") or 0.0)) for node in nodes]

    def keyword_search(self, words: list[str], phrase: str, limit: int, tags: list[str]) -> list[tuple[Row, float]]:
        """Find memories that contain the words or the phrase, each with a score from 0 to 1."""
        rows = self._query(_KEYWORD_SEARCH, keywords=words, phrase=phrase, limit=limit, tags=tags)
        highest = 3 * len(words) + 3
        return [(dict(row[0].properties), min(1.0, row[1] / highest)) for row in rows]

    def relations(self, memory_id: str) -> list[tuple[str, float, Row]]:
        """List type, strength and other end of a memory's outgoing relationships, the newest first."""
        rows = self._query(_RELATIONS, id=memory_id, limit=RELATIONS_SHOWN)
        return [(row[0], row[1], dict(row[2].properties)) for row in rows]

    def link_preceding(self, memory_id: str, now: datetime) -> int:
        """Link a new memory to those stored just before it. Returns how many there were."""
        cutoff = iso(now - timedelta(days=PRECEDING_DAYS))
        rows = self._query(_LINK_PRECEDING, id=memory_id, cutoff=cutoff, now=iso(now), limit=PRECEDING_LINKED)
        return int(rows[0][0]) if rows else 0
