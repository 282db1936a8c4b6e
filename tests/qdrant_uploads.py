"""The bytes of the recorded uploads: a snapshot, complete or damaged as the recording names it."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

RECORDINGS = Path(__file__).parent / "qdrant_recordings"
# An entry's name and content -> its new content, None to drop it.
Change = Callable[[str, bytes], "bytes | None"]


def recorded_snapshots(version: str) -> dict[str, bytes]:
    """The snapshots recorded with a version, by file name."""
    return {path.stem: gzip.decompress(path.read_bytes()) for path in (RECORDINGS / version).glob("*.snapshot.gz")}


def content(description: str, snapshots: dict[str, bytes], *, recorded: bool) -> bytes:
    """The bytes that `description` names; `recorded`: the snapshots are those of the recording."""
    junk = re.fullmatch(r"([\d,]+) bytes of '(.*)'", description)
    if junk:
        size = int(junk[1].replace(",", ""))
        return (junk[2].encode() * (size // len(junk[2]) + 1))[:size]
    if description == "no bytes":
        return b""
    if description.startswith("gzip of "):
        return gzip.compress(snapshots[description.removeprefix("gzip of ")])
    name, _, damage = description.partition(".snapshot")
    return _damaged(snapshots[f"{name}.snapshot"], damage.strip(), recorded=recorded)


def _damaged(snapshot: bytes, damage: str, *, recorded: bool) -> bytes:
    if not damage:
        return snapshot
    if damage.startswith("cut at "):
        return snapshot[: _cut(snapshot, int(damage.removeprefix("cut at ")), recorded=recorded)]
    if damage == "without its first segment":
        first = next(member.name for member in _members(snapshot) if _is_segment(member.name))
        return repacked(snapshot, lambda name, body: None if name == first else body)
    changes: dict[str, Change] = {
        "without 0/segments/*": lambda name, body: None if _is_segment(name) else body,
        "without config.json": lambda name, body: None if name == "config.json" else body,
        "with config.json = {nope": lambda name, body: b"{nope" if name == "config.json" else body,
        "with version.info = 9.9.9": lambda name, body: b"9.9.9" if name == "version.info" else body,
        "with every segment zeroed": lambda name, body: bytes(len(body)) if _is_segment(name) else body,
        "with every segment 'x'": lambda name, body: b"x" * len(body) if _is_segment(name) else body,
        "with the WAL 'x'": lambda name, body: b"x" * len(body) if name.startswith("0/wal/open-") else body,
    }
    return repacked(snapshot, changes[damage])


def _cut(snapshot: bytes, recorded_at: int, *, recorded: bool) -> int:
    """The offset of the cut: the recording's, or the same place of another snapshot."""
    if recorded:
        return recorded_at
    members = _members(snapshot)
    first = next(number for number, member in enumerate(members) if _is_segment(member.name))
    inside_first = recorded_at < 100_000
    return members[first].offset_data + 188 if inside_first else members[first + 1].offset


def _members(snapshot: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(snapshot)) as tar:
        return tar.getmembers()


def _is_segment(name: str) -> bool:
    return name.startswith("0/segments/") and name.endswith(".tar")


def repacked(snapshot: bytes, change: Change) -> bytes:
    """The snapshot with its files' contents changed; sparse entries become plain ones."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(snapshot)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            if not member.isfile():
                new.addfile(member)
                continue
            source = old.extractfile(member)
            assert source is not None
            body = change(member.name, source.read())
            if body is not None:
                info = tarfile.TarInfo(member.name)
                info.size, info.mode, info.mtime = len(body), 0o644, member.mtime
                new.addfile(info, io.BytesIO(body))
    return out.getvalue()
