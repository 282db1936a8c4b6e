"""`.env` files: which are read, what each line sets, and the faults in them."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

from lib.files import NotRegular, read_regular, trusted_owners

DEFAULT = "default"
_LARGEST, _NO_ENV = 256 << 10, "it is not a .env: too large, or not text"
# Programs that are run: only the environment and the checkout's own .env may name them.
_PROGRAMS = ("FALKORDB_SCRATCH_SERVER", "FALKORDB_SCRATCH_MODULE")
# Names of AutoMem, of the tests and of other programs that resemble a setting.
_OTHERS = {"AUTOMEM_ENV_FILE", "QDRANT_TEST_URL", "QDRANT_TEST_SERVER", "FALKORDB_TEST_URL"}
_OTHERS |= {"OPENAI_API_KEYS", "OLLAMA_MODELS"}
_RESEMBLANCE = 0.9  # VECTOR_SZE and VECTOR_SIZE: 0.95; QDRANT_GRPC_PORT and QDRANT_PORT: 0.81


@dataclass(frozen=True)
class Setting:
    """One value (not in reprs: it may be a secret), its origin, and the values that it takes precedence over, in order.

    `automem`: AutoMem reads the file, too.
    """

    value: str = field(repr=False)
    origin: str
    hidden: tuple[Setting, ...] = field(default=(), repr=False)
    automem: bool = field(default=False, repr=False)

    @property
    def place(self) -> str:
        """The origin, as part of a sentence."""
        return "the environment" if self.origin == "environment" else self.origin


def env_files(
    env_file: str | None, environ: Mapping[str, str], cwd: Path, root: Path, faults: list[str]
) -> dict[Path, bool]:
    """Return the files to read, by precedence, and whether AutoMem reads each. A named file that is missing is a fault.

    AutoMem reads the named file, `~/.config/automem/.env`, and a `.env` that is a link: the guide links its file.
    """
    found = [cwd / ".env", root / ".env"]
    own = {path.absolute() for path in found if not path.is_symlink()}
    home = environ.get("HOME")
    if home:
        path = Path(home) / ".config" / "automem" / ".env"
        found.append(path)
        try:
            path.stat()
        except PermissionError as error:
            found.remove(path)
            faults.append(
                f"{path} cannot be read: {error.strerror}. HOME is {home}: if that is another user's home,"
                " export HOME=$(getent passwd $(id -u) | cut -d: -f6)"
            )
        except OSError:  # it is missing
            pass
    named = env_file or environ.get("AUTOMEM_ENV_FILE")
    if named:
        path = Path(home, named[2:]) if home and named.startswith("~/") else cwd / named
        found.insert(0, path)
        own.discard(path.absolute())
        if not path.is_file():
            flag = "--env-file" if env_file else "AUTOMEM_ENV_FILE"
            faults.append(f"{flag} names {path}, which is not a file")
    faults += [
        f"{path} is a link to {path.readlink()}, which does not exist: link it again or remove it"
        for path in dict.fromkeys(path.absolute() for path in found)
        if path.is_symlink() and not path.exists()
    ]
    files = dict.fromkeys(path.absolute() for path in found if path.is_file())
    return {path: path not in own for path in files}


def _glued(path: Path, lines: list[str], known: Mapping[str, str]) -> dict[int, str]:
    """Return a fault by line for an assignment inside another: `echo ... >> .env` to a file without a final newline."""
    names = "|".join(sorted(known, key=len, reverse=True))
    in_value = re.compile(rf"\s*(?:export\s+)?(\w+?)=(?:(?!\s#).)*?({names})=")
    # A comment may mention the names. Only a name that follows a word without a blank was appended.
    in_comment = re.compile(rf"(?:\s*|.*\s)(#).*[a-z0-9.]({names})=")
    faults = {}
    for number, line in enumerate(lines, 1):
        found = in_value.match(line) or in_comment.match(line)
        if found:
            what, name = "the comment" if found[1] == "#" else f"the line of {found[1]}", found[2]
            faults[number] = (
                f"{path}:{number}: {what} also holds {name}= (the file had no final newline when {name} was appended):"
                f" put {name} on a separate line"
            )
    return faults


def _misspelt(sources: list[dict[str, Setting]], known: Mapping[str, str]) -> list[str]:
    """Return a warning for each name that looks like a misspelt setting, without its value."""
    import difflib

    found = {}
    for source in sources:
        for name, setting in source.items():
            if name in known or name in _OTHERS or not setting.value:
                continue
            near = difflib.get_close_matches(name.upper(), known, 1, _RESEMBLANCE)
            if near:
                found[name] = f"{name} ({setting.origin}) is not a setting and has no effect: did you mean {near[0]}?"
    return list(found.values())


def _trusted_text(path: Path, faults: list[str]) -> tuple[str, int]:
    """Return the text of a file and the user id of its owner; no text, and a fault, if another user could write it.

    Such a file could name the addresses that keys are sent to.
    """
    try:
        data, state = read_regular(path, _LARGEST)
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{path} cannot be read: {_NO_ENV if isinstance(error, NotRegular) else error}")
        return "", 0
    owners = [path.lstat().st_uid, state.st_uid]  # of a link, and of its target
    strangers = [one for one in owners if one not in trusted_owners()]
    if strangers:
        faults.append(
            f"{path} belongs to another user (uid {strangers[0]}), who could have your keys sent elsewhere:"
            f" remove it, or sudo chown $(id -un) {quote(str(path))}"
        )
    elif state.st_mode & stat.S_IWOTH:
        faults.append(f"{path} may be written by every user of this machine: chmod o-w {quote(str(path))}")
    elif "\0" in text:
        faults.append(f"{path} cannot be read: {_NO_ENV}")
    else:
        return text, state.st_uid
    return "", state.st_uid


def _read_file(
    path: Path, known: Mapping[str, str], root: Path, environ: Mapping[str, str], faults: list[str], *, automem: bool
) -> dict[str, Setting]:
    """Return what a file sets: of duplicate lines the last one, and of AutoMem's files empty values, too."""
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream

    text, owner = _trusted_text(path, faults)
    glued = _glued(path, text.splitlines(), known)
    faults += glued.values()
    good, lines = "", {}
    for one in parse_stream(io.StringIO(text)):
        source = one.original.string
        line = one.original.line + source[: len(source) - len(source.lstrip())].count("\n")
        if not one.error:
            good += source
            lines[one.key] = line
        elif line not in glued and any(name in source for name in known):
            faults.append(f"{path}:{line}: this line is not an assignment (NAME=value)")
    values = dotenv_values(stream=io.StringIO(good))
    own = (root / ".env").absolute()
    faults += [
        f"{path}:{lines[name]}: {name} names a program to run: set it in the environment or in {own}"
        for name in _PROGRAMS
        if values.get(name) and path != own
    ]
    faults += [
        f"{path}:{lines[name]}: {name} uses ${{{used}}} of your environment, and the file is another user's (uid"
        f" {owner}): write the value out, or set {name} in the environment"
        for name, used in (_interpolated(good, environ) if owner != os.geteuid() else [])
    ]
    return {
        name: Setting(value, f"{path}:{lines[name]}", automem=automem)
        for name, value in values.items()
        if value or (automem and value is not None)
    }


