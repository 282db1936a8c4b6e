"""What --abort reports."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lib.console import Console
from lib.errors import DONE

if TYPE_CHECKING:
    from lib.config import Config
    from lib.steps.abort import Aborted


def abort(config: Config, console: Console, command: str) -> int:
    """Give up the unfinished runs of `command` ("reembed" or "restore") on these stores."""
    from lib import opening
    from lib.steps.abort import abort_reembed, abort_restore

    folder, targets = config.backup_dir, config.targets()
    collection = opening.open_collection(config)
    if command == "restore":
        return show_aborted(abort_restore(opening.open_graph(config), collection, folder, targets), console)
    with opening.open_spool(config) as spool:
        return show_aborted(abort_reembed(collection.qdrant, spool, folder, targets), console)


def show_aborted(done: Aborted, console: Console) -> int:
    """The runs that were given up, what was removed, what is left."""
    lines = [f"aborted: run {one}" for one in done.runs] or [
        "no unfinished run of these stores: nothing to abort"
    ]
    lines += [f"removed: {one}" for one in done.removed]
    lines += [f"left: {one}" for one in done.left]
    console.result(dataclasses.asdict(done), "\n".join(lines))
    return DONE
