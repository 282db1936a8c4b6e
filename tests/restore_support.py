"""Shared by the tests of restore and of backup verification: complete comparison of stores, damaged files, journals."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource
from lib.backup.phases import AWAITED
from lib.clients.automem import AutoMemApi
from lib.clients.falkordb.connection import connect, list_graphs
from lib.clients.falkordb.digest import graph_digest
from lib.clients.falkordb.scratch import Engine, installed_engines
from lib.journal import open_journals
from lib.restore.inputs import Inputs, read_inputs
from lib.restore.preflight import Site
from tests.operator_support import Operator

TIMEOUT = 60


def settings(operator: Operator) -> dict[str, Any]:
    """The collection's properties other than its points."""
    info = operator.info()
    aliases = operator.call("GET", "/aliases")["aliases"]
    schema = {name: {**one, "points": None} for name, one in info["payload_schema"].items()}
    return {"config": info["config"], "schema": schema, "aliases": aliases}


def keys_of(operator: Operator) -> dict[bytes, object]:
    """Every key except the operator's graphs and FalkorDB's telemetry: DUMP, or by-id digest of a graph.

    Two DUMPs of one graph at rest differ in their bytes (seen on 4.16.3), so a graph is read.
    """
    own = operator.graph.encode()
    with connect(operator.servers.falkordb.address) as conn:
        graphs = list_graphs(conn)
        names = [name for name in conn.scan_iter() if not name.startswith((own, b"telemetry"))]
        return {
            name: graph_digest(conn, name.decode()) if name.decode() in graphs else conn.dump(name) for name in names
        }


@contextmanager
def neighbours(operator: Operator) -> Iterator[Callable[[], Any]]:
    """A second graph, a plain key and another collection; the callable returns their current content."""
    name = f"other_{operator.collection}"
    url = f"{operator.servers.qdrant_url}/collections/{name}"
    requests.put(url, json={"vectors": {"size": 4, "distance": "Dot"}}, timeout=TIMEOUT).raise_for_status()
    rows = [{"id": one, "vector": [1, 2, 3, one], "payload": {"n": one}} for one in range(20)]
    requests.put(f"{url}/points?wait=true", json={"points": rows}, timeout=TIMEOUT).raise_for_status()
    graph, key = f"other_{operator.graph}", f"key_{operator.graph}"
    with connect(operator.servers.falkordb.address) as conn:
        conn.execute_command("GRAPH.QUERY", graph, "UNWIND range(1, 50) AS i CREATE (:Memory {id: i, other: 'x'})")
        conn.set(key, "plain \x00 value")

    def now() -> Any:
        body = {"limit": 100, "with_vector": True, "with_payload": True}
        points = requests.post(f"{url}/points/scroll", json=body, timeout=TIMEOUT).json()["result"]["points"]
        return keys_of(operator), points

    try:
        yield now
    finally:
        requests.delete(url, timeout=TIMEOUT)
        with connect(operator.servers.falkordb.address) as conn:
            conn.execute_command("GRAPH.DELETE", graph)
            conn.delete(key)


def assert_tidy(operator: Operator) -> None:
    """No temporary graph, collection, uploaded or partial file, and no open journal.

    Exception: journals of killed runs of which only a snapshot may still appear stay open for an hour.
    """
    assert operator.graphs() == [operator.graph]
    assert operator.collections() == [operator.collection]
    assert (left := operator.call("GET", "/snapshots")) == [], left
    assert list(operator.backups.rglob("*.partial")) == []
    assert [one for one in open_journals(operator.backups) if one.phase != AWAITED] == []


def delete_printed_snapshots(said: str) -> list[str]:
    """Run each printed command that deletes what may be a killed run's snapshot; the snapshots' names."""
    lines = re.findall(r"^  (curl -s -X DELETE .*/snapshots/.*)$", said, re.MULTILINE)
    for line in lines:
        subprocess.run(shlex.split(line), check=True, capture_output=True, timeout=TIMEOUT)
    return [shlex.split(line)[-1].rpartition("/")[2] for line in lines]


