"""A proxy to Qdrant with a gate: holds a chosen request before or after the server has carried it out."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.http_proxy import LONGEST_SECONDS, HttpProxy, Request


@dataclass
class CancelToken:
    """The `nth` request of this method and path (of those for which `when` is true).

    `carried_out`: the server has answered, the answer is held back; else the request never reaches it. `reached` is
    set when a request is held there; it is not passed on any more, and its connection is closed once `let_go` is set.
    With `late` the server gets the request then after all, and `ended` is set when it has answered. With `alone` it
    never hears of those of this kind that come after it over other connections.
    """

    method: str
    path: str
    nth: int = 1
    carried_out: bool = False
    late: bool = False
    alone: bool = False
    when: Callable[[], bool] = lambda: True
    reached: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def takes(self, method: str, path: str) -> bool:
        with self._lock:
            if self.reached.is_set() or method != self.method or not re.search(self.path, path) or not self.when():
                return False
            self.nth -= 1
            return self.nth == 0

    def bars(self, method: str, path: str) -> bool:
        """Whether such a request comes after the one that was taken, and before that one was let go."""
        taken = self.alone and self.nth <= 0 and not self.let_go.is_set()
        return taken and method == self.method and bool(re.search(self.path, path))

    def hold(self) -> None:
        self.reached.set()
        self.let_go.wait(LONGEST_SECONDS)


class Gate(HttpProxy):
    """An HTTP proxy on a free port; a context manager."""

    def __init__(self, target: str) -> None:
        place = urlsplit(target)
        assert place.hostname
        assert place.port
        super().__init__(place.hostname, place.port)
        self.stops: list[CancelToken] = []

    def open(self) -> None:
        held, self.stops = self.stops, []
        for stop in held:
            stop.let_go.set()

    def answer(self, request: Request, body: bytes) -> None:
        stop = next((one for one in self.stops if one.takes(request.command, request.path)), None)
        barring = next((one for one in self.stops if one.bars(request.command, request.path)), None)
        if stop is None and barring is not None:
            request.close_connection = True
            barring.let_go.wait(LONGEST_SECONDS)
            return
        if stop is None:
            request.reply(*request.forward(body))
            return
        request.close_connection = True
        if stop.carried_out:
            request.forward(body)
            stop.hold()
            return
        stop.hold()
        if stop.late:
            request.forward(body)
            stop.ended.set()
