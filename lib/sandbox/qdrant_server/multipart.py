"""A multipart upload read as it comes, one field of it streamed to a file (RFC 7578)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from starlette.requests import Request

HEADER_LIMIT = 64 * 1024


@dataclass(frozen=True)
class Uploaded:
    """The field's file as it was stored, and the name that the client gave it, without any path."""

    path: Path
    filename: str


def boundary(content_type: str) -> bytes | None:
    """The boundary of a multipart/form-data request, None for any other."""
    if not content_type.lower().startswith("multipart/form-data"):
        return None
    found = re.search(r'boundary="?([^";]+)"?', content_type)
    return found.group(1).encode() if found else None


async def receive_file(request: Request, mark: bytes, field: str, target: Path) -> Uploaded | None:
    """Store the field called `field` in `target`; None if the body has no such field. The body is read to its end."""
    reader = _Parts(request.stream(), mark)
    uploaded = None
    while (head := await reader.next_head()) is not None:
        name, filename = _names(head)
        if name == field and uploaded is None:
            with target.open("wb") as out:
                await reader.copy_content(out)
            uploaded = Uploaded(target, Path(filename or field).name)
        else:
            await reader.copy_content(None)
    return uploaded


def _names(head: bytes) -> tuple[str | None, str | None]:
    text = head.decode("utf-8", "replace")
    name = re.search(r'[;\s]name="([^"]*)"', text)
    filename = re.search(r'filename="([^"]*)"', text)
    return name and name.group(1), filename and filename.group(1)


class _Parts:
    """The parts of a body, one after the other; never more than a chunk of it in memory."""

    def __init__(self, stream: AsyncIterator[bytes], mark: bytes) -> None:
        self._stream = stream
        self._delimiter = b"\r\n--" + mark
        self._buffer = b"\r\n"  # the first delimiter has no line before it
        self._ended = False
        self._inside = False

    async def _more(self) -> bool:
        chunk = await anext(self._stream, None)
        if chunk is None:
            self._ended = True
            return False
        self._buffer += chunk
        return True

    async def next_head(self) -> bytes | None:
        """The headers of the next part, None after the last."""
        if not self._inside:
            await self.copy_content(None)
            self._inside = True
        while len(self._buffer) < 2 and await self._more():
            pass
        if self._buffer.startswith(b"--") or self._ended:
            while await self._more():
                self._buffer = b""
            return None
        while b"\r\n\r\n" not in self._buffer:
            if len(self._buffer) > HEADER_LIMIT or not await self._more():
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        return head

    async def copy_content(self, out: BinaryIO | None) -> None:
        """Write everything up to the next delimiter to `out`, and step over the delimiter."""
        while (found := self._buffer.find(self._delimiter)) < 0:
            keep = len(self._delimiter) - 1
            if out is not None and len(self._buffer) > keep:
                out.write(self._buffer[:-keep])
            self._buffer = self._buffer[-keep:]
            if not await self._more():
                return
        if out is not None:
            out.write(self._buffer[:found])
        self._buffer = self._buffer[found + len(self._delimiter) :]
