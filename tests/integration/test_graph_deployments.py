"""FalkorDB as deployments have it: unable to save, busy, in a redis cluster, with other modules, with an expiry."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis

from lib.clients.falkordb.connection import command, connect, temporary_name
from lib.errors import StoreFailed
from lib.journal import open_journals
from tests.graph_support import fill, unable_to_save
from tests.matrix import matrix
from tests.operator_support import LARGE, NEW_SIZE, Operator, Servers
from tests.restore_support import wait_for
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.process import free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[FalkorServer]:
    with running(tmp_path_factory.mktemp("falkordb")) as one:
        yield one


@contextmanager
def running(folder, *settings: str, limits: str | None = None, **options) -> Iterator[FalkorServer]:
    if limits is not None:
        options["limits"] = limits
    one = FalkorServer(folder / "data", sync_delay_seconds=0, settings=settings, **options)
    one.start()
    try:
        yield one
    finally:
        one.kill()


def operator_of(session_servers, server, folder) -> Operator:
    return Operator(Servers(server, session_servers.qdrant_url, session_servers.openai), folder)


@pytest.fixture
def operator(session_servers, server, tmp_path) -> Iterator[Operator]:
    """An operator of that server."""
    someone = operator_of(session_servers, server, tmp_path)
    yield someone
    someone.clean_up()


def component(operator) -> dict:
    """The graph component of the newest set."""
    return operator.run("backup_automem", "--list", "--json").json["sets"][0]["graph"]


# --- a server that cannot save -----------------------------------------------------------------------------------


def test_a_server_that_cannot_save_is_backed_up_with_a_warning(operator):
    operator.load(40)
    before = operator.state()
    with unable_to_save(operator.servers.falkordb):
        result = operator.run("backup_automem", "-q")
        assert "cannot save its data: its last snapshot (BGSAVE) failed" in result.err
        for script in ("verify_migration", "reembed_embeddings"):
            words = ("--dry-run",) if script == "reembed_embeddings" else ()
            assert "cannot save its data" in operator.run(script, *words).err
        planned = operator.run("restore_from_backup", operator.rdb(), "--dry-run", expect=1)
        assert "accepts no writes now" in planned.err
        assert "df -h" in planned.err
    assert component(operator)["proof"] == "restored"
    assert component(operator)["digest"] == before.graph
    assert operator.state() == before
    assert "cannot save" not in operator.run("backup_automem").err


def test_a_server_that_cannot_write_its_rdb_for_a_replica_is_dumped(operator):
    """Without diskless sync the RDB for PSYNC goes over the disk that is full."""
    operator.load(40)
    before = operator.state()
    with unable_to_save(operator.servers.falkordb, **{"repl-diskless-sync": "no"}):
        operator.run("backup_automem", "--only", "falkordb")
    assert component(operator)["digest"] == before.graph
    assert component(operator)["proof"] == "restored"


def test_a_server_whose_save_hangs_is_dumped(session_servers, tmp_path, monkeypatch):
    """It sends no RDB before the save ends that it began before."""
    monkeypatch.setattr("lib.clients.falkordb.psync.PREPARE_SECONDS", 1.0)
    with FalkorServer(tmp_path / "falkordb", sync_delay_seconds=0) as falkordb, connect(falkordb.address) as conn:
        operator = Operator(replace(session_servers, falkordb=falkordb), tmp_path / "work")
        operator.folder.mkdir()
        operator.load(40)
        before = operator.state().graph
        fill(conn, "another", 30_000, characters=300)  # so that the save takes a moment
        conn.bgsave()
        tasks = Path(f"/proc/{falkordb.pid}/task").glob("*/children")
        child = int(next(filter(None, (one.read_text() for one in tasks))))
        os.kill(child, signal.SIGSTOP)
        try:
            operator.run("backup_automem", "--only", "falkordb")
        finally:
            os.kill(child, signal.SIGCONT)
        assert component(operator)["digest"] == before
        assert component(operator)["kind"] == "dump"
        assert "has not begun to send its RDB for 1 s" in component(operator)["proof_note"]
        operator.clean_up()


# --- an address of IPv6 -------------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_a_backup_of_a_server_that_is_named_by_its_ipv6_address_can_be_read_again(session_servers, tmp_path):
    """A private network of Railway's has such addresses alone."""
    with running(tmp_path, "bind 127.0.0.1 ::1") as server:
        operator = operator_of(session_servers, server, tmp_path)
        operator.load(40)
        before = operator.state()
        operator.export(FALKORDB_HOST="::1")
        operator.run("backup_automem")
        assert component(operator)["server"]["address"] == f"::1:{server.port}"
        operator.run("backup_automem", "--check", "all")
        operator.cypher("MATCH (m:Memory) DELETE m")
        operator.run("restore_from_backup", "latest")
        assert operator.state() == before
        operator.clean_up()


