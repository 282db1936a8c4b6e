"""Texts that somebody else wrote, as they may be shown: nothing in them moves the cursor or forges a line."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Control characters but tab and newline, the marks that turn the direction of a text, other line ends, half characters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_BREAKS = str.maketrans({"\n": "\\n", "\t": "\\t"})


def escaped(text: str) -> str:
    """The text with every such character as its escape sequence; it keeps its lines."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """As `escaped`, on one line: for names, ids and errors of others within a message."""
    return escaped(text).translate(_BREAKS)


def listed(texts: Iterable[object]) -> str:
    """Names or ids of others, between commas."""
    return ", ".join(one_line(str(one)) for one in texts)
