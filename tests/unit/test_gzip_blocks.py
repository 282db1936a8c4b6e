"""The archive's gzip: any gunzip reads it, random floats are stored, and no member can be cut off unseen."""

from __future__ import annotations

import gzip
import io
import os
import subprocess

import numpy as np
import pytest
from isal import igzip_threaded

from lib.backup.archive import BLOCK_BYTES, GzipBlocks, archive_writer, packed, read_archive
from lib.errors import BackupDamaged
from tests.unit.test_archive import MEMBERS

FLOATS = np.random.default_rng(1).standard_normal(BLOCK_BYTES).astype(np.float32).tobytes()
ZEROS = b"\0" * (3 * BLOCK_BYTES)


class Recorder(io.BytesIO):
    """Records the offset at which each write ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[int] = []

    def write(self, data) -> int:
        written = super().write(data)
        self.ends.append(self.tell())
        return written


def blocks_of(*pieces: bytes) -> Recorder:
    out = Recorder()
    writer = GzipBlocks(out)
    for piece in pieces:
        writer.write(piece)
    writer.close()
    return out


def pieces_of(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [700, 65_536, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 8 * BLOCK_BYTES])
def test_any_gunzip_reads_it(size, tmp_path):
    data = FLOATS + ZEROS + os.urandom(1000)
    path = tmp_path / "a.gz"
    path.write_bytes(blocks_of(*pieces_of(data, size)).getvalue())
    assert gzip.decompress(path.read_bytes()) == data
    with igzip_threaded.open(path, "rb") as plain:
        assert plain.read() == data
    assert subprocess.run(["gunzip", "-c", path], check=True, capture_output=True).stdout == data


def test_what_deflate_hardly_shrinks_is_stored_and_the_rest_deflated():
    assert BLOCK_BYTES < len(packed(FLOATS[:BLOCK_BYTES])) < 1.001 * BLOCK_BYTES
    assert len(packed(ZEROS[:BLOCK_BYTES])) < 0.02 * BLOCK_BYTES
    assert gzip.decompress(packed(b"")) == b""


def test_the_last_member_is_never_only_padding():
    out = blocks_of(FLOATS[:BLOCK_BYTES], FLOATS[:BLOCK_BYTES], b"\0" * 511, b"\0" * 1024)
    assert len(out.ends) == 2
    assert len(gzip.decompress(out.getvalue()[out.ends[0] :])) == BLOCK_BYTES + 511 + 1024


def test_an_archive_that_is_cut_where_a_member_ends_is_damaged(tmp_path, monkeypatch):
    import lib.backup.archive as home

    path, ends = tmp_path / "a.tar.gz", []
    real = home.PassThrough.write

    def noting(self, data):
        written = real(self, data)
        ends.append(self.size)
        return written

    monkeypatch.setattr(home.PassThrough, "write", noting)
    (facts, document), (name, _), ids = MEMBERS
    with archive_writer(path) as archive:
        for title, data in ((facts, document), (name, FLOATS), ids):
            archive.add(title, io.BytesIO(data), len(data))
        archive.finish()
    whole = path.read_bytes()
    read_archive(path)
    assert len(ends) >= 4
    for end in ends[:-1]:
        path.write_bytes(whole[:end])
        with pytest.raises(BackupDamaged):
            read_archive(path)
