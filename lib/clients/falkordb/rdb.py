"""RDB files and DUMP payloads: their fields, versions, checksums, and one made from the other."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import anycrc

from lib.errors import BackupDamaged

_MODULE_NAME = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_CRC64 = anycrc.Model("CRC64-REDIS")


def crc64(data: bytes, crc: int = 0) -> int:
    """Redis's CRC64 of `data` after what `crc` covers."""
    return int(_CRC64.calc(data, crc))


def take_module_id(data: bytes, at: int) -> tuple[str, int] | None:
    """Name of a module's data type and the version of its encoding (its low ten bits)."""
    taken = take_length(data, at)
    if taken is None:
        return None
    number = taken[0] >> 10
    name = "".join(_MODULE_NAME[number >> (6 * place) & 63] for place in reversed(range(9)))
    return name, taken[0] & 1023


def take_length(data: bytes, at: int) -> tuple[int, int] | None:
    """A length and the offset after it; None where the data ends before, or it is no plain length."""
    first = data[at] if at < len(data) else 0xFF
    wide = {0x80: 4, 0x81: 8}.get(first)
    if first < 0x40:
        return first, at + 1
    if first < 0x80 and at + 1 < len(data):
        return (first & 0x3F) << 8 | data[at + 1], at + 2
    if wide and at + 1 + wide <= len(data):
        return int.from_bytes(data[at + 1 : at + 1 + wide], "big"), at + 1 + wide
    return None


def take_string(data: bytes, at: int) -> tuple[bytes, int] | None:
    """A string and the offset after it; small integers, which an RDB packs, as their digits."""
    width = {0xC0: 1, 0xC1: 2, 0xC2: 4}.get(data[at] if at < len(data) else 0)
    if width and at + 1 + width <= len(data):
        number = int.from_bytes(data[at + 1 : at + 1 + width], "little", signed=True)
        return b"%d" % number, at + 1 + width
    taken = take_length(data, at)
    if taken is None or sum(taken) > len(data):
        return None
    return data[taken[1] : taken[1] + taken[0]], sum(taken)


def written_string(text: bytes) -> bytes:
    """A string as an RDB writes it: a length of one, two or five bytes, then the text."""
    size = len(text)
    if size < 0x40:
        return bytes([size]) + text
    if size < 0x4000:
        return struct.pack(">H", 0x4000 | size) + text
    return b"\x80" + struct.pack(">I", size) + text


DUMP_FOOTER_BYTES = 10  # RDB version and CRC64
MODULE_VALUE = 7  # the type byte of a module's value
_STRING_FOLLOWS = 5
_LZF = 0xC3
_NAME_BYTES = 4096  # of the value's beginning are enough to find a name


def rdb_version(payload: bytes) -> int:
    """The RDB version that a server must know to take this payload."""
    return int.from_bytes(payload[-DUMP_FOOTER_BYTES:-8], "little")


def graph_encoding(payload: bytes) -> int:
    """The version of FalkorDB's encoding. Raises BackupDamaged where the payload is another kind of key's."""
    identity = take_module_id(payload, 1) if payload[:1] == bytes([MODULE_VALUE]) else None
    if identity is None or not identity[0].startswith("graph"):
        raise BackupDamaged("this DUMP payload holds no graph")
    return identity[1]


def graph_name(payload: bytes) -> str | None:
    """The name that the graph had when it was dumped; None where the encoding is not known (seen: 18 and 20).

    RESTORE under any other name crashes FalkorDB 4.16 and ends with two names on one graph on 4.22.
    """
    start = _first_string(payload[: 64 * 1024])
    for at in (0, 1):  # encoding 20 writes a type byte before each field
        size = int.from_bytes(start[at : at + 8], "little")
        name = start[at + 8 : at + 8 + size]
        if 1 < size == len(name) and name.find(b"\0") == size - 1:
            return name[:-1].decode("utf-8", "replace")
    return None


def _first_string(payload: bytes) -> bytes:
    """The beginning of the first string in the value, uncompressed."""
    head = take_length(payload, 1)
    if head is None or payload[head[1] : head[1] + 1] != bytes([_STRING_FOLLOWS]):
        return b""
    at = head[1] + 1
    if payload[at] != _LZF:
        plain = take_string(payload, at)
        return plain[0] if plain else payload[at + 5 :]
    packed = take_length(payload, at + 1)
    unpacked = take_length(payload, packed[1]) if packed else None
    return _unpack(payload[unpacked[1] :]) if unpacked else b""


