"""An operator at a terminal: runs the scripts, with settings in the environment, and looks at the stores."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.swap import drop_graph, dump_as
from lib.clients.qdrant.transport import Qdrant
from tests.sandbox.automem_server import AutoMemServer
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.openai_server import OpenAIServer
from tests.sandbox.sample_loading import load_graph, load_points
from tests.sandbox.sample_memories import SampleMemory, generate
from tests.sandbox.state import State, state_of
from tests.sandbox.vectors import vectors_for
from tests.script_process import ROOT, Result, ScriptProcess, call_script, is_for_python, start_script

__all__ = ["ROOT", "Operator", "Result", "Servers"]

SMALL, LARGE = "text-embedding-3-small", "text-embedding-3-large"
# The models make any size up to their maximum: small vectors keep the tests fast.
OLD_SIZE, NEW_SIZE = 48, 96
KEY = "sk-sandbox-operator"


@functools.cache
def samples(count: int) -> tuple[SampleMemory, ...]:
    """The sample memories, made once in this process. They are only read."""
    return tuple(generate(count))


@dataclass(frozen=True)
class Servers:
    falkordb: FalkorServer
    qdrant_url: str
    openai: OpenAIServer


@dataclass
class Operator:
    servers: Servers
    folder: Path
    graph: str = field(default_factory=lambda: f"g_{uuid.uuid4().hex[:10]}")
    collection: str = field(default_factory=lambda: f"c_{uuid.uuid4().hex[:10]}")
    exports: dict[str, str] = field(default_factory=dict)

    @property
    def backups(self) -> Path:
        return self.folder / "backups"

    @property
    def qdrant(self) -> Qdrant:
        return Qdrant(self.servers.qdrant_url)

    @property
    def environ(self) -> dict[str, str]:
        """Only the variables of the test's environment that a process needs to start."""
        base = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        return {
            **base,
            "HOME": str(self.folder),
            "FALKORDB_HOST": "127.0.0.1",
            "FALKORDB_PORT": str(self.servers.falkordb.port),
            "FALKORDB_GRAPH": self.graph,
            "QDRANT_URL": self.servers.qdrant_url,
            "QDRANT_COLLECTION": self.collection,
            "OPENAI_BASE_URL": self.servers.openai.base_url,
            "OPENAI_API_KEY": KEY,
            "AUTOMEM_API_URL": "http://127.0.0.1:1",
            "AUTOMEM_BACKUP_DIR": str(self.backups),
            "VECTOR_SIZE": str(OLD_SIZE),
            "EMBEDDING_MODEL": SMALL,
            **self.exports,
        }

    def export(self, **settings: object) -> None:
        """What the operator exports before the next commands."""
        self.exports |= {name: str(value) for name, value in settings.items()}

    def start(self, script: str, *words: str, prelude: str = "", **more: str) -> ScriptProcess | subprocess.Popen[str]:
        """A script as a process that the test may kill; a Python started for it alone if a setting of Python's is given."""
        environ = {**self.environ, **more}
        if not is_for_python(environ):
            return start_script(script, words, self.folder, environ, prelude)
        return subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words],
            cwd=self.folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *words: str, expect: int | None = 0, env: Mapping[str, str] | None = None) -> Result:
        """A script from start to end; its exit code is checked unless `expect` is None.

        It is called in this process, unless that is impossible: in a thread of the test's, or with settings of Python's.
        """
        environ, words = {**self.environ, **(env or {})}, tuple(map(str, words))
        result = None if is_for_python(environ) else call_script(script, words, self.folder, environ)
        if result is None:
            process = self.start(script, *words, **(env or {}))
            out, err = process.communicate(timeout=300)
            assert process.returncode is not None
            result = Result(process.returncode, out, err)
        assert expect is None or result.code == expect, f"exit {result.code}\n{result.err}\n{result.out}"
        assert "Traceback" not in result.err, result.err
        return result

    @contextmanager
    def restarted(self) -> Iterator[None]:
        """Run AutoMem with the operator's settings inside the block."""
        before = dict(self.exports)
        with AutoMemServer(env=self.environ) as automem:
            self.export(AUTOMEM_API_URL=automem.url)
            try:
                yield
            finally:
                self.exports = before

    def load(self, count: int = 220, *, size: int = OLD_SIZE, model: str = SMALL, orphans: int = 0) -> None:
        """Sample memories into both stores, the awkward ones among them (from 200 on)."""
        memories = samples(count)
        with connect(self.servers.falkordb.address) as conn:
            load_graph(conn, self.graph, memories)
        url = self.servers.qdrant_url

        def embed(texts: list[str]) -> Any:
            return vectors_for(model, texts, size)

        load_points(url, "", self.collection, size, embed, memories, orphans=orphans)

    def state(self) -> State:
        return state_of(self.servers.falkordb.address, self.graph, self.qdrant, self.collection)

    def cypher(self, query: str, **params: object) -> list[list[Any]]:
        """A query that may write."""
        from falkordb.graph import Graph

        with connect(self.servers.falkordb.address) as conn:
            return Graph(conn, self.graph).query(query, params or None).result_set

    def call(self, method: str, path: str, body: object = None) -> Any:
        """A request to Qdrant about the operator's collection (`path` begins after its name)."""
        url = f"{self.servers.qdrant_url}/collections/{self.collection}{path}"
        answer = requests.request(method, url, json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()["result"]

    def info(self) -> dict[str, Any]:
        return self.call("GET", "")

    def collections(self) -> list[str]:
        """Every collection whose name begins with the operator's."""
        answer = requests.get(f"{self.servers.qdrant_url}/collections", timeout=60).json()
        names = [one["name"] for one in answer["result"]["collections"]]
        return sorted(name for name in names if name.startswith(self.collection))

    def graphs(self) -> list[str]:
        with connect(self.servers.falkordb.address) as conn:
            names = [name.decode() for name in conn.execute_command("GRAPH.LIST")]
        return sorted(name for name in names if name.startswith(self.graph))

    def copy_graph(self, name: str) -> None:
        """The graph again under another name. GRAPH.COPY would fork the server, and FalkorDB 4.22 once hung in it."""
        with connect(self.servers.falkordb.address) as conn:
            conn.execute_command("RESTORE", name, 0, dump_as(conn, self.graph, name))

    def manifests(self) -> list[Path]:
        return sorted(self.backups.glob("backup_*.json"))

    def archive(self) -> str:
        """The newest collection archive."""
        return str(max((self.backups / "qdrant").glob("*.tar.gz")))

    def rdb(self) -> str:
        """The newest RDB."""
        return str(max((self.backups / "falkordb").glob("*.rdb")))

    def clean_up(self) -> None:
        """Delete the operator's collections and graphs, and the stand-in's fault rules, which the next test may share."""
        requests.delete(f"{self.servers.qdrant_url}/_sandbox/faults", timeout=60)  # 404 from a real server
        for name in self.collections():
            snapshots = f"{self.servers.qdrant_url}/collections/{name}/snapshots"
            for one in requests.get(snapshots, timeout=60).json().get("result") or []:
                requests.delete(f"{snapshots}/{one['name']}", timeout=60)
            requests.delete(f"{self.servers.qdrant_url}/collections/{name}", timeout=60)
        with connect(self.servers.falkordb.address) as conn:
            for name in self.graphs():
                drop_graph(conn, name)
