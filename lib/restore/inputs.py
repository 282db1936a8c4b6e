"""The FILE arguments of a restore: what each is, by its content; backups of a collection, opened and verified."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, cast

from lib.backup.archive import ArchiveFacts, SnapshotMember, SnapshotReader, peek_facts, read_archive, read_snapshot
from lib.backup.automem_files import COLLECTION, GRAPH, AutoMemFile, automem_files
from lib.backup.catalog import Deployment, find_set, latest
from lib.backup.check import ARCHIVE, AUTOMEM, MANIFEST, RDB, kind_of
from lib.backup.collection import CollectionSource, SegmentCopies, has_room, known_model, verify_collection
from lib.backup.manifest import RESTORED, CollectionComponent, GraphComponent, read_manifest
from lib.backup.points import TemporaryIdTable
from lib.child_process import scratch_folder
from lib.clients.qdrant.segments import SegmentFiles, opened_segments
from lib.clients.qdrant.snapshot_format import SnapshotFacts
from lib.dimensions import EmbeddingSpec
from lib.errors import BackupDamaged, BadFile, UsageProblem
from lib.files import FULL_DISK, PassThrough, readable_bytes

C = TypeVar("C", GraphComponent, CollectionComponent)
_TIMES = 3  # the room that a snapshot takes in the temporary folder: once saved, and twice while the engine opens it
_UNKNOWN = -1  # how many points are expected
# A server names a snapshot by its collection, its own number and the moment (seen on 1.11.3 and 1.18.3).
_NAME = re.compile(r"(.+)-\d+-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d\.snapshot")


@dataclass(frozen=True)
class Input(Generic[C]):
    """A file to restore, with its component of a manifest if one names it.

    `automem`: it is a backup by AutoMem's own scripts. `bare`: it is a plain snapshot as Qdrant's own API returns it.
    """

    path: Path
    component: C | None = None
    automem: AutoMemFile | None = None
    bare: bool = False


@dataclass(frozen=True)
class Inputs:
    """The files to restore, at most one of each store; a warning for the operator, or an empty text."""

    graph: Input[GraphComponent] | None
    collection: Input[CollectionComponent] | None
    warning: str


def read_inputs(words: list[str], folder: Path, owner: Deployment) -> Inputs:
    """Sort the FILE arguments. Raises BadFile for one that is missing, empty, a folder or of an unknown kind."""
    graphs: list[Input[GraphComponent]] = []
    collections: list[Input[CollectionComponent]] = []
    automems: list[AutoMemFile] = []
    taken: dict[str, str] = {}  # the time of each file or set, if it is known
    for word in words:
        path = Path(word)
        kind = MANIFEST if word == "latest" else kind_of(path)
        if kind == AUTOMEM:
            automems += automem_files(path)
        elif kind == MANIFEST:
            manifest = latest(folder, owner) if word == "latest" else read_manifest(path)
            taken[manifest.name] = manifest.stamp
            if manifest.graph:
                graphs.append(Input(manifest.file_of(manifest.graph), manifest.graph))
            if manifest.collection:
                collections.append(Input(manifest.file_of(manifest.collection), manifest.collection))
        elif kind == RDB:
            found = find_set(folder, path)
            graphs.append(Input(path, found.graph if found else None))
        elif kind == ARCHIVE:
            found = find_set(folder, path)
            collections.append(Input(path, found.collection if found else None))
        else:
            collections.append(Input(path, bare=True))
        if kind in {RDB, ARCHIVE} and found:
            taken[path.name] = found.stamp
    taken |= {one.display: one.stamp for one in automems}
    graphs += [Input(one.path, automem=one) for one in automems if one.kind == GRAPH]
    collections += [Input(one.path, automem=one) for one in automems if one.kind == COLLECTION]
    warning = f"{' and '.join(taken)} were not taken together" if len(set(taken.values())) > 1 else ""
    return Inputs(_single("graph", graphs), _single("collection", collections), warning)


def _single(what: str, files: list[Input[C]]) -> Input[C] | None:
    """The only file of a store, if there is one. Raises BadFile for several files."""
    if len(files) > 1:
        raise BadFile(f"{files[1].path} and {files[0].path} are both of the {what}", next_step="name one of them")
    return files[0] if files else None


class SavedSnapshots:
    """An archive's snapshots in temporary files, so that it is inflated only once.

    Either all are saved or none: none if there is no `room`, or if the disk fills up.
    """

    def __init__(self, *, room: bool = False) -> None:
        self._files: list[IO[bytes]] | None = [] if room else None

    def copying(self, stream: IO[bytes]) -> IO[bytes]:
        """Return the stream again. What is read from it is saved as the next snapshot."""
        if self._files is None:
            return stream
        self._files.append(tempfile.TemporaryFile())  # noqa: SIM115 - `close` closes it
        return cast("IO[bytes]", PassThrough(stream, self.write))

    def write(self, piece: bytes) -> None:
        """Save more bytes of the snapshot that is being read."""
        if self._files is None:
            return
        try:
            self._files[-1].write(piece)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self.close()

    def close(self) -> None:
        """Drop what was saved."""
        for file in self._files or ():
            with suppress(OSError):  # what a full disk did not take
                file.close()
        self._files = None

    def stream(self, number: int) -> IO[bytes] | None:
        """The archive's snapshot of this number, from its start, or None if it was not saved."""
        if not self._files:
            return None
        self._files[number].seek(0)
        return self._files[number]


