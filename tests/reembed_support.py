"""Shared by the tests of the re-embedding: the stores as plain values, a second implementation of the payload rule."""

from __future__ import annotations

import json
import math
import uuid
from typing import Any

import numpy as np
import requests

from lib.clients.qdrant.points import scroll
from tests.operator_support import LARGE, NEW_SIZE, Operator
from tests.sandbox.vectors import vectors_for

AUTOMEM_KEYS = {
    "content", "tags", "tag_prefixes", "importance", "timestamp", "type", "confidence", "updated_at",
    "last_accessed", "metadata", "relevance_score", "t_valid", "t_invalid", "archived",
}  # fmt: skip
# What recall reads: a point without it gets the node's.
NEEDED_KEYS = AUTOMEM_KEYS - {"t_valid", "updated_at", "last_accessed"}
Points = dict[Any, tuple[dict[str, Any], np.ndarray]]


def points_of(operator: Operator, collection: str | None = None) -> Points:
    """Id to payload and vector of every point."""
    pages = scroll(operator.qdrant, collection or operator.collection, payload=True, vector=True)
    return {one.id: (one.payload or {}, one.vector) for page in pages for one in page}


def embeddable(operator: Operator) -> dict[Any, dict[str, Any]]:
    """Point id to the properties of every memory that must have a point; of several with one id the first."""
    rows = operator.cypher("MATCH (m:Memory) RETURN properties(m) ORDER BY id(m)")
    found: dict[Any, dict[str, Any]] = {}
    for (properties,) in rows:
        content, identity = properties.get("content"), properties.get("id")
        if isinstance(content, str) and content.strip() and (one := _as_point_id(identity)) is not None:
            found.setdefault(one, properties)
    return found


def _as_point_id(value: object) -> str | int | None:
    if isinstance(value, int):
        return value
    try:
        return str(uuid.UUID(str(value)))
    except ValueError:
        return int(str(value)) if str(value).isdecimal() else None


def expected_payload(old: dict[str, Any] | None, node: dict[str, Any]) -> dict[str, Any]:
    """The rule: the old point's payload overlaid by the graph's values, and what recall needs; without a point, AutoMem's keys."""
    node = dict(node)
    if isinstance(node.get("metadata"), str):
        try:
            node["metadata"] = json.loads(node["metadata"])
        except ValueError:
            if old and isinstance(old.get("metadata"), dict):
                del node["metadata"]
    if old is None:
        return {key: value for key, value in node.items() if key in AUTOMEM_KEYS}
    wanted = {key: value for key, value in node.items() if key in old or key in NEEDED_KEYS}
    return {**old, **wanted}


def close(left: Any, right: Any) -> bool:
    """Equal except for the last digits of doubles."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-13)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(close(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(close, left, right))
    return left == right


def assert_migrated(
    operator: Operator,
    before: Points,
    *,
    model: str = LARGE,
    size: int = NEW_SIZE,
    but: set[Any] = frozenset(),
) -> Points:
    """Every embeddable memory (`but` some) has a point by the rule with the endpoint's vector; no other point exists."""
    memories = {one: node for one, node in embeddable(operator).items() if one not in but}
    after = points_of(operator)
    assert after.keys() == memories.keys()
    for one, node in memories.items():
        wanted = expected_payload(before[one][0] if one in before else None, node)
        assert close(after[one][0], wanted), (one, after[one][0], wanted)
    assert_vectors(after, model, size)
    return after


def assert_vectors(points: Points, model: str = LARGE, size: int = NEW_SIZE) -> None:
    stored = np.vstack([vector for _, vector in points.values()])
    wanted = vectors_for(model, [payload["content"] for payload, _ in points.values()], size)
    assert stored.shape == wanted.shape
    assert np.abs(stored - wanted).max() < 1e-5


def make_ready(operator: Operator) -> Operator:
    """Sample memories, a backup of the collection, settings for another size."""
    operator.load()
    operator.run("backup_automem", "--only", "qdrant")
    upgrade(operator)
    operator.servers.openai.reset()
    return operator


def upgrade(operator: Operator) -> None:
    """The settings of the migration."""
    operator.export(VECTOR_SIZE=NEW_SIZE, EMBEDDING_MODEL=LARGE)


def settings(operator: Operator) -> dict[str, Any]:
    """The configuration of a collection without its size, points and health."""
    info = operator.info()
    config = json.loads(json.dumps(info["config"]))
    config["params"]["vectors"].pop("size")
    config.pop("metadata", None)
    schema = {
        name: {key: value for key, value in one.items() if key != "points"}
        for name, one in info["payload_schema"].items()
    }
    aliases = sorted(one["alias_name"] for one in operator.call("GET", "/aliases")["aliases"])
    return {"config": config, "payload_schema": schema, "aliases": aliases}


def make_rich(operator: Operator) -> None:
    """The operator's collection once more, with everything that AutoMem does not set but an operator might."""
    points, size = points_of(operator), operator.info()["config"]["params"]["vectors"]["size"]
    operator.call("DELETE", "")
    body = {
        "vectors": {"size": size, "distance": "Cosine", "on_disk": True, "hnsw_config": {"m": 20}},
        "hnsw_config": {"m": 24, "ef_construct": 120, "full_scan_threshold": 5000, "on_disk": True},
        "optimizers_config": {
            "default_segment_number": 3,
            "indexing_threshold": 12000,
            "flush_interval_sec": 7,
        },
        "wal_config": {"wal_capacity_mb": 2, "wal_segments_ahead": 1},
        "quantization_config": {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}},
        "on_disk_payload": True,
    }
    operator.call("PUT", "", body)
    for name, schema in {
        "tags": "keyword",
        "tag_prefixes": "keyword",
        "importance": "float",
        "archived": "bool",
        "timestamp": "datetime",
        "legacy_score": "float",
        "content": {
            "type": "text",
            "tokenizer": "word",
            "min_token_len": 2,
            "max_token_len": 20,
            "lowercase": True,
        },
    }.items():
        operator.call("PUT", "/index?wait=true", {"field_name": name, "field_schema": schema})
    rows = [{"id": one, "payload": payload, "vector": vector.tolist()} for one, (payload, vector) in points.items()]
    operator.call("PUT", "/points?wait=true", {"points": rows})
    aliases = [f"{operator.collection}_{name}" for name in ("reader", "writer")]
    actions = [{"create_alias": {"collection_name": operator.collection, "alias_name": one}} for one in aliases]
    url = f"{operator.servers.qdrant_url}/collections/aliases"
    requests.post(url, json={"actions": actions}, timeout=60).raise_for_status()
