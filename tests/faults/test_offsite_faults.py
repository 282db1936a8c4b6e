"""Failing copies elsewhere: cut, damaged, refused, among files of others, killed, unknown, missing."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from lib.backup.manifest import read_manifest, sealed
from tests.kill_support import kill
from tests.matrix import matrix
from tests.offsite_gate import S3Gate
from tests.offsite_support import BUCKET, USER, Mischief, S3Server, SFTPServer, s3_environ
from tests.operator_support import ROOT, Operator

pytestmark = pytest.mark.qdrant


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def gate(s3, operator) -> Iterator[S3Gate]:
    with S3Gate(s3.port) as s3_gate:
        operator.export(**s3_environ(s3_gate.url), AWS_MAX_ATTEMPTS=2)  # five, with pauses, by default
        yield s3_gate


@pytest.fixture
def sftp(tmp_path, operator) -> Iterator[SFTPServer]:
    with SFTPServer(tmp_path / "sftp") as server:
        server.be_known(tmp_path)
        operator.export(FSSPEC_SFTP_PASSWORD="p4ss:w@rd/of sftp")
        yield server
        server.mischief.let_go.set()


@pytest.fixture
def backed_up(operator) -> Path:
    """The manifest of a small local set."""
    operator.load(60)
    operator.run("backup_automem")
    return operator.manifests()[0]


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_of(manifest: Path) -> dict[str, bytes]:
    names = [*(one.name for one in read_manifest(manifest).files), manifest.name]
    return {name: (manifest.parent / name).read_bytes() for name in names}


def upload(operator: Operator, url: str, expect: int) -> str:
    """Upload the existing sets; returns stderr."""
    before = files_in(operator.backups)
    done = operator.run("backup_automem", "--check", "all", "--upload", url, expect=expect)
    assert files_in(operator.backups) == before
    return done.err


def arrived(operator: Operator, url: str, folder: Path, manifest: Path) -> None:
    """The same command again uploads the complete set, and leaves nothing else there."""
    upload(operator, url, 0)
    assert files_in(folder) == set_of(manifest)


# --- before a backup is taken -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("ftp://host/x", 2, "copies of backups cannot be at ftp://"),
        ("s3://", 2, "names no bucket"),
        ("s3://no-such-bucket/x", 1, "does not exist"),
        ("sftp://127.0.0.1:1/x", 1, "cannot open sftp://127.0.0.1:1/x"),
        ("file://host/x", 2, "three slashes"),
        ("/proc/1/copies", 2, "cannot write to the folder"),
        ("sftp://127.0.0.1:port/x", 2, "no number"),
    ],
)
def test_a_place_that_will_not_do_is_refused_before_the_backup(operator, s3, url, code, message):
    operator.export(**s3.environ)
    operator.load(60)
    result = operator.run("backup_automem", "--upload", url, expect=code)
    assert message in result.err
    assert "next:" in result.err
    assert not operator.backups.exists()


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("s3://bucket/x", "s3fs"),
        ("gs://bucket/x", "gcsfs"),
        ("az://container/x", "adlfs"),
        ("sftp://host/x", "paramiko"),
        ("/mnt/x", "fsspec"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(operator, tmp_path, url, package):
    """As if the package were not installed: a module that Python loads at its start hides it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\nreal = util.find_spec\n"
        f"util.find_spec = lambda name, *rest: None if name == {package!r} else real(name, *rest)\n"
    )
    operator.load(60)
    result = operator.run("backup_automem", "--upload", url, expect=2, env={"PYTHONPATH": str(tmp_path)})
    assert f"pip install {package}" in result.err
    assert "requirements-offsite.txt" in result.err
    assert not operator.backups.exists()


def test_the_offsite_requirements_bring_every_package_that_a_message_names():
    from lib.backup.copy_store import _PACKAGES

    lines = (ROOT / "requirements-offsite.txt").read_text() + (ROOT / "requirements.txt").read_text()
    for package in _PACKAGES.values():
        assert f"\n{package}>=" in lines


def test_refused_logins_and_hosts_that_are_not_known(operator, sftp, tmp_path):
    operator.load(60)
    wrong = operator.run("backup_automem", "--upload", sftp.url("/x", login=f"{USER}:no"), expect=2)
    assert "Authentication failed" in wrong.err
    (tmp_path / ".ssh" / "known_hosts").unlink()
    unknown = operator.run("backup_automem", "--upload", sftp.url("/x"), expect=2)
    assert "the host's key is not known here" in unknown.err
    assert f"ssh -p {sftp.port} 127.0.0.1" in unknown.err
    with SFTPServer(tmp_path / "other") as other:  # another machine has taken the address
        other.be_known(tmp_path)
        lines = (tmp_path / ".ssh" / "known_hosts").read_text().replace(str(other.port), str(sftp.port))
        (tmp_path / ".ssh" / "known_hosts").write_text(lines)
    taken = operator.run("backup_automem", "--upload", sftp.url("/x"), expect=2)
    assert "another machine may answer there" in taken.err
    assert files_in(sftp.folder) == {}
    assert not operator.backups.exists()


