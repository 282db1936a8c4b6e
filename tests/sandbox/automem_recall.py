"""Recall as AutoMem does it: Qdrant first, then words in the graph; scored, current memories only."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from tests.sandbox.automem_embedding import VectorsUnavailable
from tests.sandbox.automem_stores import (
    MemoryGraph,
    VectorStore,
    decode_metadata,
    parse_moment,
)

OVERFETCH = 3  # archived and expired hits are removed afterwards
RECENCY_DAYS = 180.0
# AutoMem's default weights. The other components of its score are 0 here.
WEIGHTS = {
    "vector": 0.35,
    "keyword": 0.35,
    "tag": 0.15,
    "importance": 0.1,
    "recency": 0.1,
    "confidence": 0.05,
}
_UNSCORED = dict.fromkeys(("context", "exact", "metadata", "relation", "relevance"), 0.0)
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the and for with that this from into using have will your about after before when then than also just very "
        "more less over under",
    )
)
_SUMMARY_KEYS = ("id", "type", "timestamp", "summary", "importance", "confidence")
log = logging.getLogger("automem")
Hit = dict[str, Any]


def recall(graph: MemoryGraph, vectors: VectorStore, text: str, limit: int, tags: list[str]) -> dict[str, Any]:
    """Answer /recall. Raises redis.exceptions.RedisError if the graph does not answer."""
    started = time.perf_counter()
    words = keywords(text)
    hits = _vector_hits(vectors, text, limit, tags) if text not in {"", "*"} else []
    matched = bool(hits)
    if len(hits) < limit:
        found = {hit["id"] for hit in hits}
        hits += [hit for hit in _graph_hits(graph, text, words, limit, tags) if hit["id"] not in found]
    hits = hits[: limit * OVERFETCH]
    current = [hit for hit in hits if _is_current(hit["memory"])]
    results = [{**hit, **_scores(hit, words), "_query": text} for hit in current]
    results.sort(key=lambda result: -result["final_score"])
    results = results[:limit]
    for result in results:
        _add_from_graph(graph, result)
    if results:
        graph.touch([result["id"] for result in results])
    suppressed = len(hits) - len(current)
    answer: dict[str, Any] = {
        "count": len(results),
        "dedup_removed": 0,
        "query": text,
        "results": results,
        "sort": "score",
        "state_filter": {"current_only": True, "replacement_count": 0, "suppressed_count": suppressed},
        "state_mode": "current",
        "status": "success",
        "tag_match": "prefix",
        "tag_mode": "any",
        "vector_search": {"enabled": True, "matched": matched},
        "query_time_ms": round((time.perf_counter() - started) * 1000, 2),
    }
    if text:
        answer["keywords"] = words
    if tags:
        answer["tags"] = tags
        answer["tag_scope"] = {"filtered": True, "gated_low_evidence": 0, "pool_size_hint": limit}
    return answer


def keywords(text: str) -> list[str]:
    """List the significant words of a query, each once."""
    cleaned = (word.strip("-_") for word in re.findall(r"[A-Za-z0-9_\-]+", text.lower()))
    return list(dict.fromkeys(word for word in cleaned if len(word) >= 3 and word not in _STOP_WORDS))


def _vector_hits(vectors: VectorStore, text: str, limit: int, tags: list[str]) -> list[Hit]:
    """Search the collection. If the model or Qdrant fails, that is logged and nothing is found."""
    try:
        found = vectors.search(text, limit * OVERFETCH, tags)
    except VectorsUnavailable as error:
        log.error("Qdrant search failed: %s", error)
        return []
    return [_hit(str(point["id"]), "vector", "qdrant", float(point["score"]), point["payload"]) for point in found]


def _graph_hits(graph: MemoryGraph, text: str, words: list[str], limit: int, tags: list[str]) -> list[Hit]:
    phrase = text.lower()
    if phrase in {"", "*"} or (not words and len(phrase) < 3):
        found, kind = graph.trending(limit, tags), "trending"
    else:
        found, kind = graph.keyword_search(words or [phrase], phrase, limit, tags), "keyword"
    return [
        _hit(str(node["id"]), kind, "graph", score, {**node, "metadata": decode_metadata(node.get("metadata"))})
        for node, score in found
        if node.get("id") is not None
    ]


def _hit(memory_id: str, kind: str, source: str, score: float, memory: dict[str, Any]) -> Hit:
    return {"id": memory_id, "match_type": kind, "source": source, "match_score": score, "memory": memory}


def _is_current(memory: Mapping[str, Any]) -> bool:
    now = datetime.now(timezone.utc)
    begins, ends = parse_moment(memory.get("t_valid")), parse_moment(memory.get("t_invalid"))
    return not memory.get("archived") and (begins is None or begins <= now) and (ends is None or ends > now)


def _scores(hit: Hit, words: list[str]) -> dict[str, Any]:
    memory, score = hit["memory"], hit["match_score"]
    by_vector = hit["match_type"] == "vector"
    vector, keyword = (score, _word_share(memory, words)) if by_vector else (0.0, score)
    tags = {str(tag).lower() for tag in memory.get("tags") or []}
    stored = parse_moment(memory.get("timestamp"))
    days = (datetime.now(timezone.utc) - stored).total_seconds() / 86400 if stored else RECENCY_DAYS
    components: dict[str, Any] = {
        **_UNSCORED,
        "vector": vector,
        "keyword": keyword,
        "tag": len(tags.intersection(words)) / len(words) if words else 0.0,
        "importance": float(memory.get("importance") or 0.0),
        "recency": min(1.0, max(0.0, 1.0 - days / RECENCY_DAYS)),
        "confidence": float(memory.get("confidence") or 0.0),
    }
    final = sum(weight * components[name] for name, weight in WEIGHTS.items())
    components |= {"evidence": max(vector, keyword), "relevance_gated": False}
    return {"score": final, "final_score": final, "original_score": score, "score_components": components}


def _word_share(memory: Mapping[str, Any], words: list[str]) -> float:
    found = set(re.findall(r"\b[a-z0-9]+\b", str(memory.get("content") or "").lower()))
    return sum(word in found for word in words) / len(words) if words else 0.0


def _add_from_graph(graph: MemoryGraph, result: dict[str, Any]) -> None:
    """Add the summary, which a point does not hold, and the related memories in short."""
    node = graph.get(result["id"]) or {}
    if node.get("summary"):
        result["memory"].setdefault("summary", node["summary"])
    result["relations"] = []
    for type_, strength, related in graph.relations(result["id"]):
        short = {key: related[key] for key in _SUMMARY_KEYS if key in related}
        if related.get("tags"):
            short["tags"] = related["tags"][:5]
        result["relations"].append({"type": type_, "strength": strength, "memory": short})
