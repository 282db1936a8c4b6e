"""The journal of a run that changes a store: its phases, the names it created on servers, and how to undo it.

One file per run: `journal_<UTC>_<id>_<command>.jsonl`, one JSON object per line, fsynced before the step that it
announces. Only names found in a journal are ever removed from a server. A journal without a closing line is open.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from shlex import quote, split
from typing import Any

import msgspec

from lib.errors import BadFile
from lib.files import readable_bytes, require_readable, sync_dir

CLOSED = "closed"
# In the names of backup sets and runs: the format of strftime, and the pattern that matches it.
STAMP_FORMAT, STAMP = "%Y%m%d_%H%M%S", r"[0-9]{8}_[0-9]{6}"
_TEMPORARY = ("staged_collection", "side", "temporary_collection", "throwaway_graph", "safety_graph")
_PATTERNS = {
    "run_id": rf"{STAMP}_[0-9a-f]{{4}}",
    "manifest": rf"backup_{STAMP}\.json",
    "stamp": STAMP,  # of a set; a model's stamp is a dict
    "snapshot": r"[^/\\]+",
}
_ENDING = r"__(?:next|(?:check|try|pre)_[0-9a-f_]+)"


# The fields of an entry that every version writes, or that name something to remove or to read, with their types.
# No msgspec.Meta: it crashes the interpreter at exit (https://github.com/msgspec/msgspec/issues/717).
_NAMES = ("undo", "collection", "manifest", "snapshot", *_TEMPORARY)
_FIELDS: list[Any] = [("at", datetime), ("phase", str), *((name, str | None, None) for name in _NAMES)]
_STAMP = ("stamp", str | dict[str, Any] | None, None)  # of a set, or the model and size in a collection
_Entry = msgspec.defstruct("_Entry", [*_FIELDS, _STAMP])
_FirstEntry = msgspec.defstruct(
    "_FirstEntry", [("run_id", str), ("command", str), ("targets", list[str])], bases=(_Entry,), kw_only=True
)


@dataclass
class Journal:
    """The entries of one run; `append` writes and fsyncs one."""

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The backup folder of the run."""
        return self.path.parent

    @property
    def run_id(self) -> str:
        """The run's id, part of every name that it creates on a server."""
        return str(self.entries[0]["run_id"])

    @property
    def command(self) -> str:
        """The command that opened the journal."""
        return str(self.entries[0]["command"])

    @property
    def targets(self) -> list[str]:
        """The addresses and names of the graph and the collection."""
        return list(self.entries[0]["targets"])

    @property
    def phase(self) -> str:
        """The phase of the last entry."""
        return str(self.entries[-1]["phase"])

    @property
    def is_open(self) -> bool:
        """Whether the run has not finished."""
        return self.phase != CLOSED

    @property
    def age_hours(self) -> float:
        """Hours since the last entry."""
        last = datetime.fromisoformat(str(self.entries[-1]["at"]))
        return (datetime.now(timezone.utc) - last).total_seconds() / 3600

    @property
    def undo(self) -> str:
        """The latest commands that undo the run. If the backup folder was moved, they name its files where they are."""
        found = [str(entry["undo"]) for entry in self.entries if entry.get("undo")]
        return "\n".join(_where_it_is(line, self.folder) for line in found[-1].split("\n")) if found else ""

    def fact(self, name: str) -> Any:
        """Return the latest value of a fact, or None."""
        for entry in reversed(self.entries):
            if name in entry:
                return entry[name]
        return None

    def has_reached(self, *phases: str) -> bool:
        """Return whether one of `phases` has been entered."""
        return any(entry["phase"] in phases for entry in self.entries)

    def times(self, phase: str) -> list[datetime]:
        """Return when the run entered `phase`, each time."""
        return [datetime.fromisoformat(str(entry["at"])) for entry in self.entries if entry["phase"] == phase]

    def append(self, phase: str, **facts: object) -> None:
        """Write an entry; it is on the disk when this returns."""
        entry = {"at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "phase": phase, **facts}
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        with self.path.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else f"\n{line}"  # a crash cut the last entry
            stream.write(line.encode())
            stream.flush()
            self.entries.append(entry)  # before fsync, which a signal may interrupt
            os.fsync(stream.fileno())

    def close(self, outcome: str) -> None:
        """Write the closing entry: the run has finished, there is nothing to resume."""
        self.append(CLOSED, outcome=outcome)


def _where_it_is(line: str, folder: Path) -> str:
    """Return a command with the path of a backup that is missing, but exists in `folder` under the same name."""
    command, restore, file = line.partition("restore_from_backup.py ")
    with contextlib.suppress(ValueError):  # no words of a shell
        old = Path("".join(split(file)[:1]))
        now = (folder.absolute() / one / old.name for one in ("", old.parent.name))
        if restore and not old.exists() and (moved := next(filter(Path.is_file, now), None)):
            return f"{command}{restore}{quote(str(moved))}"
    return line


def start_journal(folder: Path, command: str, targets: list[str], **facts: object) -> Journal:
    """Create a journal. Call it before the first name is created on a server."""
    possible = [datetime.now(timezone.utc)]
    for path in folder.glob("journal_*.jsonl"):  # run ids stay in order if the clock goes back
        with contextlib.suppress(ValueError, OverflowError):
            stamp = "_".join(path.name.split("_")[1:3])
            possible.append(datetime.strptime(f"{stamp}+0000", f"{STAMP_FORMAT}%z") + timedelta(seconds=1))
    run_id = f"{max(possible).strftime(STAMP_FORMAT)}_{secrets.token_hex(2)}"
    path = folder / f"journal_{run_id}_{command}.jsonl"
    path.touch(mode=0o600, exist_ok=False)
    sync_dir(folder)
    journal = Journal(path)
    journal.append("started", run_id=run_id, command=command, targets=targets, **facts)
    return journal


def read_journal(path: Path) -> Journal | None:
    """Read a journal; None if empty or foreign. Raises BadFile for what no run of these scripts can have written."""
    entries = []
    for line in readable_bytes(path).split(b"\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and "phase" in entry:
            entries.append(entry)
    if not entries or not entries[0].keys() >= {"run_id", "command", "targets"}:
        return None
    journal = Journal(path, entries)
    for fault in _faults(journal):
        raise BadFile(
            f"{path} was not written by these scripts: {fault}. Nothing is removed or restored by it",
            next_step=f"find out where it is from, then move it out of the backup folder:\nmv {quote(str(path))} /tmp/",
        )
    return journal


def _faults(journal: Journal) -> Iterator[str]:
    """Yield what no run can have written: a field of another type, or a name that another program gave."""
    for entry in journal.entries:
        try:
            typed: Any = msgspec.convert(entry, _FirstEntry if entry is journal.entries[0] else _Entry)
        except msgspec.ValidationError as error:
            yield f"an entry is not valid: {error}"
            return
        if typed.at.tzinfo is None:
            yield f"the time {entry['at']!r} has no time zone"
    own = names_in(journal.targets)
    temporary = "|".join(rf"(?:{re.escape(one)}|\{{{re.escape(one)}\}}){_ENDING}" for one in own)
    collection = "|".join([*map(re.escape, own), temporary])
    patterns = {**_PATTERNS, **dict.fromkeys(_TEMPORARY, temporary), "collection": collection}
    for entry in journal.entries:
        for name, pattern in patterns.items():
            if isinstance(entry.get(name), str) and not re.fullmatch(pattern, entry[name]):
                yield f"it names {entry[name]!r} as its {name.replace('_', ' ')}"


def names_in(targets: Sequence[str]) -> list[str]:
    """Return the names of the graph and the collection. A target is kind, address and name, which may hold blanks."""
    return [target.split(" ", 2)[-1] for target in targets]


def read_journals(folder: Path, command: str = "") -> dict[Path, Journal | None]:
    """Return the files that are named as journals, oldest first, each with what `read_journal` returns.

    A program that synchronizes the folder may leave an older state of a journal under another name. Of the files of one
    run only the longest counts, since a journal is only appended to.
    """
    pattern = f"journal_*_{command}*.jsonl" if command else "journal_*.jsonl"
    found = {path: read_journal(path) for path in sorted(folder.glob(pattern))}
    longest: dict[str, Journal] = {}
    for journal in filter(None, found.values()):
        longest[journal.run_id] = max(longest.get(journal.run_id, journal), journal, key=_length)
    return {path: one for path, one in found.items() if one is None or one is longest[one.run_id]}


def _length(journal: Journal) -> tuple[int, bool]:
    return len(journal.entries), journal.path.name == f"journal_{journal.run_id}_{journal.command}.jsonl"


def journals(folder: Path, command: str = "") -> Iterator[Journal]:
    """Yield the journals in the folder, of finished runs, too; the newest first. `command`: only those of this one."""
    for journal in reversed(read_journals(folder, command).values()):
        if journal:
            yield journal


def open_journals(folder: Path, targets: list[str] | None = None, *commands: str) -> list[Journal]:
    """Return the journals of unfinished runs, oldest first; only those of `targets` and `commands` if given."""
    found = unfinished(folder)[0]
    return [one for one in found if targets in (None, one.targets) and (not commands or one.command in commands)]


def unfinished(folder: Path) -> tuple[list[Journal], list[Path]]:
    """Return the journals of unfinished runs, and the non-empty files that cannot be read as a journal.

    Raises UsageProblem if this user may not list the folder.
    """
    require_readable(folder)
    found = read_journals(folder)
    return (
        [journal for journal in found.values() if journal is not None and journal.is_open],
        [path for path, journal in found.items() if journal is None and path.stat().st_size],
    )
