"""Files from elsewhere with content that no backup has: nothing is planted, removed or filled by them."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lib.backup.archive import read_archive
from lib.backup.manifest import sealed
from lib.errors import BackupDamaged
from lib.journal import start_journal

pytestmark = pytest.mark.qdrant


@pytest.fixture
def copied(operator, tmp_path) -> Path:
    """A set at a place of copies, and nothing of it in the backup folder."""
    operator.load(20)
    copies = tmp_path / "copies"
    operator.run("backup_automem", "--upload", f"file://{copies}")
    shutil.rmtree(operator.backups)
    return copies


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(path: Path, change) -> dict[str, Any]:
    """Change a manifest and seal it again, as somebody who may write at the place of the copies can."""
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(sealed(raw)))
    return raw


def planted(operator) -> str:
    """A journal that names the live collection as a spot check's own."""
    config = json.loads(operator.run("backup_automem", "--show-config", "--json").out)["settings"]
    graph = f"falkordb 127.0.0.1:{config['FALKORDB_PORT']['value']} {operator.graph}"
    collection = f"qdrant {operator.servers.qdrant_url.removeprefix('http://')} {operator.collection}"
    folder = operator.folder / "forge"
    folder.mkdir()
    journal = start_journal(folder, "spot_check", [graph, collection])
    journal.append("making", side=operator.collection, undo="touch PASTED")
    return journal.path.read_text()


def test_a_copy_plants_no_journal(operator, copied):
    (manifest,) = copied.glob("backup_*.json")
    text, name = planted(operator).encode(), "journal_20260101_000000_abcd_spot_check.jsonl"
    (copied / name).write_bytes(text)
    rewrite(manifest, lambda raw: raw["graph"]["file"].update(name=name, size=len(text)))
    before = operator.state()
    result = operator.run("restore_from_backup", f"file://{copied}/latest", "--dry-run", expect=4)
    assert f"its file is '{name}'" in result.err
    assert files_in(operator.backups) == {} if operator.backups.exists() else True
    assert operator.state() == before


def test_a_planted_journal_removes_nothing(operator):
    operator.load(20)
    operator.run("backup_automem")
    text = planted(operator)
    path = operator.backups / "journal_20260101_000000_abcd_spot_check.jsonl"
    path.write_text(text)
    before = operator.state()
    for script, *words in (
        ("reembed_embeddings", "--dry-run"),
        ("reembed_embeddings", "--abort"),
        ("restore_from_backup", "latest", "--dry-run"),
        ("backup_automem",),
    ):
        result = operator.run(script, *words, expect=2)
        assert "was not written by these scripts" in result.err
        assert str(path) in result.err
        assert "PASTED" not in result.err + result.out
    assert operator.state() == before


def test_a_run_that_noted_its_models_stamp_hinders_no_backup(operator):
    """Its journal is open, and its stamp is not a time."""
    operator.load(20)
    operator.backups.mkdir(mode=0o700)
    journal = start_journal(operator.backups, "reembed", ["falkordb other:1 g", "qdrant other:1 c"])
    journal.append("proved", stamp={"embedding_model": "m"})
    operator.run("backup_automem")


JOURNALS = {
    "a pipe": lambda path, _entry: os.mkfifo(path),
    "memory without end": lambda path, _entry: path.symlink_to("/dev/zero"),
    "a folder": lambda path, _entry: path.mkdir(),
    "larger than any": lambda path, _entry: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40),
    "targets": lambda path, entry: path.write_text(json.dumps({**entry, "targets": 5})),
    "command": lambda path, entry: path.write_text(json.dumps({**entry, "command": [1]})),
    "phase": lambda path, entry: path.write_text(json.dumps({**entry, "phase": [1]})),
    "at": lambda path, entry: path.write_text(json.dumps({**entry, "at": "2026-01-01T00:00:00"})),
    "side": lambda path, entry: path.write_text(json.dumps({**entry, "side": [entry]})),
}


