"""What the operator sees: progress on stderr, the result on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib.pasteable import pasteable
from lib.shown import escaped, one_line

Progress = Callable[[int], None]
_PLAIN_SECONDS = 5.0
_WAITING_SECONDS, _QUIET_SECONDS = 10.0, 300.0


def size_text(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


_HELD: list[str] = []


def hold(warning: str) -> None:
    """A warning that is printed before whatever is shown next; only a dimension mismatch comes before it."""
    _HELD.append(warning)


def show_held() -> None:
    """Print the warnings that are held."""
    held, _HELD[:] = _HELD[:], []
    for text in held:
        print(f"warning: {escaped(pasteable(text))}", file=sys.stderr, flush=True)


@dataclass
class Console:
    """One command's voice. With `as_json`, stdout carries one JSON document and nothing else."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    _waiting_at: float = field(default=-math.inf, repr=False)

    def say(self, text: str) -> None:
        """A step, on stderr."""
        if self.quiet:
            show_held()
        else:
            self.notice(text)

    def notice(self, text: str) -> None:
        """What the operator must have before something is destroyed: printed also when quiet, on stderr."""
        show_held()
        print(escaped(pasteable(text)), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Something the operator must see, also when quiet."""
        self.notice(f"warning: {text}")

    def waiting(self, text: str) -> None:
        """Why nothing moves: at most every ten seconds; when quiet, a line every five minutes."""
        now, pause = time.monotonic(), _QUIET_SECONDS if self.quiet else _WAITING_SECONDS
        if now - self._waiting_at >= pause:
            self._waiting_at = now
            self.notice(text)

    def detail(self, text: str) -> None:
        """A step that only --verbose shows."""
        if self.verbose:
            self.say(text)

    @contextlib.contextmanager
    def progress(self, title: str, total: int | None, unit: str = "") -> Iterator[Progress]:
        """A callback that takes what was done since the last call; bars on a terminal, plain lines otherwise."""
        show_held()
        title = one_line(title)
        if self.quiet:
            yield lambda _step: None
        elif sys.stderr.isatty():
            from lib.live_bars import bar

            with bar(title, total, _amounts(unit), "" if unit == "bytes" else unit) as advance:
                yield advance
        else:
            with _plain(title, total, unit) as advance:
                yield advance

    def result(self, document: Mapping[str, object], text: str) -> None:
        """The outcome, last, on stdout. Where its reader has left, what was done is done all the same."""
        show_held()
        shown = (
            json.dumps(pasteable(dict(document)), default=_as_json)
            if self.as_json
            else escaped(pasteable(text))
        )
        with contextlib.suppress(BrokenPipeError):
            if shown:
                print(shown, flush=True)


def _amounts(unit: str) -> Callable[[float], str]:
    return size_text if unit == "bytes" else lambda count: f"{count:,.0f}"


def _as_json(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a result")


@contextlib.contextmanager
def _plain(title: str, total: int | None, unit: str) -> Iterator[Progress]:
    started = shown = time.monotonic()
    done, amount = 0, _amounts(unit)

    def advance(step: int) -> None:
        nonlocal done, shown
        done += step
        now = time.monotonic()
        if now - shown >= _PLAIN_SECONDS:
            shown = now
            of = f" of {amount(total)}" if total else ""
            print(
                f"{title}: {amount(done)}{of} ({amount(done / (now - started))}/s)",
                file=sys.stderr,
                flush=True,
            )

    yield advance
    seconds = max(time.monotonic() - started, 1e-6)
    word = "" if unit == "bytes" else f" {unit}"
    what = (
        f": {amount(done)}{word} in {seconds:.1f} s ({amount(done / seconds)}/s)"
        if unit and done  # "0 B (0 B/s)" of a step that moved nothing tells nothing
        else f": {seconds:.1f} s"
    )
    print(title + what, file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Columns as wide as their widest cell; plain text that survives a pipe."""
    cells = [
        [str(cell) for cell in row] for row in ([header] if header else []) + [list(row) for row in rows]
    ]
    if not cells:
        return ""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
