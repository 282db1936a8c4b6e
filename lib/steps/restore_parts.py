"""Where a backup's snapshots go: to a server alone the one that there is, into a cluster each node's own.

In a cluster they go one after the other. Nodes that the backup does not know (a cluster made anew) take the snapshots
in the order in which they are listed. Of a shard that several nodes held, one snapshot is put back: the cluster copies
it to as many nodes as the collection's replication factor says. A second one would make the first node's replica
outdated, and both can be lost (seen on 1.11.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, BinaryIO, cast

from lib.backup_set.members import SnapshotMember
from lib.errors import UsageProblem
from lib.steps.progress import Progress, steps_of
from lib.steps.restored_points import CollectionBackup
from lib.steps.take_collection import CollectionSource
from lib.vectors import snapshots
from lib.vectors.cluster import peers_of, wait_settled
from lib.vectors.collection import delete_collection, list_collections
from lib.vectors.recreate import create_small
from lib.vectors.restoring import can_fetch_itself, recover, upload_and_restore
from lib.vectors.transport import Qdrant

_LISTED = "export QDRANT_NODE_URLS=http://node1:6333,http://node2:6333   (every node's own address)"
_PATIENCE_SECONDS, _SLOW_BYTES_A_SECOND = 60.0, 4_000_000  # seen: 65 MB/s on 1.11.3, 250 MB/s on 1.18.3


@dataclass(frozen=True)
class Part:
    """One snapshot and the node that it goes to; in a cluster with a number and the shards that it brings."""

    node: Qdrant
    snapshot: SnapshotMember
    number: int | None = None
    shards: tuple[int, ...] = ()

    @property
    def patience(self) -> float:
        """Seconds to wait for the node to put it in place when its answer does not come."""
        return _PATIENCE_SECONDS + self.snapshot.size / _SLOW_BYTES_A_SECOND

    def filename(self, stem: str) -> str:
        """Under which the node keeps the uploaded file."""
        return f"{stem}.snapshot" if self.number is None else f"{stem}-{self.number}.snapshot"


@dataclass(frozen=True)
class Placement:
    """A backup, the collection that it is for, and where each of its snapshots goes.

    `begun`: names under which at least one of several parts was put in place.
    """

    backup: CollectionBackup
    target: CollectionSource
    parts: tuple[Part, ...]
    begun: set[str] = field(default_factory=set, compare=False)

    def upload(self, name: str, stem: str, progress: Progress | None) -> None:
        """Send every snapshot and have it restored as `name`; the nodes keep the files by `stem`."""
        for part in self.parts:
            self.backup.send(partial(self._send, part, name, stem, progress), part.snapshot)
            self._wait_settled(part, name)

    def fetched_from(self, name: str, stem: str) -> list[str] | None:
        """The URLs under which each node fetches its own copy, proved; None where one cannot."""
        urls = [url for part in self.parts if (url := _location(part, name, stem))]
        return urls if len(urls) == len(self.parts) else None

    def fetch(self, name: str, urls: Sequence[str]) -> None:
        """Have each node restore its snapshot as `name` from where it fetches it."""
        for part, url in zip(self.parts, urls, strict=True):
            beside = part is not self.parts[0]
            recover(part.node, name, url, part.snapshot.sha256, seconds=part.patience, beside=beside)
            self._wait_settled(part, name)

    def forget(self, name: str, stem: str) -> None:
        """Delete the files that were uploaded to `name` by `stem`, where there are any."""
        for part in self.parts:
            snapshots.delete(part.node, name, part.filename(stem))

    def withdraw(self, name: str, stem: str) -> None:
        """Delete the files of a restore that made no collection `name`: they are reached through a small one."""
        qdrant = self.target.qdrant
        if name in list_collections(qdrant):
            return
        create_small(qdrant, name)
        try:
            self.forget(name, stem)
        finally:
            delete_collection(qdrant, name)

    def _send(self, part: Part, name: str, stem: str, progress: Progress | None, stream: IO[bytes]) -> None:
        upload_and_restore(
            part.node,
            name,
            cast("BinaryIO", stream),
            size=part.snapshot.size,
            filename=part.filename(stem),
            checksum=part.snapshot.sha256,
            progress=steps_of(progress) if progress else None,
            seconds=part.patience,
            beside=part is not self.parts[0],
        )

    def _wait_settled(self, part: Part, name: str) -> None:
        if part.number is not None:
            self.begun.add(name)
            nodes = self.target.nodes or (self.target.qdrant,)
            wait_settled(nodes, name, part.node, part.shards, part.patience)


def place(backup: CollectionBackup, target: CollectionSource) -> Placement:
    """Where each snapshot goes; the nodes are asked who they are.

    Raises UsageProblem where the nodes are not listed, or the target is no cluster.
    """
    told: list[dict[str, Any]] = backup.facts.get("nodes") or []
    held = backup.proof.archive.snapshots
    if not told and peers_of(target.qdrant)[1] < 2:
        return Placement(backup, target, (Part(target.qdrant, held[0]),))
    nodes = _nodes_of(backup, target, len(told))
    shards = [tuple(one["shards"]) for one in told] or [tuple(backup.proof.snapshot.shards)]
    parts: list[Part] = []
    for number in _cover(shards):
        node = nodes.get(int(told[number]["peer"])) if told else None
        taken = [part.node for part in parts]
        free = [one for one in nodes.values() if one not in taken] or list(nodes.values())
        parts.append(Part(node or free[0], held[number], number, shards[number]))
    return Placement(backup, target, tuple(parts))


def _nodes_of(backup: CollectionBackup, target: CollectionSource, count: int) -> dict[int, Qdrant]:
    """The listed nodes by their peer ids, for the snapshots of `count` nodes (0: a server's alone)."""
    if count and not target.nodes:
        raise UsageProblem(
            f"{backup.path.name} holds the snapshots of {count} Qdrant nodes, and QDRANT_NODE_URLS lists none to put "
            "them back to",
            next_step=_LISTED,
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


def _cover(held: Sequence[tuple[int, ...]]) -> Iterator[int]:
    """As few snapshots as bring every shard: always the one that brings most of what is still missing."""
    missing = {shard for shards in held for shard in shards}
    while missing:
        best = max(range(len(held)), key=lambda number: len(missing & set(held[number])))
        missing -= set(held[best])
        yield best


def _location(part: Part, name: str, stem: str) -> str | None:
    held = snapshots.Snapshot(part.filename(stem), part.snapshot.size, part.snapshot.sha256, "")
    return can_fetch_itself(part.node, name, held, f"{name}_probe")
