"""Collections: state, health, settings; created like another one, deleted."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import Any, Literal

from lib.clients.qdrant.transport import NoAnswer, NotFound, Qdrant, QdrantError, collection_path, tells_full
from lib.errors import AccessRefused, MissingData, UsageProblem

Health = Literal["missing", "live", "restoring", "dead", "failing"]

FLOAT32, FLOAT16, UINT8, TURBO4 = "float32", "float16", "uint8", "turbo4"
DATATYPES = (FLOAT32, FLOAT16, UINT8, TURBO4)  # of dense vectors, up to 1.19

POLL_SECONDS = 0.5
STABLE_POLLS = 3  # green can flicker between two optimisations

# What a collection answers (500) whose shard was cleared by a restore that then failed or was killed; seen on 1.11.3
# and 1.18.3. Not "Failed to load local shard" nor the texts of recovery mode: that data may be whole.
_DEAD = re.compile(
    r"Failed to restore local replica"
    r"|Dirty shard"
    r"|0 of 0 read operations failed"
    r"|does not have enough active replicas"
    r"|has no active replica"
)
_ASLEEP = "awaiting update operation"
_ELSEWHERE = re.compile(r"Tonic|tcp connect error|Unavailable", re.IGNORECASE)  # another node is down


@dataclass(frozen=True)
class CollectionState:
    """What `GET /collections/{name}` and an exact count say. `raw` is the answer as it came.

    `size` and `distance` are those of the unnamed vector, or of the first named one; 0 and "" without any.
    """

    name: str
    size: int
    distance: str
    points: int
    status: str
    optimizer_ok: bool
    vectors_named: bool
    raw: dict[str, Any] = field(repr=False)

    @property
    def datatype(self) -> str:
        """What the unnamed vector's numbers are stored as."""
        return str((self.raw["config"]["params"].get("vectors") or {}).get("datatype") or FLOAT32)

    @property
    def payload_schema(self) -> dict[str, dict[str, Any]]:
        """The payload indexes: field name to `{data_type, params?, points}`."""
        return dict(self.raw.get("payload_schema") or {})

    @property
    def metadata(self) -> dict[str, Any]:
        """The collection's own metadata (Qdrant 1.16 and later), else empty."""
        return dict(self.raw["config"].get("metadata") or {})

    @property
    def optimizer_said(self) -> str:
        """The optimiser's own words: "ok", or its error."""
        return str(self.raw.get("optimizer_status"))

    @property
    def asleep(self) -> bool:
        """Whether optimisations have waited for a change since the server was started.

        1.18.3 calls that grey; 1.11.3 may call it green, with these words as the optimiser's error (seen after a kill).
        """
        return self.status == "grey" or _ASLEEP in self.optimizer_said

    @property
    def settled(self) -> bool:
        """Whether nothing is being optimised or indexed, or waits for it."""
        return self.status == "green" and self.optimizer_ok and not self.asleep


def list_collections(q: Qdrant) -> list[str]:
    """The names of all collections that the key may see; aliases are not among them."""
    return sorted(str(entry["name"]) for entry in q.json("GET", "/collections")["collections"])


def exists(q: Qdrant, name: str) -> bool:
    """Whether a collection (not an alias) of this name is listed, dead ones included."""
    return name in list_collections(q)


def get_state(q: Qdrant, name: str) -> CollectionState:
    """The state now, with an exact count. Raises MissingData (naming what exists), QdrantError."""
    try:
        raw = q.json("GET", collection_path(name))
        points = q.json("POST", collection_path(name, "points", "count"), {"exact": True}, retry=True)[
            "count"
        ]
    except NotFound:
        known = ", ".join(list_collections(q)) or "none"
        raise MissingData(
            f"Qdrant at {q.display} has no collection '{name}' (it has: {known})",
            next_step="check QDRANT_COLLECTION and QDRANT_URL",
        ) from None
    size, distance, named = vector_params(raw["config"]["params"].get("vectors") or {})
    told = raw.get("optimizer_status")
    optimizer_ok = told == "ok" or _ASLEEP in str(told)
    return CollectionState(name, size, distance, int(points), str(raw["status"]), optimizer_ok, named, raw)


