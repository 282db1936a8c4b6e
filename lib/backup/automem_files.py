"""The files of AutoMem's own backups: recognised by their content, read as a stream, and verified while they are read.

One JSON object for each store, as AutoMem's `automem/backup.py` writes it (0.16, with `indent=2`):
https://github.com/verygoodplugins/automem
"""

from __future__ import annotations

import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import msgspec
import orjson

from lib.backup.archive import damage_reported, opened_tar
from lib.backup.manifest import COLLECTION_DIR, GRAPH_DIR
from lib.backup.points import TemporaryIdTable, as_id, point_id, room_or_error
from lib.clients.embeddings.cache_file import chunks, marks
from lib.clients.falkordb.bulk import points_in, require_name, require_values
from lib.clients.falkordb.queries import MEMORY_LABEL
from lib.clients.qdrant.points import PointId
from lib.errors import BackupDamaged, BadFile
from lib.journal import STAMP

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


GRAPH, COLLECTION = "graph", "collection"
_GZIP = b"\x1f\x8b"
_HEAD_BYTES = 4096
_SIGNS = {kind: re.compile(rf'\s*\{{[^\[]*"{kind}_name"\s*:'.encode()) for kind in (GRAPH, COLLECTION)}
_MEMBER = re.compile(rf"(?:\./)?({GRAPH_DIR}|{COLLECTION_DIR})/[^/]+\.json\.gz")
_IN_TAR = re.compile(rb"(?:\./)?(?:falkordb|qdrant)/(?:[^\0]*\.json\.gz)?\0")
_KINDS = {GRAPH_DIR: GRAPH, COLLECTION_DIR: COLLECTION}
_ANOTHER = "use another backup of AutoMem's"
T = TypeVar("T")


@dataclass(frozen=True)
class AutoMemFile:
    """A backup of one store. `member`: its name in the tar.gz of AutoMem's GET /backup; empty for a file of its own."""

    path: Path
    kind: str
    member: str = ""

    @property
    def display(self) -> str:
        """The file for messages."""
        return f"{self.path} ({self.member})" if self.member else str(self.path)

    @property
    def stamp(self) -> str:
        """The time in the file's name, or an empty text."""
        found = re.search(STAMP, self.member or self.path.name)
        return found[0] if found else ""


def is_automems(path: Path) -> bool:
    """Whether the file is one of AutoMem's own backups, or the tar.gz of its GET /backup."""
    head = _head(path)
    return any(sign.match(head) for sign in (*_SIGNS.values(), _IN_TAR))


def automem_files(path: Path) -> list[AutoMemFile]:
    """AutoMem's own backups in a file, a tar.gz or a folder (its newest), one of each store; none for other files.

    Raises BadFile if they were not taken together, BackupDamaged.
    """
    if path.is_dir():
        found = [max(files, key=lambda one: (one.stamp, one.path)) for files in _in_folder(path) if files]
    elif _IN_TAR.match(head := _head(path)):
        found = list(_in_tar(path))
    else:
        return [AutoMemFile(path, kind) for kind, sign in _SIGNS.items() if sign.match(head)]
    if len({one.stamp for one in found}) > 1:
        named = " ".join(quote(str(one.path)) for one in found)
        step = f"name the files to restore:\npython scripts/restore_from_backup.py {named}"
        raise BadFile(
            f"{path} holds no pair: {' and '.join(one.display for one in found)} were not taken together",
            next_step=step if path.is_dir() else _ANOTHER,
        )
    return found


def listed_files(folder: Path) -> list[AutoMemFile]:
    """All backups of AutoMem's own scripts in a backup folder, newest first."""
    return sorted((one for files in _in_folder(folder) for one in files), key=lambda one: one.stamp, reverse=True)


def _in_folder(folder: Path) -> Iterator[list[AutoMemFile]]:
    for name, kind in _KINDS.items():
        paths = [*folder.glob(f"{name}/{name}_*.json*"), *folder.glob(f"{name}_*.json*")]
        yield [AutoMemFile(path, kind) for path in paths if path.suffix in {".gz", ".json"} and path.is_file()]


