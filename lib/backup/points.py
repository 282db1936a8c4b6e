"""Points: their ids, their payloads in the forms of both stores, and tables of them on disk, compared by id."""

from __future__ import annotations

import contextlib
import math
import re
import sqlite3
import struct
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from shlex import quote
from typing import Any

import orjson
import redis

from lib.clients.embeddings.cache_file import chunks, marks
from lib.clients.falkordb.queries import NOT_UTF8, is_vector, iter_memories, plain, unreadable
from lib.clients.qdrant.points import PAGE, Point, PointId, limits_reads, retrieve_pages, scroll
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import read_ahead
from lib.errors import MigrationError

_GEO = {"lon": "longitude", "lat": "latitude"}  # Qdrant's names, FalkorDB's


def same(left: object, right: object) -> bool:
    """Whether the point's value `left` and the node's `right` are equal within the stores' precision.

    FalkorDB's client gets doubles with 15 digits (0.30000000000000004 is 0.3), Qdrant may change the last digit. Whole
    numbers of a node arrive with all their digits.
    """
    if isinstance(left, str) or isinstance(right, str):  # most values
        return left == right
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return left == right or (isinstance(right, float) and math.isclose(left, right, rel_tol=2e-14))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        has_same_keys = left.keys() == right.keys()
        return identical(left, right) or (has_same_keys and all(same(left[key], right[key]) for key in left))
    return left == right


def identical(left: object, right: object) -> bool:
    """Whether both are equal in JSON, types included: `true` and 1 are equal in Python, but not for a filter."""
    return left is right or (left == right and _canonical(left) == _canonical(right))


def _canonical(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def in_form_of(live: object, value: object) -> Any:
    """Convert the node's `value` to the form of the point's value `live`; returns `live` if both mean the same.

    These are the same: JSON text and its value, FalkorDB's and Qdrant's geo points, numbers of 32 and 64 bits, whole
    numbers and doubles, a list of one item and that item, and one moment in two spellings or as a number. If the form
    of `live` cannot hold the value, it keeps the node's form.
    """
    if same(live, value):
        return live
    if isinstance(live, dict) and isinstance(value, dict):
        return _in_map_form(live, value)
    if isinstance(live, list) and isinstance(value, list):
        return _in_list_form(live, value)
    if isinstance(value, str):
        return _in_moment_form(live, value) if isinstance(live, str) else _text_in_value_form(live, value)
    if isinstance(live, str):
        return _value_in_text_form(live, value)
    return _in_number_form(live, value) if _kind(live) == _kind(value) == "number" else value


def _value_in_text_form(live: str, value: Any) -> Any:
    if _zone(live) is not None and _kind(value) == "number":
        unit = _unit(value)
        return in_form_of(live, (_EPOCH + value * 10**6 / unit * _MICROSECOND).isoformat()) if unit else value
    spelled = _parsed_json(live)
    if spelled is None or _kind(spelled) != _kind(value):
        one = value[0] if isinstance(value, list) and len(value) == 1 else None
        return in_form_of(live, one) if isinstance(one, str) else value
    formed = in_form_of(spelled, value)
    return live if same(spelled, formed) else orjson.dumps(formed).decode()


def _text_in_value_form(live: Any, value: str) -> Any:
    spelled = _parsed_json(value)
    if _kind(live) is not None and _kind(spelled) == _kind(live):
        return in_form_of(live, spelled)
    if isinstance(live, list) and live and isinstance(live[0], str):
        return [in_form_of(live[0], value)]
    is_moment = _kind(live) == "number" and _zone(value) is not None
    moment, unit = _moment(value), _unit(live) if is_moment else None
    if moment is None or unit is None:
        return value
    micros = (moment[0] - _EPOCH) // _MICROSECOND * unit
    return in_form_of(live, micros // 10**6 if isinstance(live, int) else micros / 10**6)


def _parsed_json(text: object) -> Any:
    try:
        return orjson.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _kind(value: object) -> str | None:
    """Return boolean, number, list or map; None for null and text. Values are converted only within one kind."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return "list" if isinstance(value, list) else "map" if isinstance(value, dict) else None


def _in_number_form(live: Any, value: Any) -> int | float:
    """A whole number or a double, like the point's: an integer index does not find 6.0."""
    if isinstance(live, float):
        return float(value) if float(value) == value else value
    return int(value) if float(value).is_integer() else value


def _in_map_form(live: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Convert key by key. As in the payload itself, keys that only the point has stay."""
    if live.keys() >= _GEO.keys() and value.keys() == set(_GEO.values()):
        return {**live, **{key: _in_float_form(live[key], value[name]) for key, name in _GEO.items()}}
    return {**live, **{key: in_form_of(live[key], one) if key in live else one for key, one in value.items()}}


def _in_list_form(live: list[Any], value: list[Any]) -> list[Any]:
    """Convert item by item. Items beyond the point's list get the form of its last item."""
    if not live:
        return value
    patterns = [live[min(number, len(live) - 1)] for number in range(len(value))]
    return [
        one if isinstance(one, list) and isinstance(pattern, str) else in_form_of(pattern, one)
        for pattern, one in zip(patterns, value, strict=True)
    ]


def in_vector_form(live: object, value: Any) -> Any:
    """`in_form_of` for a node's vector or a list of vectors: their numbers have 32 bits."""
    if isinstance(live, list) and isinstance(value, list) and len(live) == len(value):
        return [in_vector_form(*pair) for pair in zip(live, value, strict=True)]
    return _in_float_form(live, value) if _kind(live) == _kind(value) == "number" else in_form_of(live, value)


def _in_float_form(live: Any, value: Any) -> Any:
    """The point's double if it rounds to the node's 32-bit float, else the node's."""
    try:
        return live if struct.pack("f", live) == struct.pack("f", value) else value
    except (struct.error, OverflowError):
        return value


# An ISO 8601 day, or a day and a time: the day, the time, the fraction of a second, the zone.
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d(?::\d\d)?)(?:[.,](\d+))?([Zz]|[+-]\d\d:?\d\d)?)?")
_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=timezone.utc), timedelta(microseconds=1)


