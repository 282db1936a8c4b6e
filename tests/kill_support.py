"""A script that is killed (SIGKILL), or held for a signal, at exact places: at a journal entry, at a call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lib.journal import open_journals
from tests.operator_support import ROOT, Operator

# How often each window of a kill matrix is hit; `make faults` sets it.
KILLS_EACH = int(os.environ.get("KILLS_EACH", "1"))
assert KILLS_EACH > 0, "KILLS_EACH is how often each window is hit: a number from 1 on"

# Places: "before PHASE", "after PHASE", "entering MODULE.FUNCTION", "called MODULE.FUNCTION", joined by "; ".
_RUNNER = """
import importlib, os, runpy, signal, sys, time
sys.path.insert(0, {root!r})

def stop(number):
    held = os.environ.get("HELD")
    if not held:
        os.kill(os.getpid(), signal.SIGKILL)
    open(held + "." + str(number), "w").close()
    for _ in range(30_000):  # ten minutes; a signal's exception leaves from here
        if os.path.exists(held + ".go." + str(number)):
            return
        time.sleep(0.02)

def at_call(number, when, place):
    module, name = place.rsplit(".", 1)
    module = importlib.import_module(module)
    real = getattr(module, name)
    def call(*words, **named):
        if when == "entering":
            stop(number)
        answer = real(*words, **named)
        if when == "called":
            stop(number)
        return answer
    setattr(module, name, call)

def at_entry(number, when, place):
    from lib.journal import Journal
    append = Journal.append
    def announce(self, phase, **facts):
        if phase == place and when == "before":
            stop(number)
        append(self, phase, **facts)
        if phase == place and when == "after":
            stop(number)
    Journal.append = announce

for number, where in enumerate(os.environ["STOP_AT"].split("; ")):
    when, place = where.split(" ", 1)
    (at_call if when in ("called", "entering") else at_entry)(number, when, place)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _command(script: str, words: tuple[str, ...]) -> list[str]:
    program = _RUNNER.format(root=str(ROOT))
    return [sys.executable, "-c", program, str(ROOT / "scripts" / f"{script}.py"), *words]


def run_killed(operator: Operator, where: str, script: str, *words: str) -> str:
    """Run the script until it kills itself at `where`; returns what it said. Fails where it never came there."""
    done = subprocess.run(
        _command(script, words),
        cwd=operator.folder,
        env={**operator.environ, "STOP_AT": where},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, (
        f"{where}: exit {done.returncode}\n{done.stderr}\n{done.stdout}"
    )
    return done.stderr


@dataclass
class Held:
    """A script that stands still wherever it comes to one of its places, for a signal to take it from there."""

    process: subprocess.Popen[str]
    marker: Path

    def stands_at(self, number: int = 0) -> bool:
        """Whether it has come to this place."""
        return self.marker.with_name(f"{self.marker.name}.{number}").exists()

    def go_on(self, number: int = 0) -> None:
        """Let it go on from this place, where no exception took it away already."""
        self.marker.with_name(f"{self.marker.name}.go.{number}").touch()


def start_held(operator: Operator, where: str, script: str, *words: str, nohup: bool = False) -> Held:
    """Start the script; it stands still at each of the places."""
    marker = operator.folder / "held"
    for old in operator.folder.glob("held.*"):
        old.unlink()
    process = subprocess.Popen(
        [*(["nohup"] if nohup else []), *_command(script, words)],
        cwd=operator.folder,
        env={**operator.environ, "STOP_AT": where, "HELD": str(marker)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Held(process, marker)


def kill(process: subprocess.Popen[str]) -> bool:
    """SIGKILL; whether the process was still running."""
    running = process.poll() is None
    if running:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    return running and process.returncode == -signal.SIGKILL


def left_by_kill(operator: Operator) -> str:
    """What stands there after a kill: the journal's last word, and the collections."""
    journals = open_journals(operator.backups)
    names = [name.removeprefix(operator.collection) or "live" for name in operator.collections()]
    return f"{journals[-1].phase if journals else 'no journal'}: {'+'.join(names) or 'no collection'}"
