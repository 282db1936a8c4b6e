"""Recall as AutoMem does it: Qdrant first, then words in the graph; scored, current memories only."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from tests.sandbox.automem_store import MemoryGraph, Vectors, VectorsUnavailable

OVERFETCH = 3  # hits that are archived or no longer valid fall out afterwards
RECENCY_DAYS = 180.0
# AutoMem's default weights of the parts of a score; the rest is 0 in what the stand-in answers.
WEIGHTS = {
    "vector": 0.35,
    "keyword": 0.35,
    "tag": 0.15,
    "importance": 0.1,
    "recency": 0.1,
    "confidence": 0.05,
}
_UNSCORED: dict[str, Any] = {"context": 0.0, "exact": 0.0, "metadata": 0.0, "relation": 0.0, "relevance": 0.0}
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the and for with that this from into using have will your about after before when then than also just very "
        "more less over under",
    )
)
_SUMMARY_KEYS = ("id", "type", "timestamp", "summary", "importance", "confidence")
log = logging.getLogger("automem")


@dataclass(frozen=True)
class RecallQuery:
    """What was asked; `tags` lower-cased."""

    text: str
    limit: int
    tags: tuple[str, ...] = ()
    tag_mode: str = "any"
    tag_match: str = "prefix"


def recall(graph: MemoryGraph, vectors: Vectors, query: RecallQuery) -> dict[str, Any]:
    """The whole answer of /recall. Raises redis.exceptions.RedisError where the graph does not answer."""
    started = time.perf_counter()
    words = keywords(query.text)
    hits = _vector_hits(vectors, query) if query.text.strip() not in {"", "*"} else []
    matched = bool(hits)
    if len(hits) < query.limit:
        seen = {hit["id"] for hit in hits}
        hits += [hit for hit in _graph_hits(graph, query, words) if hit["id"] not in seen]
    hits = hits[: max(query.limit, 1) * OVERFETCH]
    current = [hit for hit in hits if _is_current(hit["memory"])]
    results = [_scored(hit, query.text, words) for hit in current]
    results.sort(
        key=lambda result: (-result["final_score"], result["source"] != "qdrant", -result["original_score"])
    )
    results = results[: query.limit]
    _add_summaries(graph, results)
    for result in results:
        result["relations"] = _relations(graph, result["id"])
    if results:
        graph.touch([result["id"] for result in results])
    return {
        **_frame(query, words, len(hits) - len(current)),
        "count": len(results),
        "results": results,
        "vector_search": {"enabled": vectors.ready, "matched": matched},
        "query_time_ms": round((time.perf_counter() - started) * 1000, 2),
    }


def keywords(text: str) -> list[str]:
    """The words of a query that count, each once."""
    cleaned = (word.strip("-_") for word in re.findall(r"[A-Za-z0-9_\-]+", text.lower()))
    return list(dict.fromkeys(word for word in cleaned if len(word) >= 3 and word not in _STOP_WORDS))


def _frame(query: RecallQuery, words: Sequence[str], suppressed: int) -> dict[str, Any]:
    frame: dict[str, Any] = {
        "dedup_removed": 0,
        "query": query.text,
        "sort": "score",
        "state_filter": {"current_only": True, "replacement_count": 0, "suppressed_count": suppressed},
        "state_mode": "current",
        "status": "success",
        "tag_match": query.tag_match,
        "tag_mode": query.tag_mode,
    }
    if query.text:
        frame["keywords"] = list(words)
    if query.tags:
        frame["tags"] = list(query.tags)
        frame["tag_scope"] = {"filtered": True, "gated_low_evidence": 0, "pool_size_hint": query.limit}
    return frame


def _vector_hits(vectors: Vectors, query: RecallQuery) -> list[dict[str, Any]]:
    """The collection's nearest; none, and a line in the log, where the model or Qdrant fails."""
    try:
        vector = vectors.embed(query.text)
        wanted = query.limit * OVERFETCH
        found = vectors.search(vector, wanted, query.tags, query.tag_mode, query.tag_match)
    except VectorsUnavailable as error:
        log.error("Qdrant search failed: %s", error)
        return []
    usable = [hit for hit in found if not hit["payload"].get("archived")]
    return [_hit(str(hit["id"]), "vector", "qdrant", float(hit["score"]), hit["payload"]) for hit in usable]


