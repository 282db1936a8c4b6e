"""Replace a graph over a plain connection, and check first that the target allows it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import redis

from lib.clients.falkordb import connection
from lib.clients.falkordb.connection import address_of, command, list_graphs, redis_cli, translated
from lib.clients.falkordb.digest import GraphDigest, graph_digest
from lib.clients.falkordb.rdb import graph_encoding, graph_name, rdb_version
from lib.errors import AccessRefused, MigrationError, MissingData, StoreFailed, StoreUnreachable, VerificationFailed

_COMMANDS = ("restore", "rename", "multi", "exec", "dump", "graph.delete", "graph.ro_query")
_NO_PAYLOAD = b"\xff" * 12  # its version is newer than any server's, so nothing is ever restored from it
_EVICTS_ANY_KEY = ("allkeys-lru", "allkeys-lfu", "allkeys-lrm", "allkeys-random")
# What changes no graph.
_READING = {"graph.config", "graph.list", "graph.ro_query", "graph.udf", "multi", "exec", "auth", "client", "config"}
_READING |= {"command", "dbsize", "dump", "exists", "get", "hello", "info", "keys", "memory", "module", "pexpiretime"}
_READING |= {"ping", "psync", "replconf", "scan", "select", "slowlog", "ttl", "type"}
# What a restore sends that changes graphs: its trial restore, which it deletes, and the swap.
_OWN_CALLS = Counter({"restore": 2, "graph.delete": 1, "rename": 1})
WriteCalls = tuple[object, Counter[str]]  # what identifies the counting server, and the calls by command
BULK_BYTES = 512 * 1024 * 1024  # redis's default of proto-max-bulk-len


def require_writable(conn: redis.Redis, graph: str, temporary: str, safety: str) -> None:
    """Raise if this user or this server would refuse a step of the swap.

    Each command is sent in a form that changes nothing: a payload that no server accepts, keys that cannot exist, an
    empty transaction. The server checks permissions, memory and its role first (seen on 4.16.3 and 4.22.1). Raises
    AccessRefused with what to grant, StoreFailed for a full memory, a read-only replica, a taken name.
    """
    commands = (
        ("RESTORE", temporary, 0, _NO_PAYLOAD),
        ("RENAME", temporary, safety),
        ("DUMP", safety),
        ("GRAPH.DELETE", safety),
        ("GRAPH.RO_QUERY", temporary, "RETURN 1"),
    )
    refusals = {str(words[0]): _refusal(conn, *words) for words in commands}
    missing = [name for name, text in refusals.items() if text]
    try:
        with translated(conn):
            _transaction(conn)
    except (AccessRefused, StoreFailed):
        missing.append("MULTI/EXEC")
    if missing:
        keys = [f"~{graph}*", *([f"~{{{graph}}}*"] if safety.startswith(f"{{{graph}}}") else [])]
        # To a user who may access all keys (`~*`) the server adds no pattern, and refuses the whole command.
        lacks_keys = any(connection.NO_KEY in text for text in refusals.values())
        what = f"{', '.join(missing)} on '{graph}' and on names that begin with it: nothing was changed"
        step = _grant(conn, *(keys if lacks_keys else []))
        raise AccessRefused(f"FalkorDB at {address_of(conn)} does not permit this user {what}", next_step=step)
    if graph not in list_graphs(conn) and command(conn, "EXISTS", graph):
        look, move = redis_cli(conn, "TYPE", graph), redis_cli(conn, "RENAME", graph, f"{graph}_old")
        text = f"the name '{graph}' is taken on FalkorDB at {address_of(conn)} by a key that is not a graph"
        raise StoreFailed(text, next_step=f"look at it, then move it away:\n{look}\n{move}")


def _refusal(conn: redis.Redis, *words: object) -> str:
    """Return why the user may not send this command, or "". Raises StoreFailed if the server cannot write now."""
    try:
        command(conn, *words)
    except AccessRefused as error:
        return str(error)
    except StoreFailed as error:
        text, where = str(error), f"FalkorDB at {address_of(conn)}"
    else:
        return ""
    if "READONLY" in text or "read only replica" in text:
        with translated(conn):
            master = conn.info("replication")
        export = f"export FALKORDB_HOST={master.get('master_host')} FALKORDB_PORT={master.get('master_port')}"
        raise StoreFailed(f"{where} is a read-only replica", next_step=f"restore onto its master:\n{export}")
    if "maxmemory" in text:
        step = f"free memory there, or raise its limit, which is now:\n{redis_cli(conn, 'CONFIG', 'GET', 'maxmemory')}"
        raise StoreFailed(f"{where} has no memory left: {text}", next_step=step)
    if "MISCONF" in text or "NOREPLICAS" in text or "CLUSTERDOWN" in text:
        step = "nothing was touched. On the server, look at its log and its free disk space:\ndf -h"
        raise StoreFailed(f"{where} accepts no writes now: {text}", next_step=step)
    return text if "unknown command" in text.lower() else ""


def require_memory(conn: redis.Redis, need: int) -> None:
    """Raise StoreFailed if `maxmemory` leaves fewer than `need` bytes.

    Redis refuses a write only when the limit is already passed. If its policy is to evict, it makes room by deleting
    keys, and the live graph may be one of them.
    """
    memory = connection.info(conn, "memory")  # if it is refused and memory is short, the trial restore fails
    limit, used = int(memory.get("maxmemory", 0)), int(memory.get("used_memory", 0))
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    if not limit or used + need <= limit:
        return
    evicts = f"; its policy '{policy}' would delete other keys to make room" if policy in _EVICTS_ANY_KEY else ""
    uses = f"FalkorDB at {address_of(conn)} uses {used >> 20} of {limit >> 20} MiB (maxmemory)"
    needs = f"the graph needs another {need >> 20} MiB while the old and the new one both exist{evicts}"
    raised = redis_cli(conn, "CONFIG", "SET", "maxmemory", str(used + need + (64 << 20)))
    raise StoreFailed(f"{uses}, and {needs}", next_step=f"raise it, and set it back after the restore:\n{raised}")


def memory_used(conn: redis.Redis) -> int:
    """Return the bytes of memory that a server uses."""
    with translated(conn):
        return int(conn.info("memory")["used_memory"])


def other_clients(conn: redis.Redis) -> list[dict[str, str]]:
    """Return the rows of CLIENT LIST of other clients, without replicas. Raises MigrationError if it is refused."""
    own_connections = (conn, getattr(conn, "reads", conn))  # `connect` makes two
    with translated(conn):
        own = {int(redis.Redis.execute_command(one, "CLIENT", "ID")) for one in own_connections}
        return [one for one in conn.client_list() if int(one["id"]) not in own and not set(one["flags"]) & set("MSP")]


def write_calls(conn: redis.Redis) -> WriteCalls | None:
    """Count the calls, by command, that may have changed a graph since the server's start. For `only_restored`.

    Returns None if INFO is refused, or if a command is being executed, which may write and is not counted yet.
    AutoMem sends GRAPH.QUERY for its reads, too. After a restart, or CONFIG RESETSTAT, the server counts from 0 again:
    what identifies both is returned as well.
    """
    try:
        with translated(conn):
            stats = conn.info("commandstats", "server", "clients")
    except MigrationError:
        return None
    if stats.get("blocked_clients") != 0:
        return None
    counted = Counter[str]()
    for name in stats:
        kind = name.removeprefix("cmdstat_").partition("|")[0].lower()
        if "cmdstat_" in name and kind not in _READING:
            counted[kind] += stats[name]["calls"]
    return (stats.get("run_id"), stats.get("cmdstat_config|resetstat")), counted


def only_restored(before: WriteCalls | None, after: WriteCalls | None) -> bool:
    """Whether nobody but one restore, which sent `_OWN_CALLS`, can have changed a graph between two `write_calls`.

    A server that counts has counted a RESTORE before: `require_writable` sends one.
    """
    if before is None or after is None or "restore" not in before[1]:
        return False
    return after == (before[0], before[1] + _OWN_CALLS)


def dump_graph(conn: redis.Redis, name: str) -> bytes:
    """Return the graph as one DUMP payload. No other client is served meanwhile (1 s per 150k nodes).

    Raises MissingData.
    """
    payload = command(conn, "DUMP", name)
    if payload is None:
        raise MissingData(f"graph '{name}' does not exist on FalkorDB at {address_of(conn)}")
    return bytes(payload)


def dump_separately(address: connection.GraphAddress, name: str) -> bytes:
    """Return `dump_graph` over a new connection, for a thread that runs while another one reads the same server."""
    with contextlib.closing(connection.connect(address)) as conn:
        return dump_graph(conn, name)


def rename_graph(conn: redis.Redis, old: str, new: str) -> None:
    """Rename a graph on a scratch server, so that DUMP writes another name into the payload."""
    if not command(conn, "RENAMENX", old, new):
        raise StoreFailed(f"graph '{old}' cannot be renamed: '{new}' exists already")


def dump_as(conn: redis.Redis, name: str, other: str) -> bytes:
    """Return the payload of graph `name` with the name `other` inside. For a scratch server, which it may rename on."""
    rename_graph(conn, name, other)
    payload = dump_graph(conn, other)
    rename_graph(conn, other, name)
    return payload


def verify_acceptance(
    conn: redis.Redis, payload: bytes, temporary: str, expected: GraphDigest, then: Callable[[], object] = lambda: None
) -> None:
    """Verify on the target that it accepts this graph: restore it as `temporary`, compare, delete it again.

    The payload must have been dumped under the name `temporary`. `then` is called once the copy exists. Raises
    VerificationFailed if the copy differs, StoreFailed or AccessRefused if the target does not accept it.
    """
    _require_name(payload, temporary)
    _require_free(conn, temporary)
    try:
        _restore(conn, payload, temporary)
        del payload
        then()
        copy = graph_digest(conn, temporary)
    except MigrationError:
        with contextlib.suppress(MigrationError):  # the operator must see the first error
            drop_graph(conn, temporary)
        raise
    drop_graph(conn, temporary)
    if copy != expected:
        counts = f"{copy.nodes} nodes and {copy.relationships} relationships"
        counts += f", expected {expected.nodes} and {expected.relationships}"
        text = f"the copy that FalkorDB at {address_of(conn)} made differs from the backup: {counts}"
        step = "nothing was replaced; look at FalkorDB's log, then run the same command again"
        raise VerificationFailed(f"{text}, digest {copy.digest} instead of {expected.digest}", next_step=step)


def require_readable(conn: redis.Redis, payload: bytes, temporary: str) -> None:
    """Raise StoreFailed if the target writes older versions than this payload's, and so cannot read it.

    For a payload whose own name is taken, so that a trial restore is not possible. A graph `temporary` is dumped.
    """
    _require_free(conn, temporary)
    try:
        command(conn, "GRAPH.QUERY", temporary, "CREATE (:Probe)")
        probe = dump_graph(conn, temporary)
    finally:
        drop_graph(conn, temporary)
    for what, version_of in (("RDB version", rdb_version), ("graph encoding", graph_encoding)):
        read, written = version_of(probe), version_of(payload)
        if written > read:
            why = f"its {what} is {written}, the server reads up to {read}"
            step = "upgrade the target's FalkorDB to the version that the backup was taken from"
            raise StoreFailed(f"FalkorDB at {address_of(conn)} cannot read this backup: {why}", next_step=step)


def swap_in(conn: redis.Redis, name: str, payload: bytes, safety_name: str) -> bool:
    """Replace the graph `name` by the dumped one, atomically; the old one is then `safety_name`.

    Returns whether there was an old one. Redis does not roll back, so a rename whose RESTORE was refused is undone.
    Raises StoreFailed or AccessRefused with the old graph in place; StoreUnreachable if no reply arrived: then
    GRAPH.LIST shows which of the two states it is.
    """
    _require_name(payload, name)
    _require_free(conn, safety_name)
    if name not in list_graphs(conn):
        _require_free(conn, name)
        _restore(conn, payload, name)
        return False
    with _restore_errors(conn, payload):
        renamed, restored = _rename_and_restore(conn, name, payload, safety_name)
    had_old = not isinstance(renamed, Exception)  # RENAME fails if the old graph was deleted just before
    if isinstance(restored, Exception):
        if had_old:
            _put_back(conn, name, safety_name)
        with _restore_errors(conn, payload):
            raise restored
    return had_old


def swap_back(conn: redis.Redis, name: str, safety_name: str) -> None:
    """Undo `swap_in`: rename the old graph back. Raises MissingData first if `safety_name` does not exist."""
    graphs = list_graphs(conn)
    if safety_name not in graphs:
        raise MissingData(f"graph '{safety_name}' does not exist on FalkorDB at {address_of(conn)}")
    if name in graphs:
        drop_graph(conn, name)
    command(conn, "RENAME", safety_name, name)


def drop_graph(conn: redis.Redis, name: str) -> None:
    """Delete a graph, if it exists."""
    if name in list_graphs(conn):
        command(conn, "GRAPH.DELETE", name)


def _rename_and_restore(conn: redis.Redis, name: str, payload: bytes, safety_name: str) -> list[object]:
    """Return the replies to RENAME and RESTORE of one transaction."""
    return _transaction(conn, ("RENAME", name, safety_name), ("RESTORE", name, 0, payload))


def _transaction(conn: redis.Redis, *commands: tuple[object, ...]) -> list[object]:
    """Run the commands between MULTI and EXEC. Returns their replies; an error among these is not raised.

    Each command waits for its reply. In a pipeline they would run one by one if MULTI were refused.
    """
    raw = conn.connection_pool.get_connection()
    try:
        for words in (("MULTI",), *commands, ("EXEC",)):
            raw.send_command(*words)
            reply = raw.read_response()
    except redis.exceptions.RedisError:
        raw.disconnect()  # the server discards what was queued
        raise
    finally:
        conn.connection_pool.release(raw)
    return list(reply)


def _put_back(conn: redis.Redis, name: str, safety_name: str) -> None:
    try:
        _require_free(conn, name)
        command(conn, "RENAME", safety_name, name)
    except MigrationError as error:
        text = f"the new graph was refused, and the old one is now '{safety_name}': {error}"
        raise StoreFailed(text, next_step=f"rename it back:\n{redis_cli(conn, 'RENAME', safety_name, name)}") from error


def _restore(conn: redis.Redis, payload: bytes, name: str) -> None:
    with _restore_errors(conn, payload):
        conn.execute_command("RESTORE", name, 0, payload)


def _require_name(payload: bytes, name: str) -> None:
    graph_encoding(payload)  # raises if the payload is not a graph
    inside = graph_name(payload)
    if inside is not None and inside != name:
        raise StoreFailed(f"this payload was dumped as graph '{inside}' and cannot be restored as '{name}'")


def _require_free(conn: redis.Redis, name: str) -> None:
    if command(conn, "EXISTS", name):
        text = f"a key '{name}' exists already on FalkorDB at {address_of(conn)}; it is not touched"
        raise StoreFailed(text, next_step=f"if an earlier run left it behind:\n{redis_cli(conn, 'GRAPH.DELETE', name)}")


@contextlib.contextmanager
def _restore_errors(conn: redis.Redis, payload: bytes) -> Iterator[None]:
    """Raise a RESTORE's errors with the step that helps."""
    try:
        with translated(conn):
            yield
    except AccessRefused as error:
        raise AccessRefused(str(error), next_step=_grant(conn)) from error
    except StoreUnreachable as error:
        if len(payload) <= BULK_BYTES:
            raise
        what = f"does not accept a graph of {len(payload) / 2**20:.0f} MiB in one piece"
        step = f"raise its limit:\n{redis_cli(conn, 'CONFIG', 'SET', 'proto-max-bulk-len', '4gb')}"
        raise StoreFailed(f"FalkorDB at {address_of(conn)} {what}", next_step=step) from error
    except StoreFailed as error:
        text, step = str(error), ""
        if "payload version or checksum" in text:
            version = rdb_version(payload)
            step = f"the backup needs a redis that reads RDB version {version}: upgrade the target's FalkorDB"
        elif "Bad data format" in text:
            encoding = graph_encoding(payload)
            step = f"the backup needs a FalkorDB that reads graph encoding {encoding}: upgrade the target"
        elif "maxmemory" in text:
            step = "the old and the new graph both exist for a while: raise maxmemory, or free memory on the target"
        elif "unknown command" in text.lower():
            step = _grant(conn)
        raise StoreFailed(text, next_step=step) from error


def _grant(conn: redis.Redis, *keys: str) -> str:
    """Return the command that permits the user of `conn` what a restore sends, on keys by these patterns."""
    user = str(conn.connection_pool.connection_kwargs.get("username") or "default")
    rules = [*(f"+{one}" for one in _COMMANDS), *keys]
    return "grant it, as an administrator:\n" + redis_cli(conn, "ACL", "SETUSER", user, *rules, user="default")
