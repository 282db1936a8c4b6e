"""Whether values read from JSON have the shape that a dataclass's annotations give."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import orjson

from lib.errors import BackupDamaged, BadFile, one_line
from lib.files import write_atomic
from lib.journal import STAMP
from lib.network import same_server


def misfit(kind: type[Any], raw: object) -> str | None:
    """The first field of `kind` that `raw` lacks or that holds something else; None where all fit.

    Keys beyond the fields are passed over: a later version may have added them.
    """
    if not isinstance(raw, Mapping):
        return kind.__name__
    hints = get_type_hints(kind)
    for one in dataclasses.fields(kind):
        if one.name not in raw:
            if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                return one.name
        elif not _fits(raw[one.name], hints[one.name]):
            return one.name
    return None


def _fits(value: object, hint: Any) -> bool:
    if hint is Any:
        return True
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return misfit(hint, value) is None
    origin, inner = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return any(_fits(value, one) for one in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    return type(value) is hint  # JSON has no subclasses, and true is no number


FORMAT = 1
MAX_BYTES = 16 << 20
GRAPH_DIR, COLLECTION_DIR = "falkordb", "qdrant"
_FIRST_YEAR = 2000  # of `created`: no clock of a backup shows less
_SEAL = "checksum"
CHECKED, RESTORED, UNVERIFIED = "checked", "restored", "unproved"
CLOCK_HOURS = 0.1  # by which two clocks may differ
VERIFICATION_LEVELS = (UNVERIFIED, CHECKED, RESTORED)
BACKUP, SAFETY = "backup", "safety"  # why a set was taken
FULL, GRAPH_ONLY, COLLECTION_ONLY, SAFETY_COPY = "full", "graph only", "collection only", "safety copy"
_ANOTHER = "use another backup:  python scripts/backup_automem.py --list"


@dataclass(frozen=True)
class BackupFile:
    """A file of the set: name relative to the backup folder, bytes, sha256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class GraphComponent:
    """The graph in the set. `kind` is `rdb` (replication stream) or `dump` (a DUMP payload wrapped as an RDB).

    `expires`: when the server was to delete the key; `functions`: the server's libraries (GRAPH.UDF). A restore of the
    graph brings back neither.
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

    `nodes` has an entry for each snapshot where there are several: peer, address, shards, snapshot_name, snapshot_size,
    snapshot_sha256. Without a name, `snapshot_*` stand for all of them then.
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


@dataclass(frozen=True)
class Drift:
    """Ids on one side only, with a few of each as examples."""

    only_graph: int = 0
    only_collection: int = 0
    examples_graph: list[str] = field(default_factory=list)
    examples_collection: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """One backup set; `graph` or `collection` is None where only one half was asked for.

    `purpose` is `backup`, or `safety` if a restore took it of what it replaced.
    """

    stamp: str
    created: str
    graph: GraphComponent | None
    collection: CollectionComponent | None
    drift: Drift | None
    path: Path | None = None
    purpose: str = BACKUP

    @property
    def name(self) -> str:
        """The manifest's file name."""
        return f"backup_{self.stamp}.json"

    @property
    def age_hours(self) -> float:
        """Hours since the set was begun."""
        return (datetime.now(timezone.utc) - datetime.fromisoformat(self.created)).total_seconds() / 3600

    @property
    def is_from_future(self) -> bool:
        """Whether its date has not come yet: a clock was or is wrong, and it cannot be told how old the set is."""
        return self.age_hours < -CLOCK_HOURS

    @property
    def components(self) -> list[GraphComponent | CollectionComponent]:
        """The halves that the set has."""
        return [component for component in (self.graph, self.collection) if component is not None]

    @property
    def kind(self) -> str:
        """`full`, `graph only`, `collection only`, or `safety copy` of a restore, with one half or both."""
        if self.purpose != BACKUP:
            return SAFETY_COPY
        if self.graph and self.collection:
            return FULL
        return GRAPH_ONLY if self.graph else COLLECTION_ONLY

    @property
    def proof(self) -> str:
        """The lower level of its halves."""
        return min(
            (component.proof for component in self.components),
            key=VERIFICATION_LEVELS.index,
            default=UNVERIFIED,
        )

    @property
    def files(self) -> list[BackupFile]:
        """Every file that the set has, the manifest apart."""
        return [
            value
            for component in self.components
            for one in dataclasses.fields(component)
            if isinstance(value := getattr(component, one.name), BackupFile)
        ]

    def file_of(self, component: GraphComponent | CollectionComponent) -> Path:
        """Where the half's file lies, beside this manifest."""
        assert self.path is not None
        return self.path.parent / component.file.name

    def as_json(self) -> dict[str, Any]:
        """What the file holds."""
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        del document["path"]
        return sealed(document)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its own `checksum`: a sha256 over all else in it, keys sorted, as compact JSON."""
    rest = {name: value for name, value in document.items() if name != _SEAL}
    return {**rest, _SEAL: hashlib.sha256(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS)).hexdigest()}


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, the last file of the set; returns it with its path."""
    path = folder / manifest.name
    write_atomic(path, orjson.dumps(manifest.as_json(), option=orjson.OPT_INDENT_2))
    return dataclasses.replace(manifest, path=path)


