"""Temporary folders and child processes that end with this process, and the memory of this machine.

A module that answers questions in a process of its own does not crash the caller. Both run at once, while the threads
of one process take turns at Python code.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from lib import errors
from lib.errors import MigrationError, UsageProblem
from lib.files import replaceable_by_others

# What a child needs to start. It may open hostile files, so it gets no key, password or token.
_ENVIRONMENT = {"PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH"}
_SPARE_MEMORY = 4 << 30
_ROOT = Path(__file__).parents[1]
_PR_SET_PDEATHSIG = 1

Ask = Callable[[dict[str, Any]], Any]

# A cleanup watchdog: a shell that outlives this process. Its input ends when this process, and a child that has not yet
# sent its process id, have ended. Unless the last line is `done`, it kills the children and removes the folder.
_WATCHDOG = """
trap '' HUP INT TERM
children=
while read -r word; do
    [ "$word" = done ] && exit
    children="$children $word"
done
[ -z "$children" ] || kill -9 $children
# A process that was just killed may still be writing there.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    rm -rf "$1" 2>/dev/null
    [ -e "$1" ] || break
    sleep 0.2
done
"""
# A child sends its process id before it becomes the server, so a kill at any moment leaves no server behind.
_CHILD = 'echo $$; exec "$@" >"$0" 2>&1'
_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 512 * 1024  # https://man7.org/linux/man-pages/man3/mallopt.3.html


def child_environment() -> dict[str, str]:
    """Return the environment of a child process: what it needs to start, and no secret."""
    return {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}


def limit_resources(pid: int, *, mapped: int = 0, cpu_seconds: int | None = None) -> None:
    """Bound a child's memory to this machine's plus `mapped` bytes of files, and its CPU time; only on Linux."""
    if sys.platform != "linux":
        return
    import resource

    memory = physical_memory() + _SPARE_MEMORY + mapped
    with contextlib.suppress(OSError, ValueError):  # it has ended, or a lower limit is set already
        resource.prlimit(pid, resource.RLIMIT_AS, (memory, memory))
        if cpu_seconds:
            resource.prlimit(pid, resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))


class ChildError(MigrationError):
    """An error in the module's process that is not one of ours."""


@contextlib.contextmanager
def answering_module(
    module: str, ended: Callable[[int], MigrationError], *, mapped: int = 0, cpu_seconds: int | None = None
) -> Iterator[Ask]:
    """Run `module`, which calls `answer_questions`, in a process that ends with the block and with this process.

    Yields a function that sends it a question and returns the answer, or raises the error of the answer: a
    MigrationError or ChildError, and if the process ended what `ended` makes of its exit code. For the limits see
    `limit_resources`.
    """
    with subprocess.Popen(
        [sys.executable, "-m", module, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=_ROOT,
        env=child_environment(),
        start_new_session=True,  # Ctrl-C interrupts the command, which then ends this process
    ) as child:
        limit_resources(child.pid, mapped=mapped, cpu_seconds=cpu_seconds)
        stdin, stdout = cast("IO[bytes]", child.stdin), cast("IO[bytes]", child.stdout)

        def ask(question: dict[str, Any]) -> Any:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(json.dumps(question).encode() + b"\n")  # which takes any path; orjson only UTF-8
                stdin.flush()
            line = stdout.readline()
            if not line.endswith(b"\n"):
                raise ended(child.wait())
            reply = json.loads(line)
            if "error" in reply:
                raise getattr(errors, reply["kind"], ChildError)(reply["error"], next_step=reply["next_step"])
            return reply["answer"]

        try:
            yield ask
        finally:
            child.kill()
            with contextlib.suppress(BrokenPipeError):  # a question that it did not read
                stdin.close()


def answer_questions(answer: Callable[[dict[str, Any]], object]) -> None:
    """Answer the questions on standard input, lines of JSON, until it or the process of `answering_module` ends."""
    if sys.platform == "linux":  # it must not write into a folder that is being removed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # which had ended before
        return
    for line in sys.stdin.buffer:
        try:
            reply = {"answer": answer(json.loads(line))}
        except Exception as error:  # noqa: BLE001 - reported to the other process, whatever it is
            step = error.next_step if isinstance(error, MigrationError) else ""
            reply = {"error": str(error), "kind": type(error).__name__, "next_step": step}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


@dataclass
class ScratchFolder:
    """A temporary folder. A server that is started in it does not outlive this process."""

    path: Path
    _pipe: IO[bytes]

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start `command` in the folder, its output in `log`. The caller ends it; after a kill, the watchdog does."""
        child = subprocess.Popen(
            ["/bin/sh", "-c", _CHILD, str(log), *command],
            stdin=subprocess.DEVNULL,
            stdout=self._pipe,
            cwd=self.path,
            env=child_environment(),
            start_new_session=True,  # Ctrl-C goes to this process alone, which then ends its child
        )
        limit_resources(child.pid)
        return child


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[ScratchFolder]:
    """Make a new folder (0700) among the system's temporary files; removed when the block or this process ends.

    Raises UsageProblem if other users could replace files there.
    """
    system = Path(tempfile.gettempdir())
    state = system.stat()
    if replaceable_by_others(state):
        raise UsageProblem(
            f"other users could replace files in the folder for temporary files {system} (uid {state.st_uid},"
            f" mode {state.st_mode & 0o7777:o})",
            next_step="export TMPDIR=/tmp\nor to another folder that is yours, or sticky (mode 1777)",
        )
    folder = system / f"{prefix}{secrets.token_hex(4)}"
    watchdog = subprocess.Popen(
        ["/bin/sh", "-c", _WATCHDOG, "sh", str(folder)],
        stdin=subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,
    )
    assert watchdog.stdin is not None
    try:
        folder.mkdir(mode=0o700)
        yield ScratchFolder(folder, watchdog.stdin)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        watchdog.communicate(b"done\n")


def physical_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int | None:
    """Return the bytes that the kernel calls available, or what this process's control group leaves if that is less.

    None if neither is known (macOS). The files: https://docs.kernel.org/filesystems/proc.html and
    https://docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    known = [int(line.split()[1]) << 10 for line in _lines(_MEMINFO) if line.startswith("MemAvailable:")]
    limit, used = _lines(_CGROUPS / "memory.max"), _lines(_CGROUPS / "memory.current")
    if limit and used and limit[0].isdigit():  # the group's cached file pages count as free
        statistics = dict(line.split(" ", 1) for line in _lines(_CGROUPS / "memory.stat"))
        known.append(max(0, int(limit[0]) - int(used[0]) + int(statistics.get("inactive_file", 0))))
    return min(known, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def unmap_large_blocks() -> None:
    """Have blocks of more than 512 kB returned to the system as soon as they are freed, in every thread.

    By default glibc raises that limit when one such block is freed, and the heaps fragment. This costs a tenth of the
    CPU time of embedding, and saves a third of the peak memory of what follows.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        import ctypes

        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def release_free_memory() -> None:
    """Return the free memory of the heaps, of which each thread has one, to the system. Does nothing without glibc.

    https://man7.org/linux/man-pages/man3/malloc_trim.3.html
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