@dataclass(frozen=True)
class CollectionBackup:
    """A verified archive or bare snapshot.

    `archive.facts` is the archive's `collection.json`, or what replaces it for a bare snapshot. `ids` are the expected
    ids. A bare snapshot records none: those of its trial restore are taken.
    """

    path: Path
    archive: ArchiveFacts
    snapshot: SnapshotFacts
    bare: bool = False
    ids: TemporaryIdTable = field(default_factory=TemporaryIdTable, repr=False, compare=False)
    saved: SavedSnapshots = field(default_factory=SavedSnapshots, repr=False, compare=False)

    @property
    def points(self) -> int | None:
        """How many points are expected; None for a bare snapshot whose segments no engine here could count."""
        return None if self.archive.ids < 0 else self.archive.ids

    def close(self) -> None:
        """Drop the temporary files."""
        self.saved.close()
        self.ids.close()

    def send(self, read: SnapshotReader, snapshot: SnapshotMember) -> None:
        """Give `read` this snapshot as a stream: the saved one, else from the file."""
        if self.bare:
            with self.path.open("rb") as stream:
                read(stream)
        elif saved := self.saved.stream(self.archive.snapshots.index(snapshot)):
            read(saved)
        else:
            read_archive(self.path, on_snapshot=read, only=snapshot.name)


def open_archive(path: Path, component: CollectionComponent | None) -> CollectionBackup:
    """Verify an archive; nothing on the target is touched. Raises BackupDamaged.

    If its bytes are those of a manifest whose points were counted, they are not counted again: the trial restore's are.
    """
    size = component.snapshot_size if component else peek_facts(path)["snapshot_size"]
    with ExitStack() as stack:
        ids = stack.enter_context(TemporaryIdTable())
        saved = stack.enter_context(closing(SavedSnapshots(room=isinstance(size, int) and has_room(_TIMES * size))))
        found = verify_collection(
            path,
            component=component,
            ids=ids,
            passing=saved.copying,
            counting=component is None or component.proof != RESTORED,
        )
        stack.pop_all()  # from now on it is the backup that closes them
    return CollectionBackup(path, found.archive, found.snapshot, ids=ids, saved=saved)


def open_bare(path: Path, target: CollectionSource) -> CollectionBackup:
    """Verify a bare snapshot: both tar levels, and the checksum file next to it if there is one.

    Its segments are counted if an engine here reads them. A segment that is missing from the file shows in the count
    alone, because only archives list the expected ids. Raises BackupDamaged.
    """
    with scratch_folder("segments-") as scratch:
        copies = SegmentCopies(scratch.path, path.stat().st_size)
        seen: list[SnapshotFacts] = []
        try:
            with path.open("rb") as stream:
                member = read_snapshot(path.name, stream, lambda one: seen.append(copies.inspect(one)))
        except BackupDamaged as error:
            raise BackupDamaged(f"{path}: {error}", next_step=error.next_step) from error
        # A server keeps a checksum next to a snapshot on its disk.
        file, expected, snapshot = path.with_name(f"{path.name}.checksum"), "", seen[0]
        with suppress(OSError, ValueError, UsageProblem):
            expected = readable_bytes(file).decode("ascii").strip().lower()
        if re.fullmatch(r"[0-9a-f]{64}", expected) and expected != member.sha256:
            raise BackupDamaged(f"{path} does not have the sha256 that {file.name} gives: it was damaged or edited")
        if snapshot.absent_shards:
            shard = snapshot.absent_shards[0]
            raise BackupDamaged(f"{path} holds no points of shard {shard}: they were on another Qdrant node")
        counted, _ = copies.counted(lambda: _count(copies.segments[0]))
    facts = bare_facts(path, target.collection, target.spec, snapshot)
    archive = ArchiveFacts(facts, (member,), _UNKNOWN if counted is None else counted)
    return CollectionBackup(path, archive, snapshot, bare=True)


def _count(files: SegmentFiles) -> int | None:
    with opened_segments(files) as segments:
        return segments.count if segments else None


def bare_facts(path: Path, collection: str, spec: EmbeddingSpec, snapshot: SnapshotFacts) -> dict[str, Any]:
    """What a restore reads of an archive's `collection.json`, as far as the file shows it."""
    named = _NAME.fullmatch(path.name)
    return {
        "collection": named[1] if named else collection,
        "server": {"version": ""},
        "config": snapshot.config,
        "aliases": [],
        **known_model(snapshot.size, snapshot.config, spec),
    }
