"""Servers that are not ours: they send a client elsewhere, without end, or a byte at a time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from isal import igzip

from lib import network as http_policy
from lib.clients import automem as automem_api
from lib.clients.automem import AutoMemApi, ask_health, recall
from lib.clients.embeddings import client
from lib.clients.embeddings import client as provider
from lib.clients.embeddings.answers import Transient
from lib.clients.qdrant import snapshots, transport
from lib.clients.qdrant.transport import NoAnswer, Qdrant
from lib.dimensions import EmbeddingSpec
from lib.errors import StoreFailed, StoreUnreachable


class Server(ThreadingHTTPServer):
    """A client that hangs up is no error of the test: its traceback would appear in the command's output."""

    def handle_error(self, *_: object) -> None:
        pass


Answer = Callable[[BaseHTTPRequestHandler], None]
BOMB = igzip.compress(bytes(64 << 20), 1)  # gzip's own takes half a second


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
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
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


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


def without_end(start: bytes, unit: bytes, pause: float = 0.05) -> Answer:
    """This start, then this unit again and again, each sooner than any time-out, for a minute."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        with_end = time.monotonic() + 60
        request.close_connection = True
        try:
            request.wfile.write(start)
            while time.monotonic() < with_end:
                request.wfile.write(unit)
                time.sleep(pause)
        except OSError:
            pass

    return answer


HEADS = {
    "a status line": without_end(b"", b"H"),
    "a header": without_end(b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "interim answers": without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "interim answers, fast": without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, 0.0),
    "trailers": without_end(CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: y\r\n"),
    "a chunk's line": without_end(CHUNKED + b"1;", b"x"),
}
BOMBING = replying(200, {"Content-Encoding": "gzip", "Content-Type": "application/json"}, BOMB)


@pytest.fixture
def short_timeouts(monkeypatch):
    """Bounds that a test can reach; every server counts as another machine's."""
    monkeypatch.setattr(transport, "LARGEST_ANSWER", 8 << 20)
    monkeypatch.setattr(transport, "LONGEST_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(automem_api, "_LARGEST_ANSWER", 8 << 20)
    monkeypatch.setattr(automem_api, "_LONGEST_SECONDS", 1.0)
    monkeypatch.setattr(provider, "_HEAD_BYTES", 1 << 20)
    monkeypatch.setattr(provider, "_TIMES", 0.02)
    monkeypatch.setattr(client, "FIRST_CONTACT_SECONDS", 2.0)
    import lib.dimensions  # noqa: F401 - it keeps the real function, whichever test imports it first

    for module in (http_policy, automem_api, provider):
        monkeypatch.setattr(module, "is_this_machine", lambda _url: False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.mark.parametrize(
    ("answer", "expected"), [(BOMBING, "larger than 8 MiB"), (dripping, "was not complete after 1 s")]
)
def test_an_answer_without_end_is_not_read_to_its_end(short_timeouts, answer, expected):
    began = time.monotonic()
    with serving(answer) as (url, _):
        with pytest.raises(StoreFailed, match=expected) as given_up:
            Qdrant(url, timeout_seconds=1.0).version()
        assert given_up.value.next_step.startswith("check the network, then run the same command again\nor correct")
        assert ask_health(AutoMemApi(url)).presence == "silent"
        with pytest.raises(StoreUnreachable):
            recall(AutoMemApi(url, timeout_seconds=1.0), "x", 1)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("answer", [BOMBING, pytest.param(dripping, marks=pytest.mark.matrix)])
def test_a_provider_without_end_ends_the_run(operator, short_timeouts, answer):
    """Handled as an endpoint that does not answer: retried, then given up; nothing is written."""
    operator.load(5)
    operator.run("backup_automem")
    before = operator.state()
    with serving(answer) as (url, asked):
        operator.export(OPENAI_BASE_URL=f"{url}/v1", VECTOR_SIZE=96)
        result = operator.run("reembed_embeddings", "--dry-run", expect=6)
    assert asked
    assert "larger than" in result.err or "was not complete" in result.err
    assert operator.state() == before


@pytest.mark.parametrize(
    "kind", ["a header", *(pytest.param(one, marks=pytest.mark.matrix) for one in HEADS if one != "a header")]
)
def test_a_head_that_drips_is_given_up(short_timeouts, kind):
    """Each byte arrives in time; the head, or the framing of the body, has no end."""
    began = time.monotonic()
    with serving(HEADS[kind]) as (url, _):
        with pytest.raises((StoreUnreachable, StoreFailed), match=r"timed out|was not complete after 1 s"):
            Qdrant(url, timeout_seconds=0.3, sleep=lambda _seconds: None).version()
        with pytest.raises(StoreUnreachable):
            recall(AutoMemApi(url, timeout_seconds=0.3), "x", 1)
        sent = provider.Provider(EmbeddingSpec(f"{url}/v1", "text-embedding-3-small", 96), "sk-x", 20.0)
        with pytest.raises(Transient):
            sent.send(["x"])
        sent.close()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("kind", [pytest.param(one, marks=pytest.mark.matrix) for one in HEADS])
def test_a_run_whose_provider_drips_ends_the_run(operator, short_timeouts, kind):
    operator.load(5)
    operator.run("backup_automem")
    before = operator.state()
    with serving(HEADS[kind]) as (url, asked):
        operator.export(OPENAI_BASE_URL=f"{url}/v1", VECTOR_SIZE=96)
        began = time.monotonic()
        result = operator.run("reembed_embeddings", "--dry-run", expect=6)
    assert asked
    assert "gave no good answer" in result.err
    assert time.monotonic() - began < 20
    assert operator.state() == before


TWICE = igzip.compress(BOMB * 500, 1)
REFUSALS = {
    "endless": (
        without_end(b"HTTP/1.1 429 X\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 65536, 0.0),
        "larger",
    ),
    "inflated": (replying(400, {"Content-Encoding": "gzip"}, BOMB), "larger than 1 MiB"),
    "twice": (replying(200, {"Content-Encoding": "gzip, gzip"}, TWICE), "in a way that was not requested"),
    "deep": (replying(200, {"Content-Type": "application/json"}, b"[" * 500_000), "is not JSON"),
}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_of_the_provider_is_bounded_too(operator, short_timeouts, kind):
    """The openai package reads the body of an error whole, whatever it inflates to; 32 GB come of the second."""
    answer, expected = REFUSALS[kind]
    operator.load(5)
    operator.run("backup_automem")
    with serving(answer) as (url, _):
        operator.export(OPENAI_BASE_URL=f"{url}/v1", VECTOR_SIZE=96)
        assert expected in operator.run("reembed_embeddings", "--dry-run", expect=6).err


def test_a_deep_json_is_no_traceback():
    with serving(replying(200, {"Content-Type": "application/json"}, b"[" * 500_000)) as (url, _):
        assert ask_health(AutoMemApi(url)).presence == "absent"
        with pytest.raises(StoreFailed, match="is not AutoMem"):
            recall(AutoMemApi(url), "x", 1)
        with pytest.raises(StoreFailed, match="is not Qdrant"):
            Qdrant(url).version()


@pytest.mark.parametrize("codec", ["idna", "rot13", "base64", "undefined"])
def test_a_codec_that_is_none_of_texts_is_no_traceback(codec):
    kind = {"Content-Type": f"text/plain; charset={codec}"}
    with serving(replying(500, kind, "\xe4\xff".encode() * 99)) as (url, _):
        with pytest.raises(StoreFailed, match="answered 500: \xe4\xff"):
            Qdrant(url).version()
        with pytest.raises(StoreFailed, match="answered 500: \xe4\xff"):
            recall(AutoMemApi(url), "x", 1)
        with pytest.raises(Transient, match="\xe4\xff"):
            provider.Provider(EmbeddingSpec(f"{url}/v1", "m", 96), "sk-x", 20.0).send(["x"])


def test_an_interim_answer_is_no_absence():
    """A gateway may send 103 (early hints) before AutoMem's own answer, which http.client takes for the answer."""
    early = without_end(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", 60.0)
    with serving(early) as (url, _):
        assert ask_health(AutoMemApi(url)).presence == "silent"


DOWNLOADS = {
    "a chunk of a negative size": (
        without_end(CHUNKED + b"-5\r\n", b"x" * 65536, 0.0),
        StoreFailed,
        "longer than",
    ),
    "a length that is none": (
        replying(200, {"Content-Length": "abc"}),
        StoreFailed,
        "length of the download is 'abc'",
    ),
    "trailers": (
        without_end(CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n"),
        NoAnswer,
        "does not continue after byte 1",
    ),
    "a byte at a time": (dripping, StoreFailed, "the rest of an interrupted download cannot be fetched"),
}


@pytest.mark.parametrize("kind", list(DOWNLOADS))
def test_a_snapshot_without_end_is_given_up(monkeypatch, kind):
    monkeypatch.setattr(snapshots, "PIECE_SECONDS", 0.2)
    answer, error, expected = DOWNLOADS[kind]
    taken = bytearray()
    with serving(answer) as (url, _):
        q = Qdrant(url, timeout_seconds=2.0, sleep=lambda _seconds: None)
        with pytest.raises(error, match=expected):
            snapshots.download(q, "c", snapshots.Snapshot("s", 1000, None, ""), taken.extend)
    assert len(taken) <= 1000


def test_texts_and_keys_go_nowhere_else(operator, short_timeouts):
    """A redirect is an error for each client; nothing arrives at its target."""
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
        operator.run("verify_migration", env={"AUTOMEM_API_URL": url, "AUTOMEM_API_TOKEN": "token"}, expect=None)
        assert {path for path, _, _ in asked} >= {"/v1/embeddings", "/", "/health"}
        assert stolen == []


def test_a_netrc_replaces_no_token(short_timeouts, tmp_path, monkeypatch):
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
    """A connection that is read piece by piece returns to the pool: requests reuse it."""
    with serving(replying(200, {"Content-Type": "application/json"}, b'{"result": 1}')) as (url, asked):
        q = Qdrant(url)
        for _ in range(5):
            assert q.json("GET", "/x") == 1
    assert len(asked) == 5
    assert len({headers["peer"] for _, headers, _ in asked}) == 1


def test_a_server_sends_the_key_to_its_configured_address_alone():
    """The server is asked to read its own snapshot: its file, from the configured address, and from its localhost."""
    from lib.clients.qdrant.snapshots import Snapshot, can_fetch_itself

    with serving(replying(400, {"Content-Type": "application/json"}, b'{"status": {"error": "cannot fetch"}}')) as (
        url,
        asked,
    ):
        snapshot = Snapshot("s.snapshot", 1, "0" * 64, "")
        assert can_fetch_itself(Qdrant(url, "key"), "c", snapshot, "c__probe") is None
    sent = [json.loads(body) for _, _, body in asked]
    assert [one["location"].removesuffix("/s.snapshot") for one in sent] == [
        "file:///qdrant/snapshots/c",
        f"{url}/collections/c/snapshots",
        "http://localhost:6333/collections/c/snapshots",
    ]
    assert [one.get("api_key") for one in sent] == [None, "key", None]
