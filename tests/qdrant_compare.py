"""Is an answer the recorded one? Compared are status, headers that matter, structure and error texts.

Volatile and therefore masked: times, checksums, sizes and names of snapshots, peer and operation ids, numbers of
segments, the order of lists without an order, the build's commit, temporary paths and ids in error texts, the order of
the details of a malformed checksum (a hash map's), the last digit of a float.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

MASKED = {"time", "creation_time", "checksum", "peer_id", "operation_id", "segments_count"}
UNORDERED = {"collections", "aliases"}
STABLE_HEADERS = ("content-type", "accept-ranges", "content-encoding", "transfer-encoding")
DEPENDS_ON_BUILD = {"commit"}
PRESENT_HEADERS = ("etag", "last-modified", "content-disposition", "content-range")
TOLERANCE = 1e-6

TEXT_MASKS = (
    (re.compile(r"[^\s`\"]*/tmp/[^/`\"]+/"), "<tmp>/"),
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\.tar"), "<segment>.tar"),
    (re.compile(r"on peer \d+"), "on peer <peer>"),
    (re.compile(r"full-snapshot-[-\d]+\.snapshot"), "full-snapshot-<made>.snapshot"),
    (re.compile(r"-\d+-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d\.snapshot"), "-<made>.snapshot"),
    (re.compile(r"\b(?!0{64})[0-9a-f]{64}\b"), "<sha256>"),
    (re.compile(r"http://127\.0\.0\.1:\d{4,5}"), "<url>"),
)


@dataclass
class Answer:
    """A response, recorded or fresh. `body` is JSON, text, or the number of bytes of anything else."""

    status: int
    headers: dict[str, str] | None
    body: Any
    raw: bytes = field(default=b"", repr=False)


def recorded(response: dict[str, Any]) -> Answer:
    body = next((response[kind] for kind in ("json", "text", "bytes") if kind in response), 0)
    return Answer(response["status"], response.get("headers"), body)


def fresh(response: Any, like: Answer) -> Answer:
    """A requests.Response in the form that `like` was recorded in."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    if isinstance(like.body, int):
        body: Any = len(response.content)
    elif isinstance(like.body, str):
        body = response.text
    else:
        try:
            body = json.loads(response.content)
        except ValueError:
            body = response.text
    return Answer(response.status_code, headers, body, response.content)


def differences(expected: Answer, actual: Answer) -> list[str]:
    """What differs, one line each; empty for the same answer."""
    found = []
    if expected.status != actual.status:
        found.append(f"status {expected.status} is now {actual.status}: {str(actual.body)[:300]}")
    if expected.headers is not None:
        found += _header_differences(expected.headers, actual.headers or {})
    if isinstance(expected.body, int):
        if expected.body == 0 and actual.body:
            found.append(f"a body of {actual.body} bytes")
    else:
        found += list(_body_differences(expected.body, actual.body, ""))
    return found


def _header_differences(expected: dict[str, str], actual: dict[str, str]) -> list[str]:
    changed = [name for name in STABLE_HEADERS if expected.get(name) != actual.get(name)]
    found = [f"{name} {expected.get(name)!r} is now {actual.get(name)!r}" for name in changed]
    other = [name for name in PRESENT_HEADERS if (name in expected) != (name in actual)]
    return found + [f"{name} {'is missing' if name in expected else 'is new'}" for name in other]


def _body_differences(expected: Any, actual: Any, path: str):
    if isinstance(expected, dict) and isinstance(actual, dict):
        yield from _object_differences(expected, actual, path)
    elif isinstance(expected, list) and isinstance(actual, list):
        yield from _list_differences(expected, actual, path)
    elif isinstance(expected, str) and isinstance(actual, str):
        if _masked(expected) != _masked(actual):
            yield f"{path}: {_masked(expected)!r} is now {_masked(actual)!r}"
    elif _is_number(expected) and _is_number(actual):
        if not math.isclose(expected, actual, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{path}: {expected} is now {actual}"
    elif expected != actual or type(expected) is not type(actual):
        yield f"{path}: {expected!r} is now {actual!r}"


def _object_differences(expected: dict[str, Any], actual: dict[str, Any], path: str):
    for name in expected.keys() - actual.keys():
        yield f"{path}.{name} is missing"
    for name in actual.keys() - expected.keys() - DEPENDS_ON_BUILD:
        yield f"{path}.{name} is new"
    snapshot = "creation_time" in expected
    scored = "score" in expected
    for name in expected.keys() & actual.keys():
        if name in MASKED or (snapshot and name == "size") or (scored and name == "version"):
            if type(expected[name]) is not type(actual[name]):
                yield f"{path}.{name}: {expected[name]!r} is now {actual[name]!r}"
        elif name in UNORDERED:
            yield from _list_differences(_sorted(expected[name]), _sorted(actual[name]), f"{path}.{name}")
        else:
            yield from _body_differences(expected[name], actual[name], f"{path}.{name}")


def _list_differences(expected: list[Any], actual: list[Any], path: str):
    if len(expected) != len(actual):
        yield f"{path}: {len(expected)} entries are now {len(actual)}"
        return
    if expected and isinstance(expected[0], dict) and "creation_time" in expected[0]:
        expected, actual = _sorted(expected), _sorted(actual)
    for number, (one, other) in enumerate(zip(expected, actual, strict=True)):
        yield from _body_differences(one, other, f"{path}[{number}]")


def _sorted(rows: list[Any]) -> list[Any]:
    return sorted(rows, key=lambda row: _masked(row.get("name") or row.get("alias_name") or ""))


def _masked(text: str) -> str:
    for pattern, stand_in in TEXT_MASKS:
        text = pattern.sub(stand_in, text)
    return re.sub(r"\[\{(.*)\}\]", lambda found: str(sorted(found[1].split(", "))), text)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
