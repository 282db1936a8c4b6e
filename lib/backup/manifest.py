"""The manifest of a backup set: typed, sealed with a checksum, and read strictly."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import orjson

from lib.dimensions import OPENAI
from lib.errors import BackupDamaged, BadFile
from lib.files import read_regular, sha256_file, write_atomic
from lib.journal import STAMP
from lib.network import same_server

FORMAT = 1
MAX_BYTES = 16 << 20
GRAPH_DIR, COLLECTION_DIR = "falkordb", "qdrant"
UNVERIFIED, CHECKED, RESTORED = VERIFICATION_LEVELS = ("unproved", "checked", "restored")
CLOCK_HOURS = 0.1  # by which two clocks may differ
BACKUP, SAFETY = "backup", "safety"  # why a set was taken
FULL, GRAPH_ONLY, COLLECTION_ONLY, SAFETY_COPY = "full", "graph only", "collection only", "safety copy"


class NewerFormat(BadFile):
    """A manifest of a later version of these scripts."""


@dataclass(frozen=True)
class BackupFile:
    """A file of the set: name relative to the backup folder, bytes, sha256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class GraphComponent:
    """The graph in the set. `kind` is `rdb` (replication stream) or `dump` (a DUMP payload wrapped as an RDB).

    A restore brings back neither `expires` (when the server deletes the key) nor `functions` (GRAPH.UDF libraries).
    """

    file: BackupFile
    kind: str
    graph: str
    server: dict[str, str]
    nodes: int
    relationships: int
    labels: dict[str, int]
    types: dict[str, int]
    indexes: list[Any]
    constraints: list[Any]
    digest: str
    proof: str
    proof_note: str = ""
    expires: str = ""
    functions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CollectionComponent:
    """The collection in the set. `model_known` is `stamped`, `configured` or `guessed`.

    The file omits `provider` if it is OpenAI, as files of earlier versions do. `nodes` has an entry for each snapshot
    if there are several (see `collection._snapshot_facts`); `snapshot_*` are then of all, see `archive.combined`.
    """

    file: BackupFile
    collection: str
    server: dict[str, str]
    points: int
    size: int
    distance: str
    payload_schema: dict[str, Any]
    aliases: list[str]
    model: str
    model_known: str
    snapshot_name: str
    snapshot_size: int
    snapshot_sha256: str
    promised_ids: int
    proof: str
    proof_note: str = ""
    nodes: list[dict[str, Any]] = field(default_factory=list)
    provider: str = OPENAI


@dataclass(frozen=True)
class Drift:
    """How many ids are in one store only, with a few of each as examples."""

    only_graph: int
    only_collection: int
    examples_graph: list[str] = field(default_factory=list)
    examples_collection: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """One backup set; `graph` or `collection` is None if only the other one was backed up.

    `path` is that of its file, once the file was written or read.
    """

    stamp: str
    created: str
    graph: GraphComponent | None
    collection: CollectionComponent | None
    drift: Drift | None
    path: Path = Path()
    purpose: str = BACKUP

    @property
    def name(self) -> str:
        """The manifest's file name."""
        return f"backup_{self.stamp}.json"

    @property
    def age_hours(self) -> float:
        """Hours since the backup began."""
        return (datetime.now(timezone.utc) - datetime.fromisoformat(self.created)).total_seconds() / 3600

    @property
    def is_from_future(self) -> bool:
        """Whether the set is dated in the future: a clock was or is wrong, so its age is unknown."""
        return self.age_hours < -CLOCK_HOURS

    @property
    def components(self) -> list[GraphComponent | CollectionComponent]:
        """The graph, the collection, or both."""
        return [component for component in (self.graph, self.collection) if component is not None]

    @property
    def kind(self) -> str:
        """`full`, `graph only`, `collection only`, or `safety copy` of a restore, whatever that holds."""
        if self.purpose != BACKUP:
            return SAFETY_COPY
        if self.graph and self.collection:
            return FULL
        return GRAPH_ONLY if self.graph else COLLECTION_ONLY

    @property
    def proof(self) -> str:
        """The lowest verification level of its components."""
        levels = [component.proof for component in self.components]
        return min(levels, key=VERIFICATION_LEVELS.index, default=UNVERIFIED)

    @property
    def lost_store(self) -> str:
        """Name the store that is empty although the other one has memories; empty if none is.

        AutoMem recreates a lost store empty as long as it runs, so that the backups of the next nights look complete.
        """
        graph, collection, drift = self.graph, self.collection, self.drift
        if not (graph and collection and drift):
            return ""
        if drift.only_collection and not graph.labels.get("Memory"):
            return f"graph '{graph.graph}' holds no memory, and collection '{collection.collection}' has points"
        if drift.only_graph and not collection.points:
            return f"collection '{collection.collection}' has no point, and graph '{graph.graph}' holds memories"
        return ""

    @property
    def files(self) -> list[BackupFile]:
        """The files of the components."""
        return [component.file for component in self.components]

    @property
    def stores(self) -> list[tuple[str, str]]:
        """The server's address and the name of the graph or the collection, for each component."""
        named = ((self.graph, "graph"), (self.collection, "collection"))
        return [(one.server["address"], getattr(one, field)) for one, field in named if one]

    def file_of(self, component: GraphComponent | CollectionComponent) -> Path:
        """The path of the component's file, in the folder of this manifest."""
        return self.path.parent / component.file.name

    def as_json(self) -> dict[str, Any]:
        """The document that the manifest's file holds."""
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        del document["path"]
        if self.collection and self.collection.provider == OPENAI:
            del document["collection"]["provider"]
        return sealed(document)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Add the `checksum`: a sha256 over all else in the document, as compact JSON with sorted keys."""
    rest = {name: value for name, value in document.items() if name != "checksum"}
    return {**rest, "checksum": hashlib.sha256(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS)).hexdigest()}


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, the last file of the set; returns it with its path."""
    path = folder / manifest.name
    write_atomic(path, orjson.dumps(manifest.as_json(), option=orjson.OPT_INDENT_2))
    return dataclasses.replace(manifest, path=path)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest from disk. Raises like `parse_manifest`, and BadFile if the file cannot be read."""
    try:
        data, _ = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from error
    return parse_manifest(data, path)


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Parse a manifest that is or will be at `path`. Raises BadFile (not ours, or newer), BackupDamaged."""
    try:
        raw = orjson.loads(data)
    except ValueError as error:
        raise BackupDamaged(f"{path} cannot be read: {error}") from error
    number = raw.get("format") if isinstance(raw, dict) else None
    if type(number) is not int or number < 1 or "stamp" not in raw:
        raise BadFile(f"{path} is JSON, but no manifest of a backup")
    if number > FORMAT:
        raise NewerFormat(
            f"{path} is of format {number}, this version reads up to {FORMAT}",
            next_step="use the version of these scripts that made it, or a newer one",
        )
    try:
        if sealed(raw) != raw:
            raise BackupDamaged(f"{path} was damaged or edited: its checksum is not right")
        manifest = msgspec.convert({**raw, "path": path}, Manifest)
        _require_consistent(manifest, path)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BackupDamaged(f"{path} is broken ({type(error).__name__}: {error})") from error
    return manifest


