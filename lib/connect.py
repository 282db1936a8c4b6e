"""Open the stores and clients that a Config names."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from lib.backup.catalog import CACHE_DIR
from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource
from lib.clients.automem import AutoMemApi
from lib.clients.falkordb.connection import GraphAddress, connect, list_graphs, require_graph, save_failure
from lib.clients.falkordb.scratch import MODULE_VARIABLE, SERVER_VARIABLE, Engine, installed_engines
from lib.clients.qdrant.collection import get_state, refuse_alias, require_plain_vectors
from lib.clients.qdrant.transport import Qdrant
from lib.config import Config, require_embedding
from lib.dimensions import OLLAMA, EmbeddingSpec, check_dimension, reason_shown
from lib.errors import MigrationError, ProviderRefused, StoreUnreachable
from lib.files import lock_targets, private_dir

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lib.clients.embeddings.cache import EmbeddingCache
    from lib.clients.embeddings.client import EmbeddingClient
    from lib.console import Console
    from lib.reembed.context import Context
    from lib.reembed.embed import EmbeddingRunner, EmbeddingTotals
    from lib.restore.inputs import Inputs
    from lib.restore.preflight import Site

_ONE_TEXT_SECONDS = 20.0  # so long a provider may refuse or stay silent if only one text is embedded


def open_graph(config: Config, warn: Callable[[str], None] = lambda _text: None) -> GraphSource:
    """Connect to FalkorDB, and list its graphs. `warn` gets a fault that does not prevent reading.

    Raises StoreUnreachable, StoreFailed, AccessRefused.
    """
    login = {"username": config.falkordb_username, "password": config.falkordb_password}
    address = GraphAddress(config.falkordb_host, config.falkordb_port, **login, tls=config.falkordb_tls)
    source = GraphSource(address, connect(address), config.graph)
    list_graphs(source.conn)
    if failure := save_failure(source.conn):
        warn(failure)
    return source


def open_collection(config: Config) -> CollectionSource:
    """Connect to Qdrant, and list its collections.

    Raises StoreUnreachable, StoreFailed, AccessRefused, and UsageProblem if QDRANT_COLLECTION is an alias.
    """
    qdrant = Qdrant(config.qdrant_url, config.qdrant_api_key, config.qdrant_timeout)
    qdrant.version()  # needs no key
    refuse_alias(qdrant, config.collection)
    nodes = [Qdrant(url, config.qdrant_api_key, config.qdrant_timeout) for url in config.qdrant_node_urls]
    return CollectionSource(qdrant, config.collection, config.spec, tuple(nodes))


def engines(config: Config) -> list[Engine]:
    """Return the scratch engines of this machine, oldest first."""
    return installed_engines({SERVER_VARIABLE: config.scratch_server, MODULE_VARIABLE: config.scratch_module})


def open_cache(config: Config) -> EmbeddingCache:
    """Open the embedding cache; creates it if it is missing.

    `vectors.sqlite3` holds every vector that was paid for. The plan and the live points' payloads are in a separate
    file for this graph and this collection, so that two deployments never mix.
    """
    from lib.clients.embeddings.cache import EmbeddingCache

    private_dir(private_dir(config.backup_dir) / CACHE_DIR)
    return EmbeddingCache(_cache_path(config))


def _cache_path(config: Config) -> Path:
    target = sha256("\n".join(config.targets()).encode()).hexdigest()[:8]
    return config.backup_dir / CACHE_DIR / f"{config.collection}-{target}.sqlite3"


def forget_saved(config: Config) -> None:
    """Drop the payloads that migrations saved: they are of points that a restore has replaced."""
    if _cache_path(config).exists():
        with suppress(MigrationError), open_cache(config) as cache:  # the restore itself is done
            cache.clear_saved()


def open_stores(config: Config, console: Console, *, repair: bool) -> tuple[GraphSource, CollectionSource]:
    """Open both stores for a re-embedding. `repair`: the collection must exist at the configured size.

    Raises StoreUnreachable, StoreFailed, AccessRefused, MissingData, UsageProblem, DimensionMismatch.
    """
    graph, source = open_graph(config, console.warn), open_collection(config)
    require_graph(graph.conn, graph.graph)
    if repair:
        now = get_state(source.qdrant, config.collection)
        require_plain_vectors(now)
        check_dimension(config.collection, now.size, config.vector_size)
    return graph, source


def open_reembed(
    config: Config, graph: GraphSource, source: CollectionSource, cache: EmbeddingCache, console: Console
) -> Context:
    """Return the context of a re-embedding; removes what stopped restores of these stores left."""
    from lib.child_process import unmap_large_blocks
    from lib.reembed.context import Context
    from lib.restore.run import clean_up_untouched

    unmap_large_blocks()  # a verification leaves it out: it would spend a fifth of its CPU time on new pages
    folder, targets = config.backup_dir, config.targets()
    clean_up_untouched(graph, source, folder, targets)
    lock, reason = partial(store_lock, config, console.notice), reason_shown(config.settings, config.spec)
    stores = (graph, source.qdrant, config.collection, config.spec, cache, folder, targets, console.progress)
    return Context(*stores, store_lock=lock, reason=reason)


def open_site(config: Config, console: Console, inputs: Inputs, again: str, **choices: bool) -> Site:
    """Open the stores of the files. `choices`: the flags of a Site. StoreUnreachable says how to start the stores."""
    from lib.restore.preflight import Site

    try:
        graph = open_graph(config, console.warn) if inputs.graph else None
        collection = open_collection(config) if inputs.collection else None
    except StoreUnreachable as error:
        start = "start just the stores, in AutoMem's folder:\ndocker compose up -d falkordb qdrant"
        raise StoreUnreachable(str(error), next_step=f"correct the address, or {start}\nthen:\n{again}") from error
    return Site(
        graph=graph,
        collection=collection,
        folder=config.backup_dir,
        targets=config.targets(),
        engines=engines(config) if graph else [],
        api=AutoMemApi(config.api_url, config.api_token),
        bar=console.progress,
        say=console.say,
        notice=console.notice,
        again=again,
        forget_saved=partial(forget_saved, config),
        **choices,
    )


def embed_few(config: Config, texts: list[str]) -> NDArray[np.float32]:
    """Return the provider's vectors (n, size) of a few texts. Raises ProviderRefused, UsageProblem, WrongWidth."""
    import numpy as np

    from lib.clients.embeddings.worker_pool import embed_few as embed

    require_embedding(config)
    with closing(_embedding_client(config, config.spec, max_wait_seconds=_ONE_TEXT_SECONDS)) as client:
        vectors, done = embed(client, texts)
    if done.refused:
        raise ProviderRefused(f"{client.provider} refused a text: {done.refused[0].reason}")
    return np.vstack([vectors[text] for text in texts])


