"""Whether a restored collection is what the archive promises: size, every id, sampled points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lib.backup_set.archive import read_archive
from lib.errors import BackupDamaged
from lib.steps.present import as_id, points_present
from lib.steps.prove_collection import CollectionProof
from lib.vectors.collection import get_state
from lib.vectors.points import retrieve
from lib.vectors.transport import Qdrant

_SAMPLE = 200
_PAGE = 500


@dataclass(frozen=True)
class CollectionBackup:
    """A proved archive."""

    path: Path
    proof: CollectionProof

    @property
    def facts(self) -> dict[str, Any]:
        """`collection.json` of the archive."""
        return self.proof.archive.facts

    @property
    def sha256(self) -> str:
        """The snapshot's own checksum."""
        return self.proof.archive.snapshot_sha256

    @property
    def size(self) -> int:
        """The dimension of the vectors inside."""
        return self.proof.snapshot.size


def compare(backup: CollectionBackup, qdrant: Qdrant, name: str) -> int:
    """Size, distance and every promised id; the number of points. Raises BackupDamaged."""
    state = get_state(qdrant, name)
    if (state.size, state.distance) != (backup.size, backup.proof.snapshot.distance):
        raise BackupDamaged(f"restored as {state.size}d {state.distance}, the snapshot says {backup.size}d")
    missing = 0
    with points_present(qdrant, name, payload=False) as present:

        def count(ids: Iterator[str]) -> None:
            nonlocal missing
            while page := [as_id(one) for one in islice(ids, _PAGE)]:
                missing += len(page) - len(present.payloads(page))

        read_archive(backup.path, on_ids=count)
    if missing:
        raise BackupDamaged(
            f"{backup.path.name} restores without an error, "
            f"but {missing} of {backup.proof.archive.ids} points are lost",
            next_step="use another backup: python scripts/backup_automem.py --list",
        )
    return state.points


def sample_ids(backup: CollectionBackup) -> list[int | str]:
    """Ids spread over the whole backup, to compare point by point."""
    step = max(1, backup.proof.archive.ids // _SAMPLE)
    found: list[int | str] = []
    read_archive(
        backup.path, on_ids=lambda ids: found.extend(as_id(one) for one in islice(ids, 0, None, step))
    )
    return found[:_SAMPLE]


def same_points(qdrant: Qdrant, left: str, right: str, ids: list[int | str]) -> bool:
    """Whether these points are equal in both collections, payloads and vectors."""
    import numpy as np

    def points(name: str) -> dict[int | str, Any]:
        return {point.id: point for point in retrieve(qdrant, name, ids, payload=True, vector=True)}

    one, other = points(left), points(right)
    return one.keys() == other.keys() and all(
        one[key].payload == other[key].payload and np.array_equal(one[key].vector, other[key].vector)
        for key in one
    )
