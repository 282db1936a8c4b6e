"""Whether a restored collection is what the backup promises: size, every id, sampled points."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lib.backup_set.archive import read_archive
from lib.backup_set.members import SnapshotReader
from lib.errors import BackupDamaged
from lib.steps.payloads import PointId
from lib.steps.present import as_id, as_text, points_present
from lib.steps.prove_collection import CollectionProof
from lib.vectors.collection import get_state
from lib.vectors.points import raw_points, scroll
from lib.vectors.transport import Qdrant

_SAMPLE = 200
_PAGE = 500
_ANOTHER = "use another backup: python scripts/backup_automem.py --list"


class PromisedIds:
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
        ids = (as_id(line.rstrip("\n")) for line in self._file)
        while page := list(islice(ids, _PAGE)):
            yield page


@dataclass(frozen=True)
class CollectionBackup:
    """A proved archive, or a `bare` snapshot: that promises no ids, its proved rehearsal says which they are."""

    path: Path
    proof: CollectionProof
    bare: bool = False
    ids: PromisedIds = field(default_factory=PromisedIds, repr=False, compare=False)

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

    def send(self, take: SnapshotReader, snapshot: str) -> None:
        """Hand over the snapshot of this name as a stream; the ids are kept as they pass."""
        if not self.bare:
            read_archive(self.path, on_snapshot=take, on_ids=self.ids.keep, only=snapshot)
            return
        with self.path.open("rb") as stream:
            take(stream)

    def promised(self) -> Iterator[list[PointId]]:
        """The promised ids in pages."""
        if self.ids.count is None and not self.bare:
            read_archive(self.path, on_ids=self.ids.keep)
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


def sample_ids(backup: CollectionBackup) -> list[PointId]:
    """Ids spread over the whole backup, to compare point by point; they were read before."""
    step = max(1, (backup.ids.count or 0) // _SAMPLE)
    every = (one for page in backup.promised() for one in page)
    return list(islice(every, 0, step * _SAMPLE, step))


def require_same_points(qdrant: Qdrant, name: str, rehearsal: str, ids: list[PointId]) -> None:
    """Raise BackupDamaged unless these points are equal in both collections, payloads and vectors (named ones, too)."""
    if raw_points(qdrant, name, ids) != raw_points(qdrant, rehearsal, ids):
        raise BackupDamaged(f"'{name}' differs from the rehearsal {rehearsal} after the restore")
