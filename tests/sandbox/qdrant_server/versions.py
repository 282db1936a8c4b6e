"""The two versions that the stand-in emulates: how each words its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

UPDATE, SNAPSHOT, INFO, COUNT, SCROLL = "Update Points", "Snapshot", "Get Info", "count", "Scroll"


class Refusal(Exception):
    """An error answer: `status` and `text`. `plain` answers without the JSON envelope."""

    def __init__(
        self, status: int, text: str, *, plain: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.plain = plain
        self.headers = dict(headers or {})


class StartRefused(Exception):
    """The data directory contains a shard that this version does not start with."""


def collection_missing(name: str) -> Refusal:
    """No collection or alias of that name (404)."""
    return Refusal(404, f"Not found: Collection `{name}` doesn't exist!")


def collection_exists(name: str) -> Refusal:
    """The name is in use (409)."""
    return Refusal(409, f"Wrong input: Collection `{name}` already exists!")


def internal(text: str) -> Refusal:
    """The server failed (500)."""
    return Refusal(500, f"Service internal error: {text}")


def wrong_input(text: str) -> Refusal:
    """The request does not fit the collection (400)."""
    return Refusal(400, f"Wrong input: {text}")


def bad_request(text: str) -> Refusal:
    """The request is not possible (400)."""
    return Refusal(400, f"Bad request: {text}")


def format_error(text: str) -> Refusal:
    """The body cannot be parsed into the request (400)."""
    return Refusal(400, f"Format error in JSON body: {text}")


def invalid_body(text: str) -> Refusal:
    """A value of the body is out of its bounds (422)."""
    return Refusal(422, f"Validation error in JSON body: [{text}]")


def no_variant(enum: str, body: bytes) -> Refusal:
    """A value that matches no variant of `enum` (400). The position is the end of the body."""
    return format_error(f"data did not match any variant of untagged enum {enum} at line 1 column {len(body)}")


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse an object. Raises Refusal (400) worded as by Qdrant's parser."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise format_error(parser_error(body, error.pos)) from None
    if not isinstance(value, dict):
        raise format_error("invalid type: expected struct at line 1 column 0")
    return value


def parser_error(text: bytes, position: int) -> str:
    """Describe the fault at an offset of `text` as serde_json does."""
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


@dataclass(frozen=True)
class Version:
    """One version. `modern` is True for 1.18.3, False for 1.11.3."""

    number: str
    modern: bool

    def failed_shard(self, doing: str, peer: int, scratch: str = "") -> str:
        """The error of a collection whose shard was lost in a failed restore (status 500)."""
        if self.modern:
            if doing == SNAPSHOT:
                return "Failed to get_snapshot_creator,  Failed to restore local replica"
            cause = f"Failed to {doing},  Failed to restore local replica"
            return cause if doing == UPDATE else _failed_read(cause)
        if doing == SNAPSHOT:
            lost = "Service internal error: Failed to restore local replica"
            return f"failed to create snapshot {scratch}/0: {lost}"
        if doing == INFO:
            return "0 of 0 read operations failed"
        replica_set = f"The replica set for shard 0 on peer {peer}"
        if doing == UPDATE:
            return f"{replica_set} has no active replica"
        return f"{replica_set} does not have enough active replicas"

    def not_an_archive(self) -> str:
        """The error for an upload that is no tar (status 500)."""
        if self.modern:
            return "File IO error: Malformed tar archive, reached unknown entry"
        return "Failed to open snapshot archive, malformed format"

    def segment_not_an_archive(self, path: str) -> str:
        """The error for a segment inside the snapshot that is no tar (status 500)."""
        if not self.modern:
            return self.not_an_archive()
        cause = "Service runtime error: IO Error: Malformed tar archive, reached unknown entry"
        return f'Failed to restore snapshot from "{path}": {cause}'

    def file_absent(self, path: str) -> str:
        """The error for a file that the snapshot lacks (status 500)."""
        where = f"failed to open file `{path}`: " if self.modern else ""
        return f"File IO error: {where}No such file or directory (os error 2)"

    def relative_location(self, location: str, column: int) -> Refusal:
        """The error for a `location` that is no URL (400)."""
        if self.modern:
            text = f'relative URL without a base: "{location}"'
        else:
            text = f'invalid value: string "{location}", expected relative URL without a base'
        return format_error(f"{text} at line 1 column {column}")

    def invalid_checksum(self, where: str, value: str) -> Refusal:
        """The error for a `checksum` that is not 64 hexadecimal digits (422)."""
        given = f'"value": String("{value}")'
        expected = '"expected_length": Number(64)'
        length = f'"length": Number({len(value)})'
        details = ", ".join((expected, length, given) if self.modern else (given, expected, length))
        cause = f"checksum: Validation error: invalid_sha256_hash [{{{details}}}]"
        return Refusal(422, f"Validation error in {where}: [{cause}]")


def shard_absent() -> Refusal:
    """A restore has removed the old shard and not yet put the new one there (500)."""
    return internal(_failed_read("Local shard 0 not found"))


def _failed_read(cause: str) -> str:
    return f"1 of 1 read operations failed:\n  Service internal error: {cause}"


VERSIONS = {"1.11.3": Version("1.11.3", modern=False), "1.18.3": Version("1.18.3", modern=True)}
