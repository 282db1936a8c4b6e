"""AutoMem's recorded answers and data: read, loaded into stores, compared by shape."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from tests.sandbox.sample_loading import create_collection

RECORDING = Path(__file__).with_name("automem.jsonl")


def rows(key: str, path: Path = RECORDING) -> list[dict[str, Any]]:
    """The rows of one kind ("title", "node", "relationship", "point", "collection"), in order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def load_recording(conn, graph: str, qdrant_url: str, collection: str, embed: Callable, path: Path = RECORDING) -> int:
    """Write the recorded nodes, relationships and points into new stores; returns the number of points.

    `embed` maps texts to an (n, size) float32 array; the vectors themselves were not recorded.
    """
    from falkordb.graph import Graph

    store = Graph(conn, graph)
    for field in ("id", "timestamp"):
        store.query(f"CREATE INDEX FOR (m:Memory) ON (m.{field})")
    for row in rows("node", path):
        node = row["node"]
        store.query(f"CREATE (n:{':'.join(node['labels'])}) SET n = $properties", {"properties": node["properties"]})
    for row in rows("relationship", path):
        link = row["relationship"]
        statement = (
            "MATCH (a:Memory {id: $from}) MATCH (b:Memory {id: $to}) "
            f"CREATE (a)-[r:{link['type']}]->(b) SET r = $properties"
        )
        store.query(statement, link)
    points = [row["point"] for row in rows("point", path)]
    vectors = embed([point["payload"]["content"] for point in points])
    with requests.Session() as session:
        base = f"{qdrant_url}/collections/{collection}"
        create_collection(session, base, vectors.shape[1])
        body = {"points": [{**p, "vector": v.tolist()} for p, v in zip(points, vectors, strict=True)]}
        session.put(f"{base}/points?wait=true", json=body, timeout=30).raise_for_status()
    return len(points)


# Free-form, or made by a model that recognises people and tools: compared only if the data are the recorded ones.
OPAQUE = {"metadata"}
# AutoMem leaves `tags` out of a related memory that has none.
RELATED = re.compile(r"relations\[\d+\]\.memory$")


def differences(ours: Any, recorded: Any, path: str = "$", same: frozenset[str] = frozenset()) -> Iterator[str]:
    """List the places at which two answers differ in keys or types; under the keys of `same`, in values too.

    A number is a number, whole or not. Every element of our list must have the shape of one recorded element.
    """
    key = path.rsplit(".", 1)[-1]
    if key in same:
        if ours != recorded:
            yield f"{path}: {ours!r}, recorded {recorded!r}"
    elif kind(ours) != kind(recorded):
        yield f"{path}: {kind(ours)}, recorded {kind(recorded)}"
    elif isinstance(ours, dict) and key not in OPAQUE:
        other = ours.keys() ^ recorded.keys()
        if other and not (other == {"tags"} and RELATED.search(path)):
            yield f"{path}: other keys: {sorted(other)}"
        for name in ours.keys() & recorded.keys():
            yield from differences(ours[name], recorded[name], f"{path}.{name}", same)
    elif isinstance(ours, list):
        if bool(ours) != bool(recorded):
            yield f"{path}: {len(ours)} elements, recorded {len(recorded)}"
        for index, element in enumerate(ours):
            yield from _no_such_element(element, recorded, f"{path}[{index}]", same)


def _no_such_element(element: Any, recorded: list[Any], path: str, same: frozenset[str]) -> Iterator[str]:
    found = [list(differences(element, other, path, same)) for other in recorded]
    if found and all(found):
        yield from min(found, key=len)


def kind(value: Any) -> str:
    """Return the JSON type of a value."""
    if isinstance(value, bool) or value is None:
        return str(type(value).__name__)
    return "number" if isinstance(value, (int, float)) else type(value).__name__
