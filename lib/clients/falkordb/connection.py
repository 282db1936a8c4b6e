"""Connections to FalkorDB, and its refusals in words an operator can act on."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lib.child_process import physical_memory
from lib.clients.falkordb.bounded import bounded_parser
from lib.errors import AccessRefused, MigrationError, MissingData, StoreFailed, StoreUnreachable
from lib.network import container_hint

# A dead peer is noticed after a minute and a half. macOS calls the first one TCP_KEEPALIVE.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
START_HINT = "start it (`docker compose up -d falkordb`) or correct FALKORDB_HOST and FALKORDB_PORT"
# What only asks: a server of the Docker image cuts a query at one second; a large DUMP or RESTORE of somebody else can
# keep the answer waiting for longer.
READ_SECONDS = 120.0
# Of a whole reply: bytes, and seconds from the request on. A DUMP is at most as large as a server can be set to take,
# and is held twice while it arrives.
_PROBE_BYTES, _READ_BYTES, _DUMP_BYTES = 1 << 20, 512 << 20, 5 << 30
_WHOLE_READ_SECONDS, _WHOLE_WRITE_SECONDS = 600.0, 6 * 3600.0
_READS = {"PING", "INFO", "MODULE", "CLIENT", "EXISTS", "PEXPIRETIME", "GRAPH.LIST", "GRAPH.RO_QUERY"}
_REFUSALS = ("NOAUTH", "WRONGPASS", "NOPERM", "DENIED")
_CANNOT_SAVE = "MISCONF"
_MISREAD = (AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
# Refused before it is executed, so that every command may be sent again.
_QUEUE_FULL = "Max pending queries exceeded"
_QUEUE_SECONDS, _FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 0.02, 0.5


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
    """Versions such as "8.2.3" and "4.16.3"; `falkordb` is empty where the module list may not be read.

    `modules` are the names of all loaded modules, FalkorDB's `graph` among them.
    """

    redis: str
    falkordb: str
    modules: frozenset[str] = frozenset()


class _Client(redis.Redis):
    """A client whose reads are bounded in time, and whose other commands may take as long as they need."""

    reads: redis.Redis

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """Send a command, and send it again while the server's queue of queries is full."""
        give_up, pause = time.monotonic() + _QUEUE_SECONDS, _FIRST_PAUSE
        while True:
            try:
                return self._execute_once(*words, **options)
            except redis.exceptions.ResponseError as error:
                if _QUEUE_FULL not in str(error) or time.monotonic() >= give_up:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _execute_once(self, *words: Any, **options: Any) -> Any:
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
    may take hours. A reply that is larger than any raises StoreFailed. Nothing that may have been executed is sent
    twice: redis-py's own retries would repeat writes. Raises StoreUnreachable, AccessRefused.
    """
    options = _options(address, timeout_seconds)
    probe = redis.Redis(**options, socket_timeout=timeout_seconds)
    _bound(probe, _PROBE_BYTES, timeout_seconds)
    with translated(address.display), contextlib.closing(probe):
        _require_answer(probe)
    client = _Client(**options, socket_timeout=None)
    _bound(client, min(_DUMP_BYTES, physical_memory() // 3), _WHOLE_WRITE_SECONDS)
    client.reads = redis.Redis(**options, socket_timeout=read_seconds)
    _bound(client.reads, _READ_BYTES, max(read_seconds, _WHOLE_READ_SECONDS))
    return client


def _bound(client: redis.Redis, limit: int, seconds: float) -> None:
    client.connection_pool.connection_kwargs["parser_class"] = bounded_parser(limit, seconds)


def _require_answer(probe: redis.Redis) -> None:
    """PING. A server that cannot save to its disk refuses even that, though it reads and hands out its data."""
    try:
        probe.ping()
    except redis.exceptions.ResponseError as error:
        if not str(error).startswith(_CANNOT_SAVE):
            raise


def save_trouble(conn: redis.Redis) -> str:
    """Why the server cannot save its data to its disk, for a warning; "" if it can, or does not tell this user."""
    try:
        with translated(place(conn)):
            state = dict(conn.info("persistence"))
    except AccessRefused:
        return ""
    names = {
        "rdb_last_bgsave_status": "its last snapshot (BGSAVE)",
        "aof_last_write_status": "its last AOF write",
    }
    failed = " and ".join(what for name, what in names.items() if state.get(name, "ok") != "ok")
    if not failed:
        return ""
    return (
        f"FalkorDB at {place(conn)} cannot save its data: {failed} failed. It may refuse every write until its disk"
        " has room again; a backup reads it all the same"
    )


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
    """Raise what redis-py raises inside as StoreUnreachable, AccessRefused or StoreFailed, naming `where`.

    So is what raises inside because a reply has another form than FalkorDB's.
    """
    try:
        yield
    except redis.exceptions.RedisError as error:
        raise _as_migration_error(error, where) from error
    except _MISREAD as error:
        raise StoreFailed(
            f"what answers at {where} is not FalkorDB: a reply of it has another form ({type(error).__name__})",
            next_step=START_HINT,
        ) from error


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
    return _failed(error, where, text)


def _failed(error: redis.exceptions.RedisError, where: str, text: str) -> StoreFailed:
    """The error for a refusal that no login and no waiting for the server helps."""
    if isinstance(error, redis.exceptions.MovedError):
        return StoreFailed(
            f"FalkorDB at {where} is a node of a redis cluster, and another node holds this graph:"
            f" {error.host}:{error.port}",
            next_step=f"set FALKORDB_HOST and FALKORDB_PORT to {error.host}:{error.port}",
        )
    if _QUEUE_FULL in text:
        return StoreFailed(
            f"FalkorDB at {where} has refused a query for a minute: {text}",
            next_step="raise its limit (GRAPH.CONFIG SET MAX_QUEUED_QUERIES 100), or run this at a quieter hour",
        )
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
    with translated(place(conn)):
        facts = [dict(zip(module[::2], module[1::2], strict=True)) for module in modules]
        numbers = {fact[b"name"].decode(): int(fact[b"ver"]) for fact in facts}
    falkordb = _dotted(numbers["graph"]) if "graph" in numbers else ""
    return ServerVersions(redis_version, falkordb, frozenset(numbers))


def _dotted(number: int) -> str:
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def list_graphs(conn: redis.Redis) -> list[str]:
    """Names of the graphs, sorted. GRAPH.LIST, not KEYS: `telemetry{g}` are ordinary keys beside them."""
    with translated(place(conn)):
        return sorted(name.decode() for name in command(conn, "GRAPH.LIST"))


def expires_at(conn: redis.Redis, graph: str) -> str:
    """When the server will delete the graph's key (ISO 8601, UTC); "" if never, or if this user may not ask."""
    try:
        with translated(place(conn)):
            milliseconds = int(command(conn, "PEXPIRETIME", graph))
    except (AccessRefused, StoreFailed):
        return ""
    if milliseconds < 0:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds")


