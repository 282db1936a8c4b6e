"""RDB files and DUMP payloads: their fields, versions and checksums, and the conversion of one to the other."""

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
MAGIC = b"REDIS"
HEADER_BYTES = TRAILER_BYTES = 9  # the trailer: 0xFF and the CRC64
DUMP_FOOTER_BYTES = 10  # RDB version and CRC64
CHUNK_BYTES = 1 << 20
HEAD_BYTES = 64 * 1024  # the auxiliary fields fit many times
_NAME_BYTES = 4096  # enough of a value's beginning to find a name
_MARK_BYTES = 40  # https://redis.io/docs/latest/operate/oss_and_stack/management/replication/ (diskless)
_AUX, _SELECT_DB, _MODULE_AUX, _END, _LZF = 0xFA, 0xFE, 0xF7, 0xFF, 0xC3
_MODULE_VALUE, _STRING_FOLLOWS = 7, 5
_DUMP_MARK = "automem-dump"  # an auxiliary field that `wrap_dump` adds; servers skip unknown ones


def crc64(data: bytes, crc: int = 0) -> int:
    """Return redis's CRC64 of `data`, continued from `crc`."""
    return int(_CRC64.calc(data, crc))


def read_module_id(data: bytes, at: int) -> tuple[str, int] | None:
    """Return the name of a module's data type, and the version of its encoding (the low ten bits of its id)."""
    found = read_length(data, at)
    if found is None:
        return None
    return "".join(_MODULE_NAME[found[0] >> shift & 63] for shift in range(58, 9, -6)), found[0] & 1023


def read_length(data: bytes, at: int) -> tuple[int, int] | None:
    """Return a length and the offset after it; None if the data ends before that, or if it is not a plain length."""
    first = data[at] if at < len(data) else 0xFF
    wide = {0x80: 4, 0x81: 8}.get(first)
    if first < 0x40:
        return first, at + 1
    if first < 0x80 and at + 1 < len(data):
        return (first & 0x3F) << 8 | data[at + 1], at + 2
    if wide and at + 1 + wide <= len(data):
        return int.from_bytes(data[at + 1 : at + 1 + wide], "big"), at + 1 + wide
    return None


def read_string(data: bytes, at: int) -> tuple[bytes, int] | None:
    """Return a string and the offset after it, or None. Small integers, which an RDB packs, become their digits."""
    width = {0xC0: 1, 0xC1: 2, 0xC2: 4}.get(data[at] if at < len(data) else 0)
    if width and at + 1 + width <= len(data):
        number = int.from_bytes(data[at + 1 : at + 1 + width], "little", signed=True)
        return b"%d" % number, at + 1 + width
    found = read_length(data, at)
    if found is None or sum(found) > len(data):
        return None
    return data[found[1] : sum(found)], sum(found)


def encoded_string(text: bytes) -> bytes:
    """Return a string as an RDB holds it: a length of one, two or five bytes, then the text."""
    size = len(text)
    if size < 0x40:
        return bytes([size]) + text
    if size < 0x4000:
        return struct.pack(">H", 0x4000 | size) + text
    return b"\x80" + struct.pack(">I", size) + text


def rdb_version(payload: bytes) -> int:
    """Return the RDB version that a server must know to accept this payload."""
    return int.from_bytes(payload[-DUMP_FOOTER_BYTES:-8], "little")


def graph_encoding(payload: bytes) -> int:
    """Return the version of FalkorDB's encoding. Raises BackupDamaged if the payload is not a graph."""
    identity = read_module_id(payload, 1) if payload[:1] == bytes([_MODULE_VALUE]) else None
    if identity is None or not identity[0].startswith("graph"):
        raise BackupDamaged("this DUMP payload holds no graph")
    return identity[1]