def vector_params(vectors: Mapping[str, Any]) -> tuple[int, str, bool]:
    """Size, distance and whether vectors are named, from `params.vectors` of a configuration."""
    named = not isinstance(vectors.get("size"), int)
    first: Mapping[str, Any] = next(iter(vectors.values()), {}) if named else vectors
    return int(first.get("size", 0)), str(first.get("distance", "")), named and bool(vectors)


def health(q: Qdrant, name: str) -> Health:
    """Whether the collection can be worked with.

    "dead": listed, but its shard is gone, as a failed restore leaves it; only a delete helps. "restoring": its shard
    is on the way. "failing": answers 500 for another reason, such as a node that is down; never delete that.
    """
    if not exists(q, name):
        return "missing"
    try:
        q.json("GET", collection_path(name))
        q.json("POST", collection_path(name, "points", "count"), {"exact": True}, retry=True)
    except NotFound:
        return "restoring"
    except QdrantError as error:
        return _ailment(error)
    return "live"


def _ailment(error: QdrantError) -> Health:
    if "Local shard" in error.text and "not found" in error.text:
        return "restoring"
    dead = error.status == 500 and _DEAD.search(error.text) and not _ELSEWHERE.search(error.text)
    return "dead" if dead else "failing"


def is_failed(q: Qdrant, name: str) -> bool:
    """Whether the collection is listed but lost its shard (see `health`)."""
    return health(q, name) == "dead"


def delete_collection(q: Qdrant, name: str) -> bool:
    """Delete it, aliases included; False where there was none (an alias is never followed).

    Its snapshot files stay on the server's disk and cannot be reached any more: delete them first.
    """
    try:
        return bool(q.json("DELETE", collection_path(name)))
    except NoAnswer:
        if exists(q, name):
            raise
        return True


def wait_green(q: Qdrant, name: str, seconds: float) -> CollectionState:
    """Poll until the collection is `settled` over several polls, at most `seconds`; returns the last state seen.

    One that is `asleep`, or whose optimiser stopped over an error, is woken by an empty update, as
    https://qdrant.tech/documentation/concepts/collections/ says: 1.18.3 forgets the error and tries again, 1.11.3
    keeps it until the server is restarted. Raises QdrantError where the disk has no room for what is to be optimised.
    """
    deadline = time.monotonic() + seconds
    stable, tried_again = 0, False
    while True:
        state = get_state(q, name)
        if state.asleep or not (state.optimizer_ok or tried_again):
            tried_again |= not state.optimizer_ok
            q.json("PATCH", collection_path(name), {"optimizers_config": {}}, retry=True)
        elif tells_full(state.optimizer_said):
            raise QdrantError(q.display, 500, state.optimizer_said)
        stable = stable + 1 if state.settled else 0
        if stable >= STABLE_POLLS or time.monotonic() >= deadline:
            return state
        q.sleep(POLL_SECONDS)


def set_metadata(q: Qdrant, name: str, metadata: Mapping[str, Any]) -> bool:
    """Merge into the collection's metadata; False where the server (before 1.16) takes and ignores it."""
    q.json("PATCH", collection_path(name), {"metadata": dict(metadata)}, retry=True)
    stored = q.json("GET", collection_path(name))["config"].get("metadata") or {}
    return all(stored.get(key) == value for key, value in metadata.items())


INDEX_SECONDS = 600.0  # the server answers when the index is built
AUTOMEM_INDEXES = ("tags", "tag_prefixes")

# Where the create call wants what the info tells
# (https://api.qdrant.tech/api-reference/collections/create-collection; seen on 1.11.3 and 1.18.3).
_FROM_PARAMS = (
    "shard_number",
    "sharding_method",
    "replication_factor",
    "write_consistency_factor",
    "on_disk_payload",
    "payload",
)
_FROM_CONFIG = {
    "hnsw_config": "hnsw_config",
    "wal_config": "wal_config",
    "quantization_config": "quantization_config",
    "strict_mode_config": "strict_mode_config",
    "optimizer_config": "optimizers_config",
}
_BY_PATCH = ("read_fan_out_factor", "read_fan_out_delay_ms")
# What `refuse_foreign` looks at itself; every other field is one that the create call here would leave out.
_EXAMINED_PARAMS = ("vectors", "sparse_vectors")
_EXAMINED_CONFIG = ("params", "metadata")


