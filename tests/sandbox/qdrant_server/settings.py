"""A collection's configuration, as each version shows and takes it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from tests.sandbox.qdrant_server.request import invalid_body, no_variant

UPDATE, SNAPSHOT, INFO, COUNT, SCROLL = "Update Points", "Snapshot", "Get Info", "count", "Scroll"


@dataclass(frozen=True)
class Dialect:
    """One version's words and habits."""

    version: str
    name_parameter: str  # what a validation error calls the collection's name in the path
    first_operation: int  # 1.18 begins the log with an operation of its own
    indexing_threshold: int  # kilobytes of vectors
    keeps_metadata: bool  # collection metadata came with 1.16
    checks_before_accepting: bool  # 1.18 refuses a wrong dimension before it is logged, even with wait=false
    filter_enum: str  # the type that a malformed match condition is said not to be
    oversize_prefix: str
    downloads: str  # what a failed download is said to be of
    plain_upload_refusal: bool  # 1.18 answers a forbidden upload in plain text
    sparse_snapshots: (
        bool  # 1.18 writes the log as GNU sparse entries, config.json late; 1.11 plain, config.json early
    )
    refuses_to_start_damaged: bool  # 1.11 does not start with a shard that it cannot load
    closes_refused_bodies: (
        bool  # 1.18 closes the connection behind a refusal, 1.11 keeps it and stops reading
    )

    @property
    def modern(self) -> bool:
        """Whether the words of 1.18 are used."""
        return not self.refuses_to_start_damaged

    def dead(self, doing: str, peer: int, scratch: str = "") -> str:
        """The error of a collection whose shard was lost in a failed restore (status 500)."""
        if self.modern:
            if doing == SNAPSHOT:
                return "Failed to get_snapshot_creator,  Failed to restore local replica"
            cause = f"Failed to {doing},  Failed to restore local replica"
            return cause if doing == UPDATE else _failed_read(cause)
        if doing == SNAPSHOT:
            lost = "Service internal error: Failed to restore local replica"
            return f"failed to create snapshot {scratch}/0: {lost}"
        if doing == INFO:
            return "0 of 0 read operations failed"
        replica_set = f"The replica set for shard 0 on peer {peer}"
        if doing == UPDATE:
            return f"{replica_set} has no active replica"
        return f"{replica_set} does not have enough active replicas"

    def shard_absent(self) -> str:
        """The error while a restore has taken the old shard away and not yet brought the new one (status 500)."""
        return _failed_read("Local shard 0 not found")

    def not_an_archive(self) -> str:
        """The error for an upload that is no tar (status 500)."""
        if self.modern:
            return "File IO error: Malformed tar archive, reached unknown entry"
        return "Failed to open snapshot archive, malformed format"

    def segment_not_an_archive(self, path: str) -> str:
        """The error for a segment inside the snapshot that is no tar (status 500)."""
        if not self.modern:
            return self.not_an_archive()
        cause = "Service runtime error: IO Error: Malformed tar archive, reached unknown entry"
        return f'Failed to restore snapshot from "{path}": {cause}'

    def file_absent(self, path: str) -> str:
        """The error for a file that the snapshot lacks (status 500)."""
        where = f"failed to open file `{path}`: " if self.modern else ""
        return f"File IO error: {where}No such file or directory (os error 2)"

    def relative_location(self, location: str, column: int) -> str:
        """The error for a `location` that is no URL (status 400)."""
        said = (
            f'relative URL without a base: "{location}"'
            if self.modern
            else f'invalid value: string "{location}", expected relative URL without a base'
        )
        return f"Format error in JSON body: {said} at line 1 column {column}"


def _failed_read(cause: str) -> str:
    return f"1 of 1 read operations failed:\n  Service internal error: {cause}"


DIALECTS = {
    "1.11.3": Dialect(
        version="1.11.3",
        name_parameter="name",
        first_operation=0,
        indexing_threshold=20000,
        keeps_metadata=False,
        checks_before_accepting=False,
        filter_enum="Condition",
        oversize_prefix="Payload error: ",
        downloads="snapshot",
        plain_upload_refusal=False,
        sparse_snapshots=False,
        refuses_to_start_damaged=True,
        closes_refused_bodies=False,
    ),
    "1.18.3": Dialect(
        version="1.18.3",
        name_parameter="collection_name",
        first_operation=1,
        indexing_threshold=10000,
        keeps_metadata=True,
        checks_before_accepting=True,
        filter_enum="MatchInterface",
        oversize_prefix="",
        downloads="tar",
        plain_upload_refusal=True,
        sparse_snapshots=True,
        refuses_to_start_damaged=False,
        closes_refused_bodies=True,
    ),
}


DISTANCES = ("Cosine", "Euclid", "Dot", "Manhattan")
LARGEST_VECTOR = 65536
VECTOR_KEYS = (
    "size",
    "distance",
    "hnsw_config",
    "quantization_config",
    "on_disk",
    "datatype",
    "multivector_config",
)
HNSW = {
    "m": 16,
    "ef_construct": 100,
    "full_scan_threshold": 10000,
    "max_indexing_threads": 0,
    "on_disk": False,
}

Json = dict[str, Any]


def created(request: Json, body: bytes, dialect: Dialect) -> Json:
    """The whole configuration of a collection created by `request`.

    Raises Refusal (400, 422) where the vectors cannot be.
    """
    config: Json = {
        "params": _params(request, _vectors(request.get("vectors", {}), body)),
        "hnsw_config": _overlay(HNSW, request.get("hnsw_config")),
        "optimizer_config": _overlay(_optimizers(dialect), request.get("optimizers_config")),
        "wal_config": _overlay(_wal(dialect), request.get("wal_config")),
        "quantization_config": request.get("quantization_config"),
    }
    _set_strict_mode(config, request, dialect)
    if dialect.keeps_metadata and request.get("metadata"):
        config["metadata"] = request["metadata"]
    return config


