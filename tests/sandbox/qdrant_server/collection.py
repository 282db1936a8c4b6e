"""One collection over Qdrant's engine, and the queries that are asked of it."""

from __future__ import annotations

import contextlib
import shutil
import threading
from pathlib import Path
from typing import Any

import orjson
import qdrant_edge as edge

from tests.sandbox.qdrant_server import points as conversion
from tests.sandbox.qdrant_server import points as filters
from tests.sandbox.qdrant_server import settings as collection_config
from tests.sandbox.qdrant_server.points import payload_selector, record_json, vector_json
from tests.sandbox.qdrant_server.request import Refusal, bad_request, internal, invalid_body, wrong_input
from tests.sandbox.qdrant_server.settings import COUNT, INFO, SCROLL, UPDATE, Dialect, dimension

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


SEARCH = "Search"


def count(collection: Collection, request: Json) -> Json:
    """The number of points that fit the filter, always exact."""
    wanted = edge.CountRequest(exact=True, filter=filters.build(request.get("filter")))
    return {"count": collection.engine(COUNT).count(wanted)}


def retrieve(collection: Collection, request: Json) -> list[Json]:
    """The points of `ids` that exist."""
    ids: list[Any] = [filters.point_id(one) for one in request["ids"]]
    with_payload = payload_selector(request.get("with_payload"), default=True)
    with_vector = _with_vector(request)
    records = collection.engine(SCROLL).retrieve(ids, with_payload=with_payload, with_vector=with_vector)
    return [record_json(one, with_payload=with_payload, with_vector=with_vector) for one in records]


def one_point(collection: Collection, given: str) -> Json:
    """One point with payload and vector; Refusal (404) if it is not there."""
    wanted = filters.point_id(int(given) if given.isdigit() else given)
    found = retrieve(collection, {"ids": [wanted], "with_payload": True, "with_vector": True})
    if not found:
        raise Refusal(404, f"Not found: Point with id {wanted} does not exists!")
    return found[0]


def scroll(collection: Collection, request: Json) -> Json:
    """One page of points, ordered by id or by a payload key."""
    limit = request.get("limit") or 10
    if request.get("limit") == 0:
        raise invalid_body("scroll_request.limit: value 0 invalid, must be 1 or larger")
    offset, order_by = request.get("offset"), _order_by(request.get("order_by"))
    with_payload = payload_selector(request.get("with_payload"), default=True)
    with_vector = _with_vector(request)
    wanted = edge.ScrollRequest(
        offset=None if offset is None else filters.point_id(offset),
        limit=limit,
        filter=filters.build(request.get("filter")),
        with_payload=with_payload,
        with_vector=with_vector,
        order_by=order_by,
    )
    records, following = collection.engine(SCROLL).scroll(wanted)
    rows = [record_json(one, with_payload=with_payload, with_vector=with_vector) for one in records]
    return {"points": rows, "next_page_offset": None if order_by else following}


def query(collection: Collection, request: Json) -> list[Json]:
    """The scored points of one `/points/query` request: by vector, by id, by payload order, or all."""
    asked = request.get("query")
    if isinstance(asked, dict) and "nearest" in asked:
        asked = asked["nearest"]
    if request.get("prefetch"):
        raise bad_request("the stand-in does not play prefetches")
    if asked is None or (isinstance(asked, dict) and "order_by" in asked):
        order = None if asked is None else asked["order_by"]
        page = scroll(
            collection, {**request, "order_by": order, "with_payload": request.get("with_payload", False)}
        )
        return [{"version": 0, "score": 0.0, **row} for row in page["points"]]
    if isinstance(asked, dict):
        raise bad_request("the stand-in plays queries by vector, by id and by order only")
    return _nearest(collection, request, asked)


def search(collection: Collection, request: Json) -> list[Json]:
    """The older search: a vector, or a vector with its name."""
    vector, using = request["vector"], None
    if isinstance(vector, dict):
        vector, using = vector["vector"], vector["name"]
    return _nearest(collection, {**request, "using": using}, vector)


def _nearest(collection: Collection, request: Json, asked: Any) -> list[Json]:
    using = request.get("using")
    condition = filters.build(request.get("filter"))
    if not isinstance(asked, list):
        asked, condition = (
            _stored_vector(collection, asked, using),
            filters.without(request.get("filter"), [asked]),
        )
    _check_dimension(collection, asked, using)
    with_payload = payload_selector(request.get("with_payload"), default=False)
    with_vector = _with_vector(request)
    wanted = edge.QueryRequest(
        query=edge.Query.Nearest(asked, using=using),
        limit=request.get("limit") or 10,
        offset=request.get("offset") or 0,
        filter=condition,
        score_threshold=request.get("score_threshold"),
        with_payload=with_payload,
        with_vector=with_vector,
    )
    found = collection.engine(SEARCH).query(wanted)
    return [record_json(one, with_payload=with_payload, with_vector=with_vector) for one in found]


def _stored_vector(collection: Collection, given: Any, using: str | None) -> list[float]:
    rows = retrieve(collection, {"ids": [given], "with_payload": False, "with_vector": True})
    if not rows:
        raise Refusal(404, f"Not found: No point with id {given} found")
    vector = rows[0]["vector"]
    return list(vector_json(vector[using] if using else vector).tolist())


def _check_dimension(collection: Collection, vector: list[float], using: str | None) -> None:
    expected = dimension(collection.config, using or "")
    if expected is None:
        raise wrong_input(f"Not existing vector name error: {using or ''}")
    if len(vector) != expected:
        raise wrong_input(f"Vector dimension error: expected dim: {expected}, got {len(vector)}")


def _with_vector(request: Json) -> Any:
    return request.get("with_vector", request.get("with_vectors", False)) or False


def _order_by(given: Any) -> edge.OrderBy | None:
    if given is None:
        return None
    order = {"key": given} if isinstance(given, str) else given
    direction = edge.Direction.Desc if order.get("direction") == "desc" else edge.Direction.Asc
    return edge.OrderBy(order["key"], direction=direction, start_from=order.get("start_from"))
