"""The stand-in as a child process: started, killed and restarted on the same data directory."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path
from types import TracebackType

from tests.sandbox.process import ServerProcess, free_port

PROJECT = Path(__file__).resolve().parents[3]
START_SECONDS = 30.0


class QdrantServer:
    """A stand-in server on a loopback port; the port stays the same over restarts.

    A stand-in, not a server for data that anyone cares about. `start` raises ServerStartError where it does not come
    up (1.11.3 does not start with a dead collection).
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
        argv = [sys.executable, "-m", "tests.sandbox.qdrant_server", "--version", version]
        self._process = ServerProcess(
            [*argv, "--port", str(self.port), "--data", str(data)],
            log=data.with_name(f"{data.name}.log"),
            env={
                "QDRANT__SERVICE__API_KEY": api_key or "",
                "QDRANT__SERVICE__READ_ONLY_API_KEY": read_only_key or "",
                "QDRANT__STORAGE__SNAPSHOTS_CONFIG__SNAPSHOTS_STORAGE": snapshot_store,
            },
            cwd=PROJECT,
        )

    @property
    def pid(self) -> int:
        """The server's process id; ServerStartError when it was never started."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.running

    def start(self) -> QdrantServer:
        """Start it and wait until it answers."""
        self._process.start().wait_ready(self._answers, START_SECONDS)
        return self

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self._process.kill()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL; returns when it is gone."""
        self._process.stop()

    def restart(self) -> QdrantServer:
        """Stop it and start it again on the same data and port."""
        self.stop()
        return self.start()

    def __enter__(self) -> QdrantServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answers(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{self.url}/readyz", timeout=1) as answer:
            return bool(answer.status == 200)
