"""Background work: cancellation, a bounded map, a background task, a background writer, progress callbacks."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future


class Stopped(Exception):
    """The work was told to end; whoever told it knows why."""


class CancelToken:
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


Progress = Callable[[int], None]
ProgressBar = Callable[[str, "int | None", str], "AbstractContextManager[Progress]"]  # title, total, unit


def steps_of(progress: Progress) -> Callable[[int, int], None]:
    """For a callee that tells (done so far, in all)."""
    seen = 0

    def tell(done: int, _total: int) -> None:
        nonlocal seen
        progress(done - seen)
        seen = done

    return tell


T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """`work` in a thread of its own, from entering the block on; it gets this, for its `stop` and to tell its moves.

    Leaving the block by an error stops the work and waits for its end, so that it makes nothing after that. Signals
    are the main thread's, which stays free to be interrupted.
    """

    def __init__(self, work: Callable[[BackgroundTask[T]], T]) -> None:
        self.stop = CancelToken()
        self._work = work
        self._begun = threading.Event()
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> BackgroundTask[T]:
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


R = TypeVar("R")


def bounded_map(work: Callable[[T], R], items: Iterable[T], lanes: int) -> Iterator[R]:
    """What `work` makes of each item, in the items' order; `lanes` of them are at work at once, none is read ahead.

    Items are read in the caller's thread. The first error is raised when those at work have ended.
    """
    running: deque[Future[R]] = deque()
    from concurrent.futures import ThreadPoolExecutor  # 10 ms, which most commands do without

    with ThreadPoolExecutor(lanes, thread_name_prefix="lane") as pool:
        try:
            for item in items:
                if len(running) == lanes:
                    yield running.popleft().result()
                running.append(pool.submit(work, item))
            while running:
                yield running.popleft().result()
        finally:
            for waiting in running:
                waiting.cancel()


_PIECES = 8  # that may wait; pieces are of at most a megabyte


class BackgroundWriter:
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
