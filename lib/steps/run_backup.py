"""One run of the backup: what a killed one left is removed, the journal opened, the set taken, the journal closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lib.backup_set.manifest import Manifest
from lib.backup_set.unfinished import remove_unfinished
from lib.errors import UsageProblem
from lib.graph.engine import Engine
from lib.journal import Journal, open_journals, start_journal
from lib.steps.on_nodes import by_node
from lib.steps.own_snapshot import AWAITED, remove_late, remove_own, removed
from lib.steps.progress import ProgressBar
from lib.steps.take_collection import CollectionSource
from lib.steps.take_graph import GraphSource
from lib.steps.take_pair import take_backup
from lib.vectors.transport import Qdrant

COMMAND = "backup"


def run_backup(
    graph: GraphSource | None,
    collection: CollectionSource | None,
    folder: Path,
    targets: list[str],
    engines: list[Engine],
    bar: ProgressBar,
    *,
    verify: bool = True,
) -> Manifest:
    """Take a set under the target's lock; raises like `take_backup`, with the journal open where a rest remains."""
    pending = _left_open(folder, targets)
    left = [one for one in pending if not settle_backup(folder, collection, one, pending)]
    journal = start_journal(folder, COMMAND, targets)
    try:
        manifest = take_backup(graph, collection, folder, engines, journal, bar, verify=verify)
    except BaseException as error:
        remove_unfinished(folder, journal)  # once more: a third Ctrl-C may have ended the first time
        if isinstance(error, KeyboardInterrupt) and collection:
            _remove(collection, journal, pending)  # once more: it may have come into the first time
        if removed(journal):
            journal.close("failed, nothing left")
        raise
    if removed(journal):
        journal.close(manifest.name)
    if collection:
        settle_late(collection, left)
    return manifest


def _left_open(folder: Path, targets: list[str]) -> list[Journal]:
    """Killed backups, and runs of other commands of which a snapshot alone is left: of these targets, oldest first."""
    here = (one for one in open_journals(folder) if one.targets == targets)
    return [one for one in here if one.command == COMMAND or one.phase == AWAITED]


def settle_backup(
    folder: Path, collection: CollectionSource | None, journal: Journal, pending: Sequence[Journal] = ()
) -> bool:
    """Remove what a killed run left of its backup, here and on the server; whether surely nothing is left now."""
    remove_unfinished(folder, journal)
    whole = journal.command == COMMAND or journal.phase == AWAITED  # a restore may have left more
    clean = removed(journal) or (collection is not None and _remove(collection, journal, pending))
    if clean and whole:
        journal.close("cleaned up by the next run")
    return clean


def settle_late(collection: CollectionSource, left: Sequence[Journal]) -> None:
    """Once more at the end of a run: by now the server may have ended what killed runs asked it for.

    Closes the journals of which nothing can come any more; the others stay open for the run after this one.
    """
    for journal in left:
        gone = [remove_late(*one) for one in _on_each_node(collection, journal, left)]
        if all(gone):
            journal.close("cleaned up by the next run")


def _remove(collection: CollectionSource, journal: Journal, pending: Sequence[Journal]) -> bool:
    for one in _on_each_node(collection, journal, pending):
        remove_own(*one)
    return removed(journal)


def _on_each_node(
    collection: CollectionSource, journal: Journal, pending: Sequence[Journal]
) -> Iterator[tuple[Qdrant, Journal, list[Journal]]]:
    """Each node that the run had make a snapshot, with what its journal and the others say of that node.

    Raises UsageProblem where the node is not listed any more: only the operator knows how to ask it.
    """
    clients = {one.display: one for one in (collection.qdrant, *collection.nodes)}
    for node, mine in by_node(journal):
        if removed(mine):
            continue
        if node is not None and node not in clients:
            raise UsageProblem(
                f"a killed run ({journal.run_id}) may have left a snapshot on the Qdrant node {node}, which "
                "QDRANT_NODE_URLS does not list now",
                next_step=f"list it again; or, if it is gone for good, delete {journal.path}",
            )
        others = [theirs for one in pending for about, theirs in by_node(one) if about == node]
        yield (clients[node] if node else collection.qdrant), mine, others
