"""Snapshot files: create, list, find, delete, fetch and restore them."""

from __future__ import annotations

import hashlib
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import orjson

from tests.sandbox.qdrant_server import snapshot_tar as tar
from tests.sandbox.qdrant_server.config import incompatible
from tests.sandbox.qdrant_server.storage import Collection, Storage, read_config
from tests.sandbox.qdrant_server.versions import (
    SNAPSHOT,
    Refusal,
    bad_request,
    internal,
    parser_error,
    wrong_input,
)

Json = dict[str, Any]
FETCH_SECONDS = 600.0
MEGABYTE = 1024 * 1024
STORAGE_FORMAT = b"0.4.2"  # the same in 1.11.3 and 1.18.3
SUFFIX = ".snapshot"
IMAGE_SNAPSHOTS = "/qdrant/snapshots"  # where the server of the Docker image has them


@contextmanager
def local_copy(storage: Storage, location: str, api_key: str | None) -> Iterator[Path]:
    """Provide the snapshot at a location as a local file. It may be removed when the context ends.

    Raises Refusal (400, 500) if it cannot be read or fetched; nothing was changed then.
    """
    parts = urlsplit(location)
    if parts.scheme == "file":
        path = Path(unquote(parts.path))
        if path.is_relative_to(IMAGE_SNAPSHOTS):
            path = storage.snapshot_folder("") / path.relative_to(IMAGE_SNAPSHOTS)
        if not path.is_file():
            raise bad_request(f'Snapshot file "{path}" does not exist')
        yield path
        return
    if parts.scheme not in ("http", "https"):
        raise bad_request(f"URL {location} with schema {parts.scheme} is not supported")
    scratch = storage.scratch("download-")
    try:
        yield _fetch(storage, location, api_key, scratch / "snapshot")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fetch(storage: Storage, location: str, api_key: str | None, target: Path) -> Path:
    headers = {} if api_key is None else {"api-key": api_key}
    request = urllib.request.Request(location, headers=headers)  # the scheme was checked
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=FETCH_SECONDS) as answer, target.open("wb") as out:
            shutil.copyfileobj(answer, out, MEGABYTE)
    except urllib.error.HTTPError as error:
        status = f"{error.code} {HTTPStatus(error.code).phrase}"
        what = "tar" if storage.version.modern else "snapshot"
        raise wrong_input(f"Failed to download {what} from {location}: status - {status}") from None
    except OSError:
        raise internal(f"Http request error: error sending request for url ({location})") from None
    return target


