"""A proxy to the S3 server that holds, spoils, refuses or drops chosen requests."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from urllib.parse import unquote

from tests.http_proxy import LONGEST_SECONDS, HttpProxy, Request


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

    def takes(self, request: Request) -> bool:
        return self.method == request.command and self.part in unquote(request.path)


class S3Gate(HttpProxy):
    """An HTTP proxy on a free port; a context manager."""

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port)
        self.rules: list[Rule] = []

    def rule(self, method: str, part: str, act: str) -> Rule:
        made = Rule(method, part, act)
        self.rules.append(made)
        return made

    def open(self) -> None:
        rules, self.rules = self.rules, []
        for one in rules:
            one.let_go.set()

    def answer(self, request: Request, body: bytes) -> None:
        rule = next((one for one in self.rules if one.takes(request)), None)
        act = rule.act if rule else ""
        if rule:
            rule.reached.set()
        if act in {"refuse", "fail"}:
            request.reply(403 if act == "refuse" else 500, [], _refusal(act))
            return
        if act == "spoil" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        answer = request.forward(body) if act not in {"hold", "drop"} else None
        if answer and act != "held after":
            request.reply(*answer)
            return
        request.close_connection = True
        if rule and act != "drop":
            rule.let_go.wait(LONGEST_SECONDS)


def _refusal(act: str) -> bytes:
    code = "AccessDenied" if act == "refuse" else "InternalError"
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>reported by the gate</Message></Error>".encode()
