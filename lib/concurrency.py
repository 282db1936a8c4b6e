"""Background work: a cancel token, a background task, a bounded map, reading ahead, a background writer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int], None]  # gets the number of things done since the last call
ProgressBar = Callable[[str, "int | None", str], "AbstractContextManager[Progress]"]  # title, total, unit
_MOST_WAITING = 8  # pieces; each is at most a megabyte


def steps_of(progress: Progress) -> Callable[[int], None]:
    """Adapt `progress` to a caller that reports how much is done so far."""
    seen = 0

    def report(done: int) -> None:
        nonlocal seen
        progress(done - seen)
        seen = done

    return report


class Cancelled(Exception):
    """The work was cancelled by another thread, which knows the reason."""


class CancelToken:
    """Cancels work that runs in another thread. It is set at most once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._enders: list[Callable[[], object]] = []

    def set(self) -> None:
        """Cancel the work: call every registered `ends` callback."""
        with self._lock:
            self._set = True
            enders = list(self._enders)
        for end in enders:
            end()

    def is_set(self) -> bool:
        """Whether the work was cancelled."""
        return self._set

    def check(self) -> None:
        """Raise Cancelled if the token is set."""
        if self._set:
            raise Cancelled

    @contextmanager
    def ends(self, end: Callable[[], object]) -> Iterator[None]:
        """Inside the block, `set` calls `end` (in its own thread), to wake a call that blocks. Raises Cancelled."""
        with self._lock:
            self._enders.append(end)
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._enders.remove(end)


class BackgroundTask(Generic[T]):
    """Runs `work` in a thread while the block is open. `work` gets this object.

    If the block ends by an error, the work is cancelled and waited for, so that it changes nothing afterwards. The
    thread is a daemon: a third Ctrl-C ends the process, whatever the work waits for.
    """

    def __init__(self, work: Callable[[BackgroundTask[T]], T]) -> None:
        from concurrent.futures import Future

        self.stop = CancelToken()
        self._work = work
        self._begun = threading.Event()
        self._outcome: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> BackgroundTask[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._outcome.set_result(self._work(self))
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread, whatever it is
            self._outcome.set_exception(error)
        finally:
            self._begun.set()

    def moving(self, progress: Progress) -> Progress:
        """Wrap `progress` for the work: its first call ends `wait_begun`. Raises Cancelled."""

        def advance(step: int) -> None:
            self.stop.check()
            self._begun.set()
            progress(step)

        return advance

    def watching(self, progress: Progress) -> Progress:
        """Wrap `progress` for the main thread: it raises the work's error as soon as there is one."""

        def advance(step: int) -> None:
            self.check()
            progress(step)

        return advance

    def wait_begun(self) -> None:
        """Wait until the work has reported progress, or has ended. Raises its error."""
        self._begun.wait()
        self.check()

    def check(self) -> None:
        """Raise the work's error if it has failed."""
        if self._outcome.done():
            self._outcome.result()

    def result(self) -> T:
        """Wait for the end of the work and return its result. Raises its error."""
        return self._outcome.result()


def bounded_map(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield `work(item)` in the order of the items, with at most `threads` items in work.

    Items are read in the caller's thread, none ahead. An error is raised after the other items in work have ended.
    """
    from concurrent.futures import ThreadPoolExecutor  # takes 10 ms to import; most commands do not need it

    running: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="bounded_map") as pool:
        try:
            for item in items:
                if len(running) == threads:
                    yield running.popleft().result()
                running.append(pool.submit(work, item))
            while running:
                yield running.popleft().result()
        finally:
            for waiting in running:
                waiting.cancel()


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items. While the caller works on one, another thread reads the next."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as pool:
        one = list(islice(items, 1))
        while one:
            following = pool.submit(lambda: list(islice(items, 1)))
            yield one[0]
            one = following.result()


class BackgroundWriter:
    """Calls `write` with each piece, in order, in one other thread. An error is raised by a later call."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._write = write
        self._waiting: deque[Future[object]] = deque()
        self._pool = ThreadPoolExecutor(1)

    def write(self, piece: bytes) -> None:
        """Queue a piece, which must not change any more. Waits while too many are queued."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) == _MOST_WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, piece))

    def finish(self) -> None:
        """Wait until every piece is written."""
        while self._waiting:
            self._waiting.popleft().result()
        self.close()

    def close(self) -> None:
        """End the thread; pieces that are still queued are discarded."""
        self._pool.shutdown(cancel_futures=True)