def create(storage: Storage, collection: Collection) -> Json:
    """Create a snapshot. Returns its name, time, size and sha256. Raises Refusal (500) for a failed collection."""
    name = f"{collection.name}-{storage.peer}-{datetime.now(timezone.utc):%Y-%m-%d-%H-%M-%S}{SUFFIX}"
    scratch = storage.scratch(f"{name}-target-")
    if collection.failed:
        raise internal(storage.version.failed_shard(SNAPSHOT, storage.peer, str(scratch)))
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
    """Compute a file's sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MEGABYTE):
            digest.update(piece)
    return digest.hexdigest()


def describe(path: Path) -> Json:
    """Describe a snapshot as the list shows it. Only snapshots that this server created have a checksum."""
    stat = path.stat()
    created = datetime.fromtimestamp(stat.st_mtime, timezone.utc)
    found: Json = {"name": path.name, "creation_time": f"{created:%Y-%m-%dT%H:%M:%S}", "size": stat.st_size}
    checksum = path.with_name(f"{path.name}.checksum")
    if checksum.exists():
        found["checksum"] = checksum.read_text()
    return found


def listed(storage: Storage, name: str) -> list[Json]:
    """List the snapshots of a collection. Raises Refusal (404)."""
    folder = storage.snapshot_folder(storage.get(name).name)
    return [describe(path) for path in sorted(folder.glob(f"*{SUFFIX}"))] if folder.is_dir() else []


def find(storage: Storage, name: str, snapshot: str) -> Path:
    """Find the file of one snapshot. Raises Refusal (404)."""
    path = storage.snapshot_folder(storage.get(name).name) / snapshot
    if "/" in snapshot or not path.is_file():
        raise Refusal(404, f"Not found: Snapshot {snapshot} not found")
    return path


def delete(storage: Storage, name: str, snapshot: str) -> bool:
    """Delete one snapshot. Raises Refusal (404)."""
    path = find(storage, name, snapshot)
    path.unlink()
    path.with_name(f"{path.name}.checksum").unlink(missing_ok=True)
    return True


def _write(out: BinaryIO, collection: Collection, storage: Storage, scratch: Path) -> None:
    modern = storage.version.modern
    files = _small_files(collection, storage)
    if not modern:  # 1.11 writes the configuration first, and entries for folders
        tar.add_folder(out, "./")
        tar.add_bytes(out, "config.json", files.pop("config.json"))
        tar.add_folder(out, "0")
        for name in ("0/replica_state.json", "0/shard_config.json"):
            tar.add_bytes(out, name, files.pop(name))
        tar.add_folder(out, "0/segments")
    _write_segments(out, collection, scratch, modern=modern)
    if not modern:
        tar.add_folder(out, "0/wal")
    _write_log(out, collection, sparse=modern)
    for name, content in files.items():
        tar.add_bytes(out, name, content)
    out.write(bytes(2 * tar.BLOCK))


def _small_files(collection: Collection, storage: Storage) -> dict[str, bytes]:
    modern, peer = storage.version.modern, storage.peer
    contents: dict[str, Any] = {
        "0/newest_clocks.json": {"clocks": []},
        "0/replica_state.json": {"is_local": True, "this_peer_id": peer, "peers": {str(peer): "Active"}},
        "0/shard_config.json": {"type": "ReplicaSet"},
        "config.json": {**collection.config, "uuid": None} if modern else collection.config,
        "shard_key_mapping.json": [] if modern else {},
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
    """Write the log. The engine preallocates 32 MiB files; the entries have the size that wal_config asks for."""
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


def restore(storage: Storage, name: str, archive: Path) -> bool:
    """Restore a snapshot into a collection, which is created if missing. Raises Refusal, worded as by the real server."""
    name = storage.aliases.get(name, name)
    scratch = storage.scratch(f"col-{name}-recovery-")
    try:
        config, schema = _unpack(storage, archive, scratch)
        segments_present = _unpack_segments(storage, scratch / "0")
        existing = storage.collections.get(name)
        difference = incompatible(existing.config, config) if existing else None
        if difference:
            raise wrong_input(f"Snapshot is not compatible with existing collection: {difference}")
        if any(scratch.glob("[1-9]*/segments/*")):
            raise internal("the stand-in supports one shard and cannot restore several")
        collection = existing or storage.create(name, _without_fan_out(config))
        if not storage.version.modern and not (segments_present and (scratch / "0" / "wal").is_dir()):
            return True  # 1.11.3 silently ignores a shard folder without log or segments
        _replace_shard(storage, collection, scratch / "0")
        _adopt_schema(storage, collection, schema, new=existing is None)
        return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _without_fan_out(config: Json) -> Json:
    """Remove what the create call does not accept: a restored collection lacks it (1.11.3 and 1.19.0)."""
    params = {key: value for key, value in config["params"].items() if not key.startswith("read_fan_out")}
    return {**config, "params": params}


def _unpack(storage: Storage, archive: Path, scratch: Path) -> tuple[Json, Json]:
    version = storage.version
    try:
        tar.unpack(archive, scratch, sparse_allowed=version.modern)
    except tar.NotAnArchive:
        raise internal(version.not_an_archive()) from None
    except tar.SparseEntry:
        raise wrong_input("Malformed snapshot, tar archive contains GNUSparse entry") from None
    except tar.CutShort as cut:
        raise internal(f"File IO error: failed to unpack `{cut}`") from None
    config_file = scratch / "config.json"
    if not config_file.exists():
        raise internal(version.file_absent(str(config_file)))
    try:
        return read_config(scratch)
    except orjson.JSONDecodeError as error:
        raise internal(f"Json error: {parser_error(config_file.read_bytes(), error.pos)}") from None


def _unpack_segments(storage: Storage, shard: Path) -> bool:
    """Unpack each segment's tar in place. Returns whether the folder of segments exists."""
    folder = shard / "segments"
    if not folder.is_dir():
        if storage.version.modern:
            missing = "No such file or directory (os error 2)"
            raise internal(f"IO Error: failed to read directory `{folder}`: {missing}")
        return False
    for packed in sorted(folder.glob("*.tar")):
        try:
            tar.unpack_segment(packed, packed.with_suffix(""), modern=storage.version.modern)
        except (tar.NotAnArchive, tar.CutShort):
            raise internal(storage.version.segment_not_an_archive(str(packed))) from None
        packed.unlink()
    return True


def _replace_shard(storage: Storage, collection: Collection, shard: Path) -> None:
    """Replace the shard. As on the real server, the old one is removed before the new one is known to load."""
    with collection.lock:
        _check_not_deleted(storage, collection)
        collection.close()
        shutil.rmtree(collection.shard_folder, ignore_errors=True)
        try:
            _check_segment_format(shard)
            for part in ("segments", "wal"):
                (shard / part).mkdir(exist_ok=True)
            shard.rename(collection.shard_folder)
            collection.open()
        except Exception as error:  # noqa: BLE001  # the engine raises nothing finer
            collection.failed = True
            raise internal(_load_error(str(error))) from None
        _check_not_deleted(storage, collection)


def _check_not_deleted(storage: Storage, collection: Collection) -> None:
    """Finish a DELETE that came during the restore."""
    if not collection.deleted:
        return
    storage.discard(collection)
    if storage.version.modern:
        raise Refusal(404, "Not found: shard 0 not found")


def _check_segment_format(shard: Path) -> None:
    """Refuse RocksDB segments (1.11): they contain no files that the engine knows."""
    for folder in (shard / "segments").glob("*"):
        if not (folder / "vector_storage").is_dir() and not any(folder.glob("vector_storage-*")):
            raise RuntimeError(f"Service runtime error: Failed to load segment {folder.name}: foreign format")


def _load_error(error: str) -> str:
    log = re.search(r"failed to open WAL [^:]*: (.*)", error)
    return f"Wal error: {log.group(1)}" if log else error


def _adopt_schema(storage: Storage, collection: Collection, schema: Json, *, new: bool) -> None:
    """Take over the index schema. For a new collection 1.18.3 also builds the indexes that its segments lack."""
    with collection.lock:
        if collection.deleted:
            return
        collection.schema = schema
        if new and storage.version.modern:
            for field in schema.keys() - collection.info()["payload_schema"].keys():
                collection.add_index(field, schema[field])
        collection.save()
