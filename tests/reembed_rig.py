"""A migration that is stopped, or killed, at one exact request: the windows by name, and an operator behind a gate."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import requests

from lib.backup.phases import (
    CREATED,
    DELETED,
    DELETING,
    DROPPING_STAGED,
    READ,
    RESTORING_STAGED,
    SNAPSHOT_MADE,
    STAGED,
    STAGED_RESTORED,
    STAGING,
)
from lib.journal import Journal, open_journals, read_journal
from tests.gate import CancelToken, Gate
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, SMALL
from tests.reembed_support import Points, assert_migrated, points_of, settings, upgrade
from tests.script_process import ScriptProcess

MODELS = {OLD_SIZE: SMALL, NEW_SIZE: LARGE}
MEMORIES = 540  # three batches of points
WORKERS, BATCH = 2, 20
COMMAND = ("--workers", str(WORKERS), "--batch-size", str(BATCH))
LIVE, NEXT = "^/collections/{live}$", "^/collections/{live}__next$"
READING, STAGED_READING = "/{live}/points/scroll", "/{live}__next/points/scroll"
POINTS, STAGED_POINTS = r"/{live}/points\?wait", r"/{live}__next/points\?wait"
INDEX, STAGED_INDEX = "/{live}/index", "/{live}__next/index"
SNAPSHOTS, PROBE, RECOVER = (
    "/{live}__next/snapshots",
    "/{live}__next_probe/snapshots/recover",
    "/{live}/snapshots/recover",
)
ALIASES = "/collections/aliases"

# (method, path, phases of the journal, nth request of that kind, has the server carried it out?); a phase counts
# once this start has announced something.
STAGED_WINDOWS = {
    "staging announced, nothing made": ("PUT", NEXT, (STAGING,), 1, False),
    "staged collection there, no index yet": ("PUT", NEXT, (STAGING,), 1, True),
    "before its second index": ("PUT", STAGED_INDEX, (STAGING,), 2, False),
    "live payloads read, not yet noted": ("POST", READING, (STAGING,), 1, True),
    "before the first staged batch": ("PUT", STAGED_POINTS, (READ,), 1, False),
    "first batch staged": ("PUT", STAGED_POINTS, (READ,), 1, True),
    "last batch staged": ("PUT", STAGED_POINTS, (READ,), 2, True),
    "all staged, no vector index yet": ("PATCH", NEXT, (READ,), 1, False),
    "the vector index begun": ("PATCH", NEXT, (READ,), 1, True),
    "all staged, being verified": ("POST", STAGED_READING, (READ,), 3, False),
    "verified, no snapshot yet": ("POST", SNAPSHOTS, (STAGED,), 1, False),
    "snapshot made, not yet noted": ("POST", SNAPSHOTS, (STAGED,), 1, True),
    "before the method is verified": ("PUT", PROBE, (SNAPSHOT_MADE,), 1, False),
    "method verified": ("PUT", PROBE, (SNAPSHOT_MADE,), 1, True),
    "before the guard's last look": ("POST", READING, (SNAPSHOT_MADE,), 1, False),
    "payloads read again, not yet noted": ("POST", READING, (SNAPSHOT_MADE,), 2, True),
    "delete announced, not sent": ("DELETE", LIVE, (DELETING,), 1, False),
    "deleted, not yet noted": ("DELETE", LIVE, (DELETING,), 1, True),
    "deleted and noted": ("PUT", RECOVER, (RESTORING_STAGED,), 1, False),
    "in place, not yet noted": ("PUT", RECOVER, (RESTORING_STAGED,), 1, True),
}
# From here on a start that resumes announces nothing until all is verified.
END_WINDOWS = {
    "before the aliases": ("POST", ALIASES, (RESTORING_STAGED, STAGED_RESTORED, CREATED), 1, False),
    "aliases there": ("POST", ALIASES, (RESTORING_STAGED, STAGED_RESTORED, CREATED), 1, True),
    "before the stamp": ("PATCH", LIVE, (RESTORING_STAGED, STAGED_RESTORED, CREATED), 1, False),
    "stamped, not yet noted": ("PATCH", LIVE, (RESTORING_STAGED, STAGED_RESTORED, CREATED), 1, True),
}
TIDY_WINDOWS = {
    "before the snapshot's end": ("DELETE", SNAPSHOTS, (DROPPING_STAGED,), 1, False),
    "snapshot deleted": ("DELETE", SNAPSHOTS, (DROPPING_STAGED,), 1, True),
    "before the staged one's end": ("DELETE", NEXT, (DROPPING_STAGED,), 1, False),
    "staged one deleted, not yet noted": ("DELETE", NEXT, (DROPPING_STAGED,), 1, True),
}
# With --in-place. A run that resumes finds no collection: nothing is noted before it is recreated.
GONE = (DELETING, DELETED)
IN_PLACE_WINDOWS = {
    "in place: before the guard's last look": ("POST", READING, ("started",), 1, False),
    "in place: payloads read, not yet noted": ("POST", READING, ("started",), 2, True),
    "in place: delete announced, not sent": ("DELETE", LIVE, (DELETING,), 1, False),
    "in place: deleted, not yet noted": ("DELETE", LIVE, (DELETING,), 1, True),
    "in place: deleted and noted": ("PUT", LIVE, GONE, 1, False),
    "in place: created, no index yet": ("PUT", LIVE, GONE, 1, True),
    "in place: before the second index": ("PUT", INDEX, GONE, 2, False),
    "in place: all indexes there, not yet noted": ("PUT", INDEX, GONE, 2, True),
    "in place: created and noted": ("PUT", POINTS, (CREATED,), 1, False),
    "in place: first batch in": ("PUT", POINTS, (CREATED,), 1, True),
    "in place: second batch in": ("PUT", POINTS, (CREATED,), 2, True),
    **{f"in place: {name}": window for name, window in END_WINDOWS.items()},
}
DEFAULT_WINDOWS = {**STAGED_WINDOWS, **END_WINDOWS, **TIDY_WINDOWS}
WINDOWS = {**DEFAULT_WINDOWS, **IN_PLACE_WINDOWS}
ANNOUNCED_AGAIN = STAGED_WINDOWS.keys() | TIDY_WINDOWS.keys()


class Rig:
    """An operator behind a gate, ready to upgrade; records the initial state."""

    def __init__(self, operator, gate: Gate) -> None:
        self.operator, self.gate = operator, gate
        self.words: tuple[str, ...] = COMMAND
        self.noted: tuple[Path | None, int] = (None, 0)
        self.size = NEW_SIZE
        operator.load(MEMORIES)
        aliases = [{"create_alias": {"collection_name": operator.collection, "alias_name": self.alias}}]
        requests.post(f"{operator.servers.qdrant_url}/collections/aliases", json={"actions": aliases}, timeout=60)
        operator.export(QDRANT_URL=gate.url)
        operator.run("backup_automem", "--only", "qdrant")
        self.before: Points = points_of(operator)
        self.settings = settings(operator)
        upgrade(operator)
        operator.servers.openai.reset()

    @property
    def alias(self) -> str:
        return f"{self.operator.collection}_alias"

    def journal(self) -> Journal | None:
        newest = max(self.operator.backups.glob("journal_*_reembed.jsonl"), default=None)
        return read_journal(newest) if newest else None

    def phase(self) -> str | None:
        journal = self.journal()
        return journal.phase if journal else None

    def start(self) -> ScriptProcess:
        self.noted = self.entries()
        return self.operator.start("reembed_embeddings", *self.words)

    def entries(self) -> tuple[Path | None, int]:
        """The newest journal, and how much is in it."""
        journal = self.journal()
        return (journal.path, len(journal.entries)) if journal else (None, 0)

    def turn(self) -> None:
        """The migration is done: the next one goes in the opposite direction."""
        self.operator.run("backup_automem", "--only", "qdrant")
        self.size = OLD_SIZE if self.size == NEW_SIZE else NEW_SIZE
        self.operator.export(VECTOR_SIZE=self.size, EMBEDDING_MODEL=MODELS[self.size])

    def kill_when(self, reached: Callable[[], bool], how: int = signal.SIGKILL) -> int:
        """Start the command, end it once `reached`; its exit code."""
        process = self.start()
        while process.poll() is None and not reached():
            time.sleep(0.002)
        process.send_signal(how)
        _, errors = process.communicate(timeout=300)
        assert "Traceback" not in errors, errors
        return process.returncode

    def kill_at(self, window: str, how: int = signal.SIGKILL) -> int:
        stop = self.stop_at(window)
        code = self.kill_when(stop.reached.is_set, how)
        assert stop.reached.is_set(), f"{window}: never reached"
        self.gate.open()
        return code

    def stop_at(self, window: str) -> CancelToken:
        method, path, phases, nth, carried_out = WINDOWS[window]

        def there() -> bool:
            return self.phase() in phases and (window not in ANNOUNCED_AGAIN or self.entries() != self.noted)

        path = path.format(live=self.operator.collection)
        self.gate.stops.append(CancelToken(method, path, nth, carried_out, alone=True, when=there))
        return self.gate.stops[-1]

    def finish(self) -> Points:
        """The same command once more; then everything must be as after an undisturbed run."""
        self.operator.run("reembed_embeddings", *self.words)
        after = assert_migrated(self.operator, self.before, model=MODELS[self.size], size=self.size)
        assert settings(self.operator) == self.settings
        assert self.operator.call("GET", "/snapshots") == []
        assert self.operator.collections() == [self.operator.collection]
        assert open_journals(self.operator.backups) == []
        return after

    def paid_twice(self) -> int:
        return int(self.operator.servers.openai.stats()["paid_twice"])