def _in_tar(path: Path) -> Iterator[AutoMemFile]:
    seen = set()
    with opened_tar(path, to_end=True) as (tar, _):
        for member in tar:
            named = _MEMBER.fullmatch(member.name)
            if member.isdir():
                continue
            if not named or not member.isreg() or named[1] in seen:
                raise BackupDamaged(f"{path} holds a member that no backup has: {member.name!r}", next_step=_ANOTHER)
            seen.add(named[1])
            yield AutoMemFile(path, _KINDS[named[1]], member.name)
        # A complete tar ends with a block of zeros, which was read; tarfile accepts one that ends before it.
        if tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
            raise BackupDamaged(f"{path} is cut after a member", next_step=_ANOTHER)


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if head.startswith(_GZIP):
        try:
            with gzip.open(path) as plain:
                head = plain.read(_HEAD_BYTES)
        except (OSError, EOFError, zlib.error):
            return b""
    return head


_PIECE, _LARGEST_ELEMENT = 1 << 20, 64 << 20
_FIELD = re.compile(rb'  "([a-z_]+)": (.*?)(,?)\n')


class Text:
    """The text of a file, read forward."""

    def __init__(self, source: AutoMemFile, stream: IO[bytes]) -> None:
        self._source, self._stream = source, stream
        self._at = self._before = 0
        self._held = self._read()
        if not self._held.startswith(b'{\n  "'):
            self.refuse_layout()

    def until(self, mark: bytes) -> bytes:
        """Return the text up to and with the next `mark`. Raises BackupDamaged if there is none."""
        searched = self._at
        while (found := self._held.find(mark, searched)) < 0:
            rest = self._held[self._at :]
            searched = max(0, len(rest) - len(mark) + 1)
            self._before += self._at
            piece = self._read()
            self._held, self._at = rest + piece, 0
            if not piece:
                self.refuse("it is cut")
            if len(rest) > _LARGEST_ELEMENT:
                self.refuse_layout()
        start, self._at = self._at, found + len(mark)
        return self._held[start : self._at]

    def require_end(self) -> None:
        """Raise BackupDamaged unless only the closing brace and blanks follow."""
        rest = self._held[self._at :]
        while len(rest) < _PIECE and (piece := self._read()):
            rest += piece
        if rest.strip() != b"}":
            self.refuse("it is cut" if not rest.strip() else "something follows the end of its object")

    def decoded(self, text: bytes, kind: type[T]) -> T:
        """Return the JSON as `kind`. Raises BackupDamaged."""
        try:
            try:
                return msgspec.json.decode(text, type=kind)
            except msgspec.ValidationError:
                raise
            except msgspec.DecodeError:
                # Python's encoder writes NaN and Infinity, which are not JSON.
                return msgspec.convert(json.loads(text), kind)
        except (msgspec.ValidationError, ValueError, RecursionError) as error:
            self.refuse(f"{error}")

    def refuse(self, why: str, next_step: str = _ANOTHER) -> NoReturn:
        """Raise BackupDamaged with the number of bytes, uncompressed, that were read."""
        where = f"at byte {self._before + self._at:,} of its text"
        raise BackupDamaged(f"{self._source.display} is damaged {where}: {why}", next_step=next_step)

    def refuse_layout(self) -> NoReturn:
        """Refuse a file that another program has formatted, with the command that formats it again."""
        path, kind = quote(str(self._source.path)), self._source.kind
        command = f"gunzip -cf {path} | python -m json.tool --indent 2 - {kind}.json"
        step = f"if another program has formatted it:  {command}"
        self.refuse("its lines are not those that AutoMem writes", step)

    def _read(self) -> bytes:
        try:
            return self._stream.read(_PIECE)
        except (EOFError, OSError, zlib.error) as error:
            self.refuse(str(error))


@contextmanager
def opened_text(source: AutoMemFile) -> Iterator[Text]:
    """Open the text of a file, inflated. Raises BackupDamaged."""
    from isal import igzip, igzip_threaded

    with ExitStack() as stack:
        stack.enter_context(damage_reported(source.path))
        if source.member:
            tar, _ = stack.enter_context(opened_tar(source.path, to_end=True))
            member = next(one for one in tar if one.name == source.member)
            stream = igzip.open(cast("IO[bytes]", tar.extractfile(member)), "rb")
        else:
            stream = stack.enter_context(source.path.open("rb"))
            if stream.read(2) == _GZIP:
                stream = stack.enter_context(igzip_threaded.open(source.path, "rb"))
            else:
                stream.seek(0)
        yield Text(source, stream)


