"""Filters of the REST API as objects of the engine (https://qdrant.tech/documentation/concepts/filtering/)."""

from __future__ import annotations

import uuid
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
    if "has_id" in one:
        return edge.HasIdCondition({point_id(value) for value in one["has_id"]})
    if "is_empty" in one:
        return edge.IsEmptyCondition(one["is_empty"]["key"])
    if "is_null" in one:
        return edge.IsNullCondition(one["is_null"]["key"])
    if "has_vector" in one:
        return edge.HasVectorCondition(one["has_vector"])
    if "nested" in one:
        return edge.NestedCondition(one["nested"]["key"], build(one["nested"]["filter"]) or edge.Filter())
    if one.keys() & {"must", "should", "must_not", "min_should"}:
        return build(one)
    raise NoSuchCondition


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
    if any(name.startswith("geo_") for name in one):
        raise Refusal(400, "Bad request: the stand-in does not play geo filters")
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
