"""Connections to FalkorDB, and its refusals in words an operator can act on."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lib.addresses import container_hint
from lib.errors import AccessRefused, MigrationError, MissingData, StoreFailed, StoreUnreachable

# A dead peer is noticed after a minute and a half. macOS calls the first one TCP_KEEPALIVE.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
START_HINT = "start it (`docker compose up -d falkordb`) or correct FALKORDB_HOST and FALKORDB_PORT"
# What only asks: a server of the Docker image cuts a query at one second; a large DUMP or RESTORE of somebody else can
# keep the answer waiting for longer.
READ_SECONDS = 120.0
_READS = {"PING", "INFO", "MODULE", "CLIENT", "EXISTS", "GRAPH.LIST", "GRAPH.RO_QUERY"}
_REFUSALS = ("NOAUTH", "WRONGPASS", "NOPERM", "DENIED")


@dataclass(frozen=True)
class GraphAddress:
    """Where a FalkorDB listens, and who asks. `unix_socket` beats host and port."""

    host: str = "localhost"
    port: int = 6379
    username: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    unix_socket: str = ""

    @property
    def display(self) -> str:
        """The address for messages; holds no secret."""
        return self.unix_socket or f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ServerVersions:
    """Versions such as "8.2.3" and "4.16.3"; `falkordb` is empty where the module list may not be read."""

    redis: str
    falkordb: str


class _Client(redis.Redis):
    """A client whose reads are bounded in time, and whose other commands may take as long as they need."""

    reads: redis.Redis

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """Questions go over a connection of their own, which a server that fell silent cannot hold for ever."""
        if str(words[0]).split()[0].upper() in _READS:
            return self.reads.execute_command(*words, **options)
        return super().execute_command(*words, **options)  # type: ignore[no-untyped-call]  # redis-py has no types here

    def close(self) -> None:
        """Close both connections."""
        self.reads.close()
        super().close()


def connect(
    address: GraphAddress, timeout_seconds: float = 10.0, read_seconds: float = READ_SECONDS
) -> redis.Redis:
    """A connection that has answered a PING within `timeout_seconds`.

    Afterwards a question may take `read_seconds`, then it raises StoreUnreachable; DUMP, RESTORE and all that writes
    may take as long as it needs. Nothing is ever sent twice: redis-py's own retries would repeat writes. Raises
    StoreUnreachable, AccessRefused.
    """
    options = _options(address, timeout_seconds)
    probe = redis.Redis(**options, socket_timeout=timeout_seconds)
    with translated(address.display), contextlib.closing(probe):
        probe.ping()
    client = _Client(**options, socket_timeout=None)
    client.reads = redis.Redis(**options, socket_timeout=read_seconds)
    return client


def _options(address: GraphAddress, connect_seconds: float) -> dict[str, Any]:
    where: dict[str, Any] = {"host": address.host, "port": address.port, "ssl": address.tls}
    if address.unix_socket:
        where = {"unix_socket_path": address.unix_socket}
    else:
        where |= {"socket_keepalive": True, "socket_keepalive_options": _keepalive_options()}
    return where | {
        "username": address.username or None,
        "password": address.password or None,
        "socket_connect_timeout": connect_seconds,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }


def _keepalive_options() -> dict[int, int]:
    return {getattr(socket, name): value for name, value in _KEEPALIVE.items() if hasattr(socket, name)}


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Raise what redis-py raises inside as StoreUnreachable, AccessRefused or StoreFailed, naming `where`."""
    try:
        yield
    except redis.exceptions.RedisError as error:
        raise _as_migration_error(error, where) from error


def _as_migration_error(error: redis.exceptions.RedisError, where: str) -> MigrationError:
    text = " ".join(str(error).split())
    if isinstance(error, redis.exceptions.BusyLoadingError):
        return StoreUnreachable(
            f"FalkorDB at {where} is still loading its data",
            next_step="wait until it is up, then run this again",
        )
    if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.NoPermissionError):
        return access_refused(where, text)
    if isinstance(error, redis.exceptions.ConnectionError | redis.exceptions.TimeoutError):
        unknown = re.search(
            r"Name or service not known|name resolution|nodename nor servname|No address", text
        )
        hint = container_hint(where.rpartition(":")[0], "FALKORDB_HOST=localhost") if unknown else ""
        return StoreUnreachable(f"FalkorDB at {where} does not answer: {text}", next_step=hint + START_HINT)
    if text.startswith(_REFUSALS):
        return access_refused(where, text)
    if isinstance(error, redis.exceptions.InvalidResponse) or "unknown command 'GRAPH." in text:
        return StoreFailed(f"what answers at {where} is not FalkorDB: {text}", next_step=START_HINT)
    return StoreFailed(f"FalkorDB at {where} answered with an error: {text}")


def access_refused(where: str, text: str) -> AccessRefused:
    """The error for a refused password (`text` as the server gave it) or a missing permission."""
    if "no permissions" in text.lower() or text.startswith("NOPERM"):
        return AccessRefused(
            f"FalkorDB at {where} does not permit this user to do that: {text}",
            next_step="grant what is named (ACL SETUSER <user> +<command>), or use a user who has it",
        )
    return AccessRefused(
        f"FalkorDB at {where} refused the login: {text}",
        next_step="set FALKORDB_PASSWORD (and FALKORDB_USERNAME, where it is not `default`) to the server's own",
    )


def place(conn: redis.Redis) -> str:
    """The address of `conn` for messages; holds no secret."""
    where = conn.connection_pool.connection_kwargs
    return str(where.get("path") or f"{where.get('host')}:{where.get('port')}")


def command(conn: redis.Redis, *words: Any) -> Any:
    """One command's raw answer; failures as StoreUnreachable, AccessRefused or StoreFailed."""
    with translated(place(conn)):
        return conn.execute_command(*words)


def server_versions(conn: redis.Redis) -> ServerVersions:
    """Versions of redis and of the graph module (41603 in MODULE LIST is "4.16.3")."""
    with translated(place(conn)):
        redis_version = str(conn.info("server")["redis_version"])
    try:
        modules = command(conn, "MODULE", "LIST")
    except AccessRefused:
        return ServerVersions(redis_version, "")
    facts = [dict(zip(module[::2], module[1::2], strict=True)) for module in modules]
    numbers = [int(fact[b"ver"]) for fact in facts if fact[b"name"] == b"graph"]
    return ServerVersions(redis_version, _dotted(numbers[0]) if numbers else "")


def _dotted(number: int) -> str:
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def list_graphs(conn: redis.Redis) -> list[str]:
    """Names of the graphs, sorted. GRAPH.LIST, not KEYS: `telemetry{g}` are ordinary keys beside them."""
    return sorted(name.decode() for name in command(conn, "GRAPH.LIST"))


def require_graph(conn: redis.Redis, name: str, address: GraphAddress) -> None:
    """Raise MissingData, naming the graphs that exist, where `name` is not one of them."""
    graphs = list_graphs(conn)
    if name in graphs:
        return
    there = f"its graphs: {', '.join(graphs)}" if graphs else "it holds no graph at all"
    raise MissingData(
        f"graph '{name}' does not exist on FalkorDB at {address.display}; {there}",
        next_step="set FALKORDB_GRAPH to the graph's name, or correct FALKORDB_HOST and FALKORDB_PORT",
    )
