"""`make pictures`: docs/pictures, made from a real run in the sandbox.

`reembed.svg` is a recording of a terminal: each line appears when it was complete, and waits are shortened to a second.
`report.html` is the report of the same run, `report.png` its picture, made by Chromium. Paths, ports and the date are
replaced by neutral ones.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.sandbox.process import PROJECT_ROOT
from tests.sandbox.stack import Stack
from tests.sandbox.tour import LARGE, SMALL, Tour

FOLDER = PROJECT_ROOT / "docs" / "pictures"
RECORDING, REPORT, SCREENSHOT = FOLDER / "reembed.svg", FOLDER / "report.html", FOLDER / "report.png"
COMMANDS = (
    "python scripts/backup_automem.py",
    "python scripts/reembed_embeddings.py --dry-run",
    "python scripts/reembed_embeddings.py",
    "python scripts/verify_migration.py",
)
COLUMNS, ROWS, MEMORIES = 104, 32, 1000
LONGEST_WAIT_SECONDS = 1.0
PIXELS = (960, 1180)
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
_FLAGS += " --disable-component-update --disable-sync --hide-scrollbars"
_CONTROL = re.compile(rb"\x1b\[(\d*)([A-HJKlh])|\x1b\[\?\d+[lh]|([\r\n])")
_TEXT = re.compile(r'<text class="(t-r\d+)" x="([^"]+)" y="([^"]+)" textLength="([^"]+)"[^>]*>(.*?)</text>')
_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">
<style>
text {{ font: 20px "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre; fill: #c5c8c6 }}
{styles}
.row {{ animation: appear 1ms backwards }}
@keyframes appear {{ from {{ visibility: hidden }} }}
.screen {{ transform: translateY({end}px); animation: scroll {seconds:.2f}s step-end }}
@keyframes scroll {{ {scroll} }}
@media (prefers-reduced-motion: reduce) {{ .row, .screen {{ animation: none }} }}
</style>
<rect width="100%" height="100%" rx="8" fill="#1d1f21"/>
<svg x="12" y="12" width="{inner_width}" height="{inner_height}">
<g class="screen">
{rows}
</g>
</svg>
</svg>
"""


@dataclass
class Recording:
    """The lines of a terminal, each with the time at which it was complete (seconds), and the report's HTML."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    report: str = ""

    @property
    def plain(self) -> list[str]:
        """The lines without colours."""
        return [Text.from_ansi(line).plain for _, line in self.lines]


def record(folder: Path, memories: int = MEMORIES) -> Recording:
    """Run the commands in a sandbox in `folder`. Raises CalledProcessError if one fails."""
    recording = Recording()
    with Stack(folder / "servers") as stack:
        stack.load(memories, SMALL[1], SMALL[0])
        stack.start_automem(SMALL[1], SMALL[0])
        tour = Tour(stack, folder / "backups", print, *LARGE)
        exports = f"export VECTOR_SIZE={LARGE[1]} EMBEDDING_MODEL={LARGE[0]}"
        now = 0.0
        for command in COMMANDS:
            if "--dry-run" in command:
                recording.lines.append((now, f"\x1b[1m$ {exports}\x1b[0m"))
            recording.lines.append((now, f"\x1b[1m$ {command}\x1b[0m"))
            lines = run_in_terminal(command, tour.environ())
            recording.lines += [(now + at, neutral(line, tour)) for at, line in lines]
            now = recording.lines[-1][0] + LONGEST_WAIT_SECONDS
            recording.lines.append((now, ""))
        (page,) = (folder / "backups" / "reports").glob("*.html")
        recording.report = neutral(page.read_text(encoding="utf-8"), tour)
    return recording


def run_in_terminal(command: str, environ: dict[str, str]) -> list[tuple[float, str]]:
    """Run a command in a pseudo-terminal. Returns its lines as they remain on the screen, each with its time."""
    terminal, child_end = os.openpty()
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    path = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    environ = {**environ, "PATH": path, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    began, screen = time.monotonic(), Screen()
    words = shlex.split(command)
    with subprocess.Popen(words, cwd=PROJECT_ROOT, env=environ, stdout=child_end, stderr=child_end) as process:
        os.close(child_end)
        while more := _read(terminal):
            screen.write(more, time.monotonic() - began)
    os.close(terminal)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, "\n".join(line for _, line in screen.lines()))
    return screen.lines()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the command has ended
        return b""


class Screen:
    """The lines of a terminal without an end, as progress bars redraw them: a carriage return, up, erase a line."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, bytes]] = [(0.0, b"")]
        self._row, self._erase = 0, False

    def write(self, output: bytes, at: float) -> None:
        """Write what a command printed at this time."""
        end = 0
        for found in _CONTROL.finditer(output):
            self._append(output[end : found.start()], at)
            end = found.end()
            if found[3] == b"\n":
                self._row += 1
                self._rows += [(at, b"")] * (self._row == len(self._rows))
            elif found[2] == b"A":
                self._row -= int(found[1] or 1)
            elif found[3] == b"\r" or found[2] == b"K":
                self._erase = True
        self._append(output[end:], at)

    def _append(self, text: bytes, at: float) -> None:
        if text:
            self._rows[self._row] = (at, (b"" if self._erase else self._rows[self._row][1]) + text)
            self._erase = False

    def lines(self) -> list[tuple[float, str]]:
        """Every line that was begun, with the time of its last change."""
        return [(at, text.decode()) for at, text in self._rows[: self._row]]


