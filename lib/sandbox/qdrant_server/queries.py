"""Reads of one collection: count, retrieve, scroll, query and the older search."""

from __future__ import annotations

from typing import Any

import qdrant_edge as edge

from lib.sandbox.qdrant_server import filters
from lib.sandbox.qdrant_server.collection import Collection
from lib.sandbox.qdrant_server.collection_config import dimension
from lib.sandbox.qdrant_server.conversion import payload_selector, record_json, vector_json
from lib.sandbox.qdrant_server.dialect import COUNT, SCROLL
from lib.sandbox.qdrant_server.errors import Refusal, bad_request, invalid_body, wrong_input

Json = dict[str, Any]
SEARCH = "Search"


def count(collection: Collection, request: Json) -> Json:
    """The number of points that fit the filter, always exact."""
    wanted = edge.CountRequest(exact=True, filter=filters.build(request.get("filter")))
    return {"count": collection.engine(COUNT).count(wanted)}


def retrieve(collection: Collection, request: Json) -> list[Json]:
    """The points of `ids` that exist."""
    ids: list[Any] = [filters.point_id(one) for one in request["ids"]]
    with_payload = payload_selector(request.get("with_payload"), default=True)
    with_vector = _with_vector(request)
    records = collection.engine(SCROLL).retrieve(ids, with_payload=with_payload, with_vector=with_vector)
    return [record_json(one, with_payload=with_payload, with_vector=with_vector) for one in records]


def one_point(collection: Collection, given: str) -> Json:
    """One point with payload and vector; Refusal (404) if it is not there."""
    wanted = filters.point_id(int(given) if given.isdigit() else given)
    found = retrieve(collection, {"ids": [wanted], "with_payload": True, "with_vector": True})
    if not found:
        raise Refusal(404, f"Not found: Point with id {wanted} does not exists!")
    return found[0]


def scroll(collection: Collection, request: Json) -> Json:
    """One page of points, ordered by id or by a payload key."""
    limit = request.get("limit") or 10
    if request.get("limit") == 0:
        raise invalid_body("scroll_request.limit: value 0 invalid, must be 1 or larger")
    offset, order_by = request.get("offset"), _order_by(request.get("order_by"))
    with_payload = payload_selector(request.get("with_payload"), default=True)
    with_vector = _with_vector(request)
    wanted = edge.ScrollRequest(
        offset=None if offset is None else filters.point_id(offset),
        limit=limit,
        filter=filters.build(request.get("filter")),
        with_payload=with_payload,
        with_vector=with_vector,
        order_by=order_by,
    )
    records, following = collection.engine(SCROLL).scroll(wanted)
    rows = [record_json(one, with_payload=with_payload, with_vector=with_vector) for one in records]
    return {"points": rows, "next_page_offset": None if order_by else following}


def query(collection: Collection, request: Json) -> list[Json]:
    """The scored points of one `/points/query` request: by vector, by id, by payload order, or all."""
    asked = request.get("query")
    if isinstance(asked, dict) and "nearest" in asked:
        asked = asked["nearest"]
    if request.get("prefetch"):
        raise bad_request("the stand-in does not play prefetches")
    if asked is None or (isinstance(asked, dict) and "order_by" in asked):
        order = None if asked is None else asked["order_by"]
        page = scroll(
            collection, {**request, "order_by": order, "with_payload": request.get("with_payload", False)}
        )
        return [{"version": 0, "score": 0.0, **row} for row in page["points"]]
    if isinstance(asked, dict):
        raise bad_request("the stand-in plays queries by vector, by id and by order only")
    return _nearest(collection, request, asked)


def search(collection: Collection, request: Json) -> list[Json]:
    """The older search: a vector, or a vector with its name."""
    vector, using = request["vector"], None
    if isinstance(vector, dict):
        vector, using = vector["vector"], vector["name"]
    return _nearest(collection, {**request, "using": using}, vector)


def _nearest(collection: Collection, request: Json, asked: Any) -> list[Json]:
    using = request.get("using")
    condition = filters.build(request.get("filter"))
    if not isinstance(asked, list):
        asked, condition = (
            _stored_vector(collection, asked, using),
            filters.without(request.get("filter"), [asked]),
        )
    _check_dimension(collection, asked, using)
    with_payload = payload_selector(request.get("with_payload"), default=False)
    with_vector = _with_vector(request)
    wanted = edge.QueryRequest(
        query=edge.Query.Nearest(asked, using=using),
        limit=request.get("limit") or 10,
        offset=request.get("offset") or 0,
        filter=condition,
        score_threshold=request.get("score_threshold"),
        with_payload=with_payload,
        with_vector=with_vector,
    )
    found = collection.engine(SEARCH).query(wanted)
    return [record_json(one, with_payload=with_payload, with_vector=with_vector) for one in found]


def _stored_vector(collection: Collection, given: Any, using: str | None) -> list[float]:
    rows = retrieve(collection, {"ids": [given], "with_payload": False, "with_vector": True})
    if not rows:
        raise Refusal(404, f"Not found: No point with id {given} found")
    vector = rows[0]["vector"]
    return list(vector_json(vector[using] if using else vector).tolist())


def _check_dimension(collection: Collection, vector: list[float], using: str | None) -> None:
    expected = dimension(collection.config, using or "")
    if expected is None:
        raise wrong_input(f"Not existing vector name error: {using or ''}")
    if len(vector) != expected:
        raise wrong_input(f"Vector dimension error: expected dim: {expected}, got {len(vector)}")


def _with_vector(request: Json) -> Any:
    return request.get("with_vector", request.get("with_vectors", False)) or False


def _order_by(given: Any) -> edge.OrderBy | None:
    if given is None:
        return None
    order = {"key": given} if isinstance(given, str) else given
    direction = edge.Direction.Desc if order.get("direction") == "desc" else edge.Direction.Asc
    return edge.OrderBy(order["key"], direction=direction, start_from=order.get("start_from"))
