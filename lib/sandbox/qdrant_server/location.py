"""The snapshot that a recover request points at: a file of this machine, or one fetched over http."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lib.sandbox.qdrant_server.errors import bad_request, internal, wrong_input
from lib.sandbox.qdrant_server.storage import Storage

FETCH_SECONDS = 600.0
PIECE = 1 << 20


@contextmanager
def local_copy(storage: Storage, location: str, api_key: str | None) -> Iterator[Path]:
    """The snapshot as a local file, for as long as the context lasts.

    Refusal (400, 500) in the real server's words where it cannot be had; then nothing was touched.
    """
    parts = urlsplit(location)
    if parts.scheme == "file":
        path = Path(unquote(parts.path))
        if not path.is_file():
            raise bad_request(f'Snapshot file "{path}" does not exist')
        yield path
        return
    if parts.scheme not in ("http", "https"):
        raise bad_request(f"URL {location} with schema {parts.scheme} is not supported")
    scratch = storage.scratch("download-")
    try:
        yield _fetch(storage, location, api_key, scratch / "snapshot")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fetch(storage: Storage, location: str, api_key: str | None, target: Path) -> Path:
    headers = {} if api_key is None else {"api-key": api_key}
    request = urllib.request.Request(location, headers=headers)  # noqa: S310  # the scheme was checked
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=FETCH_SECONDS) as answer, target.open("wb") as out:
            shutil.copyfileobj(answer, out, PIECE)
    except urllib.error.HTTPError as error:
        status = f"{error.code} {HTTPStatus(error.code).phrase}"
        what = storage.dialect.downloads
        raise wrong_input(f"Failed to download {what} from {location}: status - {status}") from None
    except OSError:
        raise internal(f"Http request error: error sending request for url ({location})") from None
    return target
