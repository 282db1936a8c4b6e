"""Servers that are not ours: they send a client elsewhere, without end, or a byte at a time."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lib import automem_api, http_policy
from lib.automem_api import AutoMemApi, ask_health, recall
from lib.embedding import client, provider
from lib.errors import StoreFailed, StoreUnreachable
from lib.vectors import transport
from lib.vectors.transport import Qdrant


class Server(ThreadingHTTPServer):
    """A client that hangs up is no error of the test's: its traceback would stand among the command's own words."""

    def handle_error(self, *_: object) -> None:
        pass


Answer = Callable[[BaseHTTPRequestHandler], None]
BOMB = gzip.compress(bytes(64 << 20))


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[tuple[str, dict[str, str], bytes]]]]:
    """A server with this answer to every request: its URL, and what it was asked (path, headers, body)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append((self.path, {**dict(self.headers), "peer": str(self.client_address[1])}, body))
            answer(self)

        do_GET = do_POST = do_PUT = _any  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def replying(status: int, headers: dict[str, str], body: bytes = b"") -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def dripping(request: BaseHTTPRequestHandler) -> None:
    """A byte at a time, each sooner than any time-out, for a minute."""
    request.send_response(200)
    request.send_header("Content-Length", "100000")
    request.end_headers()
    with_end = time.monotonic() + 60
    try:
        while time.monotonic() < with_end:
            request.wfile.write(b" ")
            request.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


BOMBING = replying(200, {"Content-Encoding": "gzip", "Content-Type": "application/json"}, BOMB)


@pytest.fixture
def impatient(monkeypatch):
    """Bounds that a test can reach; every server counts as another machine's."""
    monkeypatch.setattr(transport, "LARGEST_ANSWER", 8 << 20)
    monkeypatch.setattr(transport, "LONGEST_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(automem_api, "_LARGEST_ANSWER", 8 << 20)
    monkeypatch.setattr(automem_api, "_LONGEST_SECONDS", 1.0)
    monkeypatch.setattr(provider, "_HEAD_BYTES", 1 << 20)
    monkeypatch.setattr(provider, "_TIMES", 0.02)
    monkeypatch.setattr(client, "FIRST_CONTACT_SECONDS", 2.0)
    for module in (http_policy, transport, automem_api, provider):
        monkeypatch.setattr(module, "is_this_machine", lambda _url: False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.mark.parametrize(
    ("answer", "says"), [(BOMBING, "larger than 8 MiB"), (dripping, "was not whole after 1 s")]
)
def test_an_answer_without_end_is_not_read_to_its_end(impatient, answer, says):
    began = time.monotonic()
    with serving(answer) as (url, _):
        with pytest.raises(StoreFailed, match=says):
            Qdrant(url, timeout_seconds=1.0).version()
        assert ask_health(AutoMemApi(url)).presence == "silent"
        with pytest.raises(StoreUnreachable):
            recall(AutoMemApi(url, timeout_seconds=1.0), "x", 1)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("answer", [BOMBING, pytest.param(dripping, marks=pytest.mark.matrix)])
def test_a_provider_without_end_ends_the_run(operator, impatient, answer):
    """As one that does not answer: tried again, then given up; nothing is written."""
    operator.load(5)
    operator.run("backup_automem")
    before = operator.state()
    with serving(answer) as (url, asked):
        operator.export(OPENAI_BASE_URL=f"{url}/v1", VECTOR_SIZE=96)
        result = operator.run("reembed_embeddings", "--dry-run", expect=6)
    assert asked
    assert "larger than" in result.err or "was not whole" in result.err
    assert operator.state() == before


def test_texts_and_keys_go_nowhere_else(operator, impatient):
    """A redirect is an error for each client; where it points nothing arrives."""
    operator.load(5)
    operator.run("backup_automem")
    with (
        serving(replying(200, {}, b"{}")) as (thief, stolen),
        serving(replying(307, {"Location": f"{thief}/stolen"})) as (url, asked),
    ):
        operator.run(
            "reembed_embeddings",
            "--dry-run",
            env={"OPENAI_BASE_URL": f"{url}/v1", "VECTOR_SIZE": "96"},
            expect=6,
        )
        operator.run("backup_automem", env={"QDRANT_URL": url, "QDRANT_API_KEY": "key"}, expect=1)
        operator.run(
            "verify_migration", env={"AUTOMEM_API_URL": url, "AUTOMEM_API_TOKEN": "token"}, expect=None
        )
        assert {path for path, _, _ in asked} >= {"/v1/embeddings", "/", "/health"}
        assert stolen == []


def test_a_netrc_replaces_no_token(impatient, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login thief password word\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    body = json.dumps({"results": []}).encode()
    with serving(replying(200, {"Content-Type": "application/json"}, body)) as (url, asked):
        recall(AutoMemApi(url, "token"), "x", 1)
        with pytest.raises(StoreFailed):
            Qdrant(url, "key").version()
    headers = [headers for _, headers, _ in asked]
    assert headers[0]["Authorization"] == "Bearer token"
    assert "Authorization" not in headers[1]
    assert headers[1]["api-key"] == "key"


def test_a_whole_answer_keeps_its_connection():
    """What is read piece by piece goes back to the pool: no connection is made for each request."""
    with serving(replying(200, {"Content-Type": "application/json"}, b'{"result": 1}')) as (url, asked):
        q = Qdrant(url)
        for _ in range(5):
            assert q.json("GET", "/x") == 1
    assert len(asked) == 5
    assert len({headers["peer"] for _, headers, _ in asked}) == 1


def test_a_server_sends_the_key_to_its_configured_address_alone():
    """It is told to fetch its own snapshot: from the address that is configured, and from its own localhost."""
    from lib.vectors.restoring import can_fetch_itself
    from lib.vectors.snapshots import Snapshot

    with serving(
        replying(400, {"Content-Type": "application/json"}, b'{"status": {"error": "cannot fetch"}}')
    ) as (url, asked):
        snapshot = Snapshot("s.snapshot", 1, "0" * 64, "")
        assert can_fetch_itself(Qdrant(url, "key"), "c", snapshot, "c__probe") is None
    sent = [json.loads(body) for _, _, body in asked]
    assert [one["location"].partition("/collections")[0] for one in sent] == [url, "http://localhost:6333"]
    assert [one.get("api_key") for one in sent] == ["key", None]
