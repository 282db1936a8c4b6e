"""Receive the server's RDB over the replication protocol, as `redis-cli --rdb` does: one point in time, streamed.

The protocol: https://redis.io/docs/latest/operate/oss_and_stack/management/replication/ and redis 8.2's
replication.c. It needs the permissions +psync and +replconf, and no disk on the server.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator

from lib.clients.falkordb.connection import START_HINT, GraphAddress, access_refused
from lib.clients.falkordb.rdb import CHUNK_BYTES, MAGIC, crc64
from lib.concurrency import CancelToken, Progress
from lib.errors import AccessRefused, BackupDamaged, MigrationError, StoreFailed, StoreUnreachable

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 60.0  # without a byte
PIECE_BYTES, PIECE_SECONDS = 1 << 20, 600.0  # a connection that brings less of the RDB in this time is given up
CRC_BYTES = 8
PREPARE_SECONDS = 600.0  # a server that writes an RDB to its disk, this or an earlier one, sends newlines meanwhile
_LINE_BYTES = 1 << 16
_AGAIN = "run the same command again"
_GRANT = "grant it (in redis-cli: ACL SETUSER <user> +psync +replconf); without it the graph is backed up with DUMP"
# Of refusals that end some time: what they mean, and the next step.
_LATER = {
    "LOADING": ("is still loading its data", f"{_AGAIN} when it is ready"),
    "BUSY": ("is busy with a script", f"{_AGAIN} when it is ready"),
}
_NO_MASTER = (
    "is a replica that has lost its master; name the master instead",
    f"if it is lost, make this server one (in redis-cli: REPLICAOF NO ONE), then {_AGAIN}",
)
_LATER |= {"NOMASTERLINK": _NO_MASTER, "MASTERDOWN": _NO_MASTER}

Write = Callable[[bytes], object]


class PsyncRefused(AccessRefused):
    """This user may not, or this server cannot, send an RDB. DUMP may still work."""


class RdbNotMade(StoreUnreachable):
    """The server failed to make an RDB: it lacks the memory to fork, or room on its disk. DUMP may still work."""


class SaveHangs(RdbNotMade):
    """The server has not begun to send its RDB for PREPARE_SECONDS."""


def stream_rdb(
    address: GraphAddress, write: Write, *, progress: Progress | None = None, stop: CancelToken | None = None
) -> tuple[int, str]:
    """Pass the server's RDB to `write` in pieces. Returns its size and sha256. `progress` gets the bytes of each.

    `stop` ends the connection. Raises PsyncRefused and RdbNotMade if DUMP may still work, AccessRefused, StoreFailed,
    StoreUnreachable, and BackupDamaged if what arrived is not a whole RDB.
    """
    connection = _ReplicaConnection(address)
    with contextlib.closing(connection), (stop or CancelToken()).ends(connection.shut_down):
        header = connection.request_rdb()
        if marked := re.fullmatch(rb"\$EOF:(.{40})", header, re.DOTALL):
            pieces = _read_until_mark(connection, marked[1])
        elif re.fullmatch(rb"\$\d{1,15}", header):
            pieces = _read_length(connection, int(header[1:]))
        else:
            raise StoreFailed(f"FalkorDB at {connection.address} announced an RDB in an unknown form")
        return _receive(filter(None, pieces), write, progress or (lambda _size: None), address.display)


def _read_until_mark(connection: _ReplicaConnection, mark: bytes) -> Iterator[bytes]:
    """Read a diskless transfer: it ends with `mark`."""
    held = b""
    while held != mark:
        held += connection.chunk(CHUNK_BYTES)
        yield held[: -len(mark)]
        held = held[-len(mark) :]


def _read_length(connection: _ReplicaConnection, left: int) -> Iterator[bytes]:
    """Read a transfer of `left` bytes from the server's disk."""
    while left:
        piece = connection.chunk(min(CHUNK_BYTES, left))
        left -= len(piece)
        yield piece


def _receive(pieces: Iterable[bytes], write: Write, progress: Progress, address: str) -> tuple[int, str]:
    """Pass the pieces on and verify the RDB. The CRC64 leaves out the last eight bytes, which may hold it."""
    digest, size, crc, start, tail = hashlib.sha256(), 0, 0, b"", b""
    for piece in pieces:
        write(piece)
        digest.update(piece)
        size += len(piece)
        start += piece[: len(MAGIC) - len(start)]
        data = tail + piece
        crc, tail = crc64(data[:-CRC_BYTES], crc), data[-CRC_BYTES:]
        progress(len(piece))
    if not start.startswith(MAGIC):
        raise BackupDamaged(f"what FalkorDB at {address} sent is not an RDB", next_step=_AGAIN)
    if int.from_bytes(tail, "little") not in {0, crc}:
        raise BackupDamaged(f"the RDB from {address} arrived damaged: its CRC64 does not match", next_step=_AGAIN)
    return size, digest.hexdigest()


