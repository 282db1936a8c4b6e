"""The tar archives of snapshots, in the layout of the real server.

A collection's archive contains `config.json`, `version.info`, `shard_key_mapping.json`, `payload_index.json` and the
shard `0/` with a tar per segment (`0/segments/{uuid}.tar`, entries `snapshot/files/...`) and the log (`0/wal/`).
Files with holes are GNU sparse entries, which tarfile reads but does not write.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
COPY_BYTES = 1 << 20
PAGE = 4096
SPARSE_IN_HEADER, SPARSE_IN_EXTENSION = 4, 21
SEGMENT_FILES = "snapshot/files"
ROCKSDB_BACKUP = "snapshot/db_backup"  # 1.11 stores a segment's data here, 1.18 ignores the folder
DESCRIPTIONS = ("segment.json", "version.info")


class NotAnArchive(Exception):
    """The file is no tar."""


class SparseEntry(Exception):
    """The archive has a GNU sparse entry."""


class CutShort(Exception):
    """The archive ends within the entry of that name (`args[0]`)."""


def write_segment(archive: Path, folder: Path, *, modern: bool) -> None:
    """Pack one segment's files into `archive`, holes as holes. 1.11 (not `modern`) puts the data in another folder."""
    with archive.open("wb") as out:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file():
                root = SEGMENT_FILES if modern or name in DESCRIPTIONS else ROCKSDB_BACKUP
                add_sparse(out, f"{root}/{name}", path, path.stat().st_size)
        out.write(bytes(2 * BLOCK))


def add_folder(out: BinaryIO, name: str) -> None:
    """Append a folder's entry."""
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    out.write(info.tobuf(tarfile.GNU_FORMAT))


def add_bytes(out: BinaryIO, name: str, content: bytes) -> None:
    """Append a small file's entry."""
    add_file(out, name, io.BytesIO(content), len(content))


def add_file(out: BinaryIO, name: str, source: BinaryIO, size: int) -> None:
    """Append an entry of the first `size` bytes of `source`, padded with zeros."""
    info = tarfile.TarInfo(name)
    info.size = size
    out.write(info.tobuf(tarfile.GNU_FORMAT))
    _pad(out, _copy(source, out, size), size)


def add_sparse(out: BinaryIO, name: str, path: Path, size: int) -> None:
    """Append the first `size` bytes of a file, its holes as holes."""
    with path.open("rb") as source:
        extents = data_extents(source.fileno(), size)
        if sum(length for _, length in extents) == size:
            add_file(out, name, source, size)
            return
        extents.append((size, 0))
        out.write(_sparse_header(name, size, extents))
        stored = 0
        for offset, length in extents:
            source.seek(offset)
            stored += _copy(source, out, length)
        _pad(out, stored, stored)


def data_extents(descriptor: int, size: int) -> list[tuple[int, int]]:
    """List (offset, length) of everything but holes within the first `size` bytes. Rewinds the file.

    A page of zeros counts as a hole: file systems differ in which of the engine's preallocated pages they store.
    """
    extents: list[tuple[int, int]] = []
    position = 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            raise
        position = min(size, os.lseek(descriptor, start, os.SEEK_HOLE))
        for page in range(start - start % PAGE, position, PAGE):
            length = min(PAGE, size - page)
            if os.pread(descriptor, length, page) == bytes(length):
                continue
            if extents and sum(extents[-1]) == page:
                extents[-1] = (extents[-1][0], extents[-1][1] + length)
            else:
                extents.append((page, length))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return extents


def _sparse_header(name: str, size: int, extents: list[tuple[int, int]]) -> bytes:
    """Build a header of the old GNU sparse format (GNU tar manual, "Storing Sparse Files")."""
    info = tarfile.TarInfo(name)
    info.size = sum(length for _, length in extents)
    encoded = info.tobuf(tarfile.GNU_FORMAT)
    longname, header = encoded[:-BLOCK], bytearray(encoded[-BLOCK:])
    header[156:157] = b"S"
    header[386:482] = _sparse_map(extents[:SPARSE_IN_HEADER], SPARSE_IN_HEADER)
    rest = extents[SPARSE_IN_HEADER:]
    header[482] = bool(rest)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    extensions = b""
    while rest:
        now, rest = rest[:SPARSE_IN_EXTENSION], rest[SPARSE_IN_EXTENSION:]
        extensions += (_sparse_map(now, SPARSE_IN_EXTENSION) + bytes([bool(rest)])).ljust(BLOCK, b"\0")
    return bytes(longname) + bytes(header) + extensions


def _sparse_map(extents: list[tuple[int, int]], room: int) -> bytes:
    return b"".join(b"%011o\0%011o\0" % extent for extent in extents).ljust(24 * room, b"\0")


def _copy(source: BinaryIO, out: BinaryIO, size: int) -> int:
    copied = 0
    while copied < size:
        piece = source.read(min(COPY_BYTES, size - copied))
        if not piece:
            break
        copied += out.write(piece)
    return copied


def _pad(out: BinaryIO, written: int, size: int) -> None:
    out.write(bytes(size - written + -size % BLOCK))


def unpack(archive: Path, folder: Path, *, sparse_allowed: bool = True) -> None:
    """Unpack the regular files and folders of `archive` under `folder`.

    Raises NotAnArchive, SparseEntry, CutShort. An archive without any entry unpacks to nothing.
    """
    if archive.stat().st_size == 0:
        return
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if member.type == tarfile.GNUTYPE_SPARSE and not sparse_allowed:
                    raise SparseEntry(member.name)
                _unpack_member(tar, member, folder)
    except tarfile.ReadError as error:
        raise NotAnArchive(str(error)) from None


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    target = folder / os.path.normpath(member.name)
    if not target.is_relative_to(folder) or ".." in Path(member.name).parts:
        raise NotAnArchive(f"entry outside the archive: {member.name}")
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
    elif member.isfile():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            tar.makefile(member, target)
        except tarfile.ReadError:
            raise CutShort(str(target)) from None


def unpack_segment(archive: Path, folder: Path, *, modern: bool) -> None:
    """Unpack one segment's files into `folder`. An archive without files creates no folder."""
    scratch = archive.with_suffix(".unpacked")
    unpack(archive, scratch)
    files, data = scratch / SEGMENT_FILES, scratch / ROCKSDB_BACKUP
    if files.is_dir():
        files.rename(folder)
        if not modern and data.is_dir():
            for part in data.iterdir():
                part.rename(folder / part.name)
    shutil.rmtree(scratch, ignore_errors=True)
