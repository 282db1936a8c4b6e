"""Rows of any length in lists of a bounded one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Row = TypeVar("Row")


def pages(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """The rows in lists of `size`, the last one shorter; none is empty, and none is read before it is asked for."""
    left = iter(rows)
    while page := list(islice(left, size)):
        yield page
