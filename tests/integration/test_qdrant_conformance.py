"""The Qdrant stand-in against recordings of real servers, and real servers against the same recordings.

By default the stand-in plays both versions. With QDRANT_TEST_SERVER (the path of a server binary) the same
replays run against that server instead, started empty; its version decides which recording is meant.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.matrix import matrix
from tests.qdrant_recover import KEY, RecoverReplay
from tests.qdrant_replay import Replay, rows
from tests.qdrant_uploads import repacked
from tests.real_qdrant import RealQdrant, test_server
from tests.sandbox.process import ServerStartError
from tests.sandbox.qdrant_server.process import QdrantServer

VERSIONS = ("1.11.3", "1.18.3")
TIMEOUT_SECONDS = 120.0
COMPARED_AT_LEAST = 300
AFTER_NO_WAIT = "after good, wait=false"  # these follow a restore that was not waited for

LEFT_OUT = {  # (title, version or "" for both) -> why the stand-in is not compared
    ("full storage snapshot", ""): "no tool of ours takes a snapshot of the whole storage",
    ("full storage snapshots", ""): "no tool of ours takes a snapshot of the whole storage",
    ("delete full", ""): "no tool of ours takes a snapshot of the whole storage",
    (
        "download, client default",
        "",
    ): "the server compresses with br if it may; the standard library has gzip only",
    (
        "after one segment dropped: info",
        "1.11.3",
    ): "the real collection had two segments, the engine makes one",
}


def _real_version() -> str | None:
    binary = test_server()
    if binary is None:
        return None
    return subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]


REAL = _real_version()


@contextlib.contextmanager
def _server(folder: Path, version: str, api_key: str | None = None, read_only_key: str | None = None) -> Iterator[Any]:
    binary = test_server()
    keys = {"api_key": api_key, "read_only_key": read_only_key}
    server: Any = RealQdrant(binary, folder, **keys) if binary else QdrantServer(folder / "data", version, **keys)
    with server as running:
        yield running


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder on the disk: on a RAM disk the engine makes its files larger, and a refused upload then hangs."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(params=[REAL] if REAL else matrix(VERSIONS, "1.18.3"))
def version(request: pytest.FixtureRequest) -> str:
    if REAL and REAL not in VERSIONS:
        pytest.skip(f"there is no recording of {REAL}")
    return str(request.param)


@pytest.mark.matrix
def test_every_recorded_request_is_answered_as_recorded(version: str, tmp_path: Path) -> None:
    compared, left_out, wrong = 0, [], []
    with _server(tmp_path, version) as server:
        replay = Replay(server.url, version, own_snapshots=REAL is None and version == "1.11.3")
        recording = rows(version, "transcript")
        for number, row in enumerate(recording):
            reason = None if REAL else LEFT_OUT.get((row["title"], ""), LEFT_OUT.get((row["title"], version)))
            if reason:
                left_out.append(f"{number} {row['title']}: {reason}")
                continue
            found = _replay_until_equal(replay, row) if row["title"].startswith(AFTER_NO_WAIT) else replay.run(row)
            wrong += [f"{number} {row['title']}: {line}" for line in found]
            compared += 1
    _print_summary("transcript", version, compared, len(recording), left_out)
    assert not wrong, "\n".join(wrong)
    assert compared >= COMPARED_AT_LEAST
    assert compared + len(left_out) == len(recording) == 351


def _replay_until_equal(replay: Replay, row: dict[str, Any]) -> list[str]:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while (found := replay.run(row)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _print_summary(recording: str, version: str, compared: int, total: int, left_out: list[str]) -> None:
    server = "real server" if REAL else "stand-in"
    print(f"\nconformance: {recording} {version} {server}: {compared} of {total} compared, {len(left_out)} left out")
    for line in left_out:
        print(f"  left out: {line}")


@pytest.mark.matrix
def test_recover_is_answered_as_recorded(version: str, tmp_path: Path) -> None:
    recording = rows(version, "recover")[1:]
    with _server(tmp_path, version, KEY) as server:
        replay = RecoverReplay(server.url)
        replay.set_up()
        wrong = replay.run(recording)
    _print_summary("recover", version, replay.compared, len(recording), [])
    assert not wrong, "\n".join(wrong)
    assert replay.compared == len(recording) == 54


READ_ONLY_KEY = "readonlykey"
CREDENTIALS = {
    "none": {},
    "wrong key": {"api-key": "wrong"},
    "key": {"api-key": KEY},
    "bearer": {"Authorization": f"Bearer {KEY}"},
    "read-only key": {"api-key": READ_ONLY_KEY},
}


def test_keys_are_judged_as_recorded(version: str, tmp_path: Path) -> None:
    """The stand-in knows no JWT, so those rows are left out."""
    recording = rows(version, "auth")
    meant = [row for row in recording if row["credential"] in CREDENTIALS]
    wrong = []
    with _server(tmp_path, version, KEY, READ_ONLY_KEY) as server:
        snapshot = _small_collection(server.url)
        for row in meant:
            wrong += _auth_differences(server.url, row, snapshot)
    _print_summary("auth", version, len(meant), len(recording), ["rows with a JWT"])
    assert not wrong, "\n".join(wrong)
    assert len(meant) == 5 * 19


def _auth_differences(url: str, row: dict[str, Any], snapshot: dict[str, Any]) -> list[str]:
    method, path = row["request"]["method"], row["request"]["path"].replace("{snap}", snapshot["name"])
    answer = _auth_request(url, method, path, CREDENTIALS[row["credential"]], snapshot["content"])
    expected, where = row["response"], f"{row['credential']}: {method} {path}"
    if answer.status_code != expected["status"]:
        return [f"{where}: {expected['status']} is now {answer.status_code} {answer.text[:200]}"]
    if answer.headers.get("content-type") != expected["content-type"]:
        return [f"{where}: {expected['content-type']} is now {answer.headers.get('content-type')}"]
    if "text" in expected and answer.text != expected["text"]:
        return [f"{where}: {expected['text']!r} is now {answer.text!r}"]
    error = expected.get("json", {}).get("status")
    if isinstance(error, dict) and answer.json()["status"] != error:
        return [f"{where}: {error} is now {answer.json()['status']}"]
    return []


def _small_collection(url: str) -> dict[str, Any]:
    headers = {"api-key": KEY}
    wal = {"wal_capacity_mb": 1}
    made = {"vectors": {"size": 4, "distance": "Cosine"}, "wal_config": wal}
    points = [{"id": one, "vector": [1, 2, 3, one]} for one in range(5)]
    for path, body in (("", made), ("/points?wait=true", {"points": points})):
        requests.put(f"{url}/collections/c{path}", json=body, headers=headers, timeout=20).raise_for_status()
    name = requests.post(f"{url}/collections/c/snapshots", headers=headers, timeout=20).json()["result"]["name"]
    content = requests.get(f"{url}/collections/c/snapshots/{name}", headers=headers, timeout=20).content
    return {"name": name, "content": content}


AUTH_BODIES = {
    "/collections/c/points/count": {},
    "/collections/c/points?wait=true": {"points": [{"id": 1, "vector": [1, 2, 3, 4]}]},
    "/collections/c/index?wait=true": {"field_name": "a", "field_schema": "keyword"},
    "/collections/new": {"vectors": {"size": 4, "distance": "Cosine"}},
    "/collections/aliases": {"actions": []},
}


def _auth_request(url: str, method: str, path: str, headers: dict[str, str], snapshot: bytes) -> requests.Response:
    if method == "UPLOAD":
        files = {"snapshot": ("up.snapshot", snapshot)}
        return requests.post(url + path, files=files, headers=headers, timeout=20)
    body = AUTH_BODIES.get(path) if method in ("PUT", "POST") else None
    return requests.request(method, url + path, json=body, headers=headers, timeout=20)


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_the_unmodified_client_works(version: str, tmp_path: Path) -> None:
    from qdrant_client import QdrantClient, models

    with _server(tmp_path, version, KEY) as server:
        client = QdrantClient(url=server.url, api_key=KEY, check_compatibility=False, timeout=30)
        vectors = models.VectorParams(size=4, distance=models.Distance.COSINE)
        assert client.create_collection("c", vectors_config=vectors)
        points = [models.PointStruct(id=one, vector=[1, 2, 3, one], payload={"n": one}) for one in range(1, 21)]
        assert client.upsert("c", points, wait=True).status == models.UpdateStatus.COMPLETED
        assert client.count("c", exact=True).count == 20
        found = client.query_points("c", query=[1.0, 2.0, 3.0, 4.0], limit=3, with_payload=True).points
        assert [one.id for one in found] == [4, 5, 3]
        assert found[0].payload == {"n": 4}
        page, following = client.scroll("c", limit=15, with_vectors=True)
        rest, end = client.scroll("c", limit=15, offset=following)
        assert [one.id for one in page + rest] == list(range(1, 21))
        assert end is None
        over = models.Filter(must=[models.FieldCondition(key="n", range=models.Range(gt=18))])
        assert client.count("c", count_filter=over).count == 2
        made = client.create_snapshot("c", wait=True)
        assert [one.name for one in client.list_snapshots("c")] == [made.name]
        assert client.delete_snapshot("c", made.name, wait=True)
        client.delete("c", points_selector=[1, 2], wait=True)
        assert client.count("c").count == 18
        assert client.get_collection("c").config.params.vectors.size == 4
        assert client.delete_collection("c")
        assert not client.collection_exists("c")


def test_acknowledged_points_outlive_a_kill(version: str, tmp_path: Path) -> None:
    with _server(tmp_path, version) as server:
        url = f"{server.url}/collections/c"
        _small(url)
        for first in range(0, 1000, 100):
            points = [{"id": one, "vector": [1, 2, 3, one], "payload": {"n": one}} for one in range(first, first + 100)]
            requests.put(f"{url}/points?wait=true", json={"points": points}, timeout=20).raise_for_status()
        requests.post(f"{url}/points/delete?wait=true", json={"points": [0]}, timeout=20).raise_for_status()
        server.kill()
        server.start()
        answer = requests.post(f"{url}/points/scroll", json={"limit": 2000}, timeout=20).json()["result"]["points"]
        assert {one["id"]: one["payload"] for one in answer} == {one: {"n": one} for one in range(1, 1000)}


@pytest.mark.matrix
def test_a_failed_collection_prevents_1_11_from_starting_and_delete_cures(version: str, tmp_path: Path) -> None:
    with _server(tmp_path, version) as server:
        good = f"{server.url}/collections/good"
        _small(good)
        requests.put(f"{good}/points?wait=true", json={"points": [{"id": 1, "vector": [1, 2, 3, 4]}]}, timeout=20)
        name = requests.post(f"{good}/snapshots", timeout=20).json()["result"]["name"]
        whole = requests.get(f"{good}/snapshots/{name}", headers={"Accept-Encoding": "identity"}, timeout=20).content
        bad = repacked(whole, lambda entry, body: b"x" * len(body) if entry.startswith("0/wal/open-") else body)
        _upload_failing(server.url, bad)
        assert requests.delete(f"{server.url}/collections/dead", timeout=20).json()["result"] is True
        server.kill()
        server.start()  # cured: it starts
        assert requests.post(f"{good}/points/count", json={}, timeout=20).json()["result"]["count"] == 1
        _upload_failing(server.url, bad)
        server.kill()
        if version == "1.11.3":
            with pytest.raises(ServerStartError):
                server.start()
        else:
            server.start()
            assert requests.post(f"{server.url}/collections/dead/points/count", json={}, timeout=20).status_code == 500
            assert requests.post(f"{good}/points/count", json={}, timeout=20).json()["result"]["count"] == 1


def _small(url: str) -> None:
    made = {"vectors": {"size": 4, "distance": "Cosine"}, "wal_config": {"wal_capacity_mb": 1}}
    requests.put(url, json=made, timeout=20).raise_for_status()


def _upload_failing(url: str, content: bytes) -> None:
    where = f"{url}/collections/dead/snapshots/upload?wait=true"
    answer = requests.post(where, files={"snapshot": ("dead.snapshot", content)}, timeout=30)
    assert answer.status_code == 500, answer.text
    assert requests.get(f"{url}/collections/dead/exists", timeout=20).json()["result"]["exists"] is True


@pytest.mark.parametrize("refused", ["no key", "too large", "no multipart", "bad checksum"])
def test_a_refused_large_body_is_not_read_to_its_end(version: str, tmp_path: Path, refused: str) -> None:
    """1.11.3 stops reading and keeps the connection, so that a blind sender hangs; 1.18.3 closes it."""
    upload = "POST /collections/c/snapshots/upload"
    start, status = {
        "no key": ("PUT /collections/c/points HTTP/1.1", 401),
        "too large": (
            f"PUT /collections/c/points HTTP/1.1\r\nContent-Type: application/json\r\napi-key: {KEY}",
            400,
        ),
        "no multipart": (f"{upload} HTTP/1.1\r\nContent-Type: application/json\r\napi-key: {KEY}", 415),
        "bad checksum": (
            f"{upload}?checksum=x HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=x\r\napi-key: {KEY}",
            422,
        ),
    }[refused]
    size = 200 * 1024 * 1024
    with _server(tmp_path, version, KEY) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=2) as connection:
            connection.sendall(f"{start}\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
            assert connection.recv(1000).startswith(f"HTTP/1.1 {status}".encode())
            sent, stopped = _send_blindly(connection, size)
    assert sent < 100 * 1024 * 1024
    if version == "1.11.3":
        assert isinstance(stopped, TimeoutError)
        assert sent > 1024 * 1024
    else:
        assert isinstance(stopped, ConnectionError)


def _send_blindly(connection: socket.socket, size: int) -> tuple[int, OSError | None]:
    """Bytes that the socket took, and what stopped it."""
    sent = 0
    try:
        while sent < size:
            sent += connection.send(bytes(65536))
    except OSError as error:
        return sent, error
    return sent, None


def test_strict_mode_refuses_as_recorded(version: str, tmp_path: Path) -> None:
    """Rate limits with and without Retry-After, batch and query limits; 1.11 has no strict mode."""
    if version != "1.18.3":
        pytest.skip("strict mode came with 1.13")
    recording = rows(version, "strict")
    left_out = {"strict: unindexed filter", "strict: 20 points", "strict: 20 more"}
    wrong, compared = [], 0
    with _server(tmp_path, version) as server:
        replay = Replay(server.url, version, own_snapshots=False)
        for row in recording:
            if REAL or row["title"] not in left_out:
                wrong += [f"{row['title']}: {line}" for line in replay.run(row)]
                compared += 1
    reason = "no tool of ours filters by unindexed keys or sets a limit to a collection's size"
    _print_summary(
        "strict",
        version,
        compared,
        len(recording),
        [] if REAL else [f"{one}: {reason}" for one in sorted(left_out)],
    )
    assert not wrong, "\n".join(wrong)
