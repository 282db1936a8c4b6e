"""Progress bars on a terminal: one display for all that are open, from whichever thread; rich takes only one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

_LOCK = threading.Lock()
_OPEN: list[Progress] = []  # the display, once for each open bar


class _Amount(ProgressColumn):
    """What was done, of how much, and how fast: bytes as people read them, other things counted."""

    def render(self, task: Task) -> Text:
        """For one bar."""
        amount, unit = task.fields["amount"], task.fields["unit"]
        total = task.fields["of"]
        of = f"/{amount(total)}" if total else ""
        done = task.fields.get("done", task.completed)
        average = task.completed / task.finished_time if task.finished_time else 0.0
        speed = average if task.finished else task.speed
        rate = f"  {amount(speed)}/s" if speed and done else ""
        return Text(f"{amount(done)}{of} {unit}".rstrip() + rate)


class _Clock(ProgressColumn):
    """The time that is left where the end is known, else the time taken."""

    def render(self, task: Task) -> Text:
        """For one bar."""
        left = task.time_remaining if task.total and not task.finished else None
        seconds = int((left if left is not None else task.finished_time or task.elapsed) or 0)
        word = " left" if left is not None else ""
        return Text(f"{seconds // 60}:{seconds % 60:02d}{word}")


@contextlib.contextmanager
def bar(
    title: str, total: int | None, amount: Callable[[float], str], unit: str
) -> Iterator[Callable[[int], None]]:
    """A callback that takes what was done since the last call; `amount` and `unit` are how it is shown."""
    with _LOCK:
        display = _OPEN[0] if _OPEN else _display()
        _OPEN.append(display)
        task = display.add_task(title, total=total, amount=amount, unit=unit, of=total)
    try:
        yield lambda step: display.advance(task, step)
        done = display.tasks[task].completed
        # A full bar also of an unknown total, or of nothing; what was done is shown as it is.
        display.update(task, total=done or 1, completed=done or 1, done=done)
    finally:
        with _LOCK:
            _OPEN.remove(display)
            if not _OPEN:
                display.stop()


def _display() -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), _Amount(), _Clock()]
    display = Progress(*columns, console=RichConsole(stderr=True))
    display.start()
    return display
