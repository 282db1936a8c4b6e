"""A request's body that would be large if it were put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_SENT_AT_ONCE_BYTES = 256 << 10


@dataclass(frozen=True)
class Parts:
    """A body that is never put together: its parts are sent one after the other, anew where a request is repeated."""

    parts: Sequence[bytes]

    @property
    def len(self) -> int:
        """Bytes in all, as requests asks for them."""
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[bytes]:
        few: list[bytes] = []
        size = 0
        for part in self.parts:
            few.append(part)
            size += len(part)
            if size >= _SENT_AT_ONCE_BYTES:
                yield b"".join(few)
                few, size = [], 0
        if few:
            yield b"".join(few)
