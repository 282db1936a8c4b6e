"""Temporary folders and child processes that end with this one, and how much memory a process may take."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lib.errors import UsageProblem

# What a child needs to start. It opens files that may be hostile: it gets no key, password or token.
_ENVIRONMENT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "PYTHONPATH",
)
_SPARE_MEMORY = 4 << 30

# A shell that outlives this process: its end of the pipe closes when the process, and a child that has not told its
# number yet, are gone. Without the word `done` the children are killed and the folder is removed.
_UNDERTAKER = """
trap '' HUP INT TERM
children=
while read -r word; do
    [ "$word" = done ] && exit
    children="$children $word"
done
[ -z "$children" ] || kill -9 $children
# A process that dies at this moment may still be writing there.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    rm -rf "$1" 2>/dev/null
    [ -e "$1" ] || break
    sleep 0.2
done
"""
# A child tells its number before it becomes the server: there is no moment at which a kill leaves one behind.
_CHILD = 'echo $$; exec "$@" >"$0" 2>&1'


def child_environment() -> dict[str, str]:
    """The environment of a child process: what it needs to start, and no secret."""
    return {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}


def limit(pid: int, *, mapped: int = 0, cpu_seconds: int | None = None) -> None:
    """Bound the memory of a child (all of this machine's, and `mapped` bytes of files) and its CPU time, on Linux."""
    if sys.platform != "linux":
        return
    import resource

    memory = physical_memory() + _SPARE_MEMORY + mapped
    with contextlib.suppress(OSError, ValueError):  # it has ended, or a lower limit is set already
        resource.prlimit(pid, resource.RLIMIT_AS, (memory, memory))
        if cpu_seconds:
            resource.prlimit(pid, resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))


@dataclass
class ScratchFolder:
    """The folder, and how to start a server in it that does not outlive this process."""

    path: Path
    _pipe: IO[bytes]

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start `command` in the folder, its output in `log`; the caller ends it, and the undertaker after a kill."""
        child = subprocess.Popen(
            ["/bin/sh", "-c", _CHILD, str(log), *command],
            stdin=subprocess.DEVNULL,
            stdout=self._pipe,
            cwd=self.path,
            env=child_environment(),
            start_new_session=True,  # a Ctrl-C is for the command, which then ends its server itself
        )
        limit(child.pid)
        return child


def _common_folder() -> Path:
    """The system's folder for temporary files. Raises UsageProblem if another user could replace what is in it."""
    folder = Path(tempfile.gettempdir())
    state = folder.stat()
    others_write = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if state.st_uid not in {0, os.geteuid()} or (others_write and not state.st_mode & stat.S_ISVTX):
        raise UsageProblem(
            f"other users could replace what lies in the folder for temporary files {folder} (uid {state.st_uid},"
            f" mode {state.st_mode & 0o7777:o})",
            next_step="export TMPDIR=/tmp   or another folder that is yours, or sticky (mode 1777)",
        )
    return folder


@contextlib.contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[ScratchFolder]:
    """A new folder (0700) in `parent` (default: the system's temporary folder), removed when the block ends."""
    folder = (parent or _common_folder()) / f"{prefix}{secrets.token_hex(4)}"
    undertaker = subprocess.Popen(
        ["/bin/sh", "-c", _UNDERTAKER, "sh", str(folder)],
        stdin=subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,
    )
    assert undertaker.stdin is not None
    try:
        folder.mkdir(mode=0o700)
        yield ScratchFolder(folder, undertaker.stdin)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        undertaker.communicate(b"done\n")


_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int | None:
    """Bytes: what the kernel calls available, or what this process's control group leaves if that is less.

    None where neither is told (macOS). The files: https://docs.kernel.org/filesystems/proc.html and
    https://docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    known = [number for number in (_available(_MEMINFO), _left_by_group(_CGROUPS)) if number is not None]
    return min(known, default=None)


def _available(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) << 10
    return None


def _left_by_group(folder: Path) -> int | None:
    """Of the group whose files stand here, as a container sees its own: pages of files count as free."""
    limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
    if not limit or not used or not limit[0].isdigit():
        return None
    told = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
    return max(0, int(limit[0]) - int(used[0]) + int(told.get("inactive_file", 0)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


_M_MMAP_THRESHOLD = -3  # https://man7.org/linux/man-pages/man3/mallopt.3.html
_LARGE_BYTES = 512 * 1024


def return_large_blocks() -> None:
    """From now on what is larger than 512 kB goes back to the system when it is freed, in every thread.

    Left alone, glibc raises that limit as soon as one such block is freed, and heaps grow full of holes. Costs a tenth
    of the CPU of a purchase, spares a third of the peak memory of what follows.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        import ctypes

        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def give_back() -> None:
    """Return what is free in the heaps, one for each thread that ever ran.

    https://man7.org/linux/man-pages/man3/malloc_trim.3.html; where there is no such call nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
