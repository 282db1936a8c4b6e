"""JSON request bodies, with the parser errors of the real server (serde_json's words)."""

from __future__ import annotations

from typing import Any

import orjson

from lib.sandbox.qdrant_server.errors import format_error

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
