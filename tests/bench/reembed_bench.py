"""reembed_embeddings.py compared with the maximum of a provider of 300 ms a request, with its limits, and its memory.

The endpoint (tests/bench/cheap_endpoint.py) is a separate process with prepared answers, so that only the client is
measured: from the request to the vector on the disk, checked and fsynced. BENCH_QUICK=1 takes a small part of the data.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lib.clients.embeddings.cache import EmbeddingCache, TextRow
from lib.clients.embeddings.client import EmbeddingClient
from lib.clients.embeddings.worker_pool import EmbedProgress, embed_missing
from lib.clients.falkordb.connection import connect
from lib.dimensions import EmbeddingSpec
from tests.bench.cheap_endpoint import CheapEndpoint
from tests.bench.figures import Figure, at_least, at_most, load
from tests.bench.peak import peak_mb
from tests.bench.stores import running_qdrant
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.sample_loading import load_graph
from tests.sandbox.sample_memories import generate

LARGE, SIZE, BATCH, WORKERS, LATENCY_SECONDS = "text-embedding-3-large", 3072, 100, 16, 0.3
SEQUENTIAL_BATCH, SEQUENTIAL_BATCHES = 32, 20
TOKENS_A_MINUTE = 3_000_000
TEXT = " the release of the project was moved to another day, and nobody has told the others about it so far;" * 2


@dataclass(frozen=True)
class Extent:
    """The amounts: texts per run, runs for the median, seconds at the limit, memories for the peaks."""

    texts: int = 100_000
    runs: int = 5
    limit_seconds: float = 185.0
    memories: tuple[int, ...] = (10_000, 50_000, 150_000)


FULL = Extent()
QUICK = Extent(texts=16_000, runs=1, limit_seconds=15.0, memories=(500, 2_000))


EXTENT = QUICK if os.environ.get("BENCH_QUICK") else FULL


def on_endpoint(what: str) -> str:
    """The endpoint, how much was asked of it, and how busy the machine was."""
    return f"ready-made endpoint, {SIZE}d, {what}, {load()}"


def looked_at(name: str, ours: float, reference: float, on: str) -> Figure:
    """A rate without a goal."""
    return Figure(name, round(ours, 1), round(reference, 1), round(ours / reference, 2), None, None, on)


def rows_of(cache: EmbeddingCache, spec: EmbeddingSpec, count: int, text: str = "") -> Iterator[TextRow]:
    """Distinct texts, generated one after the other, never as a list."""
    for number in range(count):
        one = f"memory {1_000_000 + number}:{text or TEXT[:60]}"
        yield TextRow(cache.text_key(spec, one), one, str(number), 20)


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple[EmbeddingClient, EmbeddingCache]]:
    """A client whose probe is done, and an empty embedding cache."""
    client = EmbeddingClient(EmbeddingSpec(url, LARGE, SIZE), "sk-bench")
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        EmbeddingCache(Path(folder) / "cache.sqlite3") as cache,
    ):
        client.embed(["probe"])
        yield client, cache
        client.close()


def embed_all(
    client: EmbeddingClient, cache: EmbeddingCache, count: int, workers: int, text: str = ""
) -> EmbedProgress:
    """`count` texts from the request to the disk."""
    rows = rows_of(cache, client.spec, count, text)
    outcome = embed_missing(client, rows, cache.put_vectors, workers=workers, batch_size=BATCH)
    assert outcome.embedded == count
    return outcome


def rate(url: str, count: int, workers: int) -> float:
    """Texts a second."""
    with opened(url) as (client, cache):
        return count / embed_all(client, cache, count, workers).seconds


def sequential_rate(url: str) -> float:
    """Texts a second of sequential use of the openai package: one request of 32 after the other, in a list."""
    import openai

    client, vectors = openai.OpenAI(api_key="sk-bench", base_url=url), []
    texts = [f"memory {number}:{TEXT[:60]}" for number in range(SEQUENTIAL_BATCH)]
    client.embeddings.create(model=LARGE, input=texts)
    began = time.perf_counter()
    for _ in range(SEQUENTIAL_BATCHES):
        vectors += [one.embedding for one in client.embeddings.create(model=LARGE, input=texts).data]
    return len(vectors) / (time.perf_counter() - began)


def rates(_folder: Path) -> Iterator[Figure]:
    """Against workers x batch / latency, against one worker, against sequential batches of 32."""
    count = EXTENT.texts
    sixteen, sequential = [], []
    with CheapEndpoint(latency_seconds=LATENCY_SECONDS, size=SIZE) as endpoint:
        for _ in range(EXTENT.runs):
            sixteen.append(rate(endpoint.base_url, count, WORKERS))
            sequential.append(sequential_rate(endpoint.base_url))
        ours, on = median(sixteen), on_endpoint(f"{count:,} texts")
        yield at_least("reembed.rate_vs_ideal_16", ours, ideal(WORKERS), 0.87, on)
        yield at_least("reembed.vs_sequential", ours, median(sequential), 20, on)
        for workers in (8, 32):
            other = rate(endpoint.base_url, count, workers)
            yield looked_at(f"reembed.rate_vs_ideal_{workers}", other, ideal(workers), on)
        one = rate(endpoint.base_url, max(BATCH * 10, count // 50), 1)
        yield looked_at("reembed.rate_vs_one_worker", ours, one, on)


def ideal(workers: int) -> float:
    """Texts a second if only the latency takes time."""
    return workers * BATCH / LATENCY_SECONDS


def limits(_folder: Path) -> Iterator[Figure]:
    """At 3M tokens a minute: accepted tokens over rate x seconds and the first full bucket; refused requests of all."""
    tokens = -(-len(f"memory {1_000_000}:{TEXT}") // 4)
    count = int((TOKENS_A_MINUTE / 60 * EXTENT.limit_seconds + TOKENS_A_MINUTE) / tokens)
    with CheapEndpoint(latency_seconds=LATENCY_SECONDS, size=SIZE, tokens_per_minute=TOKENS_A_MINUTE) as endpoint:
        client = EmbeddingClient(EmbeddingSpec(endpoint.base_url, LARGE, SIZE), "sk-bench")
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as name,
            EmbeddingCache(Path(name) / "s.sqlite3") as cache,
        ):
            seconds = embed_all(client, cache, count, WORKERS, TEXT).seconds
        client.close()
        seen = endpoint.counts()
    given = TOKENS_A_MINUTE / 60 * seconds + TOKENS_A_MINUTE
    on = on_endpoint(f"{TOKENS_A_MINUTE:,} tokens a minute, {seconds:.0f} s")
    share = seen["refused"] / seen["requests"]
    yield at_least("reembed.token_limit_share", seen["tokens"], given, 0.97, on)
    yield Figure("reembed.share_429", seen["refused"], seen["requests"], round(share, 4), 0.01, share < 0.01, on)


# --- memory -----------------------------------------------------------------------------------------------------


def peaks(_folder: Path) -> Iterator[Figure]:
    """Peak memory of the whole command in MB, from the scan of the graph to the verified collection; flat over the data."""
    found = {}
    for count in EXTENT.memories:
        found[count] = peak = _peak_of(count)
        name = f"{count // 1000}k" if count >= 1000 else str(count)
        yield at_most(f"reembed.peak_mb_{name}", peak, 1.0, 250, on_endpoint(f"{count:,} memories"))
    smallest, largest = found[EXTENT.memories[0]], found[EXTENT.memories[-1]]
    yield at_most("reembed.peak_flat", largest, smallest, 1.15, on_endpoint("the largest over the smallest"))


def _peak_of(count: int) -> float:
    """MiB (ru_maxrss) of reembed_embeddings.py for so many memories into a collection that does not exist yet."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        falkordb = FalkorServer(folder / "falkordb", sync_delay_seconds=0)
        falkordb.start()
        stack.callback(falkordb.stop)
        with connect(falkordb.address) as conn:
            load_graph(conn, "memories", generate(count))
        url = stack.enter_context(running_qdrant(folder))
        endpoint = stack.enter_context(CheapEndpoint(latency_seconds=0.05, size=SIZE))
        name = f"bench_{os.getpid()}"
        environ = {
            **{key: os.environ[key] for key in ("PATH", "LANG", "LD_LIBRARY_PATH") if key in os.environ},
            "HOME": str(folder),
            "FALKORDB_PORT": str(falkordb.port),
            "FALKORDB_HOST": "127.0.0.1",
            "QDRANT_URL": url,
            "QDRANT_COLLECTION": name,
            "OPENAI_BASE_URL": endpoint.base_url,
            "OPENAI_API_KEY": "sk-bench",
            "VECTOR_SIZE": str(SIZE),
            "EMBEDDING_MODEL": LARGE,
            "AUTOMEM_BACKUP_DIR": str(folder / "backups"),
        }
        try:
            return peak_mb("reembed_embeddings", "-q", env=environ, folder=folder, codes=(0, 3))
        finally:
            import requests

            requests.delete(f"{url}/collections/{name}", timeout=60)


BENCHES = {
    "reembed.rate_vs_ideal_16": rates,
    "reembed.token_limit_share": limits,
    "reembed.peak_mb_10k": peaks,
}
