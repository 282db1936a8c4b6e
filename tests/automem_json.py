"""Write backups as AutoMem's own scripts do, of any size and without holding them in memory.

The text is that of `json.dump(data, indent=2)` (https://github.com/verygoodplugins/automem, automem/backup.py).
`tests/data/automem_backup` has what AutoMem itself wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import orjson
from isal import igzip_threaded

from tests.sandbox.sample_memories import SampleMemory, generate

STAMP = "20261127_120000"
Row = dict[str, Any]
Vectors = np.ndarray[Any, np.dtype[np.float32]]
_ITEM, _NUMBER = "\n" + 4 * " ", ",\n" + 8 * " "
_VECTOR = json.dumps("the vector comes here")


@dataclass
class _Count:
    """How many items an array has, once it is written."""

    items: int = 0


def write_graph(path: Path, name: str, nodes: Iterable[Row], relationships: Iterable[Row], stamp: str = STAMP) -> None:
    """Write falkordb_*.json.gz: nodes with `id`, `labels`, `properties`; relationships as in AutoMem's file."""
    node_count, relationship_count = _Count(), _Count()
    with igzip_threaded.open(path, "wt", compresslevel=1, encoding="utf-8", newline="\n") as out:
        _write_head(out, stamp, "graph_name", name)
        _write_array(out, "nodes", map(_item, nodes), node_count)
        _write_array(out, "relationships", map(_item, relationships), relationship_count)
        _write_stats(out, {"node_count": node_count.items, "relationship_count": relationship_count.items})


def write_collection(
    path: Path, name: str, size: int, points: Iterable[tuple[Row, Vectors]], stamp: str = STAMP
) -> None:
    """Write qdrant_*.json.gz: points as rows with `id` and `payload`, and their vectors."""
    count = _Count()
    with igzip_threaded.open(path, "wt", compresslevel=1, encoding="utf-8", newline="\n") as out:
        _write_head(out, stamp, "collection_name", name)
        _write_array(out, "points", (_point(row, vector) for row, vector in points), count)
        _write_stats(out, {"points_count": count.items, "vector_size": size})


def sample_nodes(count: int) -> Iterator[Row]:
    """The nodes of `generate(count)`. Their internal ids are the sequence numbers, as in a new graph."""
    for one in generate(count):
        yield {"id": one.sequence, "labels": list(one.labels), "properties": one.properties}


def sample_relationships(count: int) -> Iterator[Row]:
    """The relationships of `generate(count)`."""
    for one in generate(count):
        for link in one.relationships:
            ends = {"source_id": one.sequence, "type": link.type, "target_id": link.target}
            yield {**ends, "properties": link.properties}


def sample_points(count: int, size: int) -> Iterator[tuple[Row, Vectors]]:
    """The points of `generate(count)` with vectors of noise of length 1."""
    noise = np.random.default_rng(count)
    for one in generate(count):
        if one.point_id is not None:
            vector = noise.standard_normal(size).astype(np.float32)
            yield point_row(one), vector / np.linalg.norm(vector)


def point_row(memory: SampleMemory) -> Row:
    """The id and payload of a memory's point."""
    return {"id": memory.point_id, "payload": memory.payload}


def write_samples(folder: Path, graph: str, collection: str, count: int, size: int) -> tuple[Path, Path]:
    """Write both files of `generate(count)` into `folder`, as AutoMem names them."""
    paths = folder / f"falkordb/falkordb_{STAMP}.json.gz", folder / f"qdrant/qdrant_{STAMP}.json.gz"
    for path in paths:
        path.parent.mkdir(parents=True)
    write_graph(paths[0], graph, sample_nodes(count), sample_relationships(count))
    write_collection(paths[1], collection, size, sample_points(count, size))
    return paths


def _write_head(out: TextIO, stamp: str, key: str, name: str) -> None:
    out.write(f'{{\n  "timestamp": {json.dumps(stamp)},\n  "{key}": {json.dumps(name)}')


def _write_array(out: TextIO, key: str, items: Iterable[str], count: _Count) -> None:
    out.write(f',\n  "{key}": [')
    for item in items:
        out.write(("," if count.items else "") + _ITEM + item)
        count.items += 1
    out.write("\n  ]" if count.items else "]")


def _write_stats(out: TextIO, stats: dict[str, int]) -> None:
    out.write(',\n  "stats": ' + json.dumps(stats, indent=2).replace("\n", "\n  ") + "\n}")


def _item(row: Row) -> str:
    return json.dumps(row, indent=2).replace("\n", _ITEM)


def _point(row: Row, vector: Vectors) -> str:
    """The numbers of a vector are most of the file: orjson writes them as the server does, 20 times as fast."""
    text = _item({"id": row["id"], "vector": "the vector comes here", "payload": row["payload"]})
    numbers = orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode()
    # Python writes 0.00001 as 1e-05.
    parts = [repr(float(one)) if "0.0000" in one or "e" in one else one for one in numbers.split(",")]
    return text.replace(_VECTOR, f"[\n        {_NUMBER.join(parts)}\n      ]", 1)
