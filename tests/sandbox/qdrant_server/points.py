"""Points, filters and configurations: from the API's JSON to the engine's values and back."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import qdrant_edge as edge

from tests.sandbox.qdrant_server.versions import bad_request, format_error, no_variant

Json = dict[str, Any]


class NoSuchCondition(Exception):
    """A condition that the API does not know."""


def point_id(value: Any) -> int | str:
    """Read a point id. Raises Refusal (400) for anything but an unsigned integer or a UUID."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64:
        return value
    if isinstance(value, str):
        try:
            return str(uuid.UUID(value))
        except ValueError:
            pass
    valid = "valid values are either an unsigned integer or a UUID"
    raise format_error(f"value {value} is not a valid point ID, {valid}")


def build_filter(filter_json: Json | None) -> edge.Filter | None:
    """Build the engine's filter. Raises NoSuchCondition for a condition that the stand-in does not know."""
    if not filter_json:
        return None
    least = filter_json.get("min_should")
    return edge.Filter(
        must=_conditions(filter_json.get("must")),
        should=_conditions(filter_json.get("should")),
        must_not=_conditions(filter_json.get("must_not")),
        min_should=edge.MinShould(_conditions(least["conditions"]) or [], least["min_count"]) if least else None,
    )


def filter_without(filter_json: Json | None, excluded: int | str) -> edge.Filter | None:
    """Build the engine's filter for `filter_json` without the point `excluded`."""
    must = [filter_json] if filter_json else []
    return build_filter({"must": must, "must_not": [{"has_id": [excluded]}]})


def _conditions(given: Any) -> list[Any] | None:
    if given is None:
        return None
    return [_condition(one) for one in (given if isinstance(given, list) else [given])]


def _condition(one: Any) -> Any:
    if not isinstance(one, dict):
        raise NoSuchCondition
    if "key" in one:
        return _field_condition(one)
    if one.keys() & {"must", "should", "must_not", "min_should"}:
        return build_filter(one)
    for name, make in OTHER_CONDITIONS.items():
        if name in one:
            return make(one[name])
    raise NoSuchCondition


OTHER_CONDITIONS: dict[str, Callable[[Any], Any]] = {
    "has_id": lambda given: edge.HasIdCondition({point_id(value) for value in given}),
    "is_empty": lambda given: edge.IsEmptyCondition(given["key"]),
    "is_null": lambda given: edge.IsNullCondition(given["key"]),
    "has_vector": edge.HasVectorCondition,
}
MATCHES = {
    "value": edge.MatchValue,
    "any": edge.MatchAny,
    "except": edge.MatchExcept,
    "text": edge.MatchText,
}


def _field_condition(one: Json) -> edge.FieldCondition:
    key = one["key"]
    if "match" in one:
        for name, make in MATCHES.items():
            if name in one["match"]:
                return edge.FieldCondition(key, match=make(one["match"][name]))
    elif "range" in one:
        bounds = {bound: value for bound, value in one["range"].items() if value is not None}
        return edge.FieldCondition(key, range=edge.RangeFloat(**bounds))
    elif "geo_radius" in one:
        center, radius = one["geo_radius"]["center"], one["geo_radius"]["radius"]
        return edge.FieldCondition(key, geo_radius=edge.GeoRadius(edge.GeoPoint(**center), radius))
    raise NoSuchCondition


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
DATATYPES = {name.lower(): getattr(edge.VectorStorageDatatype, name) for name in ("Float32", "Float16", "Uint8")}
TOKENIZERS = {
    name.lower(): getattr(edge.TokenizerType, name) for name in ("Prefix", "Whitespace", "Word", "Multilingual")
}


def engine_config(config: Json) -> edge.EdgeConfig:
    """Convert a collection's configuration. What only an optimizer uses is left out."""
    params = config["params"]
    vectors = params["vectors"]
    sparse = {name: edge.EdgeSparseVectorParams() for name in params.get("sparse_vectors", {})}
    if "size" in vectors:
        dense: Any = _vector_params(vectors)
    else:
        dense = {name: _vector_params(one) for name, one in vectors.items()}
    return edge.EdgeConfig(vectors=dense, sparse_vectors=sparse or None, on_disk_payload=params["on_disk_payload"])


def _vector_params(params: Json) -> edge.EdgeVectorParams:
    distance = getattr(edge.Distance, params["distance"])
    return edge.EdgeVectorParams(
        size=params["size"],
        distance=distance,
        on_disk=params.get("on_disk"),
        datatype=DATATYPES[params.get("datatype", "float32")],
    )


def parse_points(request: Json) -> list[Json]:
    """Read the points of an upsert, from `points` or `batch`. Raises Refusal (400) if there are none."""
    rows = _batch_rows(request["batch"]) if "batch" in request else request["points"]
    for row in rows:
        for key in ("id", "vector"):
            if key not in row:
                raise format_error(f"missing field `{key}`")
        row["id"] = point_id(row["id"])
    if not rows:
        raise bad_request("Empty update request")
    return list(rows)


def _batch_rows(batch: Json) -> list[Json]:
    payloads = batch.get("payloads") or [None] * len(batch["ids"])
    rows = zip(batch["ids"], batch["vectors"], payloads, strict=True)
    return [{"id": one, "vector": vector, "payload": payload} for one, vector, payload in rows]


def engine_point(row: Json) -> edge.Point:
    """Convert a point of an upsert."""
    return edge.Point(id=row["id"], vector=engine_vector(row["vector"]), payload=row.get("payload") or {})


def engine_vector(vector: Any) -> Any:
    """Convert a vector of a request: dense, sparse, or a dict of named ones."""
    if not isinstance(vector, dict):
        return vector
    if "indices" in vector:
        return edge.SparseVector(vector["indices"], vector["values"])
    return {name: engine_vector(one) for name, one in vector.items()}


def index_schema(schema: Any, body: bytes) -> Any:
    """Convert `field_schema` of an index request: a type's name, or its parameters."""
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
    """Convert a vector for an answer, to float32: JSON then has the shortest digits of it."""
    if vector is None:
        return {}
    if isinstance(vector, dict):
        return {name: vector_json(one) for name, one in vector.items()}
    if isinstance(vector, edge.SparseVector):
        return {"indices": list(vector.indices), "values": np.asarray(vector.values, dtype=np.float32)}
    return np.asarray(vector, dtype=np.float32)


def payload_selector(given: Any, *, default: bool) -> Any:
    """Convert `with_payload`: a flag, names to include, or names to exclude."""
    if given is None:
        return default
    if isinstance(given, dict):
        return edge.PayloadSelector.Exclude(given["exclude"])
    return edge.PayloadSelector.Include(given) if isinstance(given, list) else given


def record_json(record: Any, *, with_payload: Any, with_vector: Any) -> Json:
    """Convert a record or a scored point for an answer."""
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
