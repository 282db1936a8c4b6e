"""Telling work in another thread to end, and ending what it waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """The work was told to end; whoever told it knows why."""


class Stop:
    """Set once, by another thread; `ends` names what a waiting worker is woken by."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._enders: list[Callable[[], object]] = []

    def set(self) -> None:
        """Tell it; what is waited for ends now."""
        with self._lock:
            self._set = True
            enders = list(self._enders)
        for end in enders:
            end()

    def check(self) -> None:
        """Raise Stopped where it was told."""
        if self._set:
            raise Stopped

    @contextmanager
    def ends(self, end: Callable[[], object]) -> Iterator[None]:
        """Inside the block `set` calls `end`, from its own thread. Raises Stopped where it was set before or after."""
        with self._lock:
            self._enders.append(end)
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._enders.remove(end)
