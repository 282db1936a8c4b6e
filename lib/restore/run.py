"""The steps of a restore: trial restores, safety backup, cutover of both stores; and clean-up after a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource
from lib.backup.manifest import SAFETY, Manifest
from lib.backup.phases import AWAITED, remove_named_snapshots, remove_staged, removed, report_snapshots
from lib.backup.phases import COMMAND as REEMBED
from lib.backup.run import clean_up_backup, take_backup
from lib.clients.falkordb.connection import list_graphs
from lib.clients.falkordb.swap import WriteCalls, drop_graph, only_restored, write_calls
from lib.clients.qdrant.collection import health
from lib.clients.qdrant.snapshots import delete_with_snapshots
from lib.concurrency import BackgroundTask, Progress
from lib.errors import MigrationError, StoreFailed, StoreUnreachable, listed
from lib.journal import Journal, open_journals, start_journal
from lib.restore import collection as collections
from lib.restore import graph as graphs
from lib.restore.collection import RestorePlan, is_absent, plan_restore
from lib.restore.inputs import open_archive
from lib.restore.preflight import Newer, Site, VerifiedFiles, newer_memories, newer_points, require_still_quiet

COMMAND = "restore"
# Phases of the journal.
_RESUMED, _GRAPH_CLEAN, _COLLECTION_CLEAN = "going on", "graph settled", "collection settled"

Undo = Callable[[Manifest | None], str]  # from the safety backup: the commands that restore it


@dataclass(frozen=True)
class Restored:
    """What was done: the safety backup, the file of late writes to the old graph, what an earlier run had left.

    `memories` and `points` are what the stores held and the files do not. None: the file does not show it, or there was
    nothing to replace.
    """

    safety: Manifest | None
    late_writes: Path | None
    notes: list[str]
    memories: Newer | None
    points: Newer | None


@dataclass(frozen=True)
class _Leftovers:
    """What killed runs left: aliases to set again, journals to close, journals of which only a snapshot may be left."""

    aliases: list[str]
    journals: list[Journal]
    awaited: list[Journal]
    notes: list[str]


_GraphTrial = tuple[bytes | None, Newer | None]  # the payload to swap in, and what is newer; None: not restored
_CollectionTrial = tuple[collections.Trial | None, Newer | None]
_Trials = tuple[BackgroundTask[_GraphTrial], BackgroundTask[_CollectionTrial]]


def restore(site: Site, files: VerifiedFiles, undo: Undo) -> Restored:
    """Restore verified files. Raises with the stores as they were, or with the commands that finish the run."""
    paths = [str(one.path) for one in (files.graph, files.plan and files.plan.backup) if one]
    journal = start_journal(site.folder, COMMAND, site.targets, again=site.again, files=paths)
    try:
        left = _clean_up_killed_runs(site, files, journal)
        calls = write_calls(site.graph.conn) if site.graph else None
        with _trial_restores(site, files, journal) as trials:
            graph_trial, collection_trial = trials
            if left.journals:  # until then one of the graphs that killed runs left may be needed
                collection_trial.result()
                graph_trial.result()
            notes = [*left.notes, *_clean_up_graphs(site, left)]
            safety = _safety_backup(site, files, journal, trials) if site.safety else None
            trial, points = collection_trial.result()
            payload, memories = graph_trial.result()
        if files.plan:
            journal.append(collections.TRIAL_VERIFIED)
        if files.graph:
            require_still_quiet(site, files.graph)
        commands = undo(safety)
        site.notice(f"\ncutting over now. To undo:\n{commands}\nTo resume after a crash:\n  {site.again}\n")
        if files.plan and trial:
            taken = _cut_over_collection(site, files.plan, trial, journal, safety, commands, left.aliases)
            notes += [f"alias '{one}' is another collection's now: it was left there" for one in taken]
    except BaseException as error:
        if not is_absent(journal):
            _drop_trials(site, journal, error)
        raise
    with _collection_named(files, site.again, commands):
        if files.plan:
            delete_with_snapshots(files.plan.target.qdrant, files.plan.trial, files.plan.target.nodes)
        late_writes = _cut_over_graph(site, files, payload, journal, commands, calls)
    _close_reembeds(site, files)
    _close_done(site, journal)
    if site.collection:
        snapshots_left = [one for one in left.journals if one.is_open and _is_clean(one)]
        report_snapshots(site.collection, [*left.awaited, *snapshots_left], site.notice)
    return Restored(safety, late_writes, notes, memories, points)


def _clean_up_killed_runs(site: Site, files: VerifiedFiles, run: Journal) -> _Leftovers:
    """Clean up what killed restores of these stores left on the Qdrant server and in the backup folder.

    A verified trial of the same snapshot is left for this `run`. For the graph see `_clean_up_graphs`.
    """
    left = _Leftovers([], [], [], [])
    for journal in open_journals(site.folder, site.targets, COMMAND):
        if journal.path == run.path:
            continue
        clean_up_backup(site.collection, journal)
        if journal.phase == AWAITED:
            left.awaited.append(journal)
        elif journal.is_open:
            safety = journal.fact("manifest")
            if safety and journal.has_reached(collections.DELETING, graphs.SWAPPING):
                text = f"safety backup of an unfinished run, with the state before it: {site.folder / safety}"
                left.notes.extend(_reported(site, [text]))
            if site.collection:
                found = collections.clean_up_collection(site.collection, journal, files.plan)
                left.notes.extend(_reported(site, found))
                left.aliases.extend(collections.aliases_taken_off(journal))
                run.append(_RESUMED, aliases=left.aliases)
                journal.append(_COLLECTION_CLEAN)
            left.journals.append(journal)
    return left


def _clean_up_graphs(site: Site, left: _Leftovers) -> list[str]:
    """Clean up the graphs that killed restores left, after this run's trials: until then one of them may be needed.

    Closes the journals of which nothing is left. A journal stays open if it names something in a store that this run
    does not open.
    """
    notes = []
    for journal in left.journals:
        if site.graph:
            notes += _reported(site, graphs.clean_up_graph(site.graph, journal))
            journal.append(_GRAPH_CLEAN)
        if _is_clean(journal) and removed(journal):
            journal.close("settled by the next restore")
    return notes


def _reported(site: Site, notes: list[str]) -> list[str]:
    """Report at once; the result shows the notes again."""
    for text in notes:
        site.notice(text)
    return notes


def _is_clean(journal: Journal) -> bool:
    """Whether every store in which the journal names something was opened and cleaned up since."""
    in_graph = journal.fact("throwaway_graph") or journal.fact("safety_graph")
    in_collection = journal.fact("temporary_collection") or not removed(journal)
    graph_is_clean = not in_graph or journal.has_reached(_GRAPH_CLEAN)
    return graph_is_clean and (not in_collection or journal.has_reached(_COLLECTION_CLEAN))


@contextmanager
def _trial_restores(site: Site, files: VerifiedFiles, journal: Journal) -> Iterator[_Trials]:
    """Run the trial restores while the block takes the safety backup. Only the block writes to the journal."""
    graph, plan = files.graph, files.plan
    name = graphs.begin_trial(graph, journal) if graph else ""
    if plan:
        journal.append(collections.TRIAL_BEGUN, temporary_collection=plan.trial)

    def restore_graph(_task: BackgroundTask[_GraphTrial]) -> _GraphTrial:
        if not graph:
            return None, None
        site.say("trial restore of the graph, under a temporary name")
        return graphs.trial_restore(graph, name), newer_memories(graph)

    def restore_collection(task: BackgroundTask[_CollectionTrial]) -> _CollectionTrial:
        if not plan:
            return None, None
        with site.bar("trial restore of the collection", plan.backup.archive.snapshot.size, "bytes") as progress:
            trial = collections.trial_restore(plan, task.moving(progress))
        return trial, newer_points(plan)

    with BackgroundTask(restore_graph) as first, BackgroundTask(restore_collection) as second:
        yield first, second


def _safety_backup(site: Site, files: VerifiedFiles, journal: Journal, trials: _Trials) -> Manifest | None:
    """Back up what is about to be replaced, if it exists. A failed collection cannot be read."""
    graph_trial, collection_trial = trials
    graph = files.graph.target if files.graph else None
    collection = files.plan.target if files.plan else None
    if graph and graph.graph not in list_graphs(graph.conn):
        graph = None
    if collection and (state := health(collection.qdrant, collection.collection)) in {"missing", "failed"}:
        if state == "failed":
            site.say(f"'{collection.collection}' has failed and cannot be read: nothing of it can be backed up")
        collection = None

    @contextmanager
    def bar(title: str, total: int | None, unit: str) -> Iterator[Progress]:
        """Raise a trial's error as soon as there is one."""
        with site.bar(title, total, unit) as progress:
            yield graph_trial.watching(collection_trial.watching(progress))

    safety = None
    if graph or collection:
        site.say("safety backup of the current state")
        safety = take_backup(graph, collection, site.engines, journal, bar, purpose=SAFETY)
    journal.append(graphs.SAFE, manifest=safety.name if safety else None)
    return safety