@pytest.mark.parametrize("kind", list(JOURNALS))
def test_a_journal_of_another_kind_stops_with_its_name(operator, kind):
    """A copy or an archive from elsewhere may hold a pipe: no command waits for it, or fails with a traceback."""
    operator.load(20)
    operator.backups.mkdir(mode=0o700)
    path = operator.backups / "journal_20260101_000000_abcd_reembed.jsonl"
    entry = {"run_id": "20260101_000000_abcd", "command": "reembed", "targets": ["a b c"], "phase": "started"}
    JOURNALS[kind](path, {"at": "2026-01-01T00:00:00+00:00", **entry})
    for script, *words in (
        ("backup_automem",),
        ("reembed_embeddings", "--dry-run"),
        ("backup_automem", "--list"),
    ):
        result = operator.run(script, *words, expect=None if words == ["--list"] else 2)
        assert result.code == 0 or f"{path} was not written by these scripts" in result.err


@pytest.mark.parametrize("stamp", ["x/../../../stolen", "../stolen", "20260101_0000001"])
def test_a_stamp_leads_nowhere_else(operator, copied, stamp):
    (manifest,) = copied.glob("backup_*.json")
    rewrite(manifest, lambda raw: raw.update(stamp=stamp))
    before = set(operator.folder.rglob("*stolen*"))
    for word in (f"file://{copied}/latest", f"file://{copied}/{manifest.name}"):
        result = operator.run("restore_from_backup", word, "--dry-run", expect=4)
        assert "which is not that of its name" in result.err
    assert set(operator.folder.rglob("*stolen*")) == before


def test_what_does_not_verify_is_not_saved(operator, copied):
    """Every byte is as in the manifest, and the file is no archive: it never gets a name in the backup folder."""
    (manifest,), junk = copied.glob("backup_*.json"), gzip.compress(b"no archive")
    raw = json.loads(manifest.read_text())
    (copied / raw["collection"]["file"]["name"]).write_bytes(junk)
    import hashlib

    digest = hashlib.sha256(junk).hexdigest()
    rewrite(manifest, lambda raw: raw["collection"]["file"].update(size=len(junk), sha256=digest))
    before = operator.state()
    result = operator.run("restore_from_backup", f"file://{copied}/latest", expect=4)
    assert "does not verify, and was removed" in result.err
    assert files_in(operator.backups) == {}
    assert operator.state() == before


def test_a_file_that_never_ends_is_not_fetched_to_its_end(operator, copied):
    (manifest,) = copied.glob("backup_*.json")
    size = json.loads(manifest.read_text())["graph"]["file"]["size"]
    (rdb,) = (copied / "falkordb").iterdir()
    with rdb.open("ab") as stream:
        stream.truncate(size + (8 << 30))
    result = operator.run("restore_from_backup", f"file://{copied}/latest", "--dry-run", expect=4)
    assert "is not what its manifest says" in result.err
    assert sum(path.stat().st_size for path in operator.backups.rglob("*") if path.is_file()) <= size


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


BROKEN = {
    "lists 300 deep": lambda raw: raw["collection"].update(payload_schema={"x": deep(300)}),
    "no address": lambda raw: raw["graph"].update(server={"redis": "8.2.3", "falkordb": "4.16.3"}),
    "a port that none is": lambda raw: raw["graph"]["server"].update(address="localhost:99999999"),
    "an address that is none": lambda raw: raw["collection"]["server"].update(address="http://[::1"),
    "a date in the year 1": lambda raw: raw.update(created="0001-01-01T00:00:00+14:00"),
    "another file": lambda raw: raw["graph"]["file"].update(name="embeddings/vectors.sqlite3"),
    "a negative size": lambda raw: raw["graph"]["file"].update(size=-1),
    "a number as long as a book": lambda raw: raw["graph"].update(nodes=10**5000),
}


def write_broken(path: Path, raw: dict[str, Any], kind: str) -> None:
    changed = json.loads(json.dumps(raw))
    changed["stamp"] = path.stem.removeprefix("backup_")
    BROKEN[kind](changed)
    try:
        text = json.dumps(sealed(changed))
    except (
        TypeError,
        ValueError,
    ):  # too deep or too long to seal: a file without a valid checksum
        import sys

        sys.set_int_max_str_digits(0)
        text = json.dumps(changed)
        sys.set_int_max_str_digits(4300)
    path.write_text(text)


