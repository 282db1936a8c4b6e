"""A Qdrant that keeps its snapshots in S3: no checksum, no length, no range requests; backup and migration work."""

from __future__ import annotations

import hashlib
import json

import pytest

from lib.clients.qdrant import snapshots
from lib.errors import StoreFailed
from tests.http_proxy import HttpProxy
from tests.offsite_support import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from tests.operator_support import Operator, Servers
from tests.real_qdrant import RealQdrant, test_server
from tests.reembed_support import upgrade
from tests.restore_support import assert_tidy, spoil
from tests.sandbox.qdrant_server.process import QdrantServer

pytestmark = pytest.mark.qdrant

_CONFIG = "QDRANT__STORAGE__SNAPSHOTS_CONFIG__"


def real_settings(s3: S3Server) -> dict[str, str]:
    values = {"BUCKET": BUCKET, "REGION": "us-east-1", "ACCESS_KEY": ACCESS_KEY, "SECRET_KEY": SECRET_KEY}
    values["ENDPOINT_URL"] = s3.url
    config = {f"{_CONFIG}S3_CONFIG__{name}": value for name, value in values.items()}
    return {f"{_CONFIG}SNAPSHOTS_STORAGE": "s3", **config}


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A Qdrant with its snapshots in S3; a real server uses an S3 on this machine."""
    folder, binary = tmp_path_factory.mktemp("remote"), test_server()
    if binary is None:
        with QdrantServer(folder / "data", snapshot_store="s3") as server:
            yield server
        return
    with S3Server() as s3, RealQdrant(binary, folder, settings=real_settings(s3)) as server:
        yield server


@pytest.fixture
def operator(session_servers, remote, tmp_path):
    someone = Operator(Servers(session_servers.falkordb, remote.url, session_servers.openai), tmp_path)
    session_servers.openai.clear_faults()
    yield someone
    someone.clean_up()


@pytest.mark.matrix
def test_a_snapshot_without_a_checksum_is_backed_up_verified_and_restored(operator):
    operator.load(60)
    before = operator.state()
    operator.run("backup_automem", "--no-verify", expect=3)
    operator.run("backup_automem")
    component = json.loads(operator.manifests()[-1].read_text())["collection"]
    assert component["proof"] in {"checked", "restored"}
    assert component["points"] == component["promised_ids"] == before.points
    operator.run("backup_automem", "--check", "all")
    spoil(operator)
    operator.run("restore_from_backup", operator.archive())
    operator.run("restore_from_backup", operator.rdb())
    assert operator.state() == before
    assert_tidy(operator)


@pytest.mark.matrix
def test_a_migration_cuts_over_by_the_servers_own_snapshot(operator):
    operator.load(60)
    operator.run("backup_automem")
    upgrade(operator)
    done = operator.run("reembed_embeddings", "--json").json
    assert "fetch" in done["way"] or "snapshot" in done["way"], done["way"]
    assert operator.collections() == [operator.collection]
    operator.run("verify_migration")


# --- the download ------------------------------------------------------------------------------------------------


class Cutting(HttpProxy):
    """Breaks the connection after so many bytes of each download; `change` alters what later ones bring."""

    def __init__(self, port: int, after: list[int], *, change: bool = False, more: bytes = b"") -> None:
        super().__init__("127.0.0.1", port)
        self.after, self.change, self.more, self.downloads = after, change, more, 0

    def open(self) -> None:
        pass

    def answer(self, request, body) -> None:
        status, headers, content = request.forward(body)
        if not request.path.endswith(".snapshot") or request.command != "GET":
            request.reply(status, headers, content)
            return
        self.downloads += 1
        if self.change and self.downloads > 1:
            content = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        content += self.more
        cut = self.after.pop(0) if self.after else len(content)
        for at in range(0, cut, 50_000):
            piece = content[at : min(cut, at + 50_000)]
            request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if cut < len(content):
            request.close_connection = True
        else:
            request.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def made(operator, remote):
    """A snapshot on the server, and its bytes."""
    operator.load(20)
    snapshot = snapshots.create(operator.qdrant, operator.collection)
    assert snapshot.checksum is None
    whole = bytearray()
    snapshots.download(operator.qdrant, operator.collection, snapshot, whole.extend)
    assert len(whole) == snapshot.size
    return snapshot, bytes(whole)


def through(remote, after, **kinds):
    return Cutting(int(remote.url.rpartition(":")[2]), after, **kinds)


def test_a_broken_download_without_a_length_is_resumed(operator, remote, made):
    from lib.clients.qdrant.transport import Qdrant

    snapshot, whole = made
    cuts = [len(whole) // 8, len(whole) // 4, len(whole) // 10]
    with through(remote, cuts) as proxy:
        pauses: list[float] = []
        q = Qdrant(proxy.url, sleep=pauses.append)
        seen = bytearray()
        sha256 = snapshots.download(q, operator.collection, snapshot, seen.extend)
    assert bytes(seen) == whole
    assert sha256 == hashlib.sha256(whole).hexdigest()
    assert len(pauses) == 3


def test_a_download_of_another_length_is_refused(operator, remote, made):
    from lib.clients.qdrant.transport import Qdrant

    with through(remote, [], more=b"x") as proxy, pytest.raises(StoreFailed, match="longer than its length"):
        snapshots.download(Qdrant(proxy.url), operator.collection, made[0], lambda _piece: None)


def test_two_downloads_that_differ_are_no_backup(operator, remote):
    """The first one gives the checksum, the second one is stored."""
    operator.load(20)
    with through(remote, [], change=True) as proxy:
        result = operator.run("backup_automem", "--only", "qdrant", env={"QDRANT_URL": proxy.url}, expect=4)
    assert "sha256" in result.err
    assert operator.manifests() == []
    assert list((operator.backups / "qdrant").glob("*")) == []
