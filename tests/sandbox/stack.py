"""All four servers of an AutoMem deployment on this machine: a rehearsal stage, filled with sample memories."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lib.clients.falkordb.connection import connect
from lib.errors import MigrationError
from tests.sandbox.automem_server import AutoMemServer
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.openai_server import OpenAIServer
from tests.sandbox.qdrant_server.process import QdrantServer
from tests.sandbox.sample_loading import endpoint_embedder, load_graph, load_points
from tests.sandbox.sample_memories import generate

KEY = "sk-sandbox"
TOKEN = "sandbox-token"
GRAPH = COLLECTION = "memories"
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Ports:
    """Where the servers listen; None: any free port."""

    falkordb: int | None = None
    qdrant: int | None = None
    automem: int | None = None
    openai: int | None = None


GUIDE_PORTS = Ports(falkordb=6379, qdrant=6333, automem=8001)


def require_free(ports: Ports) -> None:
    """Raise MigrationError naming the ports that something listens on already."""
    taken = []
    for name, port in (("FalkorDB", ports.falkordb), ("Qdrant", ports.qdrant), ("AutoMem", ports.automem)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port or 0))
            except OSError:
                taken.append(f"{port} ({name})")
    if taken:
        raise MigrationError(
            f"port {', '.join(taken)} is taken: something listens there already",
            next_step="see what it is (ss -ltnp) and stop it, or run the tour, which takes free ports:"
            " python scripts/quickstart.py",
        )


class Stack:
    """The four servers below one folder. AutoMem is started by itself, with the size and model that are asked for."""

    def __init__(self, folder: Path, ports: Ports | None = None, qdrant_version: str = "1.18.3") -> None:
        self.folder = folder
        ports = ports or Ports()
        (folder / "falkordb").mkdir(parents=True, exist_ok=True)
        # Without the default pause of 5 s before a replication stream, which is there to gather replicas.
        self.falkordb = FalkorServer(folder / "falkordb", ports.falkordb, sync_delay_seconds=0)
        self.qdrant = QdrantServer(folder / "qdrant", qdrant_version, ports.qdrant)
        self.openai = OpenAIServer(ports.openai, log=folder / "openai.log")
        self._automem_port = ports.automem
        self.automem: AutoMemServer | None = None
        self._running = ExitStack()

    def start(self) -> Stack:
        """Start the stores and the embeddings endpoint, side by side."""
        servers = (self.falkordb, self.qdrant, self.openai)
        starts: list[Callable[[], object]] = [server.start for server in servers]
        for server in servers:
            self._running.callback(server.stop)
        with ThreadPoolExecutor(len(starts)) as pool:
            for done in [pool.submit(start) for start in starts]:
                done.result()
        return self

    def settings(self, size: int, model: str) -> dict[str, str]:
        """What the scripts and AutoMem are given in their environment.

        Every setting that leads somewhere is named, so that none of the operator's own, in his environment or in a
        `.env`, reaches a sandbox; the servers here take any login.
        """
        return {
            "FALKORDB_HOST": _HOST,
            "FALKORDB_PORT": str(self.falkordb.port),
            "FALKORDB_USERNAME": "default",
            "FALKORDB_PASSWORD": KEY,
            "FALKORDB_TLS": "false",
            "FALKORDB_GRAPH": GRAPH,
            "QDRANT_URL": self.qdrant.url,
            "QDRANT_NODE_URLS": self.qdrant.url,
            "QDRANT_API_KEY": KEY,
            "QDRANT_COLLECTION": COLLECTION,
            "QDRANT_TIMEOUT_SECONDS": "60",
            "OPENAI_BASE_URL": self.openai.base_url,
            "OPENAI_API_KEY": KEY,
            "AUTOMEM_API_URL": self.automem.url if self.automem else f"http://{_HOST}:1",
            "AUTOMEM_API_TOKEN": TOKEN,
            "VECTOR_SIZE": str(size),
            "EMBEDDING_MODEL": model,
        }

    def load(self, count: int, size: int, model: str) -> tuple[int, int]:
        """Fill both stores with sample memories; nodes and points."""
        memories = list(generate(count))
        with connect(self.falkordb.address) as conn:
            graph = load_graph(conn, GRAPH, memories)
        embed = endpoint_embedder(self.openai.base_url, KEY, model, size)
        return graph.nodes, load_points(self.qdrant.url, "", COLLECTION, size, embed, memories)

    def start_automem(self, size: int, model: str) -> AutoMemServer:
        """Start (or start again) the service with these settings. Raises ServerStartError where it refuses."""
        self.stop_automem()
        service = AutoMemServer(self._automem_port, self.settings(size, model), self.folder / "automem.log")
        self._automem_port = service.port
        service.start()
        self.automem = service
        return service

    def stop_automem(self) -> None:
        """Stop the service, not the stores."""
        if self.automem is not None:
            self.automem.stop()
            self.automem = None

    def stop(self) -> None:
        """Stop everything that was started."""
        self.stop_automem()
        self._running.close()

    def __enter__(self) -> Stack:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