def patched(config: Json, request: Json, dialect: Dialect) -> Json:
    """`config` as a PATCH with `request` leaves it."""
    config = copy.deepcopy(config)
    config["params"].update(_given(request.get("params")))
    config["hnsw_config"] = _overlay(config["hnsw_config"], request.get("hnsw_config"))
    config["optimizer_config"] = _overlay(config["optimizer_config"], request.get("optimizers_config"))
    if request.get("quantization_config") is not None:
        config["quantization_config"] = request["quantization_config"]
    _set_strict_mode(config, request, dialect)
    if dialect.keeps_metadata and request.get("metadata"):
        config["metadata"] = {**config.get("metadata", {}), **request["metadata"]}
    return config


def dimension(config: Json, vector_name: str = "") -> int | None:
    """The size of the vectors called `vector_name` ("" for the unnamed ones), None if there are none."""
    vectors = config["params"]["vectors"]
    params = vectors if "size" in vectors and vector_name == "" else vectors.get(vector_name)
    return params["size"] if isinstance(params, dict) else None


def incompatible(live: Json, snapshot: Json) -> str | None:
    """Why a snapshot of configuration `snapshot` cannot go onto a collection of configuration `live`."""
    ours, theirs = live["params"], snapshot["params"]
    if _shape(ours["vectors"]) != _shape(theirs["vectors"]):
        return f"Collection vectors: {_debug(ours['vectors'])} Snapshot Vectors: {_debug(theirs['vectors'])}"
    if ours["shard_number"] != theirs["shard_number"]:
        numbers = (ours["shard_number"], theirs["shard_number"])
        return "Collection shard number: {} Snapshot shard number: {}".format(*numbers)
    return None


def _params(request: Json, vectors: Json) -> Json:
    params: Json = {"vectors": vectors, "shard_number": request.get("shard_number") or 1}
    if request.get("sharding_method"):
        params["sharding_method"] = request["sharding_method"]
    params["replication_factor"] = request.get("replication_factor") or 1
    params["write_consistency_factor"] = request.get("write_consistency_factor") or 1
    on_disk = request.get("on_disk_payload")
    params["on_disk_payload"] = True if on_disk is None else on_disk
    if request.get("sparse_vectors"):
        params["sparse_vectors"] = request["sparse_vectors"]
    return params


def _vectors(vectors: Any, body: bytes) -> Json:
    if not isinstance(vectors, dict):
        raise no_variant("VectorsConfig", body)
    if "size" in vectors and not isinstance(vectors["size"], dict):
        return _vector(vectors, body, "vectors")
    return {name: _vector(params, body, f"vectors.{name}") for name, params in vectors.items()}


def _vector(params: Any, body: bytes, path: str) -> Json:
    size = params.get("size") if isinstance(params, dict) else None
    if not isinstance(size, int) or size < 1 or params.get("distance") not in DISTANCES:
        raise no_variant("VectorsConfig", body)
    if size > LARGEST_VECTOR:
        raise invalid_body(f"{path}.size: value {size} invalid, must be from 1 to {LARGEST_VECTOR}")
    return {key: params[key] for key in VECTOR_KEYS if params.get(key) is not None}


def _optimizers(dialect: Dialect) -> Json:
    config = {
        "deleted_threshold": 0.2,
        "vacuum_min_vector_number": 1000,
        "default_segment_number": 0,
        "max_segment_size": None,
        "memmap_threshold": None,
        "indexing_threshold": dialect.indexing_threshold,
        "flush_interval_sec": 5,
        "max_optimization_threads": None,
    }
    return {**config, "prevent_unoptimized": None} if dialect.modern else config


def _wal(dialect: Dialect) -> Json:
    config = {"wal_capacity_mb": 32, "wal_segments_ahead": 0}
    return {**config, "wal_retain_closed": 1} if dialect.modern else config


def _set_strict_mode(config: Json, request: Json, dialect: Dialect) -> None:
    strict = request.get("strict_mode_config")
    if strict is None:
        return
    known = _given(strict) if dialect.modern else {"enabled": strict.get("enabled", False)}
    config["strict_mode_config"] = {**config.get("strict_mode_config", {}), **known}


def _overlay(base: Json, changes: Json | None) -> Json:
    return {**base, **_given(changes)}


def _given(changes: Json | None) -> Json:
    return {key: value for key, value in (changes or {}).items() if value is not None}


def _shape(vectors: Json) -> Any:
    if "size" in vectors:
        return (vectors["size"], vectors["distance"])
    return {name: (params["size"], params["distance"]) for name, params in vectors.items()}


def _debug(vectors: Json) -> str:
    if "size" in vectors:
        return f"Single({_debug_params(vectors)})"
    return (
        "Multi({" + ", ".join(f'"{name}": {_debug_params(params)}' for name, params in vectors.items()) + "})"
    )


def _debug_params(params: Json) -> str:
    shown = [f"{key}: {params[key]}" for key in ("size", "distance")]
    for key in VECTOR_KEYS[2:]:
        value = params.get(key)
        shown.append(f"{key}: " + ("None" if value is None else f"Some({str(value).lower()})"))
    return "VectorParams { " + ", ".join(shown) + " }"
