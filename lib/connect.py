"""From a Config to opened stores: the one place where settings become clients."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import TYPE_CHECKING

from lib.backup.catalog import CACHE_DIR
from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource
from lib.clients.automem import AutoMemApi
from lib.clients.falkordb.connection import GraphAddress, connect, list_graphs, save_trouble
from lib.clients.falkordb.scratch import MODULE_VARIABLE, SERVER_VARIABLE, Engine, installed_engines
from lib.clients.qdrant.collection import refuse_alias
from lib.clients.qdrant.transport import Qdrant
from lib.config import Config
from lib.files import TargetLock, private_dir

if TYPE_CHECKING:
    from lib.clients.embeddings.cache import EmbeddingCache
    from lib.concurrency import ProgressBar
    from lib.console import Console
    from lib.reembed.embed import EmbeddingRunner
    from lib.reembed.migration import Migration
    from lib.restore.inputs import Inputs
    from lib.restore.preflight import Site


def graph_address(config: Config) -> GraphAddress:
    """Where FalkorDB is, and who asks."""
    return GraphAddress(
        host=config.falkordb_host,
        port=config.falkordb_port,
        username=config.falkordb_username,
        password=config.falkordb_password,
        tls=config.falkordb_tls,
    )


def open_graph(config: Config, warn: Callable[[str], None] = lambda _text: None) -> GraphSource:
    """A FalkorDB that lists its graphs to us; `warn` gets what is wrong with it and hinders no reading.

    Raises StoreUnreachable, StoreFailed, AccessRefused.
    """
    address = graph_address(config)
    source = GraphSource(address, connect(address), config.graph)
    list_graphs(source.conn)
    if trouble := save_trouble(source.conn):
        warn(trouble)
    return source


def open_collection(config: Config) -> CollectionSource:
    """A Qdrant that lists its collections to us.

    Raises StoreUnreachable, StoreFailed, AccessRefused, and UsageProblem if QDRANT_COLLECTION is an alias.
    """
    qdrant = Qdrant(config.qdrant_url, config.qdrant_api_key, config.qdrant_timeout)
    qdrant.version()  # which it tells without a key, too
    refuse_alias(qdrant, config.collection)
    nodes = [Qdrant(url, config.qdrant_api_key, config.qdrant_timeout) for url in config.qdrant_node_urls]
    return CollectionSource(qdrant, config.collection, config.spec, tuple(nodes))


def engines(config: Config) -> list[Engine]:
    """The scratch engines of this machine, oldest first."""
    return installed_engines({SERVER_VARIABLE: config.scratch_server, MODULE_VARIABLE: config.scratch_module})


def automem_api(config: Config) -> AutoMemApi:
    """AutoMem's API as configured; nothing is asked yet."""
    return AutoMemApi(config.api_url, config.api_token)


def open_cache(config: Config) -> EmbeddingCache:
    """The embedding cache, made where it is missing.

    `vectors.sqlite3` holds what was paid for, whatever it was for; the plan and the live points' payloads are in a
    file of this graph and this collection alone, so that two deployments never mix.
    """
    from lib.child_process import return_large_blocks
    from lib.clients.embeddings.cache import EmbeddingCache

    return_large_blocks()  # whoever opens an embedding cache moves vectors about
    folder = private_dir(private_dir(config.backup_dir) / CACHE_DIR)
    target = sha256("\n".join(config.targets()).encode()).hexdigest()[:8]
    return EmbeddingCache(
        folder / f"{config.collection}-{target}.sqlite3", vectors=folder / "vectors.sqlite3"
    )


def open_stores(config: Config, console: Console, *, repair: bool) -> tuple[GraphSource, CollectionSource]:
    """Both stores of a re-embedding. `repair`: the collection must exist at the configured size.

    Raises StoreUnreachable, StoreFailed, AccessRefused, MissingData, DimensionMismatch.
    """
    from lib.backup.run import require_sources
    from lib.clients.qdrant.collection import get_state
    from lib.dimensions import check_dimension

    graph, source = open_graph(config, console.warn), open_collection(config)
    require_sources(graph, source if repair else None)
    if repair:
        now = get_state(source.qdrant, config.collection)
        check_dimension(config.collection, now.size, config.vector_size)
    return graph, source


def open_migration(
    config: Config, graph: GraphSource, source: CollectionSource, cache: EmbeddingCache, bar: ProgressBar
) -> Migration:
    """A re-embedding of these stores, the unfinished one if there is one. Raises GuardRefused."""
    from lib.abort import clean_up_untouched
    from lib.reembed.migration import Migration, Target
    from lib.reembed.resume import open_run

    clean_up_untouched(graph, source, config.backup_dir, config.targets())
    target = Target(source.qdrant, config.collection, config.spec)
    run = Migration(graph, target, cache, config.backup_dir, config.targets(), bar)
    run.journal = open_run(run.folder, run.targets, run.spec)
    return run


def open_site(config: Config, console: Console, inputs: Inputs, again: str, **choices: bool) -> Site:
    """Open the stores that the files are for. `choices` are `safety`, `force_version` and `while_running` of a Site.

    Raises StoreUnreachable with the command that starts just the stores.
    """
    from lib.errors import StoreUnreachable
    from lib.restore.preflight import Site

    try:
        graph = open_graph(config, console.warn) if inputs.rdb else None
        collection = open_collection(config) if inputs.archive else None
    except StoreUnreachable as error:
        step = (
            "start just the stores, in AutoMem's folder, or correct the address:"
            f"  docker compose up -d falkordb qdrant\nthen:  {again}"
        )
        raise StoreUnreachable(str(error), next_step=step) from error
    return Site(
        graph=graph,
        collection=collection,
        folder=config.backup_dir,
        targets=config.targets(),
        engines=engines(config) if graph else [],
        api=automem_api(config),
        bar=console.progress,
        say=console.say,
        notice=console.notice,
        again=again,
        **choices,
    )


def open_runner(
    config: Config,
    workers: int,
    batch_size: int,
    max_cost: float | None,
    console: Console,
    *,
    sample: bool,
) -> EmbeddingRunner:
    """The provider, not asked yet; a `sample` is taken at the model's own size if VECTOR_SIZE is beyond it."""
    from lib.clients.embeddings.client import EmbeddingClient
    from lib.reembed.embed import EmbeddingRunner, sample_spec

    spec = sample_spec(config.spec) if sample else config.spec
    client = EmbeddingClient(spec, config.openai_api_key)
    return EmbeddingRunner(client, config.spec, workers, batch_size, max_cost, console.say, console.waiting)


def target_lock(config: Config) -> TargetLock:
    """The machine-wide lock on this graph and this collection."""
    return TargetLock(config.targets())