def _graph_hits(graph: MemoryGraph, query: RecallQuery, words: Sequence[str]) -> list[dict[str, Any]]:
    scope = (query.limit, query.tags, query.tag_mode, query.tag_match)
    phrase = query.text.strip().lower()
    if phrase in {"", "*"} or (not words and len(phrase) < 3):
        found, kind = graph.trending(*scope), "trending"
    else:
        found, kind = graph.keyword_search(words or [phrase], phrase, *scope), "keyword"
    return [
        _hit(str(node["id"]), kind, "graph", score, {**node, "metadata": _decoded(node.get("metadata"))})
        for node, score in found
        if node.get("id") is not None
    ]


def _hit(memory_id: str, kind: str, source: str, score: float, memory: dict[str, Any]) -> dict[str, Any]:
    return {"id": memory_id, "match_type": kind, "source": source, "match_score": score, "memory": memory}


def _decoded(metadata: object) -> object:
    """Metadata as recall shows it: a malformed string stays as it is."""
    try:
        decoded = json.loads(metadata) if isinstance(metadata, str) else metadata
    except json.JSONDecodeError:
        return metadata
    return decoded if isinstance(decoded, dict) else metadata


def _is_current(memory: Mapping[str, Any]) -> bool:
    now = datetime.now(timezone.utc)
    begins, ends = _moment(memory.get("t_valid")), _moment(memory.get("t_invalid"))
    return not memory.get("archived") and (begins is None or begins <= now) and (ends is None or ends > now)


def _moment(text: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _scored(hit: dict[str, Any], text: str, words: Sequence[str]) -> dict[str, Any]:
    memory = hit["memory"]
    vector = hit["match_score"] if hit["match_type"] == "vector" else 0.0
    keyword = _word_share(memory, words) if hit["match_type"] == "vector" else hit["match_score"]
    tags = {str(tag).lower() for tag in memory.get("tags") or []}
    born = _moment(memory.get("timestamp"))
    age = max((datetime.now(timezone.utc) - born).total_seconds() / 86400, 0.0) if born else RECENCY_DAYS
    parts: dict[str, Any] = {
        **_UNSCORED,
        "vector": vector,
        "keyword": keyword,
        "tag": len(tags.intersection(words)) / len(words) if words else 0.0,
        "importance": float(memory.get("importance") or 0.0),
        "recency": max(0.0, 1.0 - age / RECENCY_DAYS),
        "confidence": float(memory.get("confidence") or 0.0),
    }
    final = sum(weight * parts[name] for name, weight in WEIGHTS.items())
    parts.update(evidence=max(vector, keyword), relevance_gated=False)
    scores = {
        "score": final,
        "final_score": final,
        "original_score": hit["match_score"],
        "score_components": parts,
    }
    return {**hit, **scores, "_query": text}


def _word_share(memory: Mapping[str, Any], words: Sequence[str]) -> float:
    held = set(re.findall(r"\b[a-z0-9]+\b", str(memory.get("content") or "").lower()))
    return sum(word in held for word in words) / len(words) if words else 0.0


def _add_summaries(graph: MemoryGraph, results: Sequence[dict[str, Any]]) -> None:
    """A point holds no summary: it comes from the graph."""
    missing = [result["id"] for result in results if not result["memory"].get("summary")]
    found = graph.summaries(missing) if missing else {}
    for result in results:
        if result["id"] in found:
            result["memory"]["summary"] = found[result["id"]]


def _relations(graph: MemoryGraph, memory_id: str) -> list[dict[str, Any]]:
    """The nearest memories in the graph, in short."""
    answer = []
    for type_, strength, node in graph.relations(memory_id):
        other = {key: node[key] for key in _SUMMARY_KEYS if key in node}
        if "summary" not in other and isinstance(node.get("content"), str):
            other["content"] = node["content"].strip()[:160]
        if node.get("tags"):
            other["tags"] = node["tags"][:5]
        answer.append({"type": type_, "strength": strength, "memory": other})
    return answer