def _cut_over_collection(
    site: Site,
    plan: RestorePlan,
    trial: collections.Trial,
    journal: Journal,
    safety: Manifest | None,
    undo: str,
    aliases: list[str],
) -> list[str]:
    """Replace the live collection; returns the aliases that others took.

    If that fails, the old one is restored, or the error has the commands to finish.
    """
    try:
        with site.bar("restore the collection", None, "bytes") as progress:
            return collections.cut_over(plan, trial, journal, progress, undo=undo, aliases=aliases)
    except MigrationError as error:
        if not is_absent(journal):
            raise
        trouble = _restore_old_collection(site, plan, safety, journal)
        if trouble is None:
            raise StoreFailed(
                f"the collection could not be restored: {error}; the old one was restored from the safety backup",
                next_step=f"{error.next_step}\nthat command is:\n{site.again}",
            ) from error
        raise StoreFailed(
            f"the collection is not restored: {error}; its trial restore {plan.trial} is complete on the server."
            f" {trouble}",
            next_step=f"resume from the trial restore:\n{site.again}\nor undo it:\n{undo}",
        ) from error


def _restore_old_collection(site: Site, plan: RestorePlan, safety: Manifest | None, journal: Journal) -> str | None:
    """Restore the old collection from the safety backup. Returns None, or why that failed."""
    component, name = safety.collection if safety else None, plan.target.collection
    if safety is None or component is None:
        return "There is no safety backup to restore the old collection from"
    try:
        if health(plan.target.qdrant, name) == "live":
            return f"'{name}' exists, but was not compared with it"
        site.notice(f"restoring the old '{name}' from {safety.path}")
        with closing(open_archive(safety.file_of(component), component)) as backup:
            collections.put_back(plan, plan_restore(backup, plan.target), journal.fact("aliases") or [])
    except MigrationError as error:
        return f"The old one could not be restored either: {error}"
    journal.append(collections.PUT_BACK)
    return None


