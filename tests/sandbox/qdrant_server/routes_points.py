"""The endpoints of points: writes and reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import qdrant_edge as edge

from tests.sandbox.qdrant_server import collection as queries
from tests.sandbox.qdrant_server import points as conversion
from tests.sandbox.qdrant_server import points as filters
from tests.sandbox.qdrant_server import routing as limits
from tests.sandbox.qdrant_server.collection import Collection
from tests.sandbox.qdrant_server.request import Refusal, bad_request
from tests.sandbox.qdrant_server.routing import Call, Handler, Routes

Change = edge.UpdateOperation
Read = Callable[[Collection, dict[str, Any]], Any]


def add_to(routes: Routes) -> None:
    """Register the endpoints."""
    points = "/collections/{name}/points"
    routes.add("PUT", points, _upsert, takes="json")
    routes.add("POST", points, _reads(queries.retrieve), takes="json")
    routes.add("POST", f"{points}/count", _reads(queries.count), takes="json")
    routes.add("POST", f"{points}/scroll", _reads(queries.scroll), takes="json")
    routes.add("POST", f"{points}/search", _reads(queries.search), takes="json")
    routes.add("POST", f"{points}/query", _reads(_query), takes="json")
    routes.add("POST", f"{points}/query/batch", _reads(_query_batch), takes="json")
    routes.add("POST", f"{points}/delete", _delete, takes="json")
    routes.add("POST", f"{points}/payload", _set_payload, takes="json")
    routes.add("PUT", f"{points}/payload", _overwrite_payload, takes="json")
    routes.add("POST", f"{points}/payload/delete", _delete_payload, takes="json")
    routes.add("POST", f"{points}/payload/clear", _clear_payload, takes="json")
    routes.add("PUT", f"{points}/vectors", _update_vectors, takes="json")
    routes.add("GET", f"{points}/{{id}}", _one_point)


def _reads(read: Read) -> Handler:
    def handler(call: Call) -> Any:
        collection = call.storage.get(call.names["name"])
        limits.check_read(collection, call.json)
        return read(collection, call.json)

    return handler


def _query(collection: Collection, request: dict[str, Any]) -> Any:
    return {"points": queries.query(collection, request)}


def _query_batch(collection: Collection, request: dict[str, Any]) -> Any:
    return [_query(collection, one) for one in request["searches"]]


def _one_point(call: Call) -> Any:
    collection = call.storage.get(call.names["name"])
    limits.check_read(collection, {})
    return queries.one_point(collection, call.names["id"])


def _upsert(call: Call) -> Any:
    rows = conversion.points(call.json)
    collection = call.storage.get(call.names["name"])
    limits.check_write(collection, len(rows))
    waits = call.wait(default=False)
    try:
        number = collection.upsert(rows)
    except Refusal:
        if waits or call.dialect.checks_before_accepting:
            raise
        number = collection.next_operation()  # 1.11 acknowledges before it looks, and the loss stays silent
    return {"operation_id": number, "status": "completed" if waits else "acknowledged"}


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
    rows = conversion.points(call.json)
    changed = [edge.PointVectors(row["id"], conversion.engine_vector(row["vector"])) for row in rows]
    return _apply(call, Change.update_vectors(changed))


def _change(call: Call, by_ids: Callable[..., Change], by_filter: Callable[..., Change], *values: Any) -> Any:
    """Apply a change to the points named in the request, by ids or by a filter."""
    if call.json.get("points") is not None:
        return _apply(call, by_ids([filters.point_id(one) for one in call.json["points"]], *values))
    condition = filters.build(call.json.get("filter"))
    if condition is None:
        raise bad_request("Expected either points or filter")
    return _apply(call, by_filter(condition, *values))


def _apply(call: Call, operation: Change) -> Any:
    collection = call.storage.get(call.names["name"])
    limits.check_write(collection, 1)
    number = collection.update(operation)
    return {"operation_id": number, "status": "completed" if call.wait(default=False) else "acknowledged"}
