"""Faults a test can order from the sandbox's embeddings server, and what each does to an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass
class Rule:
    """One fault.

    Applies to `times` requests (None: all) after the first `after`, and only to those that hold `poisoned_text`
    in one of their inputs, or more than `more_than` inputs, where given (the former without another effect: a 400).

    Before the answer: `status` with the error body's `code`, `error_type` and `message` (and `retry_after`
    seconds), nothing is charged. `hang_seconds` delays the answer, at most until the rule is dropped; what is then
    answered is charged.
    On the answer: `cut` ends the connection after that share of the body (0..1); `wrong_count` leaves the last
    vector out; `omit_zero` leaves out an index that is 0; `wrong_order` turns the list round with its indices kept;
    `wrong_indices` numbers from 1;
    `wrong_width` answers that many dimensions; `nan` puts one into the vectors (of the poisoned inputs, or the
    first); `not_unit` scales them; `no_base64` answers lists whatever was asked; `no_headers` drops the limits.
    """

    status: int | None = None
    code: str | None = None
    error_type: str | None = None
    message: str | None = None
    retry_after: float | None = None
    times: int | None = None
    after: int = 0
    poisoned_text: str | None = None
    more_than: int | None = None
    hang_seconds: float = 0.0
    cut: float | None = None
    wrong_count: bool = False
    omit_zero: bool = False
    wrong_order: bool = False
    wrong_indices: bool = False
    wrong_width: int | None = None
    nan: bool = False
    not_unit: float | None = None
    no_base64: bool = False
    no_headers: bool = False

    def __post_init__(self) -> None:
        shaped = (
            self.wrong_count,
            self.omit_zero,
            self.wrong_order,
            self.wrong_indices,
            self.nan,
            self.no_base64,
        )
        others = (self.status, self.cut, self.wrong_width, self.not_unit)
        if self.poisoned_text and not any(shaped) and all(value is None for value in others):
            self.status = 400

    def fires(self, texts: Sequence[str]) -> bool:
        """Whether this request is hit; counts it."""
        if self.poisoned_text and not any(self.poisoned_text in text for text in texts):
            return False
        if self.more_than is not None and len(texts) <= self.more_than:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
            return self.times >= 0
        return True

    def bend(self, vectors: FloatArray, texts: Sequence[str]) -> FloatArray:
        """The (n, size) vectors as this fault leaves them."""
        if self.wrong_width is not None:
            vectors = np.resize(vectors, (len(vectors), self.wrong_width))
        if self.not_unit is not None:
            vectors = vectors * np.float32(self.not_unit)
        if self.nan:
            hit = [at for at, text in enumerate(texts) if (self.poisoned_text or "") in text]
            vectors = vectors.copy()
            vectors[hit if self.poisoned_text else hit[:1], 0] = np.nan
        return vectors


def rule_from(wanted: dict[str, object]) -> Rule:
    """A Rule from its JSON. Raises ValueError for a name that does not exist."""
    unknown = set(wanted) - {each.name for each in fields(Rule)}
    if unknown:
        raise ValueError(f"unknown fault settings: {', '.join(sorted(unknown))}")
    return Rule(**wanted)  # type: ignore[arg-type]
