"""The collection's archive: content is read back unchanged, memory stays flat, every kind of damage is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import orjson
import pytest

from lib.backup.archive import FACTS, IDS, SNAPSHOT, archive_writer, peek_facts, read_archive
from lib.concurrency import BackgroundWriter
from lib.errors import VERIFICATION_FAILED, BackupDamaged, BadFile, MigrationError

ROOT = Path(__file__).resolve().parents[2]
NAME = "c-1-2026-01-01-00-00-00.snapshot"
CONTENT = os.urandom(300_000) + b"\0" * 100_001
IDENTITIES = [str(number) for number in range(500)] + ["00000000-0000-4000-8000-000000000001"]
PROMISES = {
    "collection": "c",
    "server": {"address": "http://localhost:6333", "version": "1.11.3"},
    "config": {"params": {"vectors": {"size": 3, "distance": "Cosine"}}},
    "aliases": [],
    "model": "m",
    "snapshot_name": NAME,
    "snapshot_size": len(CONTENT),
    "snapshot_sha256": hashlib.sha256(CONTENT).hexdigest(),
    "promised_ids": len(IDENTITIES),
    "odd": "\u2603 \U0001f600",
}
MEMBERS = [
    (FACTS, orjson.dumps(PROMISES)),
    (SNAPSHOT + NAME, CONTENT),
    (IDS, "".join(f"{one}\n" for one in IDENTITIES).encode()),
]


def write(path, members=MEMBERS):
    with archive_writer(path) as archive:
        for name, data in members:
            archive.add(name, io.BytesIO(data), len(data))
        return archive.finish()


def write_plain(path, members):
    """An archive by the standard library: any member, in any order, of any type."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "qdrant_snapshot_20260101_000000.tar.gz"
    write(path)
    return path


@pytest.fixture
def damaged(whole, tmp_path):
    """Write the archive's bytes as they were changed."""

    def changed(data: bytes) -> Path:
        path = tmp_path / "damaged.tar.gz"
        path.write_bytes(data)
        return path

    return changed


def test_what_goes_in_comes_out(tmp_path):
    path = tmp_path / "a.tar.gz"
    size, sha256 = write(path)
    assert size == path.stat().st_size
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    seen, ids = [], []
    facts = read_archive(path, on_snapshot=lambda stream: seen.append(stream.read()), on_ids=ids.extend)
    assert facts.facts == PROMISES == peek_facts(path)
    assert seen == [CONTENT]
    assert ids == IDENTITIES
    assert (facts.snapshot.name, facts.snapshot.size) == (NAME, len(CONTENT))
    assert facts.snapshot.sha256 == PROMISES["snapshot_sha256"]
    assert facts.ids == len(IDENTITIES)


def test_readers_that_stop_early_do_not_change_what_is_counted(whole):
    facts = read_archive(whole, on_snapshot=lambda stream: stream.read(10), on_ids=next)
    assert facts.snapshot.sha256 == PROMISES["snapshot_sha256"]
    assert facts.ids == len(IDENTITIES)


def test_any_tool_can_open_it(whole, tmp_path):
    subprocess.run(["tar", "xzf", whole, "-C", tmp_path], check=True)
    assert (tmp_path / SNAPSHOT / NAME).read_bytes() == CONTENT
    assert (tmp_path / IDS).read_text().split() == IDENTITIES


def test_a_member_of_another_length_than_announced_is_refused_and_no_file_appears(tmp_path):
    for announced in (len(CONTENT) - 1, len(CONTENT) + 1):
        path = tmp_path / "a.tar.gz"
        with pytest.raises(BackupDamaged, match="the server sent"), archive_writer(path) as archive:
            archive.add(SNAPSHOT + NAME, io.BytesIO(CONTENT), announced)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quarter", [0, 1, 2, 3, 4])
def test_a_cut_file(whole, damaged, quarter):
    data = whole.read_bytes()
    cut = len(data) * quarter // 4 if quarter < 4 else len(data) - 1
    with pytest.raises(MigrationError) as caught:
        read_archive(damaged(data[:cut]))
    assert caught.value.exit_code == VERIFICATION_FAILED
    assert "damaged.tar.gz" in str(caught.value)


