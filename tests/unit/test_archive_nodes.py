"""An archive with the snapshots of two nodes, from two-node clusters: verified if complete, refused if damaged."""

from __future__ import annotations

import gzip
import hashlib
import io
from pathlib import Path
from typing import Any

import orjson
import pytest

from lib.backup.archive import FACTS, IDS, SNAPSHOT, SnapshotMember, archive_writer, combined, read_archive
from lib.backup.collection import verify_collection
from lib.errors import BackupDamaged

# A file that stays open is a fault, too.
pytestmark = [
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]
RECORDINGS = Path(__file__).resolve().parent.parent / "qdrant_recordings"
IDENTITIES = [str(number) for number in range(40)]


def snapshots_of(version: str) -> dict[str, bytes]:
    """The snapshots of a collection of 40 points: the first node's shard has 22 or 18 of them, the second's the others."""
    names = ("cluster_node1.snapshot", "cluster_node2.snapshot")
    return {name: gzip.decompress((RECORDINGS / version / f"{name}.gz").read_bytes()) for name in names}


def facts_of(version: str, snapshots: dict[str, bytes]) -> dict[str, Any]:
    nodes = [
        {
            "peer": number,
            "address": f"http://node{number}:6333",
            "shards": [],
            "snapshot_name": name,
            "snapshot_size": len(data),
            "snapshot_sha256": hashlib.sha256(data).hexdigest(),
        }
        for number, (name, data) in enumerate(snapshots.items(), 1)
    ]
    node_facts = [SnapshotMember(one["snapshot_name"], one["snapshot_size"], one["snapshot_sha256"]) for one in nodes]
    whole = combined(node_facts)
    return {
        "collection": "memories",
        "server": {"address": "http://node1:6333", "version": version},
        "config": {"params": {"vectors": {"size": 4, "distance": "Cosine"}}},
        "payload_schema": {},
        "aliases": [],
        "points": 40,
        "model": "m",
        "model_known": "configured",
        "promised_ids": 40,
        "snapshot_name": whole.name,
        "snapshot_size": whole.size,
        "snapshot_sha256": whole.sha256,
        "nodes": nodes if len(nodes) > 1 else [],
    }


def write(path: Path, facts: dict[str, Any], snapshots: list[tuple[str, bytes]]) -> Path:
    members = [(FACTS, orjson.dumps(facts)), *((SNAPSHOT + name, data) for name, data in snapshots)]
    members.append((IDS, "".join(f"{one}\n" for one in IDENTITIES).encode()))
    with archive_writer(path) as archive:
        for name, data in members:
            archive.add(name, io.BytesIO(data), len(data))
        archive.finish()
    return path


@pytest.fixture(params=["1.11.3", "1.18.3"])
def version(request) -> str:
    return request.param


def test_both_snapshots_are_verified_and_their_points_counted_together(version, tmp_path):
    snapshots = snapshots_of(version)
    path = write(tmp_path / "a.tar.gz", facts_of(version, snapshots), list(snapshots.items()))
    verified = verify_collection(path)
    assert [one.name for one in verified.archive.snapshots] == list(snapshots)
    assert verified.archive.snapshot.size == sum(map(len, snapshots.values()))
    if version == "1.18.3" and verified.level == "restored":
        assert verified.note.startswith("40 points")


def test_a_reader_may_want_one_of_them(version, tmp_path):
    snapshots = snapshots_of(version)
    path = write(tmp_path / "a.tar.gz", facts_of(version, snapshots), list(snapshots.items()))
    for name, data in snapshots.items():
        seen: list[bytes] = []
        read_archive(path, on_snapshot=lambda stream, seen=seen: seen.append(stream.read()), only=name)
        assert seen == [data]


def test_one_nodes_part_alone_is_no_backup(version, tmp_path):
    for name, data in snapshots_of(version).items():
        facts = facts_of(version, {name: data})
        with pytest.raises(BackupDamaged, match=r"holds no points of shard [01]: they are on another Qdrant node"):
            verify_collection(write(tmp_path / "a.tar.gz", facts, [(name, data)]))


def test_one_node_twice_is_no_backup(version, tmp_path):
    (name, data), _ = snapshots_of(version).items()
    both = {name: data, "again.snapshot": data}
    with pytest.raises(BackupDamaged, match="holds no points of shard"):
        verify_collection(write(tmp_path / "a.tar.gz", facts_of(version, both), list(both.items())))


def test_a_snapshot_that_is_missing_too_many_swapped_or_changed_is_reported(version, tmp_path):
    snapshots = snapshots_of(version)
    facts, (one, two) = facts_of(version, snapshots), list(snapshots.items())
    changed = bytearray(two[1])
    changed[1000] ^= 1
    for members in (
        [one],
        [],
        [one, two, ("third", one[1])],
        [two, one],
        [one, one],
        [one, (two[0], bytes(changed))],
        [one, (two[0], two[1][:-512])],
    ):
        with pytest.raises(BackupDamaged):
            verify_collection(write(tmp_path / "a.tar.gz", facts, members))


@pytest.mark.parametrize(
    "edit",
    [
        lambda facts: facts["nodes"].pop(),
        lambda facts: facts["nodes"].append(facts["nodes"][0]),
        lambda facts: facts["nodes"].reverse(),
        lambda facts: facts.update(nodes={"a": 1, "b": 2}),
        lambda facts: facts.update(nodes=["a", "b"]),
        lambda facts: facts.update(nodes=7),
        lambda facts: facts["nodes"][1].pop("snapshot_sha256"),
        lambda facts: facts["nodes"][1].update(snapshot_size="many"),
        lambda facts: facts.update(snapshot_sha256="0" * 64),
        lambda facts: facts.update(snapshot_size=1),
    ],
)
def test_an_edited_list_of_the_nodes_is_reported(version, tmp_path, edit):
    snapshots = snapshots_of(version)
    facts = facts_of(version, snapshots)
    edit(facts)
    with pytest.raises(BackupDamaged):
        verify_collection(write(tmp_path / "a.tar.gz", facts, list(snapshots.items())))
