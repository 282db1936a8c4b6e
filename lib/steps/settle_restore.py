"""What killed runs left, put in order by the next restore; only names in their journals are ever removed."""

from __future__ import annotations

from lib.journal import Journal, open_journals
from lib.steps import restore_collection as collections
from lib.steps.old_graph import SWITCHING, settle_graph
from lib.steps.restore_site import Proved, Site
from lib.steps.run_backup import settle_backup

COMMAND = "restore"


def settle(site: Site, proved: Proved, notes: list[str]) -> list[str]:
    """Put in order what killed restores of this target left; the rehearsal that one proved is kept for this run.

    Returns the aliases that one took off and did not put back. A journal stays open where this run does not open
    the store that its rest is in.
    """
    aliases: list[str] = []
    for journal in open_journals(site.folder):
        if journal.command != COMMAND or journal.targets != site.targets:
            continue
        clean = settle_backup(site.folder, site.collection, journal)
        if site.graph:
            notes += settle_graph(site.graph, journal, site.folder)
        if site.collection:
            qdrant, name = site.collection.qdrant, site.collection.collection
            notes += collections.settle_collection(qdrant, name, journal, proved.collection)
            aliases += collections.aliases_taken_off(journal)
        if journal.fact("manifest") and any(map(journal.has_reached, (collections.SWITCHING, SWITCHING))):
            notes.append(
                f"what stood there before an unfinished run: {site.folder / journal.fact('manifest')}"
            )
        if clean and _reachable(site, journal):
            journal.close("settled by the next restore")
    return aliases


def _reachable(site: Site, journal: Journal) -> bool:
    """Whether this run has opened every store that the journal names something in."""
    in_graph = journal.fact("throwaway_graph") or journal.fact("safety_graph")
    in_collection = journal.fact("temporary_collection")
    return not (in_graph and site.graph is None) and not (in_collection and site.collection is None)


def supersede(site: Site, proved: Proved) -> None:
    """An unfinished re-embedding ends here: the collection that it was making is not the one that stands now."""
    for journal in open_journals(site.folder):
        if journal.command == "reembed" and journal.targets == site.targets and proved.collection:
            journal.close("superseded by a restore")
