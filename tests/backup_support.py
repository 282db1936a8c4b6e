"""Shared by the tests of failing backups: loaded stores, writers, what a run may leave, files verified again."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from lib.backup.phases import AWAITED
from lib.clients.falkordb.connection import connect
from lib.journal import Journal, open_journals
from tests.operator_support import OLD_SIZE, Operator
from tests.restore_support import TIMEOUT, wait_for

CREATE_PAIR = """
CREATE (:Memory:Pair {id: $left, key: $key, side: 1, content: $key, type: 'Context', timestamp: '2024-05-01T00:00:00+00:00'})
       -[:TWIN {key: $key}]->
       (:Memory:Pair {id: $right, key: $key, side: 2, content: $key, type: 'Context', timestamp: '2024-05-01T00:00:00+00:00'})
"""
DELETE_PAIR = "MATCH (p:Pair {key: $key}) DETACH DELETE p"


def files(operator: Operator) -> list[str]:
    """Every file of the backup folder except the journals."""
    found = (path for path in operator.backups.rglob("*") if path.is_file() and path.suffix != ".jsonl")
    return sorted(str(path.relative_to(operator.backups)) for path in found)


def server_files(operator: Operator) -> list[str]:
    """The snapshot files that the server holds of the collection."""
    return sorted(one["name"] for one in operator.call("GET", "/snapshots"))


def delete_server_file(operator: Operator, name: str) -> None:
    url = f"{operator.servers.qdrant_url}/collections/{operator.collection}/snapshots/{name}"
    requests.delete(url, timeout=TIMEOUT).raise_for_status()


def awaited(operator: Operator) -> list[Journal]:
    """The open journals; all must be of runs that left nothing but a snapshot that may still appear."""
    journals = open_journals(operator.backups)
    assert [one.phase for one in journals] == [AWAITED] * len(journals)
    return journals


def assert_sets(operator: Operator, count: int = 1) -> None:
    """Check that exactly `count` sets with their two files exist, and no snapshot on the server."""
    manifests = operator.manifests()
    components = [
        json.loads(path.read_text())[component] for path in manifests for component in ("graph", "collection")
    ]
    named = [component["file"]["name"] for component in components]
    assert files(operator) == sorted([*(path.name for path in manifests), *named])
    assert len(manifests) == count
    assert server_files(operator) == []
    assert operator.collections() == [operator.collection]


def assert_one_set(operator: Operator) -> None:
    """Check that exactly one set exists, and no open journal."""
    assert_sets(operator)
    assert open_journals(operator.backups) == []


def assert_final_files_verify(operator: Operator) -> None:
    """Check that every file under its final name is complete, without the tool's checks."""
    for path in operator.backups.glob("falkordb/*.rdb"):
        assert_rdb(path.read_bytes())
    for path in operator.backups.glob("qdrant/*.tar.gz"):
        assert_archive(path.read_bytes())
    for path in operator.manifests():
        manifest = json.loads(path.read_text())
        for component in ("graph", "collection"):
            recorded = manifest[component]["file"]
            data = (operator.backups / recorded["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (recorded["size"], recorded["sha256"])


def assert_rdb(data: bytes) -> None:
    import anycrc

    assert data.startswith(b"REDIS")
    assert data[-9] == 0xFF
    assert int.from_bytes(data[-8:], "little") == anycrc.Model("CRC64-REDIS").calc(data[:-8]) != 0


def assert_archive(data: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as archive:
        parts = {name: archive.extractfile(name).read() for name in archive.getnames()}
    facts = json.loads(parts["collection.json"])
    snapshot = next(content for name, content in parts.items() if name.startswith("snapshot/"))
    assert hashlib.sha256(snapshot).hexdigest() == facts["snapshot_sha256"]
    assert len(parts["ids.txt"].split()) == facts["promised_ids"]
    with tarfile.open(fileobj=io.BytesIO(snapshot)) as inner:
        assert any("config.json" in name for name in inner.getnames())


def assert_no_scratch(operator: Operator) -> None:
    """Check that no scratch folder or scratch process is left; those of a killed run get time to end."""
    place = Path(operator.exports["TMPDIR"])
    assert wait_for(lambda: not any(place.iterdir()) and not _processes(str(place)), 120, 0.05), (
        list(place.rglob("*")),
        _processes(str(place)),
    )


def _processes(word: str) -> list[str]:
    report = subprocess.run(["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=True)
    return [line for line in report.stdout.splitlines() if word in line]


def age_journals(operator: Operator, hours: int) -> None:
    """Move the times of the open journals back by so many hours."""
    from datetime import datetime, timedelta

    for journal in open_journals(operator.backups):
        for entry in journal.entries:
            entry["at"] = (datetime.fromisoformat(entry["at"]) - timedelta(hours=hours)).isoformat()
        journal.path.write_text("".join(json.dumps(entry) + "\n" for entry in journal.entries))


@contextmanager
def writers(operator: Operator, count: int, pause: float, keep: int = 100) -> Iterator[Callable[[], bool]]:
    """Threads that create pairs (both nodes and their relationship in one query), then their points.

    Each deletes its pairs again, except the newest `keep`; no pair is ever incomplete. The yielded function waits until
    another pair has been created (False: none was).
    """
    stop, faults, created = threading.Event(), [], [0]

    def another() -> bool:
        before = created[0]
        return wait_for(lambda: created[0] > before or bool(faults))

    def work(number: int) -> None:
        try:
            _write_pairs(operator, number, stop, pause, keep, created)
        except Exception as error:  # noqa: BLE001 - reported at the end of the block
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for one in threads:
        one.start()
    try:
        yield another
    finally:
        stop.set()
        for one in threads:
            one.join()
    assert not faults, faults


def _write_pairs(
    operator: Operator, number: int, stop: threading.Event, pause: float, keep: int, created: list[int]
) -> None:
    from falkordb.graph import Graph

    alive: list[tuple[str, list[str]]] = []
    with connect(operator.servers.falkordb.address) as conn, requests.Session() as http:
        graph, url = (
            Graph(conn, operator.graph),
            f"{operator.servers.qdrant_url}/collections/{operator.collection}",
        )

        def call(method: str, path: str, body: dict[str, Any]) -> None:
            http.request(method, url + path, json=body, timeout=TIMEOUT).raise_for_status()

        count = 0
        while not stop.is_set():
            key, ids = f"{number}-{count}", [str(uuid.uuid4()), str(uuid.uuid4())]
            graph.query(CREATE_PAIR, {"key": key, "left": ids[0], "right": ids[1]})
            created[0] += 1
            rows = [{"id": one, "vector": [1.0] * OLD_SIZE, "payload": {"content": key}} for one in ids]
            call("PUT", "/points?wait=true", {"points": rows})
            alive.append((key, ids))
            if len(alive) > keep:
                old, gone = alive.pop(0)
                graph.query(DELETE_PAIR, {"key": old})
                call("POST", "/points/delete?wait=true", {"points": gone})
            count += 1
            time.sleep(pause)
