"""Payloads: ids, the forms of a value in both stores, and what belongs in a point."""

from __future__ import annotations

import math
import re
import struct
import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import orjson

from lib.clients.falkordb.queries import NOT_UTF8, is_vector, plain, unreadable

_DIGITS = 2e-14
_UTC = ("Z", "+00:00")
_GEO = {"lon": "longitude", "lat": "latitude"}  # Qdrant's names, FalkorDB's


def same(left: object, right: object) -> bool:
    """Equal as far as the stores can tell: `left` is the point's, `right` the node's.

    FalkorDB's client gets doubles with 15 digits (0.30000000000000004 is 0.3), Qdrant may give back another last one.
    A whole number of the node arrives with all its digits.
    """
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return left == right or (isinstance(right, float) and math.isclose(left, right, rel_tol=_DIGITS))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right


def identical(left: object, right: object) -> bool:
    """Equal in JSON, types included: to Python `true` and 1 are equal, to a filter they are not."""
    return left == right and _canonical(left) == _canonical(right)


def _canonical(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def in_form_of(live: object, value: object) -> Any:
    """The node's `value` as the point writes it; `live`, the point's own, where both say the same.

    JSON text and the value that it spells, FalkorDB's points and Qdrant's, numbers of 32 bits and of 64, whole ones
    and doubles, a list of one and that one, one moment in two spellings or as a number are the same. A form that cannot
    be kept gives way to the node's.
    """
    if same(live, value) or _same_moment(live, value):
        return live
    if isinstance(live, dict) and isinstance(value, dict):
        return _in_map_form(live, value)
    if isinstance(live, list) and isinstance(value, list):
        return _in_list_form(live, value)
    if isinstance(live, str) or isinstance(value, str):
        return _in_text_form(live, value)
    if _kind(live) == _kind(value) == "number":
        return _in_number_form(live, value)
    return value


def _in_text_form(live: object, value: object) -> Any:
    """One of the two, or both, are text."""
    if isinstance(live, str) and isinstance(value, str):
        return _in_moment_form(live, value)
    if isinstance(value, str):
        return _in_form_of_no_text(live, value)
    if _zone(str(live)) is not None and _kind(value) == "number":
        return _from_epoch(str(live), value)
    spelled = spelled_by(live)
    if spelled is None or _kind(spelled) != _kind(value):
        one = value[0] if isinstance(value, list) and len(value) == 1 else None
        return in_form_of(live, one) if isinstance(one, str) else value
    formed = in_form_of(spelled, value)
    return live if same(spelled, formed) else orjson.dumps(formed).decode()


def _in_form_of_no_text(live: object, value: str) -> Any:
    spelled = spelled_by(value)
    if _kind(spelled) == _kind(live) is not None:
        return in_form_of(live, spelled)
    if isinstance(live, list) and live and isinstance(live[0], str):
        return [in_form_of(live[0], value)]
    return _as_epoch(live, value) if _kind(live) == "number" and _zone(value) is not None else value


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


def _in_number_form(live: Any, value: Any) -> int | float:
    """A whole number, or a double, as the point's is: an index of integers does not find 6.0."""
    if isinstance(live, float):
        return float(value) if float(value) == value else value
    return int(value) if float(value).is_integer() else value


def _in_map_form(live: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Key by key; as in the payload itself, what only the point holds stays."""
    if live.keys() >= _GEO.keys() and value.keys() == set(_GEO.values()):
        return {**live, **{key: _in_float_form(live[key], value[name]) for key, name in _GEO.items()}}
    return {**live, **{key: in_form_of(live[key], one) if key in live else one for key, one in value.items()}}


def _in_list_form(live: list[Any], value: list[Any]) -> list[Any]:
    """Item by item; what is longer than the point's list is written as the last of its items is."""
    if not live:
        return value
    patterns = [live[min(number, len(live) - 1)] for number in range(len(value))]
    return [
        one if isinstance(one, list) and isinstance(pattern, str) else in_form_of(pattern, one)
        for pattern, one in zip(patterns, value, strict=True)
    ]


def in_vector_form(live: object, value: Any) -> Any:
    """As `in_form_of`, for a node's vector or a list of them: its numbers have 32 bits."""
    if isinstance(live, list) and isinstance(value, list) and len(live) == len(value):
        return [in_vector_form(*pair) for pair in zip(live, value, strict=True)]
    return _in_float_form(live, value) if _kind(live) == _kind(value) == "number" else in_form_of(live, value)


def _in_float_form(live: Any, value: Any) -> Any:
    """The point's double where the node's 32-bit float is that, rounded."""
    try:
        return live if struct.pack("f", live) == struct.pack("f", value) else value
    except (struct.error, OverflowError):
        return value


# An ISO 8601 day, or a day and a time: the day, the time, the fraction of a second, the zone.
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d(?::\d\d)?)(?:[.,](\d+))?([Zz]|[+-]\d\d:?\d\d)?)?")
_MICRO_DIGITS = 6
_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=timezone.utc), timedelta(microseconds=1)


def _same_moment(live: object, value: object) -> bool:
    if not (isinstance(live, str) and isinstance(value, str)):
        return False
    moments = _moment(live), _moment(value)
    return None not in moments and moments[0] == moments[1]


def _moment(text: str) -> tuple[datetime, str] | None:
    """A moment, and the digits of its second after the sixth; UTC where it names no zone, midnight without a time."""
    found = _MOMENT.fullmatch(text)
    if found is None:
        return None
    day, clock, fraction, zone = (part or "" for part in found.groups())
    offset = "+00:00" if zone in {"", "Z", "z"} else f"{zone[:3]}:{zone[-2:]}"
    digits = f"{fraction[:_MICRO_DIGITS]:0<{_MICRO_DIGITS}}"
    try:
        moment = datetime.fromisoformat(
            f"{day}T{f'{clock}:00'[:8] if clock else '00:00:00'}.{digits}{offset}"
        )
    except ValueError:
        return None
    return moment, fraction[_MICRO_DIGITS:].rstrip("0")


def _unit(number: float) -> int | None:
    """What a second is in a number that may be a moment: since 1970, in seconds, or their 1000th, or millionth part."""
    return next((unit for unit in (1, 10**3, 10**6) if 1e8 * unit <= abs(number) < 1e11 * unit), None)


def _as_epoch(live: Any, value: str) -> Any:
    """The moment as a number like `live`, a whole one where that is."""
    found, unit = _moment(value), _unit(live)
    if found is None or unit is None:
        return value
    micros = (found[0] - _EPOCH) // _MICROSECOND * unit
    return in_form_of(live, micros // 10**6 if isinstance(live, int) else micros / 10**6)


def _from_epoch(live: str, value: Any) -> Any:
    """The number as a moment spelled like `live`."""
    unit = _unit(value)
    return in_form_of(live, (_EPOCH + value * 10**6 / unit * _MICROSECOND).isoformat()) if unit else value


def _in_moment_form(live: str, value: str) -> str:
    """A newer moment in UTC, with the zone spelled as the point spells it; any other text as it is."""
    zones = _zone(live), _zone(value)
    if None in zones:
        return value
    here, there = zones
    return f"{value.removesuffix(there)}{here}" if {here, there} <= {"", *_UTC} else value


def _zone(text: str) -> Any:
    """The zone of a day with a time as it is spelled, "" without one; None where the text is none."""
    found = _MOMENT.fullmatch(text) if _moment(text) else None
    return (found[4] or "") if found and found[2] else None


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