def fields(text: Text) -> Iterator[tuple[str, bytes]]:
    """Yield each field of the object with its JSON; of a list, each element alone under the list's name.

    No line within a JSON string can end, so the lines of `indent=2` show where an element ends. This takes a third of
    the time of ijson (10,000 points of 768d: 239 MB of text, ijson 3.0 s), and orjson or msgspec parse an element.
    """
    text.until(b"\n")
    more = True
    while more:
        field = _FIELD.fullmatch(text.until(b"\n"))
        if not field:
            text.refuse("a field of the object is expected here")
        name, value, comma = field[1].decode(), field[2], field[3]
        if value == b"[":
            while True:
                yield name, text.until(b"\n    }")
                if (after := text.until(b"\n")) != b",\n":
                    break
            comma = after + text.until(b"\n")
            if comma not in {b"\n  ]\n", b"\n  ],\n"}:
                text.refuse(f"the end of '{name}' is expected here")
        elif value == b"{":
            yield name, b"{" + text.until(b"\n  }")
            comma = text.until(b"\n")
        elif value != b"[]":
            yield name, value
        more = b"," in comma
    text.require_end()


def _pages(text: Text, size: int) -> Iterator[tuple[str, list[bytes]]]:
    """Yield pages of at most `size` elements of each field, with the field's name."""
    for name, elements in groupby(fields(text), key=lambda field: field[0]):
        for page in chunks((element for _, element in elements), size):
            yield name, page


_PAGE, _PAGE_OF_VECTORS = 1000, 256
_PAGE_OF_AUTOMEM = 10_000  # rows that AutoMem asks for at once; a shorter page ends its backup


class Node(msgspec.Struct):
    """A node with FalkorDB's own id."""

    id: int
    labels: list[str]
    properties: dict[str, Any]


class Relationship(msgspec.Struct):
    """A relationship; its ends are FalkorDB's ids of nodes."""

    source_id: int
    type: str
    target_id: int
    properties: dict[str, Any] | None = None


class _GraphStats(msgspec.Struct):
    node_count: int
    relationship_count: int


