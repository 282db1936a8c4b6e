"""`.env` files: which are read, what each line sets, and the faults that hide in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lib.errors import UsageProblem


@dataclass(frozen=True)
class Setting:
    """One value (out of reprs, it may be a secret) and where it came from."""

    value: str = field(repr=False)
    origin: str


def env_files(env_file: str | None, environ: Mapping[str, str], cwd: Path, root: Path) -> list[Path]:
    """The files that are read, first wins; raises UsageProblem where a named one is missing."""
    named = env_file or environ.get("AUTOMEM_ENV_FILE")
    home = Path(environ.get("HOME") or Path.home())
    found = [cwd / ".env", root / ".env", home / ".config" / "automem" / ".env"]
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            flag = "--env-file" if env_file else "AUTOMEM_ENV_FILE"
            raise UsageProblem(f"{flag} names {path}, which is no file", next_step=f"ls -l {path.parent}")
        found.insert(0, path)
    return list(dict.fromkeys(path.absolute() for path in found if path.is_file()))


def _glued(path: Path, known: Mapping[str, str]) -> list[str]:
    """Lines that hold a second assignment: what `echo ... >> .env` makes of a file without a final newline."""
    names = "|".join(sorted(known, key=len, reverse=True))
    pattern = re.compile(rf"^\s*(?:export\s+)?(\w+?)=(?!.*\s#).*?({names})=")
    faults = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        found = pattern.match(line)
        if found:
            faults.append(
                f"{path}:{number}: the line of {found[1]} also holds {found[2]}= (the file had no final newline"
                f" when {found[2]} was appended): put {found[2]} on a line of its own"
            )
    return faults


def _line_numbers(path: Path) -> dict[str, int]:
    """Where each variable is set; the last line wins."""
    from dotenv.parser import parse_stream

    with path.open(encoding="utf-8", errors="replace") as stream:
        return {one.key: one.original.line for one in parse_stream(stream) if one.key}


def _read_file(path: Path, known: Mapping[str, str], faults: list[str]) -> dict[str, Setting]:
    from dotenv import dotenv_values

    try:
        faults += _glued(path, known)
        lines = _line_numbers(path)
        values = dotenv_values(path)
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{path} cannot be read: {error}")
        return {}
    return {name: Setting(value, f"{path}:{lines.get(name, '?')}") for name, value in values.items() if value}


def read_settings(
    environ: Mapping[str, str], defaults: Mapping[str, str], env_file: str | None, cwd: Path, root: Path
) -> tuple[dict[str, Setting], list[str]]:
    """Every setting by precedence, and the faults found in the files."""
    faults: list[str] = []
    sources = [{name: Setting(value, "environment") for name, value in environ.items() if value}]
    sources += [_read_file(path, defaults, faults) for path in env_files(env_file, environ, cwd, root)]
    settings = {}
    for name, default in defaults.items():
        found = [source[name] for source in sources if name in source]
        settings[name] = found[0] if found else Setting(default, "default")
    return settings, faults
