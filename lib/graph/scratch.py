"""A private FalkorDB in a directory of its own: started, loaded, killed, whatever happens to this process."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from lib.errors import BackupDamaged, StoreFailed, StoreUnreachable
from lib.graph.client import GraphAddress, connect
from lib.scratch_folder import ScratchFolder, scratch_folder

POLL_SECONDS = 0.02
_FOREIGN_MODULE = re.compile(r"no matching module(?: type)? '([^']+)'")
_STAMP = re.compile(r"^\d+:\w \d+ \w+ \d{4} [\d:.]+ \S ")


class ScratchFailed(StoreFailed):
    """Killed from outside, as a kernel does that runs out of memory, or too slow: nothing is known of its file."""


@dataclass(frozen=True)
class Scratch:
    """A running scratch server: private, without persistence, gone with its context."""

    address: GraphAddress
    conn: redis.Redis
    pid: int


@contextlib.contextmanager
def running(server: Path, module: Path, rdb: Path | None, seconds: float) -> Iterator[Scratch]:
    """Start `server` with `module`, let it load `rdb` within `seconds`, and kill it on leaving.

    Raises BackupDamaged where the file does not load, StoreFailed where the server does not start without one,
    ScratchFailed.
    """
    with scratch_folder("falkordb-scratch-") as scratch:
        if rdb is not None:
            (scratch.path / "dump.rdb").symlink_to(rdb.resolve())
        child = _start(server, module, scratch)
        try:
            address = GraphAddress(unix_socket=str(scratch.path / "s"))
            with contextlib.closing(_loaded(child, address, rdb, scratch.path / "log", seconds)) as conn:
                yield Scratch(address, conn, child.pid)
        except StoreUnreachable:
            _require_alive(child)
            raise
        finally:
            child.kill()
            child.wait()


def _require_alive(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        if child.wait(1.0) == -signal.SIGKILL:
            raise ScratchFailed(
                "the scratch FalkorDB was killed from outside, as a machine does that runs out of memory",
                next_step="free some memory, or prove the backup on a larger machine with --check",
            )


def _start(server: Path, module: Path, scratch: ScratchFolder) -> subprocess.Popen[bytes]:
    settings = ["--port", "0", "--unixsocket", str(scratch.path / "s"), "--unixsocketperm", "700"]
    settings += ["--dir", str(scratch.path), "--save", "", "--appendonly", "no"]
    # Its list of past queries may stop a server that has just started for good: about 1 start in 1,000.
    settings += ["--loadmodule", str(module), "CMD_INFO", "no"]
    log = scratch.path / "log"
    log.touch()  # it is read also where the server never came to write it
    return scratch.start([str(server), *settings], log)


def _loaded(
    child: subprocess.Popen[bytes], address: GraphAddress, rdb: Path | None, log: Path, seconds: float
) -> redis.Redis:
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(StoreUnreachable):
            return connect(address, timeout_seconds=max(1.0, deadline - time.monotonic()))
        time.sleep(POLL_SECONDS)
    reason = _telling_line(log.read_text("utf-8", "replace"))
    if child.poll() is None:
        raise ScratchFailed(
            f"the scratch FalkorDB was not ready after {seconds:.0f} s: {reason}",
            next_step="run it again when this machine is less busy, or prove the backup on another with --check",
        )
    _require_alive(child)
    if "out of memory" in reason.lower():
        raise ScratchFailed(
            f"the scratch FalkorDB ran out of memory: {reason}",
            next_step="prove the backup on a larger machine with --check",
        )
    if foreign := _FOREIGN_MODULE.search(reason):
        raise ScratchFailed(
            f"it also holds data of the redis module '{foreign[1]}', which no engine here has",
            next_step="take the graph alone: python scripts/backup_automem.py   uses DUMP on such a server",
        )
    if rdb is None:
        raise StoreFailed(f"the scratch FalkorDB gave up: {reason}")
    raise BackupDamaged(f"{rdb.name} does not load: the scratch FalkorDB gave up: {reason}")


def _telling_line(log: str) -> str:
    """The last line of a server's log that says what went wrong, or its last line; without process id and time."""
    lines = [_STAMP.sub("", line).strip() for line in log.splitlines() if line.strip()]
    words = ("error", "can't", "fail", "bad ", "crash", "wrong", "short read", "not found", "aborting")
    telling = [
        line
        for line in lines
        if any(word in line.lower() for word in words) and "check server logs" not in line
    ]
    return (telling or lines or ["no word in its log"])[-1]