def _moment(text: str) -> tuple[datetime, str] | None:
    """Parse a moment; also returns the digits of its second after the sixth. Defaults: UTC, midnight."""
    found = _MOMENT.fullmatch(text)
    if found is None:
        return None
    day, clock, fraction, zone = (part or "" for part in found.groups())
    offset = "+00:00" if zone in {"", "Z", "z"} else f"{zone[:3]}:{zone[-2:]}"
    digits = f"{fraction[:6]:0<6}"
    try:
        moment = datetime.fromisoformat(f"{day}T{f'{clock}:00'[:8] if clock else '00:00:00'}.{digits}{offset}")
    except ValueError:
        return None
    return moment, fraction[6:].rstrip("0")


def _unit(number: float) -> int | None:
    """The unit of a number that may be a moment of the years 69 to 3871: 1 (s), 1000 (ms), 10**6 (us); or None."""
    return next((unit for unit in (1, 10**3, 10**6) if 1e8 * unit <= abs(number) < 6e10 * unit), None)


def _in_moment_form(live: str, value: str) -> str:
    """The point's spelling of one moment; another moment in UTC with its zone spelled like the point's; other text."""
    moment, here, there = _moment(value), _zone(live), _zone(value)
    if moment and moment == _moment(live):
        return live
    in_utc = here is not None and there is not None and {here, there} <= {"", "Z", "+00:00"}
    return f"{value.removesuffix(there)}{here}" if in_utc else value


def _zone(text: str) -> Any:
    """The zone of a moment with a time as it is spelled, or "" if it has none; None for any other text."""
    found = _MOMENT.fullmatch(text) if _moment(text) else None
    return (found[4] or "") if found and found[2] else None


# The keys that AutoMem writes into a payload; recall filters on tags, tag_prefixes and archived.
PAYLOAD_KEYS: tuple[str, ...] = ("content", "tags", "tag_prefixes", "importance", "timestamp", "type", "confidence")
PAYLOAD_KEYS += ("updated_at", "last_accessed", "metadata", "relevance_score", "t_valid", "t_invalid", "archived")
# Keys that recall filters on, scores by or shows. If the point lacks one, it comes from the node. AutoMem writes
# t_valid into each node, but into a point only when the memory is updated. After writing archived and relevance_score
# to the graph, its write to the point may have failed silently.
_NEEDED_KEYS = set(PAYLOAD_KEYS) - {"updated_at", "last_accessed", "t_valid"}
_DROPPED_KEYS = set(PAYLOAD_KEYS) - {"content", "tags", "tag_prefixes"}  # if AutoMem recreated the point without them
_HYPHENATED = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
# The spellings that Qdrant takes (seen on 1.11.3).
_PLAIN_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UUID = re.compile(rf"[0-9a-fA-F]{{32}}|(?:urn:uuid:)?{_HYPHENATED}|\{{{_HYPHENATED}\}}")
_U64 = (1 << 64) - 1
BLANK, BAD_ID = "blank content", "id is neither a UUID nor an unsigned integer"
NOT_TEXT, UNREADABLE = "content is {kind}, not text", "content is not valid UTF-8"
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a geo point"}


