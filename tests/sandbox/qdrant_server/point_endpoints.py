"""The endpoints of points and payload indexes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import qdrant_edge as edge

from tests.sandbox.qdrant_server.config import dimension
from tests.sandbox.qdrant_server.points import (
    build_filter,
    engine_vector,
    filter_without,
    index_schema,
    parse_points,
    payload_selector,
    point_id,
    record_json,
    vector_json,
)
from tests.sandbox.qdrant_server.routing import Call, Handler, Routes
from tests.sandbox.qdrant_server.storage import Collection
from tests.sandbox.qdrant_server.versions import (
    COUNT,
    SCROLL,
    UPDATE,
    Refusal,
    bad_request,
    invalid_body,
    wrong_input,
)

SEARCH = "Search"
Json = dict[str, Any]
Change = edge.UpdateOperation


def add_to(routes: Routes) -> None:
    """Register the endpoints."""
    index = "/collections/{name}/index"
    routes.add("PUT", index, _add_index, "json")
    routes.add("DELETE", f"{index}/{{field}}", _drop_index)
    points = "/collections/{name}/points"
    routes.add("PUT", points, _upsert, "json")
    routes.add("POST", points, _reads(_retrieve), "json")
    routes.add("POST", f"{points}/count", _reads(_count), "json")
    routes.add("POST", f"{points}/scroll", _reads(_scroll), "json")
    routes.add("POST", f"{points}/search", _reads(_search), "json")
    routes.add("POST", f"{points}/query", _reads(_query), "json")
    routes.add("POST", f"{points}/delete", _delete, "json")
    routes.add("POST", f"{points}/payload", _set_payload, "json")
    routes.add("PUT", f"{points}/payload", _overwrite_payload, "json")
    routes.add("POST", f"{points}/payload/delete", _delete_payload, "json")
    routes.add("POST", f"{points}/payload/clear", _clear_payload, "json")
    routes.add("PUT", f"{points}/vectors", _update_vectors, "json")
    routes.add("GET", f"{points}/{{id}}", _one_point)


def _add_index(call: Call) -> Any:
    field, schema = call.json["field_name"], call.json.get("field_schema")
    index_schema(schema, call.body)
    call.collection.check_write(1)
    return call.done(call.collection.add_index(field, schema))


def _drop_index(call: Call) -> Any:
    call.collection.engine(UPDATE)
    return call.done(call.collection.drop_index(call.names["field"]))


def _upsert(call: Call) -> Any:
    rows = parse_points(call.json)
    collection = call.collection
    collection.check_write(len(rows))
    try:
        number = collection.upsert(rows)
    except Refusal:
        if call.wait(default=False) or call.version.modern:
            raise
        number = collection.next_operation()  # 1.11 acknowledges before it checks; nothing reports the loss
    return call.done(number)


def _delete(call: Call) -> Any:
    return _change(call, Change.delete_points, Change.delete_points_by_filter)


def _set_payload(call: Call) -> Any:
    values = call.json["payload"], call.json.get("key")
    return _change(call, Change.set_payload, Change.set_payload_by_filter, *values)


def _overwrite_payload(call: Call) -> Any:
    values = call.json["payload"], call.json.get("key")
    return _change(call, Change.overwrite_payload, Change.overwrite_payload_by_filter, *values)


def _delete_payload(call: Call) -> Any:
    return _change(call, Change.delete_payload, Change.delete_payload_by_filter, call.json["keys"])


def _clear_payload(call: Call) -> Any:
    return _change(call, Change.clear_payload, Change.clear_payload_by_filter)


def _update_vectors(call: Call) -> Any:
    rows = parse_points(call.json)
    changed = [edge.PointVectors(row["id"], engine_vector(row["vector"])) for row in rows]
    return _apply(call, Change.update_vectors(changed))


def _change(call: Call, by_ids: Callable[..., Change], by_filter: Callable[..., Change], *values: Any) -> Any:
    """Apply a change to the points that the request names, by ids or by a filter."""
    if call.json.get("points") is not None:
        return _apply(call, by_ids([point_id(one) for one in call.json["points"]], *values))
    condition = build_filter(call.json.get("filter"))
    if condition is None:
        raise bad_request("Expected either points or filter")
    return _apply(call, by_filter(condition, *values))


def _apply(call: Call, operation: Change) -> Any:
    call.collection.check_write(1)
    return call.done(call.collection.update(operation))


def _reads(read: Callable[[Collection, Json], Any]) -> Handler:
    def handler(call: Call) -> Any:
        exact = bool({**call.json, **(call.json.get("params") or {})}.get("exact"))
        call.collection.check_read(call.json.get("limit"), len(call.json.get("ids", "1")), exact=exact)
        return read(call.collection, call.json)

    return handler


def _one_point(call: Call) -> Any:
    call.collection.check_read(None)
    given = call.names["id"]
    wanted = point_id(int(given) if given.isdigit() else given)
    found = _retrieve(call.collection, {"ids": [wanted], "with_vector": True})
    if not found:
        raise Refusal(404, f"Not found: Point with id {wanted} does not exists!")
    return found[0]


def _count(collection: Collection, request: Json) -> Json:
    """Count the points that match the filter, always exactly."""
    wanted = edge.CountRequest(exact=True, filter=build_filter(request.get("filter")))
    return {"count": collection.engine(COUNT).count(wanted)}


def _retrieve(collection: Collection, request: Json) -> list[Json]:
    ids: list[Any] = [point_id(one) for one in request["ids"]]
    shown = _shown(request, payload=True)
    return [record_json(one, **shown) for one in collection.engine(SCROLL).retrieve(ids, **shown)]


def _scroll(collection: Collection, request: Json) -> Json:
    """Read one page of points, ordered by id or by a payload key."""
    if request.get("limit") == 0:
        raise invalid_body("scroll_request.limit: value 0 invalid, must be 1 or larger")
    offset, order_by = request.get("offset"), _order_by(request.get("order_by"))
    shown = _shown(request, payload=True)
    wanted = edge.ScrollRequest(
        offset=None if offset is None else point_id(offset),
        limit=request.get("limit") or 10,
        filter=build_filter(request.get("filter")),
        order_by=order_by,
        **shown,
    )
    records, following = collection.engine(SCROLL).scroll(wanted)
    rows = [record_json(one, **shown) for one in records]
    return {"points": rows, "next_page_offset": None if order_by else following}


def _query(collection: Collection, request: Json) -> Json:
    """Find the nearest points by a vector or by a point's id. Other queries are not supported."""
    query = request.get("query")
    if isinstance(query, dict) and "nearest" in query:
        query = query["nearest"]
    if query is None or isinstance(query, dict) or request.get("prefetch"):
        raise bad_request("the stand-in supports queries by vector and by id only")
    return {"points": _nearest(collection, request, query)}


