"""A bare Qdrant snapshot, as the server's own API gives it: no manifest, no ids, no version beside it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from lib.backup_set.manifest import CHECKED, RESTORED
from lib.backup_set.members import ArchiveFacts, SnapshotMember, read_snapshot
from lib.dimensions import EmbeddingSpec
from lib.errors import BackupDamaged, UsageProblem
from lib.files import readable_bytes
from lib.scratch_folder import scratch_folder
from lib.steps.prove_collection import Aside, CollectionProof
from lib.steps.take_collection import known_model
from lib.vectors.collection import CollectionState
from lib.vectors.open_segments import SegmentFiles, opened_segments
from lib.vectors.snapshot_tar import SnapshotFacts

UNKNOWN = -1  # how many points are promised
# A server names a snapshot by its collection, its own number and the moment (seen on 1.11.3 and 1.18.3).
_NAME = re.compile(r"(.+)-\d+-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d\.snapshot")


def prove_bare(path: Path, collection: str, spec: EmbeddingSpec) -> CollectionProof:
    """Both tar levels read to the end, the checksum beside it where there is one, its segments counted where possible.

    Raises BackupDamaged. A segment left out of the file shows in the count alone: only a backup of ours promises ids.
    """
    with scratch_folder("segments-") as scratch:
        aside = Aside(scratch.path, path.stat().st_size)
        member, snapshot = _inspected(path, aside)
        counted, _ = aside.counted(lambda: _count(aside.segments[0]))
    archive = ArchiveFacts(
        _facts(path, collection, spec, snapshot, member), (member,), UNKNOWN if counted is None else counted
    )
    if counted is None:
        return CollectionProof(
            CHECKED, "a bare snapshot: both tar levels and its configuration", archive, snapshot
        )
    return CollectionProof(RESTORED, f"{counted} points counted by Qdrant's own engine", archive, snapshot)


def _inspected(path: Path, aside: Aside) -> tuple[SnapshotMember, SnapshotFacts]:
    seen: list[SnapshotFacts] = []
    try:
        with path.open("rb") as stream:
            member = read_snapshot(path.name, stream, lambda one: seen.append(aside.inspected(one)))
    except BackupDamaged as error:
        raise BackupDamaged(f"{path}: {error}", next_step=error.next_step) from error
    _compare_checksum(path, member.sha256)
    if seen[0].absent_shards:
        raise BackupDamaged(
            f"{path} holds no points of shard {seen[0].absent_shards[0]}: they were on another Qdrant node",
            next_step="use a backup that has every node: python scripts/backup_automem.py --list",
        )
    return member, seen[0]


def _compare_checksum(path: Path, sha256: str) -> None:
    """A server keeps `<name>.checksum` beside a snapshot on its disk; an operator may have copied both."""
    beside = path.with_name(f"{path.name}.checksum")
    told = ""
    with suppress(OSError, ValueError, UsageProblem):
        told = readable_bytes(beside).decode("ascii").strip().lower()
    if re.fullmatch(r"[0-9a-f]{64}", told) and told != sha256:
        raise BackupDamaged(
            f"{path} does not have the sha256 that {beside.name} gives: it was damaged or edited"
        )


def _count(files: SegmentFiles) -> int | None:
    with opened_segments(files) as segments:
        return segments.count if segments else None


def _facts(
    path: Path, collection: str, spec: EmbeddingSpec, snapshot: SnapshotFacts, member: SnapshotMember
) -> dict[str, Any]:
    """What an archive's `collection.json` would say, as far as the file tells."""
    named = _NAME.fullmatch(path.name)
    as_live = CollectionState(
        collection,
        snapshot.size,
        snapshot.distance,
        0,
        "",
        optimizer_ok=True,
        vectors_named=snapshot.vectors_named,
        raw={"config": snapshot.config},
    )
    return {
        "collection": named[1] if named else collection,
        "server": {"address": "", "version": ""},
        "config": snapshot.config,
        "payload_schema": snapshot.payload_schema,
        "aliases": [],
        "model": known_model(as_live, spec)[0],
        "snapshot_name": member.name,
        "snapshot_size": member.size,
        "snapshot_sha256": member.sha256,
    }
