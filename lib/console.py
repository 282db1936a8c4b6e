"""What the operator sees: progress on stderr, the result on stdout; printed commands as a shell takes them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lib.errors import escaped, one_line
from lib.network import without_login

_ROOT = Path(__file__).resolve().parent.parent
_COMMAND = re.compile(r"(?<![\w/])python scripts/(\w+\.py)")
_CARRIED = ("--env-file", "--backup-dir")
_flags: list[str] = []
_T = TypeVar("_T")


def remember_flags(env_file: str | None, backup_dir: str | None) -> None:
    """Note what every printed command of this process needs, as it was typed."""
    given = zip(_CARRIED, (env_file, backup_dir), strict=True)
    _flags[:] = [word for flag, value in given if value for word in (flag, value)]


def command_line(script: str, words: Sequence[str]) -> str:
    """The command line of `script` with these words, without the carried flags and the logins of URLs."""
    kept, skip = [], False
    for word in words:
        if skip or word.split("=", 1)[0] in _CARRIED:
            skip = word in _CARRIED
        else:
            kept.append(without_login(word) if "://" in word else word)
    return shlex.join(["python", f"scripts/{script}.py", *kept])


def pasteable(value: _T) -> _T:
    """The value with every command in its texts as a shell takes it here; lists and dicts are gone through."""
    if isinstance(value, str):
        return _COMMAND.sub(_here, value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {key: pasteable(one) for key, one in value.items()}  # type: ignore[return-value]
    if isinstance(value, list):
        return [pasteable(one) for one in value]  # type: ignore[return-value]
    return value


def _here(found: re.Match[str]) -> str:
    script = _ROOT / "scripts" / found[1]
    shown = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return shlex.join([_interpreter(), str(shown), *_flags])


def _interpreter() -> str:
    """`python` if that is the interpreter that runs now, in its own environment; else its path."""
    found = shutil.which("python")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "python"
    return sys.executable if os.sep in sys.executable else "python"


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
            from lib.progress_bars import bar

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
