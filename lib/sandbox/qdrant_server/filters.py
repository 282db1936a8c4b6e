"""Filters of the REST API as objects of the engine (https://qdrant.tech/documentation/concepts/filtering/)."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import qdrant_edge as edge

from lib.sandbox.qdrant_server.errors import Refusal, format_error

Json = dict[str, Any]


class NoSuchCondition(Exception):
    """A condition of a form that the API does not know."""


def point_id(value: Any) -> int | str:
    """A point id as the engine takes it; Refusal (400) for anything but an unsigned integer or a UUID."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64:
        return value
    if isinstance(value, str):
        try:
            return str(uuid.UUID(value))
        except ValueError:
            pass
    valid = "valid values are either an unsigned integer or a UUID"
    raise format_error(f"value {value} is not a valid point ID, {valid}")


def build(filter_json: Json | None) -> edge.Filter | None:
    """The engine's filter; NoSuchCondition where a condition has an unknown form."""
    if not filter_json:
        return None
    min_should = filter_json.get("min_should")
    return edge.Filter(
        must=_conditions(filter_json.get("must")),
        should=_conditions(filter_json.get("should")),
        must_not=_conditions(filter_json.get("must_not")),
        min_should=None
        if min_should is None
        else edge.MinShould(_conditions(min_should["conditions"]) or [], min_should["min_count"]),
    )


def without(filter_json: Json | None, ids: list[int | str]) -> edge.Filter:
    """The engine's filter for `filter_json` that also leaves out the points `ids`."""
    return (
        build({"must": [filter_json] if filter_json else [], "must_not": [{"has_id": ids}]}) or edge.Filter()
    )


def _conditions(given: Any) -> list[Any] | None:
    if given is None:
        return None
    return [_condition(one) for one in (given if isinstance(given, list) else [given])]


def _condition(one: Json) -> Any:
    if not isinstance(one, dict):
        raise NoSuchCondition
    if "key" in one:
        return _field(one)
    if one.keys() & {"must", "should", "must_not", "min_should"}:
        return build(one)
    for name, make in OTHER_CONDITIONS.items():
        if name in one:
            return make(one[name])
    raise NoSuchCondition


def _nested(given: Json) -> edge.NestedCondition:
    return edge.NestedCondition(given["key"], build(given["filter"]) or edge.Filter())


OTHER_CONDITIONS: dict[str, Callable[[Any], Any]] = {
    "has_id": lambda given: edge.HasIdCondition({point_id(value) for value in given}),
    "is_empty": lambda given: edge.IsEmptyCondition(given["key"]),
    "is_null": lambda given: edge.IsNullCondition(given["key"]),
    "has_vector": edge.HasVectorCondition,
    "nested": _nested,
}


def _field(one: Json) -> edge.FieldCondition:
    key = one["key"]
    if "match" in one:
        return edge.FieldCondition(key, match=_match(one["match"]))
    if "range" in one:
        return edge.FieldCondition(key, range=_range(one["range"]))
    if "values_count" in one:
        return edge.FieldCondition(key, values_count=edge.ValuesCount(**one["values_count"]))
    for flag in ("is_empty", "is_null"):
        if flag in one:
            return edge.FieldCondition(key, **{flag: one[flag]})
    if "geo_radius" in one:
        around = one["geo_radius"]
        return edge.FieldCondition(
            key, geo_radius=edge.GeoRadius(edge.GeoPoint(**around["center"]), around["radius"])
        )
    if any(name.startswith("geo_") for name in one):
        raise Refusal(400, "Bad request: of the geo filters the stand-in plays geo_radius alone")
    raise NoSuchCondition


def _match(match: Json) -> Any:
    forms = {
        "value": edge.MatchValue,
        "any": edge.MatchAny,
        "except": edge.MatchExcept,
        "text": edge.MatchText,
        "phrase": edge.MatchPhrase,
        "text_any": edge.MatchTextAny,
    }
    for name, form in forms.items():
        if name in match:
            return form(match[name])
    raise NoSuchCondition


def _range(bounds: Json) -> Any:
    given = {name: bounds[name] for name in ("lt", "gt", "lte", "gte") if bounds.get(name) is not None}
    if any(isinstance(value, str) for value in given.values()):
        return edge.RangeDateTime(**given)
    return edge.RangeFloat(**given)