@pytest.mark.parametrize("what", ["open", "mkdir"])
def test_no_right_to_write_there(operator, sftp, what):
    operator.load(60)
    sftp.mischief.deny = (what,)
    result = operator.run("backup_automem", "--upload", sftp.url("/copies"), expect=2)
    assert "cannot write to sftp://keeper@127.0.0.1" in result.err
    assert not operator.backups.exists()


def test_a_bucket_that_may_not_be_written(operator, gate):
    operator.load(60)
    gate.rule("PUT", "copies", "refuse")
    result = operator.run("backup_automem", "--upload", f"s3://{BUCKET}/copies", expect=2)
    assert "reported by the gate" in result.err
    assert not operator.backups.exists()


def test_a_key_that_may_not_delete_will_do(operator, gate, s3, backed_up):
    gate.rule("DELETE", "", "refuse")
    gate.rule("POST", "?delete", "refuse")
    upload(operator, f"s3://{BUCKET}/kept", 0)
    assert set(s3.objects("kept")) == set(set_of(backed_up)) | {".automem-probe"}


# --- while it is uploaded ---------------------------------------------------------------------------------------


def test_a_backup_whose_upload_fails_is_complete_here_and_reports_how_to_continue(operator, sftp, tmp_path):
    operator.load(60)
    sftp.mischief.cut_after = 20_000
    url = sftp.url("/copies")
    result = operator.run("backup_automem", "--upload", url, "--json", expect=1)
    (manifest,) = operator.manifests()
    assert "did not arrive" in result.json["error"]
    assert f"--check {manifest} --upload {url}" in result.json["next"]
    operator.run("backup_automem", "--check", str(manifest))
    there = files_in(sftp.folder / "copies")
    assert manifest.name not in there
    assert all(name.endswith(".partial") or there[name] == set_of(manifest)[name] for name in there)
    sftp.mischief = Mischief()
    arrived(operator, url, sftp.folder / "copies", manifest)


@pytest.mark.parametrize("part", matrix([".rdb", ".tar.gz", ".json"], ".rdb"))
def test_what_arrives_spoiled_never_gets_its_name(operator, sftp, backed_up, part):
    sftp.mischief.spoil = part
    err = upload(operator, sftp.url("/copies"), 1)
    assert "reads back as something else" in err
    there = files_in(sftp.folder / "copies")
    assert not [name for name in there if part in name]
    assert backed_up.name not in there
    sftp.mischief = Mischief()
    arrived(operator, sftp.url("/copies"), sftp.folder / "copies", backed_up)


@pytest.mark.parametrize("part", ["falkordb/", "qdrant/", "backup_"])
def test_what_arrives_spoiled_in_a_bucket_is_removed(operator, gate, s3, backed_up, part):
    prefix = operator.graph
    gate.rule("PUT", part, "spoil")
    err = upload(operator, f"s3://{BUCKET}/{prefix}", 1)
    assert "did not arrive" in err
    assert not [name for name in s3.objects(prefix) if name.startswith(part)]
    assert backed_up.name not in s3.objects(prefix)
    gate.open()
    upload(operator, f"s3://{BUCKET}/{prefix}", 0)
    assert set(s3.objects(prefix)) == set(set_of(backed_up))


@pytest.mark.parametrize(
    ("part", "act"),
    [("falkordb/", "refuse"), ("qdrant/", "refuse"), ("backup_", "refuse"), ("qdrant/", "fail")],
)
def test_a_bucket_that_refuses_midway(operator, gate, s3, backed_up, part, act):
    gate.rule("PUT", part, act)
    err = upload(operator, f"s3://{BUCKET}/{operator.graph}", 1)
    assert "did not arrive" in err
    assert backed_up.name not in s3.objects(operator.graph)
    gate.open()
    upload(operator, f"s3://{BUCKET}/{operator.graph}", 0)
    assert set(s3.objects(operator.graph)) == set(set_of(backed_up))


