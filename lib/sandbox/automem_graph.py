"""The stand-in's queries to FalkorDB, through the client that AutoMem uses."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from lib.sandbox.automem_schema import iso
from lib.sandbox.automem_settings import AutoMemSettings
from lib.sandbox.automem_vectors import EXCLUDED_TYPES

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
