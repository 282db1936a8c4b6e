"""Every printed command works as pasted: from the script's working directory, with its flags, quoted for a shell."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess

import pytest

from lib import console as pasteable
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, SMALL
from tests.reembed_support import points_of
from tests.script_process import ROOT

pytestmark = pytest.mark.qdrant
FOLDER, SETTINGS = "My Backups (new)", "my $HOME 'settings'.env"
FLAGS = ("--env-file", SETTINGS, "--backup-dir", FOLDER)
OWN = ("PATH", "LANG", "HOME", "LD_LIBRARY_PATH")


@pytest.fixture
def filed(operator):
    """All settings are in a file that only --env-file names; without it everything goes to the default stores."""
    operator.load(60)
    settings = {name: value for name, value in operator.environ.items() if name not in OWN}
    settings |= {"VECTOR_SIZE": str(NEW_SIZE), "EMBEDDING_MODEL": LARGE}
    settings.pop("AUTOMEM_BACKUP_DIR")
    (operator.folder / SETTINGS).write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))
    operator.export(**dict.fromkeys([*settings, "AUTOMEM_BACKUP_DIR"], ""))
    return operator


def paste(operator, lines: str, *, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """The lines in a shell of the operator's folder."""
    env = {name: os.environ[name] for name in OWN if name in os.environ} | {"HOME": str(operator.folder)}
    done = subprocess.run(
        ["bash", "-ec", lines],
        cwd=operator.folder,
        env=env,
        text=True,
        capture_output=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == expect, (lines, done.stderr, done.stdout)
    return done


@pytest.mark.matrix
def test_the_undo_of_a_migration_pasted_into_a_shell_undoes_it(filed):
    filed.run("backup_automem", *FLAGS, env={"VECTOR_SIZE": str(OLD_SIZE), "EMBEDDING_MODEL": SMALL})
    before = points_of(filed)
    migrated = filed.run("reembed_embeddings", *FLAGS, "--json").json
    undo = migrated["undo"]
    assert filed.info()["config"]["params"]["vectors"]["size"] == NEW_SIZE
    commands = [line.strip() for line in undo.splitlines()]
    for line in commands:
        if "scripts/" in line:
            assert shlex.split(line)[2:6] == list(FLAGS)
    paste(filed, "\n".join(commands))
    assert filed.info()["config"]["params"]["vectors"]["size"] == OLD_SIZE
    assert points_of(filed).keys() == before.keys()
    page = next((filed.folder / FOLDER / "reports").glob("*.json"))
    assert json.loads(page.read_text())["undo"] == undo


@pytest.mark.matrix
def test_the_undo_of_vectors_of_an_unknown_model_adds_none_of_the_new_model(filed):
    """The backup was taken with the new settings."""
    filed.run("backup_automem", *FLAGS, "--only", "qdrant")
    before = points_of(filed)
    undo = filed.run("reembed_embeddings", *FLAGS, "--json").json["undo"]
    filed.cypher("MATCH (m:Memory) WITH m LIMIT 1 SET m.content = 'newer than the backup'")
    paid = filed.servers.openai.stats()["texts"]
    done = paste(filed, undo)
    after = points_of(filed)
    assert after.keys() == before.keys()
    assert all((vector == before[one][1]).all() for one, (_, vector) in after.items())
    assert filed.servers.openai.stats()["texts"] == paid
    active = [line for line in undo.splitlines() if not line.lstrip().startswith("#")]
    assert [line.split()[-1] for line in active[1:]] == [f"VECTOR_SIZE={OLD_SIZE}"]
    assert "EMBEDDING_MODEL=unknown" not in undo + done.stdout + done.stderr
    assert "which the backup does not record" in done.stdout


@pytest.mark.matrix
def test_the_remedy_of_a_refusal_can_be_pasted(filed):
    refused = filed.run("reembed_embeddings", *FLAGS, expect=2)
    steps = refused.err.split("\nnext:\n")[1]
    lines = [line.strip() for line in steps.splitlines() if line.strip()]
    assert len(lines) == 2
    paste(filed, "\n".join(lines))
    assert filed.info()["config"]["params"]["vectors"]["size"] == NEW_SIZE


def test_a_command_names_what_was_typed_and_no_login():
    words = ["--backup-dir=x", "latest", "--env-file", "e", "s3://u:secret@host/a b", "--abort"]
    text = pasteable.command_line("restore_from_backup", words)
    assert text == "python scripts/restore_from_backup.py latest 's3://host/a b' --abort"


def test_from_the_checkout_the_command_is_as_in_the_guide(monkeypatch):
    monkeypatch.chdir(ROOT)
    pasteable.remember_flags(None, None)
    shown = pasteable.pasteable({"undo": ["python scripts/backup_automem.py --list"]})
    assert shlex.split(shown["undo"][0])[1:] == ["scripts/backup_automem.py", "--list"]


def test_an_alias_is_refused_by_name_before_anything_is_embedded_or_written(operator):
    operator.load(60)
    real = operator.collection
    alias = f"{real} alias"
    actions = {"actions": [{"create_alias": {"collection_name": real, "alias_name": alias}}]}
    operator.qdrant.json("POST", "/collections/aliases", actions)
    env = {"QDRANT_COLLECTION": alias, "VECTOR_SIZE": str(NEW_SIZE), "EMBEDDING_MODEL": LARGE}
    operator.servers.openai.reset()
    for words in (
        ("reembed_embeddings",),
        ("reembed_embeddings", "--dry-run"),
        ("reembed_embeddings", "--only-missing"),
        ("reembed_embeddings", "--limit", "5"),
        ("backup_automem", "--only", "qdrant"),
        ("verify_migration",),
    ):
        refused = operator.run(*words, env=env, expect=2)
        assert f"is an alias at {operator.qdrant.display}, of the collection '{real}'" in refused.err
        assert f"export QDRANT_COLLECTION={real}\n" in refused.err
    assert operator.servers.openai.stats()["tokens"] == 0
    assert not list(operator.backups.glob("qdrant/*"))
    assert not list(operator.backups.glob("journal_*"))


def test_a_setting_that_hides_another_is_named_and_shown(operator):
    (operator.folder / ".env").write_text(
        "VECTOR_SIZE=3072\nVECTOR_SZE=1\nQDRANT_API_KEY=second-secret\nFALKORDB_TLS=no\n"
    )
    env = {"VECTOR_SIZE": "768", "QDRANT_API_KEY": "first-secret", "FALKORDB_TLS": "false"}
    result = operator.run("backup_automem", "--list", "-q", env=env)
    file = operator.folder / ".env"
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        f"warning: QDRANT_API_KEY (environment) hides another value in {file}:3",
        f"warning: VECTOR_SIZE=768 (environment) hides 3072 in {file}:1",
        f"warning: VECTOR_SZE ({file}:2) is not a setting and has no effect: did you mean VECTOR_SIZE?",
    ]
    shown = operator.run("backup_automem", "--show-config", "--json", env=env)
    assert shown.json["settings"]["VECTOR_SIZE"]["hides"] == f"3072 in {file}:1"
    assert "hides" not in shown.json["settings"]["FALKORDB_TLS"]
    assert "second-secret" not in shown.out + shown.err + result.err
    assert re.search(r"setting +from +value +hides", operator.run("backup_automem", "--show-config", env=env).out)


