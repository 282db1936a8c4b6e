"""A stand-in for AutoMem's service, for tests and rehearsals: `python -m lib.sandbox.automem_server --port N`.

It is not AutoMem (https://github.com/verygoodplugins/automem). It answers /health, /recall and POST /memory as
AutoMem 0.16 did when it was recorded, on real stores: recall embeds the query with the configured model and asks
Qdrant, a new memory goes into FalkorDB at once and into Qdrant a moment later, and at the start the collection is
created where it is missing. Like the version that the migration guide was written for, it refuses to start when the
collection has another size than VECTOR_SIZE; VECTOR_SIZE_AUTODETECT=true adopts it, as later versions do. It has no
classifier, no entity recognition, no consolidation and no hourly repair. Settings come from its environment.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.sandbox.automem_settings import VARIABLES, settings_from
from lib.sandbox.process import ServerProcess, free_port

HOST = "127.0.0.1"
PROJECT_ROOT = Path(__file__).resolve().parents[2]


class AutoMemServer:
    """Handle on the service as a child process; also a context manager.

    Args:
        port: a free one where None.
        env: AutoMem's variables (FALKORDB_HOST, QDRANT_URL, VECTOR_SIZE, EMBEDDING_MODEL, ...).
        log: the child's output; a temporary file where None.
    """

    def __init__(
        self, port: int | None = None, env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        self.port = port or free_port()
        # Empty counts as unset: the parent's own variables do not leak into the service.
        self._env = {**dict.fromkeys(VARIABLES, ""), **(env or {})}
        self._log_dir = None if log else tempfile.TemporaryDirectory(prefix="automem-sandbox-")
        self._log = log or Path(self._log_dir.name if self._log_dir else "", "server.log")
        self._process: ServerProcess | None = None

    @property
    def url(self) -> str:
        """For AUTOMEM_API_URL."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._running().pid

    def start(self) -> AutoMemServer:
        """Start it and wait for its /health. Raises ServerStartError, with the log's end, where it refuses."""
        argv = [sys.executable, "-m", "lib.sandbox.automem_server", "--port", str(self.port)]
        self._process = ServerProcess(argv, self._log, self._env, PROJECT_ROOT)
        self._process.start().wait_ready(lambda: bool(self.health()))
        return self

    def stop(self) -> None:
        """SIGTERM; nothing happens if it does not run."""
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """SIGKILL; nothing happens if it does not run."""
        if self._process is not None:
            self._process.kill()

    def restart(self, env: Mapping[str, str] | None = None) -> AutoMemServer:
        """Stop it and start it again on the same port, with some variables changed."""
        self.stop()
        self._env.update(env or {})
        return self.start()

    def health(self) -> dict[str, Any]:
        """GET /health. Raises OSError where it does not answer."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:  # noqa: S310 - loopback
            return dict(json.load(answer))

    def log_tail(self) -> str:
        """The end of its log."""
        return self._running().log_tail()

    def __enter__(self) -> AutoMemServer:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise RuntimeError("this AutoMem was not started")
        return self._process


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM."""
    import uvicorn
    from starlette.requests import Request

    from lib.sandbox.automem_app import Service, error_answer

    parser = argparse.ArgumentParser(description="AutoMem stand-in; its settings come from the environment")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--host", default=HOST)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s | %(levelname)s | %(message)s")
    service = Service(settings_from(os.environ))
    service.start()
    routes = service.application()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        """The token comes before the route: a wrong one answers 401 even where there is none."""
        if scope["type"] == "http" and not service.authorized(Request(scope)):
            await error_answer(401, "Unauthorized")(scope, receive, send)
        else:
            await routes(scope, receive, send)

    uvicorn.run(application, host=arguments.host, port=arguments.port, log_level="warning", lifespan="off")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
