from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lib.clients.qdrant.segments import EngineKilled, SegmentFiles, Segments, opened_segments
from lib.clients.qdrant.snapshot_format import Section, SnapshotFacts, Sparse, entries, inspect_snapshot
from lib.errors import BackupDamaged
from tests.qdrant_uploads import content, recorded_snapshots, repacked

VERSIONS = ["1.11.3", "1.18.3"]
SNAPSHOTS = {version: recorded_snapshots(version) for version in VERSIONS}


@pytest.fixture(params=VERSIONS)
def snapshots(request: pytest.FixtureRequest) -> dict[str, bytes]:
    return SNAPSHOTS[request.param]


class Trickle:
    """A stream that gives less than it is asked for, as networks and decompressors do."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int, /) -> bytes:
        return self._data.read(min(size, 1000))


def inspect(data: bytes) -> SnapshotFacts:
    return inspect_snapshot(io.BytesIO(data))


def headers(data: bytes) -> list[tuple[int, tarfile.TarInfo]]:
    """The entries' offsets in the file, also of sparse ones."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [(member.offset, member) for member in archive.getmembers()]


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    for _, member in headers(data):
        if "/segments/" in member.name and member.isfile():
            yield member.offset_data, member.size


def overwritten(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def renamed(data: bytes, old: str, new: str) -> bytes:
    """The header of `old` with another name and a right checksum."""
    offset = next(offset for offset, member in headers(data) if member.name == old)
    return rewritten(data, offset, lambda header: header.__setitem__(slice(0, 100), new.encode().ljust(100, b"\0")))


def rewritten(data: bytes, offset: int, change: Callable[[bytearray], None]) -> bytes:
    header = bytearray(data[offset : offset + 512])
    change(header)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return overwritten(data, offset, bytes(header))


def test_facts_of_real_snapshots(snapshots: dict[str, bytes]):
    facts = inspect(snapshots["memories_4d.snapshot"])
    assert (facts.size, facts.distance, facts.vectors_named) == (4, "Cosine", False)
    assert (facts.segments, facts.shards, facts.absent_shards) == (2, {0: 2}, [])
    assert facts.config["wal_config"]["wal_capacity_mb"] == 1
    assert inspect(snapshots["memories_8d.snapshot"]).size == 8
    assert inspect(snapshots["memories_dot.snapshot"]).distance == "Dot"
    assert inspect(snapshots["memories_two_shards.snapshot"]).shards == {0: 2, 1: 2}


def test_a_stream_of_small_pieces_gives_the_same_facts(snapshots: dict[str, bytes]):
    data = snapshots["memories_two_shards.snapshot"]
    assert inspect_snapshot(Trickle(data)) == inspect(data)


def test_the_stream_is_read_to_its_end(snapshots: dict[str, bytes]):
    stream = io.BytesIO(snapshots["memories_4d.snapshot"])
    inspect_snapshot(stream)
    assert stream.read() == b""


@pytest.mark.parametrize(
    "damage",
    [
        "memories_4d.snapshot with every segment zeroed",
        "memories_4d.snapshot with every segment 'x'",
        "memories_4d.snapshot without 0/segments/*",
        "memories_4d.snapshot without config.json",
        "memories_4d.snapshot with config.json = {nope",
        "memories_4d.snapshot with the WAL 'x'",
        "gzip of memories_4d.snapshot",
        "12,000 bytes of 'junk'",
        "no bytes",
    ],
)
def test_what_servers_lose_data_on_is_refused(snapshots: dict[str, bytes], damage: str):
    """The zeroed and the dropped segments restore with 200 on a server, and the WAL kills the collection."""
    with pytest.raises(BackupDamaged) as caught:
        inspect(content(damage, snapshots, recorded=True))
    assert caught.value.exit_code == 4
    assert caught.value.next_step


@pytest.mark.parametrize("vectors", [{"a": 1}, {"size": "4"}, {"a": {"size": None}}], ids=str)
def test_a_configuration_that_no_server_writes_is_refused(snapshots: dict[str, bytes], vectors: dict[str, object]):
    config = json.dumps({"params": {"vectors": vectors}}).encode()
    data = repacked(snapshots["memories_4d.snapshot"], lambda name, body: config if name == "config.json" else body)
    with pytest.raises(BackupDamaged, match="without the size of its vectors"):
        inspect(data)


def test_one_zeroed_segment_is_refused(snapshots: dict[str, bytes]):
    data = snapshots["memories_4d.snapshot"]
    at, size = list(segments(data))[1]
    with pytest.raises(BackupDamaged, match=r"segment 0/segments/.* is empty, zeroed or cut"):
        inspect(overwritten(data, at, bytes(size)))


@pytest.mark.parametrize("part", [0.001, 0.25, 0.5, 0.9, 0.999])
def test_a_segment_zeroed_from_some_point_on_is_refused(snapshots: dict[str, bytes], part: float):
    data = snapshots["memories_4d.snapshot"]
    at, size = next(segments(data))
    last = data.rindex(b"snapshot/files/segment.json", at, at + size)
    begin = at + int((last - at) * part)
    with pytest.raises(BackupDamaged):
        inspect(overwritten(data, begin, bytes(at + size - begin)))


def test_a_tar_cut_anywhere_is_refused(snapshots: dict[str, bytes]):
    """1.11.3 restores one that is cut between entries with 200, and changes nothing."""
    data = snapshots["memories_4d.snapshot"]
    end = len(data.rstrip(b"\0"))
    cuts = {offset for offset, _ in headers(data)}
    cuts |= {offset + 512 for offset, _ in headers(data)}
    cuts |= set(range(0, end, 9973)) | {1, 511, end}
    for cut in sorted(cuts):
        with pytest.raises(BackupDamaged):
            inspect(data[:cut])


def test_a_header_with_a_flipped_bit_is_refused(snapshots: dict[str, bytes]):
    data = snapshots["memories_4d.snapshot"]
    for offset, _ in headers(data):
        flipped = bytes([data[offset + 2] ^ 1])
        with pytest.raises(BackupDamaged):
            inspect(overwritten(data, offset + 2, flipped))


def test_data_behind_the_end_is_refused(snapshots: dict[str, bytes]):
    with pytest.raises(BackupDamaged, match="behind its end"):
        inspect(snapshots["memories_4d.snapshot"] + bytes(2000) + b"more")
    assert inspect(snapshots["memories_4d.snapshot"] + bytes(9000)).segments == 2


@pytest.mark.parametrize("name", ["../config.json", "/etc/config.json", "0/../../x", "..", "a/..", "..\\x"], ids=repr)
def test_names_that_lead_outside_are_refused_as_malicious(snapshots: dict[str, bytes], name: str):
    with pytest.raises(BackupDamaged, match="refused as malicious"):
        inspect(renamed(snapshots["memories_4d.snapshot"], "config.json", name))


def test_such_a_name_inside_a_segment_is_refused_too(snapshots: dict[str, bytes]):
    data = snapshots["memories_4d.snapshot"]
    at, size = next(segments(data))
    evil = renamed(data[at : at + size], "snapshot/files/version.info", "../../../version.info")
    with pytest.raises(BackupDamaged, match="malicious"):
        inspect(overwritten(data, at, evil))


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6"])
def test_links_and_devices_are_refused(snapshots: dict[str, bytes], kind: bytes):
    data = snapshots["memories_4d.snapshot"]
    offset = next(offset for offset, member in headers(data) if member.name == "version.info")
    with pytest.raises(BackupDamaged, match="link or device"):
        inspect(rewritten(data, offset, lambda header: header.__setitem__(slice(156, 157), kind)))


def test_unknown_kinds_are_refused(snapshots: dict[str, bytes]):
    data = snapshots["memories_4d.snapshot"]
    offset = next(offset for offset, member in headers(data) if member.name == "version.info")
    with pytest.raises(BackupDamaged, match="unknown type"):
        inspect(rewritten(data, offset, lambda header: header.__setitem__(slice(156, 157), b"x")))


def test_a_name_given_twice_is_refused(snapshots: dict[str, bytes]):
    data = snapshots["memories_4d.snapshot"]
    with pytest.raises(BackupDamaged, match="twice"):
        inspect(renamed(data, "version.info", "config.json"))


def test_a_segment_of_another_collection_is_refused(snapshots: dict[str, bytes]):
    data, other = snapshots["memories_4d.snapshot"], snapshots["memories_8d.snapshot"]
    at, size = next(segments(data))
    foreign_at, foreign_size = next(segments(other))
    assert foreign_size <= size
    with pytest.raises(BackupDamaged, match="another size or distance"):
        inspect(overwritten(data, at, other[foreign_at : foreign_at + foreign_size].ljust(size, b"\0")))


def test_one_nodes_part_of_a_cluster_shows_which_shard_is_absent():
    """The other shards are there as bare configuration, as on real clusters."""
    assert inspect(part_of_cluster(drop_state=False)).absent_shards == [1]
    with pytest.raises(BackupDamaged, match="lacks shard 1"):
        inspect(part_of_cluster(drop_state=True))


def part_of_cluster(*, drop_state: bool) -> bytes:
    out = io.BytesIO()
    data = SNAPSHOTS["1.18.3"]["memories_two_shards.snapshot"]
    with tarfile.open(fileobj=io.BytesIO(data)) as source, tarfile.open(fileobj=out, mode="w") as target:
        for member in source:
            body = source.extractfile(member).read()
            if re.match(r"1/(segments|wal)/", member.name) or (drop_state and member.name.startswith("1/")):
                continue
            if member.name == "1/replica_state.json":
                body = json.dumps({**json.loads(body), "is_local": False}).encode()
            plain = tarfile.TarInfo(member.name)
            plain.size = len(body)
            target.addfile(plain, io.BytesIO(body))
    return out.getvalue()


def test_long_names_are_read():
    out = io.BytesIO()
    name = "0/" + "n" * 300
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))
    found = [(entry.name, entry.content.read(9)) for entry in read(out.getvalue())]
    assert found == [(name, b"hello")]