def test_a_bucket_that_is_gone_midway(operator, backed_up, tmp_path):
    with S3Server() as own, S3Gate(own.port) as gate:
        operator.export(**s3_environ(gate.url), AWS_MAX_ATTEMPTS=1)
        held = gate.rule("PUT", ".tar.gz", "hold")
        process = operator.start("backup_automem", "--check", "all", "--upload", f"s3://{BUCKET}/gone")
        assert held.reached.wait(300)
        own.__exit__()
        gate.open()
        _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "did not arrive" in err
    assert "Traceback" not in err


@pytest.mark.core
def test_a_file_of_anothers_is_never_replaced(operator, sftp, backed_up):
    """Another file, of the same size or not, under the name of any file of the set."""
    folder = sftp.folder / "copies"
    for name, data in set_of(backed_up).items():
        for foreign in (bytes([data[0] ^ 1]) + data[1:], b"mine"):
            shutil.rmtree(folder, ignore_errors=True)
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_bytes(foreign)
            err = upload(operator, sftp.url("/copies"), 1)
            assert f"{name} is not the file that is to be sent" in err
            assert (folder / name).read_bytes() == foreign
            assert name == backed_up.name or backed_up.name not in files_in(folder)


def test_a_file_here_that_is_no_longer_what_it_was_is_not_uploaded(operator, sftp, backed_up):
    (rdb,) = (operator.backups / "falkordb").glob("*.rdb")
    data = rdb.read_bytes()
    rdb.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    result = operator.run("backup_automem", "--check", "all", "--upload", sftp.url("/copies"), expect=4)
    assert "nothing was uploaded" in result.out
    assert files_in(sftp.folder) == {}


KILLS = [(what, part) for part in ("falkordb", "qdrant", "backup_") for what in ("open", "write", "read", "rename")]


@pytest.mark.parametrize(("what", "part"), KILLS)
def test_killed_at_any_point_of_an_upload(operator, sftp, backed_up, what, part):
    """SIGKILL while a file of each kind is created, written, read back and renamed; then the same command again."""
    folder = sftp.folder / "copies"
    name = next(one for one in set_of(backed_up) if one.startswith(part)).rpartition("/")[2]
    sftp.mischief.hold = (what, name)
    process = operator.start("backup_automem", "--check", "all", "--upload", sftp.url("/copies"))
    try:
        assert sftp.mischief.reached.wait(300), "it never came there"
    finally:
        assert kill(process)
    there = files_in(folder)
    whole = set_of(backed_up)
    assert backed_up.name not in there
    assert all(data == whole[one] for one, data in there.items() if not one.endswith(".partial"))
    held, sftp.mischief = sftp.mischief, Mischief()
    arrived(operator, sftp.url("/copies"), folder, backed_up)
    held.let_go.set()


@pytest.mark.parametrize("act", ["hold", "held after"])
@pytest.mark.parametrize("part", ["falkordb/", "qdrant/", "backup_"])
def test_killed_at_any_object_of_an_upload(operator, gate, s3, backed_up, act, part):
    prefix = operator.graph
    rule = gate.rule("PUT", part, act)
    process = operator.start("backup_automem", "--check", "all", "--upload", f"s3://{BUCKET}/{prefix}")
    try:
        assert rule.reached.wait(300)
        if act == "held after":
            assert wait_until(lambda: any(one.startswith(part) for one in s3.objects(prefix)))
    finally:
        assert kill(process)
    whole = {name: len(data) for name, data in set_of(backed_up).items()}
    there = s3.objects(prefix)
    assert there.items() <= whole.items()
    assert backed_up.name not in there or there == whole
    gate.open()
    upload(operator, f"s3://{BUCKET}/{prefix}", 0)
    assert s3.objects(prefix) == whole


def wait_until(check) -> bool:
    from tests.restore_support import wait_for

    return wait_for(check, 30, 0.05)


def test_ctrl_c_while_uploading(operator, sftp, backed_up):
    import signal

    sftp.mischief.hold = ("write", ".tar.gz")
    process = operator.start("backup_automem", "--check", "all", "--upload", sftp.url("/copies"))
    assert sftp.mischief.reached.wait(300)
    os.kill(process.pid, signal.SIGTERM)
    sftp.mischief.let_go.set()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    sftp.mischief = Mischief()
    arrived(operator, sftp.url("/copies"), sftp.folder / "copies", backed_up)


# --- download ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(operator, tmp_path, backed_up) -> tuple[str, Path, Path]:
    """The URL of a copy, its folder, and its manifest there; no local file is left."""
    folder = tmp_path / "copies"
    operator.run("backup_automem", "--check", "all", "--upload", str(folder))
    shutil.rmtree(operator.backups)
    return f"file://{folder}", folder, folder / backed_up.name


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-40] + bytes([data[-40] ^ 4]) + data[-39:])


