"""reembed_embeddings.py beside what a provider could give at most."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from lib.dimensions import EmbeddingSpec
from lib.embedding.client import EmbeddingClient
from lib.embedding.plan_table import TextRow
from lib.embedding.spool import Spool
from lib.embedding.workers import embed_missing
from lib.sandbox.openai_server import OpenAIServer
from tests.bench.figures import Figure, at_least

TEXTS, VECTOR_SIZE, WORKERS, BATCH, LATENCY_SECONDS = 16_000, 3072, 16, 100, 0.3
RUNS = 2
LARGE = "text-embedding-3-large"


def rate(url: str, folder: Path, number: int) -> float:
    """Texts a second from the request to the spool on the disk, 16 workers."""
    spec = EmbeddingSpec(url, LARGE, VECTOR_SIZE)
    texts = [f"memory {number}-{one}: the release of project {one % 997} was moved" for one in range(TEXTS)]
    client = EmbeddingClient(spec, "sk-sandbox")
    with Spool(folder / f"rate-{number}.sqlite3") as spool:
        rows = (TextRow(spool.text_key(spec, text), text, str(one)) for one, text in enumerate(texts))
        began = time.perf_counter()
        outcome = embed_missing(
            client, rows, spool.put_vectors, workers=WORKERS, batch_size=BATCH, progress=None
        )
        seconds = time.perf_counter() - began
    client.close()
    assert outcome.embedded == TEXTS
    return TEXTS / seconds


def embedding(folder: Path) -> Iterator[Figure]:
    """Against workers x batch / latency: what a provider with 300 ms a request and no limits could give at most."""
    with OpenAIServer(latency_seconds=LATENCY_SECONDS) as provider:
        rates = [rate(provider.base_url, folder, number) for number in range(RUNS)]
    ideal = WORKERS * BATCH / LATENCY_SECONDS
    on = f"endpoint stand-in, {VECTOR_SIZE}d, on the same {os.cpu_count()} cores"
    yield at_least("reembed.rate_vs_ideal_16", max(rates), ideal, 0.87, on)


BENCHES = {"reembed.rate_vs_ideal_16": embedding}