@dataclass
class GraphFacts:
    """What a graph's file holds.

    `without_ends`: relationships to a node that the file lacks, such as `absent`. `repeated`: nodes that it has twice,
    such as `doubled`. `points`: names of properties that are maps of latitude and longitude.
    """

    name: str = ""
    nodes: int = 0
    relationships: int = 0
    memories: int = 0
    without_ends: int = 0
    repeated: int = 0
    absent: int = -1
    doubled: int = -1
    points: set[str] = field(default_factory=set)

    @property
    def restorable(self) -> tuple[int, int]:
        """How many nodes and relationships a restore brings back."""
        return self.nodes - self.repeated, self.relationships - self.without_ends

    def signs_of_a_cut(self, points: int = 0) -> list[str]:
        """What shows that AutoMem's pages lost rows. `points`: how many the collection's file of the same time has."""
        signs = []
        if self.without_ends:
            lost = f"{self.without_ends:,}, such as to {self.absent}"
            signs.append(f"relationships that lead to nodes that the file lacks: {lost}")
        if self.repeated:
            signs.append(f"{self.repeated:,} nodes are in it twice, such as node {self.doubled}; others may be missing")
        for count, what in ((self.nodes, "nodes"), (self.relationships, "relationships")):
            if 0 < count < _PAGE_OF_AUTOMEM and count % 1000 == 0:
                cut = f"as a server with RESULTSET_SIZE {count} cuts each answer"
                signs.append(f"it has exactly {count:,} {what}, {cut}")
        if points - self.memories > max(20, points // 20):  # a few points may have lost their memory
            signs.append(f"it has {self.memories:,} memories, the collection's file {points:,} points")
        return signs


# Each gets the number of nodes or relationships in the pages before, and a page.
OnNodes = Callable[[int, list[Node]], object]
OnRelationships = Callable[[int, list[tuple[int, int, Relationship]]], object]


def read_graph(source: AutoMemFile, on_nodes: OnNodes, on_relationships: OnRelationships) -> GraphFacts:
    """Read and verify a graph's file. The callbacks get pages: nodes, and relationships with the numbers of their ends.

    A node's number is its place among the nodes that `on_nodes` got, from 0 on. Repeated nodes, and relationships
    without both ends, are counted and not passed on. The callbacks raise ValueError for a value that no property has.
    Raises BackupDamaged.
    """
    facts, stats = GraphFacts(), None
    with opened_text(source) as text, TemporaryIdTable() as numbers:
        for name, page in _pages(text, _PAGE):
            if name == "graph_name":
                facts.name = text.decoded(page[0], str)
            elif name == "stats":
                stats = text.decoded(page[0], _GraphStats)
            nodes, relationships = facts.restorable
            try:
                if name == "nodes":
                    on_nodes(nodes, _new_nodes([text.decoded(one, Node) for one in page], numbers, facts))
                elif name == "relationships":
                    rows = _whole([text.decoded(one, Relationship) for one in page], numbers, facts)
                    on_relationships(relationships, rows)
            except (ValueError, RecursionError) as error:
                text.refuse(str(error))
        if stats is None or not facts.name:
            text.refuse("'graph_name' or 'stats' is missing")
        if (stats.node_count, stats.relationship_count) != (facts.nodes, facts.relationships):
            held = f"it holds {facts.nodes:,} nodes and {facts.relationships:,} relationships"
            text.refuse(f"{held}, its stats say {stats.node_count:,} and {stats.relationship_count:,}")
        if not facts.nodes:
            text.refuse("it holds no nodes")
    return facts


def _new_nodes(page: list[Node], numbers: TemporaryIdTable, facts: GraphFacts) -> list[Node]:
    """The nodes of a page that are not repeated, by their labels, so that few requests add them; adds their numbers."""
    known = set(numbers.payloads([node.id for node in page]))
    new: list[Node] = []
    for node in page:
        if "" in node.labels:
            raise ValueError(f"node {node.id} has a label without a name")
        for label in node.labels:
            require_name(label)
        if node.id in known:
            facts.doubled = node.id
        else:
            known.add(node.id)
            new.append(node)
    new.sort(key=lambda node: node.labels)
    numbers.put((node.id, {"number": number}) for number, node in enumerate(new, facts.restorable[0]))
    facts.nodes += len(page)
    facts.repeated += len(page) - len(new)
    facts.points.update(*(points_in(node.properties) for node in new))
    facts.memories += sum(MEMORY_LABEL in node.labels for node in new)
    return new


def _whole(
    page: list[Relationship], numbers: TemporaryIdTable, facts: GraphFacts
) -> list[tuple[int, int, Relationship]]:
    """The relationships of a page whose ends are in the file, with the numbers of these; by their types."""
    if not all(one.type for one in page):
        raise ValueError("a relationship has no type")
    for name in {one.type for one in page}:
        require_name(name)
    ends = numbers.payloads(list({end for one in page for end in (one.source_id, one.target_id)}))
    rows = [
        (ends[one.source_id]["number"], ends[one.target_id]["number"], one)
        for one in sorted(page, key=lambda one: one.type)
        if one.source_id in ends and one.target_id in ends
    ]
    facts.relationships += len(page)
    facts.points.update(*(points_in(one.properties or {}) for _, _, one in rows))
    if len(rows) < len(page):
        facts.without_ends += len(page) - len(rows)
        facts.absent = next(end for one in page for end in (one.source_id, one.target_id) if end not in ends)
    return rows


def require_uncut(source: AutoMemFile, signs: list[str]) -> None:
    """Raise BackupDamaged if there are signs that AutoMem lost rows."""
    if signs:
        raise BackupDamaged(
            f"{source.display} is incomplete: {'; '.join(signs)}",
            next_step=f"{_ANOTHER}, or add --force-incomplete to restore what there is",
        )


class _Point(msgspec.Struct):
    id: int | str
    vector: list[float]
    payload: dict[str, Any] | None = None


class _PointStats(msgspec.Struct):
    points_count: int
    vector_size: int | None


class PointTable(TemporaryIdTable):
    """The points of a file in SQLite's own temporary file: id, payload, and vector ((size,) float32)."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self._db.execute("CREATE TABLE vectors (id TEXT PRIMARY KEY, vector BLOB)")

    def put_vectors(self, rows: Iterable[tuple[PointId, NDArray[np.float32]]]) -> None:
        """Add the vectors of points."""
        with room_or_error(), self._db:
            self._db.executemany("INSERT INTO vectors VALUES (?, ?)", ((str(one), row.tobytes()) for one, row in rows))

    def vectors(self, ids: Sequence[PointId]) -> NDArray[np.float32]:
        """Return the vectors (n, size) of these ids, all of which are here, in their order."""
        import numpy as np

        found: dict[PointId, bytes] = {}
        for part in chunks([str(one) for one in ids]):
            sql = f"SELECT id, vector FROM vectors WHERE id IN ({marks(part)})"  # noqa: S608 - only question marks
            found |= {as_id(text): vector for text, vector in self._db.execute(sql, part)}
        return np.frombuffer(b"".join(found[one] for one in ids), dtype=np.float32).reshape(len(ids), self.size)


@dataclass
class PointFacts:
    """What a collection's file holds."""

    name: str = ""
    points: int = 0
    size: int = 0


def read_points(source: AutoMemFile, table: PointTable | None = None) -> PointFacts:
    """Read and verify a collection's file; its points go into `table`. Raises BackupDamaged."""
    facts, stats = PointFacts(), None
    with opened_text(source) as text, TemporaryIdTable() if table is None else nullcontext(table) as ids:
        for name, page in _pages(text, _PAGE_OF_VECTORS):
            if name == "collection_name":
                facts.name = text.decoded(page[0], str)
            elif name == "points":
                _add_points(text, [text.decoded(one, _Point) for one in page], ids, facts)
            elif name == "stats":
                stats = text.decoded(page[0], _PointStats)
        if stats is None or not facts.name:
            text.refuse("'collection_name' or 'stats' is missing")
        if not facts.points:
            text.refuse("it holds no points")
        if stats.points_count != facts.points:
            text.refuse(f"it holds {facts.points:,} points, its stats say {stats.points_count:,}")
        if stats.vector_size not in {None, facts.size}:
            text.refuse(f"its vectors are of {facts.size}d, its stats say {stats.vector_size}d")
    ids.complete = True
    return facts


def _add_points(text: Text, page: list[_Point], ids: TemporaryIdTable, facts: PointFacts) -> None:
    """Add a page to the table. Raises BackupDamaged for another size, an id that is no id or is there already."""
    import numpy as np

    facts.size = facts.size or len(page[0].vector)
    wrong = next((one for one in page if len(one.vector) != facts.size or not one.vector), None)
    if wrong:
        text.refuse(f"the vector of point {wrong.id} is of {len(wrong.vector)}d, others are of {facts.size}d")
    bad = next((one.id for one in page if point_id(one.id) != one.id), None)
    if bad is not None:
        text.refuse(f"{bad!r} is no id of a point")
    names = [one.id for one in page]
    repeated = set(ids.payloads(names)) or {one for one in names if names.count(one) > 1}
    if repeated:
        text.refuse(f"point {min(repeated, key=str)} is in it twice")
    vectors = np.array([one.vector for one in page], dtype=np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        text.refuse(f"the vector of point {names[int(finite.argmin())]} holds a number that is not finite")
    for one in page:
        if not _is_json(one.payload):
            text.refuse(f"the payload of point {one.id} holds a value that JSON does not have")
    ids.put((one.id, one.payload or {}) for one in page)
    if isinstance(ids, PointTable):
        ids.size = facts.size
        ids.put_vectors(zip(names, vectors, strict=True))
    facts.points += len(page)


def _is_json(payload: dict[str, Any] | None) -> bool:
    """Whether Qdrant can have sent this payload: no NaN, no number of 65 bits, no lone surrogate."""
    try:
        return bool(orjson.loads(orjson.dumps(payload)) == payload)
    except orjson.JSONEncodeError:
        return False


NOT_HELD = {
    GRAPH: "AutoMem's backup of a graph does not hold: indexes (AutoMem's own, on Memory.id and Memory.timestamp,"
    " are created), constraints, FalkorDB's internal ids; vectors come back as lists of numbers, dates and times as"
    " text, numbers with 15 digits",
    COLLECTION: "AutoMem's backup of a collection does not hold: settings and metadata (AutoMem's own are used: Cosine,"
    " keyword indexes on tags and tag_prefixes), other payload indexes, aliases",
}


def describe(source: AutoMemFile) -> tuple[str, list[str]]:
    """Read and verify one file, without a server; what it holds, and the signs of a cut. Raises BackupDamaged."""
    if source.kind == COLLECTION:
        points = read_points(source)
        return f"{points.points:,} points of {points.size}d", []
    graph = read_graph(
        source,
        lambda _before, nodes: require_values(one.properties for one in nodes),
        lambda _before, rows: require_values(one.properties or {} for _, _, one in rows),
    )
    return f"{graph.nodes:,} nodes, {graph.relationships:,} relationships", graph.signs_of_a_cut()
