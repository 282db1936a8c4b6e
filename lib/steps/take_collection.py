"""The collection half of a backup: the server's own snapshot, its configuration, the ids it promises."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from lib.backup_set.archive import FACTS, IDS, SNAPSHOT, ArchiveWriter, IdsReader, archive_writer
from lib.backup_set.manifest import COLLECTION_DIR, UNPROVED, BackupFile, CollectionHalf
from lib.backup_set.members import SnapshotMember, together
from lib.dimensions import UNKNOWN_MODEL, EmbeddingSpec
from lib.errors import BackupDamaged
from lib.files import private_dir
from lib.journal import Journal
from lib.steps.last_run import journalled_model
from lib.steps.on_nodes import NodeJournal
from lib.steps.own_snapshot import own_snapshot
from lib.steps.payloads import PointId
from lib.steps.progress import Progress, steps_of
from lib.steps.prove_collection import prove_collection
from lib.vectors import snapshots
from lib.vectors.cluster import Node, whole_nodes
from lib.vectors.collection import CollectionState, get_state
from lib.vectors.points import scroll
from lib.vectors.recreate import aliases_of
from lib.vectors.refusals import NotFound
from lib.vectors.transport import Qdrant

STAMP_KEY = "automem_migration"
Made = list[tuple[Node, snapshots.Snapshot]]
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


def known_model(
    state: CollectionState, spec: EmbeddingSpec, journalled: str | None = None
) -> tuple[str, str]:
    """Which model made the vectors, and how that is known: `stamped` (or `journalled`), `configured` or `guessed`."""
    stamp = (state.raw["config"].get("metadata") or {}).get(STAMP_KEY) or {}
    if stamp.get("model") or journalled:
        return str(stamp.get("model") or journalled), "stamped"
    if state.size == spec.size:
        return spec.model, "configured"
    return _GUESSES.get(state.size, UNKNOWN_MODEL), "guessed"


def order(identity: PointId) -> tuple[int, int | str]:
    """Qdrant's own order of ids: numbers, then UUIDs."""
    return (0, identity) if isinstance(identity, int) else (1, identity)


def parsed(line: str) -> PointId:
    """An id from a line of ids.txt."""
    return int(line) if line.isdigit() else line


def _write_ids(source: CollectionSource, stream: IO[bytes]) -> None:
    for page in scroll(source.qdrant, source.collection):
        stream.write("".join([f"{point.id}\n" for point in page]).encode())
    stream.flush()


def _lines(stream: IO[bytes]) -> Iterator[str]:
    stream.seek(0)
    return (line.decode().strip() for line in stream)


def _in_both(before: IO[bytes], after: IO[bytes], promised: IO[bytes]) -> int:
    """Ids scrolled before and after the snapshot: those the snapshot must hold. Merged, both being in order."""
    count, later = 0, _lines(after)
    other = next(later, None)
    for line in _lines(before):
        while other is not None and other != line and order(parsed(other)) < order(parsed(line)):
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
    on_ids: IdsReader | None = None,
) -> CollectionHalf:
    """Write `qdrant/qdrant_snapshot_<stamp>.tar.gz` below `folder` and prove it.

    The server-side snapshots, one on each node that holds a part, are deleted again, whatever happens (see
    `own_snapshot`). Raises MissingData where the collection is absent, and like `whole_nodes` where no set of
    snapshots would hold all of it.
    """
    nodes = holding_nodes(source)
    state = get_state(source.qdrant, source.collection)
    path = private_dir(folder / COLLECTION_DIR) / f"qdrant_snapshot_{stamp}.tar.gz"
    journalled = journalled_model(folder, journal.targets[-1], state.size)
    model, known = known_model(state, source.spec, journalled)
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
    file, facts = _archive(source, nodes, path, facts, journal, progress)
    half = _half(file, facts, state)
    return _proved(path, half, on_ids) if verify else half


