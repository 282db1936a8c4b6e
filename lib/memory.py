"""How much memory a new process may take on this machine."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")


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