def _interpolated(text: str, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (setting, variable) for each use of the environment: a key there could become part of an address."""
    from dotenv import dotenv_values

    written = dotenv_values(stream=io.StringIO(text), interpolate=False)
    used = [(name, one) for name, value in written.items() for one in re.findall(r"\$\{([^}:]*)", value or "")]
    return [(name, one) for name, one in used if one in environ]


def read_settings(
    environ: Mapping[str, str], defaults: Mapping[str, str], env_file: str | None, cwd: Path, root: Path
) -> tuple[dict[str, Setting], list[str], list[str]]:
    """Return every setting by precedence, the faults found in the files, and the warnings."""
    faults: list[str] = []
    sources = [{name: Setting(value, "environment") for name, value in environ.items() if value}]
    files = env_files(env_file, environ, cwd, root, faults)
    sources += [_read_file(path, defaults, root, environ, faults, automem=shared) for path, shared in files.items()]
    settings, warnings = {}, list[str]()
    for name, default in defaults.items():
        found = [source[name] for source in sources if name in source]
        # An empty value in one of AutoMem's files hides that of a later one, as it does for AutoMem.
        empty = next((one for one in found if one.automem and not one.value), None)
        without = [one for one in found[found.index(empty) + 1 :] if one.automem and one.value] if empty else []
        if empty and without:
            why = f"it is empty in {empty.origin}, which is read first"
            warnings.append(f"{name} ({without[0].origin}) has no effect, as in AutoMem: {why}")
        found = [one for one in found if one.value and one not in without]
        settings[name] = replace(found[0], hidden=tuple(found[1:])) if found else Setting(default, DEFAULT)
    return settings, faults, [*_misspelt(sources, defaults), *warnings]
