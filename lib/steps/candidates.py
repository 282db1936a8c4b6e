"""Memories to try recall with: current, unarchived, with a point of their content, and their content unique."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import Any

from lib.steps.payloads import PointId
from lib.steps.present import IdTable

_SPARE = 3  # candidates a sample: some turn out not to be unique
_LONGEST = 1500  # characters: a query is sent in a URL where the API takes GET only
_AGAIN = {"again": True}


@dataclass(frozen=True)
class Sample:
    """A memory that recall by its own content must bring first."""

    id: str
    content: str


class Candidates:
    """Gathers up to `count` samples, spread over `total` memories, while the graph is read page by page."""

    def __init__(self, count: int, total: int) -> None:
        self._count = count
        self._step = max(1, total // (count * _SPARE))
        self._shown = 0
        self._found: list[tuple[str, Sample]] = []
        self._contents = IdTable()

    def __enter__(self) -> Candidates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contents.__exit__(kind, value, trace)

    def show(self, memories: dict[PointId, dict[str, Any]], points: dict[PointId, dict[str, Any]]) -> None:
        """A page of memories, and the payloads of their points."""
        keys = {one: _key(str(properties["content"])) for one, properties in memories.items()}
        known, seen = self._contents.payloads(list(keys.values())), set[str]()
        for key in keys.values():
            known |= {key: _AGAIN} if key in seen else {}
            seen.add(key)
        self._contents.put((key, _AGAIN if key in known else None) for key in seen)
        for identity, properties in memories.items():
            if self._shown % self._step == 0 and _fit(properties, points.get(identity)):
                self._found.append((keys[identity], Sample(str(identity), str(properties["content"]))))
            self._shown += 1

    def samples(self) -> list[Sample]:
        """Up to `count` of them, once every memory was shown."""
        marks = self._contents.payloads([key for key, _ in self._found])
        unique = [sample for key, sample in self._found if not marks[key]]
        step = max(1, len(unique) // self._count)
        return unique[::step][: self._count]


def _fit(properties: dict[str, Any], payload: dict[str, Any] | None) -> bool:
    content = str(properties["content"])
    current = not properties.get("archived") and not properties.get("t_invalid")
    return current and payload is not None and payload.get("content") == content and len(content) < _LONGEST


def _key(content: str) -> str:
    # A letter first: the table takes texts of digits for numbers.
    return "c" + blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
