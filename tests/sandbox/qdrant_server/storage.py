"""The data directory: collections over Qdrant's engine, aliases, and the start with a damaged collection."""

from __future__ import annotations

import contextlib
import math
import secrets
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import qdrant_edge as edge

from tests.sandbox.qdrant_server.config import dimension, patched
from tests.sandbox.qdrant_server.points import engine_config, engine_point, index_schema
from tests.sandbox.qdrant_server.versions import (
    INFO,
    UPDATE,
    Refusal,
    StartRefused,
    Version,
    bad_request,
    collection_exists,
    collection_missing,
    format_error,
    internal,
    shard_absent,
    wrong_input,
)

Json = dict[str, Any]
MINUTE = 60.0


class Collection:
    """One collection. Its files are `config.json`, `payload_index.json` and the shard `0/`, as on the real server.

    `lock` is held by whatever changes points, indexes or files. Reads do not need it. `failed` is True after a
    restore or a start that could not load the shard.
    """

    def __init__(self, name: str, folder: Path, config: Json, version: Version, peer: int) -> None:
        self.name = name
        self.folder = folder
        self.shard_folder = folder / "0"
        self.config = config
        self.schema: Json = {}  # field -> field_schema of the request
        self.lock = threading.RLock()
        self.deleted = False
        self.discarded = False
        self.failed = False
        self._version = version
        self._peer = peer
        self._engine: edge.EdgeShard | None = None
        self._rate_tokens: dict[str, tuple[float, float]] = {}  # kind of limit -> tokens left, at that moment
        self._operation = 0 if version.modern else -1  # 1.18 begins the log with an internal operation

    def create(self) -> None:
        """Create the files of an empty collection, `config.json` last: a start ignores a folder without it."""
        self.shard_folder.mkdir(parents=True)
        self._engine = edge.EdgeShard.create(str(self.shard_folder), engine_config(self.config))
        self.save()

    def open(self) -> None:
        """Open the shard in the folder.

        Raises FileNotFoundError if there is none, the engine's bare Exception if it cannot be loaded.
        """
        if not (self.shard_folder / "wal").is_dir():  # the engine would begin an empty one
            raise FileNotFoundError("No shard found: 0")
        self._engine = edge.EdgeShard.load(str(self.shard_folder), engine_config(self.config))
        self.failed = False

    def close(self) -> None:
        """Release the shard's files. The collection then answers as during a restore."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def discard(self, trash: Path) -> None:
        """Move the files into the folder `trash` and remove them there. Snapshot files are elsewhere and stay."""
        if self.folder.exists():
            self.folder.rename(trash / "files")
        engine, self._engine = self._engine, None
        threading.Thread(target=_remove, args=(engine, trash), daemon=True).start()

    def save(self) -> None:
        """Write the configuration and the index schema."""
        _write_json(self.folder / "payload_index.json", {"schema": self.schema})
        _write_json(self.folder / "config.json", {**self.config, "uuid": None})

    def engine(self, doing: str) -> edge.EdgeShard:
        """Get the open shard. Raises Refusal (500), worded for `doing`, if there is none."""
        engine = self._engine
        if engine is not None:
            return engine
        raise internal(self._version.failed_shard(doing, self._peer)) if self.failed else shard_absent()

    def update(self, operation: edge.UpdateOperation) -> int:
        """Apply one operation. Returns its number. Raises Refusal (400, or 404) with the engine's error."""
        with self.lock:
            engine = self.engine(UPDATE)
            try:
                engine.update(operation)
            except Exception as error:  # noqa: BLE001  # the engine raises nothing finer
                if str(error).startswith("No point with id"):
                    raise Refusal(404, f"Not found: {error} found") from None
                raise wrong_input(str(error)) from None
            return self.next_operation()

    def next_operation(self) -> int:
        """Count one operation, as the log numbers them."""
        self._operation += 1
        return self._operation

    def upsert(self, rows: list[Json]) -> int:
        """Store points. Returns the operation's number.

        If a vector has a wrong dimension, 1.18 refuses the whole batch; 1.11 stores the points before it first.
        """
        faults = (self._wrong_dimension(row["vector"]) for row in rows)
        position, fault = next(((at, one) for at, one in enumerate(faults) if one), (0, None))
        if fault is None:
            return self.update(_upsert(rows))
        if not self._version.modern:
            if position:
                self.update(_upsert(rows[:position]))
            else:
                self.next_operation()
        raise wrong_input(fault)

    def _wrong_dimension(self, vector: Any) -> str | None:
        named = vector if isinstance(vector, dict) else {"": vector}
        for name, values in named.items():
            expected = dimension(self.config, name)
            if expected is None:
                if name not in self.config["params"].get("sparse_vectors", {}):
                    return f"Not existing vector name error: {name}"
            elif isinstance(values, list) and len(values) != expected and not _is_multi(values):
                return f"Vector dimension error: expected dim: {expected}, got {len(values)}"
        return None

    def add_index(self, field: str, schema: Any) -> int:
        """Index a payload field by `schema` (a type's name or its parameters)."""
        operation = edge.UpdateOperation.create_field_index(field, index_schema(schema, b""))
        with self.lock:
            number = self.update(operation)
            self.next_operation()  # as on the real server, an index is two operations
            self.schema[field] = schema
            self.save()
        return number

    def drop_index(self, field: str) -> int:
        """Remove the index of a payload field, if there is one."""
        with self.lock:
            number = self.update(edge.UpdateOperation.delete_field_index(field))
            self.next_operation()
            self.schema.pop(field, None)
            self.save()
        return number

    def patch(self, request: Json) -> None:
        """Change the configuration as PATCH does."""
        with self.lock:
            self.config = patched(self.config, request, self._version)
            self.save()

    def check_write(self, points: int) -> None:
        """Raise Refusal (400, 429) if strict mode forbids a write of `points` points."""
        strict = self._strict_mode()
        largest = strict.get("upsert_max_batchsize")
        if largest is not None and points > largest:
            raise _too_many(points, largest, "upsert limit")
        self._spend("Write", strict.get("write_rate_limit"), points)

    def check_read(self, limit: int | None, cost: int = 1, *, exact: bool = False) -> None:
        """Raise Refusal (400, 429) if strict mode forbids a read: of `limit` points, at such a cost, or an exact one."""
        strict = self._strict_mode()
        if exact and strict.get("search_allow_exact") is False:
            raise bad_request("Exact search disabled!. Help: Set exact=false.")
        largest = strict.get("max_query_limit")
        if largest is not None and limit is not None and limit > largest:
            raise _too_many(limit, largest, "limit")
        self._spend("Read", strict.get("read_rate_limit"), cost)

    def _strict_mode(self) -> Json:
        strict: Json = self.config.get("strict_mode_config", {})
        return strict if strict.get("enabled") else {}

    def _spend(self, kind: str, per_minute: int | None, cost: int) -> None:
        if per_minute is None:
            return
        text = f"Rate limiting exceeded: {kind} rate limit exceeded"
        if cost > per_minute:
            advice = "request larger than rate limiter capacity, please try to split your request"
            raise Refusal(429, f"{text}, {advice}")
        with self.lock:
            now = time.monotonic()
            initial = per_minute - 1 if kind == "Write" else per_minute  # the creation has spent one (recorded)
            tokens, then = self._rate_tokens.get(kind, (float(initial), now))
            tokens = min(per_minute, tokens + (now - then) * per_minute / MINUTE)
            if tokens < cost:
                seconds = math.ceil((cost - tokens) * MINUTE / per_minute)
                text += f": Operation requires {cost} tokens but only {tokens:.1f} were available."
                raise Refusal(429, f"{text} Retry after {seconds}s", headers={"retry-after": str(seconds)})
            self._rate_tokens[kind] = (tokens - cost, now)

    def points_count(self) -> int:
        """Count the points; 0 for a failed collection."""
        return 0 if self._engine is None else int(self._engine.count(edge.CountRequest(exact=True)))

    def info(self) -> Json:
        """Answer `GET /collections/{name}`.

        Vectors above the threshold are reported as indexed at once, the real server does it some seconds later.
        """
        state = self.engine(INFO).info()
        answer = {
            "status": "green",
            "optimizer_status": "ok",
            "indexed_vectors_count": self._indexed(state.points_count),
            "points_count": state.points_count,
            "segments_count": state.segments_count,
            "config": self.config,
            "payload_schema": self._payload_schema(state.payload_schema),
        }
        return {**answer, "update_queue": {"length": 0}} if self._version.modern else answer

    def _indexed(self, count: int) -> int:
        size = dimension(self.config) or 0
        threshold = self.config["optimizer_config"]["indexing_threshold"]
        return count if threshold and count * size * 4 / 1024 > threshold else 0

    def _payload_schema(self, indexed: Json) -> Json:
        found: Json = {}
        for field, state in indexed.items():
            schema = self.schema.get(field)
            kind = schema["type"] if isinstance(schema, dict) else schema
            found[field] = {"data_type": kind or str(state.data_type).rpartition(".")[2].lower()}
            if isinstance(schema, dict):
                found[field]["params"] = schema
            found[field]["points"] = state.points
        return found


