"""A separate process with Qdrant's engine over shards. Each question and each answer is a line of JSON.

It maps the segments outside the caller's memory, and a file that crashes it does not crash the caller. It ends with
its standard input, and with its parent, whose process id is its argument. It is started by its path, and imports
nothing of this project.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

_PR_SET_PDEATHSIG, _SIGKILL = 1, 9


def die_with_parent() -> None:
    """Make Linux kill this process with its parent: it must not write into a folder that is being removed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # the parent had ended before
        raise SystemExit


def open_shards(archives: dict[str, str]) -> dict[str, Any]:
    """Unpack each shard's archive (number to path) into the folder of the archive, and open it."""
    from qdrant_edge import EdgeShard

    shards = {}
    for number, archive in archives.items():
        target = archive.removesuffix(".tar")
        EdgeShard.unpack_snapshot(archive, target)
        shards[number] = EdgeShard.load(target)
    return shards


def answer(shards: dict[str, Any], question: dict[str, Any]) -> object:
    """`open` opens shards and returns the number of points in each; `held` returns those ids that are points."""
    from qdrant_edge import CountRequest

    if "open" in question:
        shards.update(open_shards(question["open"]))
        return {number: int(shard.count(CountRequest(exact=True))) for number, shard in shards.items()}
    found: set[int | str] = set()
    for shard in shards.values():
        records = shard.retrieve(question["held"], with_payload=False, with_vector=False)
        found.update(record.id if isinstance(record.id, int) else str(record.id) for record in records)
    return list(found)


def main() -> int:
    """Answer questions until the input ends."""
    die_with_parent()
    shards: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            reply = {"answer": answer(shards, json.loads(line))}
        except Exception as error:  # noqa: BLE001 - the engine raises nothing finer (pypi.org/project/qdrant-edge-py)
            reply = {"error": str(error)}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
    for shard in shards.values():
        shard.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