def graph_name(payload: bytes) -> str | None:
    """Return the name that the graph had when it was dumped; None if the encoding is not known (18 and 20 are).

    RESTORE under any other name crashes FalkorDB 4.16, and gives one graph two names on 4.22.
    """
    start = _first_string(payload[: 64 * 1024])
    for at in (0, 1):  # encoding 20 writes a type byte before each field
        size = int.from_bytes(start[at : at + 8], "little")
        name = start[at + 8 : at + 8 + size]
        if 1 < size == len(name) and name.find(b"\0") == size - 1:
            return name[:-1].decode("utf-8", "replace")
    return None


def _first_string(payload: bytes) -> bytes:
    """Return the beginning of the first string in the value, uncompressed."""
    head = read_length(payload, 1)
    if head is None or payload[head[1] : head[1] + 1] != bytes([_STRING_FOLLOWS]):
        return b""
    at = head[1] + 1
    if payload[at] != _LZF:
        plain = read_string(payload, at)
        return plain[0] if plain else payload[at + 5 :]
    packed = read_length(payload, at + 1)
    unpacked = read_length(payload, packed[1]) if packed else None
    return _unpack(payload[unpacked[1] :]) if unpacked else b""


def _unpack(packed: bytes) -> bytes:
    """Unpack the first bytes of an LZF stream (http://oldhome.schmorp.de/marc/liblzf.html)."""
    out, at = bytearray(), 0
    while at < len(packed) and len(out) < _NAME_BYTES:
        control = packed[at]
        at += 1
        if control < 32:  # the number of literal bytes, less one
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


@dataclass(frozen=True)
class RdbFacts:
    """What an RDB file records about itself. `crc_ok`: it has a checksum, and it is right.

    `dumped_graph`: the name of the graph in a file that `wrap_dump` made. `graph_encoding`: the version of FalkorDB's
    encoding, if found. `memory`: the bytes that the server used when it wrote the file; 0 if unknown.
    """

    version: int
    redis_version: str
    size: int
    sha256: str
    crc_ok: bool
    dumped_graph: str | None
    graph_encoding: int | None
    memory: int = 0


def is_rdb(path: Path) -> bool:
    """Whether the file begins like an RDB."""
    with path.open("rb") as file:
        return re.fullmatch(rb"REDIS\d{4}", file.read(HEADER_BYTES)) is not None


def inspect_rdb(path: Path) -> RdbFacts:
    """Read the whole file once. Raises BackupDamaged if its structure or its checksum is wrong."""
    size = path.stat().st_size
    if not is_rdb(path):
        raise BackupDamaged(f"{path.name} is not an RDB file: it does not begin with REDIS")
    if size < HEADER_BYTES + TRAILER_BYTES:
        raise BackupDamaged(f"{path.name} is cut off: {size} bytes are too few for an RDB file")
    with path.open("rb") as file:
        version, aux, encoding, _ = _read_head(file.read(HEAD_BYTES))
        # `redis-cli --rdb -` writes the mark of a diskless sync after the RDB.
        file.seek(max(0, size - _MARK_BYTES - TRAILER_BYTES))
        tail = file.read()
        marked = len(tail) == _MARK_BYTES + TRAILER_BYTES and tail[-TRAILER_BYTES] != _END and tail[0] == _END
        mark = _MARK_BYTES if marked and re.fullmatch(rb"[0-9a-f]{40}", tail[-_MARK_BYTES:]) else 0
        computed, stored, sha256 = _checksums(file, path, size - mark)
    if mark and stored != computed:
        raise BackupDamaged(f"{path.name} is cut off: it does not end like an RDB file")
    if stored not in {0, computed}:
        raise BackupDamaged(f"{path.name} is damaged: its CRC64 is {stored:016x}, its content makes {computed:016x}")
    used = aux.get("used-mem", "")
    return RdbFacts(
        version=version,
        redis_version=aux.get("redis-ver", ""),
        size=size,
        sha256=sha256,
        crc_ok=stored == computed,
        dumped_graph=aux.get(_DUMP_MARK),
        graph_encoding=encoding,
        memory=int(used) if re.fullmatch(r"[0-9]{1,18}", used) else 0,
    )


