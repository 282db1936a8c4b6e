"""A real Qdrant cluster of one test: nodes on loopback that know each other (QDRANT_TEST_SERVER)."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import requests

from tests.real_qdrant import RealQdrant
from tests.sandbox.process import ServerProcess, free_port

TIMEOUT_SECONDS = 300.0


class ClusterNode(RealQdrant):
    """One node; `bootstrap` is the address under which the first node is known to the others (None: it is the first)."""

    def __init__(self, binary: Path, folder: Path, bootstrap: str | None = None) -> None:
        super().__init__(binary, folder)
        peer_port = free_port()
        self.peer_uri = f"http://127.0.0.1:{peer_port}"
        environment = {
            **self._environment(None, None),
            "QDRANT__CLUSTER__ENABLED": "true",
            "QDRANT__CLUSTER__P2P__PORT": str(peer_port),
            # Half a second is the default; a killed node is to be noticed soon.
            "QDRANT__CLUSTER__CONSENSUS__TICK_PERIOD_MS": "50",
            # An empty WAL of 32 MB, the default, would be in every snapshot.
            "QDRANT__STORAGE__WAL__WAL_CAPACITY_MB": "1",
        }
        words = ["--uri", self.peer_uri, *(["--bootstrap", bootstrap] if bootstrap else [])]
        self._process = ServerProcess([binary.resolve(), *words], folder / "server.log", env=environment, cwd=folder)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """The `result` of a request to this node."""
        answer = requests.request(method, self.url + path, json=body, timeout=120)
        assert answer.status_code < 300, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()["result"]

    @property
    def peer(self) -> int:
        return int(self.ask("GET", "/cluster")["peer_id"])

    def shards(self, name: str) -> set[int]:
        """The shards of the collection that this node holds."""
        return {one["shard_id"] for one in self.ask("GET", f"/collections/{name}/cluster")["local_shards"]}

    def snapshots(self, name: str) -> list[str]:
        """The collection's snapshot files on this node."""
        return sorted(one["name"] for one in self.ask("GET", f"/collections/{name}/snapshots"))


class Pair:
    """Two nodes of one cluster, whose new collections get a shard a node; a context manager."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self.one = ClusterNode(binary, folder / "one")
        self.two = ClusterNode(binary, folder / "two", self.one.peer_uri)
        self._stack = ExitStack()

    @property
    def nodes(self) -> tuple[ClusterNode, ClusterNode]:
        return self.one, self.two

    @property
    def urls(self) -> str:
        """As QDRANT_NODE_URLS wants them."""
        return ",".join(node.url for node in self.nodes)

    def __enter__(self) -> Pair:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            self.wait_paired()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait_paired(self) -> None:
        wait_until(lambda: all(len(node.ask("GET", "/cluster")["peers"]) == 2 for node in self.nodes))

    def wait_active(self, name: str) -> None:
        """Wait until both nodes report every replica of the collection as active."""
        wait_until(lambda: all(_is_ready(node, name) for node in self.nodes))

    def replicate(self, name: str) -> None:
        """Copy each shard of the collection to the other node, too, and let that be its setting."""
        self.one.ask("PATCH", f"/collections/{name}", {"params": {"replication_factor": 2}})
        for source, target in (self.nodes, self.nodes[::-1]):
            for shard in source.shards(name) - target.shards(name):
                order = {"shard_id": shard, "from_peer_id": source.peer, "to_peer_id": target.peer}
                source.ask("POST", f"/collections/{name}/cluster", {"replicate_shard": order})
            wait_until(lambda source=source, target=target: source.shards(name) <= target.shards(name))
            self.wait_active(name)

    def clean_up(self, prefix: str) -> None:
        """Delete the collections of these names, their snapshot files on both nodes first."""
        names = [one["name"] for one in self.one.ask("GET", "/collections")["collections"]]
        for name in (one for one in names if one.startswith(prefix)):
            for node in self.nodes:
                for file in node.snapshots(name):
                    node.ask("DELETE", f"/collections/{name}/snapshots/{file}")
            self.one.ask("DELETE", f"/collections/{name}")


def _is_ready(node: ClusterNode, name: str) -> bool:
    found = node.ask("GET", f"/collections/{name}/cluster")
    shards = [*found["local_shards"], *found["remote_shards"]]
    return bool(shards) and not found["shard_transfers"] and {one["state"] for one in shards} == {"Active"}


def wait_until(reached: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not reached():
        assert time.monotonic() < deadline, "the cluster did not come so far"
        time.sleep(0.05)