def _unpack(packed: bytes) -> bytes:
    """The first bytes of an LZF stream (http://oldhome.schmorp.de/marc/liblzf.html)."""
    out = bytearray()
    at = 0
    while at < len(packed) and len(out) < _NAME_BYTES:
        control = packed[at]
        at += 1
        if control < 32:  # so many literal bytes, and one
            out += packed[at : at + control + 1]
            at += control + 1
            continue
        size = control >> 5
        if size == 7:
            size += packed[at]
            at += 1
        start = len(out) - ((control & 31) << 8) - packed[at] - 1
        at += 1
        for offset in range(size + 2):
            out.append(out[start + offset])
    return bytes(out)


MAGIC = b"REDIS"
HEADER_BYTES = 9
TRAILER_BYTES = 9  # 0xFF and the CRC64
_MARK_BYTES = 40  # https://redis.io/docs/latest/operate/oss_and_stack/management/replication/ (diskless)
CHUNK_BYTES = 1 << 20
HEAD_BYTES = 64 * 1024  # the auxiliary fields fit many times
_AUX, _SELECT_DB, _MODULE_AUX, _END = 0xFA, 0xFE, 0xF7, 0xFF
_DUMP_MARK = "automem-dump"  # an auxiliary field of ours; servers skip the ones they do not know


@dataclass(frozen=True)
class RdbFacts:
    """What an RDB file says about itself.

    `crc_ok`: it carries a checksum, and it is right. `dumped_graph`: the graph that it wraps, where it is a DUMP
    in the shape of an RDB. `graph_encoding`: the version of FalkorDB's encoding, where it could be told.
    `memory`: the bytes that the server used when it wrote the file, 0 where it did not say.
    """

    version: int
    redis_version: str
    size: int
    sha256: str
    crc_present: bool
    crc_ok: bool
    dumped_graph: str | None
    graph_encoding: int | None
    memory: int = 0


@dataclass(frozen=True)
class _Head:
    aux: dict[str, str]
    graph_encoding: int | None
    data_at: int  # offset of the first byte after the auxiliary fields


def is_rdb(path: Path) -> bool:
    """Whether the file begins like an RDB."""
    with path.open("rb") as file:
        return re.fullmatch(rb"REDIS\d{4}", file.read(HEADER_BYTES)) is not None


def inspect_rdb(path: Path) -> RdbFacts:
    """Read the file once, to its end. Raises BackupDamaged where its structure or its checksum is wrong."""
    size = path.stat().st_size
    if not is_rdb(path):
        raise BackupDamaged(f"{path.name} is not an RDB file: it does not begin with REDIS")
    if size < HEADER_BYTES + TRAILER_BYTES:
        raise BackupDamaged(f"{path.name} is cut off: {size} bytes are too few for an RDB file")
    with path.open("rb") as file:
        head = _read_head(file.read(HEAD_BYTES))
        version = _version(path)
        mark = _end_mark_bytes(file, size)
        computed, stored, sha256 = _checksums(file, path, size - mark)
    if mark and stored != computed:
        raise BackupDamaged(f"{path.name} is cut off: it does not end like an RDB file")
    if stored not in {0, computed}:
        raise BackupDamaged(
            f"{path.name} is damaged: its CRC64 is {stored:016x}, its content makes {computed:016x}"
        )
    return RdbFacts(
        version=version,
        redis_version=head.aux.get("redis-ver", ""),
        size=size,
        sha256=sha256,
        crc_present=stored != 0,
        crc_ok=stored == computed,
        dumped_graph=head.aux.get(_DUMP_MARK),
        graph_encoding=head.graph_encoding,
        memory=int(used) if re.fullmatch(r"[0-9]{1,18}", used := head.aux.get("used-mem", "")) else 0,
    )


def _version(path: Path) -> int:
    with path.open("rb") as file:
        return int(file.read(HEADER_BYTES)[len(MAGIC) :])


def _end_mark_bytes(file: BinaryIO, size: int) -> int:
    """The length of the mark behind the RDB: `redis-cli --rdb -` writes out the one that ends a diskless sync."""
    file.seek(max(0, size - _MARK_BYTES - TRAILER_BYTES))
    tail = file.read()
    marked = len(tail) == _MARK_BYTES + TRAILER_BYTES and tail[-TRAILER_BYTES] != _END and tail[0] == _END
    return _MARK_BYTES if marked and re.fullmatch(rb"[0-9a-f]{40}", tail[-_MARK_BYTES:]) else 0