# --- a full queue ------------------------------------------------------------------------------------------------


def test_a_full_queue_is_waited_for(session_servers, tmp_path):
    """Bursts of other clients' queries: a query that the server refuses before it executes it is sent again."""
    with running(tmp_path, limits="MAX_QUEUED_QUERIES 1 THREAD_COUNT 1 RESULTSET_SIZE 10000") as server:
        operator = operator_of(session_servers, server, tmp_path)
        operator.load(40)
        before = operator.state()
        stop, refused = threading.Event(), []

        def burst() -> None:
            with redis.Redis(port=server.port) as conn:
                while not stop.is_set():
                    try:
                        conn.execute_command(
                            "GRAPH.RO_QUERY", operator.graph, "UNWIND range(1, 200000) AS x RETURN sum(x)"
                        )
                    except redis.exceptions.ResponseError as error:
                        refused.append(str(error))
                        time.sleep(0.05)
                    time.sleep(0.01)

        threads = [threading.Thread(target=burst) for _ in range(4)]
        for one in threads:
            one.start()
        try:
            assert wait_for(lambda: len(refused) > 5, 60)
            operator.run("backup_automem", "--only", "falkordb")
        finally:
            stop.set()
            for one in threads:
                one.join()
        assert set(refused) == {"Max pending queries exceeded"}
        assert component(operator)["digest"] == before.graph


def test_a_queue_that_stays_full_is_named(server, monkeypatch):
    """The command is sent again for a minute, by a clock that only the pauses between the attempts move."""
    began = datetime(2026, 1, 1)  # noqa: DTZ001 - as backoff reads it
    now, asked = [began], []

    def pause(seconds: float) -> None:
        now[0] += timedelta(seconds=seconds)

    def refuse(*words: object, **_options: object) -> None:
        asked.append(words)
        raise redis.exceptions.ResponseError("Max pending queries exceeded")

    monkeypatch.setattr("backoff._sync.time", SimpleNamespace(sleep=pause))
    clock = SimpleNamespace(now=lambda: now[0])
    monkeypatch.setattr("backoff._sync.datetime", SimpleNamespace(datetime=clock))
    with connect(server.address) as conn:
        monkeypatch.setattr(conn.reads, "execute_command", refuse)
        with pytest.raises(StoreFailed, match="refused a query for a minute") as caught:
            command(conn, "GRAPH.RO_QUERY", "g", "RETURN 1")
    assert len(asked) > 3
    assert now[0] - began == timedelta(minutes=1)
    assert "MAX_QUEUED_QUERIES" in caught.value.next_step


# --- a redis cluster ---------------------------------------------------------------------------------------------


@contextmanager
def cluster_node(folder) -> Iterator[FalkorServer]:
    with running(folder, "cluster-enabled yes", f"cluster-port {free_port()}") as one:
        yield one


def serve(conn: redis.Redis, *ranges: tuple[int, int]) -> None:
    for first, last in ranges:
        conn.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)


def cluster_is_up(conn: redis.Redis) -> bool:
    return b"cluster_state:ok" in conn.execute_command("CLUSTER", "INFO")


@pytest.mark.parametrize("tagged", matrix([False, True], True))
def test_a_graph_in_a_redis_cluster_is_backed_up_and_restored(session_servers, tmp_path, tagged):
    with cluster_node(tmp_path) as server, connect(server.address) as conn:
        serve(conn, (0, 16383))
        assert wait_for(lambda: cluster_is_up(conn), 60, 0.05)
        operator = operator_of(session_servers, server, tmp_path)
        operator.graph += "_{tag}" if tagged else ""
        operator.load(40)
        before = operator.state()
        operator.run("backup_automem")
        assert component(operator)["proof"] == "restored"
        operator.cypher("MATCH (m:Memory) WHERE id(m) % 3 = 0 DETACH DELETE m")
        operator.run("restore_from_backup", operator.rdb(), "--dry-run")
        operator.run("restore_from_backup", operator.rdb())
        assert operator.state() == before
        assert [name.decode() for name in conn.execute_command("GRAPH.LIST")] == [operator.graph]
        assert open_journals(operator.backups) == []


