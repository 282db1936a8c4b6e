"""What belongs in a point: its id, and its payload as the graph and the live point together say it."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Mapping
from typing import Any

import orjson

PointId = str | int

# The keys that AutoMem writes into a payload; recall filters on tags, tag_prefixes and archived.
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
    "t_valid",
    "t_invalid",
    "archived",
)
# Consolidation sets these in the graph first; its own write to the point may have failed silently.
_GRAPH_DECIDES = ("archived", "relevance_score")
# What recall filters on and shows: a point that lost them is broken.
_NEEDED = ("content", "tags", "tag_prefixes")
_HYPHENATED = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
# The spellings that Qdrant takes (seen on 1.11.3).
_UUID = re.compile(rf"[0-9a-fA-F]{{32}}|(?:urn:uuid:)?{_HYPHENATED}|\{{{_HYPHENATED}\}}")
_U64 = (1 << 64) - 1
_DIGITS = 2e-14


def point_id(value: object) -> PointId | None:
    """The id as Qdrant holds it (lower-case hyphenated UUID, or an unsigned integer), None where it can be neither.

    A number spelled as text counts where the spelling is the number's own: 32 digits are a UUID, "007" is nothing.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if 0 <= value <= _U64 else None
    if not isinstance(value, str):
        return None
    if _UUID.fullmatch(value):
        return str(uuid.UUID(value))
    is_number = value.isascii() and value.isdigit() and len(value) <= len(str(_U64))
    return int(value) if is_number and int(value) <= _U64 and str(int(value)) == value else None


def spellings(identity: PointId) -> list[str | int]:
    """Every way in which a memory's `id` may spell this point's: what `point_id` takes, in the usual cases."""
    if isinstance(identity, int):
        return [identity, str(identity)]
    found = [identity, identity.replace("-", ""), f"urn:uuid:{identity}", f"{{{identity}}}"]
    return [*found, found[0].upper(), found[1].upper(), f"urn:uuid:{found[0].upper()}", found[3].upper()]


def _decoded(metadata: object) -> object:
    """AutoMem keeps `metadata` as a JSON string in the graph and as an object in the point; malformed stays text."""
    if not isinstance(metadata, str):
        return metadata
    try:
        value = orjson.loads(metadata)
    except ValueError:
        return metadata
    return value if isinstance(value, dict) else metadata


def same(left: object, right: object) -> bool:
    """Equal as far as the stores can tell.

    FalkorDB's client gets doubles with 15 digits (0.30000000000000004 is 0.3), Qdrant may give back another last one.
    """
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return left == right or math.isclose(left, right, rel_tol=_DIGITS)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right


def node_payload(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The payload for a memory that has no point: AutoMem's keys that the node has, metadata decoded."""
    payload = {key: properties[key] for key in PAYLOAD_KEYS if properties.get(key) is not None}
    if "metadata" in payload:
        payload["metadata"] = _decoded(payload["metadata"])
    return payload


def standing_payload(
    live: Mapping[str, Any] | None,
    kept: Mapping[str, Any] | None,
    properties: Mapping[str, Any],
    *,
    whole: bool = False,
) -> Mapping[str, Any] | None:
    """What a memory's payload starts from: the live point's, else the one `kept` from before the migration.

    Where the live point was made anew meanwhile, it gets back what only the old one held, and what recall needs
    (without an old one: what recall needs and the node has). AutoMem's other keys are its own to drop, but for
    `whole`, while the migration is under way: then every key of the old point comes back.
    """
    if live is None:
        return kept
    if kept is None:
        lost = {key: properties[key] for key in _NEEDED if properties.get(key) is not None}
    else:
        lost = {
            key: value for key, value in kept.items() if whole or key not in PAYLOAD_KEYS or key in _NEEDED
        }
    return {**lost, **live}


def own_payload(
    live: Mapping[str, Any] | None, written: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """What of a point's payload is not just as the migration itself `written` it; None where nothing is."""
    if live is None or written is None:
        return live
    return {key: value for key, value in live.items() if key not in written or written[key] != value} or None


def merged_payload(live: Mapping[str, Any] | None, properties: Mapping[str, Any]) -> dict[str, Any]:
    """The live point's payload overlaid by the graph's value of every key that the point has.

    `archived` and `relevance_score` are taken whenever the node has them. What only the point holds stays; what only
    the node holds stays out. Where the node's metadata is malformed, the point's own is kept.
    """
    if live is None:
        return node_payload(properties)
    merged = dict(live)
    for key, value in properties.items():
        if value is None or (key not in live and key not in _GRAPH_DECIDES):
            continue
        current = _decoded(value) if key == "metadata" else value
        malformed = key == "metadata" and isinstance(current, str) and isinstance(live.get(key), dict)
        if not malformed and not same(live.get(key), current):
            merged[key] = current
    return merged
