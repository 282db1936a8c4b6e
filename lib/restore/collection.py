"""Restore a collection from its snapshots: a trial under a temporary name, then the cutover. One server or a cluster.

A restore can destroy the collection that it restores onto, and a failed collection keeps a 1.11.3 server from
starting again. So nothing is restored onto a live one, and a temporary one whose restore failed is deleted at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import IO, Any, BinaryIO, cast

from lib.backup.archive import SnapshotMember
from lib.backup.collection import CollectionSource
from lib.backup.points import existing_points, orphan_ids
from lib.clients.qdrant import collection as collections
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.cluster import LIST_NODES, peers_of, wait_active
from lib.clients.qdrant.collection import delete_collection, exists, get_state, health, restore_aliases
from lib.clients.qdrant.points import PointId, raw_points, scroll
from lib.clients.qdrant.snapshots import can_fetch_itself, recover, upload_and_restore
from lib.clients.qdrant.transport import Qdrant, QdrantError
from lib.concurrency import Progress
from lib.errors import BackupDamaged, MigrationError, StoreFailed, UsageProblem
from lib.journal import Journal
from lib.restore.inputs import CollectionBackup

# Phases of the journal.
TRIAL_BEGUN, TRIAL_VERIFIED = "rehearsing the collection", "collection rehearsed"
DELETING, RESTORED, PUT_BACK = "deleting the live collection", "collection restored", "old collection put back"
_ROOM_FACTOR = 4  # the file, the trial's collection, what is unpacked, the file fetched
_UNDER_WAY_SECONDS = 60.0  # for a restore that the server continues although its client was killed
_TIMEOUT_SECONDS, _SLOW_BYTES_A_SECOND = 60.0, 4_000_000  # seen: 65 MB/s on 1.11.3, 250 MB/s on 1.18.3
FROM_GRAPH = "or do without it, the graph is enough (if that is lost, too, restore the .rdb alone first):"
FROM_GRAPH += "\npython scripts/reembed_embeddings.py"
Sample = dict[PointId, tuple[Any, Any]]  # payload and vectors by id, as the server's JSON has them
_SAMPLE = 200


@dataclass(frozen=True)
class Part:
    """One snapshot and the node that it goes to; in a cluster with a number and the shards that it brings."""

    node: Qdrant
    snapshot: SnapshotMember
    number: int | None = None
    shards: tuple[int, ...] = ()

    @property
    def timeout(self) -> float:
        """Seconds to wait for the end of the restore if the node's answer does not come."""
        return _TIMEOUT_SECONDS + self.snapshot.size / _SLOW_BYTES_A_SECOND

    def filename(self, stem: str) -> str:
        """Under which the node stores the uploaded file."""
        return f"{stem}.snapshot" if self.number is None else f"{stem}-{self.number}.snapshot"


Copy = tuple[str, str]  # the URL of a snapshot that a node can fetch from itself, and its sha256 in hex


@dataclass(frozen=True)
class Trial:
    """A verified trial restore: a sample of its points, and the copies that the cutover fetches; None: it uploads.

    `process`: the server process that had it, see `startup`.
    """

    sample: Sample
    copies: list[Copy] | None
    process: str | None


