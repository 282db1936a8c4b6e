"""Write backups as AutoMem's own scripts do, of any size; nodes and points are not held in memory.

The text is that of `json.dump(data, indent=2)` (https://github.com/verygoodplugins/automem, automem/backup.py).
`tests/data/automem_backup` has what AutoMem itself wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import orjson
from isal import igzip

from tests.sandbox.sample_memories import SampleMemory, generate
from tests.sandbox.vectors import vector_for

STAMP = "20261127_120000"
Row = dict[str, Any]
Vector = np.ndarray[Any, np.dtype[np.float32]]
_ITEM, _NUMBER = "\n" + 4 * " ", ",\n" + 8 * " "
_VECTOR = "the vector comes here"
# Numbers that orjson writes in another way than Python: 1e300 for 1e+300, 0.00001 for 1e-05.
_NOT_AS_PYTHON = re.compile(rb" -?(?:\d+(?:\.\d+)?e|0\.0000)")


class JsonFile:
    """One of AutoMem's files, written item by item."""

    def __init__(self, out: TextIO, key: str, name: str, stamp: str = STAMP) -> None:
        self._out = out
        self._counts: list[int] = []
        out.write(f'{{\n  "timestamp": {json.dumps(stamp)},\n  "{key}": {json.dumps(name)}')

    def array(self, key: str) -> None:
        """Begin an array. Its items are the next ones."""
        self._end_array()
        self._counts.append(0)
        self._out.write(f',\n  "{key}": [')

    def add(self, row: Row) -> None:
        """Write an item: a node, or a relationship."""
        self._write(_text(row))

    def add_point(self, row: Row, vector: Vector) -> None:
        """Write a point from its `id` and `payload`. Its vector is most of the file."""
        text = _text({"id": row["id"], "vector": _VECTOR, "payload": row["payload"]})
        numbers = orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")
        numbers = [repr(float(one)) if "0.0000" in one or "e" in one else one for one in numbers]
        self._write(text.replace(f'"{_VECTOR}"', f"[\n        {_NUMBER.join(numbers)}\n      ]", 1))

    def stats(self, *keys: str, **more: int) -> None:
        """End the file with the counts of its arrays under these names."""
        self._end_array()
        stats = {**dict(zip(keys, self._counts, strict=True)), **more}
        self._out.write(',\n  "stats": ' + json.dumps(stats, indent=2).replace("\n", "\n  ") + "\n}")

    def _write(self, text: str) -> None:
        self._out.write(("," if self._counts[-1] else "") + _ITEM + text)
        self._counts[-1] += 1

    def _end_array(self) -> None:
        if self._counts:
            self._out.write("\n  ]" if self._counts[-1] else "]")


def _text(row: Row) -> str:
    """The item as `json.dumps(row, indent=2)` writes it; by orjson, four times as fast, if that is the same."""
    data = orjson.dumps(row, option=orjson.OPT_INDENT_2)
    same = data.isascii() and not _NOT_AS_PYTHON.search(data)
    return (data.decode() if same else json.dumps(row, indent=2)).replace("\n", _ITEM)


@contextmanager
def graph_file(path: Path, name: str, stamp: str = STAMP) -> Iterator[JsonFile]:
    """Write falkordb_*.json.gz; the block adds the arrays `nodes` and `relationships`."""
    with igzip.open(path, "wt", compresslevel=1, encoding="utf-8", newline="\n") as out:
        file = JsonFile(out, "graph_name", name, stamp)
        yield file
        file.stats("node_count", "relationship_count")


@contextmanager
def collection_file(path: Path, name: str, size: int, stamp: str = STAMP) -> Iterator[JsonFile]:
    """Write qdrant_*.json.gz; the block adds the points of vectors of `size` numbers."""
    with igzip.open(path, "wt", compresslevel=1, encoding="utf-8", newline="\n") as out:
        file = JsonFile(out, "collection_name", name, stamp)
        file.array("points")
        yield file
        file.stats("points_count", vector_size=size)


def write_samples(
    folder: Path, graph: str, collection: str, count: int, size: int, model: str = ""
) -> tuple[Path, Path]:
    """Write both files of `generate(count)` into `folder`, as AutoMem names them. Without a `model` vectors are random."""
    paths = folder / f"falkordb/falkordb_{STAMP}.json.gz", folder / f"qdrant/qdrant_{STAMP}.json.gz"
    for path in paths:
        path.parent.mkdir(parents=True)
    relationships: list[Row] = []
    noise = np.random.default_rng(count)
    with graph_file(paths[0], graph) as nodes, collection_file(paths[1], collection, size) as points:
        nodes.array("nodes")
        for one in generate(count):
            nodes.add(node_row(one))
            relationships += relationship_rows(one)
            if one.point_id is not None:
                vector = vector_for(model, one.content, size) if model else _vector(noise, size)
                points.add_point(point_row(one), vector)
        nodes.array("relationships")
        for row in relationships:
            nodes.add(row)
    return paths


def node_row(memory: SampleMemory) -> Row:
    """The node. Its internal id is the sequence number, as in a new graph."""
    return {"id": memory.sequence, "labels": list(memory.labels), "properties": memory.properties}


def relationship_rows(memory: SampleMemory) -> list[Row]:
    """The relationships that begin at the node."""
    source = memory.sequence
    return [
        {"source_id": source, "type": one.type, "target_id": one.target, "properties": one.properties}
        for one in memory.relationships
    ]


def point_row(memory: SampleMemory) -> Row:
    """The id and payload of the memory's point."""
    return {"id": memory.point_id, "payload": memory.payload}


def sample_points(count: int, size: int) -> Iterable[Row]:
    """The points that `write_samples` writes, with their vectors."""
    noise = np.random.default_rng(count)
    for one in generate(count):
        if one.point_id is not None:
            yield {**point_row(one), "vector": _vector(noise, size)}


def _vector(noise: np.random.Generator, size: int) -> Vector:
    """Noise of length 1, as a collection of Cosine returns it."""
    vector = noise.standard_normal(size)
    return (vector / np.linalg.norm(vector)).astype(np.float32)