def neutral(text: str, tour: Tour) -> str:
    """Replace what differs between two machines and days: folders, ports, the date."""
    stack = tour.stack
    text = text.replace(str(tour.backups), "/opt/automem-migration/backups")
    for port, usual in ((stack.falkordb.port, 6379), (stack.qdrant.port, 6333), (stack.openai.port, 8080)):
        text = text.replace(f"127.0.0.1:{port}", f"localhost:{usual}")
    text = re.sub(r"(?<!\d)20\d{6}_", "20260501_", text)
    return re.sub(r"\b20\d\d-\d\d-\d\d\b", "2026-05-01", text)


def as_svg(lines: Sequence[tuple[float, str]]) -> str:
    """Draw the lines as a terminal that scrolls. Without animation the end of the recording is shown."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), color_system="truecolor")
    times: list[float] = []
    for at, line in _without_long_waits(lines):
        text = Text.from_ansi(line)
        pieces = text.divide(range(COLUMNS, len(text), COLUMNS)) or [text]
        for piece in pieces:
            console.print(piece, no_wrap=True, crop=True)
            times.append(at)
    styles, _, matrix = console.export_svg(code_format="{styles}\0{matrix}", unique_id="t", title="").partition("\0")
    height, step = ROWS * 24.4, 24.4
    offsets = [min(0.0, (ROWS - row - 1) * step) for row in range(len(times))]
    seconds = times[-1] or 1.0
    scroll = " ".join(
        f"{100 * at / seconds:.2f}% {{ transform: translateY({offset:.1f}px) }}"
        for at, offset in _steps(times, offsets)
    )
    width = COLUMNS * 12.2
    return _SVG.format(
        width=round(width + 24),
        height=round(height + 24),
        inner_width=round(width),
        inner_height=round(height),
        label="A terminal: " + ", ".join(COMMANDS),
        styles=styles,
        end=f"{offsets[-1]:.1f}",
        seconds=seconds,
        scroll=scroll,
        rows="\n".join(_rows(matrix, times)),
    )


def _without_long_waits(lines: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    shown, before, now = [], 0.0, 0.0
    for at, line in lines:
        now += min(max(0.0, at - before), LONGEST_WAIT_SECONDS)
        before = max(before, at)
        shown.append((now, line))
    return shown


def _steps(times: list[float], offsets: list[float]) -> list[tuple[float, float]]:
    """For each moment at which the screen moves: the time and the offset then."""
    last = {round(at, 2): offset for at, offset in zip(times, offsets, strict=True)}
    moved = [(at, offset) for at, offset in last.items() if offset]
    return [(0.0, 0.0), *(min(group) for _, group in itertools.groupby(moved, key=lambda one: one[1]))]


def _rows(matrix: str, times: list[float]) -> list[str]:
    texts: dict[int, list[str]] = {}
    for style, x, y, length, text in _TEXT.findall(matrix):
        row = int(float(y) // 24.4)
        place = f'x="{x}" y="{float(y):.1f}" textLength="{length}" xml:space="preserve"'
        texts.setdefault(row, []).append(f'<text class="{style}" {place}>{text.replace("&#160;", " ")}</text>')
    return [
        f'<g class="row" style="animation-delay: {times[row]:.2f}s">{"".join(found)}</g>'
        for row, found in texts.items()
    ]


def take_screenshot(page: Path, picture: Path) -> None:
    """Draw the beginning of an HTML page. Raises SystemExit if there is no Chromium here."""
    browser = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if browser is None:
        raise SystemExit(f"no Chromium is installed: {picture.name} is not made (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as profile:
        size = "--window-size={},{}".format(*PIXELS)
        words = [browser, *_FLAGS.split(), size, f"--user-data-dir={profile}", f"--screenshot={picture}"]
        subprocess.run([*words, page.as_uri()], check=True, capture_output=True, timeout=120)


def main() -> None:
    """Make all pictures."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="automem-pictures-") as folder:
        recording = record(Path(folder))
    RECORDING.write_text(as_svg(recording.lines), encoding="utf-8")
    REPORT.write_text(recording.report, encoding="utf-8")
    take_screenshot(REPORT, SCREENSHOT)
    for path in (RECORDING, REPORT, SCREENSHOT):
        print(f"{path.relative_to(PROJECT_ROOT)}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
