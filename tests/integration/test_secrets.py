"""Passwords, keys and tokens: in no output, no file of ours and no process list, whatever is run and however it ends."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lib.clients.falkordb.connection import connect
from tests.operator_support import OLD_SIZE, SMALL, Operator, Servers
from tests.sandbox.automem_server import AutoMemServer
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.sample_loading import load_graph, load_points
from tests.sandbox.sample_memories import generate
from tests.sandbox.vectors import vectors_for
from tests.vectors_support import REAL_SERVER, own_server

pytestmark = pytest.mark.qdrant

PASSWORD, QDRANT_KEY = "p4ssw0rd-of-falkordb-\u00e4", "k3y-of-qdrant"
OPENAI_KEY, TOKEN, LOGIN = "sk-k3y-of-openai", "t0ken-of-automem", "l0gin-of-a-proxy"
SECRETS = (PASSWORD, QDRANT_KEY, OPENAI_KEY, TOKEN, LOGIN)


@pytest.fixture
def guarded(session_servers, tmp_path):
    """An operator whose servers all want a password or a key."""
    version = "real" if REAL_SERVER else "1.18.3"
    falkordb = FalkorServer(tmp_path / "falkordb", password=PASSWORD, sync_delay_seconds=0)
    with own_server(version, tmp_path / "own_qdrant", api_key=QDRANT_KEY) as qdrant:
        falkordb.start()
        try:
            (tmp_path / "operator").mkdir()
            someone = Operator(Servers(falkordb, qdrant.base_url, session_servers.openai), tmp_path / "operator")
            load(someone)
            proxied = qdrant.base_url.replace("//", f"//me:{LOGIN}@")
            someone.export(FALKORDB_PASSWORD=PASSWORD, QDRANT_API_KEY=QDRANT_KEY, QDRANT_URL=proxied)
            someone.export(OPENAI_API_KEY=OPENAI_KEY, AUTOMEM_API_TOKEN=TOKEN)
            yield someone
        finally:
            session_servers.openai.clear_faults()
            falkordb.stop()


def load(operator: Operator) -> None:
    memories = list(generate(220))
    with connect(operator.servers.falkordb.address) as conn:
        load_graph(conn, operator.graph, memories)

    def embed(texts):
        return vectors_for(SMALL, texts, OLD_SIZE)

    load_points(operator.servers.qdrant_url, QDRANT_KEY, operator.collection, OLD_SIZE, embed, memories)


class ProcessList:
    """Reads every process's command line, over and over, as any user of the machine could."""

    def __init__(self) -> None:
        self.revealed: set[str] = set()
        self.rounds = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> ProcessList:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.rounds += 1
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    words = path.read_bytes().decode("utf-8", "replace").replace("\0", " ")
                except OSError:
                    continue
                self.revealed |= {words for secret in SECRETS if secret in words}


def holders(folder: Path) -> list[str]:
    """The files that hold a secret."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found += [f"{path.name}: {secret}" for secret in SECRETS if secret.encode() in data]
    return found


def test_no_command_reveals_a_secret(guarded):
    revealed = ""

    def run(script, *words, expect=0, **env):
        nonlocal revealed
        result = guarded.run(script, *words, expect=expect, env=env)
        revealed += result.out + result.err

    with ProcessList() as processes:
        run("backup_automem", "--show-config")
        run("backup_automem", "-v")
        run("backup_automem", "--list", "--json")
        run("backup_automem", "--check", "all", "-v")
        guarded.export(VECTOR_SIZE=96)
        run("verify_migration", expect=2)
        run("reembed_embeddings", "--dry-run", "-v")
        run("reembed_embeddings", "-v", "--json")
        run("reembed_embeddings", "--only-missing", "-v")
        run("verify_migration", "-v", "--recall", "memory", "--record", expect=None)
        run("restore_from_backup", "latest", "-v")
        for name in ("FALKORDB_PASSWORD", "QDRANT_API_KEY"):
            run("backup_automem", "-v", expect=2, **{name: f"{TOKEN}-wrong"})
        # A login in the URL takes the place of the key in the one header that both travel in.
        proxied = guarded.servers.openai.base_url.replace("//", f"//me:{LOGIN}@")
        run("reembed_embeddings", "-v", "--fresh", expect=6, OPENAI_BASE_URL=proxied)
        guarded.servers.openai.fault(status=401, times=5)
        run("reembed_embeddings", "-v", "--fresh", expect=6)
    assert processes.rounds > 20
    assert processes.revealed == set()
    assert [secret for secret in SECRETS if secret in revealed] == []
    assert len(list(guarded.backups.glob("journal_*.jsonl"))) >= 3
    assert holders(guarded.folder) == []


def test_a_secret_on_a_command_line_or_in_a_file_would_be_noticed(tmp_path):
    """The watchers themselves: a process with a secret among its words, and a file that holds one."""
    import subprocess
    import sys
    import time

    with ProcessList() as processes:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", TOKEN])
        while not processes.revealed and processes.rounds < 500:
            time.sleep(0.02)
        child.kill()
        child.wait()
    assert any(TOKEN in words for words in processes.revealed)
    (tmp_path / "file").write_text(f"x{QDRANT_KEY}y")
    assert holders(tmp_path) == [f"file: {QDRANT_KEY}"]


def test_a_refused_token_of_automem_is_not_shown(guarded):
    with_api = {
        "FALKORDB_HOST": "127.0.0.1",
        "FALKORDB_PORT": str(guarded.servers.falkordb.port),
        "FALKORDB_PASSWORD": PASSWORD,
        "FALKORDB_GRAPH": guarded.graph,
        "QDRANT_URL": guarded.servers.qdrant_url,
        "QDRANT_API_KEY": QDRANT_KEY,
        "QDRANT_COLLECTION": guarded.collection,
        "VECTOR_SIZE": str(OLD_SIZE),
        "EMBEDDING_MODEL": SMALL,
        "OPENAI_BASE_URL": guarded.servers.openai.base_url,
        "OPENAI_API_KEY": OPENAI_KEY,
        "AUTOMEM_API_TOKEN": "another",
    }
    service = AutoMemServer(env=with_api, log=guarded.folder.parent / "automem.log")
    service.start()
    try:
        guarded.export(AUTOMEM_API_URL=service.url.replace("//", f"//me:{LOGIN}@"))
        result = guarded.run("verify_migration", "--recall", "memory", expect=None)
        assert result.code in {2, 4}
        assert [secret for secret in SECRETS if secret in result.out + result.err] == []
    finally:
        service.stop()