@pytest.mark.parametrize("part", ["*.rdb", "*.tar.gz", "*.json"])
def test_a_copy_that_was_damaged_there_touches_nothing_here(operator, copied, part):
    url, folder, manifest = copied
    damage(next(folder.rglob(part)))
    before = operator.state()
    checks = operator.run("backup_automem", "--check", url, "--json", expect=4).json["proofs"]
    assert "damaged" in {one["level"] for one in checks}
    assert str(folder) in checks[0]["path"]
    assert "drill" not in checks[0]["fault"]
    for word in (f"{url}/latest", f"{url}/{manifest.name}"):
        operator.run("restore_from_backup", word, expect=4)
    assert operator.state() == before
    assert not list(operator.backups.glob("backup_*"))
    assert not (operator.backups / "drill").exists()


@pytest.mark.parametrize("part", ["*.rdb", "*.tar.gz"])
def test_a_copy_that_lacks_a_file(operator, copied, part):
    url, folder, manifest = copied
    next(folder.rglob(part)).unlink()
    listed = operator.run("backup_automem", "--list", url)
    assert "INCOMPLETE" in listed.out
    operator.run("backup_automem", "--check", url, expect=4)
    operator.run("restore_from_backup", f"{url}/{manifest.name}", expect=1)
    assert not list(operator.backups.glob("backup_*"))


@pytest.mark.core
def test_a_manifest_that_leads_out_of_the_folder(operator, copied, tmp_path):
    url, _, manifest = copied
    raw = orjson.loads(manifest.read_bytes())
    raw["graph"]["file"]["name"] = "../stolen.rdb"
    manifest.write_bytes(orjson.dumps(sealed(raw)))
    (tmp_path / "stolen.rdb").write_bytes(b"x")
    for word in (url, f"{url}/{manifest.name}"):
        operator.run("backup_automem", "--check", word, expect=4)
    result = operator.run("restore_from_backup", f"{url}/latest", expect=None)
    assert result.code in {2, 4}
    assert not (operator.backups.parent / "stolen.rdb.partial").exists()
    assert (tmp_path / "stolen.rdb").read_bytes() == b"x"


def test_existing_local_files_are_not_replaced_by_fetched_ones(operator, copied):
    url, _, manifest = copied
    for name in set_of(manifest):
        shutil.rmtree(operator.backups, ignore_errors=True)
        (operator.backups / name).parent.mkdir(parents=True)
        (operator.backups / name).write_bytes(b"mine")
        result = operator.run("restore_from_backup", f"{url}/latest", expect=2)
        assert "is here already" in result.err
        assert (operator.backups / name).read_bytes() == b"mine"


def test_an_interrupted_fetch_resumes(operator, sftp, backed_up, tmp_path):
    upload(operator, sftp.url("/copies"), 0)
    shutil.move(operator.backups, tmp_path / "lost")
    sftp.mischief.hold = ("read", ".tar.gz")
    process = operator.start("restore_from_backup", f"{sftp.url('/copies')}/latest", "--dry-run")
    assert sftp.mischief.reached.wait(300)
    sftp.cut()
    sftp.mischief.let_go.set()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert not operator.manifests()
    (rdb,) = (operator.backups / "quarantine" / "falkordb").iterdir()
    fetched = rdb.stat().st_ino
    sftp.mischief = Mischief()
    operator.run("restore_from_backup", f"{sftp.url('/copies')}/latest", "--dry-run")
    assert (operator.backups / "falkordb" / rdb.name).stat().st_ino == fetched
    assert not (operator.backups / "quarantine").exists()
    assert set_of(operator.backups / backed_up.name) == set_of(tmp_path / "lost" / backed_up.name)


@pytest.mark.core
def test_what_a_url_may_name(operator, copied):
    url, _, manifest = copied
    stamp = dataclasses.asdict(read_manifest(manifest))["stamp"]
    for word, code, message in (
        (url, 2, "names no backup"),
        (f"{url}/backup_20200101_000000.json", 1, "backup_20200101_000000.json"),
        (f"{url}/falkordb/other_{stamp}.rdb", 2, "is no file of the set"),
        (f"{url}/nowhere/latest", 1, "no backup at"),
    ):
        result = operator.run("restore_from_backup", word, expect=code)
        assert message in result.err
    operator.run("backup_automem", "--list", f"{url}/nowhere", expect=1)
    elsewhere = operator.run("restore_from_backup", f"{url}/latest", expect=1, env={"FALKORDB_GRAPH": "other"})
    assert "graph 'other'" in elsewhere.err
