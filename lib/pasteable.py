"""Commands in messages, as a shell takes them: from where the script was started, with the flags that it was given.

Messages, journals and reports hold commands in one form, `python scripts/<name>.py ...`. What is shown passes through
`pasteable`, which puts in the interpreter, the path of the script, `--env-file` and `--backup-dir`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lib.addresses import without_login

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
