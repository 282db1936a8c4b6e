"""Put a collection back into a cluster: each node's snapshot onto its own node, one after the other.

Rehearsed under a temporary name first, as on one server. Nodes that the backup does not know (a cluster made anew) take
the snapshots in the order in which they are listed. Of a shard that several nodes held, one snapshot is put back: the
cluster copies it to as many nodes as the collection's replication factor says. A second one would make the first
node's replica outdated, and both can be lost (seen on 1.11.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

from lib.backup_set.archive import read_archive
from lib.backup_set.members import SnapshotMember, SnapshotReader
from lib.errors import MigrationError, UsageProblem
from lib.journal import Journal
from lib.steps.progress import Progress, steps_of
from lib.steps.restore_collection import (
    REHEARSED,
    SWITCHED,
    SWITCHING,
    drop_dead,
    old_filename,
    patience,
    require_equal,
    temporary_name,
)
from lib.steps.restored_points import CollectionBackup, compare
from lib.steps.take_collection import CollectionSource
from lib.vectors import snapshots
from lib.vectors.cluster import peers_of, wait_settled
from lib.vectors.collection import delete_collection, exists, list_collections
from lib.vectors.recreate import aliases_of, free_aliases, put_aliases
from lib.vectors.restoring import can_fetch_itself, recover, upload_and_restore
from lib.vectors.transport import Qdrant

_LISTED = "export QDRANT_NODE_URLS=http://node1:6333,http://node2:6333   (every node's own address)"


@dataclass(frozen=True)
class Part:
    """One node's snapshot and the node that it goes to, with the shards that it brings."""

    node: Qdrant
    snapshot: SnapshotMember
    shards: tuple[int, ...]
    number: int

    def filename(self, stem: str) -> str:
        """Under which the node keeps the uploaded file."""
        return f"{stem}-{self.number}.snapshot"


def parts_of(backup: CollectionBackup, target: CollectionSource) -> list[Part]:
    """Where each snapshot goes; none where both backup and target are of one server alone.

    Raises UsageProblem where the nodes are not listed, or the target is no cluster.
    """
    told: list[dict[str, Any]] = backup.facts.get("nodes") or []
    nodes = {peers_of(node)[0]: node for node in target.nodes or (target.qdrant,)}
    if told:
        _require_cluster(backup, target, len(told))
    elif peers_of(target.qdrant)[1] < 2:
        return []
    held = [tuple(one["shards"]) for one in told] or [tuple(backup.proof.snapshot.shards)]
    parts: list[Part] = []
    for number in _cover(held):
        node = nodes.get(int(told[number]["peer"])) if told else None
        taken = [part.node for part in parts]
        free = [one for one in nodes.values() if one not in taken] or list(nodes.values())
        parts.append(Part(node or free[0], backup.proof.archive.snapshots[number], held[number], number))
    return parts


def _require_cluster(backup: CollectionBackup, target: CollectionSource, count: int) -> None:
    if not target.nodes:
        raise UsageProblem(
            f"{backup.path.name} holds the snapshots of {count} Qdrant nodes, and QDRANT_NODE_URLS lists none to put "
            "them back to",
            next_step=_LISTED,
        )
    for node in target.nodes:
        if not peers_of(node)[1]:
            raise UsageProblem(
                f"{backup.path.name} holds the snapshots of {count} Qdrant nodes: a server that is no cluster, as "
                f"{node.display}, takes no part of a collection",
                next_step="start it with QDRANT__CLUSTER__ENABLED=true and --uri; one node is enough",
            )


def _cover(held: Sequence[tuple[int, ...]]) -> Iterator[int]:
    """As few snapshots as bring every shard: always the one that brings most of what is still missing."""
    missing = {shard for shards in held for shard in shards}
    while missing:
        best = max(range(len(held)), key=lambda number: len(missing & set(held[number])))
        missing -= set(held[best])
        yield best


