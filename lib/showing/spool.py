"""What --prune-spool tells."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lib.console import Console, size_text, table
from lib.embedding.endpoint import public_url
from lib.errors import DONE

if TYPE_CHECKING:
    from lib.config import Config
    from lib.steps.prune_spool import Pruned


def prune(config: Config, console: Console, *, dry_run: bool) -> int:
    """Delete from the embedding cache what no plan needs."""
    from lib import opening
    from lib.steps.prune_spool import prune_spool

    with opening.open_spool(config) as spool:
        return show_pruned(prune_spool(spool, config.backup_dir, dry_run=dry_run), console, dry_run=dry_run)


def show_pruned(done: Pruned, console: Console, *, dry_run: bool) -> int:
    """The result of --prune-spool."""
    rows = [
        (
            one.spec.model,
            f"{one.spec.size}d",
            public_url(one.spec.base_url),
            f"{one.vectors:,}",
            f"{one.unneeded:,}",
        )
        for one in done.stored
    ]
    gone = sum(one.unneeded for one in done.stored) if dry_run else done.removed
    size = sum(one.unneeded_bytes for one in done.stored)
    text = f"{table(rows, ('model', 'size', 'endpoint', 'vectors', 'unneeded'))}\n\n" if rows else ""
    if dry_run:
        text += (
            f"dry run: {gone:,} vectors ({size_text(size)}) are needed by no plan here; nothing was deleted"
        )
    else:
        sizes = f"the spool is {size_text(done.bytes_after)}, was {size_text(done.bytes_before)}"
        text += f"{gone:,} vectors deleted; {sizes}"
        if gone and not done.shrunk:
            text += (
                "\nthe disk has no room to shrink the file now: the next purchases fill what is free in it"
            )
    document = {
        "dry_run": dry_run,
        "removed": done.removed,
        "unneeded": sum(one.unneeded for one in done.stored),
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "stored": [dataclasses.asdict(one) for one in done.stored],
    }
    console.result(document, text)
    return DONE
