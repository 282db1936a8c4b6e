"""What a manifest says, compared with what its files hold: an edit whose checksum was put right again shows here.

What no file knows is not covered: the graph's server address, the drift, the levels of proof and their notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from lib.backup_set.manifest import RESTORED, CollectionHalf, GraphHalf, Manifest
from lib.errors import BackupDamaged
from lib.graph.rdb import RdbFacts

if TYPE_CHECKING:
    from lib.steps.prove import GraphProof

_COLLECTION = (
    "collection",
    "server",
    "points",
    "size",
    "distance",
    "payload_schema",
    "aliases",
    "model",
    "model_known",
)
_SNAPSHOT = ("nodes", "snapshot_name", "snapshot_size", "snapshot_sha256", "promised_ids")


def compare_names(manifest: Manifest) -> None:
    """The set's time is the same in the manifest, its name and its files' names; raises BackupDamaged."""
    assert manifest.path is not None
    created = datetime.fromisoformat(manifest.created).astimezone(timezone.utc)
    said = {"its own name": manifest.path.name, "created": f"{created:%Y%m%d_%H%M%S}"}
    said |= {half.file.name: half.file.name for half in manifest.halves}
    for name, text in said.items():
        if manifest.stamp not in text:
            raise BackupDamaged(
                f"{manifest.path} was edited or renamed: stamp {manifest.stamp}, but {name}: {text}"
            )


def compare_rdb(path: Path, half: GraphHalf, facts: RdbFacts) -> None:
    """What the RDB says of itself without being loaded; raises BackupDamaged."""
    kind = "dump" if facts.dumped_graph else "rdb"
    told = facts.redis_version or half.server["redis"]
    _require_equal(path, {"kind": half.kind, "redis": half.server["redis"]}, {"kind": kind, "redis": told})


def compare_graph(path: Path, half: GraphHalf, found: GraphProof) -> None:
    """Counts, definitions and digest of the loaded graph, where the backup counted the file itself.

    A half that was only `checked` then has the source's counts, which writes may have changed before the RDB was
    taken. Raises BackupDamaged.
    """
    if not half.digest and half.proof != RESTORED:
        return
    assert found.counts is not None
    assert found.schema is not None
    assert found.digest is not None
    actual = {
        "nodes": found.counts.nodes,
        "relationships": found.counts.relationships,
        "labels": found.counts.labels,
        "types": found.counts.types,
        "indexes": found.schema.indexes,
        "constraints": found.schema.constraints,
        "digest": found.digest.digest,
    }
    _require_equal(path, {name: getattr(half, name) for name in actual}, actual)


def compare_collection(path: Path, half: CollectionHalf, facts: Mapping[str, Any]) -> None:
    """The manifest's half and the archive's own facts, with `size` and `distance`; raises BackupDamaged."""
    names = [name for name in (*_COLLECTION, *_SNAPSHOT) if name in facts]
    _require_equal(path, {name: getattr(half, name) for name in names}, facts)


def _require_equal(path: Path, promised: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    for name, value in promised.items():
        if orjson.loads(orjson.dumps(actual[name])) != orjson.loads(orjson.dumps(value)):
            raise BackupDamaged(
                f"{path}: {name} is {_short(actual[name])}, its manifest says {_short(value)}"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
