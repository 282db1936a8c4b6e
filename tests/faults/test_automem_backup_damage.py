"""Damaged backups of AutoMem's own scripts are refused, each with its file, its fault and a next step.

Nothing live is touched, and nothing is written to the backup folder. `--check` reports the same faults.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.automem_json_support import (
    COLLECTION_FILE,
    GRAPH_FILE,
    TAR,
    Row,
    assert_restored,
    automem_operator,
    graph_of,
    json_of,
    make_live,
    members_of,
    packed,
    points_in_store,
    refused,
    saved,
    tar_of,
)
from tests.matrix import matrix
from tests.operator_support import Operator
from tests.restore_support import damaged

pytestmark = pytest.mark.qdrant

Damage = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def _untouched(session_servers, tmp_path_factory) -> Iterator[Operator]:
    with automem_operator(session_servers, tmp_path_factory.mktemp("untouched")) as someone:
        make_live(someone)
        someone.backups.mkdir()
        yield someone


@pytest.fixture
def untouched(_untouched) -> Operator:
    """The same stores for all tests whose restores are refused: none changes anything."""
    return _untouched


def edited(change: Callable[[Row], object]) -> Damage:
    """A damage of the content, in a file that is otherwise as AutoMem writes it."""

    def damage(data: bytes) -> bytes:
        content = json.loads(gzip.decompress(data))
        change(content)
        return packed(content)

    return damage


def in_text(change: Callable[[bytes], bytes]) -> Damage:
    """A damage of the text that is compressed."""
    return lambda data: gzip.compress(change(gzip.decompress(data)))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def put(*keys: Any, value: object) -> Damage:
    """Set the value that these keys lead to."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edited(change)


def drop(*keys: Any) -> Damage:
    """Delete what these keys lead to."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edited(change)


def twice(key: str, count: str) -> Damage:
    """Write the fourth item of the array a second time, and count it."""

    def change(content: Row) -> None:
        content[key].append(content[key][3])
        content["stats"][count] += 1

    return edited(change)


def nested(levels: int) -> list[Any]:
    """A list in a list in a list ..."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


