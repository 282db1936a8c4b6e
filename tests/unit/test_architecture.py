"""The rules of the architecture, read from the source: sizes, layers, who prints, who reads the environment, words."""

from __future__ import annotations

import ast
import inspect
import os
import re
import statistics
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from lib import cli

ROOT = Path(__file__).resolve().parents[2]
LIB = sorted((ROOT / "lib").rglob("*.py"))
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.name != "__init__.py")
PRINTING = {"lib/console.py", "lib/cli.py"}
# Which modules may import which library. The sandbox replaces the servers, so it may import all of them.
MODULES = {
    "falkordb": "lib/clients/falkordb",
    "qdrant_client": "lib/clients/qdrant",
    "qdrant_edge": "lib/clients/qdrant",
    "openai": "lib/clients/embeddings",
    "tiktoken": "lib/clients/embeddings",
    "sqlite3": ("lib/clients/embeddings", "lib/backup/points.py"),
    "isal": ("lib/backup", "lib/clients/qdrant/transport.py"),
    "fsspec": "lib/backup",
    "paramiko": "lib/backup/copy_store.py",
    "dotenv": "lib/env_files.py",
    "rich": "lib/console.py",
    "portalocker": "lib/files.py",
    "jinja2": "lib/reembed/report.py",
    "argparse": "lib/cli.py",
}
# With brackets, so that this file does not hold what it looks for.
UNSAID = [
    re.compile(one)
    for one in (r"\.\./share[d]", r"\bFACTS[_]", r"DESIG[N]\.md", r"STYL[E]\.md", r"/wor[k]/", r"/tmp/a[m]\b")
]


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked() -> list[Path]:
    """What a clone holds (and what is about to be added to it)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.splitlines() if (ROOT / name).is_file()]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parsed(path)))


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions(path: Path) -> dict[str, int]:
    """Each function's own lines, from its def (or first decorator) to its end."""
    found = {}
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[f"{short(path)}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    return found


@cache
def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports at run time, wherever in it."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {one.name.split(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


# --- sizes ------------------------------------------------------------------------------------------------------


def test_scripts_stay_short():
    assert {short(path): lines_of(path) for path in SCRIPTS if lines_of(path) >= 150} == {}


def test_functions_stay_short():
    sizes = {name: size for path in [*LIB, *SCRIPTS] for name, size in functions(path).items()}
    assert statistics.median(sizes.values()) < 15
    assert {name: size for name, size in sizes.items() if size > 45} == {}


def test_packages_are_empty():
    assert [
        short(path)
        for path in (*LIB, ROOT / "scripts/__init__.py")
        if path.name == "__init__.py" and path.stat().st_size
    ] == []


def test_every_file_says_what_it_is():
    silent = [short(path) for path in [*LIB, *SCRIPTS] if path.stat().st_size and not ast.get_docstring(parsed(path))]
    assert silent == []


# --- who does what ----------------------------------------------------------------------------------------------


def calls(path: Path, name: str) -> list[int]:
    found = [node for node in nodes(path) if isinstance(node, ast.Call)]
    return [node.lineno for node in found if isinstance(node.func, ast.Name) and node.func.id == name]


def test_only_the_console_and_the_edge_print():
    loud = {short(path): calls(path, "print") for path in LIB if calls(path, "print")}
    assert set(loud) >= PRINTING
    loud = {name: lines for name, lines in loud.items() if name not in PRINTING}
    # A server of the sandbox says on stdout where it listens.
    assert {name for name in loud if not name.startswith("tests/sandbox/")} == set()
    assert all(len(lines) == 1 for lines in loud.values()), loud


def reads_environment(path: Path) -> bool:
    """Whether it looks into the environment; to set a knob of a library (`setdefault`) is not reading."""
    tree = nodes(path)
    set_only = {id(node.value) for node in tree if isinstance(node, ast.Attribute) and node.attr == "setdefault"}
    return any(
        (
            isinstance(node, ast.Attribute)
            and node.attr in {"environ", "getenv", "environb"}
            and id(node) not in set_only
        )
        or (isinstance(node, ast.ImportFrom) and node.module == "os")
        for node in tree
    )


def test_only_the_configuration_reads_the_environment():
    """The processes of the sandbox apart: theirs is a server's own. A child process inherits what it needs to start."""
    readers = {short(path) for path in [*LIB, *SCRIPTS] if reads_environment(path)}
    assert "lib/config.py" in readers
    outside = {name for name in readers if not name.startswith("tests/sandbox/")}
    assert outside == {"lib/config.py", "lib/child_process.py"}


@pytest.mark.parametrize("package", MODULES)
def test_each_library_has_its_modules(package):
    allowed = MODULES[package] if isinstance(MODULES[package], tuple) else (MODULES[package],)
    users = {short(path) for path in [*LIB, *SCRIPTS] if package in imported(path)}
    users = {name for name in users if not name.startswith("tests/sandbox/")}
    if package == "argparse":  # a script's own arguments
        users = {name for name in users if not name.startswith("scripts/")}
    assert users, f"nobody imports {package}"
    assert {name for name in users if not name.startswith(allowed)} == set()


def test_nothing_broad_is_caught_without_a_reason():
    """`except Exception` says why on its line or the one before; nothing is caught bare."""
    for path in [*LIB, *SCRIPTS]:
        lines = path.read_text().splitlines()
        for node in nodes(path):
            if not isinstance(node, ast.ExceptHandler):
                continue
            assert node.type is not None, f"{short(path)}:{node.lineno}"
            if isinstance(node.type, ast.Name) and node.type.id == "Exception":
                around = "".join(lines[node.lineno - 2 : node.lineno + 1])
                assert "#" in around, f"{short(path)}:{node.lineno}"


def test_the_layers_hold():
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    if not command[0].exists():
        pytest.skip("import-linter is not installed")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "0 broken" in run.stdout


def test_the_contracts_name_every_room():
    """A package or module that no layer names would be free to import anything."""
    config = (ROOT / "pyproject.toml").read_text()
    layers = config[config.index("layers = [") : config.index("]", config.index("layers = ["))]
    named = set(re.findall(r"lib\.(\w+)", layers))
    rooms = {path.stem for path in (ROOT / "lib").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == named


# --- what a clone holds -----------------------------------------------------------------------------------------


def test_the_project_speaks_of_itself_alone():
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data[:8000] or path.suffix == ".gz":
            continue
        text = data.decode("utf-8", "replace")
        found += [f"{short(path)}: {one.pattern}" for one in UNSAID if one.search(text)]
    assert found == []


def test_git_ignores_no_source():
    run = subprocess.run(
        ["git", "check-ignore", *(short(path) for path in [*LIB, *SCRIPTS])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 128:
        pytest.skip("not a git checkout")
    assert run.stdout == ""


# --- scripts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_quick(path):
    """Under 0.15 s of CPU, best of three: nothing heavy is imported before the arguments are parsed."""
    seconds = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, path, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, _ = child.stdout.read(), child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        assert b"exit codes:" in out
        seconds.append(usage.ru_utime + usage.ru_stime)
        for stream in (child.stdout, child.stderr):
            stream.close()
    assert min(seconds) < 0.15


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_has_a_main_that_returns_its_exit_code(path, monkeypatch, capsys):
    module = import_module(f"scripts.{path.stem}")
    signature = inspect.signature(module.main)
    assert list(signature.parameters) == ["argv"]
    assert signature.parameters["argv"].default is None
    assert signature.return_annotation == "int"
    assert path.read_text().rstrip().endswith('if __name__ == "__main__":\n    raise SystemExit(main())')
    assert os.access(path, os.X_OK)

    # What the command returns is what main returns; it knows its arguments and no environment.
    seen = []
    monkeypatch.setattr(module, "command", lambda args: seen.append(args) or 3)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert module.main([]) == 3
    assert len(seen) == 1
    with pytest.raises(SystemExit) as caught:
        module.main(["--no-such-flag"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: unrecognized arguments: --no-such-flag")


@pytest.mark.parametrize("path", [one for one in SCRIPTS if one.stem != "quickstart"], ids=lambda path: path.stem)
def test_every_script_has_the_common_flags(path):
    module = import_module(f"scripts.{path.stem}")
    args = module.arguments().parse_args(
        ["--json", "-q", "-v", "--show-config", "--env-file", "e", "--backup-dir", "b"]
    )
    assert (args.json, args.quiet, args.verbose, args.show_config) == (True,) * 4
    assert (args.env_file, args.backup_dir) == ("e", "b")


# Words of earlier versions that have a standard term now, and the on-disk names and flags that keep them.
OLD_WORDS = re.compile(
    r"\b(prov(e|es|ed|ing)|proofs?|spools?|bought|buy(er|s)?|purchases?|rehears\w*|anew|surplus|shelf|undertaker"
    r"|throw-?away|misfit|mend(ed|s)?|beside|told|asleep|gone on with|goes on|stands)\b",
    re.IGNORECASE,
)
STORED = re.compile(
    r"""["'](staged and proved|proved|proofs?|collection rehearsed|rehearsing the (collection|graph)|bought|mended)["']"""
    r"|f?[\"']bought of |bought[.|]|`bought`|stands for|\bproof(_note)?\b|proved=|prune.spool|mended\\|",
)


def test_the_library_uses_the_standard_terms():
    found = [
        f"{short(path)}:{number} {line.strip()}"
        for path in [*LIB, *SCRIPTS]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if OLD_WORDS.search(STORED.sub("", line))
    ]
    assert found == []


def test_what_the_architecture_page_names_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:\w+/)*\w+\.py)(?:: (\w+))?`", text)
    assert len(named) > 20
    for name, function in named:
        path = next(one for one in (ROOT / "lib" / name, ROOT / name) if one.exists())
        assert not function or re.search(rf"(def|class) {function}\b|^{function}\b", path.read_text(), re.MULTILINE), (
            name
        )
