"""The documents as the tests see them: headings, fenced blocks, and the comment above a block."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README, MIGRATION, EXAMPLE = ROOT / "README.md", ROOT / "MIGRATION.md", ROOT / ".env.example"
REFERENCE, OPERATIONS = ROOT / "docs" / "reference.md", ROOT / "docs" / "operations.md"
WORST_DAY = ROOT / "docs" / "worst-day.md"
DOCUMENTS = [README, MIGRATION, REFERENCE, OPERATIONS, WORST_DAY]
PROSE = [*DOCUMENTS, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", ROOT / "docs" / "architecture.md"]
SHELL = "bash"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
_FENCE = re.compile(r"^(\s*)```(\w*)\s*$")
_COMMENT = re.compile(r"^\s*<!-- not run: (.+) -->\s*$")
_HEADING = re.compile(r"^(#+) (.+)$")


@dataclass(frozen=True)
class Block:
    """One fenced block. `not_run` is the reason that the comment right above gives, else empty."""

    document: str
    line: int
    heading: str
    language: str
    text: str
    not_run: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line} ({self.heading})"


def blocks(path: Path) -> list[Block]:
    """Every fenced block of a document, in order; fails on a fence that is never closed."""
    found: list[Block] = []
    heading, reason, start, language = "", "", 0, ""
    body: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if start and fence:
            text = textwrap.dedent("\n".join(body)) + "\n"
            found.append(Block(path.name, start, heading, language, text, reason))
            start, reason = 0, ""
        elif start:
            body.append(line)
        elif fence:
            start, language, body = number, fence[2], []
        else:
            title, comment = _HEADING.match(line), _COMMENT.match(line)
            heading = title[2] if title else heading
            reason = comment[1] if comment else ""
    assert not start, f"{path.name}:{start} is never closed"
    return found


def sections(path: Path) -> dict[str, str]:
    """Each heading with the text below it, up to the next heading of any level; fenced blocks left out."""
    found: dict[str, str] = {}
    heading, fenced = "", False
    for line in path.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        title = None if fenced else _HEADING.match(line)
        heading = title[2] if title else heading
        if not fenced:
            found[heading] = found.get(heading, "") + line + "\n"
    return found
