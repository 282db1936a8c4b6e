"""What the FILE arguments of a restore mean, told from their content, and whether this server can take them."""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from lib.backup.archive import ArchiveFacts, SnapshotMember, peek_facts, read_snapshot
from lib.backup.catalog import Deployment, broken_manifests, find_set, latest
from lib.backup.check import ARCHIVE, MANIFEST, RDB, kind_of
from lib.backup.collection import (
    CollectionSource,
    CollectionVerification,
    SegmentCopies,
    has_room,
    known_model,
    verify_collection,
)
from lib.backup.manifest import (
    CHECKED,
    RESTORED,
    CollectionComponent,
    GraphComponent,
    Manifest,
    read_manifest,
)
from lib.backup.snapshot_restore import CollectionBackup, ExpectedIds, SavedSnapshots
from lib.child_process import scratch_folder
from lib.clients.qdrant.collection import CollectionState, refuse_alias
from lib.clients.qdrant.restoring import preflight_upload
from lib.clients.qdrant.segments import SegmentFiles, opened_segments
from lib.clients.qdrant.snapshot_format import SnapshotFacts
from lib.clients.qdrant.snapshots import restorable
from lib.clients.qdrant.transport import Qdrant
from lib.dimensions import EmbeddingSpec
from lib.errors import BackupDamaged, BadFile, StoreFailed, UsageProblem
from lib.files import readable_bytes


@dataclass
class Wanted:
    """The files to restore, with their halves of a manifest where one names them."""

    rdb: Path | None = None
    archive: Path | None = None
    graph_component: GraphComponent | None = None
    collection_component: CollectionComponent | None = None
    notes: list[str] = field(default_factory=list)
    bare: bool = False  # the archive is none, but a snapshot as Qdrant's own API gives it


def read_wanted(words: list[str], folder: Path, owner: Deployment) -> Wanted:
    """Sort the FILE arguments; raises BadFile for one that is missing, empty, a folder or of an unknown kind."""
    wanted = Wanted()
    for word in words:
        if word == "latest":
            _take_set(wanted, latest(folder, owner))
            continue
        path = Path(word)
        kind = kind_of(path)
        if kind == MANIFEST:
            _take_set(wanted, read_manifest(path))
        elif kind == RDB:
            _take_rdb(wanted, path, _component_of(folder, path, "graph", wanted))
        elif kind == ARCHIVE:
            _take_archive(wanted, path, _component_of(folder, path, "collection", wanted))
        else:
            _take_archive(wanted, path, None)
            wanted.bare = True
    return wanted


def _component_of(
    folder: Path, path: Path, name: str, wanted: Wanted
) -> GraphComponent | CollectionComponent | None:
    manifest = find_set(folder, path)
    for broken in [] if manifest else broken_manifests(folder, path):
        wanted.notes.append(
            f"{broken.name}, which may be the manifest of {path.name}, is damaged: the file is verified by its own"
            f" checksum alone.  What is wrong says:  python scripts/backup_automem.py --check {quote(str(broken))}"
        )
    return getattr(manifest, name) if manifest else None


def _take_set(wanted: Wanted, manifest: Manifest) -> None:
    if manifest.graph:
        _take_rdb(wanted, manifest.file_of(manifest.graph), manifest.graph)
    if manifest.collection:
        _take_archive(wanted, manifest.file_of(manifest.collection), manifest.collection)


def _take_rdb(wanted: Wanted, path: Path, component: GraphComponent | CollectionComponent | None) -> None:
    if wanted.rdb:
        raise BadFile(f"{path} and {wanted.rdb} are both of the graph", next_step="name one of them")
    wanted.rdb = path
    wanted.graph_component = component if isinstance(component, GraphComponent) else None


def _take_archive(wanted: Wanted, path: Path, component: GraphComponent | CollectionComponent | None) -> None:
    if wanted.archive:
        raise BadFile(f"{path} and {wanted.archive} are both of the collection", next_step="name one of them")
    wanted.archive = path
    wanted.collection_component = component if isinstance(component, CollectionComponent) else None