def test_sparse_entries_have_the_content_that_tar_gives_them(snapshots: dict[str, bytes]):
    data = snapshots["memories_4d.snapshot"]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        wanted = {one.name: archive.extractfile(one).read() for one in archive if one.isfile()}
        sparse = {one.name for one in archive if one.issparse()}
    found = {entry.name: everything(entry.content) for entry in read(data) if entry.is_file}
    assert found == wanted
    assert bool(sparse) == (data is SNAPSHOTS["1.18.3"]["memories_4d.snapshot"])


def test_a_sparse_map_of_several_blocks(tmp_path):
    """Written by GNU tar, if it is installed."""
    import shutil
    import subprocess

    if (
        shutil.which("tar") is None
        or "GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True).stdout
    ):
        pytest.skip("no GNU tar on this machine")
    with (tmp_path / "holes").open("wb") as file:
        for index in range(60):
            file.seek(index * 65536)
            file.write(b"%04d" % index * 1024)
        file.truncate(5_000_000)
    command = ["tar", "--format=gnu", "--sparse", "--hole-detection=raw", "-cf", "a.tar", "holes"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (entry,) = (everything(entry.content) for entry in read((tmp_path / "a.tar").read_bytes()))
    assert entry == (tmp_path / "holes").read_bytes()


def test_memory_stays_flat_over_a_large_entry():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("0/wal/first-index")
        info.size = 64 * 1024 * 1024
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    data = io.BytesIO(out.getvalue())
    tracemalloc.start()
    names = [entry.name for entry in entries(Section(data, None, "it"), needs_end=True)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names == ["0/wal/first-index"]
    assert peak < 8 * 1024 * 1024


@contextlib.contextmanager
def opened(data: bytes, folder: Path) -> Iterator[Segments | None]:
    with contextlib.closing(SegmentFiles(folder)) as files:
        inspect_snapshot(io.BytesIO(data), files.save)
    with opened_segments(files) as segments:
        yield segments


def test_the_engine_counts_what_it_can_open(tmp_path):
    pytest.importorskip("qdrant_edge")
    new = SNAPSHOTS["1.18.3"]
    for name, points in (("memories_4d.snapshot", {0: 50}), ("memories_two_shards.snapshot", {0: 26, 1: 14})):
        (tmp_path / name).mkdir()
        with opened(new[name], tmp_path / name) as segments:
            assert segments.counts == points
            assert segments.count == sum(points.values())
    with opened(SNAPSHOTS["1.11.3"]["memories_4d.snapshot"], tmp_path) as segments:
        assert segments is None


def test_the_engine_finds_the_ids_that_exist(tmp_path):
    pytest.importorskip("qdrant_edge")
    with opened(SNAPSHOTS["1.18.3"]["memories_4d.snapshot"], tmp_path) as segments:
        every = segments.held([*range(100), *(f"00000000-0000-4000-8000-{number:012x}" for number in range(100))])
        assert len(every) == 50
        some = sorted(every, key=str)[:7]
        assert segments.held([*some, 2**60, "ffffffff-0000-4000-8000-000000000000"]) == set(some)
        with pytest.raises(BackupDamaged, match="the engine refuses"):
            segments.held(["no id"])


@pytest.mark.parametrize(("number", "error"), [(9, EngineKilled), (11, BackupDamaged)])
def test_an_engine_that_dies_ends_nothing_else(tmp_path, monkeypatch, number, error):
    dying = tmp_path / "dying.py"
    dying.write_text(f"import os\ninput()\nos.kill(os.getpid(), {number})\n")
    monkeypatch.setattr("lib.clients.qdrant.segments._ENGINE", "dying")
    monkeypatch.setattr("lib.child_process._ROOT", tmp_path)
    (tmp_path / "segments").mkdir()
    with pytest.raises(error), opened(SNAPSHOTS["1.18.3"]["memories_4d.snapshot"], tmp_path / "segments"):
        pass


def test_an_engine_that_is_killed_between_two_questions_ends_nothing_else(tmp_path, monkeypatch):
    """The second one stays in the pipe: closing that must not end in another error."""
    dying, answer = tmp_path / "dying.py", '{"answer": {"0": 50}}'
    dying.write_text(f"import os\ninput()\nos.close(0)\nprint('{answer}', flush=True)\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr("lib.clients.qdrant.segments._ENGINE", "dying")
    monkeypatch.setattr("lib.child_process._ROOT", tmp_path)
    (tmp_path / "segments").mkdir()
    with pytest.raises(EngineKilled), opened(SNAPSHOTS["1.18.3"]["memories_4d.snapshot"], tmp_path / "segments") as one:
        one.held([1])


def test_a_dropped_segment_shows_in_the_engines_count(tmp_path):
    pytest.importorskip("qdrant_edge")
    data = content("memories_4d.snapshot without its first segment", SNAPSHOTS["1.18.3"], recorded=True)
    assert inspect(data).segments == 1
    with opened(data, tmp_path) as segments:
        assert segments.count in range(1, 50)


def read(data: bytes):
    return entries(Section(io.BytesIO(data), None, "it"), needs_end=True)


def everything(stream: Section | Sparse) -> bytes:
    return b"".join(iter(lambda: stream.read(100_000), b""))