@pytest.mark.matrix
def test_a_graph_that_another_node_of_the_cluster_holds_is_named(session_servers, tmp_path):
    with (
        cluster_node(tmp_path / "one") as one,
        cluster_node(tmp_path / "two") as two,
        connect(one.address) as here,
        connect(two.address) as there,
    ):
        operator = operator_of(session_servers, one, tmp_path)
        slot = int(here.execute_command("CLUSTER", "KEYSLOT", operator.graph))
        serve(there, (slot, slot))
        serve(here, *[(a, b) for a, b in ((0, slot - 1), (slot + 1, 16383)) if a <= b])
        bus = two._settings[1].split()[1]
        here.execute_command("CLUSTER", "MEET", "127.0.0.1", two.port, bus)
        assert wait_for(lambda: cluster_is_up(here) and cluster_is_up(there), 60, 0.05)
        for words in (("backup_automem", "--only", "falkordb"), ("reembed_embeddings", "--dry-run")):
            text = operator.run(*words, expect=1).err
            assert f"another node holds this graph: 127.0.0.1:{two.port}" in text
            assert f"set FALKORDB_HOST and FALKORDB_PORT to 127.0.0.1:{two.port}" in text


@pytest.mark.parametrize("graph", ["a}b", "a{}b"])
def test_a_name_that_has_no_neighbour_in_its_slot_is_refused(monkeypatch, server, graph):
    from lib.clients.falkordb import connection as client

    with connect(server.address) as conn:
        assert temporary_name(conn, graph, "pre", "1") == f"{graph}__pre_1"
        monkeypatch.setattr(client, "_in_cluster", lambda _conn: True)
        with pytest.raises(StoreFailed, match="redis cluster"):
            temporary_name(conn, graph, "pre", "1")
        for other in ("memories", "a{b", "{tag}x", "x{tag}"):
            name = temporary_name(conn, other, "pre", "1").encode()
            assert redis.cluster.key_slot(name) == redis.cluster.key_slot(other.encode())


# --- other modules' keys -----------------------------------------------------------------------------------------

MODULE = r"""
#include <stddef.h>
typedef struct Ctx Ctx; typedef struct Str Str; typedef struct Key Key; typedef struct Type Type; typedef struct IO IO;
typedef struct { unsigned long long version; void *(*load)(IO *, int); void (*save)(IO *, void *); void *rewrite;
                 void *mem_usage; void *digest; void (*free)(void *); void *rest[16]; } Methods;
static int (*GetApi)(const char *, void *);
static int (*SetModuleAttribs)(Ctx *, const char *, int, int);
static Type *(*CreateDataType)(Ctx *, const char *, int, Methods *);
static int (*CreateCommand)(Ctx *, const char *, int (*)(Ctx *, Str **, int), const char *, int, int, int);
static Key *(*OpenKey)(Ctx *, Str *, int);
static int (*ModuleTypeSetValue)(Key *, Type *, void *);
static void (*CloseKey)(Key *);
static int (*ReplyWithLongLong)(Ctx *, long long);
static void (*SaveUnsigned)(IO *, unsigned long long);
static unsigned long long (*LoadUnsigned)(IO *);
static Type *type; static int value;
static void *load(IO *io, int v) { LoadUnsigned(io); return &value; }
static void save(IO *io, void *p) { SaveUnsigned(io, 7); }
static void drop(void *p) { }
static int set(Ctx *ctx, Str **argv, int argc) {
  Key *key = OpenKey(ctx, argv[1], 3); ModuleTypeSetValue(key, type, &value); CloseKey(key);
  return ReplyWithLongLong(ctx, 1);
}
int RedisModule_OnLoad(Ctx *ctx, Str **argv, int argc) {
  GetApi = (int (*)(const char *, void *))((void **)ctx)[0];
  GetApi("RedisModule_SetModuleAttribs", &SetModuleAttribs); GetApi("RedisModule_CreateDataType", &CreateDataType);
  GetApi("RedisModule_CreateCommand", &CreateCommand); GetApi("RedisModule_OpenKey", &OpenKey);
  GetApi("RedisModule_ModuleTypeSetValue", &ModuleTypeSetValue); GetApi("RedisModule_CloseKey", &CloseKey);
  GetApi("RedisModule_ReplyWithLongLong", &ReplyWithLongLong);
  GetApi("RedisModule_SaveUnsigned", &SaveUnsigned); GetApi("RedisModule_LoadUnsigned", &LoadUnsigned);
  SetModuleAttribs(ctx, "othermod", 1, 1);
  static Methods methods = {1, load, save, NULL, NULL, NULL, drop};
  type = CreateDataType(ctx, "othertype", 0, &methods);
  return CreateCommand(ctx, "other.set", set, "write", 1, 1, 1);
}
"""


