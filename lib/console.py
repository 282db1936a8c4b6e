"""Output for the operator: progress on stderr, the result on stdout, commands that a shell can run as printed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lib.concurrency import Progress
from lib.errors import MigrationError, escaped, one_line
from lib.network import without_password

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_ROOT = Path(__file__).resolve().parent.parent
_COMMAND = re.compile(r"(?<![\w/])python ((?:-m pip install )?(?:-r )?)((?:scripts/\w+\.py|requirements\S*\.txt)?)")
_CARRIED = ("--env-file", "--backup-dir")
_PLAIN_SECONDS = 5.0
_WAITING_SECONDS, _QUIET_SECONDS = 10.0, 300.0
_flags: list[str] = []
_HELD: list[str] = []
_LOCK = threading.Lock()
_OPEN: list[RichProgress] = []  # the display, once for each open bar of any thread: rich allows only one
_T = TypeVar("_T")


def remember_flags(env_file: str | None, backup_dir: str | None) -> None:
    """Save the flags that every command which this process prints needs."""
    given = zip(_CARRIED, (env_file, backup_dir), strict=True)
    _flags[:] = [word for flag, value in given if value for word in (flag, value)]


def age_text(hours: float) -> str:
    """Return an age in the largest unit that it fills: minutes, hours or days."""
    count, unit = max(0, round(hours * 60)), "minute"
    if count >= 60:
        count, unit = (round(hours), "hour") if hours < 48 else (round(hours / 24), "day")
    return f"{count} {unit}{'' if count == 1 else 's'}"


def command_line(script: str, words: Sequence[str]) -> str:
    """Return the command line of `script` with these words, without the saved flags and the passwords of URLs."""
    shown, skip = [], False
    for word in words:
        if skip or word.split("=", 1)[0] in _CARRIED:
            skip = word in _CARRIED
        else:
            shown.append(without_password(word) if "://" in word else word)
    return shlex.join(["python", f"scripts/{script}.py", *shown])


def pasteable(value: _T) -> _T:
    """Return the value with each command in its texts as a shell can run it here; also within lists and dicts."""
    if isinstance(value, str):
        return _COMMAND.sub(_here, value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {key: pasteable(one) for key, one in value.items()}  # type: ignore[return-value]
    if isinstance(value, list):
        return [pasteable(one) for one in value]  # type: ignore[return-value]
    return value


def _here(found: re.Match[str]) -> str:
    options, name = found.groups()
    if not options and not name:
        return found[0]
    python = shutil.which("python")
    is_this_one = python and Path(python).parent == Path(sys.executable).parent
    words = ["python" if is_this_one or os.sep not in sys.executable else sys.executable, *options.split()]
    if name:
        file = _ROOT / name
        with contextlib.suppress(ValueError, OSError):  # it is not below the working directory, or that was removed
            file = file.relative_to(Path.cwd())
        words.append(str(file))
    return shlex.join([*words, *(_flags if name.startswith("scripts/") else [])]) + (" " if not name else "")


def size_text(count: float) -> str:
    """Return a number of bytes as text, such as 1.5 MB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def hold(warning: str) -> None:
    """Print a warning before the next output. It waits, since stderr must start with a dimension mismatch."""
    _HELD.append(warning)


def show_held() -> None:
    """Print the warnings that `hold` was given."""
    held, _HELD[:] = _HELD[:], []
    for text in held:
        print(f"warning: {escaped(pasteable(text))}", file=sys.stderr, flush=True)