# Damages of both files: the text is cut, changed or followed by something.
OF_BYTES: dict[str, Damage] = {
    "gzip truncated": lambda data: data[: len(data) // 2],
    "gzip truncated at its end": lambda data: data[:-3],
    "gzip of ten bytes": lambda data: data[:10],
    "byte flipped": lambda data: flipped(data, len(data) // 2),
    "checksum flipped": lambda data: flipped(data, len(data) - 6),
    "rubbish after the gzip": lambda data: data + b"rubbish that is no gzip",
    "JSON cut": in_text(lambda text: text[: len(text) // 2]),
    "JSON cut before its last brace": in_text(lambda text: text[:-1]),
    "JSON followed by a second object": in_text(lambda text: text + b"\n{}\n"),
    "JSON followed by rubbish": in_text(lambda text: text + b"rubbish"),
    "not UTF-8": in_text(lambda text: text.replace(b"working days", b"working \xff\xfe\x80", 1)),
    "a comma is missing": in_text(lambda text: text.replace(b"},\n    {", b"}\n    {", 1)),
    "a timestamp alone": in_text(lambda text: text[: text.index(b"timestamp") + 30].partition(b",")[0] + b"\n}"),
    "no stats": drop("stats"),
}
OF_GRAPH: dict[str, Damage] = {
    "node count edited": put("stats", "node_count", value=63),
    "relationship count edited": put("stats", "relationship_count", value=78),
    "node id twice": twice("nodes", "node_count"),
    "relationship from a missing node": put("relationships", 5, "source_id", value=4711),
    "relationship to a missing node": put("relationships", 5, "target_id", value=4711),
    "no relationships": drop("relationships"),
    "node without an id": drop("nodes", 4, "id"),
    "node without labels": drop("nodes", 4, "labels"),
    "node id a text": put("nodes", 4, "id", value="four"),
    "labels a text": put("nodes", 4, "labels", value="Memory"),
    "properties a list": put("nodes", 4, "properties", value=[1, 2]),
    "relationship without a type": put("relationships", 4, "type", value=""),
    "nodes an object": put("nodes", value={}),
    "text that UTF-8 cannot hold": put("nodes", 4, "properties", "odd", value="a\ud800"),
    "name of a property that UTF-8 cannot hold": put("nodes", 4, "properties", "\ud800", value=1),
    "text of a node without labels that UTF-8 cannot hold": edited(
        lambda content: content["nodes"][4].update(labels=[], properties={"odd": "a\ud800"})
    ),
    "label that UTF-8 cannot hold": put("nodes", 4, "labels", value=["\ud800"]),
    "label that no query can name": put("nodes", 4, "labels", value=["a`b"]),
    "type that no query can name": put("relationships", 4, "type", value="a`b"),
    "place without a latitude": put("nodes", 4, "properties", "place", value={"latitude": None, "longitude": 2}),
    "place beyond every float": put("nodes", 4, "properties", "place", value={"latitude": 10**400, "longitude": 2}),
    "place beyond the pole": put("nodes", 4, "properties", "place", value={"latitude": 91, "longitude": 2}),
    "list of 900 levels": put("nodes", 4, "properties", "odd", value=nested(900)),
    "empty": edited(
        lambda content: content.update(nodes=[], relationships=[], stats={"node_count": 0, "relationship_count": 0})
    ),
}
OF_COLLECTION: dict[str, Damage] = {
    "points count edited": put("stats", "points_count", value=26),
    "vector size edited": put("stats", "vector_size", value=64),
    "point id twice": twice("points", "points_count"),
    "vectors of two sizes": drop("points", 4, "vector", 0),
    "vector with NaN": put("points", 4, "vector", 2, value=math.nan),
    "vector with infinity": put("points", 4, "vector", 2, value=math.inf),
    "vector with a text": put("points", 4, "vector", 2, value="0.5"),
    "vector with null": put("points", 4, "vector", 2, value=None),
    "vector with a list": put("points", 4, "vector", 2, value=[0.5]),
    "vector of lists": put("points", 4, "vector", value=[[0.5]] * 48),
    "vector with a number that float32 lacks": put("points", 4, "vector", 2, value=1e300),
    "no vector": drop("points", 4, "vector"),
    "vector null": put("points", 4, "vector", value=None),
    "point without an id": drop("points", 4, "id"),
    "point id a word": put("points", 4, "id", value="four"),
    "point id negative": put("points", 4, "id", value=-4),
    "payload a list": put("points", 4, "payload", value=[1]),
    "points an object": put("points", value={}),
    "payload with a text that UTF-8 cannot hold": put("points", 4, "payload", "odd", value="a\ud800"),
    "payload with 65 bits": put("points", 4, "payload", "odd", value=1 << 64),
    "payload with NaN": put("points", 4, "payload", "odd", value=math.nan),
    "payload with infinity": put("points", 4, "payload", "odd", value=[math.inf]),
    "payload of 300 levels": put("points", 4, "payload", "odd", value=nested(300)),
    "empty": edited(lambda content: content.update(points=[], stats={"points_count": 0, "vector_size": 48})),
}
CASES = [
    *((GRAPH_FILE.parent.name, name) for name in (*OF_BYTES, *OF_GRAPH)),
    *((COLLECTION_FILE.parent.name, name) for name in (*OF_BYTES, *OF_COLLECTION)),
]
# What the message must name, in addition to the file.
NAMED = {
    "node count edited": ("62", "63"),
    "relationship count edited": ("78", "79"),
    "points count edited": ("26", "27"),
    "vector size edited": ("48", "64"),
    "relationship from a missing node": ("4711",),
    "relationship to a missing node": ("4711",),
    "node id twice": (str(json_of(GRAPH_FILE)["nodes"][3]["id"]),),
    "point id twice": (str(json_of(COLLECTION_FILE)["points"][3]["id"]),),
    "vectors of two sizes": ("47", "48"),
    "vector with NaN": (str(json_of(COLLECTION_FILE)["points"][4]["id"]),),
    "vector with a number that float32 lacks": (str(json_of(COLLECTION_FILE)["points"][4]["id"]),),
    "point id a word": ("four",),
    "payload with 65 bits": (str(json_of(COLLECTION_FILE)["points"][4]["id"]),),
    "payload with NaN": (str(json_of(COLLECTION_FILE)["points"][4]["id"]),),
}


def damaged_copy(service: str, name: str, folder: Path) -> tuple[Path, Path]:
    """The damaged copy of a kept file, and the other file of the pair."""
    path, other = (GRAPH_FILE, COLLECTION_FILE) if service == "falkordb" else (COLLECTION_FILE, GRAPH_FILE)
    damages = {**OF_BYTES, **(OF_GRAPH if service == "falkordb" else OF_COLLECTION)}
    data = path.read_bytes()
    bad = damages[name](data)
    assert bad != data
    return saved(folder / path.name, bad), other


@pytest.mark.parametrize(
    ("service", "name"),
    matrix(
        CASES,
        ("falkordb", "gzip truncated"),
        ("falkordb", "node count edited"),
        ("qdrant", "byte flipped"),
        ("qdrant", "vectors of two sizes"),
    ),
)
def test_a_damaged_file_is_refused(untouched, tmp_path, service, name):
    path, other = damaged_copy(service, name, tmp_path)
    words = [path, other] if service == "falkordb" else [other, path]
    for more in ((), ("--dry-run",)):
        err = refused(untouched, *words, *more)
        assert path.name in err
        for word in NAMED.get(name, ()):
            assert word in err, err
    checked = untouched.run("backup_automem", "--check", path, expect=None)
    assert checked.code in {2, 4}, checked.out + checked.err
    assert path.name in checked.out + checked.err


@pytest.mark.parametrize("number", range(30))
def test_a_random_damage_of_the_bytes_is_refused(untouched, tmp_path, number):
    """gzip's checksum covers every byte but those of its header that say nothing about the content."""
    chance = random.Random(number)
    path = chance.choice([GRAPH_FILE, COLLECTION_FILE])
    data = path.read_bytes()
    kind = chance.choice(["bit", "cut", "zeros", "junk", "gap"])
    bad = data[:10] + damaged(data[10:], kind, chance)
    assert path.name in refused(untouched, saved(tmp_path / path.name, bad))


# --- the tar.gz ---------------------------------------------------------------------------------------------------


def renamed(old: str, new: str) -> Callable[[Path], bytes]:
    """A member gets another name."""

    def change(_folder: Path) -> bytes:
        members = members_of(TAR).items()
        return tar_of((tarfile.TarInfo(new if name.startswith(old) else name), data) for name, data in members)

    return change


def with_member(kind: bytes, name: str, target: str = "") -> Callable[[Path], bytes]:
    """One more member, at the beginning."""

    def change(folder: Path) -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target or str(folder / "outside")
        rest = [(tarfile.TarInfo(one), data) for one, data in members_of(TAR).items()]
        return tar_of([(info, b""), *rest])

    return change


def with_damaged(service: str) -> Callable[[Path], bytes]:
    """One member is damaged, the archive is complete."""

    def change(_folder: Path) -> bytes:
        members = members_of(TAR).items()
        return tar_of(
            (tarfile.TarInfo(name), flipped(data, len(data) // 2) if name.startswith(service) else data)
            for name, data in members
        )

    return change


TARS: dict[str, Callable[[Path], bytes]] = {
    "truncated": lambda _folder: TAR.read_bytes()[: TAR.stat().st_size // 2],
    "truncated between its members": lambda _folder: gzip.compress(gzip.decompress(TAR.read_bytes())[:15000]),
    "byte flipped": lambda _folder: flipped(TAR.read_bytes(), TAR.stat().st_size // 2),
    "graph damaged": with_damaged("falkordb"),
    "collection damaged": with_damaged("qdrant"),
    "no member": lambda _folder: tar_of([]),
    "a path above the folder": renamed("qdrant", "../qdrant_20261127_185329.json.gz"),
    "a path below and above the folder": renamed("qdrant", "qdrant/../../qdrant_20261127_185329.json.gz"),
    "an absolute path": renamed("qdrant", "/tmp/qdrant_20261127_185329.json.gz"),
    "a symbolic link": with_member(tarfile.SYMTYPE, "falkordb/falkordb_20261127_185328.json.gz"),
    "a link of the folder": with_member(tarfile.SYMTYPE, "qdrant"),
    "a hard link": with_member(tarfile.LNKTYPE, "falkordb/falkordb_20261127_185328.json.gz"),
    "a device": with_member(tarfile.CHRTYPE, "falkordb/falkordb_20261127_185328.json.gz"),
    "a FIFO": with_member(tarfile.FIFOTYPE, "falkordb/falkordb_20261127_185328.json.gz"),
}


@pytest.mark.parametrize("name", matrix(TARS, "a path above the folder"))
def test_a_damaged_or_hostile_tar_is_refused(untouched, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("not to be changed")
    folder = tmp_path / "copies"
    path = saved(folder / TAR.name, TARS[name](tmp_path))
    err = refused(untouched, path)
    assert TAR.name in err
    assert outside.read_text() == "not to be changed"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["copies", "outside"]
    assert list(folder.iterdir()) == [path]
    assert not Path("/tmp/qdrant_20261127_185329.json.gz").exists()


# --- cut at a page ------------------------------------------------------------------------------------------------


def cut_at_a_page(content: Row) -> None:
    """What the export leaves if the server cuts results: its first page is short, so it is also the last one."""
    content["nodes"] = content["nodes"][:40]
    content["stats"]["node_count"] = 40


@pytest.fixture
def cut(tmp_path) -> Path:
    content = json_of(GRAPH_FILE)
    cut_at_a_page(content)
    return saved(tmp_path / GRAPH_FILE.name, packed(content))


def missing_ends(path: Path) -> list[Row]:
    content = json_of(path)
    ids = {one["id"] for one in content["nodes"]}
    return [one for one in content["relationships"] if not {one["source_id"], one["target_id"]} <= ids]


@pytest.mark.core
def test_a_file_that_was_cut_at_a_page_is_refused(untouched, cut):
    for words in ([cut], [cut, COLLECTION_FILE]):
        err = refused(untouched, *words)
        assert cut.name in err
        assert "--force-incomplete" in err
        assert str(len(missing_ends(cut))) in err


@pytest.fixture
def live(_untouched) -> Iterator[Operator]:
    """The same stores for a test that changes them."""
    yield _untouched
    make_live(_untouched)


@pytest.mark.core
def test_with_force_incomplete_it_restores_what_is_there_and_lists_the_rest(live, cut):
    content, lost = json_of(cut), missing_ends(cut)
    result = live.run("restore_from_backup", cut, COLLECTION_FILE, "--force-incomplete", expect=None)
    assert result.code in {0, 3}, result.err
    assert str(len(lost)) in result.out + result.err
    complete = [one for one in content["relationships"] if one not in lost]
    assert_restored(live, graph=graph_of(content["nodes"], complete))


def test_force_incomplete_admits_no_damage(untouched, tmp_path):
    for service, name in (
        ("falkordb", "byte flipped"),
        ("falkordb", "node count edited"),
        ("qdrant", "vector with NaN"),
        ("qdrant", "point id twice"),
    ):
        path, _other = damaged_copy(service, name, tmp_path)
        assert path.name in refused(untouched, path, "--force-incomplete")


def test_a_pair_of_two_graphs(untouched, tmp_path):
    """Files of another deployment's names."""
    path = saved(tmp_path / GRAPH_FILE.name, put("graph_name", value="somebody_else")(GRAPH_FILE.read_bytes()))
    err = refused(untouched, path, COLLECTION_FILE)
    assert "somebody_else" in err


def test_the_same_store_twice_is_refused(untouched, tmp_path):
    copy = saved(tmp_path / "falkordb_20261126_000000.json.gz", GRAPH_FILE.read_bytes())
    refused(untouched, GRAPH_FILE, copy)
    assert points_in_store(untouched)
