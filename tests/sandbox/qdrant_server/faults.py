"""Faults on demand, for tests: `POST /_sandbox/faults` with a list of rules, `DELETE` to clear them.

A rule is `{method?, path?, status?, body?, headers?, delay_seconds?, cut_after_bytes?, hang?, lose_answer?, times?}`.
`path` is a regular expression searched in the path with its query. The first rule that fits a request is applied to
it, `times` times if that is given. `status` answers without running the request; `delay_seconds` waits first;
`cut_after_bytes` sends that many bytes of the body and closes the connection; `hang` never runs the request nor
answers it; `lose_answer` runs it and never answers.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Send

PATH = "/_sandbox/faults"


class Cut(Exception):
    """The connection is to be closed in the middle of an answer."""


@dataclass
class Rule:
    """One fault; `times` counts down, None is for ever."""

    method: str | None = None
    path: str = ""
    status: int | None = None
    body: Any = ""
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    cut_after_bytes: int | None = None
    hang: bool = False
    lose_answer: bool = False
    times: int | None = None

    def fits(self, method: str, path: str) -> bool:
        """Whether the rule is about this request."""
        right_method = self.method is None or self.method.upper() == method
        return right_method and re.search(self.path, path) is not None


NO_FAULT = Rule()


class Faults:
    """The rules in force."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []

    async def control(self, request: Request) -> Response:
        """Answer a request to PATH: POST adds rules, DELETE clears them, GET shows them."""
        if request.method == "POST":
            self._rules += [Rule(**rule) for rule in orjson.loads(await request.body())]
        elif request.method == "DELETE":
            self._rules = []
        return Response(orjson.dumps([vars(rule) for rule in self._rules]), media_type="application/json")

    def take(self, request: Request) -> Rule | None:
        """The rule for this request, counted as used."""
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        for rule in self._rules:
            if rule.times != 0 and rule.fits(request.method, path):
                rule.times = None if rule.times is None else rule.times - 1
                return rule
        return None


async def before_answer(rule: Rule) -> Response | None:
    """Wait or hang as the rule says; the answer that it gives instead of the server's, if any."""
    await asyncio.sleep(rule.delay_seconds)
    if rule.hang:
        await asyncio.Event().wait()
    if rule.status is None:
        return None
    content = rule.body if isinstance(rule.body, str) else orjson.dumps(rule.body)
    kind = {} if isinstance(rule.body, str) else {"content-type": "application/json"}
    return Response(content, rule.status, headers={**kind, **rule.headers})


async def around(send: Send, rule: Rule) -> Send:
    """`send` as the rule leaves it; does not return where the answer is to be lost."""
    if rule.lose_answer:
        await asyncio.Event().wait()
    return send if rule.cut_after_bytes is None else _cutting(send, rule.cut_after_bytes)


def _cutting(send: Send, left: int) -> Send:
    async def limited(message: Message) -> None:
        nonlocal left
        if message["type"] == "http.response.body":
            body = message.get("body", b"")[:left]
            left -= len(body)
            await send({**message, "body": body, "more_body": True})
            if left == 0:
                raise Cut
        else:
            await send(message)

    return limited
