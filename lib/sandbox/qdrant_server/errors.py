"""Answers that refuse a request: the status and the exact text of the real server."""

from __future__ import annotations

from collections.abc import Mapping


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
