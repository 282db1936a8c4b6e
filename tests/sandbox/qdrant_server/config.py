"""A collection's configuration, as each version accepts and shows it."""

from __future__ import annotations

from typing import Any

from tests.sandbox.qdrant_server.versions import Version, invalid_body, no_variant

DISTANCES = ("Cosine", "Euclid", "Dot", "Manhattan")
LARGEST_VECTOR = 65536
VECTOR_OPTIONS = ("hnsw_config", "quantization_config", "on_disk", "datatype", "multivector_config")
PARAMS = {
    "shard_number": 1,
    "replication_factor": 1,
    "write_consistency_factor": 1,
    "on_disk_payload": True,
}
OPTIONAL_PARAMS = ("sharding_method", "sparse_vectors")
HNSW = {
    "m": 16,
    "ef_construct": 100,
    "full_scan_threshold": 10000,
    "max_indexing_threads": 0,
    "on_disk": False,
}

Json = dict[str, Any]


def created(request: Json, body: bytes, version: Version) -> Json:
    """Build the whole configuration of a new collection.

    Raises Refusal (400, 422) if its vectors are not possible.
    """
    given = {key: request.get(key) or None for key in OPTIONAL_PARAMS}
    given |= {key: request.get(key) for key in PARAMS}
    config = {
        "params": {"vectors": _vectors(request.get("vectors", {}), body), **_overlay(PARAMS, given)},
        "hnsw_config": HNSW,
        "optimizer_config": _optimizers(version),
        "wal_config": _overlay(_wal(version), request.get("wal_config")),
        "quantization_config": None,
    }
    return patched(config, {**request, "params": None}, version)


def patched(config: Json, request: Json, version: Version) -> Json:
    """Apply a PATCH to a configuration. Returns a new one."""
    config = {
        **config,
        "params": _overlay(config["params"], request.get("params")),
        "hnsw_config": _overlay(config["hnsw_config"], request.get("hnsw_config")),
        "optimizer_config": _overlay(config["optimizer_config"], request.get("optimizers_config")),
    }
    if request.get("quantization_config") is not None:
        config["quantization_config"] = request["quantization_config"]
    strict = request.get("strict_mode_config")
    if strict is not None:
        known = strict if version.modern else {"enabled": strict.get("enabled", False)}
        config["strict_mode_config"] = _overlay(config.get("strict_mode_config", {}), known)
    if version.modern and request.get("metadata"):  # metadata of collections came with 1.16
        config["metadata"] = {**config.get("metadata", {}), **request["metadata"]}
    return config


def dimension(config: Json, vector_name: str = "") -> int | None:
    """Read the size of the vectors of that name, "" for the unnamed one; None if there are none."""
    vectors = config["params"]["vectors"]
    params = vectors if "size" in vectors and vector_name == "" else vectors.get(vector_name)
    return params["size"] if isinstance(params, dict) else None


def incompatible(live: Json, snapshot: Json) -> str | None:
    """Explain why a snapshot cannot be restored into a live collection, from both configurations; None if it can."""
    ours, theirs = live["params"], snapshot["params"]
    if _sizes(ours["vectors"]) != _sizes(theirs["vectors"]):
        return f"Collection vectors: {_debug(ours['vectors'])} Snapshot Vectors: {_debug(theirs['vectors'])}"
    if ours["shard_number"] != theirs["shard_number"]:
        return f"Collection shard number: {ours['shard_number']} Snapshot shard number: {theirs['shard_number']}"
    return None


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
    options = {key: params[key] for key in VECTOR_OPTIONS if params.get(key) is not None}
    return {"size": size, "distance": params["distance"], **options}


def _optimizers(version: Version) -> Json:
    config = {
        "deleted_threshold": 0.2,
        "vacuum_min_vector_number": 1000,
        "default_segment_number": 0,
        "max_segment_size": None,
        "memmap_threshold": None,
        "indexing_threshold": 10000 if version.modern else 20000,  # kilobytes of vectors
        "flush_interval_sec": 5,
        "max_optimization_threads": None,
    }
    return {**config, "prevent_unoptimized": None} if version.modern else config


def _wal(version: Version) -> Json:
    config = {"wal_capacity_mb": 32, "wal_segments_ahead": 0}
    return {**config, "wal_retain_closed": 1} if version.modern else config


def _overlay(base: Json, changes: Json | None) -> Json:
    return {**base, **{key: value for key, value in (changes or {}).items() if value is not None}}


def _sizes(vectors: Json) -> Any:
    if "size" in vectors:
        return vectors["size"], vectors["distance"]
    return {name: (params["size"], params["distance"]) for name, params in vectors.items()}


def _debug(vectors: Json) -> str:
    if "size" in vectors:
        return f"Single({_debug_params(vectors)})"
    named = ", ".join(f'"{name}": {_debug_params(params)}' for name, params in vectors.items())
    return f"Multi({{{named}}})"


def _debug_params(params: Json) -> str:
    shown = [f"size: {params['size']}", f"distance: {params['distance']}"]
    for key in VECTOR_OPTIONS:
        value = params.get(key)
        shown.append(f"{key}: " + ("None" if value is None else f"Some({str(value).lower()})"))
    return "VectorParams { " + ", ".join(shown) + " }"
