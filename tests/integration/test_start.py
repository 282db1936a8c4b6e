"""What a command loads: nothing heavy that it does not use. Checked by names, as times depend on the machine."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.matrix import matrix
from tests.script_process import ROOT

HEAVY = {"openai", "tiktoken", "qdrant_client", "numpy", "rich", "fsspec", "paramiko", "qdrant_edge"}
_IMPORTED = re.compile(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\w+)", re.MULTILINE)


@pytest.fixture(scope="module")
def loaded(session_servers, tmp_path_factory):
    from tests.operator_support import Operator

    someone = Operator(session_servers, tmp_path_factory.mktemp("loaded"))
    someone.load(60)
    someone.run("backup_automem")
    yield someone
    someone.clean_up()


def heavy(operator, script: str, *words: str) -> set[str]:
    """The heavy packages that a command loads (https://docs.python.org/3/using/cmdline.html, -X importtime)."""
    shown = operator.run(script, *words, env={"PYTHONPROFILEIMPORTTIME": "1"}, expect=None)
    names = set(_IMPORTED.findall(shown.err))
    assert "lib" in names
    return names & HEAVY


@pytest.mark.parametrize(
    "words",
    matrix(
        [[], ["--no-verify"], ["--dry-run"], ["--check", "all"], ["--list"], ["--cleanup", "--dry-run"]],
        [],
        ["--check", "all"],
    ),
)
def test_a_backup_loads_nothing_heavy(loaded, words):
    assert heavy(loaded, "backup_automem", *words) == set()


def test_a_restore_of_the_graph_loads_nothing_heavy(loaded):
    assert heavy(loaded, "restore_from_backup", loaded.rdb(), "--dry-run") == set()


def test_verification_looks_at_vectors_and_embeds_nothing(loaded):
    assert heavy(loaded, "verify_migration") <= {"numpy"}


def test_a_reembedding_that_has_nothing_to_embed_loads_no_provider(loaded):
    loaded.run("reembed_embeddings")
    loaded.run("backup_automem")
    assert heavy(loaded, "reembed_embeddings") <= {"numpy"}


@pytest.mark.parametrize(
    "command",
    matrix(
        [
            ["backup_automem"],
            ["backup_automem", "--check", "all"],
            ["reembed_embeddings", "--limit", "10"],
            ["restore_from_backup", "latest"],
            ["verify_migration"],
        ],
        ["reembed_embeddings", "--limit", "10"],
    ),
)
def test_a_command_leaves_nothing_open_and_uses_nothing_deprecated(loaded, command):
    shown = loaded.run(*command, env={"PYTHONWARNINGS": "default"})
    assert "Warning:" not in shown.err


def test_the_sandbox_without_its_packages_names_what_installs_them():
    run = "import runpy; runpy.run_path('scripts/quickstart.py', run_name='__main__')"
    words = [sys.executable, "-c", f"import sys; sys.modules['starlette'] = None; sys.argv = ['quickstart.py']; {run}"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "the sandbox needs packages that are not installed: starlette" in result.stderr
    assert "pip install -r requirements-dev.txt" in result.stderr