@contextmanager
def _collection_named(files: VerifiedFiles, again: str, undo: str) -> Iterator[None]:
    """Add to an error after the collection was restored that it is, and how to resume or undo it."""
    try:
        yield
    except MigrationError as error:
        if files.plan:
            error.args = (f"the collection is restored already; {error}",)
            for how, command in (("to resume", again), ("or undo it", undo)):
                error.next_step += "" if command in error.next_step else f"\n{how}:\n{command}"
        raise


def _cut_over_graph(
    site: Site,
    files: VerifiedFiles,
    payload: bytes | None,
    journal: Journal,
    undo: str,
    calls: WriteCalls | None,
) -> Path | None:
    """Replace the graph and drop the old one. Returns the file of its late writes, if there are any.

    `calls`: the `write_calls` before the trial restores.
    """
    if not files.graph or payload is None:
        return None
    require_still_quiet(site, files.graph)  # the cutover of the collection may have taken long
    old = graphs.cut_over(files.graph, payload, journal, undo=undo, quiet=not site.while_running)
    if old is None:
        return None
    target = files.graph.target
    unwritten = only_restored(calls, write_calls(target.conn))
    return graphs.drop_old(target, old, journal, unwritten=unwritten)


def _close_reembeds(site: Site, files: VerifiedFiles) -> None:
    """Close unfinished re-embeddings, whose old collection no longer exists; remove what they staged and saved."""
    if files.plan:
        site.forget_saved()
        for journal in open_journals(site.folder, site.targets, REEMBED):
            with suppress(MigrationError):  # the restore is done; the next re-embed names what is left
                for one in remove_staged(files.plan.target.qdrant, journal):
                    site.notice(f"removed {one}, which an unfinished re-embed had staged; its vectors stay cached")
            journal.close("superseded by a restore")


def _close_done(site: Site, journal: Journal) -> None:
    """Close the journal of a finished restore. It stays open if the server has the safety backup's snapshot."""
    if site.collection:  # again: the server may have refused to delete it
        remove_named_snapshots(site.collection, journal)
    if removed(journal):
        journal.close("done")
    else:
        journal.append(AWAITED)


def _drop_trials(site: Site, journal: Journal, error: BaseException) -> None:
    """Nothing live has changed: drop the trial restores, and close the journal if surely nothing is left.

    If the server may still be restoring, the journal stays open for the next run of any command.
    """
    is_busy = journal.has_reached(collections.DELETING) or (
        journal.has_reached(collections.TRIAL_BEGUN) and not journal.has_reached(collections.TRIAL_VERIFIED)
    )
    if isinstance(error, MigrationError):
        is_busy = isinstance(error, StoreUnreachable)
    temporary, temporary_graph = journal.fact("temporary_collection"), journal.fact("throwaway_graph")
    left = [one for one in (temporary, temporary_graph) if one]
    try:
        if site.collection and temporary:
            delete_with_snapshots(site.collection.qdrant, temporary, site.collection.nodes)
            left.remove(temporary)
        if site.graph and temporary_graph in list_graphs(site.graph.conn):
            drop_graph(site.graph.conn, temporary_graph)
        if not is_busy and removed(journal) and not collections.aliases_taken_off(journal):
            journal.close("failed, nothing changed")
    except MigrationError:  # the operator must read the first error
        error.args = (f"{error}\nmay be left on the servers: {listed(left)}. The next restore removes it",)


def clean_up_untouched(
    graph: GraphSource | None, collection: CollectionSource | None, folder: Path, targets: list[str]
) -> None:
    """Clean up after stopped restores that touched no live store; close journals that name nothing in other stores."""
    for journal in open_journals(folder, targets, COMMAND):
        if journal.has_reached(collections.DELETING, graphs.SWAPPING):
            continue
        temporary, temporary_graph = journal.fact("temporary_collection"), journal.fact("throwaway_graph")
        if (temporary and not collection) or (temporary_graph and not graph):
            continue
        clean = clean_up_backup(collection, journal)
        if collection:
            collections.clean_up_collection(collection, journal)
        if graph:
            graphs.clean_up_graph(graph, journal)
        if not clean:
            journal.append(AWAITED)  # for the next backup, which names the snapshot
        elif journal.is_open:
            journal.close("cleaned up by the next run: nothing live was touched")
