"""The comparison behind the replays sees what matters and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.qdrant_compare import Answer, differences

HEADERS = {"content-type": "application/json"}
SNAPSHOT = {
    "name": "c-17-2026-11-22-14-45-04.snapshot",
    "creation_time": "2026-11-22T14:45:04",
    "size": 9,
    "checksum": "ab",
}
BODY = {
    "result": {
        "points": [{"id": 1, "version": 4, "score": 0.5, "payload": {"size": 4}, "vector": [0.25]}],
        "collections": [{"name": "a"}, {"name": "b"}],
        "snapshots": [SNAPSHOT],
    },
    "status": "ok",
    "time": 0.1,
}


def _changed(path: list[Any], value: Any) -> list[str]:
    body: Any = copy.deepcopy(BODY)
    at = body
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return differences(Answer(200, HEADERS, BODY), Answer(200, HEADERS, body))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["time"], 7.0),
        (["result", "points", 0, "version"], 9),
        (["result", "points", 0, "score"], 0.5000000001),
        (["result", "collections"], [{"name": "b"}, {"name": "a"}]),
        (["result", "snapshots", 0], {**SNAPSHOT, "size": 1, "checksum": "cd", "creation_time": "2027"}),
        (["result", "snapshots", 0, "name"], "c-99-2027-01-02-03-04-05.snapshot"),
    ],
)
def test_volatile_values_may_differ(path: list[Any], value: Any) -> None:
    assert _changed(path, value) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["status"], "error"),
        (["result", "points"], []),
        (["result", "points", 0, "id"], 2),
        (["result", "points", 0, "id"], "1"),
        (["result", "points", 0, "score"], 0.51),
        (["result", "points", 0, "payload"], {"size": 5}),
        (["result", "points", 0, "payload"], {}),
        (["result", "points", 0, "vector"], [0.26]),
        (["result", "points", 0, "new"], 1),
        (["result", "collections"], [{"name": "a"}, {"name": "c"}]),
        (["result", "collections"], [{"name": "a"}]),
        (["result", "snapshots", 0], {key: SNAPSHOT[key] for key in ("name", "creation_time", "size")}),
        (["result", "snapshots", 0, "name"], "other.snapshot"),
        (["result"], None),
    ],
)
def test_everything_else_is_reported(path: list[Any], value: Any) -> None:
    assert _changed(path, value) != []


def test_status_headers_and_bodies_are_compared() -> None:
    expected = Answer(200, {"content-type": "text/plain", "etag": "x"}, "text")
    assert differences(expected, Answer(200, {"content-type": "text/plain", "etag": "y"}, "text")) == []
    assert differences(expected, Answer(404, expected.headers, "text"))
    assert differences(expected, Answer(200, {"content-type": "text/plain"}, "text"))
    assert differences(expected, Answer(200, {"content-type": "text/html", "etag": "x"}, "text"))
    assert differences(expected, Answer(200, expected.headers, "other"))
    assert differences(Answer(404, None, 0), Answer(404, None, 3))


def test_paths_ids_and_sums_in_texts_are_masked_but_not_the_words() -> None:
    def text(folder: str, tail: str, total: str) -> Answer:
        reported = f"failed to open file `{folder}/tmp/col-live-recovery-{tail}/config.json`: got {total}"
        return Answer(500, None, {"status": {"error": reported}})

    one = text("/qdrant/storage", "g4cifX", "a1" * 32)
    assert differences(one, text("/srv/data", "Zz", "b2" * 32)) == []
    assert differences(one, text("/srv/data", "Zz", "0" * 64))
    assert differences(one, Answer(500, None, {"status": {"error": "failed to open file"}}))
