"""The HTTP/1.1 protocol, with what the real servers do to a body that they refused from the head of its request.

Seen on real servers, over 401, 415, 422 and a body beyond the limit: 1.11.3 goes on reading for about 3 MB, then stops
and keeps the connection open, so that a client which sends on without listening waits for ever; 1.18.3 closes the
connection behind its answer, so that such a client meets a broken pipe.
"""

from __future__ import annotations

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lib.sandbox.qdrant_server.dialect import Dialect

UNREAD_LIMIT = 3 * 1024 * 1024
ARRIVES_ANYWAY = 64 * 1024  # a body this small is in the buffers by the time of the answer


class ClosingProtocol(H11Protocol):
    """Closes a connection whose request was answered before its body was read."""

    def on_response_complete(self) -> None:
        """Go on with the next request, or close."""
        if _body_outstanding(self):
            self.transport.close()
            return
        super().on_response_complete()


class StallingProtocol(H11Protocol):
    """Stops reading a connection once `UNREAD_LIMIT` bytes came after an answer that did not wait for them."""

    _unread: int | None = None  # bytes that came since such an answer

    def data_received(self, data: bytes) -> None:
        """Hand bytes to the parser, or drop those of a body that was refused."""
        if self._unread is None:
            super().data_received(data)
            return
        self._unread += len(data)
        if self._unread > UNREAD_LIMIT:
            self.transport.pause_reading()

    def on_response_complete(self) -> None:
        """Go on with the next request, or count what still comes of this one."""
        if _body_outstanding(self) and not self.transport.is_closing():
            self._unread = 0
            self.flow.resume_reading()
            return
        super().on_response_complete()


def _body_outstanding(connection: H11Protocol) -> bool:
    declared = dict(connection.headers).get(b"content-length")
    large = declared is None or int(declared) > ARRIVES_ANYWAY
    return large and connection.conn.their_state is h11.SEND_BODY


def protocol(dialect: Dialect) -> type[H11Protocol]:
    """The protocol of the version that is played."""
    return ClosingProtocol if dialect.closes_refused_bodies else StallingProtocol
