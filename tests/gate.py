"""A way to Qdrant with a gate in it: stops a chosen request before or after the server has carried it out."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
LONGEST_SECONDS = 120


@dataclass
class Stop:
    """The `nth` request of this method and path (of those for which `when` is true).

    `carried_out`: the server has answered, the answer is held back; else the request never reaches it. `reached` is
    set when a request stands there; it goes nowhere any more, and its connection is closed once `let_go` is set.
    With `late` the server gets the request then after all, and `ended` is set when it has answered.
    """

    method: str
    path: str
    nth: int = 1
    carried_out: bool = False
    late: bool = False
    when: Callable[[], bool] = lambda: True
    reached: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def takes(self, method: str, path: str) -> bool:
        with self._lock:
            if (
                self.reached.is_set()
                or method != self.method
                or not re.search(self.path, path)
                or not self.when()
            ):
                return False
            self.nth -= 1
            return self.nth == 0

    def hold(self) -> None:
        self.reached.set()
        self.let_go.wait(LONGEST_SECONDS)


class Gate:
    """An HTTP proxy on a port of its own; a context manager."""

    def __init__(self, target: str) -> None:
        place = urlsplit(target)
        self.target = (place.hostname, place.port)
        self.stops: list[Stop] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Gate:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._server.shutdown()
        self._server.server_close()

    def open(self) -> None:
        """Let go what is held, and everything pass."""
        held, self.stops = self.stops, []
        for stop in held:
            stop.let_go.set()


def _handler(gate: Gate) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            stop = next((one for one in gate.stops if one.takes(self.command, self.path)), None)
            if stop and not stop.carried_out:
                self.drop(stop)
                if not stop.late:
                    return
            upstream = http.client.HTTPConnection(*gate.target, timeout=LONGEST_SECONDS)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            upstream.request(self.command, self.path, body or None, headers)
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            if stop:
                if stop.late:
                    stop.ended.set()
                else:
                    self.drop(stop)
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in HOP_BY_HOP | {"date", "server"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def drop(self, stop: Stop) -> None:
            stop.hold()
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = forward  # noqa: N815

    return Handler
