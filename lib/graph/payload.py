"""DUMP payloads of graphs: which versions wrote one, and which graph's name stands inside.

A payload is a type byte, the module's id, the value, two bytes of RDB version and a CRC64
(https://github.com/redis/redis/blob/8.2/src/cluster.c, createDumpPayload).
"""

from __future__ import annotations

from lib.errors import BackupDamaged
from lib.graph.rdb_fields import take_length, take_module_id, take_string

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