def _require_consistent(manifest: Manifest, path: Path) -> None:
    """Refuse values of the right type that no backup writes. Raises ValueError, KeyError, OverflowError."""
    stamp, graph, collection = manifest.stamp, manifest.graph, manifest.collection
    if not re.fullmatch(STAMP, stamp) or path.name != manifest.name:
        raise ValueError(f"it was renamed, or is a copy: its stamp is {stamp!r}, which is not that of its name")
    created = datetime.fromisoformat(manifest.created)
    if created.tzinfo is None or created.astimezone(timezone.utc).year < 2000:
        raise ValueError(f"created is {manifest.created!r}, without a time zone or before 2000")
    if not manifest.components:
        raise ValueError("it has neither a graph nor a collection")
    if graph:
        _require_component(graph, f"{GRAPH_DIR}/{graph.graph}_{stamp}.rdb")
    if collection:
        _require_component(collection, f"{COLLECTION_DIR}/qdrant_snapshot_{stamp}.tar.gz", collection.aliases)


def _require_component(component: GraphComponent | CollectionComponent, file: str, aliases: Sequence[str] = ()) -> None:
    """Refuse another file name than backup gives (`file`), an unknown level, a bad address, unprintable names."""
    if component.proof not in VERIFICATION_LEVELS:
        raise ValueError(f"proof is {component.proof!r}")
    if component.file.name != file or ".." in file.split("/") or file.count("/") != 1:
        raise ValueError(f"its file is {component.file.name!r}, a backup's is {file!r}")
    if component.file.size < 0:
        raise ValueError(f"the size of its file is {component.file.size}")
    same_server(component.server["address"], "")  # raises if the port is beyond 65535 or a bracket is open
    words = [one for name, one in vars(component).items() if isinstance(one, str) and name != "proof_note"]
    for word in (*words, *aliases, *component.server.values()):
        if not word.isprintable():
            raise ValueError(f"{word!r} is no name")


def require_equal(path: Path, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    """Raise BackupDamaged unless each value of `actual`, found in the file `path`, is the `expected` one."""
    for name, value in actual.items():
        if orjson.loads(orjson.dumps(value)) != orjson.loads(orjson.dumps(expected[name])):
            found, said = (text if len(text) <= 80 else f"{text[:77]}..." for text in map(str, (value, expected[name])))
            raise BackupDamaged(f"{path}: {name} is {found}, its manifest says {said}")


def check_file(path: Path, file: BackupFile, sha256: str = "") -> None:
    """Raise BackupDamaged unless the file exists with its size and sha256. `sha256`: computed by the caller."""
    if not path.is_file():
        raise BackupDamaged(f"{path} is missing")
    if path.stat().st_size != file.size:
        raise BackupDamaged(f"{path} has {path.stat().st_size} bytes, its manifest says {file.size}")
    if (sha256 or sha256_file(path)) != file.sha256:
        raise BackupDamaged(f"{path} does not have the sha256 that its manifest gives: it was damaged or edited")


@contextmanager
def checking_file(path: Path, file: BackupFile | None) -> Iterator[None]:
    """Run `check_file` if reading the file fails in the block: a wrong size or sha256 is the plainest reason."""
    try:
        yield
    except (BackupDamaged, BadFile, OSError):
        if file:
            check_file(path, file)
        raise
