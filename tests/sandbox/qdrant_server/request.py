"""The bodies of requests, and errors as Qdrant words them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from starlette.requests import Request


class Refusal(Exception):
    """A request refused with `status` and `text`; `plain` answers without the JSON envelope."""

    def __init__(
        self, status: int, text: str, *, plain: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.plain = plain
        self.headers = dict(headers or {})


class StartRefused(Exception):
    """The data directory holds a shard that this version does not start with."""


def collection_missing(name: str) -> Refusal:
    """No collection or alias of that name (404)."""
    return Refusal(404, f"Not found: Collection `{name}` doesn't exist!")


def collection_exists(name: str) -> Refusal:
    """The name is taken (409)."""
    return Refusal(409, f"Wrong input: Collection `{name}` already exists!")


def snapshot_missing(name: str) -> Refusal:
    """No such snapshot file (404)."""
    return Refusal(404, f"Not found: Snapshot {name} not found")


def internal(text: str) -> Refusal:
    """The server failed (500)."""
    return Refusal(500, f"Service internal error: {text}")


def wrong_input(text: str) -> Refusal:
    """The request does not fit the collection (400)."""
    return Refusal(400, f"Wrong input: {text}")


def bad_request(text: str) -> Refusal:
    """The request makes no sense (400)."""
    return Refusal(400, f"Bad request: {text}")


def format_error(text: str) -> Refusal:
    """The body cannot be parsed into the request (400)."""
    return Refusal(400, f"Format error in JSON body: {text}")


def invalid_body(text: str) -> Refusal:
    """A value of the body is out of its bounds (422)."""
    return Refusal(422, f"Validation error in JSON body: [{text}]")


def no_variant(enum: str, body: bytes) -> Refusal:
    """A value that fits no form of `enum`; the position is where the parser stood, the end of the body."""
    return format_error(
        f"data did not match any variant of untagged enum {enum} at line 1 column {len(body)}"
    )


def invalid_checksum(where: str, value: str, *, modern: bool) -> Refusal:
    """A `checksum` that is not 64 hexadecimal digits (422); the order of the details differs by version."""
    given = f'"value": String("{value}")'
    expected = '"expected_length": Number(64)'
    length = f'"length": Number({len(value)})'
    details = ", ".join((expected, length, given) if modern else (given, expected, length))
    cause = f"checksum: Validation error: invalid_sha256_hash [{{{details}}}]"
    return Refusal(422, f"Validation error in {where}: [{cause}]")


BODY_LIMIT = 32 * 1024 * 1024


def parse(body: bytes) -> dict[str, Any]:
    """The object in `body`; Refusal (400) with the parser's words and position where there is none."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise format_error(parser_words(body, error.pos)) from None
    if not isinstance(value, dict):
        raise format_error("invalid type: expected struct at line 1 column 0")
    return value


def parser_words(text: bytes, position: int) -> str:
    """What serde_json says of the fault at `position` (an offset into `text`)."""
    before = text[:position].rstrip()
    line = before.count(b"\n") + 1
    column = position - (text.rfind(b"\n", 0, position) + 1) + 1
    where = f"at line {line} column {column}"
    if position >= len(text.rstrip()):
        kind = "an object" if before.startswith(b"{") else "a value"
        return f"EOF while parsing {kind} {where}"
    key_expected = before.endswith(b"{") or (before.endswith(b",") and _inside_object(before))
    return f"{'key must be a string' if key_expected else 'expected value'} {where}"


def _inside_object(text: bytes) -> bool:
    depth: list[int] = []
    quoted = escaped = False
    for byte in text:
        if quoted:
            escaped, quoted = (byte == 0x5C and not escaped), (byte != 0x22 or escaped)
        elif byte == 0x22:
            quoted = True
        elif byte in b"{[":
            depth.append(byte)
        elif byte in b"}]" and depth:
            depth.pop()
    return bool(depth) and depth[-1] == 0x7B


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