def function_libraries(conn: redis.Redis) -> list[str]:
    """Names of the libraries of functions (GRAPH.UDF), sorted; they belong to the server, not to a graph.

    Empty if the version has none, or if this user may not ask.
    """
    try:
        with translated(place(conn)):
            listed = [
                dict(zip(one[::2], one[1::2], strict=True)) for one in command(conn, "GRAPH.UDF", "LIST")
            ]
            return sorted(one[b"library_name"].decode() for one in listed)
    except (AccessRefused, StoreFailed):
        return []


def temporary_name(conn: redis.Redis, graph: str, kind: str, mark: str) -> str:
    """A name for a copy of `graph`, such as `memories__pre_1a2b`.

    In a redis cluster RENAME needs both names in one slot: there the graph's name becomes the hash tag,
    `{memories}__pre_1a2b` (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags).
    Raises StoreFailed for a name that cannot be one.
    """
    name = f"{graph}__{kind}_{mark}"
    if not _in_cluster(conn) or re.match(r"[^{]*\{[^}]+\}", graph):
        return name
    if "}" in graph:
        raise StoreFailed(
            f"FalkorDB at {place(conn)} is a redis cluster, in which no other name lies in the slot of '{graph}'",
            next_step="restore into a graph without a '}' in its name, or into a FalkorDB that is no cluster",
        )
    return f"{{{graph}}}{name.removeprefix(graph)}"


def _in_cluster(conn: redis.Redis) -> bool:
    try:
        with translated(place(conn)):
            return bool(int(conn.info("cluster").get("cluster_enabled", 0)))
    except AccessRefused:
        return False


def require_graph(conn: redis.Redis, name: str, address: GraphAddress) -> None:
    """Raise MissingData, naming the graphs that exist, where `name` is not one of them."""
    graphs = list_graphs(conn)
    if name in graphs:
        return
    command(conn, "EXISTS", name)  # a node of a cluster says which other node holds it
    there = f"its graphs: {', '.join(graphs)}" if graphs else "it holds no graph at all"
    raise MissingData(
        f"graph '{name}' does not exist on FalkorDB at {address.display}; {there}",
        next_step="set FALKORDB_GRAPH to the graph's name, or correct FALKORDB_HOST and FALKORDB_PORT",
    )
