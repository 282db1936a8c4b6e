"""The connection to either store breaks, trickles, falls silent or answers with something else during a backup."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lib.backup.graph import GraphSource
from lib.backup.run import run_backup
from lib.clients.falkordb.connection import GraphAddress, connect
from lib.clients.falkordb.psync import stream_rdb
from lib.clients.qdrant.transport import Qdrant
from lib.errors import StoreFailed, StoreUnreachable
from lib.journal import open_journals
from tests.backup_support import assert_final_files_verify, assert_one_set, files, server_files
from tests.certificate import self_signed
from tests.faulty_proxy import Fault, FaultyProxy, answer
from tests.operator_support import Operator
from tests.restore_support import site, targets
from tests.sandbox.falkordb_server import FalkorServer

pytestmark = pytest.mark.qdrant
pytest_plugins = ["tests.backup_fixtures"]

EVERY_BYTE = 1 << 60
GET_COLLECTION = rb"^GET /collections/[^/?]+ "
SCROLL = rb"^POST /collections/[^/]+/points/scroll"
LIST = rb"^GET /collections/[^/]+/snapshots[ ?]"
CREATE = rb"^POST /collections/[^/]+/snapshots[ ?]"
DOWNLOAD = rb"^GET /collections/[^/]+/snapshots/\S"
DELETE = rb"^DELETE /collections/[^/]+/snapshots/\S"
ANY = rb"^[A-Z]+ /"
READS = {"collection": GET_COLLECTION, "scroll": SCROLL, "list": LIST, "download": DOWNLOAD}


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port
    return port


@contextmanager
def qdrant_proxy(operator: Operator, *faults: Fault) -> Iterator[FaultyProxy]:
    """Send all requests of the operator's commands to Qdrant through a proxy."""
    with FaultyProxy(port_of(operator.servers.qdrant_url), *faults) as proxy:
        operator.export(QDRANT_URL=f"http://127.0.0.1:{proxy.port}")
        yield proxy
    del operator.exports["QDRANT_URL"]


@contextmanager
def falkordb_proxy(operator: Operator, *faults: Fault, **more: ssl.SSLContext) -> Iterator[FaultyProxy]:
    with FaultyProxy(operator.servers.falkordb.port, *faults, **more) as proxy:
        operator.export(FALKORDB_PORT=proxy.port)
        yield proxy
    del operator.exports["FALKORDB_PORT"]


def back_up(operator: Operator, *, only: str = "", timeout: float = 30.0, verify: bool = False):
    """Take a backup within this process, over the proxies in the operator's settings; waits are cut short."""
    place, settings = site(operator), operator.environ
    address = GraphAddress("127.0.0.1", int(settings["FALKORDB_PORT"]))
    qdrant = Qdrant(settings["QDRANT_URL"], timeout_seconds=timeout, sleep=lambda _seconds: time.sleep(0.02))
    with connect(address) as conn:
        return run_backup(
            GraphSource(address, conn, operator.graph) if only != "qdrant" else None,
            replace(place.collection, qdrant=qdrant) if only != "falkordb" else None,
            place.folder,
            targets(operator),
            place.engines,
            place.bar,
            verify=verify,
        )


def assert_nothing_left(operator: Operator) -> None:
    assert files(operator) == []
    assert server_files(operator) == []
    assert open_journals(operator.backups) == []


def forget_backups(operator: Operator) -> None:
    shutil.rmtree(operator.backups, ignore_errors=True)


# --- cut at any byte ----------------------------------------------------------------------------------------------


@contextmanager
def framing(operator: Operator, diskless: str) -> Iterator[None]:
    """How the server frames the RDB: until a mark (diskless), or of a length (from its disk).

    The module's stream of past queries is excluded: it grows and is trimmed in jumps, so that no two answers are equal.
    """
    with connect(operator.servers.falkordb.address) as conn:
        before = conn.config_get("repl-diskless-sync")["repl-diskless-sync"]
        conn.config_set("repl-diskless-sync", diskless)
        conn.execute_command("GRAPH.CONFIG", "SET", "CMD_INFO", "no")
        conn.delete(f"telemetry{{{operator.graph}}}")
        try:
            yield
        finally:
            conn.execute_command("GRAPH.CONFIG", "SET", "CMD_INFO", "yes")
            conn.config_set("repl-diskless-sync", before)