@pytest.fixture(scope="module")
def other_module(tmp_path_factory) -> Iterator[FalkorServer]:
    """A FalkorDB with a key of another module."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a redis module with")
    folder = tmp_path_factory.mktemp("module")
    (folder / "other.c").write_text(MODULE)
    words = [compiler, "-shared", "-fPIC", "-w", "-o", folder / "other.so", folder / "other.c"]
    subprocess.run(words, check=True)
    with running(folder, f"loadmodule {folder / 'other.so'}") as server, connect(server.address) as conn:
        assert conn.execute_command("other.set", "of the other module") == 1
        yield server


@pytest.fixture
def neighboured(session_servers, other_module, tmp_path) -> Iterator[Operator]:
    someone = operator_of(session_servers, other_module, tmp_path)
    someone.load(40)
    yield someone
    someone.clean_up()


@pytest.mark.matrix
def test_a_graph_among_another_modules_keys_is_dumped_and_verified(neighboured):
    before = neighboured.state()
    neighboured.run("backup_automem")
    taken = component(neighboured)
    assert (taken["kind"], taken["digest"]) == ("dump", before.graph)
    assert taken["proof"] == "restored"
    assert "the redis module othermod" in taken["proof_note"]
    neighboured.run("backup_automem", "--check", "all")
    neighboured.cypher("MATCH (m:Memory) WHERE id(m) % 3 = 0 DETACH DELETE m")
    neighboured.run("restore_from_backup", "latest")
    assert neighboured.state() == before
    with connect(neighboured.servers.falkordb.address) as conn:
        assert conn.type("of the other module") == b"othertype"
    neighboured.export(VECTOR_SIZE=NEW_SIZE, EMBEDDING_MODEL=LARGE)
    neighboured.run("backup_automem")
    neighboured.run("reembed_embeddings")


def test_an_rdb_with_another_modules_keys_is_checked_and_never_damaged(neighboured, monkeypatch):
    """A file as an earlier version or redis-cli took it."""
    monkeypatch.setattr("lib.backup.graph.foreign_modules", lambda *_: [])
    result = neighboured.run("backup_automem", "--only", "falkordb")
    assert "data of the redis module 'othertype'" in result.out
    assert (component(neighboured)["kind"], component(neighboured)["proof"]) == ("rdb", "checked")
    checked = neighboured.run("backup_automem", "--check", "all")
    assert "DAMAGED" not in checked.out
    assert "'othertype'" in checked.out
    refused = neighboured.run("restore_from_backup", neighboured.rdb(), expect=1)
    assert "'othertype'" in refused.err
    assert "take a backup with DUMP, which these scripts use on such a server" in refused.err


# --- what a graph restore does not bring back --------------------------------------------------------------------


@pytest.mark.matrix
def test_a_graph_with_an_expiry_is_backed_up_so_that_it_outlives_it(operator):
    """An RDB includes the expiry: after that moment no server would load the graph from it."""
    operator.load(40)
    before = operator.state()
    with connect(operator.servers.falkordb.address) as conn:
        conn.pexpire(operator.graph, 6000)
        started = operator.run("backup_automem", "--only", "falkordb")
        assert "has an expiry: the server deletes it at 20" in started.err
        assert f"PERSIST {operator.graph}" in started.err
        assert component(operator)["kind"] == "dump"
        assert component(operator)["expires"].startswith("20")
        assert wait_for(lambda: not conn.exists(operator.graph), 30, 0.05)
    operator.run("backup_automem", "--check", "all")
    err = operator.run("restore_from_backup", operator.rdb()).err
    assert "the backup's key had an expiry (20" in err
    with connect(operator.servers.falkordb.address) as conn:
        assert conn.pttl(operator.graph) == -1
    assert operator.state() == before


@pytest.mark.matrix
def test_function_libraries_are_named_by_backup_and_restore(operator):
    operator.load(40)
    code = "function f(x) { return x + 1; } falkor.register('f', f);"
    with connect(operator.servers.falkordb.address) as conn:
        try:
            conn.execute_command("GRAPH.UDF", "LOAD", "mine", code)
        except redis.exceptions.ResponseError as error:
            pytest.skip(f"this FalkorDB has no function libraries: {error}")
        try:
            assert "(GRAPH.UDF): mine" in operator.run("backup_automem", "--only", "falkordb").err
            assert component(operator)["functions"] == ["mine"]
            err = operator.run("restore_from_backup", operator.rdb(), "--dry-run").err
            assert "function libraries" not in err
        finally:
            conn.execute_command("GRAPH.UDF", "DELETE", "mine")
    for words in (("--dry-run",), ()):
        err = operator.run("restore_from_backup", operator.rdb(), *words).err
        assert "this one lacks: mine" in err
