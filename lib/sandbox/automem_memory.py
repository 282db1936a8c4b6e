"""POST /memory: what AutoMem takes, how it cleans it, and how it refuses."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from lib.sandbox.automem_schema import iso, tag_prefixes

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