def _checksums(file: BinaryIO, path: Path, size: int) -> tuple[int, int, str]:
    """Return the CRC64 of all but the last eight bytes, that in these, and the sha256 of the whole file."""
    file.seek(0)
    crc, digest, left, chunk = 0, hashlib.sha256(), size - 8, b""
    while left:
        chunk = file.read(min(CHUNK_BYTES, left))
        if not chunk:
            raise BackupDamaged(f"{path.name} became shorter while it was read")
        crc, left = crc64(chunk, crc), left - len(chunk)
        digest.update(chunk)
    if chunk[-1] != _END:
        raise BackupDamaged(f"{path.name} is cut off: it does not end like an RDB file")
    trailer = file.read(8)
    digest.update(trailer + file.read())
    return crc, int.from_bytes(trailer, "little"), digest.hexdigest()


def require_rdb_checksum(path: Path, facts: RdbFacts) -> None:
    """Raise BackupDamaged unless the file's own CRC64 confirms the content.

    A damaged RDB without a checksum can load silently wrong: seen with 2 to 24 of 200 random damages.
    """
    if not facts.crc_ok:
        text = f"{path.name} has no checksum (its server ran with `rdbchecksum no`), so damage cannot be detected"
        raise BackupDamaged(text, next_step="name the backup's manifest (backup_*.json), which holds its sha256")


def wrap_dump(payload: bytes, key: str) -> Iterator[bytes]:
    """Yield the pieces of an RDB file that holds one key, `key`, with the value of the DUMP `payload`.

    A server loads it like any other. A DUMP records neither the server's version nor a time.
    """
    head = b"%s%04d" % (MAGIC, rdb_version(payload))
    for field, text in (("redis-ver", ""), ("ctime", "0"), (_DUMP_MARK, key)):
        head += bytes([_AUX]) + encoded_string(field.encode()) + encoded_string(text.encode())
    head += bytes([_SELECT_DB, 0]) + payload[:1] + encoded_string(key.encode())
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
    """Return the DUMP payload of a verified file that `wrap_dump` made, for RESTORE; None for any other RDB."""
    with path.open("rb") as file:
        start = file.read(HEAD_BYTES)
        version, aux, _, at = _read_head(start)
        if _DUMP_MARK not in aux:
            return None
        key = read_string(start, at + 3)
        if start[at : at + 2] != bytes([_SELECT_DB, 0]) or key is None:
            raise BackupDamaged(f"{path.name} is marked as a wrapped graph, and does not hold one")
        file.seek(key[1])
        value = file.read(os.fstat(file.fileno()).st_size - key[1] - TRAILER_BYTES)
    payload: bytes = start[at + 2 : at + 3] + value + struct.pack("<H", version)
    return payload + crc64(payload).to_bytes(8, "little")


def _read_head(start: bytes) -> tuple[int, dict[str, str], int | None, int]:
    """Return RDB version, auxiliary fields, version of the graph encoding, and the offset after the fields."""
    aux: dict[str, str] = {}
    at = HEADER_BYTES
    while start[at : at + 1] == bytes([_AUX]):
        field = read_string(start, at + 1)
        text = read_string(start, field[1]) if field else None
        if field is None or text is None:
            break
        aux[field[0].decode("utf-8", "replace")] = text[0].decode("utf-8", "replace")
        at = text[1]
    # The encoding is in the module's auxiliary field, which precedes the data, or in the first key's value.
    if start[at : at + 1] == bytes([_MODULE_AUX]):
        identity = read_module_id(start, at + 1)
    else:
        key = read_string(start, at + 3) if start[at + 2 : at + 3] == bytes([_MODULE_VALUE]) else None
        identity = read_module_id(start, key[1]) if key else None
    encoding = identity[1] if identity and identity[0].startswith("graph") else None
    return int(start[len(MAGIC) : HEADER_BYTES]), aux, encoding, at