def point_id(value: object) -> PointId | None:
    """The id as Qdrant stores it: a lower-case hyphenated UUID or an unsigned integer; None if it can be neither.

    Text is a number only in its canonical spelling: 32 digits are a UUID, "007" is no id.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if 0 <= value <= _U64 else None
    if not isinstance(value, str):
        return None
    if _PLAIN_UUID.fullmatch(value):  # most ids
        return value
    if _UUID.fullmatch(value):
        return str(uuid.UUID(value))
    is_number = value.isascii() and value.isdigit() and len(value) <= len(str(_U64))
    return int(value) if is_number and int(value) <= _U64 and str(int(value)) == value else None


def unusable(properties: Mapping[str, Any]) -> str | None:
    """Why a memory's own content cannot be embedded, or None. Verify skips exactly these memories."""
    content = properties.get("content")
    if content is None or (isinstance(content, str) and not content.strip()):
        return BLANK
    if unreadable(content) and isinstance(content[NOT_UTF8], str):
        return UNREADABLE
    if not isinstance(content, str):
        return NOT_TEXT.format(kind=_KINDS[type(plain(content))])
    return None if point_id(properties.get("id")) is not None else BAD_ID


def ids_for_points(conn: redis.Redis, graph: str) -> Iterator[PointId]:
    """The ids of the memories that should have a point."""
    for node in iter_memories(conn, graph, keys=("id", "content")):
        identity = point_id(node.properties.get("id"))
        if identity is not None and not unusable(node.properties):
            yield identity


def spellings(identity: PointId) -> list[str | int]:
    """The usual spellings of this point's id as a memory's `id`. `point_id` accepts mixed case, too."""
    if isinstance(identity, int):
        return [identity, str(identity)]
    found = [identity, identity.replace("-", ""), f"urn:uuid:{identity}", f"{{{identity}}}"]
    return [*found, found[0].upper(), found[1].upper(), f"urn:uuid:{found[0].upper()}", found[3].upper()]


def _decoded(metadata: object) -> object:
    """AutoMem stores `metadata` as a JSON string in the graph and as an object in the point. Malformed text stays."""
    if not isinstance(metadata, str):
        return metadata
    value = _parsed_json(metadata)
    return value if isinstance(value, dict) else metadata


