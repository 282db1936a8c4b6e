"""Read a collection snapshot as a stream, both levels of tar: whether it is complete, and its configuration.

Python's tarfile reads the single headers only: over a stream it takes a damaged header for the end of the archive, and
it limits neither the length of a name nor a sparse map.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lib.errors import BackupDamaged

BLOCK = 512
PIECE_BYTES = 1024 * 1024
JSON_LIMIT = 16 * 1024 * 1024
_SMALL_JSON_LIMIT = 1024 * 1024  # of a shard or a segment
_ENTRIES_LIMIT = 100_000
_NAME_LIMIT = 1024  # Qdrant's names are far shorter
_PIECES_LIMIT = 200_000  # of one sparse file
# How much larger than its stored pieces a sparse file may be. A WAL file is preallocated with 32 MiB, or as configured.
_HOLES_LIMIT = 16 * 1024**3

_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
# Qdrant writes files, directories and, from 1.13 on, sparse files.
_KNOWN = {*_REGULAR, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME}

_SEGMENT = re.compile(r"(\d+)/segments/[^/]+\.tar")
_SHARD_JSON = re.compile(r"(\d+)/(replica_state|shard_config)\.json")
_WAL = re.compile(r"\d+/wal/(?:open|closed)-\d+")
_WAL_MAGIC = b"wal"  # a WAL file that begins otherwise destroys the collection that it is restored onto
_SNAPSHOT = "the snapshot"

_Vector = tuple[Any, Any]  # size and distance, as in segment.json


class ByteStream(Protocol):
    """Anything that is read forward only: a file, a decompressor, a response."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, none only at the end."""