@pytest.mark.parametrize("diskless", ["yes", "no"])
def test_the_replication_stream_is_cut_anywhere(backing, diskless):
    whole = Fault(b"PSYNC", cut=EVERY_BYTE)
    chance = random.Random(f"psync {diskless}")
    with framing(backing, diskless):
        with falkordb_proxy(backing, whole):
            back_up(backing, only="falkordb")
        forget_backups(backing)
        rdb = whole.passed - 300  # the server's newlines while it prepares make an answer a little longer or shorter
        borders = [(cut, "") for cut in (0, 1, 2, 13, 40, 56, 57, 58, 70, 100, rdb)]
        anywhere = [(chance.randrange(rdb), "" if number < 4 else "falkordb") for number in range(30)]
        for cut, only in [*borders, *anywhere]:  # a few cuts show what the collection's component becomes
            with (
                falkordb_proxy(backing, Fault(b"PSYNC", cut=cut)),
                pytest.raises(StoreUnreachable, match="closed"),
            ):
                back_up(backing, only=only)
            assert_nothing_left(backing)
    backing.run("backup_automem")
    assert_one_set(backing)


def test_the_last_bytes_of_either_framing(backing, tmp_path):
    """Cut at exact bytes: a server repeats the same recorded answer."""
    data = bytearray()
    stream_rdb(backing.servers.falkordb.address, data.extend)
    mark = b"0123456789abcdefghij0123456789ABCDEFGHIJ"
    hello = b"+FULLRESYNC 0123456789abcdef0123456789abcdef01234567 0\r\n"
    for head, tail in ((b"$EOF:%s\r\n" % mark, mark), (b"$%d\r\n" % len(data), b"")):
        reply = hello + head + bytes(data) + tail
        borders = [0, len(hello) - 1, len(hello), len(hello) + 5, len(hello + head) - 1, len(hello + head)]
        borders += [len(reply) - back for back in (1, 2, 8, 9, 39, 40, 41, 48, 49)]
        for cut in sorted(set(borders)):
            fault = Fault(b"PSYNC", answer=reply[:cut], hang_up=True)
            with falkordb_proxy(backing, fault) as proxy, pytest.raises(StoreUnreachable, match="closed"):
                stream_rdb(GraphAddress("127.0.0.1", proxy.port), lambda _piece: None)
        with falkordb_proxy(backing, Fault(b"PSYNC", answer=reply, hang_up=True)) as proxy:
            _, sha256 = stream_rdb(GraphAddress("127.0.0.1", proxy.port), lambda _piece: None)
        assert sha256 == hashlib.sha256(data).hexdigest()


def test_the_download_is_cut_anywhere_and_resumes_there(backing):
    whole = Fault(DOWNLOAD, cut=EVERY_BYTE)
    with qdrant_proxy(backing, whole):
        back_up(backing, only="qdrant")
    forget_backups(backing)
    chance = random.Random("download")
    borders = [0, 1, 200, 300, 400, 500, whole.passed - 512, whole.passed - 2, whole.passed - 1]
    for cut in [*borders, *(chance.randrange(whole.passed) for _ in range(33))]:
        fault = Fault(DOWNLOAD, cut=cut)
        with qdrant_proxy(backing, fault):
            back_up(backing, only="qdrant")
        assert fault.hits == 1
        assert_final_collections_verify(backing)
        assert server_files(backing) == []
        assert open_journals(backing.backups) == []
        forget_backups(backing)


def assert_final_collections_verify(operator: Operator) -> None:
    from tests.backup_support import assert_archive

    (manifest,) = operator.manifests()
    recorded = json.loads(manifest.read_text())["collection"]["file"]
    data = (operator.backups / recorded["name"]).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (recorded["size"], recorded["sha256"])
    assert_archive(data)


@pytest.mark.core
def test_a_download_that_breaks_again_and_again_still_arrives(backing):
    fault = Fault(DOWNLOAD, times=None, cut=150_000)
    with qdrant_proxy(backing, fault):
        back_up(backing)
    assert fault.hits > 1
    assert_final_files_verify(backing)


def test_a_download_that_never_gets_a_byte_through_is_given_up(backing):
    with qdrant_proxy(backing, Fault(DOWNLOAD, times=None, cut=0)):
        failed = backing.run("backup_automem", expect=1)
    assert "connection broke" in failed.err or "broken off" in failed.err
    assert_nothing_left(backing)


@pytest.mark.parametrize("request_", READS)
@pytest.mark.parametrize("cut", [0, 15, 120])
def test_a_question_whose_answer_is_cut_is_asked_again(backing, request_, cut):
    fault = Fault(READS[request_], cut=cut)
    with qdrant_proxy(backing, fault):
        back_up(backing)
    assert fault.hits == 1
    assert_one_set(backing)
    assert_final_files_verify(backing)


@pytest.mark.parametrize("request_", [CREATE, DELETE], ids=["create", "delete"])
@pytest.mark.parametrize("cut", [0, 15, 120])
def test_an_answer_that_is_lost_leaves_no_second_snapshot(backing, request_, cut):
    fault = Fault(request_, cut=cut)
    with qdrant_proxy(backing, fault):
        back_up(backing)
    assert fault.hits == 1
    assert_one_set(backing)
    assert_final_files_verify(backing)


