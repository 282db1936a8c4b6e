"""The servers' snapshots inside an archive: one, or of a cluster one of each node that holds a part."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

_CHUNK = 1 << 20
SnapshotReader = Callable[[IO[bytes]], object]


@dataclass(frozen=True)
class SnapshotMember:
    """A snapshot as a server made it: its name, bytes, and sha256 in hex."""

    name: str
    size: int
    sha256: str


def promised_snapshots(facts: Mapping[str, Any]) -> tuple[SnapshotMember, ...]:
    """The snapshots that a `collection.json` promises, in their order. Raises ValueError where it is not whole."""
    try:
        return tuple(
            SnapshotMember(str(one["snapshot_name"]), int(one["snapshot_size"]), str(one["snapshot_sha256"]))
            for one in facts.get("nodes") or [facts]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{error} of a snapshot") from error


def together(snapshots: Sequence[SnapshotMember]) -> SnapshotMember:
    """What stands for all of them: itself, or without a name the sum of bytes and a sha256 over their sha256s."""
    if len(snapshots) == 1:
        return snapshots[0]
    digests = "".join(one.sha256 for one in snapshots)
    return SnapshotMember(
        "", sum(one.size for one in snapshots), hashlib.sha256(digests.encode()).hexdigest()
    )


@dataclass(frozen=True)
class ArchiveFacts:
    """What an archive says of itself: `collection.json`, and each snapshot's name, bytes and sha256 as read."""

    facts: dict[str, Any]
    snapshots: tuple[SnapshotMember, ...]
    ids: int

    @property
    def snapshot_name(self) -> str:
        """The snapshot's name; empty where there are several."""
        return together(self.snapshots).name

    @property
    def snapshot_size(self) -> int:
        """Bytes of all snapshots."""
        return together(self.snapshots).size

    @property
    def snapshot_sha256(self) -> str:
        """The snapshot's sha256, or one over those of several (see `together`)."""
        return together(self.snapshots).sha256


class _HashingReader:
    """A readable that hashes what passes and can be drained to its end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        while self.read(_CHUNK):
            pass


def read_snapshot(name: str, stream: IO[bytes], on_snapshot: SnapshotReader | None) -> SnapshotMember:
    """Read a snapshot to its end; `on_snapshot` sees its bytes first."""
    reader = _HashingReader(stream)
    if on_snapshot:
        on_snapshot(cast("IO[bytes]", reader))
    reader.drain()
    return SnapshotMember(name, reader.size, reader.sha256.hexdigest())
