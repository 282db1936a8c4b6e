"""The restore of what was verified: trial restores, a safety backup, the cutovers; clean-up after a crash."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

from lib.backup import collection_restore as collections
from lib.backup.manifest import SAFETY, Manifest
from lib.backup.run import clean_up_backup, clean_up_late, take_backup
from lib.backup.server_snapshots import AWAITED, removed
from lib.backup.snapshot_restore import place
from lib.clients.falkordb.connection import list_graphs
from lib.clients.falkordb.swap import drop_graph
from lib.clients.qdrant.collection import exists, is_failed
from lib.errors import MigrationError, StoreFailed, StoreUnreachable
from lib.journal import Journal, open_journals, start_journal
from lib.restore import graph as graphs
from lib.restore.graph import SAFE, clean_up_graph, drop_old
from lib.restore.graph import SWITCHING as GRAPH_SWITCHING
from lib.restore.inputs import open_backup
from lib.restore.preflight import newer_than, require_still_quiet
from lib.restore.site import Options, Restored, Site, Undo, VerifiedFiles

COMMAND = "restore"
_GRAPH_SETTLED, _COLLECTION_SETTLED = "graph settled", "collection settled"
_OUTCOME = "settled by the next restore"


@dataclass
class Settled:
    """What killed runs left: aliases taken off and not put back, their journals, whether the snapshot is gone."""

    aliases: list[str] = field(default_factory=list)
    journals: list[Journal] = field(default_factory=list)
    left: list[Journal] = field(default_factory=list)


def settle(site: Site, proved: VerifiedFiles, run: Journal, notes: list[str]) -> Settled:
    """Put in order what killed restores of this target left in the collection's server and in the backup folder.

    The rehearsal that one proved is kept for `run`. The graph is not touched yet: see `clean_up_graphs`.
    """
    found = Settled()
    for journal in open_journals(site.folder):
        if journal.command == COMMAND and journal.targets == site.targets and journal.path != run.path:
            clean_up_backup(site.folder, site.collection, journal)
            if journal.phase == AWAITED:
                found.left.append(journal)
            elif journal.is_open:
                _tell(site, notes, _before(site, journal))
                _clean_up_collection(site, proved, run, journal, found, notes)
                found.journals.append(journal)
    return found


def _clean_up_collection(
    site: Site, proved: VerifiedFiles, run: Journal, journal: Journal, found: Settled, notes: list[str]
) -> None:
    if site.collection is None:
        return
    qdrant, name, nodes = site.collection.qdrant, site.collection.collection, site.collection.nodes
    _tell(site, notes, collections.clean_up_collection(qdrant, name, journal, proved.collection, nodes))
    found.aliases += collections.aliases_taken_off(journal)
    run.append("going on", aliases=found.aliases)
    journal.append(_COLLECTION_SETTLED)


def clean_up_graphs(site: Site, found: Settled, notes: list[str]) -> None:
    """The graphs that killed restores left, once this run has proved that it can go on. Closes what is settled.

    A journal stays open where this run does not open the store that its rest is in.
    """
    for journal in found.journals:
        if site.graph:
            _tell(site, notes, clean_up_graph(site.graph, journal, site.folder))
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


def clean_up_last(site: Site, found: Settled) -> None:
    """At the end of a run: by now the server has ended what a killed run asked it for, or never began it."""
    if site.collection:
        clean_up_late(site.collection, found.left)


def _is_settled(journal: Journal) -> bool:
    """Whether nothing that the journal names is left in a store that no run has opened since."""
    in_graph = journal.fact("throwaway_graph") or journal.fact("safety_graph")
    in_collection = journal.fact("temporary_collection") or not removed(journal)
    return not (in_graph and not journal.has_reached(_GRAPH_SETTLED)) and not (
        in_collection and not journal.has_reached(_COLLECTION_SETTLED)
    )


def supersede(site: Site, proved: VerifiedFiles) -> None:
    """An unfinished re-embedding ends here: the collection that it was making is not the one that stands now."""
    for journal in open_journals(site.folder):
        if journal.command == "reembed" and journal.targets == site.targets and proved.collection:
            journal.close("superseded by a restore")


def restore(site: Site, proved: VerifiedFiles, undo: Undo, options: Options) -> Restored:
    """Rehearse, back up what is there, switch. Raises with the stores as they were, or says how to go on."""
    result = Restored()
    journal = start_journal(site.folder, COMMAND, site.targets, again=site.again, files=proved.files)
    back = ""
    try:
        settled = settle(site, proved, journal, result.notes)
        payload, temporary = _trial_restore(site, proved, journal)
        clean_up_graphs(site, settled, result.notes)
        result.newer = newer_than(site, proved)
        if options.safety:
            result.safety = _safety_backup(site, proved, journal)
            journal.append(SAFE, manifest=result.safety.name if result.safety else None)
        require_still_quiet(site, proved.graph, options)
        back = undo(result.safety)
        site.notice(f"\nswitching now. To undo:\n{back}\nTo go on after a crash:\n  {site.again}\n")
        if proved.placement and temporary:
            with site.bar("restore the collection", None, "bytes") as progress:
                collections.replace_live(
                    proved.placement, temporary, journal, progress, undo=back, aliases=settled.aliases
                )
    except MigrationError as error:
        if not _between(journal):
            # Where the server may still be at work on what was asked, the journal stays open for the next run.
            _clean_up(site, journal, close=not isinstance(error, StoreUnreachable))
            raise
        _raise_not_in_place(site, result.safety, journal, error, back)
    except BaseException:
        if not _between(journal):
            # During an upload the server may still be at work: the next run of any command closes the journal then.
            busy = journal.phase == "rehearsing the collection" or journal.has_reached(collections.SWITCHING)
            _clean_up(site, journal, close=not busy)
        raise
    if temporary and site.collection:
        collections.drop_temporary(site.collection.qdrant, temporary, site.collection.nodes)
    if proved.graph and site.graph and payload is not None:
        _switch_graph(site, proved.graph, payload, journal, back, options, result)
    supersede(site, proved)
    journal.close("done")
    clean_up_last(site, settled)
    return result


def _raise_not_in_place(
    site: Site, safety: Manifest | None, journal: Journal, error: MigrationError, undo: str
) -> NoReturn:
    """The last step failed: the old collection is put back, or the commands that finish the job are told."""
    trouble = _put_back(site, safety, journal)
    if trouble is None:
        _clean_up(site, journal, close=True)
        raise StoreFailed(
            f"the collection could not be put in place: {error}; the one that stood there is back, as its safety"
            " backup has it",
            next_step=error.next_step or f"look at the Qdrant server's log, then:\n{site.again}",
        ) from error
    raise StoreFailed(
        f"the collection is not in place: {error}; its rehearsal {journal.fact('temporary_collection')} stands"
        f" whole on the server. {trouble}",
        next_step=f"go on from the rehearsal:\n{site.again}\nor undo:\n{undo}",
    ) from error


def _put_back(site: Site, safety: Manifest | None, journal: Journal) -> str | None:
    """Put the collection back that the safety backup holds; why that could not be, or None where it is back."""
    component = safety.collection if safety else None
    if site.collection is None or safety is None or component is None:
        return "There is no safety backup to put back"
    site.notice(f"putting '{site.collection.collection}' back as it was, from {safety.path}")
    try:
        saved = place(open_backup(safety.file_of(component), component), site.collection)
        temporary = str(journal.fact("temporary_collection"))
        collections.put_back(saved, temporary, journal.fact("aliases") or [])
    except MigrationError as error:
        return f"The old one could not be put back either: {error}"
    journal.append(collections.PUT_BACK)
    return None


def _trial_restore(site: Site, proved: VerifiedFiles, journal: Journal) -> tuple[bytes | None, str | None]:
    payload = temporary = None
    if proved.graph and site.graph:
        site.say("the target proves that it takes the graph, under a throw-away name")
        payload = graphs.trial_restore(proved.graph, site.graph, journal)
    if proved.placement:
        size = proved.placement.backup.proof.archive.snapshot.size
        with site.bar("rehearse the collection", size, "bytes") as progress:
            temporary = collections.trial_restore(proved.placement, journal, progress)
    return payload, temporary


def _safety_backup(site: Site, proved: VerifiedFiles, journal: Journal) -> Manifest | None:
    """Back up what is about to be replaced; what is absent needs none, what is dead is lost already."""
    graph = site.graph if proved.graph else None
    collection = site.collection if proved.collection else None
    if graph and graph.graph not in list_graphs(graph.conn):
        graph = None
    if collection and not exists(collection.qdrant, collection.collection):
        collection = None
    if collection and is_failed(collection.qdrant, collection.collection):
        site.say(f"'{collection.collection}' is dead and cannot be read: nothing of it can be backed up")
        collection = None
    if graph is None and collection is None:
        return None
    site.say("safety backup of what is there now")
    return take_backup(graph, collection, site.folder, site.engines, journal, site.bar, purpose=SAFETY)


def _switch_graph(
    site: Site,
    backup: graphs.GraphBackup,
    payload: bytes,
    journal: Journal,
    undo: str,
    options: Options,
    result: Restored,
) -> None:
    assert site.graph is not None
    require_still_quiet(site, backup, options)  # the collection may have taken its time
    quiet = not options.while_running
    old = graphs.switch_graph(
        backup, site.graph, payload, journal, folder=site.folder, undo=undo, quiet=quiet
    )
    if old is None:
        return
    component = result.safety.graph if result.safety else None
    saved = (component.digest if component else "") if options.safety else None
    result.late_writes = drop_old(site.graph, old, saved, site.folder, journal)


def _between(journal: Journal) -> bool:
    """Whether the old collection is gone and the new one not in place: the rehearsal is what the next run uses."""
    over = (collections.SWITCHED, collections.PUT_BACK)
    return journal.has_reached(collections.SWITCHING) and not any(map(journal.has_reached, over))


def _clean_up(site: Site, journal: Journal, *, close: bool) -> None:
    """Nothing has changed yet: drop the rehearsal; with `close` the journal too, where surely nothing is left."""
    temporary = journal.fact("temporary_collection")
    with suppress(MigrationError):  # what went wrong first is what the operator must read
        if site.collection and temporary:
            collections.drop_temporary(site.collection.qdrant, temporary, site.collection.nodes)
        temporary_graph = journal.fact("throwaway_graph")
        if site.graph and temporary_graph in list_graphs(site.graph.conn):
            drop_graph(site.graph.conn, temporary_graph)
        if close and removed(journal) and not collections.aliases_taken_off(journal):
            journal.close("failed, nothing changed")
