"""One collection over one shard of the engine: its life, its updates, and what it answers when it is dead."""

from __future__ import annotations

import contextlib
import shutil
import threading
from pathlib import Path
from typing import Any

import orjson
import qdrant_edge as edge

from lib.sandbox.qdrant_server import collection_config, conversion
from lib.sandbox.qdrant_server.dialect import INFO, UPDATE, Dialect
from lib.sandbox.qdrant_server.errors import Refusal, internal, wrong_input

Json = dict[str, Any]


class Collection:
    """The files are `config.json`, `payload_index.json` and the shard in `0/`, as the real server names them.

    `lock` is held by whatever changes points, indexes or files; reads run beside it.
    """

    def __init__(self, name: str, folder: Path, config: Json, dialect: Dialect, peer: int) -> None:
        self.name = name
        self.folder = folder
        self.config = config
        self.schema: Json = {}  # field -> field_schema as it was asked for
        self.lock = threading.RLock()
        self.rate_tokens: dict[str, tuple[float, float]] = {}  # kind of limit -> tokens left, at that moment
        self.deleted = False
        self.discarded = False
        self.dead = False
        self._dialect = dialect
        self._peer = peer
        self._engine: edge.EdgeShard | None = None
        self._operation = dialect.first_operation - 1

    @property
    def shard_folder(self) -> Path:
        """Where the engine's files lie."""
        return self.folder / "0"

    def create(self) -> None:
        """Make the files of an empty collection, `config.json` last: without it a start passes the folder over."""
        self.shard_folder.mkdir(parents=True)
        self._engine = edge.EdgeShard.create(str(self.shard_folder), conversion.engine_config(self.config))
        self.save()

    def open(self) -> None:
        """Open the shard that lies in the folder.

        Raises FileNotFoundError where there is none, the engine's bare Exception where it cannot be loaded.
        """
        if not (self.shard_folder / "wal").is_dir():  # the engine would begin an empty one
            raise FileNotFoundError("No shard found: 0")
        self._engine = edge.EdgeShard.load(str(self.shard_folder), conversion.engine_config(self.config))
        self.dead = False

    def close(self) -> None:
        """Release the shard's files; the collection then answers as while a restore runs."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def discard(self, trash: Path) -> None:
        """Move the files into the folder `trash` and remove them there; snapshot files lie elsewhere and stay."""
        if self.folder.exists():
            self.folder.rename(trash / "files")
        engine, self._engine = self._engine, None
        threading.Thread(target=_remove, args=(engine, trash), daemon=True).start()

    def save(self) -> None:
        """Write the configuration and the index schema."""
        _write_json(self.folder / "payload_index.json", {"schema": self.schema})
        _write_json(self.folder / "config.json", {**self.config, "uuid": None})

    def engine(self, doing: str) -> edge.EdgeShard:
        """The open shard; Refusal (500) with the words for `doing` where there is none."""
        engine = self._engine
        if engine is not None:
            return engine
        raise internal(self._dialect.dead(doing, self._peer) if self.dead else self._dialect.shard_absent())

    def update(self, operation: edge.UpdateOperation) -> int:
        """Apply one operation; its number. Refusal (400) with the engine's words where it refuses."""
        with self.lock:
            engine = self.engine(UPDATE)
            try:
                engine.update(operation)
            except Exception as error:  # noqa: BLE001  # the engine raises nothing finer
                raise wrong_input(str(error)) from None
            return self.next_operation()

    def next_operation(self) -> int:
        """Count one operation, as the log numbers them."""
        self._operation += 1
        return self._operation

    def upsert(self, rows: list[Json]) -> int:
        """Store points; the operation's number.

        1.18 refuses a batch with a wrong dimension whole; 1.11 stores the points before it and then refuses.
        """
        fault = next((n for n, row in enumerate(rows) if self._wrong_dimension(row["vector"])), None)
        if fault is None:
            return self.update(_upsert(rows))
        if not self._dialect.checks_before_accepting:
            if fault:
                self.update(_upsert(rows[:fault]))
            else:
                self.next_operation()
        raise wrong_input(str(self._wrong_dimension(rows[fault]["vector"])))

    def _wrong_dimension(self, vector: Any) -> str | None:
        named = vector if isinstance(vector, dict) else {"": vector}
        for name, values in named.items():
            expected = collection_config.dimension(self.config, name)
            if expected is None:
                if name not in self.config["params"].get("sparse_vectors", {}):
                    return f"Not existing vector name error: {name}"
            elif not isinstance(values, dict) and len(values) != expected and not _multi(values):
                return f"Vector dimension error: expected dim: {expected}, got {len(values)}"
        return None

    def add_index(self, field: str, schema: Any, body: bytes = b"") -> int:
        """Index a payload field by `schema` (a type's name or its parameters)."""
        operation = edge.UpdateOperation.create_field_index(field, conversion.index_schema(schema, body))
        with self.lock:
            number = self.update(operation)
            self.next_operation()  # the real server logs two operations for an index
            self.schema[field] = schema
            self.save()
        return number

    def drop_index(self, field: str) -> int:
        """Remove the index of a payload field, present or not."""
        with self.lock:
            number = self.update(edge.UpdateOperation.delete_field_index(field))
            self.next_operation()
            self.schema.pop(field, None)
            self.save()
        return number

    def patch(self, request: Json) -> None:
        """Change the configuration as PATCH does."""
        with self.lock:
            self.config = collection_config.patched(self.config, request, self._dialect)
            self.save()

    def points_count(self) -> int:
        """Points held; 0 for a dead collection."""
        return 0 if self._engine is None else int(self._engine.count(edge.CountRequest(exact=True)))

    def info(self) -> Json:
        """The answer of `GET /collections/{name}`.

        Vectors beyond the threshold are reported as indexed, as the real server has them some seconds later; searches
        here are exact.
        """
        engine = self.engine(INFO)
        state = engine.info()
        answer = {
            "status": "green",
            "optimizer_status": "ok",
            "indexed_vectors_count": self._indexed(state.points_count),
            "points_count": state.points_count,
            "segments_count": state.segments_count,
            "config": self.config,
            "payload_schema": self._payload_schema(state.payload_schema),
        }
        return {**answer, "update_queue": {"length": 0}} if self._dialect.modern else answer

    def _indexed(self, count: int) -> int:
        size = collection_config.dimension(self.config) or 0
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
    """Configuration and index schema in a collection's folder or an unpacked snapshot. Raises OSError, ValueError."""
    config = orjson.loads((folder / "config.json").read_bytes())
    config.pop("uuid", None)
    index = folder / "payload_index.json"
    return config, orjson.loads(index.read_bytes())["schema"] if index.exists() else {}


def must_live(collection: Collection, doing: str) -> None:
    """Refusal (500) where the collection is dead or being restored."""
    collection.engine(doing)


def _remove(engine: edge.EdgeShard | None, trash: Path) -> None:
    with contextlib.suppress(
        Exception
    ):  # the engine raises nothing finer; it misses the files that were moved
        if engine is not None:
            engine.close()
    shutil.rmtree(trash, ignore_errors=True)


def _multi(values: Any) -> bool:
    return bool(values) and isinstance(values[0], list)


def _upsert(rows: list[Json]) -> edge.UpdateOperation:
    try:
        return edge.UpdateOperation.upsert_points([conversion.engine_point(row) for row in rows])
    except (TypeError, ValueError, OverflowError) as error:
        raise Refusal(400, f"Format error in JSON body: {error}") from None


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(orjson.dumps(value))
    partial.replace(path)
