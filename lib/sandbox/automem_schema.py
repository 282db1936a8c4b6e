"""How AutoMem writes a memory into its two stores, as far as the sandbox needs it.

Seen on AutoMem 0.16 (https://github.com/verygoodplugins/automem); older versions write fewer keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

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
