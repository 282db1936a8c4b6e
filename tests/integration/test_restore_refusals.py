"""What a restore's target would refuse midway is reported before anything is touched, with what to do about it."""

from __future__ import annotations

import gc
import shlex
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests

from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.scratch import Engine
from tests.matrix import matrix
from tests.operator_support import Operator
from tests.restore_support import TIMEOUT, assert_tidy, site, spoil
from tests.sandbox.falkordb_server import FalkorServer

USER, PASSWORD = "half_granted", "secret-of-the-test"


@pytest.fixture
def ready(operator):
    """Stores that differ from their backup."""
    return make_ready(operator)


@pytest.fixture(scope="module")
def _untouched(session_servers, tmp_path_factory) -> Iterator[Operator]:
    someone = make_ready(Operator(session_servers, tmp_path_factory.mktemp("untouched")))
    before = someone.state()
    yield someone
    assert someone.state() == before
    someone.clean_up()


@pytest.fixture
def untouched(_untouched) -> Iterator[Operator]:
    """The same stores for all tests whose restores are refused: none changes anything."""
    before = dict(_untouched.exports)
    yield _untouched
    _untouched.exports = before


def make_ready(operator: Operator) -> Operator:
    operator.load(60)
    operator.run("backup_automem")
    spoil(operator)
    return operator


@contextmanager
def granted(operator, *rules: str):
    with connect(operator.servers.falkordb.address) as conn:
        conn.execute_command("ACL", "SETUSER", USER, "reset", "on", f">{PASSWORD}", "&*", *rules)
        operator.export(FALKORDB_USERNAME=USER, FALKORDB_PASSWORD=PASSWORD)
        try:
            yield
        finally:
            operator.export(FALKORDB_USERNAME="", FALKORDB_PASSWORD="")
            conn.execute_command("ACL", "DELUSER", USER)


def refused(operator, *words: str, code: int) -> str:
    """The output of both a dry run and a restore; the stores and the backup folder are as before."""
    before, files = operator.state(), sorted(operator.backups.rglob("*"))
    for more in (("--dry-run",), ()):
        result = operator.run("restore_from_backup", *words, *more, expect=code)
        assert (operator.state(), sorted(operator.backups.rglob("*"))) == (before, files)
    assert_tidy(operator)
    assert PASSWORD not in result.err
    return result.err


@pytest.mark.parametrize(
    ("lacking", "permission"),
    matrix(
        [
            ("-restore", "RESTORE"),
            ("-rename", "RENAME"),
            ("-multi", "MULTI/EXEC"),
            ("-exec", "MULTI/EXEC"),
            ("-graph.delete", "GRAPH.DELETE"),
            ("-dump", "DUMP"),
        ],
        ("-rename", "RENAME"),
    ),
)
def test_a_missing_permission_is_named_with_its_grant(untouched, lacking, permission):
    with granted(untouched, "~*", "+@all", lacking):
        text = refused(untouched, "latest", code=2)
        assert f"does not permit this user {permission} on '{untouched.graph}'" in text
        assert "+restore +rename +multi +exec +dump +graph.delete" in text
        follow_grant(untouched, text)
        untouched.run("restore_from_backup", "latest", "--dry-run")


def follow_grant(operator, text: str) -> None:
    """Send the printed ACL command, as the administrator."""
    (line,) = (one for one in text.splitlines() if "ACL SETUSER" in one)
    with connect(operator.servers.falkordb.address) as conn:
        conn.execute_command(*shlex.split(line.partition("--askpass ")[2]))


@pytest.mark.matrix
def test_a_user_of_this_key_alone_learns_which_other_names_are_needed(ready):
    with granted(ready, f"~{ready.graph}", "+@all"):
        follow_grant(ready, refused(ready, "latest", code=2))
        ready.run("restore_from_backup", "latest")


def test_a_user_of_another_key_learns_what_is_missing(untouched):
    with granted(untouched, "~other", "+@all"):
        text = untouched.run("backup_automem", expect=2).err
    assert "No permissions to access a key" in text
    assert "ACL SETUSER <user> ~<graph>*" in text


@pytest.mark.parametrize("policy", matrix(["noeviction", "allkeys-lru"], "noeviction"))
def test_a_memory_that_is_or_would_be_full(untouched, policy):
    with connect(untouched.servers.falkordb.address) as conn:
        used = conn.info("memory")["used_memory"]
        before = untouched.state()
        try:
            conn.config_set("maxmemory-policy", policy)
            conn.config_set("maxmemory", used + 1_000_000)
            text = refused(untouched, "latest", code=1)
            assert "CONFIG SET maxmemory" in text
            assert ("would delete other keys" in text) == (policy == "allkeys-lru")
            if policy == "noeviction":
                conn.config_set("maxmemory", used - 500_000)
                assert "no memory left" in refused(untouched, "latest", code=1)
        finally:
            conn.config_set("maxmemory", 0)
            conn.config_set("maxmemory-policy", "noeviction")
        assert untouched.state() == before


