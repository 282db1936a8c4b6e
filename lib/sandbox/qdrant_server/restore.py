"""A snapshot onto a collection, in the order of the real server, so that each failure leaves behind what it leaves.

Until the configuration is found compatible nothing is touched. Then the old shard is cleared and the new one loaded;
a failure there leaves a dead collection (on 1.11.3 one that keeps the server from starting again).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import orjson

from lib.sandbox.qdrant_server import snapshot_tar as tar
from lib.sandbox.qdrant_server.collection import Collection, read_config
from lib.sandbox.qdrant_server.collection_config import incompatible
from lib.sandbox.qdrant_server.errors import Refusal, internal, wrong_input
from lib.sandbox.qdrant_server.json_body import parser_words
from lib.sandbox.qdrant_server.storage import Storage

Json = dict[str, Any]


def restore(storage: Storage, name: str, archive: Path) -> bool:
    """Make `name` (created if missing) what the snapshot holds; Refusal with the real server's words otherwise."""
    name = storage.aliases.get(name, name)
    scratch = storage.scratch(f"col-{name}-recovery-")
    try:
        config, schema = _unpack(storage, archive, scratch)
        segments_present = _unpack_segments(storage, scratch / "0")
        existing = storage.collections.get(name)
        if existing is not None:
            _check_compatible(existing, config)
        if any(scratch.glob("[1-9]*/segments/*")):
            raise internal("the stand-in keeps one shard and cannot restore several")
        collection = existing or storage.create(name, _without_fan_out(config))
        if not storage.dialect.modern and not (segments_present and (scratch / "0" / "wal").is_dir()):
            return True  # 1.11.3 skips a shard folder without log or segments, and says so to nobody
        _replace_shard(storage, collection, scratch / "0")
        _adopt_schema(storage, collection, schema, new=existing is None)
        return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _without_fan_out(config: Json) -> Json:
    """A collection made by a restore lacks what the create call does not take (seen on 1.11.3 and 1.19.0)."""
    params = {key: value for key, value in config["params"].items() if not key.startswith("read_fan_out")}
    return {**config, "params": params}


def _unpack(storage: Storage, archive: Path, scratch: Path) -> tuple[Json, Json]:
    dialect = storage.dialect
    try:
        tar.unpack(archive, scratch, sparse_allowed=dialect.sparse_snapshots)
    except tar.NotAnArchive:
        raise internal(dialect.not_an_archive()) from None
    except tar.SparseEntry:
        raise wrong_input("Malformed snapshot, tar archive contains GNUSparse entry") from None
    except tar.CutShort as cut:
        raise internal(f"File IO error: failed to unpack `{cut}`") from None
    config_file = scratch / "config.json"
    if not config_file.exists():
        raise internal(dialect.file_absent(str(config_file)))
    try:
        return read_config(scratch)
    except orjson.JSONDecodeError as error:
        raise internal(f"Json error: {parser_words(config_file.read_bytes(), error.pos)}") from None


def _unpack_segments(storage: Storage, shard: Path) -> bool:
    """Unpack each segment's tar in place; whether the folder of segments is there."""
    folder = shard / "segments"
    if not folder.is_dir():
        if storage.dialect.modern:
            missing = "No such file or directory (os error 2)"
            raise internal(f"IO Error: failed to read directory `{folder}`: {missing}")
        return False
    for packed in sorted(folder.glob("*.tar")):
        try:
            tar.unpack_segment(packed, packed.with_suffix(""), modern=storage.dialect.modern)
        except (tar.NotAnArchive, tar.CutShort):
            raise internal(storage.dialect.segment_not_an_archive(str(packed))) from None
        packed.unlink()
    return True


def _check_compatible(collection: Collection, config: Json) -> None:
    difference = incompatible(collection.config, config)
    if difference is not None:
        raise wrong_input(f"Snapshot is not compatible with existing collection: {difference}")


def _replace_shard(storage: Storage, collection: Collection, shard: Path) -> None:
    """The point of no return: the old shard goes before the new one is known to load."""
    with collection.lock:
        _still_there(storage, collection)
        collection.close()
        shutil.rmtree(collection.shard_folder, ignore_errors=True)
        try:
            _refuse_foreign(shard)
            for part in ("segments", "wal"):
                (shard / part).mkdir(exist_ok=True)
            shard.rename(collection.shard_folder)
            collection.open()
        except Exception as error:  # noqa: BLE001  # the engine raises nothing finer
            collection.dead = True
            raise internal(_load_words(str(error))) from None
        _still_there(storage, collection)


def _still_there(storage: Storage, collection: Collection) -> None:
    """A DELETE during the restore wins."""
    if not collection.deleted:
        return
    storage.discard(collection)
    if storage.dialect.modern:
        raise Refusal(404, "Not found: shard 0 not found")


def _refuse_foreign(shard: Path) -> None:
    """Segments of the RocksDB era (1.11) have no files that the engine knows."""
    for folder in (shard / "segments").glob("*"):
        if not (folder / "vector_storage").is_dir() and not any(folder.glob("vector_storage-*")):
            raise RuntimeError(f"Service runtime error: Failed to load segment {folder.name}: foreign format")


def _load_words(error: str) -> str:
    log = re.search(r"failed to open WAL [^:]*: (.*)", error)
    return f"Wal error: {log.group(1)}" if log else error


def _adopt_schema(storage: Storage, collection: Collection, schema: Json, *, new: bool) -> None:
    """Remember how indexes were asked for; 1.18.3 builds those of a new collection that its segments lack."""
    with collection.lock:
        if collection.deleted:
            return
        collection.schema = schema
        if new and storage.dialect.modern:
            for field in schema.keys() - collection.info()["payload_schema"].keys():
                collection.add_index(field, schema[field])
        collection.save()
