"""The snapshot files of a collection: made, listed, found, deleted. They outlive the collection."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from lib.sandbox.qdrant_server import snapshot_tar as tar
from lib.sandbox.qdrant_server.collection import Collection
from lib.sandbox.qdrant_server.dialect import SNAPSHOT
from lib.sandbox.qdrant_server.errors import internal, snapshot_missing
from lib.sandbox.qdrant_server.storage import Storage

Json = dict[str, Any]
MEGABYTE = 1024 * 1024
STORAGE_FORMAT = b"0.4.2"  # the same in 1.11.3 and 1.18.3
SUFFIX = ".snapshot"


def create(storage: Storage, collection: Collection) -> Json:
    """Make a snapshot; its name, time, size and sha256. Refusal (500) for a dead collection."""
    name = f"{collection.name}-{storage.peer}-{datetime.now(timezone.utc):%Y-%m-%d-%H-%M-%S}{SUFFIX}"
    scratch = storage.scratch(f"{name}-target-")
    if collection.dead:
        raise internal(storage.dialect.dead(SNAPSHOT, storage.peer, str(scratch)))
    built = scratch / name
    with collection.lock, built.open("wb") as out:
        collection.engine(SNAPSHOT).flush()
        _write(out, collection, storage, scratch)
    folder = storage.snapshot_folder(collection.name)
    folder.mkdir(parents=True, exist_ok=True)
    if not storage.s3:
        (folder / f"{name}.checksum").write_text(sha256(built))
    built.rename(folder / name)
    scratch.rmdir()
    return describe(folder / name)


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MEGABYTE):
            digest.update(piece)
    return digest.hexdigest()


def describe(path: Path) -> Json:
    """A snapshot as the list shows it; only the server's own have a checksum."""
    stat = path.stat()
    made = datetime.fromtimestamp(stat.st_mtime, timezone.utc)
    found: Json = {"name": path.name, "creation_time": f"{made:%Y-%m-%dT%H:%M:%S}", "size": stat.st_size}
    checksum = path.with_name(f"{path.name}.checksum")
    if checksum.exists():
        found["checksum"] = checksum.read_text()
    return found


def listed(storage: Storage, name: str) -> list[Json]:
    """The snapshots of an existing collection; Refusal (404) otherwise."""
    folder = storage.snapshot_folder(storage.get(name).name)
    return [describe(path) for path in sorted(folder.glob(f"*{SUFFIX}"))] if folder.is_dir() else []


def find(storage: Storage, name: str, snapshot: str) -> Path:
    """The file of one snapshot of an existing collection; Refusal (404) otherwise."""
    path = storage.snapshot_folder(storage.get(name).name) / snapshot
    if "/" in snapshot or not path.is_file():
        raise snapshot_missing(snapshot)
    return path


def delete(storage: Storage, name: str, snapshot: str) -> bool:
    """Delete one snapshot; Refusal (404) where there is none."""
    path = find(storage, name, snapshot)
    path.unlink()
    path.with_name(f"{path.name}.checksum").unlink(missing_ok=True)
    return True


def _write(out: BinaryIO, collection: Collection, storage: Storage, scratch: Path) -> None:
    heads = _heads(collection, storage)
    early = ("config.json", "0/replica_state.json", "0/shard_config.json")
    if not storage.dialect.sparse_snapshots:  # 1.11: the configuration first, folders as entries of their own
        tar.add_folder(out, "./")
        for name in early:
            if name == "0/replica_state.json":
                tar.add_folder(out, "0")
            tar.add_bytes(out, name, heads.pop(name))
        tar.add_folder(out, "0/segments")
    _write_segments(out, collection, scratch, modern=storage.dialect.modern)
    if not storage.dialect.sparse_snapshots:
        tar.add_folder(out, "0/wal")
    _write_log(out, collection, sparse=storage.dialect.sparse_snapshots)
    for name, content in heads.items():
        tar.add_bytes(out, name, content)
    out.write(bytes(2 * tar.BLOCK))


def _heads(collection: Collection, storage: Storage) -> dict[str, bytes]:
    peer = storage.peer
    config = {**collection.config, **({"uuid": None} if storage.dialect.modern else {})}
    contents: dict[str, Any] = {
        "0/newest_clocks.json": {"clocks": []},
        "0/replica_state.json": {"is_local": True, "this_peer_id": peer, "peers": {str(peer): "Active"}},
        "0/shard_config.json": {"type": "ReplicaSet"},
        "config.json": config,
        "shard_key_mapping.json": [] if storage.dialect.modern else {},
        "payload_index.json": {"schema": collection.schema},
    }
    return {**{name: orjson.dumps(value) for name, value in contents.items()}, "version.info": STORAGE_FORMAT}


def _write_segments(out: BinaryIO, collection: Collection, scratch: Path, *, modern: bool) -> None:
    for folder in sorted((collection.shard_folder / "segments").iterdir()):
        if not (folder / "segment.json").exists():
            continue
        packed = scratch / f"{folder.name}.tar"
        tar.write_segment(packed, folder, modern=modern)
        with packed.open("rb") as source:
            tar.add_file(out, f"0/segments/{packed.name}", source, packed.stat().st_size)
        packed.unlink()


def _write_log(out: BinaryIO, collection: Collection, *, sparse: bool) -> None:
    """The engine preallocates 32 MiB files; the entries have the size that the collection's wal_config asks for."""
    capacity = collection.config["wal_config"]["wal_capacity_mb"] * MEGABYTE
    for path in sorted((collection.shard_folder / "wal").iterdir()):
        with path.open("rb") as source:
            extents = tar.data_extents(source.fileno(), path.stat().st_size)
            used = sum(extents[-1]) if extents else 0
            size = max(used, capacity) if path.name.startswith("open-") else path.stat().st_size
            if sparse and path.name.startswith("open-"):
                tar.add_sparse(out, f"0/wal/{path.name}", path, size)
            else:
                tar.add_file(out, f"0/wal/{path.name}", source, size)
