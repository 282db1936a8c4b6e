"""What is said around the exchange of a collection: the way back, and with --no-switch the way on."""

from __future__ import annotations

import dataclasses
from shlex import quote
from typing import TYPE_CHECKING

from lib.console import Console
from lib.dimensions import UNKNOWN_MODEL
from lib.errors import DONE, REMAINING
from lib.showing.reembed import dollars

if TYPE_CHECKING:
    from lib.backup_set.manifest import Manifest
    from lib.steps.exchange import Voice
    from lib.steps.migration import Migration
    from lib.vectors.collection import CollectionState

_ONLY_MISSING = "python scripts/reembed_embeddings.py --only-missing"


def voice(run: Migration, console: Console) -> Voice:
    """What is said right before the live collection is deleted, also when quiet; and how the report is written."""
    from lib.showing.report import write
    from lib.steps.exchange import Voice

    def announce(undo: str) -> None:
        name = run.target.collection
        console.notice(f"\nreplacing '{name}' now. To undo:\n{undo}\nTo go on after a crash: this command.\n")

    return Voice(undo_of, announce, lambda report: write(report, run.folder, console))


def show_staged(state: CollectionState | None, run: Migration, console: Console) -> int:
    """The result of --no-switch, with the way on and the way back."""
    if state is None:
        console.result(
            {"staged": None}, f"'{run.target.collection}' is what it should be: nothing was staged"
        )
        return DONE
    drop = "  python scripts/reembed_embeddings.py --abort"
    price = run.bought.price(run.spec.model)
    document = {
        "staged": run.staged,
        "size": run.spec.size,
        "model": run.spec.model,
        "points": state.points,
        "bought": {"texts": run.bought.texts, "tokens": run.bought.tokens, "price": price},
        "refused": [dataclasses.asdict(one) for one in run.bought.refused],
        "undo": drop,
    }
    text = (
        f"'{run.staged}' stands beside '{run.target.collection}': {state.points:,} points, {run.spec.size}d, every"
        f" vector compared. Bought {run.bought.texts:,} texts, {run.bought.tokens:,} tokens, {dollars(price)}.\n\n"
        f"to go on (after days, too; what changes meanwhile is caught up):\n"
        f"  python scripts/reembed_embeddings.py\nto drop it (what was bought stays in the spool):\n{drop}"
    )
    console.result(document, text)
    return REMAINING if run.bought.refused else DONE


def undo_of(manifest: Manifest | None) -> str:
    """The way back from a re-embedding: the collection's half of the backup; the graph was not changed."""
    if manifest is None or manifest.collection is None:
        return "  (none: no collection was replaced)"
    half = manifest.collection
    lines = [
        f"  python scripts/restore_from_backup.py {quote(str(manifest.file_of(half)))}",
        f"  export VECTOR_SIZE={half.size}",
        f"  export EMBEDDING_MODEL={quote(half.model)}",
        f"  {_ONLY_MISSING}",
    ]
    if half.model == UNKNOWN_MODEL:  # with the model of the new vectors it would add vectors of another kind
        lines[2:] = [
            "  # The backup does not know the model of the old vectors. Set it, then add newer memories:",
            "  # export EMBEDDING_MODEL=...",
            f"  # {_ONLY_MISSING}",
        ]
    return "\n".join(lines)
