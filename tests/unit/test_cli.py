"""The error boundary, as processes: one message, one exit code, one JSON document, and bugs keep their traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = "import os, sys, time\nfrom lib import cli\nfrom lib.errors import *\n"


def start(code: str, **more) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + code],
        cwd=ROOT,
        stdout=more.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def run(body: str, *, as_json: bool = False, **more) -> tuple[int, str, str]:
    """`body` is the command's own body."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    process = start(f"def command():\n{lines}\nraise SystemExit(cli.run(command, as_json={as_json}))", **more)
    out, err = process.communicate(timeout=300)
    return process.returncode, out or "", err


def test_the_code_of_the_command_is_the_code_of_the_process():
    assert run("print('result')\nreturn 3") == (3, "result\n", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("MigrationError", 1),
        ("StoreUnreachable", 1),
        ("StoreFailed", 1),
        ("MissingData", 1),
        ("UsageProblem", 2),
        ("BadFile", 2),
        ("GuardRefused", 2),
        ("AccessRefused", 2),
        ("VerificationFailed", 4),
        ("BackupDamaged", 4),
        ("LockHeld", 5),
        ("ProviderRefused", 6),
    ],
)
def test_known_errors_become_one_message_and_their_code(error, code):
    body = f"raise {error}('what and why', next_step='do this\\nthen that')"
    assert run(body) == (code, "", "error: what and why\n\nnext:\n  do this\n  then that\n")
    found, out, err = run(body, as_json=True)
    assert (found, json.loads(out)) == (
        code,
        {"error": "what and why", "next": "do this\nthen that", "exit_code": code},
    )
    assert err.startswith("error: what and why\n")


def test_a_mismatch_is_announced_as_the_value_error_it_is():
    code, _, err = run("from lib.dimensions import check_dimension\ncheck_dimension('memories', 768, 3072)")
    assert code == 2
    assert err.startswith(
        "ValueError: VECTOR DIMENSION MISMATCH\nQdrant collection 'memories': 768d\nConfig VECTOR_SIZE: 3072d\n"
    )


def test_a_bug_keeps_its_traceback():
    code, out, err = run("return {}['missing']", as_json=True)
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.endswith("KeyError: 'missing'\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("as_json", [True, False])
def test_interrupted_runs_clean_up_and_report_how_to_resume(name, as_json):
    body = "try:\n        print('ready', file=sys.stderr, flush=True)\n        time.sleep(60)\n    finally:\n        print('tidied', file=sys.stderr)"
    process = start(f"def command():\n    {body}\nraise SystemExit(cli.run(command, as_json={as_json}))")
    assert process.stderr.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    err = process.stderr.read()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.startswith("tidied\nerror: interrupted\n")
    assert "run the same command again" in err
    assert (json.loads(out)["exit_code"] == 130) if as_json else out == ""


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("OSError(28, 'No space left on device')", "no room left for the backup folder"),
        ("OSError(28, 'No space left on device', '/b/x.partial')", "no room left for /b/x.partial"),
        ("OSError(122, 'Disk quota exceeded', '/b/x')", "no room left for /b/x"),
        ("PermissionError(13, 'Permission denied', '/b/x')", "/b/x: Permission denied"),
        ("OSError(30, 'Read-only file system', '/b/x')", "/b/x: Read-only file system"),
    ],
)
def test_trouble_with_files_is_reported_without_a_traceback(raised, message):
    code, _, err = run(f"raise {raised}")
    assert code == 1
    assert err.startswith(f"error: {message}")
    assert "\nnext:\n" in err


@pytest.mark.parametrize(("name", "shown"), [("x.partial", ""), ("there", "/there")])
def test_the_next_step_shows_what_exists(tmp_path, name, shown):
    """An unfinished file is removed before its error is reported."""
    (tmp_path / "there").touch()
    _, _, err = run(f"raise OSError(5, 'Input/output error', {str(tmp_path / name)!r})")
    assert f"ls -ld {tmp_path}{shown}\n" in err


@pytest.mark.parametrize("raised", ["OSError(9, 'Bad file descriptor')", "ConnectionResetError(104, 'reset')"])
def test_other_trouble_of_the_system_is_a_bug(raised):
    code, _, err = run(f"raise {raised}")
    assert code == 1
    assert err.startswith("Traceback")


