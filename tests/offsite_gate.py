"""A way to the S3 server that holds, spoils, refuses or drops chosen requests."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "date", "server"}
_LONGEST_SECONDS = 60


@dataclass
class Rule:
    """For requests of this method with `part` in their path.

    `act` is `hold` (until the test lets go, then dropped), `held after` (the same, carried out), `drop`, `refuse`
    (403), `fail` (500) or `spoil` (a byte of the body is changed).
    """

    method: str
    part: str
    act: str
    reached: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)


class S3Gate:
    """An HTTP proxy on a port of its own; a context manager."""

    def __init__(self, port: int) -> None:
        self.target = ("127.0.0.1", port)
        self.rules: list[Rule] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> S3Gate:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._server.shutdown()
        self._server.server_close()

    def rule(self, method: str, part: str, act: str) -> Rule:
        made = Rule(method, part, act)
        self.rules.append(made)
        return made

    def open(self) -> None:
        """Everything passes again."""
        rules, self.rules = self.rules, []
        for one in rules:
            one.let_go.set()

    def act_for(self, method: str, path: str) -> Rule | None:
        return next((one for one in self.rules if one.method == method and one.part in unquote(path)), None)


def _handler(gate: S3Gate) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            rule = gate.act_for(self.command, self.path)
            act = rule.act if rule else ""
            if rule:
                rule.reached.set()
            if act == "spoil" and body:
                body = bytes([body[0] ^ 1]) + body[1:]
            if act in {"refuse", "fail"}:
                self.reply(403 if act == "refuse" else 500, [], _refusal(act))
                return
            if act in {"hold", "drop"}:
                self.leave(rule)
                return
            status, headers, content = self.forward(body)
            if act == "held after":
                self.leave(rule)
                return
            self.reply(status, headers, content)

        def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            upstream = http.client.HTTPConnection(*gate.target, timeout=_LONGEST_SECONDS)
            headers = {name: one for name, one in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            upstream.request(self.command, self.path, body or None, headers)
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            return answer.status, answer.getheaders(), content

        def leave(self, rule: Rule | None) -> None:
            if rule and rule.act != "drop":
                rule.let_go.wait(_LONGEST_SECONDS)
            self.close_connection = True

        def reply(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response(status)
            head = self.command == "HEAD"
            for name, value in headers:
                if name.lower() not in _HOP_BY_HOP or (head and name.lower() == "content-length"):
                    self.send_header(name, value)
            if not head:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(b"" if head else content)

        def log_message(self, *_: object) -> None:
            pass

        do_GET: Callable[[Handler], None] = answer  # noqa: N815 - http.server's names
        do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

    return Handler


def _refusal(act: str) -> bytes:
    code = "AccessDenied" if act == "refuse" else "InternalError"
    return (
        f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told by the gate</Message></Error>".encode()
    )
