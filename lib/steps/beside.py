"""Work beside the main thread's: whichever fails first ends the other, and its error is the one that is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from lib.steps.progress import Progress
from lib.stopping import Stop

T = TypeVar("T")


class Beside(Generic[T]):
    """`work` in a thread of its own, from entering the block on; it gets this, for its `stop` and to tell its moves.

    Leaving the block by an error stops the work and waits for its end, so that it makes nothing after that. Signals
    are the main thread's, which stays free to be interrupted.
    """

    def __init__(self, work: Callable[[Beside[T]], T]) -> None:
        self.stop = Stop()
        self._work = work
        self._begun = threading.Event()
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Beside[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.stop.set()
        self._thread.join()

    def moving(self, progress: Progress) -> Progress:
        """For the work: `progress` that tells that it has begun, and raises Stopped where it was told to end."""

        def advance(step: int) -> None:
            self.stop.check()
            self._begun.set()
            progress(step)

        return advance

    def watching(self, progress: Progress) -> Progress:
        """For the main thread: `progress` that raises the work's error as soon as there is one."""

        def advance(step: int) -> None:
            self.check()
            progress(step)

        return advance

    def wait_begun(self) -> None:
        """Wait until the work has moved, or ended; raises its error."""
        self._begun.wait()
        self.check()

    def check(self) -> None:
        """Raise the work's error where it has failed."""
        if self._error is not None:
            raise self._error

    def result(self) -> T:
        """Wait for the work's end; raises its error."""
        self._thread.join()
        self.check()
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._work(self))
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread, whatever it is
            self._error = error
        finally:
            self._begun.set()
