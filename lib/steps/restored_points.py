"""Whether a restored collection is what the backup promises: size, every id, sampled points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lib.backup_set.archive import read_archive
from lib.backup_set.members import SnapshotMember, SnapshotReader
from lib.errors import BackupDamaged
from lib.steps.payloads import PointId
from lib.steps.present import as_text, points_present
from lib.steps.prove_collection import CollectionProof
from lib.steps.restore_kept import KeptSnapshots, PromisedIds
from lib.vectors.collection import get_state
from lib.vectors.points import raw_points, scroll
from lib.vectors.transport import Qdrant

Sample = dict[PointId, tuple[Any, Any]]  # payload and vectors by id, as the server's JSON has them
_SAMPLE = 200
_ANOTHER = "use another backup: python scripts/backup_automem.py --list"


@dataclass(frozen=True)
class CollectionBackup:
    """A proved archive, or a `bare` snapshot: that promises no ids, its proved rehearsal says which they are."""

    path: Path
    proof: CollectionProof
    bare: bool = False
    ids: PromisedIds = field(default_factory=PromisedIds, repr=False, compare=False)
    kept: KeptSnapshots = field(default_factory=KeptSnapshots, repr=False, compare=False)

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

    def promised(self) -> Iterator[list[PointId]]:
        """The promised ids in pages; none of a bare snapshot before its rehearsal was compared."""
        return self.ids.pages()


def compare(backup: CollectionBackup, qdrant: Qdrant, name: str) -> int:
    """Size, distance and every promised id; the number of points. Raises BackupDamaged."""
    state = get_state(qdrant, name)
    if (state.size, state.distance) != (backup.size, backup.proof.snapshot.distance):
        raise BackupDamaged(f"restored as {state.size}d {state.distance}, the snapshot says {backup.size}d")
    if backup.bare and backup.ids.count is None:
        _promise(backup, qdrant, name, state.points)
    with points_present(qdrant, name, payload=False) as present:
        missing = sum(len(page) - len(present.payloads(page)) for page in backup.promised())
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
    every = (one for page in backup.promised() for one in page)
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