def test_a_flipped_bit_is_refused_or_changes_nothing(whole, damaged):
    """Return nothing: for gzip's header fields (bytes 3 to 9), and for the padding between deflate's blocks."""
    data, facts = whole.read_bytes(), read_archive(whole)
    spots = [*range(10), *range(10, len(data), len(data) // 60), *range(len(data) - 8, len(data))]
    harmless = []
    for spot in spots:
        for bit in (0, 4, 7):
            try:
                found = read_archive(damaged(flipped(data, spot, bit)))
            except BackupDamaged:
                continue
            assert found == facts
            harmless.append(spot)
    assert len([spot for spot in harmless if spot > 9]) < len(spots) // 10


def flipped(data: bytes, spot: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[spot] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("extra", [b"x", b"\x1f\x8b", b"garbage" * 100])
def test_bytes_after_the_end(whole, damaged, extra):
    with pytest.raises(BackupDamaged):
        read_archive(damaged(whole.read_bytes() + extra))


@pytest.mark.parametrize("field", [(0, 100), (100, 108), (124, 136), (148, 154), (156, 157), (257, 263)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_changed_tar_header_in_a_sound_gzip(whole, tmp_path, field, which):
    """The name, the mode, the size, the checksum, the type and the magic of each member."""
    plain = bytearray(gzip.decompress(whole.read_bytes()))
    starts, position = [], 0
    for _, data in MEMBERS:
        starts.append(position)
        position += 512 + len(data) + -len(data) % 512
    for spot in {field[0], (field[0] + field[1]) // 2, field[1] - 1}:
        changed = bytearray(plain)
        changed[starts[which] + spot] ^= 0x11
        path = tmp_path / "a.tar.gz"
        path.write_bytes(gzip.compress(bytes(changed), 1))
        with pytest.raises((BackupDamaged, BadFile)):
            read_archive(path)


@pytest.mark.parametrize("size", [-1, 0, 1, len(CONTENT) - 512, len(CONTENT) + 512, 1 << 40])
def test_a_member_size_that_lies_in_a_sound_header(tmp_path, size):
    name, _content = MEMBERS[1]
    info = tarfile.TarInfo(name)
    info.size = size
    out = io.BytesIO()
    for one, content in MEMBERS:
        true = tarfile.TarInfo(one)
        true.size = len(content)
        out.write((info if one == name else true).tobuf(tarfile.GNU_FORMAT))
        out.write(content + b"\0" * (-len(content) % 512))
    out.write(b"\0" * 1024)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(out.getvalue(), 1))
    with pytest.raises(BackupDamaged):
        read_archive(path)


@pytest.mark.parametrize(
    "order",
    [
        (1, 0, 2),
        (0, 2, 1),
        (2, 1, 0),
        (0, 1),
        (0, 2),
        (1, 2),
        (0,),
        (),
        (0, 1, 1, 2),
        (0, 1, 2, 2),
        (0, 0, 1, 2),
    ],
)
def test_members_that_are_swapped_missing_or_double(tmp_path, order):
    path = tmp_path / "a.tar.gz"
    write(path, [MEMBERS[one] for one in order])
    with pytest.raises(MigrationError) as caught:
        read_archive(path)
    assert caught.value.exit_code in {2, VERIFICATION_FAILED}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_members_of_another_type(tmp_path, kind, at):
    members = [(name, data, tarfile.REGTYPE) for name, data in MEMBERS]
    members.insert(at, ("snapshot/../../evil", b"", kind))
    path = tmp_path / "a.tar.gz"
    write_plain(path, members)
    with pytest.raises(BackupDamaged, match="holds a member that no backup has"):
        read_archive(path)


@pytest.mark.parametrize("name", ["other.txt", "ids.txt.bak", "/collection.json", "../ids.txt"])
def test_members_of_another_name(tmp_path, name):
    path = tmp_path / "a.tar.gz"
    write(path, [*MEMBERS, (name, b"x")])
    with pytest.raises(BackupDamaged, match="holds a member that no backup has"):
        read_archive(path)


@pytest.mark.parametrize("facts", [b"", b"{", b"\xff", b"[" * 5000])
def test_facts_that_are_no_json(tmp_path, facts):
    path = tmp_path / "a.tar.gz"
    write(path, [(FACTS, facts), *MEMBERS[1:]])
    for read in (read_archive, peek_facts):
        with pytest.raises(BackupDamaged, match=r"collection\.json cannot be read"):
            read(path)


@pytest.mark.parametrize("facts", [[], {}, "text", {"collection": "c"}])
def test_facts_of_another_program(tmp_path, facts):
    path = tmp_path / "a.tar.gz"
    write(path, [(FACTS, orjson.dumps(facts)), *MEMBERS[1:]])
    for read in (read_archive, peek_facts):
        with pytest.raises(BadFile, match=r"is a tar\.gz, but not one"):
            read(path)


def test_ids_that_are_no_text(tmp_path):
    path = tmp_path / "a.tar.gz"
    write(path, [*MEMBERS[:2], (IDS, b"1\n2\n\xff\xfe\n")])
    with pytest.raises(BackupDamaged, match=r"line 3 of its ids\.txt is no id"):
        read_archive(path)


def test_another_programs_tar_gz(tmp_path):
    path = tmp_path / "theirs.tar.gz"
    write_plain(path, [("readme.md", b"hello", tarfile.REGTYPE)])
    with pytest.raises(BadFile, match=r"is a tar\.gz, but not one"):
        peek_facts(path)
    path.write_bytes(gzip.compress(b"no tar at all"))
    with pytest.raises(MigrationError):
        peek_facts(path)


@pytest.mark.matrix
@pytest.mark.parametrize("what", ["write", "read"])
def test_memory_does_not_grow_with_the_data(tmp_path, what):
    """The child's peak, for 8 MB and for 200 MB."""
    code = """
import io, json, resource, sys
from pathlib import Path
from lib.backup import archive as a
path, what, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if what == "write":
    with a.archive_writer(path) as archive:
        ids = size // 10 // 1000 * 100
        facts = json.dumps({**json.loads(sys.argv[4]), "promised_ids": ids}).encode()
        archive.add(a.FACTS, io.BytesIO(facts), len(facts))
        archive.begin(a.SNAPSHOT + "s", size)
        block = bytes(range(256)) * 4096
        for _ in range(size // len(block)):
            archive.write(block)
        archive.end()
        archive.begin(a.IDS, size // 10 // 1000 * 1000)
        for _ in range(size // 10 // 1000):
            archive.write(b"123456789\\n" * 100)
        archive.end()
        archive.finish()
else:
    a.read_archive(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = {}
    for size in (8 << 20, 200 << 20):
        for step in ("write", "read"):
            run = [sys.executable, "-c", code, str(tmp_path / f"{size}.tar.gz"), step, str(size)]
            run.append(json.dumps(PROMISES))
            peaks[step, size] = int(subprocess.run(run, cwd=ROOT, capture_output=True, check=True).stdout)
    assert peaks[what, 200 << 20] / peaks[what, 8 << 20] <= 1.15


def test_a_write_that_the_disk_refuses_raises_in_the_caller_and_ends_the_thread(tmp_path):
    def full(_piece: bytes) -> None:
        raise OSError(28, "No space left on device")

    def much() -> None:
        for _ in range(1000):  # more than the queue holds: a writer that has failed blocks nobody
            writer.write(b"x")
        writer.finish()

    writer = BackgroundWriter(full)
    with pytest.raises(OSError, match="No space left"):
        much()
    writer.close()
    assert not any(thread.is_alive() for thread in writer._pool._threads)


def test_pieces_are_written_in_their_order():
    seen: list[bytes] = []
    writer = BackgroundWriter(seen.append)
    pieces = [bytes([number % 256]) for number in range(300)]
    for piece in pieces:
        writer.write(piece)
    writer.finish()
    assert seen == pieces
