"""How long the live collection is absent while the dimension changes, compared with a bare upload of as many points.

The old collection has 768d, the new one 3072d. BENCH_QUICK=1 takes a small part of the data.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import orjson
import requests

from lib.files import private_dir
from tests.bench.cheap_endpoint import CheapEndpoint
from tests.bench.figures import PAIRS, Figure, at_most, seconds_of
from tests.bench.stores import collection_source, graph_source, on_qdrant, run_script
from tests.sandbox.sample_loading import create_collection
from tests.sandbox.sample_memories import generate

OLD_SIZE, SIZE, MODEL = 768, 3072, "text-embedding-3-large"
CONNECTIONS, BATCH = 4, 256
QUICK = bool(os.environ.get("BENCH_QUICK"))
MEMORIES, RUNS = (1_000, 1) if QUICK else (10_000, PAIRS)
CUTOVERS = {
    "reembed.absent_vs_upload": ((), {"1.11": 0.7, "1.18": 0.3}),
    "reembed.absent_vs_upload_in_place": (("--in-place",), {"1.11": 1.2, "1.18": 1.2}),
}


def absent(folder: Path) -> Iterator[Figure]:
    """Seconds that the script reports (`--json`), against an orjson upload of as many points over 4 connections."""
    with graph_source(folder, MEMORIES) as graph, CheapEndpoint(latency_seconds=0.05, size=SIZE) as endpoint:
        for name, (words, goals) in CUTOVERS.items():
            ours, reference = [], []
            for number in range(RUNS):
                own = private_dir(folder / f"{name} {number}")
                with collection_source(own, MEMORIES, OLD_SIZE) as points:
                    environ = {
                        **{key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ},
                        "HOME": str(own),
                        "FALKORDB_HOST": graph.address.host,
                        "FALKORDB_PORT": str(graph.address.port),
                        "FALKORDB_GRAPH": graph.graph,
                        "QDRANT_URL": points.qdrant.base_url,
                        "QDRANT_COLLECTION": points.collection,
                        "OPENAI_BASE_URL": endpoint.base_url,
                        "OPENAI_API_KEY": "sk-bench",
                        "VECTOR_SIZE": str(SIZE),
                        "EMBEDDING_MODEL": MODEL,
                        "AUTOMEM_BACKUP_DIR": str(own / "backups"),
                    }
                    ours.append(_absent_seconds(words, environ, own))
                    reference.append(seconds_of_upload(points.qdrant.base_url))
                    version, on = points.qdrant.version(), on_qdrant(points.qdrant, MEMORIES, SIZE)
            goal = next((value for start, value in goals.items() if version.startswith(start)), None)
            yield at_most(name, median(ours), median(reference), goal, on)


def _absent_seconds(words: tuple[str, ...], environ: dict[str, str], folder: Path) -> float:
    run_script("backup_automem", "-q", environ=environ, folder=folder)
    output = run_script("reembed_embeddings", "-q", "--json", *words, environ=environ, folder=folder)
    return float(json.loads(output)["absent_seconds"])


def seconds_of_upload(url: str) -> float:
    """The reference: a new collection, filled over 4 connections by 256 points, each batch waited for."""
    vectors = np.random.default_rng(2).standard_normal((MEMORIES, SIZE)).astype(np.float32)
    memories = [one for one in generate(MEMORIES) if one.point_id is not None]
    starts = range(0, len(memories), BATCH)
    base = f"{url}/collections/bench_upload_{os.getpid()}"

    def send(start: int) -> None:
        points = [
            {"id": one.point_id, "vector": vector, "payload": one.payload}
            for one, vector in zip(memories[start : start + BATCH], vectors[start : start + BATCH], strict=False)
        ]
        body = orjson.dumps({"points": points}, option=orjson.OPT_SERIALIZE_NUMPY)
        headers = {"Content-Type": "application/json"}
        requests.put(f"{base}/points?wait=true", data=body, headers=headers, timeout=600).raise_for_status()

    def upload() -> None:
        with requests.Session() as session:
            session.headers["Content-Type"] = "application/json"
            create_collection(session, base, SIZE)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(itertools.chain(pool.map(send, starts)))

    try:
        return seconds_of(upload)
    finally:
        with contextlib.suppress(requests.RequestException):
            requests.delete(base, timeout=60)


BENCHES = {"reembed.absent_vs_upload": absent}
