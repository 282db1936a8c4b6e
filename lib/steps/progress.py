"""How a step tells what it has done: a callback that takes the amount since the last call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

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
