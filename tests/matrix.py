"""Which cases of a matrix `make test` runs; `make faults` runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def matrix(cases: Iterable[Any], *core: Any) -> list[Any]:
    """The cases as parameters: those in `core` belong to `make test`, all others to `make faults`."""
    cases = list(cases)
    lost = [one for one in core if one not in cases]
    assert not lost, f"not in the matrix: {lost}"
    return [_parameter(one, pytest.mark.core if one in core else pytest.mark.matrix) for one in cases]


def _parameter(case: Any, mark: pytest.MarkDecorator) -> Any:
    return pytest.param(*case if isinstance(case, tuple) else (case,), marks=mark)
