"""The command line's edge: common flags, the error boundary, signals. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from types import FrameType

from lib.errors import INTERRUPTED, DimensionMismatch, MigrationError

EXIT_CODES = """\
exit codes:
  0 done   1 failed, nothing lost   2 bad usage, configuration, a dimension mismatch, or the guard refused
  3 done, but something listed remains   4 verification failed   5 another run holds the lock
  6 the provider refused, progress kept   130 interrupted, run the same command again"""


class Terminated(KeyboardInterrupt):
    """SIGTERM: leaves by the same road as Ctrl-C, so that nothing stays half done."""


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every command has."""
    made = argparse.ArgumentParser(
        description=description, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = made.add_argument_group("common")
    common.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress, only the result and errors")
    common.add_argument("-v", "--verbose", action="store_true", help="every step on stderr")
    common.add_argument(
        "--show-config",
        action="store_true",
        help="print each setting, where it came from, and the live state",
    )
    common.add_argument("--env-file", metavar="PATH", help="a .env to read first, such as AutoMem's own")
    common.add_argument("--backup-dir", metavar="PATH", help="where backups live (default: backups/ here)")
    return made


def positive(text: str) -> int:
    """An argument type: a whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _report(error: MigrationError, *, as_json: bool) -> None:
    if as_json:
        document = {"error": str(error), "next": error.next_step, "exit_code": error.exit_code}
        print(json.dumps(document, ensure_ascii=False))
    name = "ValueError" if isinstance(error, DimensionMismatch) else "error"
    sys.stdout.flush()
    print(f"{name}: {error}", file=sys.stderr)
    if error.next_step:
        print("\nnext:\n  " + error.next_step.replace("\n", "\n  "), file=sys.stderr)


def run(command: Callable[[], int], *, as_json: bool = False) -> int:
    """Run a command and turn known errors into one message and an exit code; bugs keep their traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return command()
    except MigrationError as error:
        _report(error, as_json=as_json)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again, it goes on where it was", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout left (head, less): nothing to tell it any more.
        sys.stderr.close()
        return INTERRUPTED