def test_a_manifest_that_cannot_be_read_stops_nothing(operator):
    """It is named and skipped by the list, by the check of all, and by the cleanup."""
    operator.load(20)
    operator.run("backup_automem")
    (good,) = operator.manifests()
    raw = json.loads(good.read_text())
    broken = []
    for number, kind in enumerate(BROKEN):
        broken.append(operator.backups / f"backup_20250101_0000{number:02d}.json")
        write_broken(broken[-1], raw, kind)
    folder = operator.backups / "backup_20250101_000100.json"
    folder.mkdir()
    precious = operator.backups / "embeddings" / "vectors.sqlite3"
    precious.parent.mkdir(exist_ok=True)
    precious.write_bytes(b"paid for")
    listed = operator.run("backup_automem", "--list", expect=None)
    checked = operator.run("backup_automem", "--check", "all", expect=4)
    operator.run("backup_automem", "--cleanup", "--keep", "1", expect=None)
    for path in [*broken, folder]:
        assert path.name in listed.out + listed.err
        assert path.name in checked.out + checked.err
    assert good.exists()
    assert precious.read_bytes() == b"paid for"


def test_an_rdb_with_a_number_as_long_as_a_book_is_read(tmp_path):
    from lib.clients.falkordb.rdb import crc64, encoded_string, inspect_rdb

    body = b"REDIS0012\xfa" + encoded_string(b"used-mem") + encoded_string(b"9" * 5000) + b"\xff"
    path = tmp_path / "g.rdb"
    path.write_bytes(body + crc64(body, 0).to_bytes(8, "little"))
    assert inspect_rdb(path).memory == 0


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_header_of_gigabytes_is_refused_before_it_is_read(tmp_path, kind):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 3 << 30
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.write(bytes(4 << 20))
    with pytest.raises(BackupDamaged, match="a header of 3221225472 bytes"):
        read_archive(path)


def entry(kind: bytes, content: bytes, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.matrix
def test_names_and_pieces_without_end_are_refused():
    from lib.clients.qdrant.snapshot_format import inspect_snapshot

    long = entry(tarfile.GNUTYPE_LONGNAME, b"n" * 60_000) + entry(tarfile.REGTYPE, b"")
    with pytest.raises(BackupDamaged, match="a name of 60000 bytes"):
        inspect_snapshot(io.BytesIO(long))
    many = b"".join(entry(tarfile.REGTYPE, b"", f"f{number}") for number in range(100_001))
    with pytest.raises(BackupDamaged, match="more than 100000 entries"):
        inspect_snapshot(io.BytesIO(many))


def test_no_more_is_fetched_than_the_manifest_says(tmp_path):
    from lib.backup.copies import _receive
    from lib.backup.copy_store import OffsiteStore
    from lib.backup.manifest import BackupFile

    taken = []

    class Endless:
        shown = "s3://copies"
        copy_out = OffsiteStore.copy_out

        def size_of(self, _name: str) -> None:
            return None

        def chunks(self, _name: str):
            while len(taken) < 100:
                taken.append(1)
                yield bytes(1 << 20)

    with pytest.raises(BackupDamaged, match="is not what its manifest says"):
        _receive(Endless(), BackupFile("f", 3 << 20, "0" * 64), tmp_path / "f", lambda _bytes: None)
    assert len(taken) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_backup_folder_into_which_others_may_write_is_refused(operator):
    operator.load(20)
    operator.run("backup_automem")
    before = operator.state()
    operator.backups.chmod(0o777)
    for script, *words in (
        ("backup_automem",),
        ("reembed_embeddings", "--dry-run"),
        ("restore_from_backup", "latest"),
        ("restore_from_backup", "--abort"),
        ("backup_automem", "--cleanup"),
    ):
        result = operator.run(script, *words, expect=2)
        assert f"others may write into the folder {operator.backups}" in result.err
        assert f"chmod -R go-w {operator.backups}" in result.err
    nowhere = operator.run("backup_automem", expect=2, env={"FALKORDB_PORT": "1"})
    assert "others may write into the folder" in nowhere.err  # before any server is asked
    operator.backups.chmod(0o755)
    operator.run("backup_automem")
    assert operator.state() == before


def test_the_embedding_cache_is_closed_to_others(operator):
    operator.load(20)
    operator.run("reembed_embeddings", "--dry-run")
    caches = list((operator.backups / "embeddings").glob("*.sqlite3"))
    for path in caches:
        path.chmod(0o644)
    operator.run("reembed_embeddings", "--dry-run")
    assert {path.stat().st_mode & 0o777 for path in caches} == {0o600}
    target = operator.folder / "of another"
    caches[0].rename(target)
    caches[0].symlink_to(target)
    before = target.read_bytes()
    assert "nothing is written through it" in operator.run("reembed_embeddings", "--dry-run", expect=2).err
    assert target.read_bytes() == before


def test_a_copy_is_closed_to_others_while_it_is_written(operator, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    modes, real = [], LocalFileSystem.put_file

    def put_file(self, source, target, **more):
        modes.append(Path(target).stat().st_mode & 0o777)
        return real(self, source, target, **more)

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)
    operator.load(20)
    operator.run("backup_automem", "--upload", str(tmp_path / "copies"))
    assert modes == [0o600] * 3
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "copies").rglob("*") if path.is_file()} == {0o600}


