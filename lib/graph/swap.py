"""A graph put in place over a plain connection, with the old one whole beside it until it is dropped on purpose.

The rules keep servers alive (seen on 4.16.3 and 4.22.1): a payload goes back only under the name that it was dumped
under, and never over an existing key. 4.16 crashes otherwise, 4.22 ends with two names on one graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import redis

from lib.errors import (
    AccessRefused,
    MigrationError,
    MissingData,
    StoreFailed,
    StoreUnreachable,
    VerificationFailed,
)
from lib.graph.client import GraphAddress, command, connect, list_graphs, place, translated
from lib.graph.digest import GraphDigest, graph_digest
from lib.graph.payload import graph_encoding, graph_name, rdb_version
from lib.graph.preflight import GRANT

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


def prove_acceptance(
    conn: redis.Redis,
    payload: bytes,
    throwaway: str,
    expected: GraphDigest,
    then: Callable[[], object] = lambda: None,
) -> None:
    """Prove on the target that it takes this graph: restore it under `throwaway`, compare, delete it again.

    The payload must have been dumped under the name `throwaway`. Raises VerificationFailed where the copy differs,
    StoreFailed or AccessRefused where the target does not take it; nothing is left behind. `then` is called once the
    copy is there, before it is read.
    """
    _require_name(payload, throwaway)
    _require_free(conn, throwaway)
    try:
        _restore(conn, payload, throwaway)
        del payload
        then()
        copy = graph_digest(conn, throwaway, by_id=expected.by_id)
    except MigrationError:
        with contextlib.suppress(MigrationError):  # what went wrong first is what the operator must read
            drop_graph(conn, throwaway)
        raise
    drop_graph(conn, throwaway)
    if copy != expected:
        raise VerificationFailed(
            f"the copy that FalkorDB at {place(conn)} made differs from the backup: "
            f"{copy.nodes} nodes and {copy.relationships} relationships, expected {expected.nodes} and "
            f"{expected.relationships}, digest {copy.digest} instead of {expected.digest}"
        )


def require_readable(conn: redis.Redis, payload: bytes, throwaway: str) -> None:
    """Raise StoreFailed where the target writes older versions than this payload's, and so cannot read it.

    A graph of one node is made and dumped under `throwaway`, then deleted: the way for a payload whose own name is
    taken, which no rehearsal can restore.
    """
    _require_free(conn, throwaway)
    try:
        command(conn, "GRAPH.QUERY", throwaway, "CREATE (:Probe)")
        probe = dump_graph(conn, throwaway)
    finally:
        drop_graph(conn, throwaway)
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