SHOW = "from lib.console import Console\nConsole().result({}, 'result')\nreturn 3"
FLOOD = "for _ in range(100_000):\n    print('x' * 10)\nreturn 3"


@pytest.mark.parametrize("script", ["backup_automem", "quickstart"])
def test_without_its_packages_it_reports_how_to_install_them(script):
    """As typed into a shell whose Python is not the virtual environment's."""
    words = [sys.executable, "-S", "-E", str(ROOT / "scripts" / f"{script}.py")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    assert done.returncode == 2
    assert "not installed" in done.stderr
    assert "make" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("body", "expected"), [("print('x')\nreturn 3", 3), (SHOW, 3), (FLOOD, 130)])
def test_a_reader_that_leaves_changes_no_code_of_work_that_is_done(body, expected):
    """`| head`: cut in the middle of its output, a command ends as interrupted."""
    read, write = os.pipe()
    os.close(read)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    code, _, err = run(body, stdout=write, env=env)
    os.close(write)
    assert (code, err) == (expected, "")


@pytest.mark.parametrize("closed", ["1>&-", "2>&-"])
def test_a_closed_stream_changes_neither_the_other_one_nor_the_code(closed, tmp_path):
    """As some crontabs silence a command."""
    script = str(ROOT / "scripts" / "backup_automem.py")
    line = f'exec "$0" "$@" {closed}'
    words = ["sh", "-c", line, sys.executable, script, "--json", "--check", "none", "--backup-dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    if closed == "2>&-":
        assert json.loads(done.stdout)["exit_code"] == 2
    else:
        assert done.stderr.startswith("error: none does not exist")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_result_that_does_not_fit_on_its_disk_is_no_silent_failure(as_json):
    with Path("/dev/full").open("w") as full:
        code, _, err = run(SHOW.replace("Console()", f"Console({as_json})"), as_json=as_json, stdout=full)
    assert code == 1
    assert err.startswith("error: done, but the result could not be written to stdout: No space left on device")


def test_what_the_terminal_cannot_show_is_escaped():
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code, out, err = run(r"print('\u2603 \udc80')" + "\n" + r"raise MigrationError('\u2603')", env=env)
    assert code == 1
    assert out == "\\u2603 \\udc80\n"
    assert err.startswith("error: \\u2603")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("'--no-such'", "unrecognized arguments: --no-such"),
        ("'--js'", "unrecognized arguments: --js"),
        ("'--env-file'", "argument --env-file: expected one argument"),
        ("'--n', '0'", "argument --n: 0 is not a whole number of at least 1"),
        ("'--n', 'x'", "argument --n: x is not a whole number of at least 1"),
        ("'--usd', 'nan'", "argument --usd: nan is not an amount in US dollars"),
        ("'--usd', '-1'", "argument --usd: -1 is not an amount in US dollars"),
        ("'--usd', 'inf'", "argument --usd: inf is not an amount in US dollars"),
    ],
)
def test_bad_usage(words, message):
    code = (
        "p = cli.parser('what it does')\np.add_argument('--n', type=cli.positive)\np.add_argument('--usd', type=cli.dollars)\n"
        "print(p.parse_args([{}]))"
    )
    process = start(code.format(words))
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"error: {message}\n\nnext:\n")
    process = start(code.format(f"'--json', {words}"))
    out, _ = process.communicate(timeout=300)
    assert json.loads(out)["exit_code"] == 2
    assert json.loads(out)["error"] == message


def test_good_usage():
    process = start(
        "p = cli.parser('what it does')\np.add_argument('--usd', type=cli.dollars)\n"
        "args = p.parse_args(['--usd', '0.5', '-q'])\nprint(args.usd, args.quiet, args.json)"
    )
    assert process.communicate(timeout=300)[0] == "0.5 True False\n"


@pytest.mark.parametrize(
    ("word", "near"),
    [("--js", "--json"), ("--showconfig", "--show-config"), ("--env_file=.env", "--env-file"), ("--zzz", None)],
)
def test_a_misspelt_flag_brings_the_one_that_resembles_it(word, near):
    process = start(f"p = cli.parser('what it does')\np.parse_args([{word!r}])")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    hint = f"  did you mean {near}?\n" if near else ""
    assert err.startswith(f"error: unrecognized arguments: {word}\n\nnext:\n{hint}  ")
    assert err.endswith(" --help\n")
    assert err.count("did you mean") == (near is not None)
