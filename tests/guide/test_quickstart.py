"""The newcomer's one command, as a process: it passes, reports what it checked, and leaves nothing."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.guide.documents import ROOT
from tests.matrix import matrix
from tests.sandbox.stack import GUIDE_PORTS, TOKEN

pytestmark = pytest.mark.qdrant
MARK = "AUTOMEM_QUICKSTART_UNDER_TEST"
# Settings that must not reach the sandbox: if it used any of them, the run would fail or touch foreign stores.
PRODUCTION = {
    "FALKORDB_HOST": "production.invalid",
    "FALKORDB_PORT": "1",
    "FALKORDB_USERNAME": "operator",
    "FALKORDB_PASSWORD": "not for the sandbox",
    "FALKORDB_TLS": "true",
    "FALKORDB_GRAPH": "production",
    "QDRANT_URL": "https://production.invalid",
    "QDRANT_HOST": "production.invalid",
    "QDRANT_PORT": "443",
    "QDRANT_NODE_URLS": "https://production.invalid",
    "QDRANT_API_KEY": "not for the sandbox",
    "QDRANT_COLLECTION": "production",
    "QDRANT_TIMEOUT_SECONDS": "soon",
    "VECTOR_SIZE": "abc",
    "EMBEDDING_MODEL": "text-embedding-ada-002",
    "QDRANT_VECTOR_SIZE": "1024",
    "EMBEDDING_PROVIDER": "placeholder",
    "VOYAGE_API_KEY": "not-for-the-sandbox",
    "VOYAGE_MODEL": "voyage-4-large",
    "VOYAGE_BASE_URL": "https://production.invalid/v1",
    "OLLAMA_BASE_URL": "https://production.invalid",
    "OLLAMA_MODEL": "mxbai-embed-large",
    "OLLAMA_TIMEOUT": "soon",
    "AUTOMEM_MODELS_DIR": "/nowhere/models",
    "OPENAI_API_KEY": "not for the sandbox",
    "OPENAI_BASE_URL": "https://production.invalid/v1",
    "AUTOMEM_API_URL": "https://production.invalid",
    "AUTOMEM_API_TOKEN": "not for the sandbox",
    "AUTOMEM_BACKUP_DIR": "/nowhere",
    "AUTOMEM_BACKUP_RECIPIENTS": "/nowhere/keys",
    "AUTOMEM_BACKUP_PASSPHRASE_FILE": "/nowhere/words",
    "AUTOMEM_BACKUP_IDENTITY": "/nowhere/key",
    "AUTOMEM_ENV_FILE": "/nowhere/.env",
}
PORTS = [GUIDE_PORTS.falkordb, GUIDE_PORTS.qdrant, GUIDE_PORTS.automem]


def free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Quickstart:
    """A run with a separate temporary folder (short, for the sockets in it) and a mark that its children inherit."""

    def __init__(self, folder: Path, *words: str, **more: str) -> None:
        self.folder, self.mark = folder, f"{MARK}={folder.name}"
        environ = {**os.environ, "TMPDIR": str(folder), MARK: folder.name, "PYTHONUNBUFFERED": "1", **more}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "quickstart.py"), *words],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def processes(self) -> list[int]:
        """The running processes of this run, including its servers."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                marks = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if self.mark.encode() in marks:
                found.append(int(path.parent.name))
        return found

    def left(self) -> list[int]:
        """The processes that still run after ten seconds: one that was killed takes a moment to end."""
        deadline = time.monotonic() + 10
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def most_processes_seen(self, wanted: int) -> int:
        """Wait at most five minutes until `wanted` processes are running."""
        deadline, most = time.monotonic() + 300, 0
        while most < wanted and time.monotonic() < deadline and self.process.poll() is None:
            most = max(most, len(self.processes()))
            time.sleep(0.2)
        return most

    def assert_gone(self) -> None:
        assert self.left() == []
        assert list(self.folder.iterdir()) == []


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qs-") as name:
        yield Path(name)