class Section:
    """The next `size` bytes of a stream (None: all of it); `where` names it in errors."""

    def __init__(self, stream: ByteStream, size: int | None, where: str) -> None:
        self.size = self.left = size
        self.where = where
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, none only at the end. Raises BackupDamaged if the stream ends early."""
        wanted = size if self.left is None else min(size, self.left)
        piece = self._stream.read(wanted) if wanted else b""
        if self.left is not None:
            if wanted and not piece:
                raise _damaged(self.where, f"is cut {self.left} bytes before its end")
            self.left -= len(piece)
        return piece


class Sparse:
    """The content of a sparse file: its stored `pieces` (offset, bytes) with zeros between, `size` bytes in all."""

    def __init__(self, stored: Section, pieces: list[tuple[int, int]], size: int) -> None:
        self._stored = stored
        self._pieces = [piece for piece in reversed(pieces) if piece[1]]
        self._position = 0
        self.size = size

    def read(self, size: int, /) -> bytes:
        """Like `Section.read`; at most 1 MiB of zeros at a time."""
        offset, length = self._pieces[-1] if self._pieces else (self.size, 0)
        if self._position < offset:
            data = bytes(min(size, offset - self._position, PIECE_BYTES))
        else:
            data = self._stored.read(min(size, offset + length - self._position))
        self._position += len(data)
        if self._pieces and self._position >= offset + length:
            self._pieces.pop()
        return data


OnSegment = Callable[[int, Section | Sparse], ByteStream]


@dataclass(frozen=True)
class Entry:
    """One entry of a tar: its relative name, without a slash at the end, and its content."""

    name: str
    is_file: bool
    content: Section | Sparse


@dataclass(frozen=True)
class SnapshotFacts:
    """What a snapshot says about its collection.

    `size` and `distance` are of the unnamed vector (or the first named one). `config` is config.json. `shards` maps
    every shard to the number of its segments here, which is 0 if another node holds it.
    """

    size: int
    distance: str
    vectors_named: bool
    segments: int
    shards: dict[int, int]
    config: dict[str, Any] = field(repr=False)

    @property
    def absent_shards(self) -> list[int]:
        """The shards whose points are not in this snapshot."""
        return sorted(shard for shard, segments in self.shards.items() if not segments)


def vector_params(vectors: Mapping[str, Any]) -> tuple[int, str, bool]:
    """Size, distance and whether vectors are named, from `params.vectors` of a configuration. Without a size: 0."""
    named = not isinstance(vectors.get("size"), int)
    first = next(iter(vectors.values()), None) if named else vectors
    if not isinstance(first, Mapping) or not isinstance(first.get("size"), int):
        return 0, "", named and bool(vectors)
    return first["size"], str(first.get("distance", "")), named


def inspect_snapshot(stream: ByteStream, on_segment: OnSegment | None = None) -> SnapshotFacts:
    """Read a snapshot from `stream` to its end, in little memory and without extracting anything.

    `on_segment` gets the shard and content of each segment, and returns the stream from which it is read here. Raises
    BackupDamaged if the snapshot is cut, zeroed or none, if a segment is empty or of another dimension, if a local
    shard lacks its segments, and for names and types that lead outside. A missing segment or changed bytes within a
    file show only in the sha256 and the number of points.
    """
    survey = _Survey(on_segment)
    for entry in entries(Section(stream, None, _SNAPSHOT), needs_end=True):
        survey.add(entry)
    return survey.facts()


def entries(section: Section, *, needs_end: bool) -> Iterator[Entry]:
    """Yield the entries of a tar in their order, and skip what the caller does not read of their content.

    `needs_end`: the tar must end with blocks of zeros (segments of Qdrant 1.18 do not).
    Raises BackupDamaged for a cut tar, a header with a wrong checksum, a link, and a name that leads outside.
    """
    long_name = ""
    while header := _take(section, BLOCK):
        if not any(header):  # the end of the tar
            if len(header) < BLOCK:
                raise _damaged(section.where, "is cut in its end")
            while piece := section.read(PIECE_BYTES):
                if piece.count(0) != len(piece):
                    raise _damaged(section.where, "has data behind its end")
            return
        info = _parse_header(header, section.where)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            if not 0 < info.size <= _NAME_LIMIT:
                raise _damaged(section.where, f"holds a name of {info.size} bytes: refused")
            data = _take_exactly(section, info.size + -info.size % BLOCK)
            long_name = data[: info.size].rstrip(b"\0").decode("utf-8", "replace")
            continue
        name, long_name = _safe_name(long_name or info.name, section.where), ""
        sparse = _sparse_map(section, header) if info.type == tarfile.GNUTYPE_SPARSE else None
        stored = Section(section, info.size, f"{name} in {section.where}")
        yield Entry(name, not info.isdir(), Sparse(stored, *sparse) if sparse else stored)
        while stored.read(PIECE_BYTES):
            pass
        _take_exactly(section, -info.size % BLOCK)
    if needs_end or long_name:
        raise _damaged(section.where, "is cut: its end is missing")


def _damaged(where: str, what: str) -> BackupDamaged:
    return BackupDamaged(f"{where} {what}")


def _take(stream: ByteStream, size: int) -> bytes:
    """Read `size` bytes, or fewer at the end."""
    taken = bytearray()
    while len(taken) < size and (piece := stream.read(size - len(taken))):
        taken += piece
    return bytes(taken)


def _take_exactly(section: Section, size: int) -> bytes:
    data = _take(section, size)
    if len(data) < size:
        raise _damaged(section.where, "is cut")
    return data


def _parse_header(header: bytes, where: str) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise _damaged(where, f"is not a whole tar: {error}") from None
    if info.islnk() or info.issym() or info.isdev():
        raise _damaged(where, f"holds a link or device ('{info.name}'), which no server writes: refused")
    if info.type not in _KNOWN or info.size < 0:
        raise _damaged(where, f"holds an entry of the unknown type {info.type!r}")
    return info


def _safe_name(name: str, where: str) -> str:
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise _damaged(where, f"holds an entry whose name leads outside ({name!r}): refused as malicious")
    return "/".join(parts)


def _sparse_map(section: Section, header: bytes) -> tuple[list[tuple[int, int]], int]:
    """Read the pieces and full size of an old GNU sparse entry (https://www.gnu.org/software/tar/manual/, Standard).

    The header has four pieces from byte 386, the full size at byte 483, and at byte 482 whether a block with 21 more
    pieces follows. Byte 504 of such a block says whether another one follows.
    """
    where = section.where
    pieces, more = _pieces(header[386:482], where), header[482]
    while more:
        block = _take_exactly(section, BLOCK)
        pieces += _pieces(block[:504], where)
        more = block[504]
        if len(pieces) > _PIECES_LIMIT:
            raise _damaged(where, f"holds a sparse file of more than {_PIECES_LIMIT} pieces: refused")
    size, end = _number(header[483:495], where), 0
    for offset, length in pieces:
        if offset < end or length < 0 or offset + length > size:
            raise _damaged(where, "holds a sparse map that is out of order")
        end = offset + length
    if size > _HOLES_LIMIT + sum(length for _, length in pieces):
        raise _damaged(where, f"holds a sparse file that claims {size} bytes: refused as malicious")
    return pieces, size


def _pieces(fields: bytes, where: str) -> list[tuple[int, int]]:
    """The pairs of numbers of 12 bytes each; unused ones begin with a zero byte."""
    pairs = [(fields[at : at + 12], fields[at + 12 : at + 24]) for at in range(0, len(fields), 24)]
    return [(_number(offset, where), _number(length, where)) for offset, length in pairs if offset[0]]


def _number(digits: bytes, where: str) -> int:
    try:
        return tarfile.nti(digits)  # type: ignore[attr-defined, no-any-return]
    except tarfile.HeaderError:
        raise _damaged(where, "holds a sparse map with an invalid number") from None


class _Survey:
    """What was read of a snapshot so far."""

    def __init__(self, on_segment: OnSegment | None) -> None:
        self._on_segment = on_segment
        self._names: set[str] = set()
        self._texts: dict[str, bytes] = {}
        self._local: dict[int, bool] = {}  # whether this node holds a replica of the shard
        self._configured: set[int] = set()
        self._segments: list[tuple[int, _Vector | None]] = []

    def add(self, entry: Entry) -> None:
        """Read one entry."""
        if entry.name in self._names and entry.is_file:
            raise _damaged(_SNAPSHOT, f"holds '{entry.name}' twice")
        self._names.add(entry.name)
        if len(self._names) > _ENTRIES_LIMIT:
            raise _damaged(_SNAPSHOT, f"holds more than {_ENTRIES_LIMIT} entries: refused")
        if not entry.is_file:
            return
        if entry.name in {"config.json", "version.info", "payload_index.json"}:
            self._texts[entry.name] = _text(entry, JSON_LIMIT)
        elif match := _SEGMENT.fullmatch(entry.name):
            shard = int(match[1])
            content = self._on_segment(shard, entry.content) if self._on_segment else entry.content
            self._segments.append((shard, _segment_vector(content, entry.name)))
        elif match := _SHARD_JSON.fullmatch(entry.name):
            document = _parse_json(_text(entry, _SMALL_JSON_LIMIT), entry.name)
            if match[2] == "replica_state":
                self._local[int(match[1])] = bool(document.get("is_local"))
            else:
                self._configured.add(int(match[1]))
        elif _WAL.fullmatch(entry.name) and _take(entry.content, len(_WAL_MAGIC)) not in {b"", _WAL_MAGIC}:
            raise _damaged(_SNAPSHOT, f"holds a WAL file that is not one ('{entry.name}')")

    def facts(self) -> SnapshotFacts:
        """The result, after the last entry. Raises BackupDamaged for what is missing or contradicts the rest."""
        for name in ("config.json", "version.info"):
            if not self._texts.get(name):
                raise _damaged(_SNAPSHOT, f"has no {name}")
        config = _parse_json(self._texts["config.json"], "config.json")
        params = config.get("params")
        if not isinstance(params, dict) or not isinstance(params.get("vectors"), dict):
            raise _damaged(_SNAPSHOT, "has a config.json without params.vectors")
        size, distance, named = vector_params(params["vectors"])
        if named and not size:
            raise _damaged(_SNAPSHOT, "has a config.json without the size of its vectors")
        shards = self._shards(params)
        for shard, vector in self._segments:
            if not named and vector is not None and vector != (size, distance):
                raise _damaged(_SNAPSHOT, f"holds a segment of another size or distance in shard {shard}")
        indexes = _parse_json(self._texts.get("payload_index.json", b"{}"), "payload_index.json")
        if not isinstance(indexes.get("schema") or {}, dict):
            raise _damaged(_SNAPSHOT, "has a payload_index.json that no server writes")
        return SnapshotFacts(
            size=size,
            distance=distance,
            vectors_named=named,
            segments=len(self._segments),
            shards=shards,
            config=config,
        )

    def _shards(self, params: dict[str, Any]) -> dict[int, int]:
        held = [shard for shard, _ in self._segments]
        found = self._configured & self._local.keys()
        expected = {*held, *self._configured, *self._local}
        count = params.get("shard_number")
        if isinstance(count, int) and params.get("sharding_method") != "custom":
            expected |= set(range(min(count, _ENTRIES_LIMIT + 1)))
        missing = sorted(expected - found)
        if missing or not found:
            raise _damaged(_SNAPSHOT, f"lacks shard {missing[0] if missing else 0}")
        for shard, is_local in self._local.items():
            if is_local and shard not in held:
                raise _damaged(_SNAPSHOT, f"lacks the segments of shard {shard}")
        return {shard: held.count(shard) for shard in sorted(found)}


def _segment_vector(content: ByteStream, name: str) -> _Vector | None:
    """Read a segment's tar to its end; returns size and distance of its unnamed vector, None if it has none."""
    where = f"segment {name}"
    state: dict[str, Any] | None = None
    version = False
    for entry in entries(Section(content, None, where), needs_end=False):
        last = entry.name.rsplit("/", 1)[-1]
        if entry.is_file and last == "segment.json":
            state = _parse_json(_text(entry, _SMALL_JSON_LIMIT), f"segment.json of {name}")
        version = version or (entry.is_file and last == "version.info")
    if state is None or not version:
        raise _damaged(where, "is empty, zeroed or cut: its segment.json or version.info is missing")
    try:
        vector = state.get("config", {}).get("vector_data", {}).get("")
        return None if vector is None else (vector.get("size"), vector.get("distance"))
    except AttributeError:
        raise _damaged(where, "has a segment.json that no server writes") from None


def _text(entry: Entry, limit: int) -> bytes:
    text = _take(entry.content, limit + 1)
    if len(text) > limit:
        raise _damaged(_SNAPSHOT, f"has a {entry.name} of more than {limit} bytes")
    return text


def _parse_json(text: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _damaged(_SNAPSHOT, f"has a {name} that is not a JSON object")
    return value
