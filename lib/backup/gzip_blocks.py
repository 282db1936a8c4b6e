"""gzip at the speed of the transfer: what deflate hardly shrinks, as vectors are, is stored as it is."""

from __future__ import annotations

import zlib
from typing import IO

from isal import igzip, isal_zlib

BLOCK_BYTES = 1 << 20
_LEVEL = 1
_TRIED_BYTES = 1 << 16
_WORTH = 0.85  # random floats come to 0.92, which costs four times the time of storing them
_PADDING_BYTES = 1024  # a tar's end; such a piece goes with what came before it
_GZIP = 31  # zlib's name for a gzip header and trailer around the deflated bytes


class GzipBlocks:
    """A gzip file of several members (RFC 1952, 2.2), each of at least a megabyte; any gunzip reads them as one.

    Members are deflated or stored, whichever suits their bytes. The last one is never only padding: a file that is
    cut where a member ends lacks bytes that count.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._held: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        """More bytes."""
        if self._size >= BLOCK_BYTES and len(data) > _PADDING_BYTES:
            self._emit()
        self._held.append(data)
        self._size += len(data)

    def close(self) -> None:
        """Write what is left; the file under it stays open."""
        self._emit()

    def _emit(self) -> None:
        block = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        self._out.write(packed(block))
        self._held, self._size = [], 0


def packed(block: bytes) -> bytes:
    """One gzip member."""
    tried = block[:_TRIED_BYTES]
    if len(isal_zlib.compress(tried, _LEVEL)) <= _WORTH * len(tried):
        return bytes(igzip.compress(block, _LEVEL))
    store = zlib.compressobj(0, wbits=_GZIP)
    return store.compress(block) + store.flush()
