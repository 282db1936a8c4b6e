"""An HTTP proxy on a free port; its user decides what it does with a request."""

from __future__ import annotations

import http.client
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "date", "server"}
LONGEST_SECONDS = 600


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # of a client that was killed
            super().handle_error(request, client_address)


class HttpProxy:
    """A context manager; subclasses `answer` each request. Connections that they hold end when it does (`open`)."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._server.shutdown()
        self._server.server_close()

    def open(self) -> None:
        """Release held requests and pass all others."""
        raise NotImplementedError

    def answer(self, request: Request, body: bytes) -> None:
        """Handle one request: `forward` and `reply`, or set `close_connection`."""
        raise NotImplementedError


class Request(BaseHTTPRequestHandler):
    """One request at the proxy."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: HttpProxy

    def take(self) -> None:
        self.proxy.answer(self, self.rfile.read(int(self.headers.get("content-length") or 0)))

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's status, headers and body."""
        upstream = http.client.HTTPConnection(*self.proxy.target, timeout=LONGEST_SECONDS)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        upstream.request(self.command, self.path, body or None, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        return answer.status, answer.getheaders(), content

    def reply(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        head = self.command == "HEAD"
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP or (head and name.lower() == "content-length"):
                self.send_header(name, value)
        if not head:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(b"" if head else content)

    def log_message(self, *_: Any) -> None:
        pass

    do_GET: Callable[[Request], None] = take  # noqa: N815 - http.server's names
    do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = take  # noqa: N815


def _handler(proxy: HttpProxy) -> type[Request]:
    return type("Handler", (Request,), {"proxy": proxy})