@dataclass(frozen=True)
class RestorePlan:
    """A backup, the collection that it replaces, and the node that each snapshot goes to.

    `begun`: names under which at least one of several parts was restored.
    """

    backup: CollectionBackup
    target: CollectionSource
    parts: tuple[Part, ...]
    begun: set[str] = field(default_factory=set, compare=False)

    @property
    def trial(self) -> str:
        """The name of the trial restore of this very snapshot."""
        return f"{self.target.collection}__try_{self.backup.archive.snapshot.sha256[:16]}"

    def upload(self, name: str, stem: str, progress: Progress | None) -> None:
        """Send every snapshot and have it restored as `name`. The nodes store the files under `stem`."""
        for part in self.parts:
            self.backup.send(partial(self._send, part, name, stem, progress), part.snapshot)
            self._wait_active(part, name)

    def copies(self) -> list[Copy] | None:
        """The snapshots of the trial restore that the nodes can fetch from themselves, tested; None if one cannot."""
        found = []
        for part in self.parts:
            file = snapshots.Snapshot(part.filename(self.trial), part.snapshot.size, part.snapshot.sha256, "")
            if url := can_fetch_itself(part.node, self.trial, file, f"{self.trial}_probe"):
                found.append((url, part.snapshot.sha256))
        return found if len(found) == len(self.parts) else None

    def fetch(self, name: str, copies: Sequence[Copy]) -> None:
        """Have each node restore its copy as `name` from its own URL."""
        for part, copy in zip(self.parts, copies, strict=True):
            recover(part.node, name, *copy, seconds=part.timeout, allow_existing=part is not self.parts[0])
            self._wait_active(part, name)

    def verify_trial(self) -> None:
        """Verify the trial restore, see `verify_restored`."""
        verify_restored(self.backup, self.target.qdrant, self.trial)

    def delete_files(self, name: str, stem: str) -> None:
        """Delete the files that were uploaded to `name` under `stem`, if there are any."""
        for part in self.parts:
            snapshots.delete(part.node, name, part.filename(stem))

    def withdraw_trial(self) -> None:
        """Delete the files of a trial restore that created no collection.

        The server lists them only while a collection of that name exists, so an empty one is created for the moment.
        """
        qdrant, name = self.target.qdrant, self.trial
        if exists(qdrant, name):
            return
        collections.create_small(qdrant, name)
        try:
            self.delete_files(name, name)
        finally:
            delete_collection(qdrant, name)

    def drop_unusable(self) -> None:
        """Delete what a failed restore left under the live name.

        A failed collection would keep a 1.11.3 server from starting; one with some of its parts would look complete.
        """
        qdrant, name = self.target.qdrant, self.target.collection
        with suppress(MigrationError):  # the operator must read the first error
            if name in self.begun or health(qdrant, name) == "failed":
                delete_collection(qdrant, name)

    def complete(self, aliases: Iterable[str]) -> list[str]:
        """Set what a snapshot does not hold: the read fan-out, and the aliases. Returns those that others took."""
        qdrant, name = self.target.qdrant, self.target.collection
        collections.put_fan_out(qdrant, name, self.backup.archive.facts["config"])
        return restore_aliases(qdrant, name, aliases)

    def _send(self, part: Part, name: str, stem: str, progress: Progress | None, stream: IO[bytes]) -> None:
        upload_and_restore(
            part.node,
            name,
            cast("BinaryIO", stream),
            size=part.snapshot.size,
            filename=part.filename(stem),
            checksum=part.snapshot.sha256,
            progress=progress,
            seconds=part.timeout,
            allow_existing=part is not self.parts[0],
        )

    def _wait_active(self, part: Part, name: str) -> None:
        if part.number is not None:
            self.begun.add(name)
            nodes = self.target.nodes or (self.target.qdrant,)
            wait_active(nodes, name, part.node, part.shards, part.timeout)


def plan_restore(backup: CollectionBackup, target: CollectionSource) -> RestorePlan:
    """Assign each snapshot to a node. The nodes are asked for their peer ids.

    Raises UsageProblem if the nodes are not listed, or if the target is no cluster.
    """
    recorded: list[dict[str, Any]] = backup.archive.facts.get("nodes") or []
    held = backup.archive.snapshots
    if not recorded and peers_of(target.qdrant)[1] < 2:
        return RestorePlan(backup, target, (Part(target.qdrant, held[0]),))
    nodes = _nodes_of(backup, target, len(recorded))
    shards = [tuple(one["shards"]) for one in recorded] or [tuple(backup.snapshot.shards)]
    parts: list[Part] = []
    missing = {shard for held_there in shards for shard in held_there}
    while missing:  # as few snapshots as bring every shard: always the one that brings most of what is missing
        number = max(range(len(shards)), key=lambda one: len(missing & set(shards[one])))
        missing -= set(shards[number])
        node = nodes.get(int(recorded[number]["peer"])) if recorded else None
        taken = [part.node for part in parts]
        free = [one for one in nodes.values() if one not in taken] or list(nodes.values())
        parts.append(Part(node or free[0], held[number], number, shards[number]))
    return RestorePlan(backup, target, tuple(parts))