def holding_nodes(source: CollectionSource) -> list[Node]:
    """The nodes whose snapshots together hold the collection; raises like `whole_nodes`, and MissingData."""
    try:
        return whole_nodes(source.qdrant, source.nodes, source.collection)
    except NotFound:
        get_state(source.qdrant, source.collection)  # says what there is instead
        raise


def require_whole(source: CollectionSource | None) -> None:
    """Raise like `holding_nodes` where a backup of the collection would not hold all of it; nothing is written."""
    if source:
        holding_nodes(source)


def _archive(
    source: CollectionSource,
    nodes: list[Node],
    path: Path,
    facts: dict[str, Any],
    journal: Journal,
    progress: Progress | None,
) -> tuple[BackupFile, dict[str, Any]]:
    with (
        tempfile.TemporaryFile() as before,
        tempfile.TemporaryFile() as after,
        tempfile.TemporaryFile() as both,
    ):
        _write_ids(source, before)
        with ExitStack() as standing:
            made = [(node, standing.enter_context(_snapshot_on(node, source, journal))) for node in nodes]
            _write_ids(source, after)
            facts["promised_ids"] = _in_both(before, after, both)
            facts |= _facts_of(made)
            with archive_writer(path) as archive:
                _fill(source, archive, facts, made, both, progress)
                size, sha256 = archive.finish()
    return BackupFile(f"{COLLECTION_DIR}/{path.name}", size, sha256), facts


@contextmanager
def _snapshot_on(node: Node, source: CollectionSource, journal: Journal) -> Iterator[snapshots.Snapshot]:
    about = NodeJournal(journal, node.qdrant.display) if source.nodes else journal
    with own_snapshot(node.qdrant, source.collection, about) as made:
        yield snapshots.with_checksum(node.qdrant, source.collection, made)


def _facts_of(made: Made) -> dict[str, Any]:
    """What collection.json says of the snapshots, and where there are several, of each."""
    each = [
        {
            "peer": node.peer,
            "address": node.qdrant.display,
            "shards": list(node.shards),
            "snapshot_name": one.name,
            "snapshot_size": one.size,
            "snapshot_sha256": one.checksum,
        }
        for node, one in made
    ]
    whole = together([SnapshotMember(one.name, one.size, str(one.checksum)) for _, one in made])
    facts = {"snapshot_name": whole.name, "snapshot_size": whole.size, "snapshot_sha256": whole.sha256}
    return {**facts, "nodes": each if len(each) > 1 else []}


def _fill(
    source: CollectionSource,
    archive: ArchiveWriter,
    facts: dict[str, Any],
    made: Made,
    ids: IO[bytes],
    progress: Progress | None,
) -> None:
    import io

    document = orjson.dumps(facts, option=orjson.OPT_INDENT_2)
    archive.add(FACTS, io.BytesIO(document), len(document))
    for node, one in made:
        archive.begin(SNAPSHOT + one.name, one.size)
        shown = steps_of(progress) if progress else None
        got = snapshots.download(node.qdrant, source.collection, one, archive.write, shown)
        archive.end()
        if got.sha256 != one.checksum:
            raise BackupDamaged(f"snapshot {one.name} arrived damaged: its sha256 is not the server's")
    size = ids.tell()
    ids.seek(0)
    archive.add(IDS, ids, size)


def _half(file: BackupFile, facts: dict[str, Any], state: CollectionState) -> CollectionHalf:
    names = ("collection", "server", "points", "payload_schema", "aliases", "model", "model_known")
    more = ("snapshot_name", "snapshot_size", "snapshot_sha256", "nodes", "promised_ids")
    return CollectionHalf(
        file=file,
        size=state.size,
        distance=state.distance,
        proof=UNPROVED,
        proof_note="--no-verify",
        **{name: facts[name] for name in (*names, *more)},
    )


def _proved(path: Path, half: CollectionHalf, on_ids: IdsReader | None) -> CollectionHalf:
    import dataclasses

    proof = prove_collection(path, half=half, on_ids=on_ids)
    return dataclasses.replace(half, proof=proof.level, proof_note=proof.note)
