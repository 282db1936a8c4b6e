"""Writing behind the caller's back: compressing, hashing and the disk go on while the next bytes arrive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_PIECES = 8  # that may wait; pieces are of at most a megabyte


class Behind:
    """Calls `write` with each piece, in order, in a thread of its own; its error is raised by the next call here."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_PIECES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def write(self, piece: bytes) -> None:
        """Hand over a piece, which must not change any more."""
        if self._error is not None:
            raise self._error
        self._pieces.put(piece)

    def finish(self) -> None:
        """Wait until all is written."""
        self.close()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread, whatever it met; nothing is written after this."""
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._error is not None:
                continue  # so that nobody waits for room
            try:
                self._write(piece)
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                self._error = error