@pytest.mark.parametrize(
    "statement",
    [
        "VIEW v AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT i FROM n",
        "TRIGGER t AFTER INSERT ON vectors BEGIN DELETE FROM vectors; END",
    ],
    ids=["view", "trigger"],
)
def test_a_cache_that_runs_something_is_refused(operator, statement):
    operator.load(20)
    operator.run("reembed_embeddings", "--dry-run")
    path = operator.backups / "embeddings" / "vectors.sqlite3"
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"CREATE {statement}")
    result = operator.run("reembed_embeddings", "--dry-run", expect=1)
    assert f"{path} is not an embedding cache of this version" in result.err


def test_copies_that_a_synchronized_folder_makes_are_no_damage_and_no_unfinished_run(operator):
    """`--check all` ended with exit code 4, `latest` with "is broken", and a finished run was named as unfinished."""
    operator.load(20)
    operator.run("backup_automem")
    (manifest,), (journal,) = operator.manifests(), operator.backups.glob("journal_*.jsonl")
    for end in (" (conflicted copy 2026-11-29)", ".sync-conflict-20261129-ABC"):
        shutil.copy(manifest, manifest.with_name(f"{manifest.stem}{end}.json"))
        older = journal.read_bytes().splitlines(keepends=True)[:-1]
        journal.with_name(f"{journal.stem}{end}.jsonl").write_bytes(b"".join(older))
    listed = operator.run("backup_automem", "--list")
    assert listed.out.count(manifest.stem.removeprefix("backup_")) == 1
    assert listed.err == ""
    operator.run("backup_automem", "--check", "all")
    operator.run("restore_from_backup", "latest", "--dry-run")
    operator.run("backup_automem")
    operator.run("backup_automem", "--cleanup", "--keep", "1")
    assert [one.name for one in operator.backups.glob(f"{manifest.stem}*")] == []
    operator.run("backup_automem", "--check", "all")
    manifest = operator.manifests()[0]
    changed = operator.backups / f"{manifest.stem} (conflicted copy 2026-11-29).json"
    shutil.copy(manifest, changed)
    rewrite(changed, lambda raw: raw.update(drift=None))
    assert f"{changed.name} cannot be read" in operator.run("backup_automem", "--list").err
    checked = operator.run("backup_automem", "--check", "all", expect=4)
    assert "it was renamed, or is a copy: its stamp is" in checked.out
    operator.run("restore_from_backup", "latest", "--dry-run")
    manifest.unlink()
    refused = operator.run("restore_from_backup", "latest", "--dry-run", expect=4)
    assert "it was renamed, or is a copy" in refused.err
