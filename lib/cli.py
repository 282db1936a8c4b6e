"""The command line: common flags, the error boundary, signals. Imports nothing heavy."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from lib.console import command_line, pasteable, remember_flags, show_held
from lib.errors import (
    INTERRUPTED,
    USAGE,
    DimensionMismatch,
    MigrationError,
    UsageProblem,
    escaped,
    is_utf8,
    not_utf8,
    one_line,
)
from lib.network import without_logins

EXIT_CODES = """\
exit codes:
  0 done   1 failed, nothing lost   2 bad usage, configuration, a dimension mismatch, or the guard refused
  3 done, but something listed remains   4 verification failed   5 another run holds the lock
  6 the provider refused, progress kept   130 interrupted, run the same command again"""

# Titles of groups of flags.
SAFE, DESTRUCTIVE = "flags that change no data", "flags that change or delete data"
_ROOT = shlex.quote(str(Path(__file__).resolve().parent.parent))
INSTALL = (
    f"make -C {_ROOT} venv && source {_ROOT}/.venv/bin/activate\n"
    "or, into this Python:\npython -m pip install -r requirements.txt"
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OBJECTS = 100_000  # new ones before Python looks for cycles: rows and points are many lists, and have none
_NO_TEMPORARY = "No usable temporary directory"  # the words of Python's tempfile, which tries to write into several
_CLEANING_UP = b"\ncleaning up, a few seconds; a third Ctrl-C ends it at once, and the next run cleans up\n"


class Parser(argparse.ArgumentParser):
    """Reports bad usage like other errors. Abbreviated flags are refused, because a later flag could break them."""

    def __init__(self, description: str, *examples: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False)
        commands = [pasteable(f"  python scripts/{self.prog} {words}\n") for words in examples]
        self.epilog = "".join(["examples:\n", *commands, "\n", EXIT_CODES])
        self.add_argument("--version", action="version", version=f"automem-migration {_version()}")
        self._as_json = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but refuse empty and repeated values."""
        # What the caller closed (`2>&-`): print would use stdout instead, and a file of ours its number.
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                opened = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - until the process ends
                setattr(sys, name, opened)
        words = list(sys.argv[1:] if args is None else args)
        self._as_json = "--json" in words
        self._refuse_words(words)
        remember_flags(None, None)
        parsed = super().parse_known_args(words, namespace)
        remember_flags(getattr(parsed[0], "env_file", None), getattr(parsed[0], "backup_dir", None))
        return parsed

    def _refuse_words(self, words: list[str]) -> None:
        """Refuse what an unset shell variable between quotes leaves, and a flag that is given twice.

        Both would silently mean something else: argparse drops the first value of such a flag.
        """
        for before, word in zip(["", *words], words, strict=False):
            flag, equals, value = word.partition("=")
            if not word.strip():
                self.error(f"{before if before.startswith('-') else 'an argument'} is empty: is a variable unset?")
            if re.search("[\x00-\x1f\x7f]", word) or not is_utf8(word):
                # As the name of a file it would be repeated in messages, where it could forge a line, and in journals.
                what = "a control character" if is_utf8(word) else f"bytes that are {not_utf8()}"
                self.error(f"an argument has {what}: {one_line(word)!r}")
            if word.startswith("-") and equals and not value.strip():
                self.error(f"{flag} is empty: is a variable unset?")
        flags = {one for action in self._actions if action.nargs != 0 for one in action.option_strings}
        given = [word.partition("=")[0] for word in words if word.startswith("-")]
        for flag in sorted(flags):
            if given.count(flag) > 1:
                self.error(f"{flag} is given {given.count(flag)} times, but accepts one value: run once for each")

    def error(self, message: str) -> NoReturn:
        """Report bad usage, with the flags that the unknown ones resemble, and exit with code 2."""
        import difflib

        message, step = without_logins(message), ""  # it repeats the arguments, which may hold a URL with a login
        for word in re.findall(r"(?<!\S)--[\w-]+", message) if message.startswith("unrecognized") else []:
            for flag in difflib.get_close_matches(word, self._option_string_actions, 1):
                step += f"did you mean {flag}?\n"
        step += f"python scripts/{self.prog} --help"
        _report(UsageProblem(message, next_step=step), as_json=self._as_json)
        raise SystemExit(USAGE)


def _version() -> str:
    """Return the version of this checkout. It is not an installed package, and Python 3.10 cannot read TOML."""
    with contextlib.suppress(OSError):  # a copy of scripts/ and lib/ alone works too
        text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        if found := re.search(r'^version = "(.+)"$', text, re.MULTILINE):
            return found[1]
    return "unknown"


def parser(description: str, *examples: str) -> Parser:
    """Make a parser with the flags that every command has. --help shows the `examples` of its arguments."""
    made = Parser(description, *examples)
    add = made.add_argument_group("common").add_argument
    add("--json", action="store_true", help="one JSON document on stdout, nothing else")
    add("-q", "--quiet", action="store_true", help="no progress, only the result and errors")
    add("-v", "--verbose", action="store_true", help="also each setting, and where it came from")
    add("--show-config", action="store_true", help="print each setting, where it came from, and the live state")
    add("--env-file", metavar="PATH", help="a .env to read first, such as AutoMem's own")
    add("--backup-dir", metavar="PATH", help="where backups live (default: backups/ here)")
    return made