def _component(kind: type[Any], raw: Mapping[str, Any] | None) -> Any:
    if raw is None:
        return None
    known = {one.name for one in dataclasses.fields(kind)}
    values = {name: value for name, value in raw.items() if name in known}
    note = one_line(values.get("proof_note", ""))
    return kind(**{**values, "file": BackupFile(**values["file"]), "proof_note": note})


def read_manifest(path: Path) -> Manifest:
    """A manifest from disk; raises like `parse_manifest`, and BadFile for what cannot be read or is no file."""
    try:
        if not path.is_file():
            raise BadFile(f"{path} is no file", next_step=_ANOTHER)
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}", next_step=_ANOTHER) from error
    return parse_manifest(data, path)


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """A manifest from its bytes, which lie or will lie at `path`.

    Raises BadFile where it is another's JSON or of a newer format, BackupDamaged where it is ours and broken.
    """
    if len(data) > MAX_BYTES:
        raise BadFile(f"{path} is too large for a manifest", next_step=_ANOTHER)
    try:
        raw = orjson.loads(data)
    except ValueError as error:
        raise BackupDamaged(f"{path} cannot be read: {error}", next_step=_ANOTHER) from error
    number = raw.get("format") if isinstance(raw, dict) else None
    if type(number) is not int or number < 1 or "stamp" not in raw:
        raise BadFile(f"{path} is JSON, but no manifest of a backup", next_step=_ANOTHER)
    if number > FORMAT:
        raise BadFile(
            f"{path} is of format {number}, this version reads up to {FORMAT}",
            next_step="use a newer checkout of these scripts",
        )
    try:
        if sealed(raw) != raw:
            raise BackupDamaged(
                f"{path} was damaged or edited: its checksum is not right", next_step=_ANOTHER
            )
        _require_shape(raw, path)
        drift = Drift(**raw["drift"]) if raw.get("drift") else None
        graph, collection = (
            _component(GraphComponent, raw["graph"]),
            _component(CollectionComponent, raw["collection"]),
        )
        purpose = str(raw.get("purpose", BACKUP))
        return Manifest(raw["stamp"], raw["created"], graph, collection, drift, path, purpose)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BackupDamaged(
            f"{path} is broken ({type(error).__name__}: {error})", next_step=_ANOTHER
        ) from error


def _require_shape(raw: Mapping[str, Any], path: Path) -> None:
    """Raise where an edited manifest would lead astray: wrong types, or a file that no backup writes.

    Raises ValueError, KeyError, TypeError, OverflowError.
    """
    for name, kind in (("graph", GraphComponent), ("collection", CollectionComponent), ("drift", Drift)):
        wrong = misfit(kind, raw[name]) if raw[name] is not None else None
        if wrong:
            raise ValueError(f"{wrong} of {name}")
    stamp, graph, collection = raw["stamp"], raw["graph"], raw["collection"]
    if not isinstance(stamp, str) or not (graph or collection):
        raise ValueError("no stamp or no half")
    if not re.fullmatch(STAMP, stamp) or path.name != f"backup_{stamp}.json":
        raise ValueError(f"its stamp is {stamp!r}, which is not that of its name")
    created = datetime.fromisoformat(raw["created"])
    if created.astimezone(timezone.utc).year < _FIRST_YEAR:
        raise ValueError(f"created {raw['created']!r}")
    if created.tzinfo is None:
        raise ValueError("created has no time zone")
    if graph:
        _require_component(graph, f"{GRAPH_DIR}/{graph['graph']}_{stamp}.rdb")
    if collection:
        _require_component(collection, f"{COLLECTION_DIR}/qdrant_snapshot_{stamp}.tar.gz")


def _require_component(component: Mapping[str, Any], file: str) -> None:
    """Raise unless the half has the one name that backup gives its file, a known level and a server's address."""
    if component["proof"] not in VERIFICATION_LEVELS:
        raise ValueError(f"proof {component['proof']!r}")
    if component["file"]["name"] != file or ".." in file.split("/") or file.count("/") != 1:
        raise ValueError(f"its file is {component['file']['name']!r}, a backup's is {file!r}")
    if component["file"]["size"] < 0:
        raise ValueError(f"size {component['file']['size']}")
    same_server(component["server"]["address"], "")  # a port beyond 65535 or brackets without an end
    words = [value for name, value in component.items() if isinstance(value, str) and name != "proof_note"]
    for one in (*words, *component.get("aliases", []), *component["server"].values()):
        if not one.isprintable():
            raise ValueError(f"{one!r} is no name")
