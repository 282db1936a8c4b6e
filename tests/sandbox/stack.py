"""All four servers of an AutoMem deployment on this machine, filled with sample memories."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
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
    """Where the servers listen. None: any free port."""

    falkordb: int | None = None
    qdrant: int | None = None
    automem: int | None = None
    openai: int | None = None


GUIDE_PORTS = Ports(falkordb=6379, qdrant=6333, automem=8001)


def require_free(ports: Ports) -> None:
    """Raise MigrationError if something listens on these ports already. It names them."""
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
            f"port {', '.join(taken)} is taken: another process listens there",
            next_step="find the process and stop it:\nss -ltnp\nor run the tour, which uses free ports:\n"
            "python scripts/quickstart.py",
        )


class Stack:
    """The four servers, with their data in one folder. AutoMem is started separately, with a size and a model."""

    def __init__(self, folder: Path, ports: Ports | None = None, qdrant_version: str = "1.18.3") -> None:
        self.folder = folder
        ports = ports or Ports()
        (folder / "falkordb").mkdir(parents=True, exist_ok=True)
        # Without the default delay of 5 s before a replication stream: there are no other replicas to wait for.
        self.falkordb = FalkorServer(folder / "falkordb", ports.falkordb, sync_delay_seconds=0)
        self.qdrant = QdrantServer(folder / "qdrant", qdrant_version, ports.qdrant)
        self.openai = OpenAIServer(ports.openai, log=folder / "openai.log")
        self._automem_port = ports.automem
        self.automem: AutoMemServer | None = None
        self._servers = (self.falkordb, self.qdrant, self.openai)

    def start(self) -> Stack:
        """Start the stores and the embeddings endpoint, in parallel."""
        with ThreadPoolExecutor(len(self._servers)) as pool:
            for started in [pool.submit(server.start) for server in self._servers]:
                started.result()
        return self

    def settings(self, size: int, model: str) -> dict[str, str]:
        """Build the environment of the scripts and of AutoMem.

        It contains every address and login, so that no setting of the operator's environment or `.env` files is used.
        The servers here accept any login.
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
            "OPENAI_BASE_URL": self.openai.openai_url,
            "OPENAI_API_KEY": KEY,
            "AUTOMEM_API_URL": self.automem.url if self.automem else f"http://{_HOST}:1",
            "AUTOMEM_API_TOKEN": TOKEN,
            "EMBEDDING_PROVIDER": "openai",
            "VOYAGE_BASE_URL": self.openai.voyage_url,
            "OLLAMA_TIMEOUT": "30",
            "VECTOR_SIZE": str(size),
            "EMBEDDING_MODEL": model,
        }

    def load(self, count: int, size: int, model: str) -> tuple[int, int]:
        """Load sample memories into both stores. Returns the numbers of nodes and points."""
        memories = list(generate(count))
        with connect(self.falkordb.address) as conn:
            graph = load_graph(conn, GRAPH, memories)
        embed = endpoint_embedder(self.openai.base_url, KEY, model, size)
        return graph.nodes, load_points(self.qdrant.url, "", COLLECTION, size, embed, memories)

    def start_automem(self, size: int, model: str, **more: str) -> AutoMemServer:
        """Start or restart the service with these and `more` settings. Raises ServerStartError if it refuses."""
        self.stop_automem()
        settings = {**self.settings(size, model), **more}
        service = AutoMemServer(self._automem_port, settings, self.folder / "automem.log")
        self._automem_port = service.port
        service.start()
        self.automem = service
        return service

    def stop_automem(self) -> None:
        """Stop the service, but not the stores."""
        if self.automem is not None:
            self.automem.stop()
            self.automem = None

    def stop(self) -> None:
        """Stop everything that was started."""
        self.stop_automem()
        for server in reversed(self._servers):
            server.stop()

    def __enter__(self) -> Stack:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
