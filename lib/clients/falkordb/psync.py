"""The server's RDB over the replication protocol, as `redis-cli --rdb` takes it: a point in time, streamed.

The exchange: https://redis.io/docs/latest/operate/oss_and_stack/management/replication/ and redis 8.2's
replication.c. Needs the permissions +psync and +replconf; asks for no disk on the server.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lib.clients.falkordb.connection import START_HINT, GraphAddress, access_refused
from lib.clients.falkordb.rdb import MAGIC, crc64
from lib.concurrency import CancelToken
from lib.errors import AccessRefused, BackupDamaged, MigrationError, StoreFailed, StoreUnreachable

CONNECT_SECONDS = 10.0
CHUNK_BYTES = 1 << 20
MARK_BYTES = 40
CRC_BYTES = 8
PREPARE_SECONDS = 3600.0  # a server that prepares an RDB on its disk sends newlines meanwhile
_LENGTH_DIGITS, _LINE_BYTES = 15, 1 << 16
_GRANT = "grant it: ACL SETUSER <user> +psync +replconf; without it the graph is taken with DUMP"
_LATER = {
    "LOADING": "is still loading its data",
    "BUSY": "is busy with a script",
    "NOMASTERLINK": "is a replica that has lost its master; name the master instead",
    "MASTERDOWN": "is a replica that has lost its master; name the master instead",
}


class PsyncRefused(AccessRefused):
    """This user or this server does not hand out an RDB; DUMP of the graph is the way."""


class RdbNotMade(StoreUnreachable):
    """The server began to make an RDB and gave up: it lacks the memory to fork, or room on its disk."""


@dataclass(frozen=True)
class RdbTransfer:
    """What arrived: bytes, sha256, and whether the RDB's own CRC64 was there (it is then right)."""

    size: int
    sha256: str
    crc_ok: bool


def stream_rdb(
    address: GraphAddress,
    write: Callable[[bytes], object],
    *,
    progress: Callable[[int], None] | None = None,
    idle_seconds: float = 60.0,
    stop: CancelToken | None = None,
) -> RdbTransfer:
    """Pass the server's RDB to `write`, piece by piece; `progress` gets the bytes so far; `stop` hangs up.

    `idle_seconds` of silence (the server sends newlines while it prepares) end it. Raises PsyncRefused and RdbNotMade
    where DUMP is the way, AccessRefused, StoreFailed, StoreUnreachable, and BackupDamaged where what came is not a
    whole RDB.
    """
    with contextlib.closing(_Wire(address, idle_seconds)) as wire, (stop or CancelToken()).ends(wire.hang_up):
        wire.introduce()
        header = wire.request_rdb()
        arrival = _Arrival(write, progress)
        pieces = (
            _until_mark(wire, header[5:]) if header.startswith(b"$EOF:") else _of_length(wire, header[1:])
        )
        for piece in pieces:
            arrival.take(piece)
    return arrival.finish(address.display)


def _until_mark(wire: _Wire, mark: bytes) -> Iterator[bytes]:
    """A diskless transfer: the data end where the 40 bytes of `mark` come again."""
    if len(mark) != MARK_BYTES:
        raise StoreFailed(f"FalkorDB at {wire.where} announced an RDB in a way that is not understood")
    held = b""
    while True:
        held += wire.chunk(CHUNK_BYTES)
        yield held[:-MARK_BYTES]
        held = held[-MARK_BYTES:]
        if held == mark:
            return


def _of_length(wire: _Wire, digits: bytes) -> Iterator[bytes]:
    """A transfer from the server's disk: its length comes first."""
    if not digits.isdigit() or len(digits) > _LENGTH_DIGITS:
        raise StoreFailed(f"FalkorDB at {wire.where} announced an RDB in a way that is not understood")
    left = int(digits)
    while left:
        piece = wire.chunk(min(CHUNK_BYTES, left))
        left -= len(piece)
        yield piece


class _Arrival:
    """Counts, checks and passes on what arrives; holds back nothing but the last eight bytes' part of the CRC."""

    def __init__(self, write: Callable[[bytes], object], progress: Callable[[int], None] | None) -> None:
        self._write = write
        self._progress = progress
        self._sha256 = hashlib.sha256()
        self._crc = 0
        self._tail = b""
        self._start = b""
        self._size = 0

    def take(self, piece: bytes) -> None:
        if not piece:
            return
        self._write(piece)
        self._sha256.update(piece)
        self._size += len(piece)
        if len(self._start) < len(MAGIC):
            self._start += piece[: len(MAGIC)]
        data = self._tail + piece
        self._crc = crc64(data[:-CRC_BYTES], self._crc)
        self._tail = data[-CRC_BYTES:]
        if self._progress:
            self._progress(self._size)

    def finish(self, where: str) -> RdbTransfer:
        if not self._start.startswith(MAGIC):
            raise BackupDamaged(f"what FalkorDB at {where} sent is not an RDB")
        stored = int.from_bytes(self._tail, "little")
        if stored not in {0, self._crc}:
            raise BackupDamaged(f"the RDB from {where} arrived damaged: its CRC64 does not match")
        return RdbTransfer(self._size, self._sha256.hexdigest(), stored == self._crc)


