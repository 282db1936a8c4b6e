"""Points and filters, from the API's JSON to the engine's values and back."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import qdrant_edge as edge

from tests.sandbox.qdrant_server.request import Refusal, bad_request, format_error, no_variant

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


INDEX_PARAMS = {
    "keyword": edge.KeywordIndexParams,
    "integer": edge.IntegerIndexParams,
    "float": edge.FloatIndexParams,
    "geo": edge.GeoIndexParams,
    "text": edge.TextIndexParams,
    "bool": edge.BoolIndexParams,
    "datetime": edge.DatetimeIndexParams,
    "uuid": edge.UuidIndexParams,
}
DATATYPES = {
    name.lower(): getattr(edge.VectorStorageDatatype, name) for name in ("Float32", "Float16", "Uint8")
}
TOKENIZERS = {
    name.lower(): getattr(edge.TokenizerType, name)
    for name in ("Prefix", "Whitespace", "Word", "Multilingual")
}


def engine_config(config: Json) -> edge.EdgeConfig:
    """The engine's configuration of a collection; what only an optimizer would use is left out."""
    params = config["params"]
    vectors = params["vectors"]
    sparse = {name: edge.EdgeSparseVectorParams() for name in params.get("sparse_vectors", {})}
    if "size" in vectors:
        dense: Any = _vector_params(vectors)
    else:
        dense = {name: _vector_params(one) for name, one in vectors.items()}
    return edge.EdgeConfig(
        vectors=dense, sparse_vectors=sparse or None, on_disk_payload=params["on_disk_payload"]
    )


def _vector_params(params: Json) -> edge.EdgeVectorParams:
    distance = getattr(edge.Distance, params["distance"])
    return edge.EdgeVectorParams(
        size=params["size"],
        distance=distance,
        on_disk=params.get("on_disk"),
        datatype=DATATYPES[params.get("datatype", "float32")],
    )


def points(request: Json) -> list[Json]:
    """The points of an upsert in either form, `points` or `batch`; Refusal (400) for malformed or none."""
    if "batch" in request:
        rows = _batch_rows(request["batch"])
    elif "points" in request:
        rows = request["points"]
    else:
        raise format_error("data did not match any variant of untagged enum PointInsertOperations")
    for row in rows:
        if "id" not in row:
            raise format_error("missing field `id`")
        if "vector" not in row:
            raise format_error("missing field `vector`")
        row["id"] = point_id(row["id"])
    if not rows:
        raise bad_request("Empty update request")
    return list(rows)


def _batch_rows(batch: Json) -> list[Json]:
    payloads = batch.get("payloads") or [None] * len(batch["ids"])
    if len({len(batch["ids"]), len(batch["vectors"]), len(payloads)}) != 1:
        raise bad_request("number of ids, vectors and payloads must be equal")
    rows = zip(batch["ids"], batch["vectors"], payloads, strict=True)
    return [{"id": one, "vector": vector, "payload": payload} for one, vector, payload in rows]


def engine_point(row: Json) -> edge.Point:
    """One upserted point as the engine's object."""
    return edge.Point(id=row["id"], vector=engine_vector(row["vector"]), payload=row.get("payload") or {})


def engine_vector(vector: Any) -> Any:
    """A vector of a request, unnamed or named, as the engine takes it."""
    if not isinstance(vector, dict):
        return vector
    return {name: _named(one) for name, one in vector.items()}


def _named(vector: Any) -> Any:
    if isinstance(vector, dict) and "indices" in vector:
        return edge.SparseVector(vector["indices"], vector["values"])
    return vector


def index_schema(schema: Any, body: bytes) -> Any:
    """`field_schema` of an index request, a type's name or its parameters, as the engine's object."""
    if isinstance(schema, str) and schema in INDEX_PARAMS:
        return getattr(edge.PayloadSchemaType, schema.capitalize())
    if not isinstance(schema, dict) or schema.get("type") not in INDEX_PARAMS:
        raise no_variant("PayloadFieldSchema", body)
    given = {key: value for key, value in schema.items() if key != "type" and value is not None}
    if "tokenizer" in given:
        given["tokenizer"] = TOKENIZERS[given["tokenizer"]]
    try:
        return INDEX_PARAMS[schema["type"]](**given)
    except TypeError:  # a parameter that this kind of index does not have
        raise no_variant("PayloadFieldSchema", body) from None


def vector_json(vector: Any) -> Any:
    """A vector for the answer: float32, so that it is written with its own shortest digits."""
    if vector is None:
        return {}
    if isinstance(vector, dict):
        return {name: vector_json(one) for name, one in vector.items()}
    if isinstance(vector, edge.SparseVector):
        return {"indices": list(vector.indices), "values": np.asarray(vector.values, dtype=np.float32)}
    return np.asarray(vector, dtype=np.float32)


def payload_selector(given: Any, *, default: bool) -> Any:
    """`with_payload` as the engine takes it: a flag, names, or included and excluded names."""
    if given is None:
        return default
    if isinstance(given, dict):
        if "exclude" in given:
            return edge.PayloadSelector.Exclude(given["exclude"])
        return edge.PayloadSelector.Include(given["include"])
    return edge.PayloadSelector.Include(given) if isinstance(given, list) else given


def record_json(record: Any, *, with_payload: Any, with_vector: Any) -> Json:
    """One record or scored point of an answer (the score and version only where the engine gives them)."""
    found: Json = {"id": record.id}
    if hasattr(record, "score"):
        found["version"] = record.version
        found["score"] = np.float32(record.score)
    if with_payload is not False:
        found["payload"] = record.payload or {}
    if with_vector:
        found["vector"] = vector_json(record.vector)
    order_value = getattr(record, "order_value", None)
    if order_value is not None:
        found["order_value"] = order_value
    return found
