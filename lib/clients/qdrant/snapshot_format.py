"""A collection snapshot read as a stream to its end, both levels of tar: is it whole, and of what collection."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from lib.clients.qdrant.collection import vector_params
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


JSON_LIMIT = 16 * 1024 * 1024
_SMALL_JSON_LIMIT = 1024 * 1024  # of a shard or a segment
_ENTRIES_LIMIT = 100_000

_SEGMENT = re.compile(r"(\d+)/segments/[^/]+\.tar")
_SHARD_JSON = re.compile(r"(\d+)/(replica_state|shard_config)\.json")
_WAL = re.compile(r"\d+/wal/(?:open|closed)-\d+")
_WAL_MAGIC = b"wal"  # a WAL file that begins otherwise kills the collection that it is restored onto
_WHOLE = "the snapshot"
_Vector = tuple[Any, Any]  # size and distance, as segment.json has them
OnSegment = Callable[[int, "Section | Sparse"], ByteStream]


@dataclass(frozen=True)
class SnapshotFacts:
    """What a snapshot says of its collection.

    `size` and `distance` are of the unnamed vector (or the first named one), `payload_schema` maps a field to its
    type or parameters, `config` is config.json, `shards` maps every shard to the number of its segments here: none
    where another node holds it.
    """

    size: int
    distance: str
    vectors_named: bool
    shard_number: int
    entries: int
    segments: int
    shards: dict[int, int]
    payload_schema: dict[str, Any]
    config: dict[str, Any] = field(repr=False)

    @property
    def absent_shards(self) -> list[int]:
        """The shards whose points are not in this snapshot."""
        return sorted(shard for shard, segments in self.shards.items() if not segments)


def inspect_snapshot(stream: ByteStream, keep: OnSegment | None = None) -> SnapshotFacts:
    """Read a snapshot from `stream` to the end and say what it is; memory stays flat, nothing is extracted.

    `keep` gets each segment's shard and content, and gives the content back as it passes to be read here.
    Raises BackupDamaged where it is cut, zeroed or not a snapshot, where a segment is empty or of another dimension,
    where a local shard lacks its segments, and for names and types that lead out of an archive. A segment left out
    or bytes changed within a file show in the sha256 and the count of points only.
    """
    survey = _Survey(keep)
    for entry in entries(Section(stream, None, _WHOLE), needs_end=True):
        survey.see(entry)
    return survey.facts()


class _Survey:
    """What was seen of a snapshot so far."""

    def __init__(self, keep: OnSegment | None) -> None:
        self._keep = keep
        self._names: set[str] = set()
        self._texts: dict[str, bytes] = {}
        self._local: dict[int, bool] = {}  # whether this node holds a replica of the shard
        self._configured: set[int] = set()
        self._segments: list[tuple[int, _Vector | None]] = []

    def see(self, entry: Entry) -> None:
        """Take in one entry, its content included."""
        if entry.name in self._names and entry.is_file:
            raise damaged(_WHOLE, f"holds '{entry.name}' twice")
        self._names.add(entry.name)
        if len(self._names) > _ENTRIES_LIMIT:
            raise damaged(_WHOLE, f"holds more than {_ENTRIES_LIMIT} entries: refused")
        if not entry.is_file:
            return
        if entry.name in {"config.json", "version.info", "payload_index.json"}:
            self._texts[entry.name] = _text(entry.content, entry.name)
        elif match := _SEGMENT.fullmatch(entry.name):
            shard = int(match[1])
            content = self._keep(shard, entry.content) if self._keep else entry.content
            self._segments.append((shard, _segment(content, entry.name)))
        elif match := _SHARD_JSON.fullmatch(entry.name):
            self._see_shard(int(match[1]), match[2], entry)
        elif _WAL.fullmatch(entry.name) and entry.content.read(len(_WAL_MAGIC)) not in {b"", _WAL_MAGIC}:
            raise damaged(_WHOLE, f"holds a WAL that is none ('{entry.name}')")

    def facts(self) -> SnapshotFacts:
        """The result, when all is seen. Raises BackupDamaged for what is missing or does not fit."""
        for name in ("config.json", "version.info"):
            if not self._texts.get(name):
                raise damaged(_WHOLE, f"has no {name}")
        config = _parse_json(self._texts["config.json"], "config.json")
        params = config.get("params")
        if not isinstance(params, dict) or not isinstance(params.get("vectors"), dict):
            raise damaged(_WHOLE, "has a config.json without params.vectors")
        size, distance, named = vector_params(params["vectors"])
        shards = self._shards(params)
        if not named:
            self._check_segments(size, distance)
        schema = (
            _parse_json(self._texts.get("payload_index.json", b"{}"), "payload_index.json").get("schema")
            or {}
        )
        return SnapshotFacts(
            size=size,
            distance=distance,
            vectors_named=named,
            shard_number=int(params.get("shard_number") or len(shards)),
            entries=len(self._names),
            segments=len(self._segments),
            shards=shards,
            payload_schema=dict(schema),
            config=config,
        )

    def _see_shard(self, shard: int, kind: str, entry: Entry) -> None:
        content = _parse_json(_text(entry.content, entry.name, _SMALL_JSON_LIMIT), entry.name)
        if kind == "replica_state":
            self._local[shard] = bool(content.get("is_local"))
        else:
            self._configured.add(shard)

    def _shards(self, params: dict[str, Any]) -> dict[int, int]:
        held = [shard for shard, _ in self._segments]
        found = self._configured & self._local.keys()
        counted = params.get("shard_number")
        expected = set(range(counted)) if isinstance(counted, int) else found
        if params.get("sharding_method") == "custom":
            expected = found
        missing = sorted((expected | set(held) | self._configured | self._local.keys()) - found)
        if missing or not found:
            raise damaged(_WHOLE, f"lacks shard {missing[0] if missing else 0}")
        for shard, is_local in self._local.items():
            if is_local and shard not in held:
                raise damaged(_WHOLE, f"lacks the segments of shard {shard}")
        return {shard: held.count(shard) for shard in sorted(found)}

    def _check_segments(self, size: int, distance: str) -> None:
        for shard, vector in self._segments:
            if vector is not None and vector != (size, distance):
                raise damaged(_WHOLE, f"holds a segment of another size or distance in shard {shard}")


def _segment(content: ByteStream, name: str) -> _Vector | None:
    """Read a segment's own tar to its end; size and distance of its unnamed vector, None if it has none."""
    where = f"segment {name}"
    state: dict[str, Any] | None = None
    version = False
    for entry in entries(Section(content, None, where), needs_end=False):
        last = entry.name.rsplit("/", 1)[-1]
        if entry.is_file and last == "segment.json":
            text = _text(entry.content, entry.name, _SMALL_JSON_LIMIT)
            state = _parse_json(text, f"segment.json of {name}")
        version = version or (entry.is_file and last == "version.info")
    if state is None or not version:
        raise damaged(where, "is empty, zeroed or cut: its segment.json or version.info is missing")
    try:
        vector = state.get("config", {}).get("vector_data", {}).get("")
        return None if vector is None else (vector.get("size"), vector.get("distance"))
    except AttributeError:
        raise damaged(where, "has a segment.json that no server writes") from None


def _text(content: Section | Sparse, name: str, limit: int = JSON_LIMIT) -> bytes:
    pieces, size = [], 0
    while piece := content.read(limit):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise damaged(_WHOLE, f"has a {name} of more than {limit} bytes")
    return b"".join(pieces)


def _parse_json(text: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise damaged(_WHOLE, f"has a {name} that is not a JSON object")
    return value