def spoil(operator: Operator) -> None:
    """Change both stores, so that a restore has something to do."""
    operator.cypher("MATCH (m:Memory) WHERE id(m) % 3 = 0 DETACH DELETE m")
    operator.cypher("MATCH (m:Memory) WHERE id(m) % 5 = 1 SET m.content = 'overwritten', m.new_key = 1")
    points = operator.call("POST", "/points/scroll", {"limit": 40})["points"]
    operator.call("POST", "/points/delete?wait=true", {"points": [one["id"] for one in points[:20]]})
    operator.call("PUT", "/points/payload?wait=true", {"payload": {"content": "spoilt"}, "points": [points[30]["id"]]})


def site(
    operator: Operator,
    engines: list[Engine] | None = None,
    *,
    both: bool = True,
    while_running: bool = False,
) -> Site:
    """The restore's site, for calls within this process."""
    from lib.dimensions import EmbeddingSpec
    from tests.operator_support import OLD_SIZE, SMALL

    @contextmanager
    def bar(_title: str, _total: int | None, _unit: str) -> Iterator[Callable[[int], None]]:
        yield lambda _step: None

    spec = EmbeddingSpec(operator.servers.openai.base_url, SMALL, OLD_SIZE)
    address = operator.servers.falkordb.address
    operator.backups.mkdir(exist_ok=True)
    return Site(
        graph=GraphSource(address, connect(address), operator.graph),
        collection=CollectionSource(operator.qdrant, operator.collection, spec) if both else None,
        folder=operator.backups,
        targets=targets(operator),
        engines=installed_engines({}) if engines is None else engines,
        api=AutoMemApi("http://127.0.0.1:1"),
        bar=bar,
        say=lambda _text: None,
        notice=lambda _text: None,
        while_running=while_running,
    )


def wanted(operator: Operator, *words: object) -> Inputs:
    """The files that a restore is to put back."""
    from lib.config import load_config

    owner = load_config(operator.environ).deployment()
    return read_inputs([str(word) for word in words], operator.backups, owner)


def targets(operator: Operator) -> list[str]:
    """Temporary names as a run's journal records them."""
    from lib.config import load_config

    return load_config(operator.environ).targets()


def journal_of(operator: Operator, command: str) -> Path | None:
    """The newest journal of a command."""
    return max(operator.backups.glob(f"journal_*_{command}.jsonl"), default=None)


def phases(path: Path | None) -> list[str]:
    """The phases that a journal has announced."""
    if path is None or not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line)["phase"] for line in lines if line.startswith("{") and line.endswith("}")]


def faults(operator: Operator, *rules: dict[str, Any]) -> None:
    """Set fault rules of the Qdrant stand-in; without rules, clear them."""
    url = f"{operator.servers.qdrant_url}/_sandbox/faults"
    requests.delete(url, timeout=TIMEOUT).raise_for_status()
    if rules:
        requests.post(url, json=list(rules), timeout=TIMEOUT).raise_for_status()


def wait_for(check: Callable[[], bool], seconds: float = 300.0, pause: float = 0.002) -> bool:
    """Poll until `check` is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(pause)
    return False


def damaged(data: bytes, kind: str, chance: random.Random) -> bytes:
    """The file with one damage of this kind, somewhere."""
    at = chance.randrange(len(data))
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    size = min(chance.choice([64, 512, 4096]), len(data) - at)
    if kind == "zeros":
        return data[:at] + bytes(size) + data[at + size :]
    if kind == "junk":
        return data[:at] + chance.randbytes(size) + data[at + size :]
    assert kind == "gap"
    return data[:at] + data[at + size :]


def copy_set(operator: Operator, folder: Path) -> Path:
    """A copy of the backup folder; returns it."""
    shutil.copytree(operator.backups, folder)
    return folder