def _nodes_of(backup: CollectionBackup, target: CollectionSource, count: int) -> dict[int, Qdrant]:
    """The listed nodes by their peer ids, for the snapshots of `count` nodes (0: of one server)."""
    if count and not target.nodes:
        raise UsageProblem(
            f"{backup.path.name} holds the snapshots of {count} Qdrant nodes, and QDRANT_NODE_URLS lists none to"
            " restore them to",
            next_step=LIST_NODES,
        )
    found: dict[int, Qdrant] = {}
    for node in target.nodes or (target.qdrant,):
        peer, peers = peers_of(node)
        if count and not peers:
            raise UsageProblem(
                f"{backup.path.name} holds the snapshots of {count} Qdrant nodes: a server that is no cluster, as "
                f"{node.display}, takes no part of a collection",
                next_step="start it with QDRANT__CLUSTER__ENABLED=true and --uri; one node is enough",
            )
        found[peer] = node
    return found


def verify_restored(backup: CollectionBackup, qdrant: Qdrant, name: str) -> None:
    """Compare size, distance and every expected id with the backup. Raises BackupDamaged."""
    state = get_state(qdrant, name)
    if (state.size, state.distance) != (backup.snapshot.size, backup.snapshot.distance):
        raise BackupDamaged(f"restored as {state.size}d {state.distance}, the snapshot says {backup.snapshot.size}d")
    restored = f"{backup.path.name} restores without an error, but"
    if not backup.ids.complete:  # a bare snapshot lists no ids: those of its trial restore are expected
        if state.points < (backup.points or 0):
            raise BackupDamaged(f"{restored} with {state.points} of {backup.points} points")
        backup.ids.fill(point.id for page in scroll(qdrant, name) for point in page)
    with existing_points(qdrant, name, payload=False) as existing:
        missing = sum(1 for _ in orphan_ids(backup.ids, existing.payloads))
    if missing:
        raise BackupDamaged(f"{restored} {missing} of {len(backup.ids)} points are lost")