def node_payload(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The payload for a memory without a point: AutoMem's keys that the node has, metadata decoded."""
    payload = {key: plain(properties[key]) for key in PAYLOAD_KEYS if properties.get(key) is not None}
    if "metadata" in payload:
        payload["metadata"] = _decoded(payload["metadata"])
    return payload


def base_payload(
    live: Mapping[str, Any] | None, saved: Mapping[str, Any] | None, *, whole: bool = False
) -> Mapping[str, Any] | None:
    """What a memory's payload starts from: the live point's, else the one `saved` before the migration.

    If AutoMem recreated the live point meanwhile, the keys that AutoMem does not write, and content and tags, are
    restored from the old point. With `whole` (while the migration runs) every key is restored.
    """
    if live is None or saved is None:
        return saved if live is None else live
    return {**{key: value for key, value in saved.items() if whole or key not in _DROPPED_KEYS}, **live}


def changed_since_written(
    live: Mapping[str, Any] | None, written: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The part of a point's payload that differs from what the migration itself has `written`, or None."""
    if live is None or written is None:
        return live
    own = {key: value for key, value in live.items() if key not in written or not identical(written[key], value)}
    return own or None


def merged_payload(live: Mapping[str, Any] | None, properties: Mapping[str, Any]) -> dict[str, Any]:
    """Overlay the live point's payload with the graph's values of the keys that the point has, or that recall needs.

    A value that means the same in both stores stays as the point has it; a newer one is written in the point's form
    (see `in_form_of`). Keys that only the point has stay; other keys that only the node has are left out. If the node's
    metadata is malformed, or its value is no UTF-8, the point's own value stays.
    """
    if live is None:
        return node_payload(properties)
    merged = dict(live)
    for key, value in properties.items():
        had = live.get(key)
        if value == had and (isinstance(value, str) or identical(value, had)):  # most values
            continue
        if value is None or (key not in live and key not in _NEEDED_KEYS):
            continue
        is_infinite = isinstance(value, list) and None in value  # JSON has no such number
        if had is not None and (is_infinite or unreadable(value)):
            continue
        current = (in_vector_form if is_vector(value) else in_form_of)(had, plain(value))
        merged[key] = _metadata_form(had, current) if key == "metadata" else current
    return merged


def _metadata_form(had: object, current: object) -> object:
    """The node's metadata in the point's form: an object or its JSON text. Malformed text replaces no object."""
    if not isinstance(current, str) or current == had:
        return current
    decoded, is_text = _decoded(current), isinstance(_parsed_json(had), dict)
    if isinstance(decoded, str):
        return had if is_text or isinstance(had, dict) else decoded
    return in_form_of(had, decoded) if is_text else decoded


_PAGE = 1000
_DIGITS = 20  # of the largest number that can be a point's id


def as_id(text: str) -> PointId:
    """The id that `str` made this text of: a number, or any text, such as a UUID."""
    is_number = text.isdecimal() and len(text) <= _DIGITS and str(int(text)) == text
    return int(text) if is_number else text


@contextlib.contextmanager
def room_or_error() -> Iterator[None]:
    """Report a temporary table that outgrew its disk as a MigrationError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise MigrationError(
            f"the temporary folder has no room for the ids of the collection: {error}",
            next_step=f"free some room there:\ndf -h {quote(tempfile.gettempdir())}\n"
            "or name a folder on a larger disk:\nexport TMPDIR=...",
        ) from error


class TemporaryIdTable(contextlib.AbstractContextManager["TemporaryIdTable"]):
    """Ids with payloads in SQLite's own temporary file, which is deleted when the table is closed or collected.

    Ids are text, because SQLite's integers end at 2^63. One thread at a time may use it. With a `path` it is in that
    file, which the caller deletes, and may be there already.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.complete = False  # whether `fill` has read all its ids
        self._db = sqlite3.connect(path or "", check_same_thread=False)
        with room_or_error():
            for setting in ("journal_mode = MEMORY", "synchronous = OFF"):  # nothing of it is used after a crash
                self._db.execute(f"PRAGMA {setting}")
            self._db.execute("CREATE TABLE IF NOT EXISTS points (id TEXT PRIMARY KEY, payload BLOB) WITHOUT ROWID")

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the table."""
        self._db.close()

    def fill(self, ids: Iterable[PointId]) -> None:
        """Replace what is here by these ids."""
        self._db.execute("DELETE FROM points")
        self.complete = False
        for page in chunks(ids, _PAGE):
            self.put((one, None) for one in page)
        self.complete = True

    def put(self, rows: Iterable[tuple[PointId, dict[str, Any] | None]]) -> None:
        """Add ids; a known one gets the new payload."""
        texts = ((str(one), None if payload is None else orjson.dumps(payload)) for one, payload in rows)
        with room_or_error(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO points VALUES (?, ?)", texts)

    def payloads(self, ids: Sequence[PointId]) -> dict[PointId, dict[str, Any]]:
        """Return those of `ids` that are here, with their payloads."""
        found: dict[PointId, dict[str, Any]] = {}
        for part in chunks([str(one) for one in ids]):
            sql = f"SELECT id, payload FROM points WHERE id IN ({marks(part)})"  # noqa: S608 - only question marks
            for text, payload in self._db.execute(sql, part):
                found[as_id(text)] = orjson.loads(payload) if payload else {}
        return found

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM points").fetchone()[0])

    def ids(self, size: int = _PAGE) -> Iterator[list[PointId]]:
        """Yield all ids, in pages of `size`, ordered as text."""
        sql, last = "SELECT id FROM points WHERE id > ? ORDER BY id LIMIT ?", ""
        while page := self._db.execute(sql, (last, size)).fetchall():
            last = page[-1][0]
            yield [as_id(text) for (text,) in page]


def existing_points(qdrant: Qdrant, collection: str, *, payload: bool = True) -> TemporaryIdTable:
    """Read the ids of a collection by one ordered scroll, then the payloads."""
    table = TemporaryIdTable()
    for page in all_points(qdrant, collection) if payload else read_ahead(scroll(qdrant, collection)):
        table.put((point.id, point.payload) for point in page)
    return table


def all_points(qdrant: Qdrant, collection: str, *, page: int = PAGE, vector: bool = False) -> Iterator[list[Point]]:
    """Yield all points with their payloads, in pages: their ids are read first, then several pages at a time.

    Pages of a scroll come one after the other, because each names the next. They are used if reads are limited.
    """
    if limits_reads(qdrant, collection):
        yield from read_ahead(scroll(qdrant, collection, payload=True, vector=vector, page=page))
        return
    with existing_points(qdrant, collection, payload=False) as existing:
        yield from retrieve_pages(qdrant, collection, existing.ids(page), vector=vector)


def orphan_ids(
    existing: TemporaryIdTable, planned: Callable[[Sequence[PointId]], Collection[PointId]]
) -> Iterator[PointId]:
    """Yield the existing ids that are not planned. `planned` returns those of a page that are."""
    for page in existing.ids():
        known = planned(page)
        yield from (one for one in page if one not in known)