def read_config(folder: Path) -> tuple[Json, Json]:
    """Read configuration and index schema of a collection's folder or an unpacked snapshot.

    Raises OSError, ValueError.
    """
    config = orjson.loads((folder / "config.json").read_bytes())
    config.pop("uuid", None)
    index = folder / "payload_index.json"
    return config, orjson.loads(index.read_bytes())["schema"] if index.exists() else {}


def _remove(engine: edge.EdgeShard | None, trash: Path) -> None:
    with contextlib.suppress(Exception):  # the engine raises nothing finer: its files were moved
        if engine is not None:
            engine.close()
    shutil.rmtree(trash, ignore_errors=True)


def _too_many(asked: int, largest: int, what: str) -> Refusal:
    advice = f'Help: Reduce the "{what}" parameter to or below {largest}.'
    return bad_request(f'Limit exceeded {asked} > {largest} for "{what}". {advice}')


def _is_multi(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], list)


def _upsert(rows: list[Json]) -> edge.UpdateOperation:
    try:
        return edge.UpdateOperation.upsert_points([engine_point(row) for row in rows])
    except (TypeError, ValueError, OverflowError) as error:
        raise format_error(str(error)) from None


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(orjson.dumps(value))
    partial.replace(path)


class Storage:
    """All data of the server. Its files are under `folder`, named as on the real server.

    With `s3`, snapshots are listed and sent as from a server that stores them in S3.
    """

    def __init__(self, folder: Path, version: Version, *, s3: bool = False) -> None:
        self.folder = folder
        self.s3 = s3
        self.version = version
        self.collections: dict[str, Collection] = {}
        self.aliases: dict[str, str] = {}  # alias -> collection
        self._lock = threading.RLock()
        self._aliases_file = folder / "aliases" / "data.json"
        for part in ("collections", "snapshots", "aliases"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        (folder / "tmp").mkdir()
        self.peer = self._read_peer()

    def open(self) -> None:
        """Open what is in the directory. Raises StartRefused if 1.11.3 would not start."""
        if self._aliases_file.exists():
            self.aliases = orjson.loads(self._aliases_file.read_bytes())
        for folder in sorted((self.folder / "collections").iterdir()):
            if (folder / "config.json").exists():
                self._open_collection(folder)

    def _open_collection(self, folder: Path) -> None:
        config, schema = read_config(folder)
        collection = Collection(folder.name, folder, config, self.version, self.peer)
        collection.schema = schema
        try:
            collection.open()
        except Exception as error:  # noqa: BLE001  # the engine raises nothing finer
            if not self.version.modern:
                raise StartRefused(f"Failed to load local shard {folder / '0'}: {error}") from None
            collection.failed = True
        self.collections[folder.name] = collection

    def close(self) -> None:
        """Flush and release every collection."""
        for collection in self.collections.values():
            collection.close()

    def get(self, name: str) -> Collection:
        """Find a collection by its name or alias. Raises Refusal (404)."""
        collection = self.collections.get(self.aliases.get(name, name))
        if collection is None:
            raise collection_missing(name)
        return collection

    def create(self, name: str, config: Json) -> Collection:
        """Create an empty collection. Raises Refusal if a collection (409) or an alias (400) has the name."""
        with self._lock:
            if name in self.aliases:
                raise wrong_input(f"Can't create collection with name {name}. Alias with the same name already exists")
            if name in self.collections:
                raise collection_exists(name)
            folder = self.folder / "collections" / name
            shutil.rmtree(folder, ignore_errors=True)
            collection = Collection(name, folder, config, self.version, self.peer)
            collection.create()
            self.collections[name] = collection
            return collection

    def delete(self, name: str) -> bool:
        """Drop a collection and its aliases. Returns False if none has this name; an alias does not count."""
        with self._lock:
            collection = self.collections.pop(name, None)
            if collection is None:
                return False
            self.aliases = {alias: target for alias, target in self.aliases.items() if target != name}
            self._save_aliases()
            collection.deleted = True
        self.discard(collection)
        return True

    def discard(self, collection: Collection) -> None:
        """Remove a deleted collection's files, after the restore or snapshot that uses it has ended."""
        with collection.lock:
            if not collection.discarded:
                collection.discarded = True
                collection.discard(self.scratch(f"deleted-{collection.name}-"))

    def change_aliases(self, actions: list[Json]) -> None:
        """Create, rename and delete aliases. Raises Refusal (404, 409); the actions before it stay done."""
        with self._lock:
            for action in actions:
                self._change_alias(action)
            self._save_aliases()

    def _change_alias(self, action: Json) -> None:
        if "create_alias" in action:
            new = action["create_alias"]
            if new["collection_name"] not in self.collections:
                raise collection_missing(new["collection_name"])
            if new["alias_name"] in self.collections:
                raise collection_exists(new["alias_name"])
            self.aliases[new["alias_name"]] = new["collection_name"]
        elif "delete_alias" in action:
            self.aliases.pop(action["delete_alias"]["alias_name"], None)
        elif "rename_alias" in action:
            renamed = action["rename_alias"]
            self.aliases[renamed["new_alias_name"]] = self.aliases.pop(renamed["old_alias_name"])

    def alias_rows(self, name: str | None = None) -> list[Json]:
        """List the aliases of one collection, or of all."""
        pairs = sorted(self.aliases.items())
        return [{"alias_name": a, "collection_name": c} for a, c in pairs if name is None or c == name]

    def scratch(self, prefix: str) -> Path:
        """Create a folder for a snapshot that is being built or unpacked. The next start removes what is left."""
        return Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder / "tmp"))

    def snapshot_folder(self, name: str) -> Path:
        """The folder of a collection's snapshot files, whether the collection exists or not."""
        return self.folder / "snapshots" / name

    def _save_aliases(self) -> None:
        _write_json(self._aliases_file, self.aliases)

    def _read_peer(self) -> int:
        path = self.folder / "raft_state.json"
        if not path.exists():
            path.write_bytes(orjson.dumps({"peer_id": secrets.randbits(52)}))
        return int(orjson.loads(path.read_bytes())["peer_id"])
