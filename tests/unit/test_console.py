"""What the operator sees: progress on stderr, the result alone on stdout."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from lib import console as module
from lib.console import Console, age_text, size_text, table

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (3_000_000_000, "3.0 GB"),
        (5e12, "5000.0 GB"),
    ],
)
def test_bytes_as_people_read_them(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("hours", "text"), [(0, "0 minutes"), (1 / 60, "1 minute"), (1.2, "1 hour"), (47, "47 hours"), (72, "3 days")]
)
def test_an_age_in_the_unit_that_it_fills(hours, text):
    assert age_text(hours) == text


def test_a_table_lines_up_and_leaves_no_blanks_at_the_ends():
    text = table([("a", 1), ("long one", "x")], ("name", "value"))
    assert text.splitlines() == ["name      value", "--------  -----", "a         1", "long one  x"]
    assert table([("a", "wide cell")], ("b", "c")).splitlines()[1] == "-  -"
    assert table([]) == ""
    assert table([("a", "")]) == "a"


def test_the_result_is_on_stdout_and_all_else_on_stderr(capsys):
    console = Console(verbose=True)
    console.say("step")
    console.detail("detail")
    console.warn("careful")
    console.result({"a": 1}, "the result")
    assert tuple(capsys.readouterr()) == ("the result\n", "step\ndetail\nwarning: careful\n")


def test_quiet_keeps_warnings_and_the_result(capsys):
    console = Console(quiet=True)
    console.say("step")
    console.warn("careful")
    with console.progress("work", 10) as advance:
        advance(10)
    console.result({}, "the result")
    assert tuple(capsys.readouterr()) == ("the result\n", "warning: careful\n")


def test_details_are_for_verbose_alone(capsys):
    Console().detail("detail")
    assert capsys.readouterr().err == ""


def test_json_is_one_document_in_any_encoding(capsys):
    Console(as_json=True).result({"path": Path("/a"), "text": "\u2603 \U0001f600 \udc80", "none": None}, "not shown")
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"path": "/a", "text": "\u2603 \U0001f600 \udc80", "none": None}


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes"])
def test_what_has_no_place_in_json_is_an_error(value):
    with pytest.raises(TypeError, match="cannot be part of a result"):
        Console(as_json=True).result({"value": value}, "")


def test_plain_progress_is_a_line_now_and_then_and_one_at_the_end(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Console().progress("embed", 2000, "texts") as advance:
        for _ in range(20):
            now[0] += 1
            advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "embed: 500 of 2,000 (100/s)",
        "embed: 1,000 of 2,000 (100/s)",
        "embed: 1,500 of 2,000 (100/s)",
        "embed: 2,000 of 2,000 (100/s)",
        "embed: 2,000 texts in 20.0 s (100/s)",
    ]


def on_a_terminal(**env: str) -> str:
    """What a child shows on a terminal while it counts to 100."""
    code = "from lib.console import Console\nwith Console().progress('embed', 100, 'texts') as advance:\n    advance(100)\n"
    mine, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", **env}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=theirs, stdout=subprocess.PIPE, env=environ)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(mine, 65536):
            shown += piece
    except OSError:
        pass  # how Linux reports that the other end is closed
    finally:
        os.close(mine)
    out, _ = child.communicate(timeout=300)
    assert (child.returncode, out) == (0, b"")
    return shown.decode()


def test_a_terminal_gets_a_bar_with_colours_unless_they_are_unwanted():
    coloured, plain = on_a_terminal(), on_a_terminal(NO_COLOR="1")
    for shown in (coloured, plain):
        assert "embed" in shown
        assert "100/100" in shown
    assert "\x1b[38;" in coloured
    assert "\x1b[38;" not in plain