UNKNOWN = -1  # how many points are promised
# A server names a snapshot by its collection, its own number and the moment (seen on 1.11.3 and 1.18.3).
_NAME = re.compile(r"(.+)-\d+-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d\.snapshot")


def verify_bare(path: Path, collection: str, spec: EmbeddingSpec) -> CollectionVerification:
    """Both tar levels read to the end, the checksum beside it where there is one, its segments counted where possible.

    Raises BackupDamaged. A segment left out of the file shows in the count alone: only a backup of ours promises ids.
    """
    with scratch_folder("segments-") as scratch:
        copies = SegmentCopies(scratch.path, path.stat().st_size)
        member, snapshot = _inspected(path, copies)
        counted, _ = copies.counted(lambda: _count(copies.segments[0]))
    archive = ArchiveFacts(
        _facts(path, collection, spec, snapshot, member), (member,), UNKNOWN if counted is None else counted
    )
    if counted is None:
        return CollectionVerification(
            CHECKED, "a bare snapshot: both tar levels and its configuration", archive, snapshot
        )
    return CollectionVerification(
        RESTORED, f"{counted} points counted by Qdrant's own engine", archive, snapshot
    )


def _inspected(path: Path, copies: SegmentCopies) -> tuple[SnapshotMember, SnapshotFacts]:
    seen: list[SnapshotFacts] = []
    try:
        with path.open("rb") as stream:
            member = read_snapshot(path.name, stream, lambda one: seen.append(copies.inspect(one)))
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


_TIMES = 3  # the room that a snapshot takes in the temporary folder: kept once, and twice while the engine opens it


def open_backup(path: Path, component: CollectionComponent | None) -> CollectionBackup:
    """Prove the archive; nothing on the target is touched. Raises BackupDamaged."""
    size = component.snapshot_size if component else peek_facts(path)["snapshot_size"]
    ids, kept = ExpectedIds(), SavedSnapshots(room=isinstance(size, int) and has_room(_TIMES * size))
    proof = verify_collection(path, component=component, on_ids=ids.keep, passing=kept.passing)
    return CollectionBackup(path, proof, ids=ids, kept=kept)


def open_bare(path: Path, target: CollectionSource) -> CollectionBackup:
    """Prove a bare snapshot as far as it can be, nothing telling what it should hold. Raises BackupDamaged."""
    return CollectionBackup(path, verify_bare(path, target.collection, target.spec), bare=True)


def require_same_name(backup: CollectionBackup, target: CollectionSource) -> None:
    """Raise UsageProblem where the archive is of another collection than the one that it would replace."""
    name = backup.facts["collection"]
    if name != target.collection:
        raise UsageProblem(
            f"{backup.path} is of collection '{name}', and not put over '{target.collection}' (QDRANT_COLLECTION)",
            next_step=f"export QDRANT_COLLECTION={quote(name)}   if that is the collection to restore",
        )


def require_target(qdrant: Qdrant, collection: str) -> None:
    """Raise where this key may not put a collection in place, or where the name is an alias; nothing is changed."""
    refuse_alias(qdrant, collection)
    preflight_upload(qdrant, f"{collection}__try_{secrets.token_hex(4)}")


def check_version(backup: CollectionBackup, qdrant: Qdrant, *, force: bool) -> None:
    """Raise where this server cannot take the snapshot: it would leave a dead collection behind.

    A bare snapshot does not say which version made it: only its rehearsal tells.
    """
    if backup.bare:
        return
    reason = restorable(str(backup.facts["server"]["version"]), qdrant.version())
    if reason and not force:
        raise StoreFailed(
            f"{backup.path.name} cannot be restored here: {reason}",
            next_step="run a Qdrant of the backup's version (or its next minor), or add --force-version",
        )