def rehearse_parts(
    parts: Sequence[Part],
    backup: CollectionBackup,
    target: CollectionSource,
    journal: Journal,
    progress: Progress | None,
) -> str:
    """As `rehearse` on one server: restore under a temporary name and compare; returns that name."""
    name = temporary_name(target.collection, backup)
    journal.append("rehearsing the collection", temporary_collection=name)
    if name not in list_collections(target.qdrant):
        _upload(parts, backup, target, name, name, progress)
    compare(backup, target.qdrant, name)
    journal.append(REHEARSED)
    return name


def replace_parts(
    parts: Sequence[Part],
    backup: CollectionBackup,
    target: CollectionSource,
    temporary: str,
    journal: Journal,
    progress: Progress | None,
    *,
    undo: str,
    aliases: Iterable[str] = (),
) -> None:
    """As `replace_live` on one server: each node restores from the copy that it already holds."""
    qdrant, name = target.qdrant, target.collection
    locations = [_location(part, temporary) for part in parts]
    standing = exists(qdrant, name)
    wanted = {*aliases, *backup.facts["aliases"], *(aliases_of(qdrant, name) if standing else ())}
    journal.append(SWITCHING, undo=undo, aliases=sorted(wanted))
    if standing:
        delete_collection(qdrant, name)
    again = f"{temporary}-again"
    try:
        if all(locations):
            for part, location in zip(parts, locations, strict=True):
                seconds = patience(part.snapshot.size)
                beside = part is not parts[0]
                recover(part.node, name, str(location), part.snapshot.sha256, seconds=seconds, beside=beside)
                wait_settled(_nodes(target), name, part.node, part.shards, seconds)
        else:
            _upload(parts, backup, target, name, again, progress)
        _forget(parts, name, again)
    except MigrationError:
        drop_dead(qdrant, name)
        raise
    require_equal(backup, qdrant, name, temporary)
    put_aliases(qdrant, name, free_aliases(qdrant, name, wanted))
    journal.append(SWITCHED)


def put_parts_back(
    parts: Sequence[Part],
    saved: CollectionBackup,
    target: CollectionSource,
    temporary: str,
    aliases: Iterable[str],
) -> None:
    """As `put_back` on one server: the collection that stood there, from its safety backup."""
    stem = old_filename(temporary).removesuffix(".snapshot")
    try:
        _upload(parts, saved, target, target.collection, stem, None)
        _forget(parts, target.collection, stem)
        compare(saved, target.qdrant, target.collection)
    except MigrationError:
        drop_dead(target.qdrant, target.collection)
        raise
    put_aliases(target.qdrant, target.collection, free_aliases(target.qdrant, target.collection, aliases))


def _upload(
    parts: Sequence[Part],
    backup: CollectionBackup,
    target: CollectionSource,
    name: str,
    stem: str,
    progress: Progress | None,
) -> None:
    for part in parts:

        def send(stream: IO[bytes], part: Part = part) -> None:
            upload_and_restore(
                part.node,
                name,
                cast("BinaryIO", stream),
                size=part.snapshot.size,
                filename=part.filename(stem),
                checksum=part.snapshot.sha256,
                progress=steps_of(progress) if progress else None,
                seconds=patience(part.snapshot.size),
                beside=part is not parts[0],
            )

        _hand_over(backup, part, send)
        wait_settled(_nodes(target), name, part.node, part.shards, patience(part.snapshot.size))


def _hand_over(backup: CollectionBackup, part: Part, take: SnapshotReader) -> None:
    if len(backup.proof.archive.snapshots) == 1:
        backup.send(take)
    else:
        read_archive(backup.path, on_snapshot=take, on_ids=backup.ids.keep, only=part.snapshot.name)


def _location(part: Part, temporary: str) -> str | None:
    """The URL under which the node fetches its own copy, proved before the delete; None: it is uploaded again."""
    held = snapshots.Snapshot(part.filename(temporary), part.snapshot.size, part.snapshot.sha256, "")
    return can_fetch_itself(part.node, temporary, held, f"{temporary}_probe")


def _nodes(target: CollectionSource) -> tuple[Qdrant, ...]:
    return target.nodes or (target.qdrant,)


def _forget(parts: Iterable[Part], name: str, stem: str) -> None:
    for part in parts:
        snapshots.delete(part.node, name, part.filename(stem))