def positive(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")


def dollars(text: str) -> float:
    """An argument type: an amount of money."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not an amount in US dollars")


def given(args: argparse.Namespace, flags: Iterable[str]) -> dict[str, Any]:
    """Return those of these flags that are given, with their values."""
    values = {flag: getattr(args, flag.lstrip("-").replace("-", "_")) for flag in flags}
    return {flag: value for flag, value in values.items() if value is not None and value is not False}


def require_with(args: argparse.Namespace, flag: str, other: str) -> None:
    """Raise UsageProblem if `flag` is given without `other`."""
    found = given(args, [flag, other])
    if list(found) == [flag]:
        # --cleanup deletes: the command that is pasted only shows what it would delete.
        again = f"python scripts/{Path(sys.argv[0]).name} {other} {flag} {found[flag]} --dry-run"
        raise UsageProblem(f"{flag} requires {other}", next_step=again)


def refuse_together(args: argparse.Namespace, *flags: str) -> None:
    """Raise UsageProblem if more than one of these flags is given."""
    found = list(given(args, flags))
    if len(found) > 1:
        raise UsageProblem(f"{' and '.join(found)} do not go together", next_step=f"give one of {', '.join(found)}")


def _handle_signals() -> None:
    """Install a handler: the first signal ends the run, the second one lets it clean up, a third ends the cleanup."""
    seen = 0

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            with contextlib.suppress(OSError):
                os.write(2, _CLEANING_UP)  # print may be what was interrupted
            return
        raise KeyboardInterrupt  # also for SIGTERM and a terminal that closed, so that everything is cleaned up

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, stop)


def _report(error: MigrationError, *, as_json: bool) -> None:
    name = "ValueError" if isinstance(error, DimensionMismatch) else "error"
    text, step = pasteable(str(error)), pasteable(error.next_step)
    with contextlib.suppress(OSError):  # its disk may be full: the reason is to be on stderr all the same
        if as_json:
            print(json.dumps({"error": text, "next": step, "exit_code": error.exit_code}))
        sys.stdout.flush()
    with contextlib.suppress(OSError):  # the terminal may have closed
        print(f"{name}: {escaped(text)}", file=sys.stderr)
        if step:
            print("\nnext:\n  " + escaped(step).replace("\n", "\n  "), file=sys.stderr)


def _machine_error(error: OSError | UnicodeEncodeError) -> MigrationError | None:
    """Return the error for what this machine refuses, or None if it is a bug or a lost reader."""
    from lib.files import FULL_DISK

    if isinstance(error, UnicodeEncodeError):
        if sys.getfilesystemencoding() == "utf-8":
            return None
        return UsageProblem(f"a name is {not_utf8()}: {error.object}", next_step="export PYTHONUTF8=1")
    where = str(error.filename or "the backup folder or the folder for temporary files")
    if error.errno in FULL_DISK:
        return MigrationError(f"no room left for {where}: {error.strerror}", next_step="free some room:\ndf -h")
    if str(error.strerror).startswith(_NO_TEMPORARY):
        text = f"no room left for temporary files, or they cannot be written: {error.strerror}"
        step = "free some room:\ndf -h\nor name a folder on another disk:\nexport TMPDIR=..."
        return MigrationError(text, next_step=step)
    if error.filename is None or isinstance(error, ConnectionError):
        return None
    # An unfinished file is removed already.
    shown = Path(where) if os.path.lexists(where) else Path(where).parent
    return MigrationError(f"{where}: {error.strerror}", next_step=f"ls -ld {shlex.quote(str(shown))}")


def _boundary(command: Callable[[], int], *, as_json: bool) -> int:
    try:
        return command()
    except MigrationError as error:
        known = error
    except KeyboardInterrupt:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # everything is cleaned up; only the message is missing
        again = command_line(Path(sys.argv[0]).stem, sys.argv[1:])
        known = MigrationError("interrupted", next_step=f"run the same command again: it resumes\n{again}")
        known.exit_code = INTERRUPTED
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in {"", "lib"}:
            raise
        known = UsageProblem(f"the Python package '{package}' is not installed here", next_step=INSTALL)
    except (OSError, UnicodeEncodeError) as error:
        if (of_machine := _machine_error(error)) is None:
            raise  # a bug, or a lost reader
        known = of_machine
    _report(known, as_json=as_json)
    with contextlib.suppress(OSError):
        show_held()
    return known.exit_code


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of a bug, escaped: it may hold texts of others, or an address with its login."""
    import traceback

    sys.stderr.write(escaped(without_logins("".join(traceback.format_exception(kind, error, trace)))))


def run(command: Callable[[], int], *, as_json: bool = False) -> int:
    """Run a command. Known errors become one message and an exit code; bugs keep their traceback."""
    _handle_signals()
    gc.set_threshold(_OBJECTS)
    sys.excepthook = _show_bug
    streams = [one for one in (sys.stdout, sys.stderr) if isinstance(one, io.TextIOWrapper)]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # for a terminal that cannot show every character
    code = INTERRUPTED
    with contextlib.suppress(BrokenPipeError):
        code = _boundary(command, as_json=as_json)
    for stream in streams:
        with contextlib.suppress(ValueError):
            try:
                stream.flush()
            except OSError:  # its reader has left (head, less, a terminal): the interpreter's last flush must not fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code
