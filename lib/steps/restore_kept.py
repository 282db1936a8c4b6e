"""What the proof of a backup read, kept for its restore: the promised ids, and the snapshots as they are sent."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import IO, cast

from lib.files import FULL_DISK
from lib.steps.pages import pages
from lib.steps.payloads import PointId
from lib.steps.present import as_id

_PAGE = 500


class PromisedIds:
    """The ids that a backup promises, in a temporary file of its own; `count` is None until they were read."""

    def __init__(self) -> None:
        self.count: int | None = None
        self._file: IO[str] = tempfile.TemporaryFile("w+", encoding="ascii")  # noqa: SIM115 - closed with its owner

    def keep(self, ids: Iterator[str]) -> None:
        """Take them, in place of what an earlier reading told."""
        self._file.seek(0)
        self._file.truncate()
        count = 0
        for one in ids:
            self._file.write(f"{one}\n")
            count += 1
        self._file.flush()
        self.count = count

    def pages(self) -> Iterator[list[PointId]]:
        """All of them, in their order."""
        self._file.seek(0)
        return pages((as_id(line.rstrip("\n")) for line in self._file), _PAGE)


class KeptSnapshots:
    """An archive's snapshots in temporary files, gone with the process, so that it is inflated once.

    They are kept all or none: none without `room`, and where the disk fills up after all.
    """

    def __init__(self, *, room: bool = False) -> None:
        self._files: list[IO[bytes]] | None = [] if room else None

    def passing(self, stream: IO[bytes]) -> IO[bytes]:
        """`stream` again; what is read of it is kept as the next snapshot."""
        if self._files is None:
            return stream
        self._files.append(tempfile.TemporaryFile())  # noqa: SIM115 - closed with its owner
        return cast("IO[bytes]", _Passing(stream, self))

    def write(self, piece: bytes) -> None:
        """More bytes of the snapshot that passes."""
        if self._files is None:
            return
        try:
            self._files[-1].write(piece)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self._files = None

    def stream(self, number: int) -> IO[bytes] | None:
        """The snapshot of this number in the archive, from its start; None where it was not kept."""
        if not self._files:
            return None
        self._files[number].seek(0)
        return self._files[number]


class _Passing:
    def __init__(self, stream: IO[bytes], kept: KeptSnapshots) -> None:
        self._stream, self._kept = stream, kept

    def read(self, size: int, /) -> bytes:
        piece = self._stream.read(size)
        self._kept.write(piece)
        return piece
