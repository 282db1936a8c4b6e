"""Restore a collection from its snapshots, on one server or a cluster, and compare it with the backup."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lib.backup.archive import SnapshotMember, SnapshotReader, read_archive
from lib.backup.collection import CollectionSource, CollectionVerification
from lib.backup.existing_points import as_id, as_text, existing_points, pages
from lib.backup.payloads import PointId
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.cluster import peers_of, wait_active
from lib.clients.qdrant.collection import create_small, delete_collection, get_state, list_collections
from lib.clients.qdrant.points import raw_points, scroll
from lib.clients.qdrant.restoring import can_fetch_itself, recover, upload_and_restore
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import Progress, steps_of
from lib.errors import BackupDamaged, UsageProblem
from lib.files import FULL_DISK

_PAGE = 500


class ExpectedIds:
    """The ids that a backup promises, in a temporary file of its own; `count` is None until they were read."""

    def __init__(self) -> None:
        self.count: int | None = None
        self._file: IO[str] = tempfile.TemporaryFile("w+", encoding="ascii")  # noqa: SIM115 - closed with its owner

    def keep(self, ids: Iterator[str]) -> None:
        """Take them, in place of what an earlier reading told."""
        self._file.seek(0)
        self._file.truncate()
        count = 0
        for one in ids:
            self._file.write(f"{one}\n")
            count += 1
        self._file.flush()
        self.count = count

    def pages(self) -> Iterator[list[PointId]]:
        """All of them, in their order."""
        self._file.seek(0)
        return pages((as_id(line.rstrip("\n")) for line in self._file), _PAGE)


class SavedSnapshots:
    """An archive's snapshots in temporary files, gone with the process, so that it is inflated once.

    They are kept all or none: none without `room`, and where the disk fills up after all.
    """

    def __init__(self, *, room: bool = False) -> None:
        self._files: list[IO[bytes]] | None = [] if room else None

    def passing(self, stream: IO[bytes]) -> IO[bytes]:
        """`stream` again; what is read of it is kept as the next snapshot."""
        if self._files is None:
            return stream
        self._files.append(tempfile.TemporaryFile())  # noqa: SIM115 - closed with its owner
        return cast("IO[bytes]", _Passing(stream, self))

    def write(self, piece: bytes) -> None:
        """More bytes of the snapshot that passes."""
        if self._files is None:
            return
        try:
            self._files[-1].write(piece)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self._files = None

    def stream(self, number: int) -> IO[bytes] | None:
        """The snapshot of this number in the archive, from its start; None where it was not kept."""
        if not self._files:
            return None
        self._files[number].seek(0)
        return self._files[number]


class _Passing:
    def __init__(self, stream: IO[bytes], kept: SavedSnapshots) -> None:
        self._stream, self._kept = stream, kept

    def read(self, size: int, /) -> bytes:
        piece = self._stream.read(size)
        self._kept.write(piece)
        return piece


Sample = dict[PointId, tuple[Any, Any]]  # payload and vectors by id, as the server's JSON has them
_SAMPLE = 200
_ANOTHER = "use another backup: python scripts/backup_automem.py --list"


@dataclass(frozen=True)
class CollectionBackup:
    """A proved archive, or a `bare` snapshot: that promises no ids, its proved rehearsal says which they are."""

    path: Path
    proof: CollectionVerification
    bare: bool = False
    ids: ExpectedIds = field(default_factory=ExpectedIds, repr=False, compare=False)
    kept: SavedSnapshots = field(default_factory=SavedSnapshots, repr=False, compare=False)

    @property
    def facts(self) -> dict[str, Any]:
        """`collection.json` of the archive, or what stands in for it."""
        return self.proof.archive.facts

    @property
    def sha256(self) -> str:
        """The snapshot's own checksum."""
        return self.proof.archive.snapshot_sha256

    @property
    def size(self) -> int:
        """The dimension of the vectors inside."""
        return self.proof.snapshot.size

    @property
    def points(self) -> int | None:
        """How many points are promised; None for a bare snapshot whose segments no engine here could count."""
        return None if self.proof.archive.ids < 0 else self.proof.archive.ids

    def send(self, take: SnapshotReader, snapshot: SnapshotMember) -> None:
        """Hand over this snapshot as a stream: as its proof kept it, else from the archive."""
        if self.bare:
            with self.path.open("rb") as stream:
                take(stream)
        elif kept := self.kept.stream(self.proof.archive.snapshots.index(snapshot)):
            take(kept)
        else:
            read_archive(self.path, on_snapshot=take, only=snapshot.name)

    def expected(self) -> Iterator[list[PointId]]:
        """The promised ids in pages; none of a bare snapshot before its rehearsal was compared."""
        return self.ids.pages()