@pytest.fixture
def guide_ports() -> Iterator[None]:
    """The guide's ports are shared by the machine: a lock allows one test at a time to use them."""
    with Path(tempfile.gettempdir(), "automem-guide-ports.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@pytest.mark.matrix
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to see what is left running")
def test_it_walks_through_the_guide_and_leaves_nothing(folder, tmp_path):
    """Also if the environment is that of an operator with production stores, whose AutoMem uses another provider."""
    (tmp_path / ".config" / "automem").mkdir(parents=True)
    (tmp_path / ".config" / "automem" / ".env").write_text("EMBEDDING_PROVIDER=voyage\n")
    # `make quickstart` calls the Python of .venv, which is not activated.
    run = Quickstart(folder, "--memories", "220", **PRODUCTION, HOME=str(tmp_path), PATH="/usr/bin:/bin")
    seen = run.most_processes_seen(4)
    out, err = run.process.communicate(timeout=400)
    assert run.process.returncode == 0, f"{err}\n{out[-4000:]}"
    assert seen >= 4, "the servers were never seen, so their absence would show nothing"
    run.assert_gone()
    assert err == ""
    table = out[out.rindex("checked  ") :]
    for what in ("backup", "fail-fast", "rollback, graph", "rollback, collection", "downgrade to 768d"):
        assert re.search(rf"(?m)^{what}", table), what
    assert "215 ids, payloads and vectors as before" in table
    assert re.search(r"the whole guide, 220 memories, in \d+ s", table)
    assert re.search(rf"in a sandbox that stays:  {re.escape(sys.executable)} \S*scripts/quickstart.py serve\n", table)


@pytest.mark.matrix
def test_a_failure_is_reported_and_its_files_are_preserved(folder):
    run = Quickstart(folder, "--memories", "30", FALKORDB_SCRATCH_SERVER="/nowhere/redis-server")
    out, err = run.process.communicate(timeout=300)
    assert run.process.returncode == 4
    assert "FALKORDB_SCRATCH_SERVER" in out
    assert "exit code of scripts/backup_automem.py: 2, expected 0" in err
    (preserved,) = folder.iterdir()
    assert f"kept: {preserved}" in err
    assert (preserved / "openai.log").exists()
    assert run.processes() == []


def test_production_names_every_setting_but_the_engine():
    from lib.config import DEFAULTS

    assert set(PRODUCTION) == set(DEFAULTS) - {"FALKORDB_SCRATCH_SERVER", "FALKORDB_SCRATCH_MODULE"} | {
        "AUTOMEM_ENV_FILE"
    }


def test_serve_refuses_a_taken_port_and_names_it(folder, guide_ports):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if free(GUIDE_PORTS.automem):
            taken.bind(("127.0.0.1", GUIDE_PORTS.automem))
            taken.listen()
        run = Quickstart(folder, "serve")
        _, err = run.process.communicate(timeout=300)
    assert run.process.returncode == 1
    assert "8001 (AutoMem)" in err
    assert "taken" in err
    assert "next:" in err
    assert "Traceback" not in err
    run.assert_gone()


def script(name: str, *words: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)


def check_control(environ: dict[str, str]) -> None:
    """Stop, restart and change what `serve` runs, as the guide's steps need it."""
    large = {**environ, "VECTOR_SIZE": "3072", "EMBEDDING_MODEL": "text-embedding-3-large"}
    assert "AutoMem is stopped" in script("quickstart", "automem", "stop", environ=environ).stdout
    with pytest.raises(requests.ConnectionError):
        requests.get("http://127.0.0.1:8001/health", timeout=10)
    refused = script("quickstart", "automem", "start", environ=large)
    assert refused.returncode == 1
    assert "VECTOR DIMENSION MISMATCH" in refused.stderr
    assert script("quickstart", "automem", "restart", environ=environ).returncode == 0
    assert requests.get("http://127.0.0.1:8001/health", timeout=10).json()["vector_dimensions"]["configured"] == 768
    assert script("quickstart", "provider", "quota", environ=environ).returncode == 0
    assert script("reembed_embeddings", "--dry-run", environ=large).returncode == 6
    assert script("quickstart", "provider", "ok", environ=environ).returncode == 0
    assert script("reembed_embeddings", "--dry-run", environ=large).returncode == 0


@pytest.mark.parametrize("words", [("automem", "halt"), ("provider",), ("serve", "now"), ("automem", "stop")])
def test_a_control_word_that_does_not_exist_or_has_no_sandbox_is_refused(words, tmp_path):
    done = script("quickstart", *words, environ={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == (1 if words == ("automem", "stop") else 2)
    assert done.stderr.startswith("error: ")
    assert "python scripts/quickstart.py" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("end", matrix([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_serve_comes_up_on_the_guides_ports_and_goes_when_asked(folder, guide_ports, end):
    taken = [port for port in PORTS if not free(port)]
    if taken:
        pytest.skip(f"port {taken} is taken on this machine")
    run = Quickstart(folder, "serve", "--memories", "30")
    try:
        output = ""
        while "Ctrl-C" not in output:
            line = run.process.stdout.readline()
            assert line, f"it ended: {run.process.communicate(timeout=300)}"
            output += line
        exports = dict(re.findall(r"export (\w+)=(\S+)", output))
        lines = dict(re.findall(r'echo "(\w+)=(\S+)" >> .env', output))
        assert lines == {"VECTOR_SIZE": "768", "EMBEDDING_MODEL": "text-embedding-3-small"}
        assert exports["AUTOMEM_API_TOKEN"] == TOKEN
        assert requests.get("http://127.0.0.1:8001/health", timeout=10).json()["vector_dimensions"]["collection"] == 768
        environ = {**os.environ, **exports, **lines, "AUTOMEM_BACKUP_DIR": str(folder / "backups")}
        environ["TMPDIR"] = str(folder)
        listed = script("verify_migration", "--after-restart", "--quiet", environ=environ)
        assert listed.returncode == 0, listed.stderr + listed.stdout
        check_control(environ)
    finally:
        run.process.send_signal(end)
        run.process.communicate(timeout=300)
    assert run.process.returncode == 0
    assert all(free(port) for port in PORTS)
    assert [path.name for path in folder.iterdir()] == ["backups"]
    assert run.left() == []
