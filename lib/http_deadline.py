"""Deadlines for answers that requests reads. A socket's timeout bounds the wait for one byte, not for all headers."""

from __future__ import annotations

import io
import socket
import time
from http.client import HTTPResponse
from typing import TYPE_CHECKING, Any, cast

from requests.adapters import HTTPAdapter

if TYPE_CHECKING:
    from requests import Response
    from urllib3 import HTTPConnectionPool


class _TimedReader(io.RawIOBase):
    """Reads of a socket that raise TimeoutError after `deadline` (monotonic seconds; None: no bound)."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw, self._sock, self._timeout = raw, sock, sock.gettimeout()
        self.deadline = None if self._timeout is None else time.monotonic() + self._timeout

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def readinto(self, buffer: Any) -> int | None:
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._sock.settimeout(left if self._timeout is None else min(left, self._timeout))
        return cast("int | None", self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()


class TimedAnswer(HTTPResponse):
    """An answer whose headers, with interim answers (1xx), must be complete within the timeout of one read."""

    def __init__(self, sock: socket.socket, *args: Any, **more: Any) -> None:
        super().__init__(sock, *args, **more)
        self._timed = _TimedReader(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._timed)

    def begin(self) -> None:
        """Read the headers."""
        super().begin()
        self.end_by(None)

    def end_by(self, deadline: float | None) -> None:
        """Make all later reads, also of chunk lines and trailers, raise TimeoutError after `deadline`."""
        self._timed.deadline = deadline


class TimedAdapter(HTTPAdapter):
    """Opens connections whose answers are TimedAnswers."""

    def get_connection_with_tls_context(self, *args: Any, **more: Any) -> HTTPConnectionPool:
        """Return the pool for a request; requests documents this method for overriding."""
        pool: Any = super().get_connection_with_tls_context(*args, **more)
        kind = pool.ConnectionCls
        if kind.response_class is not TimedAnswer:
            pool.ConnectionCls = type(kind.__name__, (kind,), {"response_class": TimedAnswer})
        return cast("HTTPConnectionPool", pool)


def end_by(response: Response, deadline: float) -> None:
    """Make reads of the body raise TimeoutError after `deadline` (monotonic seconds)."""
    # requests itself reads cookies through this private attribute.
    cast("TimedAnswer", response.raw._original_response).end_by(deadline)  # noqa: SLF001