def _sample(plan: RestorePlan) -> Sample:
    """Points of the trial restore, spread over all the backup's ids."""
    ids = plan.backup.ids
    step = max(1, len(ids) // _SAMPLE)
    every = chain.from_iterable(ids.ids())
    return raw_points(plan.target.qdrant, plan.trial, list(islice(every, 0, step * _SAMPLE, step)))


def _verify_live(plan: RestorePlan, sample: Sample) -> None:
    """Raise BackupDamaged unless the restored collection equals its trial; it is deleted then.

    Compared are every id, and payloads and vectors (also named ones) of the sample.
    """
    qdrant, name = plan.target.qdrant, plan.target.collection
    try:
        verify_restored(plan.backup, qdrant, name)
        _verify_sample(qdrant, name, sample)
    except BackupDamaged:
        with suppress(MigrationError):  # the operator must read the first error
            delete_collection(qdrant, name)
        raise


def _verify_sample(qdrant: Qdrant, name: str, sample: Sample) -> None:
    if raw_points(qdrant, name, list(sample)) != sample:
        raise BackupDamaged(f"'{name}' differs from its trial restore")


def trial_restore(plan: RestorePlan, progress: Progress | None) -> Trial:
    """Restore under a temporary name, compare, test how to cut over. The caller deletes a failed one at once.

    A trial that a killed run verified is used again: its name holds the snapshot's checksum.
    """
    qdrant, name = plan.target.qdrant, plan.trial
    process = snapshots.startup(qdrant)
    if is_new := not exists(qdrant, name):
        # --force-version, or a bare snapshot of any version.
        foreign = snapshots.restorable(str(plan.backup.archive.facts["server"]["version"]), qdrant.version())
        try:
            plan.upload(name, name, progress)
        except QdrantError as error:
            with suppress(MigrationError):  # the operator must read the first error
                plan.withdraw_trial()
            if error.status < 500 and not (foreign and error.status == 400):  # so 1.11.3 refuses one of 1.19.0
                raise
            # On a full disk a server says no more than that it failed to unpack, or to process the field (1.18.3).
            room = _ROOM_FACTOR * sum(part.snapshot.size for part in plan.parts) / 2**20
            step = f"look at the Qdrant server's log and at its disk (it needs about {room:,.0f} MiB more than its data"
            step += " takes now), then run the same command again"
            if foreign:
                step += f"\nif the snapshot is of another version of Qdrant, use a server of that version\n{FROM_GRAPH}"
            text = f"'{plan.target.collection}' is untouched: the backup's trial restore failed: {error}"
            raise StoreFailed(text, next_step=step) from error
    try:
        plan.verify_trial()
    except BackupDamaged as error:
        if is_new and not snapshots.restarted(qdrant, process):
            raise
        raise _lost_by_restart(qdrant, error, f"'{plan.target.collection}' is untouched: ") from error
    return Trial(_sample(plan), plan.copies(), process)


def _lost_by_restart(qdrant: Qdrant, error: BackupDamaged, state: str = "") -> StoreFailed:
    """The error for a restored collection that differs because Qdrant restarted: 1.11.3 may lose its points then."""
    return StoreFailed(
        f"{state}Qdrant at {qdrant.display} restarted after a restore and lost what it had restored: {error}",
        next_step="the backup is not to blame: run the same command again",
    )


def cut_over(
    plan: RestorePlan,
    trial: Trial,
    journal: Journal,
    progress: Progress | None,
    *,
    undo: str,
    aliases: Iterable[str] = (),
) -> list[str]:
    """Delete the live collection and restore under its name from the copies that the servers already hold.

    If a server cannot fetch its copy, the files are uploaded again. `aliases` are those that an earlier run took off
    with the collection. A failed restore is deleted at once. Returns the aliases that another collection has.
    """
    qdrant, name = plan.target.qdrant, plan.target.collection
    if snapshots.restarted(qdrant, trial.process):  # it may have lost points of the trial restore
        trial = trial_restore(plan, None)
    existed = exists(qdrant, name)
    current = collections.aliases_of(qdrant, name) if existed else ()
    wanted = {*aliases, *plan.backup.archive.facts["aliases"], *current}
    journal.append(DELETING, undo=undo, aliases=sorted(wanted))
    if existed:
        delete_collection(qdrant, name)
    second_upload = f"{plan.trial}-again"
    try:
        if trial.copies:
            plan.fetch(name, trial.copies)
        else:
            plan.upload(name, second_upload, progress)
        for stem in (second_upload, _old_stem(plan)):  # also what a killed run uploaded
            plan.delete_files(name, stem)
    except MigrationError:
        plan.drop_unusable()
        raise
    try:
        _verify_live(plan, trial.sample)
    except BackupDamaged as error:
        if snapshots.restarted(qdrant, trial.process):
            raise _lost_by_restart(qdrant, error) from error
        raise
    taken = plan.complete(wanted)
    journal.append(RESTORED)
    return taken


def put_back(plan: RestorePlan, saved: RestorePlan, aliases: Iterable[str]) -> None:
    """After the cutover of `plan` failed: restore the old collection, which does not exist now, from `saved`."""
    qdrant, name, stem = saved.target.qdrant, saved.target.collection, _old_stem(plan)
    try:
        saved.upload(name, stem, None)
        saved.delete_files(name, stem)
        verify_restored(saved.backup, qdrant, name)
    except MigrationError:
        saved.drop_unusable()
        raise
    saved.complete(aliases)


def _old_stem(plan: RestorePlan) -> str:
    """Under which the old collection's snapshots are uploaded when it is put back."""
    return f"{plan.trial}-old"


def is_absent(journal: Journal) -> bool:
    """Whether the run deleted the live collection and restored none: the next run uses its trial."""
    return journal.has_reached(DELETING) and not journal.has_reached(RESTORED, PUT_BACK)


def clean_up_collection(target: CollectionSource, journal: Journal, plan: RestorePlan | None = None) -> list[str]:
    """Clean up after a killed run; returns what was done. A verified trial restore of `plan` is left for this run."""
    qdrant, collection = target.qdrant, target.collection
    if journal.has_reached(DELETING) and health(qdrant, collection) == "restoring":
        with suppress(StoreFailed):  # if it fails in the end, this run replaces it
            snapshots.wait_restored(qdrant, collection, _UNDER_WAY_SECONDS)
    name = journal.fact("temporary_collection")
    if name is None or not exists(qdrant, name):
        return []
    if plan and journal.has_reached(TRIAL_VERIFIED) and name == plan.trial:
        return [f"resuming from {name}, which an earlier run verified"]
    snapshots.delete_with_snapshots(qdrant, name, target.nodes)
    return [f"removed the temporary collection {name}"]


def aliases_taken_off(journal: Journal) -> list[str]:
    """The aliases that a run, or one that it resumed, took off with the collection and did not put back."""
    return [] if journal.has_reached(RESTORED, PUT_BACK) else list(journal.fact("aliases") or [])