def create_like(
    q: Qdrant,
    name: str,
    raw_info: Mapping[str, Any],
    size: int,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Create `name` with everything that `raw_info` (the `result` of a collection's info) says, but `size`.

    Payload indexes are put back too; aliases are not (they can stand on one collection only). `metadata` is merged
    over the old one's. Raises UsageProblem like `refuse_foreign`, QdrantError where `name` exists.
    """
    q.json("PUT", collection_path(name), create_body(raw_info, size, metadata))
    put_fan_out(q, name, raw_info["config"])
    put_indexes(q, name, raw_info.get("payload_schema") or {})


def put_fan_out(q: Qdrant, name: str, config: Mapping[str, Any]) -> None:
    """Set what the create call does not take, nor a restored snapshot bring (1.11.3, 1.19.0), as `config` has it."""
    params = config["params"]
    fan_out = {key: params[key] for key in _BY_PATCH if params.get(key) is not None}
    if fan_out:
        q.json("PATCH", collection_path(name), {"params": fan_out}, retry=True)


def create_body(
    raw_info: Mapping[str, Any], size: int, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The body of the create call for `create_like`. Raises UsageProblem."""
    config = raw_info["config"]
    params = config["params"]
    refuse_foreign(raw_info)
    body: dict[str, Any] = {"vectors": {**params["vectors"], "size": size}}
    body |= {key: params.get(key) for key in _FROM_PARAMS}
    body |= {target: config.get(source) for source, target in _FROM_CONFIG.items()}
    body["metadata"] = {**(config.get("metadata") or {}), **(metadata or {})} or None
    return {key: value for key, value in body.items() if value is not None}


def same_settings(one: Mapping[str, Any], other: Mapping[str, Any], *, but_size: bool = False) -> bool:
    """Whether two infos of a collection show the same configuration and the same indexes.

    `but_size`: but for what `create_like` sets itself, or not at once: the size, the metadata, the fan-out.
    """
    if but_size:
        bodies = [create_body(raw_info, 1) | {"metadata": None} for raw_info in (one, other)]
        return bodies[0] == bodies[1] and _definitions(one) == _definitions(other)
    return one["config"] == other["config"] and _definitions(one) == _definitions(other)


def _definitions(raw_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    schema = raw_info.get("payload_schema") or {}
    return {
        name: {key: value for key, value in entry.items() if key != "points"}
        for name, entry in schema.items()
    }


def create_default(q: Qdrant, name: str, size: int, metadata: Mapping[str, Any] | None = None) -> None:
    """Create `name` as AutoMem does: one unnamed vector, Cosine, keyword indexes on its tags."""
    body: dict[str, Any] = {"vectors": {"size": size, "distance": "Cosine"}}
    if metadata:
        body["metadata"] = dict(metadata)
    q.json("PUT", collection_path(name), body)
    put_indexes(q, name, {key: {"data_type": "keyword"} for key in AUTOMEM_INDEXES})


def create_small(q: Qdrant, name: str) -> None:
    """Create `name` for nothing but its name, with so small a log that it finds room on a full disk."""
    body = {"vectors": {"size": 1, "distance": "Dot"}, "wal_config": {"wal_capacity_mb": 1}}
    q.json("PUT", collection_path(name), body)


def put_indexes(q: Qdrant, name: str, payload_schema: Mapping[str, Mapping[str, Any]]) -> None:
    """Create the payload indexes of an info's `payload_schema`: by their `params`, else by their `data_type`."""
    for key, entry in payload_schema.items():
        body = {"field_name": key, "field_schema": entry.get("params") or entry["data_type"]}
        path = collection_path(name, "index")
        q.json("PUT", path, body, params={"wait": "true"}, timeout=INDEX_SECONDS, retry=True)


def aliases_of(q: Qdrant, name: str) -> list[str]:
    """The aliases that stand on the collection. Raises NotFound."""
    entries = q.json("GET", collection_path(name, "aliases"))["aliases"]
    return sorted(str(entry["alias_name"]) for entry in entries if entry["collection_name"] == name)


def alias_target(q: Qdrant, name: str) -> str | None:
    """The collection that `name` stands on, where it is an alias."""
    entries = q.json("GET", "/aliases")["aliases"]
    return next((str(one["collection_name"]) for one in entries if one["alias_name"] == name), None)


def refuse_alias(q: Qdrant, name: str) -> None:
    """Raise UsageProblem if `name` is an alias: AutoMem does not find its collection under one, nor does a restore."""
    if exists(q, name):
        return
    try:
        target = alias_target(q, name)
    except AccessRefused:  # a key for one collection alone: it does not see aliases
        return
    if target:
        raise UsageProblem(
            f"'{name}' (QDRANT_COLLECTION) is an alias at {q.display}, of the collection '{target}';"
            " the name of a collection is needed here",
            next_step=f"export QDRANT_COLLECTION={quote(target)}   if that is the collection you mean",
        )


def free_aliases(q: Qdrant, name: str, wanted: Iterable[str]) -> list[str]:
    """Those of the aliases that no other collection has taken meanwhile, and that are no collection's own name."""
    entries = q.json("GET", "/aliases")["aliases"]
    taken = {one["alias_name"] for one in entries if one["collection_name"] != name}
    return sorted(set(wanted) - taken - set(list_collections(q)))


def put_aliases(q: Qdrant, name: str, aliases: Sequence[str]) -> None:
    """Let the aliases stand on the collection, taken from another one where they stood there."""
    actions = [{"create_alias": {"collection_name": name, "alias_name": alias}} for alias in aliases]
    if actions:
        q.json("POST", "/collections/aliases", {"actions": actions}, retry=True)


def refuse_foreign(raw_info: Mapping[str, Any]) -> None:
    """Raise UsageProblem where a collection of these settings cannot be recreated with all that it holds.

    Ask before anything is paid for or deleted. Every field of `config` is either carried over or named here.
    """
    config = raw_info["config"]
    found = [*_foreign_vectors(config["params"]), *_unknown_fields(config)]
    if not found:
        return
    raise UsageProblem(
        "the collection holds what a re-embedding would not carry over:\n"
        + "\n".join(f"  - {one}" for one in found),
        next_step="check QDRANT_COLLECTION. If it is AutoMem's collection: a backup (backup_automem.py) holds all of"
        " this; then move what is listed into another collection, or remove it",
    )


def _foreign_vectors(params: Mapping[str, Any]) -> Iterator[str]:
    vectors = params.get("vectors") or {}
    size, _, named = vector_params(vectors)
    if named:
        yield f"named vectors: {', '.join(map(_name, sorted(vectors)))} (AutoMem keeps one unnamed vector per point)"
    elif not size:
        yield "no unnamed vector (AutoMem keeps one per point)"
    else:
        yield from _foreign_storage(vectors)
    if params.get("sparse_vectors"):
        yield f"sparse vectors: {', '.join(map(_name, sorted(params['sparse_vectors'])))}"
    if params.get("sharding_method") == "custom":
        yield "custom sharding: each point has a shard key"


def _foreign_storage(vector: Mapping[str, Any]) -> Iterator[str]:
    """What of the unnamed vector's settings an embedding of one vector per memory cannot fill."""
    if vector.get("multivector_config"):
        yield "a multivector: several vectors per point under one name"
    datatype = vector.get("datatype")
    if datatype == UINT8:
        yield "vectors of datatype uint8: whole numbers from 0 to 255, so that an embedding would be stored as zeros"
    elif datatype and datatype not in DATATYPES:
        yield f"vectors of datatype {datatype}: it is not known here, what is stored could not be verified"


def _unknown_fields(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings of a newer server that the create call here would leave out."""
    known_params = {*_FROM_PARAMS, *_BY_PATCH, *_EXAMINED_PARAMS}
    known_config = {*_FROM_CONFIG, *_EXAMINED_CONFIG}
    yield from (
        f"the setting config.params.{key}, which is not known here"
        for key, value in config["params"].items()
        if value is not None and key not in known_params
    )
    yield from (
        f"the setting config.{key}, which is not known here"
        for key, value in config.items()
        if value is not None and key not in known_config
    )


def _name(vector: str) -> str:
    return f"'{vector}'"
