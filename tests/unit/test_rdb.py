from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lib.backup.graph import inspect_backup
from lib.backup.manifest import BackupFile
from lib.clients.falkordb import rdb as dump_payload
from lib.clients.falkordb.rdb import (
    crc64,
    encoded_string,
    inspect_rdb,
    is_rdb,
    read_length,
    read_string,
    require_rdb_checksum,
    unwrap_dump,
    wrap_dump,
)
from lib.errors import BackupDamaged

# "graphdata" and encoding 18, as FalkorDB 4.16.3 writes its module id
GRAPH_ID = bytes.fromhex("8182b6a985d6ad6812")


def sealed(body: bytes) -> bytes:
    return body + crc64(body).to_bytes(8, "little")


def small_rdb(version: bytes = b"0012", end: bytes = b"\xff") -> bytes:
    aux = b"\xfa" + encoded_string(b"redis-ver") + encoded_string(b"8.2.3") + b"\xfa\x05ctime\xc2\xb1\x19\x03k"
    return sealed(
        b"REDIS" + version + aux + b"\xf7" + GRAPH_ID + b"\x02\x01\x02\x00\x00" + b"\xfe\x00\x00\x01k\x01v" + end
    )


def small_payload(name: bytes = b"memories", prefix: bytes = b"", version: int = 12) -> bytes:
    header = prefix + (len(name) + 1).to_bytes(8, "little") + name + b"\0" + bytes(range(256)) * 9
    return sealed(b"\x07" + GRAPH_ID + b"\x05" + encoded_string(header) + b"\x00" + version.to_bytes(2, "little"))


def file_of(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.rdb"
    path.write_bytes(data)
    return path


def wrapped(payload: bytes, key: str) -> bytes:
    return b"".join(wrap_dump(payload, key))


def test_the_checksum_is_that_of_redis():
    assert crc64(b"123456789") == 0xE9C6D914C4B8D9CA  # redis, crc64.c
    assert crc64(b"6789", crc64(b"12345")) == crc64(b"123456789")


def test_a_file_reports_its_version_and_origin(tmp_path: Path):
    data = small_rdb()
    facts = inspect_rdb(file_of(tmp_path, data))
    assert (facts.version, facts.redis_version, facts.size) == (12, "8.2.3", len(data))
    assert facts.crc_ok
    assert facts.sha256 == hashlib.sha256(data).hexdigest()
    assert (facts.dumped_graph, facts.graph_encoding) == (None, 18)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"R",
        b"REDIS",
        b"REDIS00",
        b"REDISabcd" + bytes(30),
        b"\x1f\x8b" + bytes(40),
        b"redis0012" + bytes(30),
    ],
)
def test_other_files_are_no_rdb(tmp_path: Path, data: bytes):
    path = file_of(tmp_path, data)
    assert not is_rdb(path)
    with pytest.raises(BackupDamaged, match="not an RDB"):
        inspect_rdb(path)


def test_every_cut_is_noticed(tmp_path: Path):
    data = small_rdb()
    for size in range(len(data)):
        with pytest.raises(BackupDamaged):
            inspect_rdb(file_of(tmp_path, data[:size]))


def test_every_flipped_bit_is_noticed(tmp_path: Path):
    data = small_rdb()
    for at in range(len(data)):
        for bit in (1, 128):
            broken = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            with pytest.raises(BackupDamaged):
                inspect_rdb(file_of(tmp_path, broken))


def test_a_file_with_the_wrong_end_is_noticed_without_a_checksum(tmp_path: Path):
    data = small_rdb(end=b"\x00")[:-8] + bytes(8)
    with pytest.raises(BackupDamaged, match="cut off"):
        inspect_rdb(file_of(tmp_path, data))


def test_a_file_without_checksum_needs_its_manifests_sha256(tmp_path: Path):
    data = small_rdb()[:-8] + bytes(8)
    path = file_of(tmp_path, data)
    facts = inspect_rdb(path)
    assert not facts.crc_ok
    with pytest.raises(BackupDamaged, match="no checksum"):
        require_rdb_checksum(path, facts)
    assert inspect_backup(path, BackupFile("x.rdb", len(data), hashlib.sha256(data).hexdigest())) == facts
    with pytest.raises(BackupDamaged, match="does not have the sha256"):
        inspect_backup(path, BackupFile("x.rdb", facts.size, "0" * 64))


def test_a_right_checksum_does_not_outweigh_another_sha256(tmp_path: Path):
    path = file_of(tmp_path, small_rdb())
    facts = inspect_rdb(path)
    require_rdb_checksum(path, facts)
    with pytest.raises(BackupDamaged, match="does not have the sha256"):
        inspect_backup(path, BackupFile("x.rdb", facts.size, "0" * 64))


@pytest.mark.parametrize("key", ["memories", "m" * 63, "m" * 64, "ü 漢字" * 30, "k" * 20_000])
def test_a_payload_is_wrapped_and_cut_out_again(tmp_path: Path, key: str):
    payload = small_payload(key.encode())
    path = file_of(tmp_path, wrapped(payload, key))
    facts = inspect_rdb(path)
    assert (facts.crc_ok, facts.dumped_graph, facts.version, facts.graph_encoding) == (True, key, 12, 18)
    assert unwrap_dump(path) == payload


def test_an_ordinary_rdb_is_not_unwrapped(tmp_path: Path):
    assert unwrap_dump(file_of(tmp_path, small_rdb())) is None


def test_pieces_of_a_large_payload_are_bounded():
    payload = sealed(b"\x07" + GRAPH_ID + bytes(5_000_000) + b"\x0c\x00")
    pieces = list(wrap_dump(payload, "g"))
    assert max(map(len, pieces)) <= 1 << 20
    assert b"".join(pieces)[-9:-8] == b"\xff"


def test_the_graphs_name_is_found_in_a_payload():
    assert dump_payload.graph_name(small_payload(b"memories")) == "memories"
    assert dump_payload.graph_name(small_payload("mé mories".encode())) == "mé mories"
    assert dump_payload.graph_name(small_payload(b"memories", prefix=b"\0")) == "memories"
    assert dump_payload.graph_name(b"\x00\x05hello" + bytes(10)) is None
    assert dump_payload.graph_name(b"") is None


def test_a_payload_reports_what_it_needs():
    assert dump_payload.rdb_version(small_payload(version=15)) == 15
    assert dump_payload.graph_encoding(small_payload()) == 18
    with pytest.raises(BackupDamaged, match="holds no graph"):
        dump_payload.graph_encoding(b"\x00\x05hello" + bytes(10))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 16_383, 16_384, 70_000])
def test_strings_of_every_length(size: int):
    data = encoded_string(b"a" * size) + b"rest"
    assert read_string(data, 0) == (b"a" * size, len(data) - 4)
    assert read_string(data[: size // 2], 0) in {None, (b"", 1)} or size == 0


def test_packed_numbers_are_strings_too():
    assert read_string(b"\xc0\xfe", 0) == (b"-2", 2)
    assert read_string(b"\xc1\x00\x01", 0) == (b"256", 3)
    assert read_string(b"\xc2\x00\x00\x01\x00", 0) == (b"65536", 5)
    assert read_length(b"\xc3", 0) is None
    assert read_length(b"", 0) is None
