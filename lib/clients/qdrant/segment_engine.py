"""Run as a process of its own: Qdrant's engine over shards, one question a line, one answer a line, both JSON.

What it maps of the segments is not the caller's memory, and a file that crashes it crashes nothing else. It ends with
its standard input, and with its parent, whose process id is its argument. It is started by its path and knows nothing
of this project.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

_PR_SET_PDEATHSIG, _SIGKILL = 1, 9


def die_with_parent() -> None:
    """On Linux: not even a moment longer, in which this could write into a folder that is being removed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it was gone before
        raise SystemExit


def opened(archives: dict[str, str]) -> dict[str, Any]:
    """Each shard by its number, from the archive whose path is given, unpacked beside it."""
    from qdrant_edge import EdgeShard

    shards = {}
    for number, archive in archives.items():
        target = archive.removesuffix(".tar")
        EdgeShard.unpack_snapshot(archive, target)
        shards[number] = EdgeShard.load(target)
    return shards


def answer(shards: dict[str, Any], question: dict[str, Any]) -> object:
    """`open`: the number of points in each shard; `held`: which of these ids are points."""
    from qdrant_edge import CountRequest

    if "open" in question:
        shards.update(opened(question["open"]))
        return {number: int(shard.count(CountRequest(exact=True))) for number, shard in shards.items()}
    found: set[int | str] = set()
    for shard in shards.values():
        records = shard.retrieve(question["held"], with_payload=False, with_vector=False)
        found.update(record.id if isinstance(record.id, int) else str(record.id) for record in records)
    return list(found)


def main() -> int:
    """Answer until the input ends."""
    die_with_parent()
    shards: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            told = {"answer": answer(shards, json.loads(line))}
        except Exception as error:  # noqa: BLE001 - the engine raises nothing finer (pypi.org/project/qdrant-edge-py)
            told = {"error": str(error)}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
    for shard in shards.values():
        shard.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
