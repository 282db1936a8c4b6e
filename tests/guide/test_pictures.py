"""The pictures of the documents: real, small, without anything from elsewhere, and as the current code prints."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.guide.documents import PROSE, ROOT
from tests.pictures import COMMANDS, PIXELS, RECORDING, REPORT, SCREENSHOT, Recording, as_svg, record

SVG = "{http://www.w3.org/2000/svg}"
LARGEST_BYTES = 300_000
# Figures, bars, ids, and blanks that align columns.
_VARIES = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|\d{8}_\d{6}(?:_[0-9a-f]{4})?|\d[\d,.:]*| ?(?:[kMG]?B|B)\b|-{3,}|\s+")


def form(text: str) -> str:
    """The text without figures, units of sizes and widths of columns; of a progress bar only its title."""
    text = re.sub(r"(\d (?:minute|second))s\b", r"\1", text.partition("━")[0])
    return re.sub(r"(?:# ?)+", "#", _VARIES.sub(lambda found: " " if found[0].isspace() else "#", text)).strip()


def shown(path: Path) -> list[str]:
    """The rows of the terminal in the picture."""
    rows = ET.parse(path).getroot().iter(f"{SVG}g")
    return ["".join(text.text or "" for text in row) for row in rows if row.get("class") == "row"]


@pytest.fixture(scope="module")
def today(tmp_path_factory) -> Recording:
    return record(tmp_path_factory.mktemp("pictures"), memories=400)


def test_the_recording_is_a_picture_that_loads_and_runs_nothing():
    text = RECORDING.read_text()
    assert not re.search(r"<script|<image|url\(|href|@import", text)
    assert re.findall(r"https?://[\w.]+", text.replace("http://localhost", "")) == ["http://www.w3.org"]
    rows = shown(RECORDING)
    assert [row[2:] for row in rows if row.startswith("$ python")] == list(COMMANDS)
    assert any("every vector compared" in row for row in rows)


@pytest.mark.parametrize("path", [RECORDING, REPORT, SCREENSHOT], ids=lambda path: path.name)
def test_a_picture_is_small_used_and_neutral(path):
    assert path.stat().st_size < LARGEST_BYTES
    name = f"pictures/{path.name}"
    assert any(name in document.read_text() for document in PROSE), name
    if path != SCREENSHOT:
        text = path.read_text()
        assert str(ROOT) not in text
        assert "/tmp/" not in text
        assert "127.0.0.1" not in text


def test_the_screenshot_is_a_png_of_its_size():
    data = SCREENSHOT.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == PIXELS


@pytest.mark.qdrant
@pytest.mark.matrix
def test_the_recording_shows_what_is_printed_today(today, tmp_path):
    """Both as rows of the same terminal. `make pictures` records it again."""
    drawn = tmp_path / "today.svg"
    drawn.write_text(as_svg(today.lines))
    assert [form(row) for row in joined(shown(RECORDING))] == [form(row) for row in joined(shown(drawn))]


def joined(rows: list[str]) -> list[str]:
    """The lines, of which a long one takes several rows; the place of the break depends on the figures before it."""
    lines: list[str] = []
    for row in rows:
        if lines and len(lines[-1]) % 104 == 0:
            lines[-1] += row
        else:
            lines.append(row)
    return lines


@pytest.mark.qdrant
@pytest.mark.matrix
def test_the_report_is_the_one_that_is_written_today(today):
    """The same headings, labels and explanations; the texts of memories and the figures differ."""
    assert labels(REPORT.read_text()) == labels(today.report)


def labels(page: str) -> list[str]:
    return [form(one) for one in re.findall(r"<(?:h[1-3]|th|summary|dt)[^>]*>([^<]*)<", page)]
