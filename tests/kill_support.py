"""A script that is killed (SIGKILL) at one exact place: before or after a journal entry, or after a call returned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.operator_support import ROOT, Operator

# Where to die is told in KILL_AT: "before PHASE", "after PHASE", or "called MODULE.FUNCTION".
_RUNNER = """
import importlib, os, runpy, signal, sys
sys.path.insert(0, {root!r})
when, place = os.environ["KILL_AT"].split(" ", 1)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if when == "called":
    module, name = place.rsplit(".", 1)
    module = importlib.import_module(module)
    real = getattr(module, name)
    def call(*words, **named):
        real(*words, **named)
        die()
    setattr(module, name, call)
else:
    from lib.journal import Journal
    append = Journal.append
    def announce(self, phase, **facts):
        if phase == place and when == "before":
            die()
        append(self, phase, **facts)
        if phase == place:
            die()
    Journal.append = announce
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_killed(operator: Operator, where: str, script: str, *words: str) -> str:
    """Run the script until it kills itself at `where`; returns what it said. Fails where it never came there."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _RUNNER.format(root=str(ROOT)),
            str(ROOT / "scripts" / f"{script}.py"),
            *words,
        ],
        cwd=operator.folder,
        env={**operator.environ, "KILL_AT": where},
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


def kill(process: subprocess.Popen[str]) -> bool:
    """SIGKILL; whether the process was still running."""
    running = process.poll() is None
    if running:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    return running and process.returncode == -signal.SIGKILL
