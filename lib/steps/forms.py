"""One value in two forms: a node's as FalkorDB has it, a point's as AutoMem or its user wrote it into Qdrant."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import orjson

_DIGITS = 2e-14
_UTC = ("Z", "+00:00")
_GEO = {"lon": "longitude", "lat": "latitude"}  # Qdrant's names, FalkorDB's


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


def in_form_of(live: object, value: object) -> Any:
    """The node's `value` as the point writes it; `live`, the point's own, where both say the same.

    JSON text and the value that it spells, FalkorDB's points and Qdrant's, numbers of 32 bits and of 64, and one
    moment in two spellings are the same. A form that cannot be kept gives way to the node's.
    """
    if same(live, value) or _same_moment(live, value):
        return live
    if isinstance(live, dict) and isinstance(value, dict):
        return _in_map_form(live, value)
    if isinstance(live, list) and isinstance(value, list):
        return _in_list_form(live, value)
    if isinstance(live, str) or isinstance(value, str):
        return _in_text_form(live, value)
    return value


def _in_text_form(live: object, value: object) -> Any:
    """One of the two, or both, are text."""
    if isinstance(live, str) and isinstance(value, str):
        return _in_moment_form(live, value)
    if isinstance(value, str):
        spelled = spelled_by(value)
        return in_form_of(live, spelled) if _kind(spelled) == _kind(live) is not None else value
    spelled = spelled_by(live)
    if _kind(spelled) != _kind(value) or spelled is None:
        return value
    formed = in_form_of(spelled, value)
    return live if same(spelled, formed) else orjson.dumps(formed).decode()


def spelled_by(text: object) -> Any:
    """The value that a JSON text spells; None where it is no JSON."""
    try:
        return orjson.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _kind(value: object) -> str | None:
    """What two forms must have in common; None for null and for text."""
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, (int, float)):
        return "number"
    return "list" if isinstance(value, list) else "map" if isinstance(value, dict) else None


def _in_map_form(live: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    if live.keys() == _GEO.keys() and value.keys() == set(_GEO.values()):
        named = {key: value[_GEO[key]] for key in live}
        return {key: _in_float_form(live[key], named[key]) for key in live}
    return {key: in_form_of(live[key], one) if key in live else one for key, one in value.items()}


def _in_list_form(live: list[Any], value: list[Any]) -> list[Any]:
    """Item by item; what is longer than the point's list is written as the last of its items is."""
    if not live:
        return value
    if _float32s(live) and len(live) == len(value) and _float32s(value):
        return [_in_float_form(*pair) for pair in zip(live, value, strict=True)]
    return [in_form_of(live[min(number, len(live) - 1)], one) for number, one in enumerate(value)]


def _float32s(numbers: list[Any]) -> bool:
    return all(isinstance(one, float) for one in numbers)


def _in_float_form(live: Any, value: Any) -> Any:
    """The point's double where the node's 32-bit float is that, rounded."""
    try:
        return live if struct.pack("f", live) == struct.pack("f", value) else value
    except (struct.error, OverflowError):
        return value


def _same_moment(live: object, value: object) -> bool:
    if not (isinstance(live, str) and isinstance(value, str)):
        return False
    moments = _moment(live), _moment(value)
    return None not in moments and moments[0] == moments[1]


def _moment(text: str) -> datetime | None:
    """A moment in ISO 8601, day and time; UTC where it names no zone."""
    if "T" not in text[10:11]:
        return None
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def _in_moment_form(live: str, value: str) -> str:
    """A newer moment in UTC, with the zone spelled as the point spells it; any other text as it is."""
    if _moment(live) is None or _moment(value) is None:
        return value
    here, there = (next((zone for zone in _UTC if text.endswith(zone)), "") for text in (live, value))
    is_utc = all(zone or _has_no_zone(text) for zone, text in ((here, live), (there, value)))
    return value.removesuffix(there) + here if is_utc else value


def _has_no_zone(text: str) -> bool:
    return datetime.fromisoformat(text).tzinfo is None
