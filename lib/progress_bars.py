"""Progress bars on a terminal. All open bars, of any thread, share one display: rich allows only one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

_LOCK = threading.Lock()
_OPEN: list[Progress] = []  # the shared display, once for each open bar


class _Amount(ProgressColumn):
    """The amount done, of how much, and the speed. Bytes are shown as such; other units are counted."""

    def render(self, task: Task) -> Text:
        """Render one bar's column."""
        amount, done = task.fields["amount"], task.fields.get("done", task.completed)
        of = f"/{amount(task.fields['of'])}" if task.fields["of"] else ""
        if task.finished and not (done or of or task.fields["unit"]):  # a step that counts nothing
            return Text()
        speed = task.finished_speed or task.speed
        rate = f"  {amount(speed)}/s" if speed and done else ""
        return Text(f"{amount(done)}{of} {task.fields['unit']}".rstrip() + rate)


@contextlib.contextmanager
def bar(title: str, total: int | None, amount: Callable[[float], str], unit: str) -> Iterator[Callable[[int], None]]:
    """Show a bar during the block. Yields a callback that takes the amount done since its last call.

    `amount` returns an amount as text, `unit` follows it.
    """
    with _LOCK:
        display = _OPEN[0] if _OPEN else _display()
        _OPEN.append(display)
        task = display.add_task(title, total=total, amount=amount, unit=unit, of=total)
    try:
        yield lambda step: display.advance(task, step)
        done = display.tasks[task].completed
        # The bar ends full, also if the total was unknown or nothing was done; the amount is the real one.
        display.update(task, total=done or 1, completed=done or 1, done=done)
    finally:
        with _LOCK:
            _OPEN.remove(display)
            if not _OPEN:
                display.stop()


def _display() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Amount(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    display = Progress(*columns, console=RichConsole(stderr=True))
    display.start()
    return display
