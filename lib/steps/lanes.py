"""One thing done to many items, a few of them at a time: the server works while the next item is made ready."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_lanes(work: Callable[[T], R], items: Iterable[T], lanes: int) -> Iterator[R]:
    """What `work` makes of each item, in the items' order; `lanes` of them are at work at once, none is read ahead.

    Items are read in the caller's thread. The first error is raised when those at work have ended.
    """
    running: deque[Future[R]] = deque()
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
