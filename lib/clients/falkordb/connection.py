"""Connections to FalkorDB, the bounds of its replies, and the errors for what it refuses."""

from __future__ import annotations

import contextlib
import re
import resource
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import backoff
import redis
from redis.backoff import NoBackoff
from redis.connection import DefaultParser
from redis.retry import Retry

from lib.child_process import physical_memory
from lib.errors import AccessRefused, MigrationError, MissingData, StoreFailed, StoreUnreachable, did_you_mean
from lib.network import container_hint, trust_step

# A peer that no longer answers is noticed after a minute and a half. macOS calls the first one TCP_KEEPALIVE.
_TIMES = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
_KEEPALIVE = {getattr(socket, name): value for name, value in _TIMES.items() if hasattr(socket, name)}
_CORRECT = "correct FALKORDB_HOST, FALKORDB_PORT or FALKORDB_TLS"
# Also for a connection that broke, or a server that is silent: then it may be running.
START_HINT = (
    "if it does not run, start it, in AutoMem's folder:\ndocker compose up -d falkordb\n"
    f"or {_CORRECT}, then run the same command again"
)
# A server of the Docker image cuts a query at one second, but a large DUMP or RESTORE of another client can delay it.
READ_SECONDS = 120.0
WRITE_SECONDS = 600.0  # a RESTORE or DUMP of 100 MB takes the server seconds
# Bounds of a whole reply: bytes, and seconds from the request on. A DUMP is held twice while it arrives.
_PROBE_BYTES, _READ_BYTES, _DUMP_BYTES = 1 << 20, 512 << 20, 5 << 30
_WHOLE_READ_SECONDS, _WHOLE_WRITE_SECONDS = 600.0, 6 * 3600.0
_READS = {"PING", "INFO", "MODULE", "CLIENT", "EXISTS", "PEXPIRETIME", "GRAPH.LIST", "GRAPH.RO_QUERY", "GRAPH.UDF"}
# What redis-py and the functions here raise if a reply has another form than FalkorDB's.
_MISREAD = (AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
_TIMED_OUT = "Query timed out"
RAISE_TIME_LIMIT = (
    "GRAPH.CONFIG SET TIMEOUT 60000\nor, if it calls that one deprecated:\n"
    "GRAPH.CONFIG SET TIMEOUT_MAX 60000\nGRAPH.CONFIG SET TIMEOUT_DEFAULT 60000"
)
# This refusal comes before the command is executed, so every command may be sent again.
_QUEUE_FULL = "Max pending queries exceeded"
NO_KEY = "permissions to access"  # of a user who may send a command, but not about this key
_QUEUE_SECONDS = 60.0
# Memory for a reply: nested lists can cost thousands of times their bytes on the wire.
_SPARE_MEMORY, _TIMES_ITS_BYTES, _CHECK_BYTES = 1 << 30, 8, 1 << 20


@dataclass(frozen=True)
class GraphAddress:
    """The address of a FalkorDB, and the login. `unix_socket` takes precedence over host and port."""

    host: str = "localhost"
    port: int = 6379
    username: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    unix_socket: str = ""

    @property
    def display(self) -> str:
        """The address for messages, without a secret."""
        return self.unix_socket or f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ServerVersions:
    """Versions such as "8.2.3" and "4.16.3", and all modules (FalkorDB's is `graph`); "" if MODULE LIST is refused."""

    redis: str
    falkordb: str
    modules: frozenset[str] = frozenset()


class _Client(redis.Redis):
    """Sends reads over a second connection with a timeout; other commands may take as long as they need."""

    reads: redis.Redis

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """Send a command, and send it again while the server's queue of queries is full."""
        is_read = str(words[0]).split()[0].upper() in _READS
        send: Callable[..., Any] = self.reads.execute_command if is_read else super().execute_command
        return _when_queue_is_free(send)(*words, **options)

    def close(self) -> None:
        """Close both connections."""
        self.reads.close()
        super().close()


def _again_while(
    refusal: str, pauses: Callable[..., Any], **limits: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def is_another(error: Exception) -> bool:
        return refusal not in str(error)

    return backoff.on_exception(pauses, redis.exceptions.ResponseError, giveup=is_another, logger=None, **limits)


_when_queue_is_free = _again_while(_QUEUE_FULL, backoff.expo, max_time=_QUEUE_SECONDS, factor=0.02, max_value=0.5)
# A busy server cuts even the shortest query.
_once_more = _again_while(_TIMED_OUT, backoff.constant, max_tries=2, interval=0)


def connect(address: GraphAddress, timeout_seconds: float = 10.0) -> redis.Redis:
    """Connect, and wait at most `timeout_seconds` for the answer to a PING.

    Afterwards a read that gets no byte for READ_SECONDS raises StoreUnreachable, any other command after WRITE_SECONDS.
    A reply that is too large raises StoreFailed. Nothing is sent twice that may have been executed: redis-py's
    own retries would repeat writes. Raises StoreUnreachable, AccessRefused.
    """
    options: dict[str, Any] = {
        "host": address.host,
        "port": address.port,
        "ssl": address.tls and not address.unix_socket,
        "unix_socket_path": address.unix_socket or None,
        "username": address.username or None,
        "password": address.password or None,
        "socket_connect_timeout": timeout_seconds,
        "socket_keepalive": True,
        "socket_keepalive_options": _KEEPALIVE,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    probe = redis.Redis(**options, socket_timeout=timeout_seconds)
    _bound(probe, _PROBE_BYTES, timeout_seconds)
    with translated(probe), contextlib.closing(probe):
        try:
            probe.ping()
        except redis.exceptions.ResponseError as error:
            # A server that cannot save to its disk refuses even a PING, but it can still be read.
            if not str(error).startswith("MISCONF"):
                raise
    client = _Client(**options, socket_timeout=WRITE_SECONDS)
    _bound(client, min(_DUMP_BYTES, physical_memory() // 3), _WHOLE_WRITE_SECONDS)
    client.reads = redis.Redis(**options, socket_timeout=READ_SECONDS)
    _bound(client.reads, _READ_BYTES, _WHOLE_READ_SECONDS)
    return client


def save_failure(conn: redis.Redis) -> str:
    """Return why the server cannot save its data to its disk, for a warning; "" if it can, or if INFO is refused."""
    state = info(conn, "persistence")
    checked = {"rdb_last_bgsave_status": "its last snapshot (BGSAVE)", "aof_last_write_status": "its last AOF write"}
    failed = " and ".join(what for name, what in checked.items() if state.get(name, "ok") != "ok")
    if not failed:
        return ""
    return (
        f"FalkorDB at {address_of(conn)} cannot save its data: {failed} failed. It may refuse every write until its"
        " disk has room again; a backup can still read it"
    )


def info(conn: redis.Redis, section: str) -> dict[str, Any]:
    """Return a section of INFO; empty if this user may not read it."""
    with contextlib.suppress(AccessRefused), translated(conn):
        return dict(conn.info(section))
    return {}


@contextlib.contextmanager
def translated(conn: redis.Redis) -> Iterator[None]:
    """Raise redis-py's errors, and those of a misread reply, as StoreUnreachable, AccessRefused or StoreFailed."""
    try:
        yield
    except redis.exceptions.RedisError as error:
        raise _as_migration_error(error, address_of(conn)) from error
    except _MISREAD as error:
        text = f"what answers at {address_of(conn)} is not FalkorDB: a reply has another form ({type(error).__name__})"
        raise StoreFailed(text, next_step=_CORRECT) from error


def _as_migration_error(error: redis.exceptions.RedisError, where: str) -> MigrationError:
    text = " ".join(str(error).split())
    if isinstance(error, redis.exceptions.BusyLoadingError):
        step = "wait until it is up, then run the same command again"
        return StoreUnreachable(f"FalkorDB at {where} is still loading its data", next_step=step)
    refusals = (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError)
    if isinstance(error, refusals) or text.startswith(("NOAUTH", "WRONGPASS", "NOPERM", "DENIED")):
        return access_refused(where, text)
    if untrusted := re.search(r"CERTIFICATE_VERIFY_FAILED\] (.+?)\.? \(_ssl", text):
        how = ", name a file with that one and the public ones (by which the provider is verified)"
        step = trust_step("SSL_CERT_FILE", how=how)
        return StoreUnreachable(f"FalkorDB at {where}: TLS failed: {untrusted[1]}", next_step=step)
    if isinstance(error, redis.exceptions.ConnectionError | redis.exceptions.TimeoutError):
        unknown = re.search(r"Name or service not known|name resolution|nodename nor servname|No address", text)
        hint = container_hint(where.rpartition(":")[0], "FALKORDB_HOST=localhost") if unknown else ""
        reason = re.sub(r"^Error -?\d+ connecting to \S+\. (.)", lambda found: found[1].lower(), text).rstrip(".")
        reason = "its name is not known" if unknown else reason
        return StoreUnreachable(f"FalkorDB at {where} does not answer: {reason}", next_step=hint + START_HINT)
    return _store_failed(error, where, text)


def _store_failed(error: redis.exceptions.RedisError, where: str, text: str) -> StoreFailed:
    if isinstance(error, redis.exceptions.MovedError):
        return StoreFailed(
            f"FalkorDB at {where} is a node of a redis cluster, and another node holds this graph:"
            f" {error.host}:{error.port}",
            next_step=f"set FALKORDB_HOST and FALKORDB_PORT to {error.host}:{error.port}",
        )
    if text.startswith("BUSY "):
        step = "wait until the script ends, or end it (in redis-cli: SCRIPT KILL), then run the same command again"
        return StoreFailed(f"FalkorDB at {where} is busy with a script: {text}", next_step=step)
    if _QUEUE_FULL in text:
        return StoreFailed(
            f"FalkorDB at {where} has refused a query for a minute: {text}",
            next_step="run this at a quieter hour, or raise the server's limit, in redis-cli:\n"
            "GRAPH.CONFIG SET MAX_QUEUED_QUERIES 100",
        )
    if isinstance(error, redis.exceptions.InvalidResponse) or "unknown command 'GRAPH." in text:
        why = "it does not speak the protocol of redis" if text.startswith("Protocol error") else text
        why = "it is a redis without the module" if "unknown command" in text else why
        return StoreFailed(f"what answers at {where} is not FalkorDB: {why}", next_step=_CORRECT)
    raise_limit = f"raise the server's time limit, in redis-cli:\n{RAISE_TIME_LIMIT}"
    step = f"{raise_limit}\nthen run the same command again" if _TIMED_OUT in text else ""
    if "mem consumption exceeded" in text:
        step = "lift the server's limit of a query's memory, in redis-cli:\nGRAPH.CONFIG SET QUERY_MEM_CAPACITY 0\n"
        step += "then run the same command again"
    return StoreFailed(f"FalkorDB at {where} answered with an error: {text}", next_step=step)


def access_refused(where: str, text: str) -> AccessRefused:
    """Make the error for a refused login or a missing permission; `text` is the server's own."""
    if "no permissions" in text.lower() or text.startswith("NOPERM"):
        step = "grant what is named (in redis-cli: ACL SETUSER <user> +<command>), or use a user who has it"
        if NO_KEY in text:
            step = "permit the graph's name (in redis-cli: ACL SETUSER <user> ~<graph>*), or use a user who may read it"
        return AccessRefused(f"FalkorDB at {where} does not permit this user to do that: {text}", next_step=step)
    step = "export FALKORDB_PASSWORD=...\nand FALKORDB_USERNAME, if the user is not `default`"
    return AccessRefused(f"FalkorDB at {where} refused the login: {text.rstrip('.')}", next_step=step)


def redis_cli(conn: redis.Redis, *words: str, user: str = "") -> str:
    """Return the shell command that sends `words` to the server of `conn`, as `user` (default: that of `conn`)."""
    settings = conn.connection_pool.connection_kwargs
    place = ["-s", settings["path"]] if "path" in settings else ["-h", settings["host"], "-p", str(settings["port"])]
    user = user or settings.get("username") or "default"
    login = ["--user", user, "--askpass"] if settings.get("password") else []
    tls = ["--tls"] if issubclass(conn.connection_pool.connection_class, redis.SSLConnection) else []
    return shlex.join(["redis-cli", *place, *tls, *login, *words])


def address_of(conn: redis.Redis) -> str:
    """Return the address of `conn` for messages, without a secret."""
    settings = conn.connection_pool.connection_kwargs
    return str(settings.get("path") or f"{settings.get('host')}:{settings.get('port')}")


def command(conn: redis.Redis, *words: Any) -> Any:
    """Return one command's raw reply. Raises StoreUnreachable, AccessRefused, StoreFailed."""
    with translated(conn):
        return conn.execute_command(*words)


def read_commands(conn: redis.Redis, requests: Sequence[Sequence[Any]]) -> list[Any]:
    """Send several commands that only read at once; return their raw replies. Raises like `command`.

    If the server cuts a query by its time limit, they are sent once more: a busy server cuts the shortest one.
    """

    @_once_more
    def send() -> list[Any]:
        pipeline = getattr(conn, "reads", conn).pipeline(transaction=False)
        for words in requests:
            pipeline.execute_command(*words)
        replies: list[Any] = pipeline.execute(raise_on_error=False)
        for one in replies:
            if isinstance(one, Exception):
                raise one
        return replies

    with translated(conn):
        answers: list[Any] = _when_queue_is_free(send)()
        return answers


def server_versions(conn: redis.Redis) -> ServerVersions:
    """Return the versions of redis and of the graph module (41603 in MODULE LIST is "4.16.3")."""
    with translated(conn):
        redis_version = str(conn.info("server")["redis_version"])
        try:
            modules = {one[b"name"].decode(): int(one[b"ver"]) for one in conn.module_list()}
        except redis.exceptions.NoPermissionError:
            return ServerVersions(redis_version, "")
    number = modules.get("graph", 0)
    falkordb = f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else ""
    return ServerVersions(redis_version, falkordb, frozenset(modules))


def list_graphs(conn: redis.Redis) -> list[str]:
    """Return the names of the graphs, sorted. KEYS would also list ordinary keys, such as `telemetry{g}`."""
    with translated(conn):
        return sorted(name_text(name) for name in conn.execute_command("GRAPH.LIST"))


def name_text(name: bytes) -> str:
    """Return a name of a graph, label, type, property or library as text. Such names need not be UTF-8."""
    return name.decode("utf-8", "backslashreplace")


def expires_at(conn: redis.Redis, graph: str) -> str:
    """Return when the server will delete the graph's key (ISO 8601, UTC); "" if never, or if PEXPIRETIME is refused."""
    with contextlib.suppress(AccessRefused, StoreFailed), translated(conn):
        milliseconds = int(conn.execute_command("PEXPIRETIME", graph))
        if milliseconds >= 0:
            return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds")
    return ""


def function_libraries(conn: redis.Redis) -> list[str]:
    """Return the server's function libraries (GRAPH.UDF), sorted; empty if it has none, or refuses the command."""
    with contextlib.suppress(AccessRefused, StoreFailed), translated(conn):
        listed = conn.execute_command("GRAPH.UDF", "LIST")
        return sorted(name_text(dict(zip(one[::2], one[1::2], strict=True))[b"library_name"]) for one in listed)
    return []


def temporary_name(conn: redis.Redis, graph: str, kind: str, mark: str) -> str:
    """Return a name for a copy of `graph`, such as `memories__pre_1a2b`.

    In a redis cluster RENAME needs both names in one slot: there the graph's name becomes the hash tag,
    `{memories}__pre_1a2b` (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags).
    Raises StoreFailed if the graph's name allows no such name.
    """
    name = f"{graph}__{kind}_{mark}"
    if not _in_cluster(conn) or re.match(r"[^{]*\{[^}]+\}", graph):
        return name
    if "}" in graph:
        raise StoreFailed(
            f"FalkorDB at {address_of(conn)} is a redis cluster, and no other name can be in the slot of '{graph}'",
            next_step="restore into a graph without a '}' in its name, or into a FalkorDB that is not a cluster",
        )
    return f"{{{graph}}}{name.removeprefix(graph)}"


def _in_cluster(conn: redis.Redis) -> bool:
    return str(info(conn, "cluster").get("cluster_enabled")) == "1"


def require_graph(conn: redis.Redis, name: str) -> None:
    """Raise MissingData, with the names of the graphs that exist, if `name` is not one of them."""
    graphs = list_graphs(conn)
    if name in graphs:
        return
    command(conn, "EXISTS", name)  # the error of a cluster's node names the node that holds it
    existing = f"its graphs: {', '.join(graphs)}" if graphs else "it holds no graph at all"
    where = f"on FalkorDB at {address_of(conn)}{did_you_mean(name, graphs)}"
    step = f"set FALKORDB_GRAPH to the graph's name, or {_CORRECT}\nif the graph is lost: docs/worst-day.md"
    raise MissingData(f"graph '{name}' does not exist {where}; {existing}", next_step=step)


class _BoundedSocket:
    """A socket that takes at most `limit` bytes after each request, all of them within `seconds`."""

    _received_by_all = 0  # the process's memory also holds what other threads receive

    def __init__(self, sock: socket.socket, limit: int, seconds: float) -> None:
        self._sock, self._limit, self._seconds = sock, limit, seconds
        self._timeout = sock.gettimeout()
        self._expect_reply()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def settimeout(self, seconds: float | None) -> None:
        self._timeout = seconds
        self._sock.settimeout(seconds)

    def sendall(self, data: bytes) -> None:
        """Send a request; what is received next is its reply."""
        self._expect_reply()
        for at in range(0, len(data), _CHECK_BYTES):  # a server that stops reads no further piece
            self._limit_wait()
            self._sock.sendall(memoryview(data)[at : at + _CHECK_BYTES])
        self._expect_reply()

    def recv(self, size: int, flags: int = 0) -> bytes:
        if flags:  # MSG_PEEK consumes nothing
            return self._sock.recv(size, flags)
        self._limit_wait()
        data = self._sock.recv(size)
        self._count(len(data))
        return data

    def recv_into(self, buffer: bytearray) -> int:
        self._limit_wait()
        size = self._sock.recv_into(buffer)
        self._count(size)
        return size

    def _expect_reply(self) -> None:
        self._received = self._checked = 0
        self._deadline = time.monotonic() + self._seconds
        self._memory, self._received_before = _peak_memory(), _BoundedSocket._received_by_all

    def _limit_wait(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self._timeout != 0:
            self._sock.settimeout(left if self._timeout is None else min(left, self._timeout))

    def _count(self, size: int) -> None:
        """Raise InvalidResponse if a reply is larger, or takes more memory, than a reply may."""
        self._received += size
        _BoundedSocket._received_by_all += size
        _require(self._received, self._limit, "bytes")
        if self._received - self._checked >= _CHECK_BYTES:
            self._checked = self._received
            most = _SPARE_MEMORY + _TIMES_ITS_BYTES * (_BoundedSocket._received_by_all - self._received_before)
            _require(_peak_memory() - self._memory, most, "bytes of memory")


def _require(found: int, most: int, what: str) -> None:
    if found > most:
        raise redis.exceptions.InvalidResponse(f"a reply of {found:,} {what}, more than is accepted ({most:,})")


def _peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bound(client: redis.Redis, limit: int, seconds: float) -> None:
    """Accept replies of at most `limit` bytes that are complete within `seconds`, on each new connection."""

    class BoundedParser(DefaultParser):  # type: ignore[misc,valid-type]  # redis-py has no types here
        def on_connect(self, connection: Any, **options: Any) -> None:
            # Each parser of redis-py takes its socket from the connection.
            connection._sock = _BoundedSocket(connection._sock, limit, seconds)  # noqa: SLF001
            super().on_connect(connection, **options)

    client.connection_pool.connection_kwargs["parser_class"] = BoundedParser
