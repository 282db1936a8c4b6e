"""The journal of a run that changes a store: what it is doing, what it made, how to go back.

One file per run, `journal_<UTC>_<id>_<command>.jsonl`, a JSON object a line, fsynced before the step it announces.
Only names found in a journal are ever removed from a server; a journal without a closing line is open.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from shlex import quote
from typing import IO, Any

from lib.errors import BadFile
from lib.files import readable_bytes, sync_dir

CLOSED = "closed"
# In the names of backup sets and runs: how it is written, and what it looks like.
STAMP_FORMAT, STAMP = "%Y%m%d_%H%M%S", r"[0-9]{8}_[0-9]{6}"
_SECOND = timedelta(seconds=1)
_RUN_ID = re.compile(rf"{STAMP}_[0-9a-f]{{4}}")
# Facts that are removed from a server or read as a file, and what a run of these scripts can have written there.
_TEMPORARY = {"staged_collection", "side", "temporary_collection", "throwaway_graph", "safety_graph"}
_ENDING = r"__(?:next|(?:check|try|pre)_[0-9a-f_]+)"
_FILES = {
    "manifest": rf"backup_{STAMP}\.json",
    "stamp": STAMP,
    "snapshot": r"[^/\\]+",
}
_TEXTS = {*_TEMPORARY, *_FILES, "collection", "undo"} - {"stamp"}  # a model's stamp is a dict


def _ends_torn(stream: IO[bytes]) -> bool:
    """Whether a crash cut the last line: the next entry must not be glued to it."""
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) != b"\n"


@dataclass
class Journal:
    """The entries of one run; `append` writes and fsyncs one."""

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def run_id(self) -> str:
        """The run's own id, part of every name it makes on a server."""
        return str(self.entries[0]["run_id"])

    @property
    def command(self) -> str:
        """The command that opened it."""
        return str(self.entries[0]["command"])

    @property
    def targets(self) -> list[str]:
        """What the run works on: addresses with names."""
        return list(self.entries[0]["targets"])

    @property
    def phase(self) -> str:
        """The last phase that was announced."""
        return str(self.entries[-1]["phase"])

    @property
    def is_open(self) -> bool:
        """Whether the run never came to its end."""
        return self.phase != CLOSED

    @property
    def age_hours(self) -> float:
        """Hours since the last entry."""
        last = datetime.fromisoformat(str(self.entries[-1]["at"]))
        return (datetime.now(timezone.utc) - last).total_seconds() / 3600

    @property
    def undo(self) -> str:
        """The latest way back, as commands."""
        found = [entry["undo"] for entry in self.entries if entry.get("undo")]
        return str(found[-1]) if found else ""

    def fact(self, name: str) -> Any:
        """The latest value of a fact, or None."""
        for entry in reversed(self.entries):
            if name in entry:
                return entry[name]
        return None

    def has_reached(self, phase: str) -> bool:
        """Whether `phase` was ever announced."""
        return any(entry["phase"] == phase for entry in self.entries)

    def append(self, phase: str, **facts: object) -> None:
        """Announce `phase` with its facts; on disk when this returns."""
        entry = {"at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "phase": phase, **facts}
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        with self.path.open("ab+") as stream:
            if stream.tell() and _ends_torn(stream):
                line = "\n" + line
            stream.write(line.encode())
            stream.flush()
            self.entries.append(entry)  # now, since a signal may come into what takes long
            os.fsync(stream.fileno())

    def close(self, outcome: str) -> None:
        """The run came to its end; nothing is left to go on from."""
        self.append(CLOSED, outcome=outcome)


def start_journal(folder: Path, command: str, targets: list[str], **facts: object) -> Journal:
    """Open a journal before the first name is made on a server."""
    run_id = f"{_next_stamp(folder)}_{secrets.token_hex(2)}"
    path = folder / f"journal_{run_id}_{command}.jsonl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.close(descriptor)
    sync_dir(folder)
    journal = Journal(path)
    journal.append("started", run_id=run_id, command=command, targets=targets, **facts)
    return journal


def _next_stamp(folder: Path) -> str:
    """Now, or a second after the newest journal: what is asked for as the last run is, also if the clock went back."""
    possible = [datetime.now(timezone.utc)]
    for path in folder.glob("journal_*.jsonl"):
        with contextlib.suppress(ValueError, OverflowError):
            stamp = "_".join(path.name.split("_")[1:3])
            possible.append(datetime.strptime(f"{stamp}+0000", f"{STAMP_FORMAT}%z") + _SECOND)
    return max(possible).strftime(STAMP_FORMAT)


def read_journal(path: Path) -> Journal | None:
    """A journal from disk; a last line cut by a crash is passed over, an empty or foreign file is None.

    Raises BadFile for one with a name in it that no run of these scripts can have written: it came from elsewhere.
    """
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
    for fault in _misshapen(entries) or _forged(journal):
        raise BadFile(
            f"{path} was not written by these scripts: {fault}. Nothing is removed or restored by it",
            next_step=f"see where it comes from, then move it out of the backup folder:  mv {quote(str(path))} /tmp/",
        )
    return journal


def _misshapen(entries: list[dict[str, Any]]) -> list[str]:
    """What holds another kind of value than a run writes."""
    first = entries[0]
    found = [name for name in ("run_id", "command") if not isinstance(first[name], str)]
    if not isinstance(first["targets"], list) or not all(isinstance(one, str) for one in first["targets"]):
        found.append("targets")
    for entry in entries:
        at = entry.get("at")
        try:
            known = isinstance(at, str) and datetime.fromisoformat(at).tzinfo is not None
        except ValueError:
            known = False
        found += ["at"] if not known else []
        found += ["phase"] if not isinstance(entry["phase"], str) else []
        found += [name for name in _TEXTS & entry.keys() if not isinstance(entry[name], str | None)]
    return [f"its {name} is none that a run writes" for name in dict.fromkeys(found)]


def _forged(journal: Journal) -> Iterator[str]:
    """What no run can have written: its id, its targets, or a name that is to be removed or read."""
    if not _RUN_ID.fullmatch(journal.run_id):
        yield f"its run id is {journal.run_id!r}"
    own = [str(target).split(" ", 2)[-1] for target in journal.targets]
    temporary = re.compile("|".join(rf"(?:{re.escape(one)}|\{{{re.escape(one)}\}}){_ENDING}" for one in own))
    for entry in journal.entries:
        for fact, value in entry.items():
            if not isinstance(value, str):
                continue
            if fact in _TEMPORARY and not temporary.fullmatch(value):
                yield f"it names {value!r} as its {fact.replace('_', ' ')}"
            if fact in _FILES and not re.fullmatch(_FILES[fact], value):
                yield f"it names {value!r} as its {fact}"
            if fact == "collection" and value not in own and not temporary.fullmatch(value):
                yield f"it names {value!r} as the collection of its snapshot"


def open_journals(folder: Path) -> list[Journal]:
    """The runs that never came to their end, oldest first."""
    return unfinished(folder)[0]


def unfinished(folder: Path) -> tuple[list[Journal], list[Path]]:
    """The runs that never came to their end, and the files that may be of one: they hold something and do not read."""
    found = {path: read_journal(path) for path in sorted(folder.glob("journal_*.jsonl"))}
    return (
        [journal for journal in found.values() if journal is not None and journal.is_open],
        [path for path, journal in found.items() if journal is None and path.stat().st_size],
    )
