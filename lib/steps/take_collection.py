"""The collection half of a backup: the server's own snapshot, its configuration, the ids it promises."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from lib.backup_set.archive import FACTS, IDS, SNAPSHOT, ArchiveWriter, archive_writer
from lib.backup_set.manifest import UNPROVED, BackupFile, CollectionHalf
from lib.backup_set.sets import COLLECTION_DIR
from lib.dimensions import EmbeddingSpec
from lib.errors import BackupDamaged, MigrationError
from lib.files import private_dir
from lib.journal import Journal
from lib.steps.own_snapshot import own_snapshot
from lib.steps.payloads import PointId
from lib.steps.progress import Progress, steps_of
from lib.steps.prove import prove_collection
from lib.vectors import snapshots
from lib.vectors.cluster import refuse_partial, topology
from lib.vectors.collection import CollectionState, get_state
from lib.vectors.points import scroll
from lib.vectors.recreate import aliases_of
from lib.vectors.transport import Qdrant

STAMP_KEY = "automem_migration"
_GUESSES = {768: "text-embedding-3-small", 1536: "text-embedding-3-small", 3072: "text-embedding-3-large"}


@dataclass(frozen=True)
class CollectionSource:
    """An opened Qdrant, the collection in it, and what the configuration says of its vectors.

    `nodes` are those of its cluster that the configuration lists, none of them asked yet.
    """

    qdrant: Qdrant
    collection: str
    spec: EmbeddingSpec
    nodes: tuple[Qdrant, ...] = ()


def known_model(state: CollectionState, spec: EmbeddingSpec) -> tuple[str, str]:
    """Which model made the vectors, and how that is known: `stamped`, `configured` or `guessed`."""
    stamp = (state.raw["config"].get("metadata") or {}).get(STAMP_KEY) or {}
    if stamp.get("model"):
        return str(stamp["model"]), "stamped"
    if state.size == spec.size:
        return spec.model, "configured"
    return _GUESSES.get(state.size, "unknown"), "guessed"


def order(identity: PointId) -> tuple[int, int | str]:
    """Qdrant's own order of ids: numbers, then UUIDs."""
    return (0, identity) if isinstance(identity, int) else (1, identity)


def parsed(line: str) -> PointId:
    """An id from a line of ids.txt."""
    return int(line) if line.isdigit() else line


def _write_ids(source: CollectionSource, stream: IO[bytes]) -> None:
    for page in scroll(source.qdrant, source.collection):
        stream.writelines(f"{point.id}\n".encode() for point in page)
    stream.flush()


def _lines(stream: IO[bytes]) -> Iterator[str]:
    stream.seek(0)
    return (line.decode().strip() for line in stream)


def _in_both(before: IO[bytes], after: IO[bytes], promised: IO[bytes]) -> int:
    """Ids scrolled before and after the snapshot: those the snapshot must hold. Merged, both being in order."""
    count, later = 0, _lines(after)
    other = next(later, None)
    for line in _lines(before):
        while other is not None and order(parsed(other)) < order(parsed(line)):
            other = next(later, None)
        if other == line:
            promised.write(f"{line}\n".encode())
            count += 1
    promised.flush()
    return count


def take_collection(
    source: CollectionSource,
    folder: Path,
    stamp: str,
    journal: Journal,
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> CollectionHalf:
    """Write `qdrant/qdrant_snapshot_<stamp>.tar.gz` below `folder` and prove it.

    The server-side snapshot is deleted again, whatever happens (see `own_snapshot`). Raises MissingData where the
    collection is absent, MigrationError where it lies on several nodes.
    """
    state = get_state(source.qdrant, source.collection)
    refuse_partial(topology(source.qdrant, source.collection))
    path = private_dir(folder / COLLECTION_DIR) / f"qdrant_snapshot_{stamp}.tar.gz"
    model, known = known_model(state, source.spec)
    facts: dict[str, Any] = {
        "collection": source.collection,
        "server": {"address": source.qdrant.display, "version": source.qdrant.version()},
        "config": state.raw["config"],
        "payload_schema": state.raw.get("payload_schema") or {},
        "aliases": aliases_of(source.qdrant, source.collection),
        "points": state.points,
        "model": model,
        "model_known": known,
    }
    file, facts = _archive(source, path, facts, journal, progress)
    half = _half(file, facts, state)
    return _proved(path, half) if verify else half


def _archive(
    source: CollectionSource, path: Path, facts: dict[str, Any], journal: Journal, progress: Progress | None
) -> tuple[BackupFile, dict[str, Any]]:
    with (
        tempfile.TemporaryFile() as before,
        tempfile.TemporaryFile() as after,
        tempfile.TemporaryFile() as both,
    ):
        _write_ids(source, before)
        with own_snapshot(source.qdrant, source.collection, journal) as made:
            if made.checksum is None:
                raise MigrationError(f"Qdrant gave no checksum with snapshot {made.name}")
            _write_ids(source, after)
            facts["promised_ids"] = _in_both(before, after, both)
            facts["snapshot_name"], facts["snapshot_size"] = made.name, made.size
            facts["snapshot_sha256"] = made.checksum
            with archive_writer(path) as archive:
                _fill(source, archive, facts, made, both, progress)
                size, sha256 = archive.finish()
    return BackupFile(f"{COLLECTION_DIR}/{path.name}", size, sha256), facts


def _fill(
    source: CollectionSource,
    archive: ArchiveWriter,
    facts: dict[str, Any],
    made: snapshots.Snapshot,
    ids: IO[bytes],
    progress: Progress | None,
) -> None:
    import io

    document = orjson.dumps(facts, option=orjson.OPT_INDENT_2)
    archive.add(FACTS, io.BytesIO(document), len(document))
    archive.begin(SNAPSHOT + made.name, made.size)
    got = snapshots.download(
        source.qdrant,
        source.collection,
        made,
        archive.write,
        steps_of(progress) if progress else None,
    )
    archive.end()
    if got.sha256 != made.checksum:
        raise BackupDamaged(f"snapshot {made.name} arrived damaged: its sha256 is not the server's")
    size = ids.tell()
    ids.seek(0)
    archive.add(IDS, ids, size)


def _half(file: BackupFile, facts: dict[str, Any], state: CollectionState) -> CollectionHalf:
    names = ("collection", "server", "points", "payload_schema", "aliases", "model", "model_known")
    more = ("snapshot_name", "snapshot_size", "snapshot_sha256", "promised_ids")
    return CollectionHalf(
        file=file,
        size=state.size,
        distance=state.distance,
        proof=UNPROVED,
        proof_note="--no-verify",
        **{name: facts[name] for name in (*names, *more)},
    )


def _proved(path: Path, half: CollectionHalf) -> CollectionHalf:
    import dataclasses

    proof = prove_collection(path, half=half)
    return dataclasses.replace(half, proof=proof.level, proof_note=proof.note)