@pytest.mark.matrix
def test_a_replica_names_its_master(untouched):
    with connect(untouched.servers.falkordb.address) as conn:
        try:
            conn.execute_command("REPLICAOF", "127.0.0.1", "1")
            text = refused(untouched, "latest", code=1)
        finally:
            conn.execute_command("REPLICAOF", "NO", "ONE")
    assert "read-only replica" in text
    assert "export FALKORDB_HOST=127.0.0.1 FALKORDB_PORT=1\n" in text


@pytest.mark.matrix
def test_a_key_that_is_no_graph_is_not_overwritten(ready):
    with connect(ready.servers.falkordb.address) as conn:
        conn.execute_command("GRAPH.DELETE", ready.graph)
        conn.set(ready.graph, "somebody's own")
        text = ready.run("restore_from_backup", "latest", expect=1).err
        assert f"the name '{ready.graph}' is taken" in text
        assert conn.get(ready.graph) == b"somebody's own"
        assert not list(ready.backups.glob("journal_*_restore.jsonl"))
        conn.delete(ready.graph)
    ready.run("restore_from_backup", "latest")


@pytest.mark.qdrant
def test_an_alias_is_no_place_for_a_collection(ready):
    name, real = f"{ready.collection}_alias", ready.collection
    alias = {"create_alias": {"collection_name": real, "alias_name": name}}
    requests.post(
        f"{ready.servers.qdrant_url}/collections/aliases", json={"actions": [alias]}, timeout=TIMEOUT
    ).raise_for_status()
    archive = ready.archive()
    before = ready.state()
    text = ready.run("restore_from_backup", archive, "--dry-run", expect=2, env={"QDRANT_COLLECTION": name}).err
    assert f"export QDRANT_COLLECTION={real}" in text
    assert ready.state() == before


@contextmanager
def silent_server():
    """Takes connections and never answers, as a service that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def take() -> None:
            while True:
                try:
                    connections.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for one in connections:
            one.close()


@pytest.mark.matrix
def test_an_automem_that_takes_connections_and_stays_silent_may_run(ready):
    before = ready.state()
    with silent_server() as url:
        ready.export(AUTOMEM_API_URL=url)
        text = ready.run("restore_from_backup", ready.rdb(), expect=2).err
        assert "may be running" in text
        assert "docker compose stop flask-api" in text
        assert "AUTOMEM_API_URL" in text
        assert ready.state() == before
        assert "may be running" in ready.run("restore_from_backup", ready.rdb(), "--dry-run").err
    ready.run("restore_from_backup", ready.rdb())


def test_other_clients_are_named(ready):
    gc.collect()  # closes the connections of earlier runs in this process
    assert "other client" not in ready.run("restore_from_backup", ready.rdb(), "--dry-run").err
    gc.collect()
    with connect(ready.servers.falkordb.address) as conn:
        conn.execute_command("GRAPH.RO_QUERY", ready.graph, "RETURN 1")
        text = ready.run("restore_from_backup", ready.rdb(), "-q").err
    assert "1 other client of FalkorDB: 127.0.0.1:" in text
    assert "graph.ro_query" in text.lower()
    assert "until it is restarted" in text


@contextmanager
def falkor(folder, engine):
    server = FalkorServer(folder, engine=engine, sync_delay_seconds=0)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def test_a_target_of_an_older_encoding_is_reported_with_what_to_upgrade(operator, tmp_path, newer_engine):
    operator.load(40)
    before = operator.state()
    with falkor(tmp_path / "newer", newer_engine) as newer:
        operator.export(FALKORDB_PORT=newer.port)
        with connect(newer.address) as conn:
            conn.execute_command("GRAPH.QUERY", operator.graph, "CREATE (:Memory {id: 'x', content: 'y'})")
        operator.run("backup_automem", "--only", "falkordb")
    operator.export(FALKORDB_PORT=operator.servers.falkordb.port)
    text = operator.run("restore_from_backup", operator.rdb(), expect=1).err
    assert "cannot read" in text
    assert f"FalkorDB {newer_engine.falkordb_version} or later" in text
    assert operator.state() == before
    assert not list(operator.backups.glob("journal_*_restore.jsonl"))


@pytest.fixture
def newer_engine(operator) -> Engine:
    engines = site(operator).engines
    if len({engine.graph_encoding for engine in engines}) < 2:
        pytest.skip("one FalkorDB engine only is installed here")
    return engines[-1]
