"""What AutoMem's own backups hold: nodes and relationships, or points; verified while it is read."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from lib.backup.automem_files import ANOTHER, COLLECTION, GRAPH, AutoMemFile, Text, elements, opened_text
from lib.backup.points import TemporaryIdTable, as_id, point_id, room_or_error
from lib.child_process import answer_questions, answering_module, scratch_folder
from lib.clients.falkordb.bulk import points_in, require_name, require_values
from lib.clients.falkordb.queries import MEMORY_LABEL
from lib.clients.qdrant.points import Point, PointId, float32s, read_float32s
from lib.errors import BackupDamaged, MigrationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_READER = "lib.backup.automem_contents"
_PAGE, _PAGE_OF_VECTORS = 1000, 256
_VECTOR = b'"vector": '
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
        for name, page in elements(text, _PAGE):
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
            next_step=f"{ANOTHER}, or add --force-incomplete to restore what there is",
        )


class _Point(msgspec.Struct):
    id: int | str
    vector: list[float] | None
    payload: dict[str, Any] | None = None


class _PointStats(msgspec.Struct):
    points_count: int
    vector_size: int | None


# Ids, vectors (n, size), payloads.
Rows = tuple[list[PointId], "NDArray[np.float32]", list[dict[str, Any]]]


class PointTable(TemporaryIdTable):
    """The points of a file in SQLite's own temporary file, in its order: id, payload, and vector ((size,) float32)."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path)
        self.size = 0
        self._db.execute("CREATE TABLE IF NOT EXISTS rows (id TEXT, payload BLOB, vector BLOB)")

    def put_rows(self, ids: Iterable[PointId], payloads: Iterable[bytes], vectors: NDArray[np.float32]) -> None:
        """Add points. `payloads` are JSON, `vectors` is (n, size)."""
        rows = ((str(one), payload, row.tobytes()) for one, payload, row in zip(ids, payloads, vectors, strict=True))
        with room_or_error(), self._db:
            self._db.executemany("INSERT INTO rows VALUES (?, ?, ?)", rows)

    def rows(self, size: int) -> Iterator[Rows]:
        """Yield all points, in pages of `size`."""
        import numpy as np

        found = self._db.execute("SELECT id, payload, vector FROM rows ORDER BY rowid")
        while page := found.fetchmany(size):
            ids, payloads, vectors = zip(*page, strict=True)
            rows = np.frombuffer(b"".join(vectors), dtype=np.float32).reshape(len(ids), self.size)
            yield [as_id(one) for one in ids], rows, [orjson.loads(one) for one in payloads]


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
        for name, page in elements(text, _PAGE_OF_VECTORS):
            if name == "collection_name":
                facts.name = text.decoded(page[0], str)
            elif name == "points":
                _add_points(text, [_read_point(text, one) for one in page], ids, facts)
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


def read_points_apart(source: AutoMemFile) -> tuple[PointTable, PointFacts]:
    """Like `read_points` into a new table, but in another process, while this one loads the graph."""
    with scratch_folder("automem-points-") as folder, answering_module(_READER, _ended) as ask:
        path = folder.path / "points"
        file = {**asdict(source), "path": str(source.path)}
        facts = PointFacts(**ask({"file": file, "table": str(path), "folder": str(Path.cwd())}))
        table = PointTable(path)  # open, it needs the file's name no longer
        table.size, table.complete = facts.size, True
        return table, facts


def _ended(code: int) -> MigrationError:
    how = "was killed: memory may be short" if code == -signal.SIGKILL else f"ended (exit {code})"
    return MigrationError(
        f"the process that reads the backup of the collection {how}", next_step="run the same command again"
    )


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    os.chdir(question["folder"])  # paths in messages are as the operator gave them
    source = AutoMemFile(**{**question["file"], "path": Path(question["file"]["path"])})
    with closing(PointTable(Path(question["table"]))) as table:
        return asdict(read_points(source, table))


def _read_point(text: Text, element: bytes) -> Point:
    """Decode a point: a flat vector, as AutoMem writes it, apart from the rest. Raises BackupDamaged."""
    start = element.find(_VECTOR) + len(_VECTOR)
    end = element.find(b"]", start) + 1  # the first bracket: lists in the list are no JSON then
    vector = read_float32s(element[start:end])
    if vector is not None:
        point = text.decoded(element[:start] + b"null" + element[end:], _Point)
        if point.vector is None:
            return Point(point.id, point.payload, vector)
    point = text.decoded(element, _Point)
    if point.vector is None:
        text.refuse(f"point {point.id} has no vector")
    return Point(point.id, point.payload, float32s(point.vector))


def _add_points(text: Text, page: list[Point], ids: TemporaryIdTable, facts: PointFacts) -> None:
    """Add a page to the table. Raises BackupDamaged for another size, an id that is no id or is there already."""
    import numpy as np

    vectors = [one.vector for one in page if one.vector is not None]
    facts.size = facts.size or len(vectors[0])
    wrong = next((row for row, one in enumerate(vectors) if len(one) != facts.size or not len(one)), None)
    if wrong is not None:
        odd = f"the vector of point {page[wrong].id} is of {len(vectors[wrong])}d"
        text.refuse(f"{odd}, others are of {facts.size}d")
    bad = next((one.id for one in page if point_id(one.id) != one.id), None)
    if bad is not None:
        text.refuse(f"{bad!r} is no id of a point")
    names = [one.id for one in page]
    repeated = set(ids.payloads(names)) or {one for one, times in Counter(names).items() if times > 1}
    if repeated:
        text.refuse(f"point {min(repeated, key=str)} is in it twice")
    rows = np.stack(vectors)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        text.refuse(f"the vector of point {names[int(finite.argmin())]} holds a number that is not finite")
    ids.put((one, None) for one in names)
    payloads = [_encoded(text, one) for one in page]
    if isinstance(ids, PointTable):
        ids.size = facts.size
        ids.put_rows(names, payloads, rows)
    facts.points += len(page)


def _encoded(text: Text, point: Point) -> bytes:
    """The payload as JSON. Raises BackupDamaged for what Qdrant never sends: NaN, 65 bits, a lone surrogate."""
    payload = point.payload or {}
    try:
        encoded = orjson.dumps(payload)
    except orjson.JSONEncodeError:
        encoded = b"null"
    if orjson.loads(encoded) != payload:
        text.refuse(f"the payload of point {point.id} holds a value that JSON does not have")
    return encoded


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


if __name__ == "__main__":
    answer_questions(_answer)
