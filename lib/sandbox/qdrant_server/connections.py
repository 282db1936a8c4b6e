"""The HTTP/1.1 protocol with one habit of the real server: a refused large body is not read to its end.

Where the answer comes from the head of a request, the server goes on reading for about 3 MB, then stops, and keeps the
connection open: a client that sends on without listening waits for ever (seen on 1.11.3 and 1.18.3).
"""

from __future__ import annotations

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

UNREAD_LIMIT = 3 * 1024 * 1024


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
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._unread = 0
            self.flow.resume_reading()
            return
        super().on_response_complete()
