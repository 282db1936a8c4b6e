"""A TCP proxy to a server that is far away: every byte takes its time each way, the rate may be limited, bytes count."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from dataclasses import dataclass, field

from tests.faulty_proxy import hang_up

PIECE_BYTES = 65536
MOST_IN_FLIGHT = 1024  # pieces of one direction of a connection: 64 MiB, more than a loopback moves within a delay


@dataclass
class Direction:
    """What all connections together move one way: `bytes` so far, at most `rate` of them a second."""

    rate: float | None
    bytes: int = 0
    _free_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def carry(self, size: int) -> float:
        """Wait until the line is free for a piece of this size. Returns when its last byte is sent."""
        with self._lock:
            self.bytes += size
            starts_at = max(time.monotonic(), self._free_at)
            self._free_at = sent_at = starts_at + (size / self.rate if self.rate else 0.0)
        sleep_until(starts_at)
        return sent_at


class FarProxy:
    """Listen on a free port and forward to `port`; a context manager.

    Each byte arrives `delay` seconds after it was sent, each way, while any number of bytes are on their way. `rate`
    (bytes a second) limits each direction for all connections together, as one line does. As with a real server,
    opening a connection costs one round trip: its first bytes wait for it. What TCP adds (slow start, lost packets) is
    left out. `up`, `down`: bytes to the server and from it. `round_trips`: how often a connection sent something
    as its first bytes, or after an answer.
    """

    def __init__(self, port: int, delay: float = 0.0, rate: float | None = None) -> None:
        self.up, self.down = Direction(rate), Direction(rate)
        self.connections = self.round_trips = 0
        self._delay = delay
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> FarProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listener, *self._open):
            hang_up(one)
        self._listener.close()

    def set_line(self, delay: float, rate: float | None) -> None:
        """Change the delay and the rate of what is sent from now on."""
        self._delay = delay
        self.up.rate = self.down.rate = rate

    @property
    def moved(self) -> int:
        """Bytes in both directions."""
        return self.up.bytes + self.down.bytes

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        opened_at = time.monotonic() + 2 * self._delay
        with contextlib.suppress(OSError), client, socket.create_connection(self._target) as server:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                self._open |= {client, server}
            connection = _Connection(self, opened_at)
            up = threading.Thread(target=connection.forward, args=(client, server, self.up), daemon=True)
            up.start()
            connection.forward(server, client, self.down)
            up.join()
            with self._lock:
                self._open -= {client, server}

    def count_round_trip(self) -> None:
        with self._lock:
            self.round_trips += 1

    def arrival(self, sent_at: float) -> float:
        """When what is sent at that time arrives at the other side."""
        return sent_at + self._delay


class _Connection:
    """Both directions of one connection."""

    def __init__(self, proxy: FarProxy, opened_at: float) -> None:
        self._proxy = proxy
        self._opened_at = opened_at
        self._answered = True

    def forward(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        """Forward what `source` sends, until it ends or one of both is gone."""
        on_the_way: queue.Queue[tuple[float, bytes]] = queue.Queue(MOST_IN_FLIGHT)
        delivery = threading.Thread(target=_deliver, args=(on_the_way, source, target), daemon=True)
        delivery.start()
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                self._note_turn(direction)
                sent_at = max(direction.carry(len(data)), self._opened_at)
                on_the_way.put((self._proxy.arrival(sent_at), data))
        on_the_way.put((self._proxy.arrival(time.monotonic()), b""))
        delivery.join()

    def _note_turn(self, direction: Direction) -> None:
        if direction is self._proxy.down:
            self._answered = True
        elif self._answered:
            self._answered = False
            self._proxy.count_round_trip()


def _deliver(on_the_way: queue.Queue[tuple[float, bytes]], source: socket.socket, target: socket.socket) -> None:
    """Send each piece at its time, and pass the end of the stream on; an empty piece is the end."""
    with contextlib.suppress(OSError):
        while True:
            at, data = on_the_way.get()
            sleep_until(at)
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(data)
    hang_up(source)  # the target is gone: the source must notice
    while on_the_way.get()[1]:
        pass


def sleep_until(moment: float) -> None:
    """Sleep until this time of the monotonic clock."""
    left = moment - time.monotonic()
    if left > 0:
        time.sleep(left)