# --- slow, and silent ---------------------------------------------------------------------------------------------


def test_slow_servers_are_waited_for(backing):
    slow = Fault(b"PSYNC", piece=512, pause=0.002), Fault(DOWNLOAD, piece=16384, pause=0.002)
    with falkordb_proxy(backing, slow[0]), qdrant_proxy(backing, slow[1]):
        backing.run("backup_automem")
    assert [one.hits for one in slow] == [1, 1]
    assert_one_set(backing)
    assert_final_files_verify(backing)


@pytest.mark.parametrize("silent", [0, 30, 60, 5_000, 60_000])
def test_a_falkordb_that_falls_silent_is_noticed(backing, monkeypatch, silent):
    monkeypatch.setattr("lib.clients.falkordb.psync.IDLE_SECONDS", 0.5)
    begun = time.monotonic()
    with (
        falkordb_proxy(backing, Fault(b"PSYNC", silent=silent)),
        pytest.raises(StoreUnreachable, match=r"has sent nothing for 0\.5 s"),
    ):
        back_up(backing)
    assert time.monotonic() - begun < 50  # the default timeout is a minute
    assert_nothing_left(backing)


@pytest.mark.parametrize("request_", ["collection", "scroll", "list"])
def test_a_qdrant_that_falls_silent_is_noticed(backing, request_):
    with qdrant_proxy(backing, Fault(READS[request_], times=None, silent=20)):
        begun = time.monotonic()
        with pytest.raises(StoreUnreachable, match=r"timed out|broke"):
            back_up(backing, timeout=0.5)
    assert time.monotonic() - begun < 50
    assert_nothing_left(backing)


@pytest.mark.parametrize("silent", [100, 100_000])
def test_a_download_that_falls_silent_resumes_over_another_connection(backing, silent):
    fault = Fault(DOWNLOAD, silent=silent)
    with qdrant_proxy(backing, fault):
        back_up(backing, timeout=2)
    assert fault.hits == 1
    assert_one_set(backing)
    assert_final_files_verify(backing)


def test_a_failed_qdrant_ends_the_command_in_bounded_time(backing):
    backing.export(QDRANT_TIMEOUT_SECONDS=1)
    with qdrant_proxy(backing, Fault(SCROLL, times=None, silent=0)):
        begun = time.monotonic()
        failed = backing.run("backup_automem", expect=1)
    assert time.monotonic() - begun < 50
    assert "timed out" in failed.err
    assert_nothing_left(backing)


# --- other answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [*READS, "create"])
@pytest.mark.parametrize("status", [500, 418])
def test_an_error_of_the_server_ends_it_with_nothing_left(backing, request_, status):
    pattern = {**READS, "create": CREATE}[request_]
    with (
        qdrant_proxy(backing, Fault(pattern, answer=answer(status, "the server is on fire"))),
        pytest.raises(StoreFailed, match="on fire"),
    ):
        back_up(backing)
    assert_nothing_left(backing)
    back_up(backing)
    assert_one_set(backing)


@pytest.mark.parametrize("request_", [*READS, "create", "delete"])
def test_a_rate_limit_that_names_its_end_is_waited_out(backing, request_):
    pattern = {**READS, "create": CREATE, "delete": DELETE}[request_]
    fault = Fault(pattern, times=2, answer=answer(429, "slow down", "Retry-After: 1\r\n"))
    with qdrant_proxy(backing, fault):
        back_up(backing)
    assert fault.hits == 2
    assert_one_set(backing)


@pytest.mark.parametrize("request_", READS)
@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_gateway_in_trouble_is_asked_again(backing, request_, status):
    fault = Fault(READS[request_], times=2, answer=answer(status, "Bad Gateway"))
    with qdrant_proxy(backing, fault):
        back_up(backing)
    assert fault.hits == 2
    assert_one_set(backing)


@pytest.mark.parametrize("skip", range(12))
def test_a_key_that_expires_during_the_backup(backing, skip):
    """From some request on, every request is refused, including the one that would delete the snapshot."""
    expired = Fault(ANY, skip=skip, times=None, answer=answer(403, "ExpiredSignature"))
    with qdrant_proxy(backing, expired):
        result = backing.run("backup_automem", expect=None)
    if expired.hits:
        assert result.code in {0, 2}, result.err
    if result.code == 2:
        assert "ExpiredSignature" in result.err
        assert "QDRANT_API_KEY" in result.err
        assert files(backing) == []
    backing.run("backup_automem")
    assert server_files(backing) == []
    assert_final_files_verify(backing)


