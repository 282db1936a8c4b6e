"""A script that is killed (SIGKILL), or held for a signal, at exact places: at a journal entry, at a call."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from lib.journal import open_journals
from tests.operator_support import Operator
from tests.restore_support import wait_for
from tests.script_process import ScriptProcess

# How often each window of a kill matrix is hit: `KILLS_EACH=5 make faults`.
KILLS_EACH = int(os.environ.get("KILLS_EACH", "1"))
assert KILLS_EACH > 0, "KILLS_EACH is how often each window is hit: a number from 1 on"

# Places at which a script may be stopped, in addition to its journal entries: a name, and the call that it means.
HOOKS = {
    "scratch server started": "lib.clients.falkordb.scratch._start",
    "scratch server loading": "lib.clients.falkordb.scratch._loaded",
    "scratch graph counted": "lib.backup.graph.counts",
    "RDB streamed": "lib.backup.graph.stream_rdb",
    "RDB file written": "lib.backup.graph._write_rdb",
    "graph taken": "lib.backup.run.take_graph",
    "snapshot downloaded": "lib.clients.qdrant.snapshots.download",
    "snapshot deleted": "lib.clients.qdrant.snapshots.delete",
    "segments opened": "lib.backup.collection._count_points",
    "collection taken": "lib.backup.run.take_collection",
    "drift counted": "lib.backup.run._drift",
    "manifest written": "lib.backup.run.write_manifest",
    "unfinished files removed": "lib.backup.run.remove_unfinished",
    "graph accepted": "lib.restore.graph.verify_acceptance",
    "copy uploaded": "lib.restore.collection.upload_and_restore",
    "points written": "lib.restore.automem_backup.upsert",
    "snapshot of the points made": "lib.clients.qdrant.snapshots.can_fetch_itself",
    "own address found": "lib.restore.collection.can_fetch_itself",
    "live collection deleted": "lib.restore.collection.delete_collection",
    "copy recovered": "lib.restore.collection.recover",
    "aliases written": "lib.restore.collection.restore_aliases",
    "graph swapped in": "lib.restore.graph.swap_in",
    "graph renamed and restored": "lib.clients.falkordb.swap._rename_and_restore",
    "old graph compared": "lib.restore.run.only_restored",
    "old graph dropped": "lib.restore.graph.command",
    "AutoMem's graph read": "lib.restore.automem_backup.read_graph",
    "AutoMem's graph loaded": "lib.restore.automem_backup.read_loaded",
    "AutoMem's points read": "lib.restore.automem_backup.read_points_apart",
    "trial's collection created": "lib.restore.automem_backup.create_like",
    "spot check's collection made": "lib.reembed.quality.create_like",
    "spot check's points written": "lib.reembed.quality.sync_collection",
    "spot check compared": "lib.reembed.quality.compare_sample",
    "spot check's collection deleted": "lib.reembed.quality.delete_collection",
}
# Places: "before PHASE", "after PHASE" (of the journal), "entering HOOK", "called HOOK", joined by "; ".
_PRELUDE = """
import importlib, os, signal, time

def stop(number):
    if not HELD:
        os.kill(os.getpid(), signal.SIGKILL)
    open(HELD + "." + str(number), "w").close()
    for _ in range(30_000):  # ten minutes; a signal's exception leaves from here
        if os.path.exists(HELD + ".go." + str(number)):
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

for number, where in enumerate(PLACES.split("; ")):
    when, place = where.split(" ", 1)
    if when in ("called", "entering"):
        at_call(number, when, HOOKS[place])
    else:
        at_entry(number, when, place)
if NOHUP:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
"""


def prelude(where: str, held: Path | None = None, *, nohup: bool = False) -> str:
    named = {"PLACES": where, "HOOKS": HOOKS, "HELD": str(held or ""), "NOHUP": nohup}
    return "".join(f"{name} = {value!r}\n" for name, value in named.items()) + _PRELUDE


def run_killed(operator: Operator, where: str, script: str, *words: str) -> str:
    """Run the script until it kills itself at `where`; returns its output. Fails if it never came there."""
    process = operator.start(script, *words, prelude=prelude(where))
    out, err = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, f"{where}: exit {process.returncode}\n{err}\n{out}"
    return err


@dataclass
class Held:
    """A script that is held at each of its places, until a signal ends it there or the test lets it go."""

    process: ScriptProcess
    marker: Path

    def is_held_at(self, number: int = 0) -> bool:
        """Whether it has come to this place."""
        return self.marker.with_name(f"{self.marker.name}.{number}").exists()

    def release(self, number: int = 0) -> None:
        """Let it continue from this place, if no exception ended it already."""
        self.marker.with_name(f"{self.marker.name}.go.{number}").touch()


def start_held(operator: Operator, where: str, script: str, *words: str, nohup: bool = False) -> Held:
    """Start the script; it is held at each of the places."""
    marker = operator.folder / "held"
    for old in operator.folder.glob("held.*"):
        old.unlink()
    process = operator.start(script, *words, prelude=prelude(where, marker, nohup=nohup))
    return Held(process, marker)


def standing(held: Held, number: int = 0) -> ScriptProcess:
    """The process, once it is held at the place."""
    assert wait_for(lambda: held.is_held_at(number) or held.process.poll() is not None)
    assert held.process.poll() is None, held.process.communicate()
    return held.process


def ctrl_c(operator: Operator, where: str, script: str, *words: str) -> str:
    """Send one SIGINT when the script comes to `where`: it ends with 130. Returns its output."""
    held = start_held(operator, where, script, *words)
    standing(held).send_signal(signal.SIGINT)
    held.release()
    out, err = held.process.communicate(timeout=300)
    assert held.process.returncode == 130, f"{where}: exit {held.process.returncode}\n{err}\n{out}"
    assert "Traceback" not in err
    return err


def kill(process: ScriptProcess) -> bool:
    """SIGKILL; whether the process was still running."""
    running = process.poll() is None
    if running:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    return running and process.returncode == -signal.SIGKILL


def left_by_kill(operator: Operator) -> str:
    """What exists after a kill: the journal's last phase, and the collections."""
    journals = open_journals(operator.backups)
    names = [name.removeprefix(operator.collection) or "live" for name in operator.collections()]
    return f"{journals[-1].phase if journals else 'no journal'}: {'+'.join(names) or 'no collection'}"
