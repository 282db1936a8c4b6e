"""FalkorDB's values as plain JSON values: every type that a property can have (compact form, 4.16 and 4.22).

Numbers of a point or a vector are 32-bit floats on the server: they are given with their own shortest digits.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from lib.errors import StoreFailed

NULL, STRING, INTEGER, BOOLEAN, DOUBLE, ARRAY, MAP, POINT, VECTOR = 1, 2, 3, 4, 5, 6, 10, 11, 12
DATETIME, DATE, TIME, DURATION = 13, 14, 15, 16
# The key under which a text, or a list of texts, is given whose bytes are no UTF-8; a property is never a map.
NOT_UTF8 = "not UTF-8"
# The key under which a vector, or a list of vectors, is given: JSON could not tell them from lists of doubles.
VECF32 = "vecf32"
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - FalkorDB's times have no zone


def plain_value(cell: list[Any]) -> Any:
    """A compact value as JSON has it; times as ISO 8601, in UTC.

    `{NOT_UTF8: ...}` with U+FFFD for unreadable text, `{VECF32: ...}` for vectors: see `plain`.

    Raises StoreFailed for a type that no property has.
    """
    readable = [True]
    value = _plain(cell, readable)
    if _has_float32s(cell):
        return {VECF32: value}
    return value if readable[0] else {NOT_UTF8: value}


def unreadable(value: object) -> bool:
    """Whether `plain_value` marked this value as text that is not UTF-8."""
    return isinstance(value, dict) and value.keys() == {NOT_UTF8}


def is_vector(value: object) -> bool:
    """Whether `plain_value` marked this value as a vector, or as a list of them."""
    return isinstance(value, dict) and value.keys() == {VECF32}


def plain(value: Any) -> Any:
    """A property's value without the mark that `plain_value` may have put on it."""
    return next(iter(value.values())) if is_vector(value) or unreadable(value) else value


def shortest_float32(number: float) -> float:
    """The double with the fewest digits that is the same 32-bit float."""
    try:
        wanted = struct.pack("f", number)
    except OverflowError:
        return number
    for digits in range(6, 10):
        short = float(f"{number:.{digits}g}")
        if struct.pack("f", short) == wanted:
            return short
    return number


def _has_float32s(cell: list[Any]) -> bool:
    kind, value = cell
    return kind == VECTOR or (kind == ARRAY and bool(value) and all(map(_has_float32s, value)))


def _plain(cell: list[Any], readable: list[bool]) -> Any:
    kind, value = cell
    if kind == STRING:
        return _text(value, readable)
    if kind == ARRAY:
        return [_plain(item, readable) for item in value]
    if kind == MAP:
        pairs = zip(value[::2], value[1::2], strict=True)
        return {_text(key, readable): _plain(item, readable) for key, item in pairs}
    if kind not in _SIMPLE:
        raise StoreFailed(
            f"the graph holds a value of a type (number {kind}) that is not known here",
            next_step="remove the property, or use a version of this tool that knows this FalkorDB",
        )
    return _SIMPLE[kind](value)


def _text(value: bytes, readable: list[bool]) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        readable[0] = False
        return value.decode("utf-8", "replace")


def _moment(seconds: int) -> datetime | None:
    try:
        return _EPOCH + timedelta(seconds=seconds)
    except OverflowError:
        return None  # a year that Python does not know


def _datetime(seconds: int) -> str:
    moment = _moment(seconds)
    return f"{moment.isoformat()}+00:00" if moment else str(seconds)


def _date(seconds: int) -> str:
    moment = _moment(seconds)
    return moment.date().isoformat() if moment else str(seconds)


def _time(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds % 86400)).time().isoformat()


def _duration(seconds: int) -> str:
    """ISO 8601, split as the server splits it: a calendar's years, months and days from 1970 on."""
    from dateutil.relativedelta import relativedelta  # type: ignore[import-untyped]

    moment = _moment(seconds)
    if moment is None:
        return f"PT{seconds}S"
    delta = relativedelta(moment, _EPOCH)
    days = [(delta.years, "Y"), (delta.months, "M"), (delta.days, "D")]
    times = [(delta.hours, "H"), (delta.minutes, "M"), (delta.seconds, "S")]
    day, clock = ("".join(f"{number}{unit}" for number, unit in part if number) for part in (days, times))
    return f"P{day}{'T' + clock if clock else ''}" if day or clock else "PT0S"


_SIMPLE: dict[int, Callable[[Any], Any]] = {
    NULL: lambda _value: None,
    INTEGER: int,
    BOOLEAN: lambda value: value == b"true",
    DOUBLE: float,
    POINT: lambda pair: dict(
        zip(("latitude", "longitude"), (shortest_float32(float(x)) for x in pair), strict=True)
    ),
    VECTOR: lambda numbers: [shortest_float32(float(number)) for number in numbers],
    DATETIME: _datetime,
    DATE: _date,
    TIME: _time,
    DURATION: _duration,
}
