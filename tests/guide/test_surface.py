"""Documents, --help and code name the same flags, variables, exit codes and fields: nothing more, nothing less."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import shlex
import sys

import pytest

from lib import cli, errors
from lib.backup import manifest, phases
from lib.config import DEFAULTS, PROJECT_ROOT
from lib.console import remember_flags
from tests.guide.documents import DOCUMENTS, EXAMPLE, FLAG, README, REFERENCE, ROOT, sections

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")
# Other programs' flags, with the program that a line must name.
FOREIGN = {
    "--force-recreate": "docker compose",
    "--rm": "docker compose",
    "--entrypoint": "docker compose",
    "--data-urlencode": "curl",
    "--rdb": "redis-cli",
    "--now": "systemctl",
    "--require-hashes": "pip install",
}
# Without an entry in DEFAULTS: read only from the environment, or only by tests.
ENVIRONMENT_ONLY = {"AUTOMEM_ENV_FILE"}
# AutoMem's own, other programs', and words that only look like a variable.
NOT_OURS = {
    "NO_COLOR",
    "KILLS_EACH",
    "CMD_INFO",
    "RESULTSET_SIZE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "FSSPEC_SFTP_PASSWORD",
    "FALKOR_PASSWORD",
    "REDISCLI_AUTH",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
}
# File names that look like one.
FILES = {"ENVIRONMENT_VARIABLES", "MONITORING_AND_BACKUPS", "RAILWAY_DEPLOYMENT", "YYYYMMDD_HHMMSS"}


def actions(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def flags_of(script: str) -> set[str]:
    return actions(importlib.import_module(f"scripts.{script}").arguments())


COMMON = actions(cli.parser(""))


def table_flags(text: str) -> set[str]:
    """The flags in the first column of a section's tables."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return {flag for row in rows for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", row)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_reference_has_every_flag_of_a_script_and_no_other(script):
    own = flags_of(script) - (set() if script == "quickstart" else COMMON)
    assert table_flags(sections(REFERENCE)[f"{script}.py"]) == own


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_two_examples_that_the_parser_accepts(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"scripts/{script}.py"])
    remember_flags(None, None)  # those of a command that another test ran in this process
    parser = importlib.import_module(f"scripts.{script}").arguments()
    shown = parser.format_help()
    examples = re.search(r"\nexamples:\n((?:  .+\n)+)\nexit codes:\n", shown)
    assert examples, shown
    commands = [shlex.split(line) for line in examples[1].splitlines()]
    assert len(commands) == 2
    for _python, path, *words in commands:
        assert (ROOT / path).samefile(ROOT / "scripts" / f"{script}.py")
        assert words
        parser.parse_args(words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_a_command_is_in_a_group_by_what_it_may_change(script):
    parser = importlib.import_module(f"scripts.{script}").arguments()
    titles = {option: group.title for group in parser._action_groups for option in actions_of(group)}
    own = flags_of(script) - (actions(cli.Parser("")) if script == "quickstart" else COMMON)
    if script == "quickstart":
        assert {titles[flag] for flag in own} == {"options"}  # it works in a sandbox
        return
    assert {titles[flag] for flag in own} <= {cli.SAFE, cli.DESTRUCTIVE}
    assert titles["--dry-run" if script != "verify_migration" else "--sample"] == cli.SAFE
    destructive = {"--cleanup", "--unpin", "--in-place", "--only-missing", "--fresh", "--prune-spool", "--abort"}
    destructive |= {"--no-safety-backup", "--force-version", "--while-running", "--record", "--force-incomplete"}
    assert {titles[flag] for flag in own & destructive} == {cli.DESTRUCTIVE}


def actions_of(group) -> set[str]:
    return {option for action in group._group_actions for option in action.option_strings}


def test_the_version_is_that_of_the_project(capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("scripts.backup_automem").arguments().parse_args(["--version"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f'version = "{shown.split()[1]}"' in (ROOT / "pyproject.toml").read_text().splitlines()
    assert shown.startswith("automem-migration ")


def test_the_readme_has_every_common_flag():
    assert table_flags(sections(README)["The scripts"]) == COMMON


@pytest.mark.parametrize("document", [*DOCUMENTS, EXAMPLE], ids=lambda path: path.name)
def test_no_document_names_a_flag_that_does_not_exist(document):
    known = set().union(*(flags_of(script) for script in SCRIPTS))
    text = document.read_text()
    statements = text.replace("\\\n", " ").splitlines()
    for line in statements:
        for flag in FLAG.findall(line):
            assert flag in known or FOREIGN.get(flag, "\0") in line, f"{flag}: {line}"
            named = [script for script in SCRIPTS if f"scripts/{script}.py" in line]
            if named and flag not in FOREIGN:
                assert any(flag in flags_of(script) for script in named), line


def test_the_code_sends_nobody_to_a_flag_that_does_not_exist():
    """The next steps in messages are commands that work."""
    for path in [*(ROOT / "lib").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for script, rest in re.findall(r"scripts/(\w+)\.py([^\"'`&|\\]*)", path.read_text()):
            assert script in SCRIPTS, f"{path}: {script}"
            for flag in FLAG.findall(rest):
                assert flag in flags_of(script), f"{path}: {script} {flag}"


def example_values() -> dict[str, str]:
    lines = [re.fullmatch(r"# ([A-Z_]+)=(.*)", line) for line in EXAMPLE.read_text().splitlines()]
    return {found[1]: found[2] for found in lines if found}


def variables_of_tests() -> set[str]:
    """The variables that the tests read, found in their source."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        found |= set(re.findall(r"""["']((?:QDRANT|FALKORDB|AUTOMEM)_TEST_[A-Z]+)["']""", path.read_text()))
    assert found
    return found


def test_the_example_has_every_variable_with_its_default():
    values = example_values()
    assert set(values) == set(DEFAULTS) | ENVIRONMENT_ONLY | variables_of_tests()
    for name, default in DEFAULTS.items():
        expected = default.replace(f"{PROJECT_ROOT}{os.sep}", "")
        assert values[name] == expected, name


def test_the_example_changes_nothing_as_it_is(tmp_path):
    """Copied whole to .env it sets nothing; each line without its `# ` is used unchanged."""
    from dotenv import dotenv_values

    assert dotenv_values(EXAMPLE) == {}
    copy = tmp_path / ".env"
    copy.write_text(re.sub(r"(?m)^# ([A-Z_]+=)", r"\1", EXAMPLE.read_text()))
    assert dotenv_values(copy) == example_values()


def test_the_reference_has_every_variable_and_no_other():
    table = "\n".join(line for line in sections(REFERENCE)["Settings"].splitlines() if line.startswith("|"))
    first = [line.split("|")[1] for line in table.splitlines()]
    named = {name for row in first for name in re.findall(r"`([A-Z_]+)`", row)}
    assert named == set(example_values())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_document_names_a_variable_that_does_not_exist(document):
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", document.read_text()))
    assert named <= set(example_values()) | NOT_OURS | FILES


def test_the_readme_has_every_exit_code():
    codes = {
        errors.DONE,
        errors.FAILED,
        errors.USAGE,
        errors.REMAINING,
        errors.VERIFICATION_FAILED,
        errors.LOCKED,
        errors.PROVIDER_REFUSED,
        errors.INTERRUPTED,
    }
    section = sections(README)["The scripts"]
    assert {int(code) for code in re.findall(r"(?m)^\| (\d+) \|", section)} == codes
    assert {int(code) for code in re.findall(r"(?:^|   ?)(\d+) [a-z]", cli.EXIT_CODES)} == codes


def test_the_reference_has_every_field_of_the_manifest():
    section = sections(REFERENCE)["The manifest, format 1"]
    assert manifest.FORMAT == 1
    for kind in (
        manifest.Manifest,
        manifest.GraphComponent,
        manifest.CollectionComponent,
        manifest.Drift,
        manifest.BackupFile,
    ):
        names = {one.name for one in dataclasses.fields(kind)} - {"path"}
        missing = {name for name in names if f"`{name}`" not in section}
        assert not missing, kind.__name__
    for level in manifest.VERIFICATION_LEVELS:
        assert f"| `{level}` |" in sections(REFERENCE)["Levels of verification"]


def test_the_reference_has_every_phase_of_a_re_embed():
    known = {value for name, value in vars(phases).items() if name.isupper() and isinstance(value, str)}
    section = sections(REFERENCE)["The journal"]
    assert {one for one in known - {phases.COMMAND, phases.SENT} if f"`{one}`" not in section} == set()
    assert len(known) > 8
