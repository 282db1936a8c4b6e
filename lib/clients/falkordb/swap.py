"""Replace a graph over a plain connection; what the restore needs of its target is asked first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import redis

from lib.clients.falkordb.connection import GraphAddress, command, connect, list_graphs, place, translated
from lib.clients.falkordb.digest import GraphDigest, graph_digest
from lib.clients.falkordb.rdb import graph_encoding, graph_name, rdb_version
from lib.errors import (
    AccessRefused,
    MigrationError,
    MissingData,
    StoreFailed,
    StoreUnreachable,
    VerificationFailed,
)

GRANT = (
    "grant what a restore needs: ACL SETUSER <user> +restore +rename +multi +exec +dump +graph.delete"
    " +graph.ro_query"
)
_NO_PAYLOAD = b"\xff" * 12  # its version is newer than any server's, so that nothing is ever restored from it
_REPLICA = "READONLY", "read only replica"
_SWEEPERS = ("allkeys-lru", "allkeys-lfu", "allkeys-lrm", "allkeys-random")


@dataclass(frozen=True)
class OtherClient:
    """A connection to the server that is not ours: address, seconds since its last command, and that command."""

    address: str
    idle_seconds: int
    command: str


def require_writable(conn: redis.Redis, graph: str, temporary: str, safety: str) -> None:
    """Raise where this user or this server would refuse a step of the swap: told now rather than half-way.

    Each command is asked for in a form that does nothing: a payload that no server takes, keys that do not exist
    (nobody can have the names `throwaway` and `safety`), an empty transaction. Permissions, memory and replica are
    judged before the arguments (seen on 4.16.3 and 4.22.1).
    Raises AccessRefused with what to grant, StoreFailed for a full memory, a read-only replica, a taken name.
    """
    asked = (
        ("RESTORE", temporary, 0, _NO_PAYLOAD),
        ("RENAME", temporary, safety),
        ("DUMP", safety),
        ("GRAPH.DELETE", safety),
        ("GRAPH.RO_QUERY", temporary, "RETURN 1"),
    )
    lacking = [str(words[0]) for words in asked if not _may(conn, *words)]
    if not _may_transact(conn):
        lacking.append("MULTI/EXEC")
    if lacking:
        raise AccessRefused(
            f"FalkorDB at {place(conn)} does not permit this user {', '.join(lacking)}"
            f" on '{graph}' and the names beside it: nothing was touched",
            next_step=f"{GRANT} ~{graph}*" + (f" ~{{{graph}}}*" if safety.startswith(f"{{{graph}}}") else ""),
        )
    _require_graph_or_nothing(conn, graph)


def _may(conn: redis.Redis, *words: object) -> bool:
    """Whether the user may; raises StoreFailed where the server itself cannot write now."""
    try:
        command(conn, *words)
    except AccessRefused:
        return False
    except StoreFailed as error:
        _raise_unwritable(conn, str(error))
        return "unknown command" not in str(error).lower()
    return True


def _raise_unwritable(conn: redis.Redis, text: str) -> None:
    where = f"FalkorDB at {place(conn)}"
    if any(sign in text for sign in _REPLICA):
        with translated(place(conn)):
            master = conn.info("replication")
        raise StoreFailed(
            f"{where} is a read-only replica",
            next_step="restore onto its master: set FALKORDB_HOST and FALKORDB_PORT to "
            f"{master.get('master_host')}:{master.get('master_port')}",
        )
    if "maxmemory" in text:
        raise StoreFailed(
            f"{where} has no memory left: {text}",
            next_step="raise maxmemory (CONFIG SET maxmemory ...), or free memory on the target",
        )
    if "MISCONF" in text or "NOREPLICAS" in text or "CLUSTERDOWN" in text:
        raise StoreFailed(
            f"{where} takes no writes now: {text}",
            next_step="look at the server's log and its free disk (df -h) first; nothing was touched",
        )


def _may_transact(conn: redis.Redis) -> bool:
    """An empty MULTI and EXEC, on one connection."""
    connection = conn.connection_pool.get_connection()
    try:
        for word in ("MULTI", "EXEC"):
            connection.send_command(word)
            connection.read_response()
    except (redis.exceptions.NoPermissionError, redis.exceptions.ExecAbortError):
        connection.disconnect()  # the server forgets what was begun
        return False
    except redis.exceptions.ResponseError:
        connection.disconnect()
        return False
    finally:
        conn.connection_pool.release(connection)
    return True


def _require_graph_or_nothing(conn: redis.Redis, graph: str) -> None:
    if graph not in list_graphs(conn) and command(conn, "EXISTS", graph):
        raise StoreFailed(
            f"the name '{graph}' is taken on FalkorDB at {place(conn)}: a key that is no graph stands there",
            next_step=f"look at it (TYPE {graph}), and move it away: RENAME {graph} {graph}_old",
        )


def require_memory(conn: redis.Redis, need: int) -> None:
    """Raise StoreFailed where `maxmemory` leaves fewer than `need` bytes.

    Redis itself refuses only what comes when the limit is already passed; and where its policy is to evict, it makes
    room by deleting keys, the live graph among them.
    """
    try:
        with translated(place(conn)):
            memory = conn.info("memory")
    except AccessRefused:
        return  # the rehearsal will tell
    limit, used = int(memory.get("maxmemory", 0)), int(memory["used_memory"])
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    if not limit or used + need <= limit:
        return
    evicts = f"; its policy '{policy}' would delete other keys to make room" if policy in _SWEEPERS else ""
    raise StoreFailed(
        f"FalkorDB at {place(conn)} uses {used >> 20} of {limit >> 20} MiB (maxmemory), and the graph needs another"
        f" {need >> 20} MiB while old and new stand side by side{evicts}",
        next_step=f"CONFIG SET maxmemory {used + need + (64 << 20)}   (put it back afterwards), then run this again",
    )


def memory_used(conn: redis.Redis) -> int:
    """Bytes that a server uses for its data."""
    with translated(place(conn)):
        return int(conn.info("memory")["used_memory"])


def other_clients(conn: redis.Redis) -> list[OtherClient]:
    """Who else is connected: neither these connections nor replicas. Raises MigrationError if it may not be asked."""
    with translated(place(conn)):
        listed, own = conn.client_list(), _own_ids(conn)
    return [
        OtherClient(str(one["addr"]), int(one["idle"]), str(one["cmd"]))
        for one in listed
        if int(one["id"]) not in own and not set(str(one["flags"])) & set("MSP")
    ]


def _own_ids(conn: redis.Redis) -> set[int]:
    """The ids of the two connections that `connect` makes: for questions, and for all else."""
    asked = (conn, getattr(conn, "reads", conn))
    return {int(redis.Redis.execute_command(one, "CLIENT", "ID")) for one in asked}


BULK_BYTES = 512 * 1024 * 1024  # proto-max-bulk-len, as redis has it unless configured


def dump_graph(conn: redis.Redis, name: str) -> bytes:
    """The graph as one DUMP payload, held in memory; the server answers nobody else meanwhile (1 s per 150k nodes).

    Raises MissingData.
    """
    payload = command(conn, "DUMP", name)
    if payload is None:
        raise MissingData(f"graph '{name}' does not exist on FalkorDB at {place(conn)}")
    return bytes(payload)


def dump_apart(address: GraphAddress, name: str) -> bytes:
    """`dump_graph` over a connection of its own, for a thread beside one that reads the same server."""
    with contextlib.closing(connect(address)) as conn:
        return dump_graph(conn, name)


def rename_graph(conn: redis.Redis, old: str, new: str) -> None:
    """Rename a graph on a scratch server, so that DUMP writes another name into the payload."""
    if not command(conn, "RENAMENX", old, new):
        raise StoreFailed(f"graph '{old}' cannot be renamed: '{new}' exists already")


def dump_as(conn: redis.Redis, name: str, other: str) -> bytes:
    """The payload of graph `name` with the name `other` inside; for a scratch server, where renaming does no harm."""
    if other == name:
        return dump_graph(conn, name)
    rename_graph(conn, name, other)
    payload = dump_graph(conn, other)
    rename_graph(conn, other, name)
    return payload


def verify_acceptance(
    conn: redis.Redis,
    payload: bytes,
    temporary: str,
    expected: GraphDigest,
    then: Callable[[], object] = lambda: None,
) -> None:
    """Prove on the target that it takes this graph: restore it under `throwaway`, compare, delete it again.

    The payload must have been dumped under the name `throwaway`. Raises VerificationFailed where the copy differs,
    StoreFailed or AccessRefused where the target does not take it; nothing is left behind. `then` is called once the
    copy is there, before it is read.
    """
    _require_name(payload, temporary)
    _require_free(conn, temporary)
    try:
        _restore(conn, payload, temporary)
        del payload
        then()
        copy = graph_digest(conn, temporary, by_id=expected.by_id)
    except MigrationError:
        with contextlib.suppress(MigrationError):  # what went wrong first is what the operator must read
            drop_graph(conn, temporary)
        raise
    drop_graph(conn, temporary)
    if copy != expected:
        raise VerificationFailed(
            f"the copy that FalkorDB at {place(conn)} made differs from the backup: "
            f"{copy.nodes} nodes and {copy.relationships} relationships, expected {expected.nodes} and "
            f"{expected.relationships}, digest {copy.digest} instead of {expected.digest}"
        )


def require_readable(conn: redis.Redis, payload: bytes, temporary: str) -> None:
    """Raise StoreFailed where the target writes older versions than this payload's, and so cannot read it.

    A graph of one node is made and dumped under `throwaway`, then deleted: the way for a payload whose own name is
    taken, which no rehearsal can restore.
    """
    _require_free(conn, temporary)
    try:
        command(conn, "GRAPH.QUERY", temporary, "CREATE (:Probe)")
        probe = dump_graph(conn, temporary)
    finally:
        drop_graph(conn, temporary)
    for read, written in (
        (rdb_version(probe), rdb_version(payload)),
        (graph_encoding(probe), graph_encoding(payload)),
    ):
        if written > read:
            raise StoreFailed(
                f"FalkorDB at {place(conn)} cannot read this backup: version {written}, it reads up to {read}",
                next_step="upgrade the target's FalkorDB to the version that the backup was taken from",
            )


def swap_in(conn: redis.Redis, name: str, payload: bytes, safety_name: str) -> bool:
    """Put the dumped graph in place as `name`, at once; the graph that stood there is then `safety_name`.

    Returns whether an old graph stands there now. Redis rolls nothing back, so both answers are read, and a
    rename whose RESTORE was refused is undone. Raises StoreFailed, AccessRefused with the old graph in place;
    StoreUnreachable where the answer did not come: then GRAPH.LIST tells which of the two states it is.
    """
    _require_name(payload, name)
    _require_free(conn, safety_name)
    if name not in list_graphs(conn):
        _require_free(conn, name)
        _restore(conn, payload, name)
        return False
    with _told(conn, payload):
        renamed, restored = _exchange(conn, name, payload, safety_name)
    moved = not isinstance(renamed, Exception)  # it fails where the old graph went away just before
    if not isinstance(restored, Exception):
        return moved
    if moved:
        _put_back(conn, name, safety_name)
    with _told(conn, payload):
        raise restored


def swap_back(conn: redis.Redis, name: str, safety_name: str) -> None:
    """Undo `swap_in`: drop the graph that stands as `name`, if one does, and give the old one its name back.

    Raises MissingData where there is no `safety_name`; then nothing was touched.
    """
    graphs = list_graphs(conn)
    if safety_name not in graphs:
        raise MissingData(f"graph '{safety_name}' does not exist on FalkorDB at {place(conn)}")
    if name in graphs:
        drop_graph(conn, name)
    command(conn, "RENAME", safety_name, name)


def drop_graph(conn: redis.Redis, name: str) -> None:
    """GRAPH.DELETE; nothing happens where it does not exist."""
    if name in list_graphs(conn):
        command(conn, "GRAPH.DELETE", name)


def _exchange(conn: redis.Redis, name: str, payload: bytes, safety_name: str) -> tuple[object, object]:
    """The answers to RENAME and RESTORE of one transaction; an error among them is returned, not raised.

    Each word waits for its answer: where MULTI is refused, the commands of a pipeline would run one by one.
    """
    connection = conn.connection_pool.get_connection()
    try:
        for words in (("MULTI",), ("RENAME", name, safety_name), ("RESTORE", name, 0, payload)):
            connection.send_command(*words)
            connection.read_response()
        connection.send_command("EXEC")
        renamed, restored = connection.read_response()
    except redis.exceptions.RedisError:
        connection.disconnect()  # the server forgets what was queued
        raise
    finally:
        conn.connection_pool.release(connection)
    return renamed, restored


def _put_back(conn: redis.Redis, name: str, safety_name: str) -> None:
    try:
        _require_free(conn, name)
        command(conn, "RENAME", safety_name, name)
    except MigrationError as error:
        raise StoreFailed(
            f"the new graph was refused, and the old one stands as '{safety_name}' now: {error}",
            next_step=f"give it its name back: RENAME {safety_name} {name}",
        ) from error


def _restore(conn: redis.Redis, payload: bytes, name: str) -> None:
    with _told(conn, payload):
        conn.execute_command("RESTORE", name, 0, payload)


def _require_name(payload: bytes, name: str) -> None:
    graph_encoding(payload)  # raises for what is no graph at all
    inside = graph_name(payload)
    if inside is not None and inside != name:
        raise StoreFailed(f"this payload was dumped as graph '{inside}' and cannot be restored as '{name}'")


def _require_free(conn: redis.Redis, name: str) -> None:
    if command(conn, "EXISTS", name):
        raise StoreFailed(
            f"a key '{name}' exists already on FalkorDB at {place(conn)}; it is not touched",
            next_step=f"if it is a leftover of an earlier run: GRAPH.DELETE {name}",
        )


@contextlib.contextmanager
def _told(conn: redis.Redis, payload: bytes) -> Iterator[None]:
    """Failures of a RESTORE in the operator's terms."""
    try:
        with translated(place(conn)):
            yield
    except AccessRefused as error:
        raise AccessRefused(str(error), next_step=GRANT) from error
    except StoreUnreachable as error:
        if len(payload) <= BULK_BYTES:
            raise
        raise StoreFailed(
            f"FalkorDB at {place(conn)} does not take a graph of {len(payload) / 2**20:.0f} MiB in one piece",
            next_step="raise its limit: CONFIG SET proto-max-bulk-len 4gb",
        ) from error
    except StoreFailed as error:
        raise StoreFailed(str(error), next_step=_remedy(str(error), payload)) from error


def _remedy(text: str, payload: bytes) -> str:
    if "payload version or checksum" in text:
        return f"the backup needs a redis that reads RDB version {rdb_version(payload)}: upgrade the target's FalkorDB"
    if "Bad data format" in text:
        return f"the backup needs a FalkorDB that reads graph encoding {graph_encoding(payload)}: upgrade the target"
    if "maxmemory" in text:
        return (
            "old and new graph stand side by side for a while: raise maxmemory, or free memory on the target"
        )
    return GRANT if "unknown command" in text.lower() else ""