class _Wire:
    """One connection that speaks RESP; its failures are told in the operator's terms."""

    def __init__(self, address: GraphAddress, idle_seconds: float) -> None:
        self.where = address.display
        self._address = address
        self._idle = idle_seconds
        with self._told():
            self._socket = _open_socket(address, min(CONNECT_SECONDS, idle_seconds))
            self._socket.settimeout(idle_seconds)
            self._reader = self._socket.makefile("rb")

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def hang_up(self) -> None:
        """End what is waited for; from any thread, so not by TLS's own good-bye."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def introduce(self) -> None:
        """Log in, and say what kind of replica this is."""
        if self._address.password:
            user = [self._address.username] if self._address.username else []
            self._ask("AUTH", *user, self._address.password)
        self._ask("REPLCONF", "capa", "eof")
        self._ask("REPLCONF", "rdb-only", "1")

    def request_rdb(self) -> bytes:
        """Ask for the RDB; the line that announces it. Newlines meanwhile mean that the server prepares it."""
        answer = self._ask("PSYNC", "?", "-1")
        if not answer.startswith(b"+FULLRESYNC"):
            raise StoreFailed(
                f"FalkorDB at {self.where} answered PSYNC with {answer[:80].decode('utf-8', 'replace')}"
            )
        try:
            return self._line()
        except StoreUnreachable as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise RdbNotMade(str(error), next_step=error.next_step) from error

    def chunk(self, size: int) -> bytes:
        """At least one byte and at most `size`."""
        with self._told():
            data = self._reader.read1(size)
        if not data:
            raise StoreUnreachable(f"FalkorDB at {self.where} closed the connection in the middle of the RDB")
        return data

    def _ask(self, *words: str) -> bytes:
        encoded = [word.encode() for word in words]
        with self._told():
            self._socket.sendall(
                b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
            )
        return self._line()

    def _line(self) -> bytes:
        """The next line that is not empty. Raises what a refusal means."""
        line, deadline = b"", time.monotonic() + PREPARE_SECONDS
        while not line.endswith(b"\n"):
            with self._told():
                byte = self._reader.read1(1)  # each may come as late as `idle_seconds`
            if not byte or len(line) > _LINE_BYTES:
                raise StoreUnreachable(
                    f"FalkorDB at {self.where} closed the connection instead of sending an RDB",
                    next_step="look at the server's log: it may lack the memory to fork",
                )
            if time.monotonic() > deadline:
                raise StoreUnreachable(
                    f"FalkorDB at {self.where} has not begun to send its RDB for {PREPARE_SECONDS:.0f} s",
                    next_step="look at the server's log, then run this again",
                )
            line = (line + byte).lstrip()
        if line.startswith(b"-"):
            raise _refusal(line[1:].decode("utf-8", "replace").strip(), self.where)
        return line.strip()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise StoreUnreachable(
                f"FalkorDB at {self.where} has sent nothing for {self._idle:g} s", next_step=START_HINT
            ) from error
        except OSError as error:
            reason = error.strerror or error
            raise StoreUnreachable(
                f"FalkorDB at {self.where} cannot be reached: {reason}", next_step=START_HINT
            ) from error


def _open_socket(address: GraphAddress, seconds: float) -> socket.socket:
    if address.unix_socket:
        local = socket.socket(socket.AF_UNIX)
        local.settimeout(seconds)
        local.connect(address.unix_socket)
        return local
    plain = socket.create_connection((address.host, address.port), timeout=seconds)
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
        return PsyncRefused(
            f"FalkorDB at {where} does not permit this user to take an RDB: {text}", next_step=_GRANT
        )
    if "unknown command" in text.lower():
        return PsyncRefused(
            f"FalkorDB at {where} has replication commands switched off: {text}", next_step=_GRANT
        )
    if kind in _LATER:
        return StoreFailed(
            f"FalkorDB at {where} {_LATER[kind]}: {text}", next_step="run this again when it is ready"
        )
    return StoreFailed(f"FalkorDB at {where} refused to send an RDB: {text}")
