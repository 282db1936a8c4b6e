"""Errors, each with a next step and an exit code; and how foreign texts are escaped in messages."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

DONE, FAILED, USAGE = 0, 1, 2
REMAINING, VERIFICATION_FAILED, LOCKED, PROVIDER_REFUSED = 3, 4, 5, 6
INTERRUPTED = 130

_LOOK_AT_LOG = "look at the server's log, then run the same command again"


class MigrationError(Exception):
    """A known failure: the message names the thing and the cause, `next_step` what to do now (default: `usual_step`).

    Each line of a next step is a command to paste or a sentence; no line is both.
    """

    exit_code = FAILED
    usual_step = ""

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.next_step = next_step or self.usual_step


class UsageProblem(MigrationError):
    """Bad arguments, configuration or files: nothing was touched."""

    exit_code = USAGE


class ConfigError(UsageProblem):
    """All faults of the configuration."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(
            f"the configuration has {count}:\n{lines}",
            next_step="correct this, then look at all settings:\npython scripts/backup_automem.py --show-config",
        )


class DimensionMismatch(UsageProblem, ValueError):
    """The collection's size is not the configured VECTOR_SIZE."""


class GuardRefused(UsageProblem):
    """A destructive step without a verified backup."""


class BadFile(UsageProblem):
    """A FILE argument that is missing, empty, a directory or of an unknown kind."""

    usual_step = "name another file:\npython scripts/backup_automem.py --list"


class AccessRefused(UsageProblem):
    """A wrong password, key or permission."""


class StoreUnreachable(MigrationError):
    """A server does not answer at its address."""

    usual_step = _LOOK_AT_LOG


class StoreFailed(MigrationError):
    """A server answered with an error."""

    usual_step = _LOOK_AT_LOG


class MissingData(MigrationError):
    """The graph or the collection that is to be read does not exist."""

    usual_step = "check the names and the addresses:\npython scripts/backup_automem.py --show-config"


class BackupDamaged(MigrationError):
    """A backup file is damaged: its checksum, structure or counts are wrong."""

    exit_code = VERIFICATION_FAILED
    usual_step = "use another backup:\npython scripts/backup_automem.py --list"


class VerificationFailed(MigrationError):
    """The content of a store differs from what is expected."""

    exit_code = VERIFICATION_FAILED


class LockHeld(MigrationError):
    """Another run works on the same target."""

    exit_code = LOCKED
    usual_step = "wait until it has ended, then run the same command again"


class ProviderRefused(MigrationError):
    """The embeddings provider refused (key, quota, credit), or did not answer in time."""

    exit_code = PROVIDER_REFUSED


# Control characters but tab and newline, marks that change the direction of text, other line ends, surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_BREAKS = str.maketrans({"\n": "\\n", "\t": "\\t"})


def escaped(text: str) -> str:
    """Return the text with each unsafe character as its escape sequence; its lines stay."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def is_utf8(text: str) -> bool:
    """Whether an argument or a setting was UTF-8; Python holds any other byte of it as a surrogate."""
    return not re.search("[\ud800-\udfff]", text)


def not_utf8() -> str:
    """Why a text is not `is_utf8`: because of its bytes, or of the locale, by whose encoding Python reads them."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return "not UTF-8"
    return f"not {encoding}, the encoding of this locale; `export PYTHONUTF8=1` makes that UTF-8"


def one_line(text: str) -> str:
    """Return the text as `escaped`, on one line: for foreign names, ids and errors within a message."""
    return escaped(text).translate(_BREAKS)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean ...?)` with the one of `known` that resembles `word`, else an empty text."""
    import difflib

    near = difflib.get_close_matches(word, list(known), 1, 0.9)
    return f" (did you mean {near[0]}?)" if near else ""


def listed(texts: Iterable[object]) -> str:
    """Return foreign names or ids as one text, with commas between them."""
    return ", ".join(one_line(str(one)) for one in texts)
