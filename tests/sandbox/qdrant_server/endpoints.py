"""The endpoints of collections, aliases, snapshots and the server itself."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from tests.sandbox.qdrant_server import config, snapshots
from tests.sandbox.qdrant_server.routing import (
    ACCEPTED,
    Call,
    Routes,
    download,
    download_from_s3,
    json_response,
    receive_file,
)
from tests.sandbox.qdrant_server.versions import Refusal, wrong_input

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
    routes.add("GET", "/collections", _list)
    routes.add("POST", "/collections/aliases", _change_aliases, "json")
    one = "/collections/{name}"
    routes.add("GET", one, lambda call: call.collection.info())
    routes.add("PUT", one, _create, "json")
    routes.add("PATCH", one, _patch, "json")
    routes.add("DELETE", one, lambda call: call.storage.delete(call.names["name"]))
    routes.add("GET", f"{one}/exists", _exists)
    routes.add("GET", f"{one}/aliases", lambda call: {"aliases": call.storage.alias_rows(call.collection.name)})
    routes.add("GET", f"{one}/cluster", _cluster)
    many = f"{one}/snapshots"
    routes.add("GET", many, lambda call: snapshots.listed(call.storage, call.names["name"]))
    routes.add("POST", many, _create_snapshot)
    routes.add("POST", f"{many}/upload", _upload_snapshot, "stream")
    routes.add("PUT", f"{many}/recover", _recover, "json")
    routes.add("GET", f"{many}/{{snapshot}}", _download_snapshot)
    routes.add("DELETE", f"{many}/{{snapshot}}", _delete_snapshot)


def _root(call: Call) -> Response:
    return json_response({"title": "qdrant - vector search engine", "version": call.version.number})


def _telemetry(call: Call) -> Any:
    """A part of the real answer: which server it is, how many collections it has, and that it is no cluster."""
    return {
        "id": _PROCESS,
        "app": {"name": "qdrant", "version": call.version.number, "startup": _STARTUP},
        "collections": {"number_of_collections": len(call.storage.collections)},
        "cluster": {"enabled": False},
    }


def _list(call: Call) -> Any:
    return {"collections": [{"name": name} for name in sorted(call.storage.collections)]}


def _exists(call: Call) -> Any:
    name = call.names["name"]
    return {"exists": call.storage.aliases.get(name, name) in call.storage.collections}


def _create(call: Call) -> bool:
    call.storage.create(call.names["name"], config.created(call.json, call.body, call.version))
    return True


def _patch(call: Call) -> bool:
    call.collection.patch(call.json)
    return True


def _change_aliases(call: Call) -> bool:
    call.storage.change_aliases(call.json["actions"])
    return True


def _cluster(call: Call) -> Any:
    shard = {"shard_id": 0, "points_count": call.collection.points_count(), "state": "Active"}
    shards = {"shard_count": 1, "local_shards": [shard], "remote_shards": [], "shard_transfers": []}
    return {"peer_id": call.storage.peer, **shards}


def _create_snapshot(call: Call) -> Any:
    collection = call.collection
    return _run(call, lambda: snapshots.create(call.storage, collection))


def _delete_snapshot(call: Call) -> Any:
    return snapshots.delete(call.storage, call.names["name"], call.names["snapshot"])


def _download_snapshot(call: Call) -> Response:
    try:
        path = snapshots.find(call.storage, call.names["name"], call.names["snapshot"])
    except Refusal as refusal:
        raise Refusal(refusal.status, refusal.text, plain=True) from None
    return download_from_s3(path) if call.storage.s3 else download(path, call.request)


async def _upload_snapshot(call: Call) -> Any:
    content_type = call.request.headers.get("content-type", "")
    boundary = re.search(r'(?i)^multipart/form-data\b.*boundary="?([^";]+)"?', content_type)
    if not boundary:
        raise Refusal(415, "ContentTypeIncompatible", plain=True)
    checksum = _valid_checksum(call.query.get("checksum"), "query parameters", call)
    scratch = call.storage.scratch("upload-")
    try:
        file = scratch / "snapshot"
        filename = await receive_file(call.request, boundary[1], "snapshot", file)
        if filename is None:
            return Response("Required field is missing: snapshot", 400)
        return await run_in_threadpool(_restore_upload, call, file, filename, checksum)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _restore_upload(call: Call, file: Path, filename: str, checksum: str | None) -> Any:
    if checksum is not None:
        actual = snapshots.sha256(file)
        if actual != checksum.lower():
            raise Refusal(400, f"Checksum mismatch: expected {actual}, actual {checksum}")
    name = call.names["name"]
    folder = call.storage.snapshot_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    stored = file.rename(folder / filename)
    return _run(call, lambda: snapshots.restore(call.storage, name, stored))


def _recover(call: Call) -> Any:
    location = call.json["location"]
    if not re.match(r"[a-z][a-z0-9+.-]*:", location):
        column = call.body.find(b'"', call.body.find(b'"location"') + len(b'"location"')) + 2 + len(location)
        raise call.version.relative_location(location, column)
    checksum = _valid_checksum(call.json.get("checksum"), "JSON body", call)
    return _run(call, lambda: _fetch_and_restore(call, location, checksum))


def _fetch_and_restore(call: Call, location: str, checksum: str | None) -> bool:
    with snapshots.local_copy(call.storage, location, call.json.get("api_key")) as path:
        if checksum is not None:
            actual = snapshots.sha256(path)
            if actual != checksum.lower():
                raise wrong_input(f"Snapshot checksum mismatch: expected {checksum}, got {actual}")
        return snapshots.restore(call.storage, call.names["name"], path)


def _valid_checksum(value: str | None, where: str, call: Call) -> str | None:
    if value is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise call.version.invalid_checksum(where, value)
    return value


def _run(call: Call, work: Callable[[], Any]) -> Any:
    """Do the work before the answer. With wait=false it continues after the answer, and a refusal is only logged."""
    if call.wait(default=True):
        return work()

    def unattended() -> None:
        try:
            work()
        except Refusal as refusal:
            sys.stderr.write(f"{call.request.url.path}: {refusal.text}\n")

    threading.Thread(target=unattended, daemon=True).start()
    return ACCEPTED