REFUSALS = {
    "LOADING Redis is loading the dataset in memory": (1, "still loading"),
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL": (1, "busy with a script"),
    "NOMASTERLINK Can't SYNC while not connected with my master": (1, "name the master instead"),
    "MISCONF Redis is configured to save RDB snapshots": (1, "MISCONF"),
    "NOAUTH Authentication required.": (2, "FALKORDB_PASSWORD"),
    "WRONGPASS invalid username-password pair or user is disabled.": (2, "FALKORDB_PASSWORD"),
}


@pytest.mark.parametrize("text", REFUSALS, ids=lambda text: text.split(" ", 1)[0])
def test_a_refusal_of_the_replication_stream_is_reported(backing, text):
    code, words = REFUSALS[text]
    with falkordb_proxy(backing, Fault(b"PSYNC", answer=f"-{text}\r\n".encode())):
        failed = backing.run("backup_automem", expect=code)
    assert words in failed.err
    assert_nothing_left(backing)
    backing.run("backup_automem")
    assert_one_set(backing)


@pytest.mark.parametrize(
    "text",
    [
        "NOPERM User default has no permissions to run the 'psync' command",
        "ERR unknown command 'PSYNC', with args beginning with: '?' '-1'",
    ],
    ids=["NOPERM", "unknown"],
)
def test_without_the_stream_the_graph_is_dumped_and_the_manifest_records_why(backing, text):
    with falkordb_proxy(backing, Fault(b"PSYNC", times=None, answer=f"-{text}\r\n".encode())):
        manifest = backing.run("backup_automem", "--json").json
    assert manifest["graph"]["kind"] == "dump"
    assert manifest["graph"]["proof"] == "restored"
    assert_final_files_verify(backing)
    backing.run("backup_automem", "--check", "all")


def test_a_user_who_may_neither_stream_nor_dump_gets_the_missing_grants_reported(backing):
    with connect(backing.servers.falkordb.address) as conn:
        conn.execute_command("ACL", "SETUSER", "poor", "on", ">pw", "~*", "+@all", "-psync", "-replconf", "-dump")
        backing.export(FALKORDB_USERNAME="poor", FALKORDB_PASSWORD="pw")
        failed = backing.run("backup_automem", expect=2)
        assert "dump" in failed.err
        assert "ACL SETUSER" in failed.err
        assert_nothing_left(backing)
        conn.execute_command("ACL", "SETUSER", "poor", "+dump")
        assert backing.run("backup_automem", "--json").json["graph"]["kind"] == "dump"
        conn.execute_command("ACL", "SETUSER", "poor", "+psync", "+replconf")
        assert backing.run("backup_automem", "--json").json["graph"]["kind"] == "rdb"
        conn.execute_command("ACL", "DELUSER", "poor")


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, ssl.SSLContext]:
    path, key = self_signed(tmp_path_factory.mktemp("tls"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key)
    return path, context


@contextmanager
def locked_falkordb(folder: Path) -> Iterator[FalkorServer]:
    falkor = FalkorServer(folder, password="a secret, 'quoted'", sync_delay_seconds=0).start()
    try:
        yield falkor
    finally:
        falkor.kill()


@pytest.mark.core
def test_tls_and_a_password(loaded, tmp_path, certificate):
    """The servers of the wheels have no TLS: a proxy terminates it, as with hosted servers."""
    path, context = certificate
    with locked_falkordb(tmp_path / "locked") as locked:
        backing = Operator(replace(loaded.servers, falkordb=locked), tmp_path, collection=loaded.collection)
        backing.export(FALKORDB_TLS="true", FALKORDB_HOST="localhost", SSL_CERT_FILE=path)
        backing.export(FALKORDB_PASSWORD="a secret, 'quoted'")
        backing.cypher("UNWIND range(1, 3000) AS i CREATE (:Memory {id: toString(i), content: 'memory ' + i})")
        with falkordb_proxy(backing, tls=context):
            backing.run("backup_automem")
            assert_one_set(backing)
            forget_backups(backing)
            for change, words in (
                ({"FALKORDB_PASSWORD": "wrong"}, "refused the login"),
                ({"SSL_CERT_FILE": ""}, "ertificate"),
                ({"FALKORDB_TLS": "false"}, "FalkorDB at localhost"),
            ):
                failed = backing.run("backup_automem", expect=None, env=change)
                assert failed.code in {1, 2}
                assert words in failed.err
                assert "a secret" not in failed.err
                assert_nothing_left(backing)
        for cut in (0, 57, 5_000):
            with falkordb_proxy(backing, Fault(b"PSYNC", cut=cut), tls=context):
                failed = backing.run("backup_automem", expect=1)
            assert "FalkorDB at localhost" in failed.err
            assert_nothing_left(backing)
