"""Replays the recording around recover: restores from the server's own URL, clients that hang up, a failed collection.

Rows marked `timed` depend on the moment: their statuses are compared as sets, and the end state that they come to.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import requests

from tests.qdrant_compare import differences, fresh, recorded
from tests.qdrant_uploads import repacked

KEY = "secretkey"
POINTS, SIZE = 8000, 256
TIMEOUT_SECONDS = 120.0
POLL_SECONDS = 0.1
COUNT = {"method": "POST", "path": "/collections/memories/points/count", "json": {"exact": True}}
_ATTEMPTS = 5
HANG_UP_SECONDS = {"own URL, the client": 0.1, "snapshot create, the client": 0.05}
FRESH_TARGET = ("own URL, wait=false", "own URL, the client hangs up", "two restores at once")
NEVER_WRONG = {  # other answers that a timed row may give, because the moment differs
    "wait=false, poll": {404, 500, 200},
    "hung up, poll": {404, 500, 200},
    "create hung up, poll": {200},
    "two restores at once": {200, 409},
    "two at once": {200},
    "DELETE while a restore runs": {200},
    "the restore that was deleted under": {200, 404},
    "deleted under": {404, 200},
}


@dataclass
class RecoverReplay:
    """A run against the server at `url`, which asks for KEY."""

    url: str
    values: dict[str, str] = field(default_factory=dict)
    compared: int = 0

    def set_up(self) -> None:
        """The collection that the recording was made with, and its snapshot."""
        name = "/collections/memories__next"
        self._ok(
            "PUT",
            name,
            {"vectors": {"size": SIZE, "distance": "Cosine"}, "wal_config": {"wal_capacity_mb": 4}},
        )
        self._ok("PUT", f"{name}/index?wait=true", {"field_name": "tags", "field_schema": "keyword"})
        chance = random.Random(7)
        for first in range(0, POINTS, 1000):
            points = [
                {
                    "id": one,
                    "vector": [chance.uniform(-1, 1) for _ in range(SIZE)],
                    "payload": {"tags": ["a"]},
                }
                for one in range(first, first + 1000)
            ]
            self._ok("PUT", f"{name}/points?wait=true", {"points": points})
        made = self._ok("POST", f"{name}/snapshots?wait=true", None)
        self.values = {"{url}": self.url, "{snap}": made["name"], "{sum}": made["checksum"]}

    def run(self, rows: list[dict[str, Any]]) -> list[str]:
        """Replay all rows; one line per difference."""
        found: list[str] = []
        at = 0
        while at < len(rows):
            group = [rows[at]]
            if rows[at].get("timed"):
                group = _same_group(rows, at)
            self._prepare(rows[at]["title"])
            lines = self._timed(group) if rows[at].get("timed") else self._plain(rows[at])
            found += [f"{rows[at]['title']}: {line}" for line in lines]
            self.compared += len(group)
            at += len(group)
        return found

    def _prepare(self, title: str) -> None:
        if title.startswith(FRESH_TARGET):
            self._ok("DELETE", "/collections/memories", None)

    def _plain(self, row: dict[str, Any]) -> list[str]:
        return differences(recorded(row["response"]), self._answer(row))

    def _timed(self, group: list[dict[str, Any]]) -> list[str]:
        title = group[0]["title"]
        if "hangs up" in title:
            return self._hang_up(group[0])
        if title.startswith("two restores at once"):
            return self._two_at_once(group)
        if title.startswith("DELETE while"):
            return self._delete_meanwhile(group)
        return self._poll(group)

    def _hang_up(self, row: dict[str, Any]) -> list[str]:
        seconds = next(value for start, value in HANG_UP_SECONDS.items() if row["title"].startswith(start))
        try:
            answer = self._send(row["request"], timeout=seconds)
        except requests.Timeout:
            return []
        return [] if answer.status_code == 200 else [f"status {answer.status_code}"]

    def _poll(self, group: list[dict[str, Any]]) -> list[str]:
        """Poll as often as recorded, and on until the last recorded answer is there."""
        allowed = next(statuses for start, statuses in NEVER_WRONG.items() if group[0]["title"].startswith(start))
        last, deadline, polls, seen = (
            recorded(group[-1]["response"]),
            time.monotonic() + TIMEOUT_SECONDS,
            0,
            set(),
        )
        while True:
            answer = self._answer(group[-1])
            seen.add(answer.status)
            polls += 1
            left = differences(last, answer)
            if (polls >= len(group) and not left) or time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        return left + ([] if seen <= allowed else [f"statuses {sorted(seen)} are not among {sorted(allowed)}"])

    def _two_at_once(self, group: list[dict[str, Any]]) -> list[str]:
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda row=row: statuses.append(self._send(row["request"]).status_code))
            for row in group[:2]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        well = set(statuses) <= NEVER_WRONG["two restores at once"] and 200 in statuses
        return [] if well else [f"statuses {statuses}"]

    def _delete_meanwhile(self, group: list[dict[str, Any]]) -> list[str]:
        """The DELETE comes as soon as the restore keeps the collection from answering.

        If it came before that, because this machine was slow, the restore is complete and it is all done again.
        """
        statuses: list[int] = []
        for _ in range(_ATTEMPTS):
            statuses.clear()
            restore = threading.Thread(target=lambda: statuses.append(self._send(group[1]["request"]).status_code))
            restore.start()
            while restore.is_alive() and self._reads():
                time.sleep(0.002)
            found = self._plain(group[0])
            restore.join()
            if self._send(COUNT).status_code != 200:
                break
        allowed = NEVER_WRONG["the restore that was deleted under"]
        if not set(statuses) <= allowed:
            found.append(f"the restore answered {statuses}, not one of {sorted(allowed)}")
        return found

    def _reads(self) -> bool:
        """Whether the collection answers a read at once."""
        try:
            return self._send(COUNT, timeout=0.05).status_code == 200
        except requests.Timeout:
            return False

    def _answer(self, row: dict[str, Any]) -> Any:
        return fresh(self._send(row["request"]), recorded(row["response"]))

    def _send(self, request: dict[str, Any], timeout: float = TIMEOUT_SECONDS) -> requests.Response:
        sent: dict[str, Any] = {}
        if "multipart" in request:
            part = request["multipart"]
            sent["files"] = {part["field"]: (part["filename"], self._damaged())}
        elif request.get("json") is not None:
            filled = {name: self._filled(value) for name, value in request["json"].items()}
            sent["json"] = filled
        return requests.request(
            request["method"], self.url + request["path"], headers={"api-key": KEY}, timeout=timeout, **sent
        )

    def _filled(self, value: Any) -> Any:
        for name, stands_for in self.values.items():
            value = value.replace(name, stands_for) if isinstance(value, str) else value
        return value

    def _damaged(self) -> bytes:
        """The snapshot with its log overwritten."""
        where = f"{self.url}/collections/memories__next/snapshots/{self.values['{snap}']}"
        whole = requests.get(
            where, headers={"api-key": KEY, "Accept-Encoding": "identity"}, timeout=TIMEOUT_SECONDS
        ).content
        return repacked(whole, lambda name, body: b"x" * len(body) if name.startswith("0/wal/open-") else body)

    def _ok(self, method: str, path: str, body: Any) -> Any:
        answer = requests.request(method, self.url + path, json=body, headers={"api-key": KEY}, timeout=TIMEOUT_SECONDS)
        assert answer.status_code == 200, (method, path, answer.text)
        return answer.json()["result"]


def _same_group(rows: list[dict[str, Any]], at: int) -> list[dict[str, Any]]:
    """The timed rows that belong together: polls of one thing, two at once, a restore and its DELETE."""
    title = rows[at]["title"]
    if title.startswith("DELETE while"):
        return rows[at : at + 2]
    start = title.partition(", poll")[0].partition(":")[0]
    group = []
    for row in rows[at:]:
        if not row.get("timed") or not row["title"].startswith(start) or row["request"] != rows[at]["request"]:
            break
        group.append(row)
    return group
