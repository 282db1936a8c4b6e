"""The Qdrant stand-in as a child process: started, killed and restarted on the same data directory."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

from tests.sandbox.process import PROJECT_ROOT, ServerProcess, free_port

START_SECONDS = 30.0


class QdrantServer(ServerProcess):
    """A stand-in server on a loopback port, for tests and quickstart only. Its port is the same after a restart.

    Args:
        data: the data directory; the log is next to it.
        snapshot_store: "local", or "s3" to list and send snapshots as a server that stores them in S3.
    """

    def __init__(
        self,
        data: Path,
        version: str = "1.18.3",
        port: int | None = None,
        api_key: str | None = None,
        read_only_key: str | None = None,
        snapshot_store: str = "local",
    ) -> None:
        self.data = data
        self.version = version
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        argv = [sys.executable, "-m", "tests.sandbox.qdrant_server.server", "--version", version]
        super().__init__(
            [*argv, "--port", str(self.port), "--data", str(data)],
            log=data.with_name(f"{data.name}.log"),
            env={
                "QDRANT__SERVICE__API_KEY": api_key or "",
                "QDRANT__SERVICE__READ_ONLY_API_KEY": read_only_key or "",
                "QDRANT__STORAGE__SNAPSHOTS_CONFIG__SNAPSHOTS_STORAGE": snapshot_store,
            },
            cwd=PROJECT_ROOT,
        )

    def start(self) -> QdrantServer:
        """Start it and wait until it answers. Raises ServerStartError: 1.11.3 does not start with a damaged shard."""
        return super().start().wait_ready(self._answers, START_SECONDS)

    def _answers(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{self.url}/readyz", timeout=1) as answer:
            return bool(answer.status == 200)
