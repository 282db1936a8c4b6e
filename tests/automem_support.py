"""A FalkorDB, a Qdrant and an embeddings endpoint for the tests of the AutoMem stand-in and of the samples."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from lib.clients.falkordb.connection import connect
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.openai_server import OpenAIServer

TOKEN = "a-test-token"
MODEL = "text-embedding-3-small"


@dataclass
class Stores:
    falkordb: FalkorServer
    qdrant_url: str
    openai: OpenAIServer
    collection: str

    def env(self, **more: str) -> dict[str, str]:
        return {
            "FALKORDB_HOST": "127.0.0.1",
            "FALKORDB_PORT": str(self.falkordb.port),
            "QDRANT_URL": self.qdrant_url,
            "QDRANT_COLLECTION": self.collection,
            "VECTOR_SIZE": "768",
            "EMBEDDING_MODEL": MODEL,
            "OPENAI_BASE_URL": self.openai.base_url,
            "OPENAI_API_KEY": "sk-test",
            "AUTOMEM_API_TOKEN": TOKEN,
            **more,
        }

    def collection_url(self) -> str:
        return f"{self.qdrant_url}/collections/{self.collection}"


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[tuple[FalkorServer, str, OpenAIServer]]:
    folder: Path = tmp_path_factory.mktemp("automem")
    falkordb, openai = FalkorServer(folder / "falkordb"), OpenAIServer(log=folder / "openai.log")
    real, stand_in = os.environ.get("QDRANT_TEST_URL", ""), None
    try:
        falkordb.start()
        openai.start()
        if not real:
            from tests.sandbox.qdrant_server.process import QdrantServer

            stand_in = QdrantServer(folder / "qdrant", "1.11.3").start()
        yield falkordb, real or stand_in.url, openai
    finally:
        for server in (stand_in, openai, falkordb):
            if server is not None:
                server.stop()


@pytest.fixture
def stores(servers) -> Iterator[Stores]:
    falkordb, qdrant_url, openai = servers
    found = Stores(falkordb, qdrant_url, openai, f"test_{uuid.uuid4().hex[:12]}")
    conn = connect(falkordb.address)
    conn.delete("memories")
    yield found
    requests.delete(found.collection_url(), timeout=30)
    conn.close()
