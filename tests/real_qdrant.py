"""A real Qdrant server of one test: loopback, free ports, everything below one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import requests

from tests.sandbox.process import ServerProcess, free_port

START_SECONDS = 300.0


def test_server() -> Path | None:
    """The server binary that tests may start themselves (QDRANT_TEST_SERVER)."""
    path = os.environ.get("QDRANT_TEST_SERVER")
    return Path(path) if path else None


test_server.__test__ = False  # type: ignore[attr-defined]  # pytest is not to collect it from modules that import it


class RealQdrant:
    """A server process over `binary`; port and data stay the same over restarts."""

    def __init__(
        self,
        binary: Path,
        folder: Path,
        api_key: str | None = None,
        read_only_key: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process = ServerProcess(
            [binary.resolve()],
            folder / "server.log",
            env={**self._environment(api_key, read_only_key), **(settings or {})},
            cwd=folder,
        )

    def _environment(self, api_key: str | None, read_only_key: str | None) -> dict[str, str]:
        environment = {
            "QDRANT__SERVICE__HOST": "127.0.0.1",
            "QDRANT__SERVICE__HTTP_PORT": str(self.port),
            "QDRANT__SERVICE__GRPC_PORT": str(free_port()),
            "QDRANT__STORAGE__STORAGE_PATH": str(self.folder / "storage"),
            "QDRANT__STORAGE__SNAPSHOTS_PATH": str(self.folder / "snapshots"),
            "QDRANT__STORAGE__TEMP_PATH": str(self.folder / "tmp"),
            "QDRANT__TELEMETRY_DISABLED": "true",
        }
        keys = {"QDRANT__SERVICE__API_KEY": api_key, "QDRANT__SERVICE__READ_ONLY_API_KEY": read_only_key}
        return {**environment, **{name: key for name, key in keys.items() if key}}

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def version(self) -> str:
        """The answer to `GET /`."""
        return str(requests.get(self.url, timeout=10).json()["version"])

    def start(self) -> RealQdrant:
        """Start it and wait until it answers; raises ServerStartError if it does not come up."""
        self._process.start().wait_ready(self._answers, START_SECONDS)
        return self

    def kill(self) -> None:
        self._process.kill()

    def stop(self) -> None:
        self._process.stop()

    def restart(self) -> RealQdrant:
        self.stop()
        return self.start()

    def __enter__(self) -> RealQdrant:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answers(self) -> bool:
        return requests.get(f"{self.url}/readyz", timeout=1).status_code == 200
