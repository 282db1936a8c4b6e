"""The restore of what was proved: both files rehearsed, a safety backup, then the switches."""

from __future__ import annotations

from contextlib import suppress
from typing import NoReturn

from lib.backup_set.manifest import SAFETY, Manifest
from lib.errors import MigrationError, StoreFailed, StoreUnreachable
from lib.graph.client import list_graphs
from lib.graph.swap import drop_graph
from lib.journal import Journal, start_journal
from lib.steps import restore_collection as collections
from lib.steps import restore_graph as graphs
from lib.steps.before_restore import require_still_quiet
from lib.steps.collection_backup import open_backup
from lib.steps.newer import newer_than
from lib.steps.old_graph import SAFE, retire_old
from lib.steps.own_snapshot import removed
from lib.steps.restore_parts import place
from lib.steps.restore_site import Options, Proved, Restored, Site, Undo
from lib.steps.settle_restore import COMMAND, settle, settle_graphs, settle_last, supersede
from lib.steps.take_pair import take_backup
from lib.vectors.collection import exists, is_dead


def restore(site: Site, proved: Proved, undo: Undo, options: Options) -> Restored:
    """Rehearse, back up what is there, switch. Raises with the stores as they were, or says how to go on."""
    result = Restored()
    journal = start_journal(site.folder, COMMAND, site.targets, again=site.again, files=proved.files)
    back = ""
    try:
        settled = settle(site, proved, journal, result.notes)
        payload, temporary = _rehearse(site, proved, journal)
        settle_graphs(site, settled, result.notes)
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
    settle_last(site, settled)
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
    half = safety.collection if safety else None
    if site.collection is None or safety is None or half is None:
        return "There is no safety backup to put back"
    site.notice(f"putting '{site.collection.collection}' back as it was, from {safety.path}")
    try:
        saved = place(open_backup(safety.file_of(half), half), site.collection)
        temporary = str(journal.fact("temporary_collection"))
        collections.put_back(saved, temporary, journal.fact("aliases") or [])
    except MigrationError as error:
        return f"The old one could not be put back either: {error}"
    journal.append(collections.PUT_BACK)
    return None


def _rehearse(site: Site, proved: Proved, journal: Journal) -> tuple[bytes | None, str | None]:
    payload = temporary = None
    if proved.graph and site.graph:
        site.say("the target proves that it takes the graph, under a throw-away name")
        payload = graphs.rehearse(proved.graph, site.graph, journal)
    if proved.placement:
        size = proved.placement.backup.proof.archive.snapshot_size
        with site.bar("rehearse the collection", size, "bytes") as progress:
            temporary = collections.rehearse(proved.placement, journal, progress)
    return payload, temporary


def _safety_backup(site: Site, proved: Proved, journal: Journal) -> Manifest | None:
    """Back up what is about to be replaced; what is absent needs none, what is dead is lost already."""
    graph = site.graph if proved.graph else None
    collection = site.collection if proved.collection else None
    if graph and graph.graph not in list_graphs(graph.conn):
        graph = None
    if collection and not exists(collection.qdrant, collection.collection):
        collection = None
    if collection and is_dead(collection.qdrant, collection.collection):
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
    half = result.safety.graph if result.safety else None
    saved = (half.digest if half else "") if options.safety else None
    result.late_writes = retire_old(site.graph, old, saved, site.folder, journal)


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
        throwaway = journal.fact("throwaway_graph")
        if site.graph and throwaway in list_graphs(site.graph.conn):
            drop_graph(site.graph.conn, throwaway)
        if close and removed(journal) and not collections.aliases_taken_off(journal):
            journal.close("failed, nothing changed")
