"""What killed runs left, put in order by the next restore; only names in their journals are ever removed."""

from __future__ import annotations

from dataclasses import dataclass, field

from lib.journal import Journal, open_journals
from lib.steps import restore_collection as collections
from lib.steps.old_graph import SWITCHING as GRAPH_SWITCHING
from lib.steps.old_graph import settle_graph
from lib.steps.own_snapshot import AWAITED, removed
from lib.steps.restore_site import Proved, Site
from lib.steps.run_backup import settle_backup, settle_late

COMMAND = "restore"
_GRAPH_SETTLED, _COLLECTION_SETTLED = "graph settled", "collection settled"
_OUTCOME = "settled by the next restore"


@dataclass
class Settled:
    """What killed runs left: aliases taken off and not put back, their journals, whether the snapshot is gone."""

    aliases: list[str] = field(default_factory=list)
    journals: list[Journal] = field(default_factory=list)
    left: list[Journal] = field(default_factory=list)


def settle(site: Site, proved: Proved, run: Journal, notes: list[str]) -> Settled:
    """Put in order what killed restores of this target left in the collection's server and in the backup folder.

    The rehearsal that one proved is kept for `run`. The graph is not touched yet: see `settle_graphs`.
    """
    found = Settled()
    for journal in open_journals(site.folder):
        if journal.command == COMMAND and journal.targets == site.targets and journal.path != run.path:
            settle_backup(site.folder, site.collection, journal)
            if journal.phase == AWAITED:
                found.left.append(journal)
            elif journal.is_open:
                _tell(site, notes, _before(site, journal))
                _settle_collection(site, proved, run, journal, found, notes)
                found.journals.append(journal)
    return found


def _settle_collection(
    site: Site, proved: Proved, run: Journal, journal: Journal, found: Settled, notes: list[str]
) -> None:
    if site.collection is None:
        return
    qdrant, name, nodes = site.collection.qdrant, site.collection.collection, site.collection.nodes
    _tell(site, notes, collections.settle_collection(qdrant, name, journal, proved.collection, nodes))
    found.aliases += collections.aliases_taken_off(journal)
    run.append("going on", aliases=found.aliases)
    journal.append(_COLLECTION_SETTLED)


def settle_graphs(site: Site, found: Settled, notes: list[str]) -> None:
    """The graphs that killed restores left, once this run has proved that it can go on. Closes what is settled.

    A journal stays open where this run does not open the store that its rest is in.
    """
    for journal in found.journals:
        if site.graph:
            _tell(site, notes, settle_graph(site.graph, journal, site.folder))
            journal.append(_GRAPH_SETTLED)
        if _is_settled(journal) and removed(journal):
            journal.close(_OUTCOME)
        elif _is_settled(journal):
            found.left.append(journal)


def _before(site: Site, journal: Journal) -> list[str]:
    """Where the state is that stood there before a run which began to switch."""
    name = journal.fact("manifest")
    if not name or not any(map(journal.has_reached, (collections.SWITCHING, GRAPH_SWITCHING))):
        return []
    return [f"what stood there before an unfinished run: {site.folder / name}"]


def _tell(site: Site, notes: list[str], news: list[str]) -> None:
    """At once, and again in the result."""
    for text in news:
        site.notice(text)
    notes += news


def settle_last(site: Site, found: Settled) -> None:
    """At the end of a run: by now the server has ended what a killed run asked it for, or never began it."""
    if site.collection:
        settle_late(site.collection, found.left)


def _is_settled(journal: Journal) -> bool:
    """Whether nothing that the journal names is left in a store that no run has opened since."""
    in_graph = journal.fact("throwaway_graph") or journal.fact("safety_graph")
    in_collection = journal.fact("temporary_collection") or not removed(journal)
    return not (in_graph and not journal.has_reached(_GRAPH_SETTLED)) and not (
        in_collection and not journal.has_reached(_COLLECTION_SETTLED)
    )


def supersede(site: Site, proved: Proved) -> None:
    """An unfinished re-embedding ends here: the collection that it was making is not the one that stands now."""
    for journal in open_journals(site.folder):
        if journal.command == "reembed" and journal.targets == site.targets and proved.collection:
            journal.close("superseded by a restore")
