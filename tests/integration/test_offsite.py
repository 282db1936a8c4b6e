"""Copies of the backups elsewhere, through the real scripts: S3 over HTTP, SFTP over SSH, a local folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import paramiko
import pytest

from lib.backup.copy_store import OffsiteStore
from lib.backup.manifest import read_manifest
from lib.errors import StoreFailed
from lib.files import lock_targets
from tests.matrix import matrix
from tests.offsite_support import BUCKET, PASSWORD, SECRET_KEY, USER, S3Server, SFTPServer
from tests.restore_support import assert_tidy, spoil

pytestmark = pytest.mark.qdrant


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(scope="module")
def ssh_key() -> paramiko.PKey:
    return paramiko.RSAKey.generate(2048)


@pytest.fixture
def sftp(tmp_path, ssh_key) -> Iterator[SFTPServer]:
    with SFTPServer(tmp_path / "sftp", ssh_key) as server:
        server.be_known(tmp_path)
        ssh_key.write_private_key_file(str(tmp_path / ".ssh" / "id_rsa"))
        yield server


@pytest.fixture(params=matrix(["file", "folder", "s3", "sftp"], "s3"))
def place(request, operator, s3, tmp_path) -> Place:
    """A place elsewhere of each kind, empty."""
    if request.param == "s3":
        operator.export(**s3.environ)
        folder = operator.graph
        return Place(f"s3://{BUCKET}/{folder}", lambda: s3.objects(folder))
    if request.param == "sftp":
        server = request.getfixturevalue("sftp")
        return Place(server.url("/copies/of automem"), lambda: files_in(server.folder / "copies/of automem"))
    folder = tmp_path / "copies"
    return Place(f"file://{folder}" if request.param == "file" else str(folder), lambda: files_in(folder))


class Place:
    def __init__(self, url, files) -> None:
        self.url = url
        self.files = files


def files_in(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def set_files(manifest: Path) -> dict[str, int]:
    files = {one.name: one.size for one in read_manifest(manifest).files}
    return {**files, manifest.name: manifest.stat().st_size}


@pytest.mark.matrix
@pytest.mark.parametrize("place", ["folder", "s3", "sftp"], indirect=True)
def test_a_graph_of_any_name_comes_back_from_a_copy(operator, place):
    """What is uploaded can be fetched: names that a shell, a URL or a glob would read as something else."""
    operator.graph += " caf\u00e9:m\u00e9mories [v2] *?#%20~'\"&;\u65e5"
    operator.load(40)
    before = operator.state()
    operator.run("backup_automem", "--upload", place.url)
    (manifest,) = operator.manifests()
    assert place.files() == set_files(manifest)
    if "://" not in place.url:
        place.url = f"file://{quote(place.url)}"
    operator.run("backup_automem", "--check", f"{place.url}/latest")
    shutil.rmtree(operator.backups)
    spoil(operator)
    operator.run("restore_from_backup", f"{place.url}/latest")
    assert operator.state() == before


@pytest.mark.parametrize("odd", ["back\\slash", "new\nline", "tab\tname", "bell\x07", "half\udce9"])
def test_a_name_that_no_copy_gives_back_is_refused_before_the_backup(operator, tmp_path, odd):
    operator.export(FALKORDB_GRAPH=f"g{odd}")
    result = operator.run("backup_automem", "--upload", str(tmp_path / "copies"), expect=2)
    assert ("cannot be fetched back" if odd.isprintable() else "or characters that cannot be printed") in result.err
    assert not operator.backups.exists()
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize(
    "where",
    matrix(
        [
            "backup@host:/copies",
            "s3:/bucket/copies",
            "s3:bucket/copies",
            "sftp:backup@host:/copies",
            "{backups}",
            "{backups}/drill",
            "{backups}/falkordb/",
            "file://{backups}/copies",
            "link",
            "copies/latest",
            "file://{folder}/copies/latest/",
            "copies/backup_20260101_000000.json",
            "copies/host_20260101_000000.d",
        ],
        "backup@host:/copies",
        "link",
        "copies/latest",
    ),
)
def test_what_would_be_no_copy_or_not_found_again_is_refused(operator, where):
    """As scp or restic write it, a set would go into a folder of that name here; the backup folder is no copy of itself."""
    operator.backups.mkdir()
    (operator.folder / "link").symlink_to(operator.backups)
    before = sorted(operator.folder.rglob("*"))
    url = where.format(backups=operator.backups, folder=operator.folder)
    for words in (("--upload", url), ("--upload", url, "--dry-run"), ("--check", "all", "--upload", url)):
        refused = operator.run("backup_automem", *words, expect=2)
        assert "next:\n  name " in refused.err
    assert sorted(operator.folder.rglob("*")) == before


def test_a_link_that_leads_to_itself_is_no_place(operator, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused = operator.run("backup_automem", "--upload", str(tmp_path / "loop"), expect=2)
    assert "loop" in refused.err or "leads to itself" in refused.err
    assert "Traceback" not in refused.err
    assert not operator.backups.exists()


def test_a_copy_on_the_disk_of_the_backups_is_reported_as_one(operator, tmp_path):
    """As a warning: cron shows what is on stderr, and the line of docs/operations.md discards the result."""
    operator.load(20)
    warning = f"warning: the copies at {tmp_path / 'copies'} are on the disk of the backup folder"
    for words in (["--only", "falkordb"], ["--check", "all"]):
        done = operator.run("backup_automem", *words, "-q", "--upload", str(tmp_path / "copies"))
        assert warning in done.err


def test_a_place_of_copies_named_by_its_path_is_printed_as_a_url(operator, tmp_path):
    """--upload and --list take the path, a restore and --check the URL: there a path names one file."""
    place = tmp_path / "my copies"
    place.mkdir()
    (place / "backup_20261127_021700.json.age").touch()
    for script, *words in (["restore_from_backup"], ["backup_automem", "--check"]):
        for named in (place, place / "latest"):
            refused = operator.run(script, *words, str(named), expect=2)
            assert refused.err.rstrip().endswith(f"by its URL: file://{tmp_path}/my%20copies/latest")


def test_an_existing_set_that_no_copy_gives_back_is_not_uploaded(operator, tmp_path):
    operator.graph += "back\\slash"
    operator.load(20)
    operator.run("backup_automem", "--only", "falkordb")
    words = ("backup_automem", "--check", "all", "--upload", str(tmp_path / "copies"))
    assert "cannot be fetched back" in operator.run(*words, expect=2).err
    assert files_in(tmp_path / "copies") == {}


@pytest.mark.parametrize("words", [("--list", "{file}"), ("--cleanup", "--upload", "{file}", "--keep", "3")])
def test_a_file_is_no_place_of_copies(operator, tmp_path, words):
    file = tmp_path / "backup_20261129_021700.json"
    file.write_text("{}")
    err = operator.run("backup_automem", *(word.format(file=file) for word in words), expect=2).err
    assert f"{file} is a file, a folder is needed" in err
    assert f"name its folder: {tmp_path}" in err


def test_a_backup_is_uploaded_listed_verified_and_restored_from_there(operator, place, tmp_path):
    operator.load()
    done = operator.run("backup_automem", "--upload", place.url, "--json")
    (manifest,) = operator.manifests()
    assert done.json["uploaded"]["manifest"] == manifest.name
    assert done.json["uploaded"]["sent"] == 3
    assert place.files() == set_files(manifest)
    before = operator.state()

    listed = operator.run("backup_automem", "--list", place.url, "--json").json
    assert [(one["stamp"], one["complete"]) for one in listed["sets"]] == [
        (json.loads(manifest.read_text())["stamp"], True)
    ]
    # The upload does not depend on the local files: from now on only the copy exists.
    shutil.move(operator.backups, tmp_path / "lost")
    if "://" in place.url:
        checks = operator.run("backup_automem", "--check", place.url, "--json").json["proofs"]
        assert {one["level"] for one in checks} <= {"restored", "checked"}
        assert len(checks) == 2
        assert files_in(operator.backups) == {}
        latest = f"{place.url}/latest"
    else:
        latest = f"{place.url}/{manifest.name}"
    spoil(operator)
    operator.run("restore_from_backup", latest, "--no-safety-backup")
    assert operator.state() == before
    assert_tidy(operator)
    if "://" in place.url:
        assert files_in(operator.backups).items() >= set_files(manifest).items()
        fetched = operator.backups / manifest.name
        assert fetched.read_bytes() == (tmp_path / "lost" / manifest.name).read_bytes()
        assert {path.stat().st_mode & 0o777 for path in operator.backups.rglob("*.rdb")} == {0o600}


@pytest.mark.matrix
def test_what_is_there_already_is_not_sent_again(operator, place):
    operator.load()
    operator.run("backup_automem")
    (manifest,) = operator.manifests()
    first = operator.run("backup_automem", "--check", "all", "--upload", place.url, "--json").json["uploaded"]
    assert [(one["sent"], one["there"]) for one in first] == [(3, 0)]
    again = operator.run("backup_automem", "--check", str(manifest), "--upload", place.url, "--json").json
    assert [(one["sent"], one["there"]) for one in again["uploaded"]] == [(0, 3)]
    assert place.files() == set_files(manifest)


@pytest.mark.matrix
@pytest.mark.parametrize("part", ["rdb", "tar.gz"])
def test_one_component_is_restored_by_its_url(operator, s3, part):
    operator.export(**s3.environ)
    operator.load()
    url = f"s3://{BUCKET}/{operator.graph}"
    operator.run("backup_automem", "--upload", url)
    (manifest,) = operator.manifests()
    before = operator.state()
    (name,) = [one.name for one in read_manifest(manifest).files if one.name.endswith(part)]
    shutil.rmtree(operator.backups)
    spoil(operator)
    operator.run("restore_from_backup", f"{url}/{name}")
    after = operator.state()
    same = "graph" if part == "rdb" else "points"
    assert getattr(after, same) == getattr(before, same)
    assert after != before


def test_a_dry_run_writes_nothing_there(operator, place):
    operator.load()
    results = operator.run("backup_automem", "--upload", place.url, "--dry-run").out
    assert "copy" in results
    assert place.files() == {}


@pytest.mark.parametrize("place", matrix(["file", "folder", "s3", "sftp"], "folder"), indirect=True)
def test_a_cleanup_of_copies_follows_the_rules_and_leaves_what_is_uploaded(operator, place):
    operator.load(20)
    for _ in range(4):
        operator.run("backup_automem", "--only", "falkordb", "--upload", place.url)
    oldest, *_ = sets = operator.manifests()
    whole = place.files()
    words = ("backup_automem", "--cleanup", "--upload", place.url, "--keep", "1")
    pinned = operator.run("backup_automem", "--pin", oldest.stem[7:], "--upload", place.url, "--json").json
    assert (pinned["stamp"], pinned["pinned"]) == (oldest.stem[7:], True)
    assert place.files() == {**whole, f"{oldest.stem}.pinned": 0}
    planned = operator.run(*words, "--dry-run", "--json").json
    assert planned["sets"] == [sets[2].name, sets[1].name]
    assert planned["kept"] == {sets[3].name: "--keep 1", oldest.name: "pinned"}
    listed = operator.run("backup_automem", "--list", place.url, "--json").json["sets"]
    assert [one["pinned"] for one in listed] == [False, False, False, True]
    with lock_targets([f"{sets[2].name} at {pinned['where']}"]):  # as its upload holds it
        refused = operator.run(*words, expect=5)
    assert f"another run is working on {sets[2].name}" in refused.err
    assert place.files() == {**whole, f"{oldest.stem}.pinned": 0}
    operator.run(*words)
    assert place.files() == {**set_files(sets[3]), **set_files(oldest), f"{oldest.stem}.pinned": 0}
    assert operator.manifests() == sets
    operator.run("backup_automem", "--check", place.url if "://" in place.url else f"file://{place.url}")
    operator.run("backup_automem", "--unpin", oldest.stem[7:], "--upload", place.url)
    operator.run("backup_automem", "--pin", oldest.stem[7:])  # here: it protects the copy too
    assert operator.run(*words, "--json").json["protected"] == {oldest.name: "pinned"}
    operator.run("backup_automem", "--unpin", oldest.stem[7:])
    operator.run(*words)
    assert place.files() == set_files(sets[3])


def test_a_cleanup_of_copies_leaves_other_stores_unfinished_uploads_and_foreign_files(operator, tmp_path):
    copies = tmp_path / "copies"
    operator.load(20)
    for _ in range(2):
        operator.run("backup_automem", "--only", "falkordb", "--upload", str(copies))
    older, newer = operator.manifests()
    (copies / "falkordb" / "mine.rdb").write_text("not ours")
    (copies / newer.name).unlink()  # an upload that was interrupted: the manifest is sent last
    words = ("backup_automem", "--cleanup", "--upload", str(copies), "--keep", "1", "--json")
    before = files_in(copies)
    assert operator.run(*words).json["sets"] == []
    assert files_in(copies) == before
    shutil.copy(newer, copies)
    other = operator.run(*words, env={"FALKORDB_GRAPH": "another"}).json
    assert (other["sets"], other["kept"]) == ([], {})
    operator.export(AUTOMEM_BACKUP_DIR=tmp_path / "new machine")
    assert operator.run(*words).json["sets"] == [older.name]
    assert files_in(copies) == {**set_files(newer), "falkordb/mine.rdb": 8}
    refused = operator.run("backup_automem", "--cleanup", "--upload", str(tmp_path / "new machine" / "x"), expect=2)
    assert "that is no copy elsewhere" in refused.err
    operator.run("backup_automem", "--cleanup", "--upload", str(tmp_path / "misspelt"), expect=1)


def test_a_cleanup_of_copies_that_stops_leaves_no_set_with_a_missing_file(operator, tmp_path, monkeypatch):
    copies, deleted, delete = tmp_path / "copies", [], OffsiteStore.delete
    operator.load(20)
    for _ in range(2):
        operator.run("backup_automem", "--only", "falkordb", "--upload", str(copies))
    older, newer = operator.manifests()

    def failing(self, name):
        if deleted:
            raise StoreFailed("the connection was lost")
        deleted.append(name)
        delete(self, name)

    monkeypatch.setattr(OffsiteStore, "delete", failing)
    words = ("backup_automem", "--cleanup", "--upload", str(copies), "--keep", "1")
    assert "the connection was lost" in operator.run(*words, expect=1).err
    assert deleted == [older.name]
    listed = operator.run("backup_automem", "--list", f"file://{copies}", "--json").json["sets"]
    assert [(one["stamp"], one["complete"]) for one in listed] == [(newer.stem[7:], True)]
    operator.run("backup_automem", "--check", "all", "--upload", str(copies))  # it can be uploaded again
    assert files_in(copies) == {**set_files(older), **set_files(newer)}


@pytest.mark.parametrize("place", matrix(["folder", "s3", "sftp"], "folder"), indirect=True)
@pytest.mark.parametrize("before", ["send", "publish"])
def test_a_file_that_another_machine_uploaded_meanwhile_is_not_replaced(operator, place, before, monkeypatch):
    """Two machines whose crontabs start at the same second: both sets have the same names."""
    operator.load(20)
    operator.run("backup_automem", "--only", "falkordb")
    (manifest,) = operator.manifests()
    (rdb,) = (one.name for one in read_manifest(manifest).files)
    step = {"send": "sizes", "publish": "holds"}[before]  # what a run does before it
    real = getattr(OffsiteStore, step)

    def then_the_other(store, *words):
        found = real(store, *words)
        if rdb in words or "falkordb" in words or f"{rdb}.partial" in words:
            store._make_folder(store._path("falkordb"))
            store._fs.pipe_file(store._path(rdb), b"of the other machine")
            monkeypatch.undo()
        return found

    monkeypatch.setattr(OffsiteStore, step, then_the_other)
    refused = operator.run("backup_automem", "--check", "all", "--upload", place.url, expect=1)
    assert f"{rdb} is not the file that is to be sent" in refused.err
    assert place.files()[rdb] == len(b"of the other machine")
    assert manifest.name not in place.files()


@pytest.mark.matrix
def test_what_an_undo_names_is_kept_at_the_place_of_copies_too(operator, tmp_path):
    operator.load(40)
    operator.run("backup_automem", "--upload", str(tmp_path / "copies"))
    operator.run("reembed_embeddings", env={"VECTOR_SIZE": "96"})
    (undo, *_) = operator.manifests()
    operator.run("backup_automem", "--upload", str(tmp_path / "copies"), env={"VECTOR_SIZE": "96"})
    cleaned = operator.run("backup_automem", "--cleanup", "--upload", str(tmp_path / "copies"), "--keep", "1", "--json")
    assert "the undo of reembed run" in cleaned.json["protected"][undo.name]
    assert (tmp_path / "copies" / undo.name).exists()


@pytest.mark.matrix
def test_a_password_in_the_url_reaches_the_server_and_nothing_else(operator, sftp, tmp_path):
    shutil.rmtree(tmp_path / ".ssh")
    sftp.be_known(tmp_path)  # and no key: the password alone opens
    operator.load()
    url = sftp.url("/copies", login=f"{USER}:{quote(PASSWORD, safe='')}")
    results = [
        operator.run("backup_automem", "-v", "--upload", url),
        operator.run("backup_automem", "-v", "--list", url),
        operator.run("backup_automem", "-v", "--check", url),
        operator.run("restore_from_backup", "-v", f"{url}/latest", "--dry-run"),
        operator.run("restore_from_backup", "-v", url, expect=2),
        operator.run("backup_automem", "--list", "--upload", url, expect=2),
        operator.run("backup_automem", "--cleanup", url, expect=2),
        operator.run("backup_automem", "--list", url.replace(":p", ":wrong-p"), expect=2),
        operator.run("backup_automem", "--list", url.replace(f":{sftp.port}", ":1"), expect=1),
    ]
    sftp.mischief.deny = ("open",)
    results.append(operator.run("backup_automem", "--check", "all", "--upload", url, expect=2))
    sftp.mischief.deny = ("rename",)
    results.append(operator.run("backup_automem", "--check", "all", "--json", "--upload", f"{url}/2", expect=1))
    secrets = (PASSWORD, quote(PASSWORD, safe=""), "p4ss", "wrong-p")
    for result in results:
        assert not [secret for secret in secrets if secret in result.out + result.err], result
    assert "sftp://keeper:***@127.0.0.1" in results[0].out
    for path in operator.backups.rglob("*"):
        if path.is_file():
            assert not [secret for secret in secrets if secret.encode() in path.read_bytes()], path


@pytest.mark.matrix
def test_a_secret_key_reaches_no_output(operator, s3):
    operator.load()
    operator.export(**s3.environ)
    for words, code in (
        ((f"s3://{BUCKET}/{operator.graph}",), 0),
        ((f"s3://{BUCKET}-that-is-not",), 1),
        ((f"s3://AKIAOFFSITE:{SECRET_KEY}@{BUCKET}/x",), 2),
        ((f"s3://{BUCKET}/x?secret={SECRET_KEY}",), 2),
    ):
        result = operator.run("backup_automem", "-v", "--upload", *words, expect=code)
        assert SECRET_KEY not in result.out + result.err
    assert len(operator.manifests()) == 1
