"""The download of a snapshot file: whole, a range of it, or compressed on the fly, as the real server sends it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

from isal import isal_zlib
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

PIECE = 1 << 20
GZIP_WINDOW = 31


def response(path: Path, request: Request) -> Response:
    """Status 200, 206 or 416. Compressed answers are gzip; the real server prefers br where the client takes it."""
    stat = path.stat()
    headers = {
        "content-disposition": f'attachment; filename="{path.name}"',
        "content-type": "application/octet-stream",
        "accept-ranges": "bytes",
        "last-modified": formatdate(stat.st_mtime, usegmt=True),
        "etag": f'"{stat.st_ino:x}:{stat.st_size:x}:{int(stat.st_mtime):x}:{stat.st_mtime_ns % 10**9:x}"',
    }
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if wanted:
        last = min(int(wanted[2] or stat.st_size), stat.st_size - 1)
        return _range(path, int(wanted[1]), last, stat.st_size, headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        compressed = _gzipped(_pieces(path, 0, stat.st_size))
        return StreamingResponse(compressed, headers={**headers, "content-encoding": "gzip"})
    return StreamingResponse(
        _pieces(path, 0, stat.st_size), headers={**headers, "content-length": str(stat.st_size)}
    )


def streamed(path: Path) -> Response:
    """What a server with its snapshots in S3 sends, whatever part is asked for: all of it, without a length."""
    return StreamingResponse(_pieces(path, 0, path.stat().st_size), media_type="application/octet-stream")


def _range(path: Path, first: int, last: int, size: int, headers: dict[str, str]) -> Response:
    if first >= size:
        return Response(status_code=416, headers={**headers, "content-range": f"bytes */{size}"})
    headers = {
        **headers,
        "content-encoding": "identity",
        "content-range": f"bytes {first}-{last}/{size}",
        "content-length": str(last + 1 - first),
    }
    return StreamingResponse(_pieces(path, first, last + 1 - first), 206, headers=headers)


def _pieces(path: Path, start: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (piece := file.read(min(PIECE, length))):
            length -= len(piece)
            yield piece


def _gzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    packer = isal_zlib.compressobj(1, isal_zlib.DEFLATED, GZIP_WINDOW)
    for piece in pieces:
        if packed := packer.compress(piece):
            yield packed
    yield packer.flush()
