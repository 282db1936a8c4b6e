"""The fields that an RDB file is made of: lengths, strings, module types, and its CRC64."""

from __future__ import annotations

import struct

import anycrc

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
