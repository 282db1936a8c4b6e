"""What belongs in a point: its id, and its payload as the graph and the live point together say it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any

from lib.graph.values import NOT_UTF8, is_vector, plain, unreadable
from lib.steps.forms import identical, in_form_of, in_vector_form, spelled_by

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
# What recall filters on, scores by and shows comes from the node wherever the point lacks it: all but these. AutoMem
# writes t_valid into each node, and into a point only when the memory is updated. Of archived and relevance_score its
# write to the point may have failed silently, after that to the graph.
NEEDED_KEYS = tuple(key for key in PAYLOAD_KEYS if key not in {"updated_at", "last_accessed", "t_valid"})
_ALWAYS_BACK = ("content", "tags", "tag_prefixes")
_HYPHENATED = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
# The spellings that Qdrant takes (seen on 1.11.3).
_UUID = re.compile(rf"[0-9a-fA-F]{{32}}|(?:urn:uuid:)?{_HYPHENATED}|\{{{_HYPHENATED}\}}")
_U64 = (1 << 64) - 1
BLANK, BAD_ID = "blank content", "id is neither a UUID nor an unsigned integer"
NOT_TEXT, UNREADABLE = "content is {kind}, not text", "content is not valid UTF-8"
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a point"}


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


def unusable(properties: Mapping[str, Any]) -> str | None:
    """Why a memory's own content cannot be embedded, or None. Verify exempts exactly what this names."""
    content = properties.get("content")
    if content is None or (isinstance(content, str) and not content.strip()):
        return BLANK
    if unreadable(content) and isinstance(content[NOT_UTF8], str):
        return UNREADABLE
    if not isinstance(content, str):
        return NOT_TEXT.format(kind=_KINDS[type(plain(content))])
    return None if point_id(properties.get("id")) is not None else BAD_ID


def spellings(identity: PointId) -> list[str | int]:
    """The usual ways in which a memory's `id` may spell this point's; `point_id` takes mixed cases, too."""
    if isinstance(identity, int):
        return [identity, str(identity)]
    found = [identity, identity.replace("-", ""), f"urn:uuid:{identity}", f"{{{identity}}}"]
    return [*found, found[0].upper(), found[1].upper(), f"urn:uuid:{found[0].upper()}", found[3].upper()]


def _decoded(metadata: object) -> object:
    """AutoMem keeps `metadata` as a JSON string in the graph and as an object in the point; malformed stays text."""
    if not isinstance(metadata, str):
        return metadata
    value = spelled_by(metadata)
    return value if isinstance(value, dict) else metadata


def node_payload(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The payload for a memory that has no point: AutoMem's keys that the node has, metadata decoded."""
    payload = {key: plain(properties[key]) for key in PAYLOAD_KEYS if properties.get(key) is not None}
    if "metadata" in payload:
        payload["metadata"] = _decoded(payload["metadata"])
    return payload


def standing_payload(
    live: Mapping[str, Any] | None, kept: Mapping[str, Any] | None, *, whole: bool = False
) -> Mapping[str, Any] | None:
    """What a memory's payload starts from: the live point's, else the one `kept` from before the migration.

    Where the live point was made anew meanwhile, it gets back what only the old one held, and what recall needs.
    AutoMem's other keys are its own to drop, but for `whole`, while the migration is under way: then every key of
    the old point comes back.
    """
    if live is None or kept is None:
        return kept if live is None else live
    lost = {
        key: value for key, value in kept.items() if whole or key not in PAYLOAD_KEYS or key in _ALWAYS_BACK
    }
    return {**lost, **live}


def own_payload(
    live: Mapping[str, Any] | None, written: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """What of a point's payload is not just as the migration itself `written` it; None where nothing is."""
    if live is None or written is None:
        return live
    return {
        key: value for key, value in live.items() if key not in written or not identical(written[key], value)
    } or None


def merged_payload(live: Mapping[str, Any] | None, properties: Mapping[str, Any]) -> dict[str, Any]:
    """The live point's payload overlaid by the graph's value of every key that the point has, or that recall needs.

    Where both say the same in two forms the point's stays, and what is newer in the graph is written in the point's
    form (see `in_form_of`). What only the point holds stays; what else only the node holds stays out. Where the node's
    metadata is malformed, or its value no UTF-8, the point's own is kept.
    """
    if live is None:
        return node_payload(properties)
    merged = dict(live)
    for key, value in properties.items():
        had = live.get(key)
        if value is None or (key not in live and key not in NEEDED_KEYS):
            continue
        if had is not None and isinstance(value, list) and None in value:
            continue  # an infinite number, which JSON lacks
        if unreadable(value) and had is not None:
            continue
        current = (in_vector_form if is_vector(value) else in_form_of)(had, plain(value))
        merged[key] = _metadata_form(had, current) if key == "metadata" else current
    return merged


def _metadata_form(had: object, current: object) -> object:
    """The node's metadata text in the point's form, an object or the text of one; malformed text replaces no object."""
    if not isinstance(current, str) or current == had:
        return current
    decoded, is_text = _decoded(current), isinstance(spelled_by(had), dict)
    if isinstance(decoded, str):
        return had if is_text or isinstance(had, dict) else decoded
    return in_form_of(had, decoded) if is_text else decoded
