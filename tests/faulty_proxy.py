"""A TCP proxy to any server, with faults: chosen requests are cut off, held, trickled or answered by somebody else."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field

PIECE_BYTES = 65536
LONGEST_SECONDS = 600


def answer(status: int, text: str, headers: str = "") -> bytes:
    """An HTTP answer as a gateway gives it."""
    body = text.encode()
    return b"HTTP/1.1 %d Fault\r\nContent-Length: %d\r\n%s\r\n%s" % (
        status,
        len(body),
        headers.encode(),
        body,
    )


@dataclass
class Fault:
    """What happens to the requests that match `request` (a regular expression over the bytes that a client sends).

    `skip` of them pass first, then `times` are hit (None: all that follow). `cut` lets so many bytes of the answer
    through, then closes the connection; `silent` lets them through and then keeps it open without a word; `piece` and
    `pause` make the answer trickle; `answer` is given instead of the server's, which never receives the request, and
    `hang_up` then closes the connection.
    """

    request: bytes
    skip: int = 0
    times: int | None = 1
    cut: int | None = None
    silent: int | None = None
    piece: int = PIECE_BYTES
    pause: float = 0.0
    answer: bytes | None = None
    hang_up: bool = False
    hits: int = field(default=0, init=False)
    passed: int = field(default=0, init=False)
    _seen: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def takes(self, data: bytes) -> bool:
        """Whether this request is hit; counts it."""
        if not re.search(self.request, data):
            return False
        with self._lock:
            self._seen += 1
            if self._seen <= self.skip or self.hits == self.times:
                return False
            self.hits, self.passed = self.hits + 1, 0
            return True


class FaultyProxy:
    """Listen on a free port, with TLS if `tls` is given; a context manager."""

    def __init__(self, port: int, *faults: Fault, tls: ssl.SSLContext | None = None) -> None:
        self.faults = list(faults)
        self._target = ("127.0.0.1", port)
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for one in list(self._open):
            hang_up(one)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            near = self._tls.wrap_socket(client, server_side=True) if self._tls else client
            with near, socket.create_connection(self._target) as server:
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open |= {near, server}
                down = _Down(near, server)
                up = threading.Thread(target=self._upwards, args=(near, server, down), daemon=True)
                up.start()
                with contextlib.suppress(OSError):
                    down.run()
                hang_up(server)
                hang_up(near)
                up.join(5)
                self._open -= {near, server}

    def _upwards(self, near: socket.socket, server: socket.socket, down: _Down) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(PIECE_BYTES):
                fault = next((one for one in self.faults if one.takes(data)), None)
                if fault is not None and fault.answer is not None:
                    near.sendall(fault.answer)
                    if fault.hang_up:
                        break
                    continue
                if fault is not None:
                    down.fault = fault
                server.sendall(data)
        down.client_gone.set()
        hang_up(server)


class _Down:
    """The server's answers on one connection, as the fault of the last request leaves them."""

    def __init__(self, near: socket.socket, server: socket.socket) -> None:
        self.fault: Fault | None = None
        self.client_gone = threading.Event()
        self._near = near
        self._server = server

    def run(self) -> None:
        """Forward until one of the two sides or the fault ends the connection."""
        while data := self._server.recv(PIECE_BYTES):
            fault = self.fault
            if fault is None:
                self._near.sendall(data)
            elif not self._passed(fault, data):
                return

    def _passed(self, fault: Fault, data: bytes) -> bool:
        limit = fault.cut if fault.cut is not None else fault.silent
        ends = limit is not None and fault.passed + len(data) >= limit
        data = data[: limit - fault.passed] if limit is not None and ends else data
        for at in range(0, len(data), fault.piece):
            self._near.sendall(data[at : at + fault.piece])
            time.sleep(fault.pause)
        fault.passed += len(data)
        if ends and fault.silent is not None:
            self.client_gone.wait(LONGEST_SECONDS)
        return not ends


def hang_up(end: socket.socket) -> None:
    """Shut a connection down in both directions."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(end, socket.SHUT_RDWR)