@dataclass
class Console:
    """The output of one command. With `as_json`, stdout gets one JSON document and nothing else."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    _waiting_at: float = field(default=-math.inf, repr=False)

    def say(self, text: str) -> None:
        """Print a step on stderr, unless quiet."""
        if self.quiet:
            show_held()
        else:
            self.notice(text)

    def notice(self, text: str) -> None:
        """Print on stderr, also when quiet, such as what the operator needs before something is destroyed."""
        show_held()
        print(escaped(pasteable(text)), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning, also when quiet."""
        self.notice(f"warning: {text}")

    def waiting(self, text: str) -> None:
        """Print why the run waits, at most every ten seconds, or every five minutes when quiet."""
        now, pause = time.monotonic(), _QUIET_SECONDS if self.quiet else _WAITING_SECONDS
        if now - self._waiting_at >= pause:
            self._waiting_at = now
            self.notice(text)

    def detail(self, text: str) -> None:
        """Print a step if --verbose is set."""
        if self.verbose:
            self.say(text)

    @contextlib.contextmanager
    def progress(self, title: str, total: int | None, unit: str = "") -> Iterator[Progress]:
        """Show a bar on a terminal, else plain lines. Yields a callback for the amount done since its last call."""
        show_held()
        title = one_line(title)
        if self.quiet:
            yield lambda _step: None
        else:
            amount = size_text if unit == "bytes" else "{:,.0f}".format
            show = bar if sys.stderr.isatty() else _plain
            with show(title, total, amount, "" if unit == "bytes" else unit) as advance:
                yield advance

    def result(self, document: Mapping[str, object], text: str) -> None:
        """Print the result on stdout. If its reader has left, the command does not fail."""
        show_held()
        shown = json.dumps(pasteable(dict(document)), default=_as_json) if self.as_json else escaped(pasteable(text))
        try:
            if shown:
                print(shown, flush=True)
        except BrokenPipeError:
            pass
        except OSError as error:
            message = f"done, but the result could not be written to stdout: {error.strerror}"
            raise MigrationError(message, next_step="free some room there:\ndf -h") from error


def _as_json(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a result")


@contextlib.contextmanager
def _plain(title: str, total: int | None, amount: Callable[[float], str], unit: str) -> Iterator[Progress]:
    """Print a line every five seconds, and one at the end."""
    started = shown = time.monotonic()
    done = 0

    def advance(step: int) -> None:
        nonlocal done, shown
        done += step
        now = time.monotonic()
        if now - shown >= _PLAIN_SECONDS:
            shown = now
            of = f" of {amount(total)}" if total else ""
            print(f"{title}: {amount(done)}{of} ({amount(done / (now - started))}/s)", file=sys.stderr, flush=True)

    yield advance
    seconds = max(time.monotonic() - started, 1e-6)
    what = f": {seconds:.1f} s"
    if done:  # no "0 B (0 B/s)" for a step that moved nothing
        what = f": {f'{amount(done)} {unit}'.rstrip()} in {seconds:.1f} s ({amount(done / seconds)}/s)"
    print(title + what, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(title: str, total: int | None, amount: Callable[[float], str], unit: str) -> Iterator[Progress]:
    """Show a bar on the terminal. Yields a callback as `Console.progress`; `amount` returns an amount as text."""
    with _LOCK:
        display = _OPEN[0] if _OPEN else _display()
        _OPEN.append(display)
        number = display.add_task(title, total=total, text="")
    task = display.tasks[number]

    def shown(done: float) -> str:
        of, speed = f"/{amount(total)}" if total else "", task.finished_speed or task.speed
        rate = f"  {amount(speed)}/s" if speed and done else ""
        return f"{amount(done)}{of} {unit}".rstrip() + rate

    def advance(step: int) -> None:
        display.advance(number, step)
        display.update(number, text=shown(task.completed))

    try:
        advance(0)
        yield advance
        done = task.completed
        # The bar ends full, also if the total was unknown or nothing was done; the amount is the real one.
        display.update(number, total=done or 1, completed=done or 1)
        display.update(number, text=shown(done) if done or total or unit else "")
    finally:
        with _LOCK:
            _OPEN.remove(display)
            if not _OPEN:
                display.stop()


def _display() -> RichProgress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    display = Progress(*columns, console=RichConsole(stderr=True))
    display.start()
    return display


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Return a plain table. The line below the last header is only as long: it would wrap in a narrow terminal."""
    cells = [[str(cell) for cell in row] for row in ([header, *rows] if header else rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    if header:
        lines.insert(1, "  ".join("-" * width for width in [*widths[:-1], len(header[-1])]))
    return "\n".join(lines)
