"""The endpoints of collections, their indexes, aliases and the cluster."""

from __future__ import annotations

import uuid
from datetime import datetime, timezone
from typing import Any

from starlette.responses import Response

from tests.sandbox.qdrant_server import points as conversion
from tests.sandbox.qdrant_server import routing as limits
from tests.sandbox.qdrant_server import settings as collection_config
from tests.sandbox.qdrant_server.collection import must_live
from tests.sandbox.qdrant_server.routing import Call, Routes, json_response
from tests.sandbox.qdrant_server.settings import UPDATE

_PROCESS = str(uuid.uuid4())
_STARTUP = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def add_to(routes: Routes) -> None:
    """Register the endpoints."""
    for path in ("/healthz", "/livez"):
        routes.add("GET", path, lambda _call: Response("healthz check passed", media_type="text/plain"))
    routes.add("GET", "/readyz", lambda _call: Response("all shards are ready", media_type="text/plain"))
    routes.add("GET", "/", _root)
    routes.add("GET", "/telemetry", _telemetry)
    routes.add("GET", "/cluster", lambda _call: {"status": "disabled"})
    routes.add("GET", "/aliases", lambda call: {"aliases": call.storage.alias_rows()})
    routes.add(
        "GET", "/collections", lambda call: {"collections": [{"name": n} for n in call.storage.names()]}
    )
    routes.add("POST", "/collections/aliases", _change_aliases, takes="json")
    one = "/collections/{name}"
    routes.add("GET", one, lambda call: call.storage.get(call.names["name"]).info())
    routes.add("PUT", one, _create, takes="json")
    routes.add("PATCH", one, _patch, takes="json")
    routes.add("DELETE", one, lambda call: call.storage.delete(call.names["name"]))
    routes.add("GET", f"{one}/exists", lambda call: {"exists": call.storage.exists(call.names["name"])})
    routes.add("GET", f"{one}/aliases", _aliases_of)
    routes.add("GET", f"{one}/cluster", _cluster_of)
    routes.add("PUT", f"{one}/index", _add_index, takes="json")
    routes.add("DELETE", f"{one}/index/{{field}}", _drop_index)


def _root(call: Call) -> Response:
    return json_response({"title": "qdrant - vector search engine", "version": call.dialect.version})


def _telemetry(call: Call) -> Any:
    """Of the real one's answer who it is, how many collections there are, and that it is alone."""
    return {
        "id": _PROCESS,
        "app": {"name": "qdrant", "version": call.dialect.version, "startup": _STARTUP},
        "collections": {"number_of_collections": len(call.storage.names())},
        "cluster": {"enabled": False},
    }


def _create(call: Call) -> bool:
    config = collection_config.created(call.json, call.body, call.dialect)
    call.storage.create(call.names["name"], config)
    return True


def _patch(call: Call) -> bool:
    call.storage.get(call.names["name"]).patch(call.json)
    return True


def _change_aliases(call: Call) -> bool:
    call.storage.change_aliases(call.json["actions"])
    return True


def _aliases_of(call: Call) -> Any:
    name = call.storage.get(call.names["name"]).name
    return {"aliases": call.storage.alias_rows(name)}


def _cluster_of(call: Call) -> Any:
    collection = call.storage.get(call.names["name"])
    shard = {"shard_id": 0, "points_count": collection.points_count(), "state": "Active"}
    shards = {"shard_count": 1, "local_shards": [shard], "remote_shards": [], "shard_transfers": []}
    return {"peer_id": call.storage.peer, **shards}


def _add_index(call: Call) -> Any:
    field, schema = call.json["field_name"], call.json.get("field_schema")
    conversion.index_schema(schema, call.body)
    collection = call.storage.get(call.names["name"])
    limits.check_write(collection, 1)
    return _done(collection.add_index(field, schema), call)


def _drop_index(call: Call) -> Any:
    collection = call.storage.get(call.names["name"])
    must_live(collection, UPDATE)
    return _done(collection.drop_index(call.names["field"]), call)


def _done(number: int, call: Call) -> Any:
    return {"operation_id": number, "status": "completed" if call.wait(default=False) else "acknowledged"}
