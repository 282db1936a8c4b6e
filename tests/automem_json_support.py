"""Shared by the tests of AutoMem's own backups: the kept files, damaged copies of them, and what the stores must hold."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests

from tests.operator_support import OLD_SIZE, Operator, Servers
from tests.reembed_support import close
from tests.restore_support import assert_tidy

DATA = Path(__file__).parent / "data" / "automem_backup"
GRAPH_FILE = DATA / "falkordb" / "falkordb_20261127_185327.json.gz"
COLLECTION_FILE = DATA / "qdrant" / "qdrant_20261127_185327.json.gz"
TAR = DATA / "automem_backup_20261127_185329.tar.gz"
ODD_TYPES = DATA / "odd_types" / "falkordb" / "falkordb_20261127_185332.json.gz"
STORES: dict[str, Any] = json.loads((DATA / "stores.json").read_text(encoding="utf-8"))

Row = dict[str, Any]
Graph = tuple[Counter[str], Counter[tuple[str, str, str, str]]]


@dataclass(frozen=True)
class Point:
    """A point's payload as text, and its vector (float32). Equal up to the last digits of the payload's doubles.

    Qdrant itself changes these: 0.9121620400688931 is read back as 0.9121620400688932 (1.11.3 to 1.19.0).
    """

    payload: str
    vector: bytes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Point) or self.vector != other.vector:
            return False
        return self.payload == other.payload or close(json.loads(self.payload), json.loads(other.payload))

    def __hash__(self) -> int:
        return hash(self.vector)


Points = dict[Any, Point]


def text_of(value: object) -> str:
    """A text that differs for 1, 1.0 and true, and not for the order of keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _properties(value: Any) -> Any:
    """The value as FalkorDB's clients see it: doubles with 15 digits."""
    if isinstance(value, dict):
        return {key: _properties(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_properties(one) for one in value]
    return float(f"{value:.15g}") if isinstance(value, float) else value


def graph_of(nodes: Iterable[Row], relationships: Iterable[Row]) -> Graph:
    """The nodes by labels and properties, the relationships by type, both ends and properties; without internal ids."""
    known = {one["id"]: text_of([sorted(one["labels"]), _properties(one["properties"])]) for one in nodes}
    links = (
        (one["type"], known[one["source_id"]], known[one["target_id"]], text_of(_properties(one["properties"])))
        for one in relationships
    )
    return Counter(known.values()), Counter(links)


def graph_in_store(operator: Operator) -> Graph:
    """The operator's graph, read in pages below the server's limit of rows."""
    nodes = [
        {"id": row[0], "labels": row[1], "properties": row[2]}
        for row in _rows(operator, "MATCH (n) WHERE id(n) > $last", "id(n)", "id(n), labels(n), properties(n)")
    ]
    relationships = [
        {"source_id": row[1], "type": row[2], "target_id": row[3], "properties": row[4]}
        for row in _rows(
            operator,
            "MATCH (a)-[r]->(b) WHERE id(r) > $last",
            "id(r)",
            "id(r), id(a), type(r), id(b), properties(r)",
        )
    ]
    return graph_of(nodes, relationships)


def _rows(operator: Operator, match: str, key: str, wanted: str) -> Iterable[list[Any]]:
    last = -1
    while page := operator.cypher(f"{match} RETURN {wanted} ORDER BY {key} LIMIT 2000", last=last):
        yield from page
        last = page[-1][0]


def points_of_rows(rows: Iterable[Row]) -> Points:
    """The points by their ids."""
    return {
        one["id"]: Point(text_of(one["payload"]), np.asarray(one["vector"], dtype=np.float32).tobytes()) for one in rows
    }


def points_in_store(operator: Operator, collection: str | None = None) -> Points:
    """The points of the operator's collection, or of another one."""
    path = f"/collections/{collection or operator.collection}/points/scroll"
    rows: list[Row] = []
    offset: Any = None
    while True:
        body = {"limit": 1000, "with_vector": True, "with_payload": True, "offset": offset}
        page = operator.qdrant.json("POST", path, body)
        rows += page["points"]
        offset = page["next_page_offset"]
        if offset is None:
            return points_of_rows(rows)


KEPT_GRAPH = graph_of(STORES["nodes"], STORES["relationships"])
KEPT_POINTS = points_of_rows(STORES["points"])


def assert_restored(
    operator: Operator, *, graph: Graph | None = KEPT_GRAPH, points: Points | None = KEPT_POINTS
) -> None:
    """Compare each store node by node, relationship by relationship, point by point, and with AutoMem's settings.

    None: that store was not to be restored, and is not looked at.
    """
    if graph is not None:
        nodes, relationships = graph_in_store(operator)
        assert nodes == graph[0]
        assert relationships == graph[1]
        rows = operator.cypher("CALL db.indexes() YIELD label, properties, status RETURN label, properties, status")
        indexes = {(label, key): status for label, keys, status in rows for key in keys}
        assert {indexes.get(("Memory", key)) for key in ("id", "timestamp")} == {"OPERATIONAL"}
    if points is not None:
        assert points_in_store(operator) == points
        info = operator.info()
        assert info["config"]["params"]["vectors"]["distance"] == "Cosine"
        kinds = {key: one["data_type"] for key, one in info["payload_schema"].items()}
        assert kinds == {"tags": "keyword", "tag_prefixes": "keyword"}


@contextmanager
def automem_operator(servers: Servers, folder: Path) -> Iterator[Operator]:
    """An operator with AutoMem's names, which are in its files; nothing is left behind."""
    folder.mkdir(exist_ok=True)
    someone = Operator(servers, folder, graph="memories", collection="memories")
    someone.clean_up()
    yield someone
    someone.clean_up()


def make_live(operator: Operator) -> None:
    """Replace the content of both stores by a memory that is in no file."""
    operator.cypher("MATCH (n) DETACH DELETE n")
    operator.cypher("CREATE (:Memory {id: 'live', content: 'not in the file'})-[:LIVE]->(:Other {n: 1})")
    requests.delete(f"{operator.servers.qdrant_url}/collections/{operator.collection}", timeout=60)
    operator.call("PUT", "", {"vectors": {"size": OLD_SIZE, "distance": "Cosine"}})
    point = {"id": 1, "vector": [1.0] * OLD_SIZE, "payload": {"content": "not in the file"}}
    operator.call("PUT", "/points?wait=true", {"points": [point]})


def refused(operator: Operator, *words: object, code: int | None = None) -> str:
    """The message of a refused restore; the stores, the names on the servers and the backup folder are as before."""
    before, files = operator.state(), sorted(operator.backups.rglob("*"))
    result = operator.run("restore_from_backup", *words, expect=code)
    assert result.code in {2, 4}, result.err
    assert operator.state() == before
    assert sorted(operator.backups.rglob("*")) == files
    assert_tidy(operator)
    assert "next:" in result.err
    return result.err


# --- copies of the kept files -------------------------------------------------------------------------------------


def json_of(path: Path) -> Row:
    """The content of one of AutoMem's files."""
    found: Row = json.loads(gzip.decompress(path.read_bytes()))
    return found


def packed(data: Row) -> bytes:
    """The file that AutoMem would write."""
    return gzip.compress(json.dumps(data, indent=2).encode())


def changed(path: Path, folder: Path, change: Callable[[Row], object]) -> Path:
    """A copy in `folder`, under its name, with a change of its content."""
    data = json_of(path)
    change(data)
    return saved(folder / path.name, packed(data))


def saved(path: Path, data: bytes) -> Path:
    """Write a file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def members_of(path: Path) -> dict[str, bytes]:
    """The files of a tar.gz."""
    with tarfile.open(path) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive if one.isfile()}  # type: ignore[union-attr]


def tar_of(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar.gz of these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_with(folder: Path, *services: str) -> Path:
    """The kept tar.gz with the members of these services alone."""
    members = {name: data for name, data in members_of(TAR).items() if name.partition("/")[0] in services}
    return saved(folder / TAR.name, tar_of((tarfile.TarInfo(name), data) for name, data in members.items()))