def _checksums(file: BinaryIO, path: Path, size: int) -> tuple[int, int, str]:
    """CRC64 of all but the trailer's eight bytes, the CRC64 stored there, and the sha256 of the whole file.

    `size`: without the mark of a diskless sync, if there is one.
    """
    file.seek(0)
    crc, digest, left = 0, hashlib.sha256(), size - 8
    last = b""
    while left:
        chunk = file.read(min(CHUNK_BYTES, left))
        if not chunk:
            raise BackupDamaged(f"{path.name} became shorter while it was read")
        crc, left, last = crc64(chunk, crc), left - len(chunk), chunk
        digest.update(chunk)
    if last[-1] != _END:
        raise BackupDamaged(f"{path.name} is cut off: it does not end like an RDB file")
    trailer = file.read(8)
    digest.update(trailer + file.read())
    return crc, int.from_bytes(trailer, "little"), digest.hexdigest()


def require_rdb_checksum(path: Path, facts: RdbFacts, *, expected_sha256: str = "") -> None:
    """Raise BackupDamaged unless a checksum covers the file: the given sha256, or else its own CRC64.

    A damaged RDB without a checksum loads silently wrong: seen with 2 to 24 of 200 random damages.
    """
    if expected_sha256 and facts.sha256 != expected_sha256:
        raise BackupDamaged(f"{path.name} is not the file its manifest describes: its sha256 differs")
    if not expected_sha256 and not facts.crc_ok:
        raise BackupDamaged(
            f"{path.name} carries no checksum (its server ran with `rdbchecksum no`), so damage cannot be told",
            next_step="name the backup's manifest (backup_*.json), which holds its sha256",
        )


def wrap_dump(payload: bytes, key: str, *, redis_version: str = "", created: int = 0) -> Iterator[bytes]:
    """The pieces of an RDB file that holds one key, `key`, with the value that DUMP gave as `payload`.

    `created` is in seconds since 1970. The file loads like any other, and `unwrap_dump` cuts the payload out again.
    """
    name = key.encode()
    aux = {"redis-ver": redis_version, "ctime": str(created), _DUMP_MARK: key}
    head = b"%s%04d" % (MAGIC, rdb_version(payload))
    head += b"".join(
        bytes([_AUX]) + written_string(field.encode()) + written_string(text.encode())
        for field, text in aux.items()
    )
    head += bytes([_SELECT_DB, 0]) + payload[:1] + written_string(name)
    crc = crc64(head)
    yield head
    value = memoryview(payload)[1:-DUMP_FOOTER_BYTES]
    for start in range(0, len(value), CHUNK_BYTES):
        piece = bytes(value[start : start + CHUNK_BYTES])
        crc = crc64(piece, crc)
        yield piece
    end = bytes([_END])
    yield end + crc64(end, crc).to_bytes(8, "little")


def unwrap_dump(path: Path) -> bytes | None:
    """The DUMP payload of a file that `wrap_dump` made, for RESTORE; None for any other RDB.

    The payload is held in memory, as RESTORE needs it. The file's checksum must have been checked before.
    """
    with path.open("rb") as file:
        start = file.read(HEAD_BYTES)
        head = _read_head(start)
        if _DUMP_MARK not in head.aux:
            return None
        kind_at = head.data_at + 2
        key = take_string(start, kind_at + 1)
        if start[head.data_at : kind_at] != bytes([_SELECT_DB, 0]) or key is None:
            raise BackupDamaged(f"{path.name} says that it wraps a graph, and does not hold one")
        file.seek(key[1])
        value = file.read(os.fstat(file.fileno()).st_size - key[1] - TRAILER_BYTES)
    payload: bytes = (
        start[kind_at : kind_at + 1] + value + struct.pack("<H", int(start[len(MAGIC) : HEADER_BYTES]))
    )
    return payload + crc64(payload).to_bytes(8, "little")


def _read_head(start: bytes) -> _Head:
    aux: dict[str, str] = {}
    at = HEADER_BYTES
    while start[at : at + 1] == bytes([_AUX]):
        field = take_string(start, at + 1)
        text = take_string(start, field[1]) if field else None
        if field is None or text is None:
            break
        aux[field[0].decode("utf-8", "replace")] = text[0].decode("utf-8", "replace")
        at = text[1]
    return _Head(aux, _graph_encoding(start, at), at)


def _graph_encoding(start: bytes, at: int) -> int | None:
    """From the module's own auxiliary field, which precedes the data, or from the first key's value."""
    if start[at : at + 1] == bytes([_MODULE_AUX]):
        identity = take_module_id(start, at + 1)
    else:
        key = take_string(start, at + 3) if start[at + 2 : at + 3] == bytes([MODULE_VALUE]) else None
        identity = take_module_id(start, key[1]) if key else None
    return identity[1] if identity and identity[0].startswith("graph") else None
