"""The endpoints of snapshots: create, list, download, delete, upload and recover."""

from __future__ import annotations

import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from tests.sandbox.qdrant_server import download
from tests.sandbox.qdrant_server import request as multipart
from tests.sandbox.qdrant_server import snapshots as location
from tests.sandbox.qdrant_server import snapshots as restore
from tests.sandbox.qdrant_server import snapshots as snapshot_files
from tests.sandbox.qdrant_server.request import Refusal, invalid_checksum, wrong_input
from tests.sandbox.qdrant_server.routing import ACCEPTED, Call, Routes


def add_to(routes: Routes) -> None:
    """Register the endpoints."""
    many = "/collections/{name}/snapshots"
    routes.add("GET", many, lambda call: snapshot_files.listed(call.storage, call.names["name"]))
    routes.add("POST", many, _create)
    routes.add("POST", f"{many}/upload", _upload, takes="stream")
    routes.add("PUT", f"{many}/recover", _recover, takes="json")
    routes.add("GET", f"{many}/{{snapshot}}", _download, plain_errors=True)
    routes.add("DELETE", f"{many}/{{snapshot}}", _delete)


def _create(call: Call) -> Any:
    collection = call.storage.get(call.names["name"])
    return _run(call, lambda: snapshot_files.create(call.storage, collection))


def _delete(call: Call) -> Any:
    return snapshot_files.delete(call.storage, call.names["name"], call.names["snapshot"])


def _download(call: Call) -> Any:
    path = snapshot_files.find(call.storage, call.names["name"], call.names["snapshot"])
    return download.streamed(path) if call.storage.s3 else download.response(path, call.request)


async def _upload(call: Call) -> Any:
    mark = multipart.boundary(call.request.headers.get("content-type", ""))
    if mark is None:
        raise Refusal(415, "ContentTypeIncompatible", plain=True)
    checksum = _valid_checksum(call.query.get("checksum"), "query parameters", call)
    folder = call.storage.snapshot_folder(call.names["name"])
    scratch = call.storage.scratch("upload-")
    try:
        uploaded = await multipart.receive_file(call.request, mark, "snapshot", scratch / "snapshot")
        if uploaded is None:
            return Response("Required field is missing: snapshot", 400)
        return await run_in_threadpool(_take_upload, call, uploaded, folder, checksum)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _take_upload(call: Call, uploaded: multipart.Uploaded, folder: Path, checksum: str | None) -> Any:
    if checksum is not None:
        actual = snapshot_files.sha256(uploaded.path)
        if actual != checksum.lower():
            raise Refusal(400, f"Checksum mismatch: expected {actual}, actual {checksum}")
    folder.mkdir(parents=True, exist_ok=True)
    stored = uploaded.path.rename(folder / uploaded.filename)
    return _run(call, lambda: restore.restore(call.storage, call.names["name"], stored))


def _recover(call: Call) -> Any:
    where = call.json["location"]
    if not re.match(r"[a-z][a-z0-9+.-]*:", where):
        column = call.body.find(b'"', call.body.find(b'"location"') + len(b'"location"')) + 2 + len(where)
        raise Refusal(400, call.dialect.relative_location(where, column))
    checksum = _valid_checksum(call.json.get("checksum"), "JSON body", call)
    return _run(call, lambda: _fetch_and_restore(call, where, checksum))


def _fetch_and_restore(call: Call, where: str, checksum: str | None) -> bool:
    with location.local_copy(call.storage, where, call.json.get("api_key")) as path:
        if checksum is not None:
            actual = snapshot_files.sha256(path)
            if actual != checksum.lower():
                raise wrong_input(f"Snapshot checksum mismatch: expected {checksum}, got {actual}")
        return restore.restore(call.storage, call.names["name"], path)


def _valid_checksum(value: str | None, where: str, call: Call) -> str | None:
    if value is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise invalid_checksum(where, value, modern=call.dialect.modern)
    return value


def _run(call: Call, work: Callable[[], Any]) -> Any:
    """Do the work, or with wait=false let it go on behind the answer; its refusal is then only logged."""
    if call.wait(default=True):
        return work()

    def unattended() -> None:
        try:
            work()
        except Refusal as refusal:
            sys.stderr.write(f"{call.request.url.path}: {refusal.text}\n")

    threading.Thread(target=unattended, daemon=True).start()
    return ACCEPTED
