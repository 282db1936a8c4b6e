from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from lib.clients.qdrant import cluster, collection, points, transport
from lib.clients.qdrant import points as upsert
from lib.clients.qdrant.transport import NoAnswer, Qdrant, QdrantError
from lib.errors import AccessRefused, MigrationError, MissingData, StoreFailed, StoreUnreachable
from tests.certificate import self_signed

KEY = "k3y-nobody-may-see"


class Scripted:
    """An HTTP server that gives its `answers` in turn, (status, headers, body) each, the last one for ever."""

    def __init__(self, *answers: tuple[int, dict[str, str], object]) -> None:
        self.answers = list(answers)
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.connections: set[tuple[str, int]] = set()
        self.slept: list[float] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                scripted.seen.append((self.command, self.path, dict(self.headers), body))
                scripted.connections.add(self.client_address)
                status, headers, content = scripted.answers[0]
                if len(scripted.answers) > 1:
                    scripted.answers.pop(0)
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def encrypt(self, context: ssl.SSLContext) -> None:
        """Speak TLS on the connections that follow."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    @property
    def qdrant(self) -> Qdrant:
        return Qdrant(f"http://127.0.0.1:{self._server.server_port}", KEY, sleep=self.slept.append)

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def fine(result: object = True) -> tuple[int, dict[str, str], object]:
    return 200, {}, {"result": result, "status": "ok"}


def refused(status: int, text: str, **headers: str) -> tuple[int, dict[str, str], object]:
    return (
        status,
        {name.replace("_", "-"): value for name, value in headers.items()},
        {"status": {"error": text}},
    )


@contextlib.contextmanager
def refusing_from_the_headers(status_line: str) -> Iterator[str]:
    """A server that answers when it has the headers, reads no body and keeps the connection open."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.listen(8)
    connections: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connections.append(client)
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(100)
                client.sendall(f"HTTP/1.1 {status_line}\r\nContent-Length: 5\r\n\r\nnever".encode())

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    for client in connections:
        client.close()
    listener.close()


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:6333", "http://localhost:6333"),
        ("https://x.cloud.qdrant.io:443/prefix", "https://x.cloud.qdrant.io:443/prefix"),
        ("http://user:pa%20ss@10.0.0.1:6333", "http://10.0.0.1:6333"),
        ("http://[::1]:6333", "http://[::1]:6333"),
    ],
)
def test_a_login_is_not_part_of_the_address(url: str, base: str):
    assert Qdrant(url).base_url == base
    assert "pa%20ss" not in repr(Qdrant(url))


def test_a_login_is_sent_decoded():
    with Scripted(fine()) as server:
        address = server.qdrant.base_url.removeprefix("http://")
        Qdrant(f"http://us%20er:p%40%C3%A9%E6%97%A5@{address}").json("GET", "/collections")
        scheme, _, sent = server.seen[0][2]["Authorization"].partition(" ")
    assert (scheme, base64.b64decode(sent).decode()) == ("Basic", "us er:p@é日")


