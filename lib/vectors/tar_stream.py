"""A tar as Qdrant writes it, read forward only and to its end; nothing is written to disk."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from lib.errors import BackupDamaged

BLOCK = 512
PIECE_BYTES = 1024 * 1024

_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
_LONG_NAME = tarfile.GNUTYPE_LONGNAME
# Qdrant writes files, directories and, from 1.13 on, sparse files; anything else is not from it.
_KNOWN = {*_REGULAR, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, _LONG_NAME}
_NAME_LIMIT = 1024  # Qdrant's are far below it
_PIECES_LIMIT = 200_000  # of one sparse file
_STEP = "use another backup"
# A sparse file holds less than it claims; a WAL segment is preallocated with 32 MiB, or as configured.
_CLAIM_BYTES = 16 * 1024**3


class ByteStream(Protocol):
    """Anything that is read forward only: a file, a decompressor, a response."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, empty at the end only."""


class Section:
    """The next `size` bytes of a stream (None: all of it), of which `where` tells in error texts."""

    def __init__(self, stream: ByteStream, size: int | None, where: str) -> None:
        self.size = self.left = size
        self.where = where
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, empty at the end only. Raises BackupDamaged where the stream ends early."""
        wanted = size if self.left is None else min(size, self.left)
        piece = self._stream.read(wanted) if wanted else b""
        if self.left is not None:
            if wanted and not piece:
                raise damaged(self.where, f"is cut {self.left} bytes before its end")
            self.left -= len(piece)
        return piece

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes, or fewer at the end."""
        pieces = []
        while size and (piece := self.read(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def skip(self) -> None:
        """Read on to the end."""
        while self.read(PIECE_BYTES):
            pass


class Sparse:
    """A sparse file's content: its stored `pieces` (offset, bytes) with zeros between, `size` bytes in all."""

    def __init__(self, stored: Section, pieces: list[tuple[int, int]], size: int) -> None:
        self._stored = stored
        self._pieces = [piece for piece in reversed(pieces) if piece[1]]
        self._at = 0
        self.size = size

    def read(self, size: int, /) -> bytes:
        """Like `Section.read`; zeros come at most 1 MiB at a time."""
        offset, length = self._pieces[-1] if self._pieces else (self.size, 0)
        if self._at < offset:
            data = bytes(min(size, offset - self._at, PIECE_BYTES))
        else:
            data = self._stored.read(min(size, offset + length - self._at))
        self._at += len(data)
        if self._pieces and self._at >= offset + length:
            self._pieces.pop()
        return data


@dataclass(frozen=True)
class Entry:
    """One entry of a tar: its name, relative and without a slash at the end, and its content."""

    name: str
    is_file: bool
    content: Section | Sparse


def entries(section: Section, *, needs_end: bool) -> Iterator[Entry]:
    """The entries of a tar in their order; what the caller leaves of an entry's content is skipped.

    `needs_end`: the blocks of zeros that end a tar must be there (segments of Qdrant 1.18 go without).
    Raises BackupDamaged for a cut tar, a header whose checksum is off, a link, and a name that leads outside.
    """
    long_name: str | None = None
    while header := section.take(BLOCK):
        if not any(header):
            _rest_is_zero(section, header)
            return
        info = _parse_header(header, section.where)
        if info.type == _LONG_NAME:
            long_name = _long_name(section, info.size)
            continue
        name, long_name = _safe_name(long_name or info.name, section.where), None
        sparse = _sparse_map(section, header) if info.type == tarfile.GNUTYPE_SPARSE else None
        stored = Section(section, info.size, f"{name} in {section.where}")
        yield Entry(name, not info.isdir(), Sparse(stored, *sparse) if sparse else stored)
        stored.skip()
        if len(section.take(-info.size % BLOCK)) != -info.size % BLOCK:
            raise damaged(section.where, "is cut")
    if needs_end or long_name:
        raise damaged(section.where, "is cut: its end is missing")


def damaged(where: str, what: str) -> BackupDamaged:
    """`where` names the part of the backup."""
    return BackupDamaged(f"{where} {what}", next_step=_STEP)


def _parse_header(header: bytes, where: str) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise damaged(where, f"is not a whole tar: {error}") from None
    if info.islnk() or info.issym() or info.isdev():
        raise damaged(where, f"holds a link or device ('{info.name}'), which no server writes: refused")
    if info.type not in _KNOWN or info.size < 0:
        raise damaged(where, f"holds an entry of the unknown type {info.type!r}")
    return info


def _safe_name(name: str, where: str) -> str:
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise damaged(where, f"holds an entry whose name leads outside ({name!r}): refused as malicious")
    return "/".join(parts)


def _long_name(section: Section, size: int) -> str:
    padded = size + -size % BLOCK
    if size > _NAME_LIMIT:
        raise damaged(section.where, f"holds a name of {size} bytes: refused")
    data = section.take(padded)
    if len(data) != padded or not size:
        raise damaged(section.where, "holds a name that is cut")
    return data[:size].rstrip(b"\0").decode("utf-8", "replace")


def _sparse_map(section: Section, header: bytes) -> tuple[list[tuple[int, int]], int]:
    """The pieces and full size of an old GNU sparse entry (https://www.gnu.org/software/tar/manual/, Standard).

    Four pieces are in the header from byte 386; byte 482 says that a block with 21 more follows, whose byte 504
    says the same of a next one; the full size is at byte 483.
    """
    pieces = _pieces(header[386:482], section.where)
    more = header[482]
    while more:
        block = section.take(BLOCK)
        if len(block) < BLOCK:
            raise damaged(section.where, "is cut in a sparse map")
        pieces += _pieces(block[:504], section.where)
        more = block[504]
        if len(pieces) > _PIECES_LIMIT:
            raise damaged(section.where, f"holds a sparse file of more than {_PIECES_LIMIT} pieces: refused")
    size, at = _number(header[483:495], section.where), 0
    for offset, length in pieces:
        if offset < at or offset + length > size:
            raise damaged(section.where, "holds a sparse map that is out of order")
        at = offset + length
    if size > _CLAIM_BYTES + sum(length for _, length in pieces):
        raise damaged(section.where, f"holds a sparse file that claims {size} bytes: refused as malicious")
    return pieces, size


def _pieces(fields: bytes, where: str) -> list[tuple[int, int]]:
    """The pairs of 12 digits each, unused ones left out."""
    pairs = [(fields[at : at + 12], fields[at + 12 : at + 24]) for at in range(0, len(fields), 24)]
    return [(_number(offset, where), _number(length, where)) for offset, length in pairs if offset[0]]


def _number(field: bytes, where: str) -> int:
    """Octal digits, or base 256 after a byte of 128."""
    if field[0] == 128:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        raise damaged(where, "holds a sparse map that is not one") from None


def _rest_is_zero(section: Section, header: bytes) -> None:
    if len(header) < BLOCK:
        raise damaged(section.where, "is cut in its end")
    while piece := section.read(PIECE_BYTES):
        if piece.count(0) != len(piece):
            raise damaged(section.where, "has data behind its end")
