"""What is said around the exchange of a collection: the way back, and with --no-switch the way on."""

from __future__ import annotations

import dataclasses
from shlex import quote
from typing import TYPE_CHECKING

from lib.console import Console
from lib.errors import DONE, REMAINING
from lib.showing.reembed import dollars

if TYPE_CHECKING:
    from lib.backup_set.manifest import Manifest
    from lib.steps.exchange import Voice
    from lib.steps.migration import Migration
    from lib.vectors.collection import CollectionState


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
    from lib.steps.migration import journal_of
    from lib.vectors.address import curl_line

    if state is None:
        console.result(
            {"staged": None}, f"'{run.target.collection}' is what it should be: nothing was staged"
        )
        return DONE
    drop = f"  {curl_line(run.target.qdrant, 'DELETE', run.staged)}\n  rm {quote(str(journal_of(run).path))}"
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
    model = f"  export EMBEDDING_MODEL={quote(half.model)}\n"
    if half.model == "unknown":
        model = "  # export EMBEDDING_MODEL=...   to the model of the old vectors, which the backup does not know\n"
    return (
        f"  python scripts/restore_from_backup.py {quote(str(manifest.file_of(half)))}\n"
        f"  export VECTOR_SIZE={half.size}\n"
        f"{model}"
        "  python scripts/reembed_embeddings.py --only-missing"
    )
