"""One run of the backup: what a killed one left is removed, the journal opened, the set taken, the journal closed."""

from __future__ import annotations

from pathlib import Path

from lib.backup_set.manifest import Manifest
from lib.backup_set.unfinished import remove_unfinished
from lib.graph.engine import Engine
from lib.journal import Journal, open_journals, start_journal
from lib.steps.own_snapshot import remove_own, removed
from lib.steps.progress import ProgressBar
from lib.steps.take_collection import CollectionSource
from lib.steps.take_graph import GraphSource
from lib.steps.take_pair import take_backup

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
    earlier = [one for one in open_journals(folder) if one.command == COMMAND and one.targets == targets]
    left = [one for one in earlier if not settle_backup(folder, collection, one)]
    journal = start_journal(folder, COMMAND, targets)
    try:
        manifest = take_backup(graph, collection, folder, engines, journal, bar, verify=verify)
    except BaseException:
        if removed(journal):
            journal.close("failed, nothing left")
        raise
    if removed(journal):
        journal.close(manifest.name)
    for one in left:
        # By now the server has ended what a killed run asked it for, or never began it.
        if collection and not settle_backup(folder, collection, one):
            one.close("no snapshot that is surely of this run was found")
    return manifest


def settle_backup(folder: Path, collection: CollectionSource | None, journal: Journal) -> bool:
    """Remove what a killed run left of its backup, here and on the server; whether surely nothing is left now."""
    remove_unfinished(folder, journal)
    clean = removed(journal) or (collection is not None and remove_own(collection.qdrant, journal))
    if clean and journal.command == COMMAND:
        journal.close("cleaned up by the next backup")
    return clean
