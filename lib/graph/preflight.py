"""What a restore will need of its target, asked for beforehand: no answer to these questions changes anything."""

from __future__ import annotations

from dataclasses import dataclass

import redis

from lib.errors import AccessRefused, StoreFailed
from lib.graph.client import command, list_graphs, place, translated

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


def require_writable(conn: redis.Redis, graph: str, throwaway: str, safety: str) -> None:
    """Raise where this user or this server would refuse a step of the swap: told now rather than half-way.

    Each command is asked for in a form that does nothing: a payload that no server takes, keys that do not exist
    (nobody can have the names `throwaway` and `safety`), an empty transaction. Permissions, memory and replica are
    judged before the arguments (seen on 4.16.3 and 4.22.1).
    Raises AccessRefused with what to grant, StoreFailed for a full memory, a read-only replica, a taken name.
    """
    asked = (
        ("RESTORE", throwaway, 0, _NO_PAYLOAD),
        ("RENAME", throwaway, safety),
        ("DUMP", safety),
        ("GRAPH.DELETE", safety),
        ("GRAPH.RO_QUERY", throwaway, "RETURN 1"),
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
