"""--show-config: each value with its origin, and what the servers hold, if they answer."""

from __future__ import annotations

import re

import pytest

from lib.backup.phases import DELETING
from lib.config import DEFAULTS, load_config
from lib.journal import start_journal
from tests.sandbox.process import free_port
from tests.script_process import ROOT

pytestmark = pytest.mark.qdrant
SCRIPTS = ("backup_automem", "reembed_embeddings", "restore_from_backup", "verify_migration")
SECRET = "s3cr3t-that-nobody-sees"


def test_each_value_with_its_origin_and_the_live_state(operator):
    operator.load()
    (operator.folder / ".env").write_text(f"A=1\nAUTOMEM_API_TOKEN={SECRET}\nFALKORDB_TLS=no\n")
    automem = operator.folder / "automem.env"
    automem.write_text("QDRANT_TIMEOUT_SECONDS=7\nFALKORDB_TLS=false\n")
    shown = operator.run("backup_automem", "--show-config", "--json", "--env-file", str(automem)).json
    settings = shown["settings"]
    assert set(settings) == set(DEFAULTS)
    assert settings["FALKORDB_GRAPH"] == {"value": operator.graph, "from": "environment"}
    assert settings["QDRANT_TIMEOUT_SECONDS"] == {"value": "7", "from": f"{automem}:1"}
    assert settings["FALKORDB_TLS"] == {"value": "false", "from": f"{automem}:2"}
    assert settings["AUTOMEM_API_TOKEN"] == {"value": "****", "from": f"{operator.folder / '.env'}:2"}
    assert settings["OPENAI_API_KEY"]["value"] == "****"
    assert settings["QDRANT_API_KEY"] == {"value": "(not set)", "from": "default"}
    points = operator.state().points
    assert shown["live"]["collection"] == (
        f"'{operator.collection}': {points} points, 48d Cosine, text-embedding-3-small (configured)"
    )
    assert shown["live"]["graph"].startswith(f"'{operator.graph}': ")
    assert shown["live"]["graph"].endswith("relationships")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_shows_the_same_and_touches_nothing(operator, script):
    result = operator.run(script, "--show-config")
    rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines() if line}
    assert rows["VECTOR_SIZE"] == ["environment", "48"]
    assert rows["FALKORDB_USERNAME"] == ["default"]
    assert f"graph '{operator.graph}' does not exist" in result.out
    assert f"'{operator.collection}'" in result.out
    assert result.err == ""
    assert not operator.backups.exists()


def test_it_answers_with_the_servers_down(operator, monkeypatch):
    monkeypatch.setattr("lib.clients.qdrant.transport.PAUSES_SECONDS", (0.02, 0.02, 0.02))
    operator.export(FALKORDB_PORT=free_port(), QDRANT_URL=f"http://me:{SECRET}@127.0.0.1:{free_port()}")
    result = operator.run("verify_migration", "--show-config", "--json")
    assert result.json["live"]["graph"].startswith("unknown: FalkorDB at 127.0.0.1:")
    assert result.json["live"]["collection"].startswith("unknown: Qdrant at http://127.0.0.1:")
    assert result.json["settings"]["QDRANT_URL"]["value"].startswith("http://****@127.0.0.1:")
    assert SECRET not in result.out + result.err


def test_a_file_of_the_working_directory_counts_if_nothing_is_exported(operator):
    env_file = operator.folder / ".env"
    env_file.write_text("EMBEDDING_MODEL=one\nEMBEDDING_MODEL=two\n")
    operator.export(EMBEDDING_MODEL="")
    shown = operator.run("backup_automem", "--show-config", "--json").json
    assert shown["settings"]["EMBEDDING_MODEL"] == {"value": "two", "from": f"{env_file}:2"}


def test_every_command_reports_a_run_that_never_ended(operator):
    operator.backups.mkdir()
    mine = load_config(operator.environ).targets()
    journal = start_journal(operator.backups, "reembed", mine)
    journal.append("deleting", undo="  the way back")
    start_journal(operator.backups, "backup", ["falkordb elsewhere:1 g", "qdrant elsewhere:2 c"])
    start_journal(operator.backups, "backup", mine).close("done")
    for words in (
        ("backup_automem", "--list"),
        ("verify_migration",),
        ("restore_from_backup",),
        ("reembed_embeddings",),
    ):
        err = operator.run(*words, expect=None).err
        assert err.count("is unfinished, or still running") == 2
        resume = rf"resume:  \(with the same settings and arguments\)  \S+ {ROOT}/scripts/reembed_embeddings.py\n"
        assert re.search(rf"at: deleting\)\n  {resume}", err)
        assert f"{ROOT}/scripts/reembed_embeddings.py --abort\n" in err
        assert "undo:\n  the way back" in err
        assert "it works on other stores: falkordb elsewhere:1 g, qdrant elsewhere:2 c" in err
    assert operator.run("backup_automem", "--list", "-q").err == ""
    journal.append(DELETING)
    quiet = operator.run("backup_automem", "-q", expect=None).err  # "no collection" alone would mislead
    assert quiet.count("is unfinished, or still running") == 1
    assert "undo:\n  the way back" in quiet


def test_verbose_reports_the_settings_that_are_not_defaults(operator):
    err = operator.run("backup_automem", "--list", "-v", env={"QDRANT_API_KEY": SECRET}).err
    assert "VECTOR_SIZE=48   (environment)" in err
    assert "QDRANT_API_KEY=****   (environment)" in err
    assert "FALKORDB_TLS" not in err
    assert SECRET not in err