def _embedding_client(config: Config, spec: EmbeddingSpec, **limits: float) -> EmbeddingClient:
    from lib.clients.embeddings.client import EmbeddingClient

    if spec.provider == OLLAMA:
        limits["timeout_seconds"] = config.ollama_timeout
    return EmbeddingClient(spec, config.embedding_key, models_dir=config.models_dir, **limits)


@contextmanager
def open_runner(
    config: Config, paid: EmbeddingTotals, pace: tuple[int, int, float | None], console: Console, *, sample: bool
) -> Iterator[EmbeddingRunner]:
    """`pace`: workers, texts a request, most USD. A `sample` has the model's own size if VECTOR_SIZE is larger."""
    from lib.reembed.embed import EmbeddingRunner, sample_spec

    with closing(_embedding_client(config, sample_spec(config.spec) if sample else config.spec)) as client:
        yield EmbeddingRunner(client, config.spec, *pace, console.say, console.waiting, paid)


@contextmanager
def target_lock(config: Config) -> Iterator[None]:
    """Hold both machine-wide locks on this graph and this collection: no other run works on them."""
    with run_lock(config), store_lock(config):
        yield


def run_lock(config: Config) -> AbstractContextManager[None]:
    """Return the lock of the runs that change a store. A backup can be taken while it is held."""
    return lock_targets(config.targets(), kind="run on ", holder=_holder())


def store_lock(config: Config, wait: Callable[[str], None] | None = None) -> AbstractContextManager[None]:
    """Return the lock that is held while a live store is changed or backed up. `wait`: see lock_targets."""
    return lock_targets(config.targets(), holder=_holder(), wait=wait)


def _holder() -> str:
    started = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"{Path(sys.argv[0]).name}, process {os.getpid()} on {socket.gethostname()}, since {started}"