def compare(backup: CollectionBackup, qdrant: Qdrant, name: str) -> int:
    """Size, distance and every promised id; the number of points. Raises BackupDamaged."""
    state = get_state(qdrant, name)
    if (state.size, state.distance) != (backup.size, backup.proof.snapshot.distance):
        raise BackupDamaged(f"restored as {state.size}d {state.distance}, the snapshot says {backup.size}d")
    if backup.bare and backup.ids.count is None:
        _promise(backup, qdrant, name, state.points)
    with existing_points(qdrant, name, payload=False) as existing:
        missing = sum(len(page) - len(existing.payloads(page)) for page in backup.expected())
    if missing:
        raise BackupDamaged(
            f"{backup.path.name} restores without an error, but {missing} of {backup.ids.count} points are lost",
            next_step=_ANOTHER,
        )
    return state.points


def _promise(backup: CollectionBackup, qdrant: Qdrant, rehearsal: str, found: int) -> None:
    """What the rehearsal of a bare snapshot holds is what it promises, unless its segments were seen to hold more."""
    if found < (backup.points or 0):
        raise BackupDamaged(
            f"{backup.path.name} restores without an error, but with {found} of {backup.points} points",
            next_step=_ANOTHER,
        )
    backup.ids.keep(as_text(point.id) for page in scroll(qdrant, rehearsal) for point in page)


def _sample_ids(backup: CollectionBackup) -> list[PointId]:
    step = max(1, (backup.ids.count or 0) // _SAMPLE)
    every = (one for page in backup.expected() for one in page)
    return list(islice(every, 0, step * _SAMPLE, step))


def sample(qdrant: Qdrant, name: str, backup: CollectionBackup) -> Sample:
    """Points spread over the whole backup as they stand in this collection; its ids were compared before."""
    return raw_points(qdrant, name, _sample_ids(backup))


def require_equal(backup: CollectionBackup, qdrant: Qdrant, name: str, rehearsed: Sample) -> None:
    """`compare`, and raise BackupDamaged unless the sampled points are those of the rehearsal.

    Equal are payloads and vectors (named ones, too).
    """
    compare(backup, qdrant, name)
    if raw_points(qdrant, name, list(rehearsed)) != rehearsed:
        raise BackupDamaged(f"'{name}' differs from its rehearsal after the restore")


_LISTED = "export QDRANT_NODE_URLS=http://node1:6333,http://node2:6333   (every node's own address)"
_TIMEOUT_SECONDS, _SLOW_BYTES_A_SECOND = 60.0, 4_000_000  # seen: 65 MB/s on 1.11.3, 250 MB/s on 1.18.3


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
        return _TIMEOUT_SECONDS + self.snapshot.size / _SLOW_BYTES_A_SECOND

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
            self._wait_active(part, name)

    def fetched_from(self, name: str, stem: str) -> list[str] | None:
        """The URLs under which each node fetches its own copy, proved; None where one cannot."""
        urls = [url for part in self.parts if (url := _location(part, name, stem))]
        return urls if len(urls) == len(self.parts) else None

    def fetch(self, name: str, urls: Sequence[str]) -> None:
        """Have each node restore its snapshot as `name` from where it fetches it."""
        for part, url in zip(self.parts, urls, strict=True):
            allow_existing = part is not self.parts[0]
            recover(
                part.node,
                name,
                url,
                part.snapshot.sha256,
                seconds=part.patience,
                allow_existing=allow_existing,
            )
            self._wait_active(part, name)

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
            allow_existing=part is not self.parts[0],
        )

    def _wait_active(self, part: Part, name: str) -> None:
        if part.number is not None:
            self.begun.add(name)
            nodes = self.target.nodes or (self.target.qdrant,)
            wait_active(nodes, name, part.node, part.shards, part.patience)


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