def test_the_certificate_of_this_machine_is_verified_by_the_named_authority(tmp_path, monkeypatch):
    certificate, key = self_signed(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with Scripted(fine()) as server:
        server.encrypt(context)
        url = server.qdrant.base_url.replace("http:", "https:")
        with pytest.raises(StoreUnreachable, match="TLS failed") as untrusted:
            Qdrant(url, sleep=lambda _: None).json("GET", "/collections")
        (variable,) = re.findall(r"export (\w+)=", untrusted.value.next_step)
        monkeypatch.setenv(variable, str(certificate))
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # not asked
        assert Qdrant(url).json("GET", "/collections") is True


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1"])
def test_a_proxy_that_does_not_work_is_named(monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    for variable in ("NO_PROXY", "no_proxy"):  # requests itself sets the second one for a moment
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(StoreUnreachable, match="proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY") as caught:
        Qdrant("http://qdrant.example:6333", sleep=lambda _: None).json("GET", "/collections")
    assert "export NO_PROXY=qdrant.example" in caught.value.next_step


@pytest.mark.parametrize(("status", "text"), [(401, "Invalid API key or JWT"), (403, "Forbidden: Global access")])
def test_refused_access_names_server_and_reason_but_no_key(status: int, text: str):
    with Scripted((status, {}, f"{text} {KEY}")) as server:
        with pytest.raises(AccessRefused, match=text) as caught:
            server.qdrant.json("GET", "/collections")
        assert KEY not in str(caught.value)
        assert KEY not in repr(caught.value)
        assert KEY not in repr(server.qdrant)
        assert caught.value.exit_code == 2
        assert server.seen[0][2]["api-key"] == KEY
        assert len(server.seen) == 1


def test_a_key_where_a_long_error_text_is_cut_is_not_shown_in_part():
    text = "x" * (transport._TEXT_LIMIT - 5) + KEY
    with Scripted((500, {}, text)) as server, pytest.raises(QdrantError) as caught:
        server.qdrant.json("PUT", "/collections/memories")
    assert KEY[:5] not in str(caught.value)


def test_errors_carry_the_servers_words():
    missing = "Collection `x` doesn't exist"
    with Scripted(refused(404, missing)) as server, pytest.raises(MissingData, match=missing):
        server.qdrant.json("GET", "/collections/x")
    with Scripted(refused(500, "No space left on device")) as server:
        with pytest.raises(QdrantError, match="No space left") as caught:
            server.qdrant.json("POST", "/collections/x/snapshots")
        assert (caught.value.status, "disk" in caught.value.next_step) == (500, True)
    with Scripted((413, {}, "<html>Request Entity Too Large</html>")) as server:
        with pytest.raises(QdrantError, match="413") as caught:
            server.qdrant.json("POST", "/collections/x/snapshots/upload")
        assert "a proxy limits the size" in caught.value.next_step


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(StoreUnreachable, match="connection refused") as caught:
        Qdrant(f"http://127.0.0.1:{port}", sleep=lambda _: None).json("GET", "/collections")
    assert not isinstance(caught.value, NoAnswer)
    assert "docker compose up -d qdrant" in caught.value.next_step


def test_something_else_answers():
    for answer in ("<html>hello</html>", {"title": "elastic", "version": "8"}):
        with Scripted((200, {}, answer)) as server, pytest.raises(StoreFailed, match="is not Qdrant"):
            server.qdrant.version()


@pytest.mark.parametrize("status", [408, 429])
def test_a_server_that_refuses_for_the_moment_is_not_taken_for_something_else(status):
    """The next step would be to change QDRANT_URL."""
    refusal = pytest.raises(QdrantError, match=f"answered {status}: not now")
    with Scripted(refused(status, "not now")) as server, refusal as caught:
        server.qdrant.version()
    assert "QDRANT_URL" not in caught.value.next_step
    assert ("limits the requests: wait a minute" in caught.value.next_step) is (status == 429)


def test_a_redirect_is_not_followed_with_the_key():
    with Scripted(fine()) as other, Scripted((307, {"Location": other.qdrant.base_url}, "moved")) as server:
        with pytest.raises(QdrantError, match="307"):
            server.qdrant.json("GET", "/collections")
        assert other.seen == []


def test_rate_limits_with_retry_after_are_waited_for():
    limited = refused(429, "Retry after 20s", Retry_After="20")
    with Scripted(limited, limited, fine({"count": 3})) as server:
        assert points.count(server.qdrant, "x") == 3
        assert server.slept == [20.0, 20.0]


def test_a_rate_limit_is_not_waited_for_without_end():
    with Scripted(refused(429, "Retry after 200s", Retry_After="200")) as server:
        with pytest.raises(QdrantError, match="429"):
            points.count(server.qdrant, "x")
        assert sum(server.slept) <= transport.LONGEST_WAIT_SECONDS


def test_a_gateways_error_is_retried_three_times_if_repeating_is_safe():
    with Scripted((503, {}, "no upstream")) as server:
        with pytest.raises(QdrantError, match="no upstream"):
            points.count(server.qdrant, "x")
        assert len(server.seen) == 4
        assert server.slept == list(transport.PAUSES_SECONDS)
    with Scripted((503, {}, "no upstream"), fine()) as server:
        with pytest.raises(QdrantError):
            server.qdrant.json("POST", "/collections/x/snapshots", retry=False)
        assert len(server.seen) == 1


def test_a_request_that_the_server_did_not_get_in_time_is_repeated():
    """Qdrant answers 408 if a connection is made and nothing is sent for 5 s, as when this machine sleeps."""
    with Scripted((408, {}, ""), (200, {}, {"title": "qdrant", "version": "1.19.0"})) as server:
        assert server.qdrant.version() == "1.19.0"


def test_other_errors_are_not_repeated():
    with Scripted(refused(500, "Service internal error"), fine()) as server:
        with pytest.raises(QdrantError):
            points.count(server.qdrant, "x")
        assert len(server.seen) == 1


def test_a_connection_that_refused_a_body_is_not_used_again():
    with Scripted(refused(400, "no"), fine(), fine()) as server:
        q = server.qdrant
        with pytest.raises(QdrantError):
            q.json("PUT", "/collections/x", {"a": 1})
        q.json("GET", "/collections")
        q.json("GET", "/collections")
        assert len(server.connections) == 2


def test_a_request_that_is_never_repeated_gets_a_new_connection():
    """The server closes an idle one after 5 s. A snapshot or restore that it never began would be waited for."""
    with Scripted(fine([])) as server:
        q = server.qdrant
        for method, retry in (("GET", None), ("POST", True), ("POST", False), ("GET", None)):
            q.json(method, "/collections/x/snapshots", retry=retry)
        assert len(server.connections) == 1
        for method in ("POST", "PUT", "DELETE"):
            q.json(method, "/collections/x/snapshots")
        assert len(server.connections) == 4


def test_an_answer_that_never_comes_has_an_end():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        q = Qdrant(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(NoAnswer, match="timed out"):
            q.json("POST", "/collections/x/snapshots", timeout=0.2, retry=False)


def test_a_large_body_refused_from_the_headers_does_not_hang(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport, "SEND_SECONDS", 0.3)
    payloads = [{"content": "x" * 1_000_000}] * 20
    with refusing_from_the_headers("401 Unauthorized") as url:
        q = Qdrant(url, KEY, timeout_seconds=2, sleep=lambda _: None)
        with pytest.raises(AccessRefused, match="401"):
            upsert.upsert(q, "x", list(range(20)), np.ones((20, 4), np.float32), payloads)


def test_a_request_larger_than_the_rate_limit_is_split():
    too_large = refused(429, "request larger than rate limiter capacity, please try to split your request")
    with Scripted(too_large, too_large, fine()) as server:
        assert upsert.upsert(server.qdrant, "x", list(range(8)), np.ones((8, 4), np.float32), [{}] * 8) == []
        sizes = [len(json.loads(body)["points"]) for *_, body in server.seen]
        assert sizes == [8, 4, 2, 2, 4]
        written = [point["id"] for *_, body in server.seen[2:] for point in json.loads(body)["points"]]
        assert written == list(range(8))
        assert all(path.endswith("?wait=true") for _, path, _, _ in server.seen)


def test_a_request_for_more_ids_than_the_rate_limit_is_split():
    too_large = refused(429, "request larger than rate limiter capacity, please try to split your request")
    found = [fine([{"id": one}]) for one in (1, 4, 5)]
    with Scripted(too_large, too_large, *found) as server:
        assert [point.id for point in upsert.retrieve(server.qdrant, "x", list(range(8)))] == [1, 4, 5]
        assert [json.loads(body)["ids"] for *_, body in server.seen[2:]] == [[0, 1], [2, 3], [4, 5, 6, 7]]


def test_a_rate_limit_that_one_point_exceeds_is_an_error():
    too_large = refused(429, "please try to split your request")
    with Scripted(too_large) as server, pytest.raises(QdrantError, match="429"):
        upsert.upsert(server.qdrant, "x", [1, 2], np.ones((2, 4), np.float32), [{}] * 2)
    with Scripted(too_large) as server, pytest.raises(QdrantError, match="429"):
        upsert.retrieve(server.qdrant, "x", [1, 2])


def test_a_proxys_limit_of_bytes_splits_too():
    with Scripted((413, {}, "too large"), fine()) as server:
        assert upsert.upsert(server.qdrant, "x", [1, 2], np.ones((2, 4), np.float32), [{}] * 2) == []
        assert [len(json.loads(body)["points"]) for *_, body in server.seen] == [2, 1, 1]


def test_a_full_disk_is_nobodys_row():
    with Scripted(refused(500, "No space left on device: WAL buffer size exceeds available disk space")) as server:
        with pytest.raises(QdrantError, match="No space left"):
            upsert.upsert(server.qdrant, "x", [1, 2], np.ones((2, 4), np.float32), [{}] * 2)
        assert len(server.seen) == 1


def test_float32_arrives_as_it_is():
    vectors = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    with Scripted(fine()) as server:
        upsert.upsert(server.qdrant, "x", [1, 2, 3, 4], vectors, [{}] * 4)
        sent = [point["vector"] for point in json.loads(server.seen[0][3])["points"]]
    assert np.array_equal(np.array(sent, dtype=np.float32), vectors)


def test_a_body_in_parts_is_sent_whole_and_whole_again_when_the_request_is_repeated():
    payloads = [{"content": f"{number}" * 40_000} for number in range(20)]  # more than one piece
    with Scripted((503, {}, "no upstream"), fine()) as server:
        upsert.upsert(server.qdrant, "x", list(range(20)), np.ones((20, 4), np.float32), payloads)
        first, second = server.seen
        assert first[3] == second[3]
        assert [point["payload"] for point in json.loads(second[3])["points"]] == payloads
        assert second[2]["Content-Length"] == str(len(second[3]))
        assert "Transfer-Encoding" not in second[2]  # some proxies keep such a body until its end


def shards_of(local: list[dict], remote: list[dict], transfers: list[dict] | None = None) -> tuple:
    return fine(
        {
            "peer_id": 11,
            "shard_count": 2,
            "local_shards": local,
            "remote_shards": remote,
            "shard_transfers": transfers or [],
        }
    )


LOCAL = {"shard_id": 0, "points_count": 22, "state": "Active"}
REMOTE = {"shard_id": 1, "peer_id": 22, "state": "Active"}
TWO_NODES = fine({"status": "enabled", "peer_id": 11, "peers": {"11": {}, "22": {}}})


def test_shards_on_two_nodes_are_refused():
    with Scripted(shards_of([LOCAL], [REMOTE]), TWO_NODES) as server:
        found = cluster.topology(server.qdrant, "x")
    assert (found.peers, found.holders) == (2, {11, 22})
    with pytest.raises(MigrationError, match="spread over 2 Qdrant nodes"):
        cluster.refuse_partial(found)


def test_a_cluster_of_which_one_node_holds_all_is_fine_and_so_is_a_key_that_may_not_ask():
    with Scripted(shards_of([LOCAL], []), TWO_NODES) as server:
        found = cluster.topology(server.qdrant, "x")
    assert found.peers == 2
    cluster.refuse_partial(found)
    with Scripted(shards_of([LOCAL], []), refused(403, "Forbidden: Global access is required")) as server:
        cluster.refuse_partial(cluster.topology(server.qdrant, "x"))


def test_all_shards_on_another_node_than_the_one_asked_are_refused():
    with Scripted(shards_of([], [REMOTE]), TWO_NODES) as server:
        found = cluster.topology(server.qdrant, "x")
    with pytest.raises(MigrationError, match="nodes"):
        cluster.refuse_partial(found)


@pytest.mark.parametrize(
    ("local", "transfers", "what"),
    [({**LOCAL, "state": "Partial"}, [], "Partial"), (LOCAL, [{"to": 22}], "being moved")],
)
def test_shards_that_move_or_are_not_whole_are_refused(local: dict, transfers: list, what: str):
    with Scripted(shards_of([local], [], transfers), fine({"status": "disabled"})) as server:
        found = cluster.topology(server.qdrant, "x")
    with pytest.raises(StoreFailed, match=what):
        cluster.refuse_partial(found)


@pytest.mark.parametrize(
    ("text", "health"),
    [
        ("0 of 0 read operations failed", "failed"),
        ("The replica set for shard 0 on peer 1 does not have enough active replicas", "failed"),
        ("1 of 1 read operations failed:\n  Failed to Get Info,  Failed to restore local replica", "failed"),
        ("Failed to Get Info,  Dirty shard - shard is not fully initialized", "failed"),
        ("Local shard 0 not found", "restoring"),
        ("Failed to Get Info,  Failed to load local shard: Too many open files", "unavailable"),
        ("1 of 1 read operations failed: Tonic status error: Unavailable, tcp connect error", "unavailable"),
        ("Tonic status error: does not have enough active replicas", "unavailable"),
        ("No space left on device", "unavailable"),
    ],
)
def test_only_a_lost_shard_makes_a_collection_failed(text: str, health: str):
    """A failed collection may be deleted; a collection on a stopped node, or one that did not load, must not be."""
    with Scripted(fine({"collections": [{"name": "x"}]}), refused(500, f"Service internal error: {text}")) as server:
        assert collection.health(server.qdrant, "x") == health


def test_a_collection_that_is_listed_but_not_found_is_being_restored():
    with Scripted(fine({"collections": [{"name": "x"}]}), refused(404, "Not found")) as server:
        assert collection.health(server.qdrant, "x") == "restoring"


def info(optimizer: object) -> tuple:
    """A collection of one point whose optimizer has this status."""
    params = {"vectors": {"size": 4, "distance": "Cosine"}}
    status = "green" if optimizer == "ok" else "red"
    return fine({"status": status, "optimizer_status": optimizer, "config": {"params": params}})


NO_ROOM = {"error": "Service runtime error: Not enough space available for optimization, needed: 2, available: 1"}
ONE = fine({"count": 1})


def test_an_optimizer_that_stopped_without_room_is_started_once_more_then_it_is_an_error():
    with Scripted(info(NO_ROOM), ONE, fine(), info(NO_ROOM), ONE, fine()) as server:
        with pytest.raises(QdrantError, match="Not enough space available"):
            collection.wait_green(server.qdrant, "x", 3600)
        assert [method for method, *_ in server.seen] == ["GET", "POST", "PATCH", "GET", "POST"]


def test_an_optimizer_that_keeps_failing_is_not_waited_for_to_the_end(monkeypatch):
    monkeypatch.setattr(collection, "FAILING_SECONDS", 0.0)
    broken = info({"error": "Service internal error: Too many open files"})
    with Scripted(broken, ONE, fine()) as server:
        assert not collection.wait_green(server.qdrant, "x", 3600).optimizer_ok
        assert [method for method, *_ in server.seen] == ["GET", "POST", "PATCH"]


def test_an_optimizer_that_has_room_again_continues():
    well = [info("ok"), ONE] * collection.STABLE_POLLS
    with Scripted(info(NO_ROOM), ONE, fine(), *well) as server:
        assert collection.wait_green(server.qdrant, "x", 3600).optimized
        assert [method for method, *_ in server.seen].count("PATCH") == 1