def _search(collection: Collection, request: Json) -> list[Json]:
    """Answer the older search, by an unnamed vector."""
    return _nearest(collection, request, request["vector"])


def _nearest(collection: Collection, request: Json, query: Any) -> list[Json]:
    using = request.get("using")
    condition = build_filter(request.get("filter"))
    if not isinstance(query, list):
        condition = filter_without(request.get("filter"), query)
        query = _stored_vector(collection, query, using)
    expected = dimension(collection.config, using or "")
    if expected is None:
        raise wrong_input(f"Not existing vector name error: {using or ''}")
    if len(query) != expected:
        raise wrong_input(f"Vector dimension error: expected dim: {expected}, got {len(query)}")
    shown = _shown(request, payload=False)
    wanted = edge.QueryRequest(
        query=edge.Query.Nearest(query, using=using),
        limit=request.get("limit") or 10,
        offset=request.get("offset") or 0,
        filter=condition,
        score_threshold=request.get("score_threshold"),
        **shown,
    )
    return [record_json(one, **shown) for one in collection.engine(SEARCH).query(wanted)]


def _stored_vector(collection: Collection, given: int | str, using: str | None) -> list[float]:
    rows = _retrieve(collection, {"ids": [given], "with_vector": True})
    if not rows:
        raise Refusal(404, f"Not found: No point with id {given} found")
    vector = rows[0]["vector"]
    return list(vector_json(vector[using] if using else vector).tolist())


def _shown(request: Json, *, payload: bool) -> Json:
    """Read `with_payload` (default `payload`) and `with_vector` (default False)."""
    return {
        "with_payload": payload_selector(request.get("with_payload"), default=payload),
        "with_vector": request.get("with_vector") or request.get("with_vectors") or False,
    }


def _order_by(given: Any) -> edge.OrderBy | None:
    if given is None:
        return None
    order = {"key": given} if isinstance(given, str) else given
    direction = edge.Direction.Desc if order.get("direction") == "desc" else edge.Direction.Asc
    return edge.OrderBy(order["key"], direction=direction, start_from=order.get("start_from"))
