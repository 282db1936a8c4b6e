"""Replays recorded requests against a server, row by row, and reports how its answers differ."""

from __future__ import annotations

import gzip
import json
import socket
from dataclasses import dataclass, field
from typing import Any

import requests

from tests.qdrant_compare import Answer, differences, fresh, recorded
from tests.qdrant_uploads import RECORDINGS, content, recorded_snapshots

TIMEOUT = 60
UNDECIDED_COUNTS = {  # 1.11.3 stores some of the good points of a refused batch, in no order: 52 and 53 were seen
    ("1.11.3", "count after that"): {51, 52, 53},
    ("1.11.3", "count after no wait"): {51, 52, 53},
}
# The snapshot that was asked for without waiting may be made by the time the next request lists them.
UNDECIDED_LISTS = {"snapshots after no wait"}
OWN_SNAPSHOTS = {  # file of the recording -> (collection, capture) of the same snapshot made during the replay
    "memories_4d.snapshot": ("memories", "snap"),
    "memories_8d.snapshot": ("other8", "s_other8"),
    "memories_dot.snapshot": ("otherdot", "s_otherdot"),
    "memories_two_shards.snapshot": ("two", "s_two"),
}


def rows(version: str, name: str) -> list[dict[str, Any]]:
    """The rows of a recording of `version`."""
    with gzip.open(RECORDINGS / version / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@dataclass
class Replay:
    """A run of the transcript against the server at `url`.

    `own_snapshots`: upload the server's snapshots instead of the recorded files, which it cannot read.
    """

    url: str
    version: str
    own_snapshots: bool
    captured: dict[str, str] = field(default_factory=dict)
    _snapshots: dict[str, bytes] = field(default_factory=dict)
    _recorded_sum: str = ""

    def run(self, row: dict[str, Any]) -> list[str]:
        """Send one row's request; the differences of its answer."""
        expected = recorded(row["response"])
        actual = self._send(row["request"], expected)
        for name, path in row.get("capture", {}).items():
            self._capture(name, path, expected, actual)
        undecided = UNDECIDED_COUNTS.get((self.version, row["title"]), set())
        if undecided and actual.status == 200 and actual.body["result"]["count"] in undecided:
            actual.body["result"]["count"] = expected.body["result"]["count"]
        if row["title"] in UNDECIDED_LISTS and len(actual.body["result"]) == len(expected.body["result"]) + 1:
            actual.body["result"].pop()
        return differences(expected, actual)

    def _capture(self, name: str, path: str, expected: Answer, actual: Answer) -> None:
        was, now = expected.body, actual.body
        for part in path.split("."):
            was, now = was[part], now[part]
        self.captured[name] = now
        if name == "snap":
            self._recorded_sum = expected.body["result"]["checksum"]

    def _send(self, request: dict[str, Any], expected: Answer) -> Answer:
        path = request["path"]
        for name, value in self.captured.items():
            path = path.replace("{" + name + "}", value)
        if request.get("raw", "").startswith("34603021 bytes"):
            return _oversized(self.url, path)
        headers = {"Accept-Encoding": "identity", **request.get("headers", {})}
        sent: dict[str, Any] = {"headers": headers}
        if "multipart" in request:
            body = self._upload(request["multipart"]["content"])
            path = self._own_sum(path)
            sent["files"] = {request["multipart"]["field"]: (request["multipart"]["filename"], body)}
        elif "raw" in request:
            sent["data"] = request["raw"].encode()
            headers["Content-Type"] = "application/json"
        elif "json" in request:
            sent["json"] = request["json"]
        with requests.Session() as session:
            session.trust_env = False
            answer = session.request(request["method"], self.url + path, timeout=TIMEOUT, stream=True, **sent)
            _read(answer, decoded="accept-encoding" not in {name.lower() for name in request.get("headers", {})})
            return fresh(answer, expected)

    def _upload(self, description: str) -> bytes:
        if not self._snapshots:
            self._snapshots = self._own() if self.own_snapshots else recorded_snapshots(self.version)
        return content(description, self._snapshots, recorded=not self.own_snapshots)

    def _own(self) -> dict[str, bytes]:
        found = {}
        for file, (collection, capture) in OWN_SNAPSHOTS.items():
            where = f"{self.url}/collections/{collection}/snapshots/{self.captured[capture]}"
            found[file] = requests.get(where, headers={"Accept-Encoding": "identity"}, timeout=TIMEOUT).content
        return found

    def _own_sum(self, path: str) -> str:
        """The recorded checksum in a path becomes that of the snapshot that is sent, in the same case."""
        import hashlib

        own = hashlib.sha256(self._snapshots["memories_4d.snapshot"]).hexdigest()
        return path.replace(self._recorded_sum, own).replace(self._recorded_sum.upper(), own.upper())


def _read(answer: requests.Response, *, decoded: bool) -> None:
    """Load the body; undecoded if the request asked for an encoding."""
    answer._content = answer.raw.read(decode_content=decoded)
    answer._content_consumed = True


def _oversized(url: str, path: str) -> Answer:
    """33 MiB of blanks, sent until the server stops reading; it answers from the head of the request."""
    host, port = url.removeprefix("http://").split(":")
    head = f"PUT {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 34603021\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + b'{"points":[')
        response = connection.makefile("rb")
        status = int(response.readline().split()[1])
        length = 0
        while line := response.readline().strip():
            name, _, value = line.decode().partition(":")
            length = int(value) if name.lower() == "content-length" else length
        return Answer(status, None, json.loads(response.read(length)))
