"""Collections: state, health and settings; create one like another, delete, aliases."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from shlex import quote
from typing import Any, Literal

from lib.clients.qdrant.points import count
from lib.clients.qdrant.snapshot_format import vector_params
from lib.clients.qdrant.transport import NotFound, Qdrant, QdrantError, collection_path, reports_full_disk, unanswered
from lib.concurrency import CancelToken
from lib.errors import AccessRefused, MigrationError, MissingData, UsageProblem, did_you_mean

Json = Mapping[str, Any]  # an object as the server sends it
Health = Literal["missing", "live", "restoring", "failed", "unavailable"]

FLOAT32, FLOAT16, UINT8, TURBO4 = "float32", "float16", "uint8", "turbo4"
DATATYPES = (FLOAT32, FLOAT16, UINT8, TURBO4)  # of dense vectors, up to 1.19
# Of a collection as AutoMem creates it, for `create_like`: one unnamed vector, Cosine, keyword indexes on its tags.
AUTOMEM_INFO: Json = {
    "config": {"params": {"vectors": {"size": 1, "distance": "Cosine"}}},
    "payload_schema": {name: {"data_type": "keyword"} for name in ("tags", "tag_prefixes")},
}

POLL_SECONDS = 0.25
STABLE_POLLS = 3  # the status can be green for a moment between two optimizations
FAILING_SECONDS = 60.0  # after it was started again, an optimizer that still reports an error has failed
INDEX_SECONDS = 600.0  # the server answers when the index is built

# Errors (500) of a collection whose shard a restore cleared before it failed or was killed; seen on 1.11.3 and
# 1.18.3. "Failed to load local shard" and the errors of recovery mode are not among them: that data may be whole.
_SHARD_LOST = re.compile(
    "Failed to restore local replica|Dirty shard|0 of 0 read operations failed|does not have enough active replicas"
    "|has no active replica"
)
_OTHER_NODE_DOWN = re.compile(r"Tonic|tcp connect error|Unavailable", re.IGNORECASE)
_OPTIMIZER_IDLE = "awaiting update operation"

# Which fields of a collection's info go into the create call, and under which names
# (https://api.qdrant.tech/api-reference/collections/create-collection; seen on 1.11.3 and 1.18.3).
_FROM_PARAMS = ["shard_number", "sharding_method", "replication_factor", "write_consistency_factor"]
_FROM_PARAMS += ["on_disk_payload", "payload"]
_FROM_CONFIG = {one: one for one in ("hnsw_config", "wal_config", "quantization_config", "strict_mode_config")}
_FROM_CONFIG["optimizer_config"] = "optimizers_config"
_BY_PATCH = ("read_fan_out_factor", "read_fan_out_delay_ms")
_KNOWN = {f"params.{key}" for key in (*_FROM_PARAMS, *_BY_PATCH, "vectors", "sparse_vectors")}
_KNOWN |= {*_FROM_CONFIG, "params", "metadata"}


@dataclass(frozen=True)
class CollectionState:
    """The answer of `GET /collections/{name}` (`raw`) and an exact count.

    `size` and `distance` are of the unnamed vector, or of the first named one; 0 and "" if there is none.
    """

    name: str
    size: int  # of the unnamed vector, or of the first named one; 0, and no distance, if there is none
    distance: str
    points: int
    status: str
    optimizer_ok: bool
    raw: dict[str, Any] = field(repr=False)

    @property
    def datatype(self) -> str:
        """The datatype in which the unnamed vector is stored."""
        return str((self.raw["config"]["params"].get("vectors") or {}).get("datatype") or FLOAT32)

    @property
    def optimizer_status(self) -> str:
        """The server's text: "ok", or the optimizer's error."""
        return str(self.raw.get("optimizer_status"))

    @property
    def optimizer_idle(self) -> bool:
        """Whether the optimizer waits for a write since a restart (1.18.3 reports grey, 1.11.3 at times green)."""
        return self.status == "grey" or _OPTIMIZER_IDLE in self.optimizer_status

    @property
    def optimized(self) -> bool:
        """Whether nothing is being optimized or indexed, or waits for it."""
        return self.status == "green" and self.optimizer_ok and not self.optimizer_idle


def list_collections(q: Qdrant) -> list[str]:
    """The names of all collections that the key may see, without aliases."""
    return sorted(str(entry["name"]) for entry in q.json("GET", "/collections")["collections"])


def exists(q: Qdrant, name: str) -> bool:
    """Whether a collection (not an alias) of this name is listed, failed ones included."""
    return name in list_collections(q)


def get_state(q: Qdrant, name: str) -> CollectionState:
    """The state now, with an exact count. Raises MissingData (naming what exists), QdrantError."""
    try:
        raw = q.json("GET", collection_path(name))
        points = count(q, name)
    except NotFound:
        known = list_collections(q)
        raise MissingData(
            f"Qdrant at {q.display} has no collection '{name}'{did_you_mean(name, known)}; it has:"
            f" {', '.join(known) or 'none'}",
            next_step="set QDRANT_COLLECTION to the collection's name, or correct QDRANT_URL\n"
            "if the collection is lost: docs/worst-day.md",
        ) from None
    size, distance, _ = vector_params(raw["config"]["params"].get("vectors") or {})
    optimizer = str(raw.get("optimizer_status"))
    is_ok = optimizer == "ok" or _OPTIMIZER_IDLE in optimizer
    return CollectionState(name, size, distance, points, str(raw["status"]), is_ok, raw)


def health(q: Qdrant, name: str) -> Health:
    """Whether the collection can be used.

    "failed": it is listed, but its shard is lost, as after a failed restore; it can only be deleted. "restoring": its
    shard is not there yet. "unavailable": it answers 500 for another reason, as when a node is down: never delete it.
    """
    if not exists(q, name):
        return "missing"
    try:
        q.json("GET", collection_path(name))
        count(q, name)
    except NotFound:
        return "restoring"
    except QdrantError as error:
        if "Local shard" in error.text and "not found" in error.text:
            return "restoring"
        lost = error.status == 500 and _SHARD_LOST.search(error.text) and not _OTHER_NODE_DOWN.search(error.text)
        return "failed" if lost else "unavailable"
    return "live"


def delete_collection(q: Qdrant, name: str) -> bool:
    """Delete the collection, its aliases and access to its snapshot files. Returns False if it does not exist."""
    try:
        return bool(q.json("DELETE", collection_path(name)))
    except MigrationError as error:
        if not unanswered(error) or exists(q, name):
            raise
        return True


def wait_green(q: Qdrant, name: str, seconds: float, stop: CancelToken | None = None) -> CollectionState:
    """Poll until the collection is `optimized` in several polls, at most `seconds`; return the last state.

    If the optimizer is idle or stopped with an error, an empty update starts it
    (https://qdrant.tech/documentation/concepts/collections/); 1.11.3 keeps an error until it is restarted. An error
    that stays ends the wait after a minute. Raises QdrantError if the server's disk is full, Cancelled if `stop` is
    set.
    """
    deadline = time.monotonic() + seconds
    stable, tried_again = 0, False
    well_until = time.monotonic()
    while True:
        state = get_state(q, name)
        well_until = time.monotonic() if state.optimizer_ok else well_until
        if state.optimizer_idle or not (state.optimizer_ok or tried_again):
            tried_again |= not state.optimizer_ok
            q.json("PATCH", collection_path(name), {"optimizers_config": {}}, retry=True)
        elif reports_full_disk(state.optimizer_status):
            raise QdrantError(q.display, 500, state.optimizer_status)
        stable = stable + 1 if state.optimized else 0
        if stable >= STABLE_POLLS or time.monotonic() >= min(deadline, well_until + FAILING_SECONDS):
            return state
        if stop:
            stop.check()
        q.sleep(POLL_SECONDS)


def set_metadata(q: Qdrant, name: str, metadata: Json) -> None:
    """Merge into the collection's metadata, which servers before 1.16 ignore."""
    q.json("PATCH", collection_path(name), {"metadata": dict(metadata)}, retry=True)


def create_like(
    q: Qdrant, name: str, raw_info: Json, size: int, metadata: Json | None = None, *, indexed: bool = True
) -> None:
    """Create `name` with the settings and payload indexes of `raw_info` (a `CollectionState.raw`), but `size`.

    `metadata` is merged over that of `raw_info`. Not `indexed`: no vector index is built until
    `set_indexing_threshold` sets that of `raw_info`. Raises UsageProblem like `refuse_foreign`, QdrantError if `name`
    exists.
    """
    body = create_body(raw_info, size, metadata)
    if not indexed and indexing_threshold(raw_info):
        body["optimizers_config"] = {**body["optimizers_config"], "indexing_threshold": 0}
    q.json("PUT", collection_path(name), body)
    put_fan_out(q, name, raw_info["config"])
    put_indexes(q, name, raw_info.get("payload_schema") or {})


def put_fan_out(q: Qdrant, name: str, config: Json) -> None:
    """Set what neither the create call nor the restore of a snapshot sets (1.11.3, 1.19.0), as in `config`."""
    params = config["params"]
    fan_out = {key: params[key] for key in _BY_PATCH if params.get(key) is not None}
    if fan_out:
        q.json("PATCH", collection_path(name), {"params": fan_out}, retry=True)


def create_body(raw_info: Json, size: int, metadata: Json | None = None) -> dict[str, Any]:
    """The body of the create call for `create_like`. Raises UsageProblem."""
    refuse_foreign(raw_info)
    config = raw_info["config"]
    params = config["params"]
    body: dict[str, Any] = {key: params.get(key) for key in _FROM_PARAMS}
    body |= {target: config.get(source) for source, target in _FROM_CONFIG.items()}
    body["vectors"] = {**params["vectors"], "size": size}
    body["metadata"] = {**(config.get("metadata") or {}), **(metadata or {})} or None
    return {key: value for key, value in body.items() if value is not None}


def same_settings(one: Json, other: Json, *, but_size: bool = False) -> bool:
    """Whether two infos have the same configuration and indexes. `but_size`: as `create_like` would make them."""
    settings = []
    for raw_info in (one, other):
        config = create_body(raw_info, 1) | {"metadata": None} if but_size else raw_info["config"]
        schema = raw_info.get("payload_schema") or {}
        settings.append((config, {name: {**entry, "points": None} for name, entry in schema.items()}))
    return settings[0] == settings[1]


def indexing_threshold(raw_info: Json) -> int:
    """From which segment size (kB) on the server builds a vector index; 0: never."""
    return int(raw_info["config"]["optimizer_config"].get("indexing_threshold") or 0)


def set_indexing_threshold(q: Qdrant, name: str, threshold: int) -> None:
    """Set `indexing_threshold`."""
    q.json("PATCH", collection_path(name), {"optimizers_config": {"indexing_threshold": threshold}}, retry=True)


def create_small(q: Qdrant, name: str) -> None:
    """Create `name` only so that it exists, with a WAL so small that it fits on a full disk."""
    body = {"vectors": {"size": 1, "distance": "Dot"}, "wal_config": {"wal_capacity_mb": 1}}
    q.json("PUT", collection_path(name), body)


def put_indexes(q: Qdrant, name: str, payload_schema: Mapping[str, Json]) -> None:
    """Create the payload indexes of an info's `payload_schema`: by their `params`, else by their `data_type`."""
    path = collection_path(name, "index")
    for key, entry in payload_schema.items():
        body = {"field_name": key, "field_schema": entry.get("params") or entry["data_type"]}
        q.json("PUT", path, body, params={"wait": "true"}, timeout=INDEX_SECONDS, retry=True)


def _all_aliases(q: Qdrant) -> dict[str, str]:
    """Each alias on the server, with its collection."""
    return {str(one["alias_name"]): str(one["collection_name"]) for one in q.json("GET", "/aliases")["aliases"]}


def aliases_of(q: Qdrant, name: str) -> list[str]:
    """The collection's aliases. Raises NotFound."""
    entries = q.json("GET", collection_path(name, "aliases"))["aliases"]
    return sorted(str(entry["alias_name"]) for entry in entries if entry["collection_name"] == name)


def refuse_alias(q: Qdrant, name: str) -> None:
    """Raise UsageProblem if `name` is an alias: AutoMem does not find its collection by one, nor does a restore."""
    if exists(q, name):
        return
    try:
        target = _all_aliases(q).get(name)
    except AccessRefused:  # a key for one collection only cannot list aliases
        return
    if target:
        raise UsageProblem(
            f"'{name}' (QDRANT_COLLECTION) is an alias at {q.display}, of the collection '{target}';"
            " the name of a collection is needed here",
            next_step=f"if that is the collection you mean:\nexport QDRANT_COLLECTION={quote(target)}",
        )


def restore_aliases(q: Qdrant, name: str, wanted: Iterable[str]) -> list[str]:
    """Make `wanted` the collection's aliases. Left out, and returned, are other collections' aliases and names."""
    taken = {alias for alias, collection in _all_aliases(q).items() if collection != name}
    free = set(wanted) - taken - set(list_collections(q))
    actions = [{"create_alias": {"collection_name": name, "alias_name": alias}} for alias in sorted(free)]
    if actions:
        q.json("POST", "/collections/aliases", {"actions": actions}, retry=True)
    return sorted(set(wanted) - free)


def refuse_foreign(raw_info: Json) -> None:
    """Raise UsageProblem if a collection with these settings cannot be recreated with all that it holds.

    Call it before anything is paid for or deleted. Every field of `config` is either carried over or named here.
    """
    config, params = raw_info["config"], raw_info["config"]["params"]
    vectors = params.get("vectors") or {}
    found = list(_foreign_vectors(vectors))
    datatype = FLOAT32 if vector_params(vectors)[2] else vectors.get("datatype") or FLOAT32
    if datatype == UINT8:
        found.append("vectors of datatype uint8: whole numbers from 0 to 255, an embedding would be stored as zeros")
    elif datatype not in DATATYPES:
        found.append(f"vectors of datatype {datatype}: it is not known here, what is stored could not be verified")
    if params.get("sparse_vectors"):
        found.append(f"sparse vectors: {', '.join(map(repr, sorted(params['sparse_vectors'])))}")
    if params.get("sharding_method") == "custom":
        found.append("custom sharding: each point has a shard key")
    # A newer server has other settings, which the create call would leave out.
    settings = {f"params.{key}": value for key, value in params.items()} | dict(config)
    unknown = [key for key, value in settings.items() if value is not None and key not in _KNOWN]
    found += [f"the setting config.{key}, which is not known here" for key in unknown]
    if found:
        raise UsageProblem(
            "the collection holds what a re-embed would not carry over:\n" + "\n".join(f"  - {one}" for one in found),
            next_step="if it is not AutoMem's collection, correct QDRANT_COLLECTION; else back it up, then move what is"
            " listed into another collection, or remove it:\npython scripts/backup_automem.py",
        )


def require_plain_vectors(state: CollectionState) -> None:
    """Raise UsageProblem unless the collection has one unnamed vector per point. Its size means nothing otherwise."""
    if found := next(_foreign_vectors(state.raw["config"]["params"].get("vectors") or {}), None):
        raise UsageProblem(f"the collection has {found}", next_step="set QDRANT_COLLECTION to AutoMem's collection")


def _foreign_vectors(vectors: Json) -> Iterator[str]:
    size, _, named = vector_params(vectors)
    if named:
        yield f"named vectors: {', '.join(map(repr, sorted(vectors)))} (AutoMem keeps one unnamed vector per point)"
    elif not size:
        yield "no unnamed vector (AutoMem keeps one per point)"
    elif vectors.get("multivector_config"):
        yield "a multivector: several vectors per point under one name"