@pytest.mark.parametrize(
    "name",
    [
        "VECTOR_SIZE_AUTODETECT",
        "QDRANT_GRPC_PORT",
        "EMBEDDING_PROVIDER",
        "QDRANT_VECTOR_SIZE",
        "OLLAMA_MODEL",
    ],
)
def test_names_of_automem_are_not_taken_for_misspelt_ones(operator, name):
    (operator.folder / ".env").write_text(f"{name}=1\n")
    assert operator.run("backup_automem", "--list", "-q").err == ""


def test_a_link_to_an_env_file_that_is_gone_is_a_fault(operator):
    (operator.folder / ".env").symlink_to("../automem/.env")
    refused = operator.run("backup_automem", "--list", expect=2)
    assert "is a link to ../automem/.env, which does not exist" in refused.err


def test_a_dry_run_shows_its_plan_without_a_key_and_reports_that_the_real_run_lacks_a_backup(operator):
    operator.load(60)
    env = {"VECTOR_SIZE": str(NEW_SIZE), "EMBEDDING_MODEL": LARGE}
    keyless = operator.run("reembed_embeddings", "--dry-run", env={**env, "OPENAI_API_KEY": ""}, expect=2)
    assert "60 in the graph" in keyless.err
    assert "OPENAI_API_KEY is not set" in keyless.err
    tried = operator.run("reembed_embeddings", "--dry-run", "--json", env=env)
    assert "the run without --dry-run will be refused" in tried.err
    assert "there is none in" in tried.json["will_be_refused"][0]
    operator.run("backup_automem", "--only", "qdrant")
    assert operator.run("reembed_embeddings", "--dry-run", "--json", env=env).json["will_be_refused"] == []


@pytest.mark.matrix
def test_a_spot_check_announces_what_it_does_and_latest_can_be_checked(operator):
    operator.load(60)
    env = {"VECTOR_SIZE": str(NEW_SIZE), "EMBEDDING_MODEL": LARGE}
    plan = operator.run("reembed_embeddings", "--limit", "20", env=env).err
    assert "only read it: the check of 20 memories" in plan
    assert "stage " not in plan
    operator.run("backup_automem")
    checked = operator.run("backup_automem", "--check", "latest", "--json").json
    assert {one["path"] for one in checked["proofs"]} == {operator.rdb(), operator.archive()}


def test_a_missing_index_is_repaired_by_the_command_that_verify_prints(operator):
    operator.load(60)
    operator.call("DELETE", "/index/tags?wait=true")
    failed = operator.run("verify_migration", "--json", expect=4).json
    remedy = next(one["remedy"] for one in failed["checks"] if one["name"] == "payload indexes")
    paste(operator, remedy)
    assert "tags" in operator.info()["payload_schema"]


@pytest.mark.matrix
def test_a_name_that_resolves_only_in_docker_is_explained(operator):
    graph = operator.run("verify_migration", env={"FALKORDB_HOST": "falkordb-nowhere"}, expect=1)
    assert "resolves only inside Docker" in graph.err
    assert "export FALKORDB_HOST=localhost" in graph.err
    qdrant = operator.run("verify_migration", env={"QDRANT_URL": "http://qdrant-nowhere:6333"}, expect=1)
    assert "export QDRANT_URL=http://localhost:6333" in qdrant.err
    assert "Docker" not in operator.run("verify_migration", env={"FALKORDB_PORT": "1"}, expect=1).err