class _ReplicaConnection:
    """A connection that asks for an RDB as a replica does; socket errors become StoreUnreachable."""

    def __init__(self, address: GraphAddress) -> None:
        self.address = address.display
        # A user who is named logs in also without a password, as with redis-py.
        login = [address.username, address.password] if address.username else [address.password]
        self._login = login if any(login) else []
        with self._socket_errors():
            self._socket = _open_socket(address)
            self._socket.settimeout(IDLE_SECONDS)
            self._reader = self._socket.makefile("rb")
        self._piece_left, self._piece_until = 0, 0.0

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def shut_down(self) -> None:
        """End a read that waits, from any thread. TLS's own shutdown would have to wait for it."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def request_rdb(self) -> bytes:
        """Log in, and ask for the RDB. Returns the line that announces it; until then the server sends newlines."""
        if self._login:
            self._ask("AUTH", *self._login)
        self._ask("REPLCONF", "capa", "eof")
        self._ask("REPLCONF", "rdb-only", "1")
        answer = self._ask("PSYNC", "?", "-1")
        if not answer.startswith(b"+FULLRESYNC"):
            shown = answer[:80].decode("utf-8", "replace")
            raise StoreFailed(f"FalkorDB at {self.address} answered PSYNC with {shown}")
        return self._line()

    def chunk(self, size: int) -> bytes:
        """Receive at least one byte and at most `size`."""
        with self._socket_errors():
            data = self._reader.read1(size)
        if not data:
            raise StoreUnreachable(f"FalkorDB at {self.address} closed the connection in the middle of the RDB")
        if self._piece_left <= 0:
            self._piece_left, self._piece_until = PIECE_BYTES, time.monotonic() + PIECE_SECONDS
        elif time.monotonic() > self._piece_until:
            text = f"FalkorDB at {self.address} sent less than 1 MiB of its RDB in {PIECE_SECONDS:g} s"
            raise StoreUnreachable(text, next_step=f"check the network, then {_AGAIN}")
        self._piece_left -= len(data)
        return data

    def _ask(self, *words: str) -> bytes:
        encoded = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in map(str.encode, words))
        with self._socket_errors():
            self._socket.sendall(b"*%d\r\n%s" % (len(words), encoded))
        return self._line()

    def _line(self) -> bytes:
        """Return the next line that is not empty. Raises the error for a refusal."""
        line, deadline = b"", time.monotonic() + PREPARE_SECONDS
        while not line.endswith(b"\n"):
            with self._socket_errors():
                byte = self._reader.read1(1)  # each may take IDLE_SECONDS
            if not byte or len(line) > _LINE_BYTES:
                text = f"FalkorDB at {self.address} closed the connection instead of sending an RDB"
                raise RdbNotMade(text, next_step="look at the server's log: it may lack the memory to fork")
            if time.monotonic() > deadline:
                why = f"has not begun to send its RDB for {PREPARE_SECONDS:.0f} s"
                step = "look at the server's log: a save that it began before (BGSAVE) may hang"
                raise SaveHangs(f"FalkorDB at {self.address} {why}", next_step=step)
            line = (line + byte).lstrip()
        if line.startswith(b"-"):
            raise _refusal(line[1:].decode("utf-8", "replace").strip(), self.address)
        return line.strip()

    @contextlib.contextmanager
    def _socket_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = f"cannot be reached: {error.strerror or error}"
            if isinstance(error, TimeoutError):
                why = f"has sent nothing for {IDLE_SECONDS:g} s"
            raise StoreUnreachable(f"FalkorDB at {self.address} {why}", next_step=START_HINT) from error


def _open_socket(address: GraphAddress) -> socket.socket:
    if address.unix_socket:
        local = socket.socket(socket.AF_UNIX)
        local.settimeout(CONNECT_SECONDS)
        local.connect(address.unix_socket)
        return local
    plain = socket.create_connection((address.host, address.port), timeout=CONNECT_SECONDS)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if not address.tls:
        return plain
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=address.host)
    except OSError:
        plain.close()
        raise


def _refusal(text: str, where: str) -> MigrationError:
    kind = text.split(" ", 1)[0]
    if kind in {"NOAUTH", "WRONGPASS"}:
        return access_refused(where, text)
    if kind == "NOPERM":
        why = "does not permit this user to receive an RDB"
    elif "unknown command" in text.lower():
        why = "has its replication commands switched off"
    else:
        why, step = _LATER.get(kind, ("refused to send an RDB", ""))
        return StoreFailed(f"FalkorDB at {where} {why}: {text}", next_step=step)
    return PsyncRefused(f"FalkorDB at {where} {why}: {text}", next_step=_GRANT)
