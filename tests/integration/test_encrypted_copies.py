"""Copies encrypted with age: uploaded, listed, verified and restored with the key, and of no use without one."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
import subprocess
from pathlib import Path

import pyrage
import pytest

from lib.backup.age import CopyKeys, decrypt, encrypt, recipients
from lib.backup.copy_store import OffsiteStore
from lib.backup.manifest import read_manifest
from lib.errors import BackupDamaged, StoreFailed
from tests.matrix import matrix
from tests.offsite_support import BUCKET, S3Server
from tests.restore_support import assert_tidy, spoil

pytestmark = pytest.mark.qdrant
WORDS = "correct horse battery staple"


@pytest.fixture
def key(tmp_path) -> Path:
    """A private key, as age-keygen writes one; its public key is in the comment."""
    identity = pyrage.x25519.Identity.generate()
    return private(tmp_path / "key.txt", f"# public key: {identity.to_public()}\n{identity}\n")


def private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def public(key: Path) -> str:
    return key.read_text().splitlines()[0].rpartition(" ")[2]


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def encrypted_names(manifest: Path) -> set[str]:
    return {f"{one.name}.age" for one in read_manifest(manifest).files} | {f"{manifest.name}.age"}


@pytest.mark.parametrize("how", matrix(["recipients", "passphrase"], "recipients"))
@pytest.mark.parametrize("where", matrix(["file", "s3"], "file"))
def test_a_copy_is_encrypted_whole_and_restored_with_the_key(operator, tmp_path, key, how, where):
    copies = tmp_path / "copies"
    url, server = f"file://{copies}", None
    if where == "s3":
        server = S3Server()
        operator.export(**server.__enter__().environ)
        url = f"s3://{BUCKET}/encrypted"
    words = private(tmp_path / "words", f"{WORDS}\n")
    writes = {
        "recipients": {"AUTOMEM_BACKUP_RECIPIENTS": public(key)},
        "passphrase": {"AUTOMEM_BACKUP_PASSPHRASE_FILE": str(words)},
    }[how]
    reads = {"AUTOMEM_BACKUP_IDENTITY": str(key)} if how == "recipients" else writes
    operator.load(60)
    before = operator.state()
    done = operator.run("backup_automem", "--upload", url, env=writes)
    assert ", encrypted (" in done.out
    (manifest,) = operator.manifests()
    names = encrypted_names(manifest) | ({f"{manifest.stem}.key.age"} if how == "passphrase" else set())
    assert (set(server.objects("encrypted")) if server else files_in(copies)) == names
    assert not (operator.backups / "outgoing").exists()
    again = operator.run("backup_automem", "--check", "all", "--upload", url, "--json", env=writes)
    assert [(one["sent"], one["there"]) for one in again.json["uploaded"]] == [(0, 3)]

    refused = operator.run("backup_automem", "--list", url, expect=2)
    assert "is encrypted, and no key is set" in refused.err
    assert "AUTOMEM_BACKUP_IDENTITY" in refused.err
    (listed,) = operator.run("backup_automem", "--list", url, "--json", env=reads).json["sets"]
    assert listed["complete"]
    shutil.move(operator.backups, tmp_path / "lost")
    checks = operator.run("backup_automem", "--check", url, "--json", env=reads).json["proofs"]
    assert [one["fault"] for one in checks] == ["", ""]
    spoil(operator)
    assert "no key is set" in operator.run("restore_from_backup", f"{url}/latest", expect=2).err
    operator.run("restore_from_backup", f"{url}/{manifest.name}.age", "--no-safety-backup", env=reads)
    assert operator.state() == before
    assert_tidy(operator)
    if server:
        server.__exit__(None, None, None)


@pytest.mark.matrix
@pytest.mark.skipif(shutil.which("age") is None, reason="the age tool is not installed (apt-get install age)")
@pytest.mark.parametrize("how", ["recipients", "passphrase"])
def test_the_age_tool_decrypts_a_copy(operator, tmp_path, key, how):
    words = private(tmp_path / "words", WORDS)
    operator.load(40)
    if how == "recipients":
        operator.export(AUTOMEM_BACKUP_RECIPIENTS=str(private(tmp_path / "public", f"# mine\n{public(key)}\n")))
    else:
        operator.export(AUTOMEM_BACKUP_PASSPHRASE_FILE=str(words))
    operator.run("backup_automem", "--upload", str(tmp_path / "copies"))
    (manifest,) = operator.manifests()
    if how == "passphrase":  # the tool asks a terminal for a passphrase: its file is decrypted here
        key_file = tmp_path / "copies" / f"{manifest.stem}.key.age"
        key = private(tmp_path / "set.key", pyrage.passphrase.decrypt(key_file.read_bytes(), WORDS).decode())
    for name in encrypted_names(manifest):
        shown = subprocess.run(
            ["age", "-d", "-i", str(key), str(tmp_path / "copies" / name)],
            capture_output=True,
            check=True,
        )
        assert shown.stdout == (operator.backups / name.removesuffix(".age")).read_bytes()


def test_a_stopped_upload_resumes_with_the_files_it_encrypted(operator, tmp_path, key, monkeypatch):
    copies = tmp_path / "copies"
    operator.export(AUTOMEM_BACKUP_RECIPIENTS=public(key))
    operator.load(40)
    sent, send = [], OffsiteStore.send

    def failing(self, source, name, progress):
        sent.append(name)
        if len(sent) == 2:
            raise StoreFailed("no route")
        return send(self, source, name, progress)

    monkeypatch.setattr(OffsiteStore, "send", failing)
    refused = operator.run("backup_automem", "--upload", str(copies), expect=1)
    assert "the set is whole here" in refused.err
    (manifest,) = operator.manifests()
    first = {path: path.read_bytes() for path in copies.rglob("*.age")}
    assert len(first) == 1
    done = operator.run("backup_automem", "--check", "all", "--upload", str(copies), "--json")
    assert done.json["uploaded"][0]["sent"] == 2
    assert files_in(copies) == encrypted_names(manifest)
    assert {path: path.read_bytes() for path in first} == first
    operator.run("backup_automem", "--check", f"file://{copies}", env={"AUTOMEM_BACKUP_IDENTITY": str(key)})


@pytest.mark.matrix
def test_a_set_that_is_deleted_takes_what_was_encrypted_of_it_along(operator, tmp_path, key, monkeypatch):
    operator.export(AUTOMEM_BACKUP_RECIPIENTS=public(key))
    operator.load(20)
    monkeypatch.setattr(OffsiteStore, "send", lambda *_: (_ for _ in ()).throw(StoreFailed("no route")))
    operator.run("backup_automem", "--upload", str(tmp_path / "copies"), expect=1)
    assert len(list((operator.backups / "outgoing").iterdir())) == 1
    operator.run("backup_automem")
    operator.run("backup_automem", "--cleanup", "--keep", "1")
    assert list((operator.backups / "outgoing").iterdir()) == []


@pytest.mark.parametrize("how", matrix(["recipients", "passphrase"], "recipients"))
def test_a_cleanup_of_encrypted_copies_needs_the_key_and_deletes_whole_sets(operator, tmp_path, key, how):
    copies = tmp_path / "copies"
    words = private(tmp_path / "words", WORDS)
    writes, reads = {"AUTOMEM_BACKUP_RECIPIENTS": public(key)}, {"AUTOMEM_BACKUP_IDENTITY": str(key)}
    if how == "passphrase":
        writes = reads = {"AUTOMEM_BACKUP_PASSPHRASE_FILE": str(words)}
    operator.load(20)
    for _ in range(2):
        operator.run("backup_automem", "--only", "falkordb", "--upload", str(copies), env=writes)
    older, newer = operator.manifests()
    before = files_in(copies)
    cleanup = ("backup_automem", "--cleanup", "--upload", str(copies), "--keep", "1", "--json")
    assert "no key is set" in operator.run(*cleanup, expect=2).err
    assert files_in(copies) == before
    assert operator.run(*cleanup, env=reads).json["sets"] == [older.name]
    key_file = {f"{newer.stem}.key.age"} if how == "passphrase" else set()
    assert files_in(copies) == encrypted_names(newer) | key_file


@pytest.mark.matrix  # half a minute: deriving a key takes a second
def test_after_a_change_of_the_passphrase_the_newer_copies_are_listed_checked_and_cleaned_up(operator, tmp_path):
    url = f"file://{tmp_path / 'copies'}"
    old, new = ({"AUTOMEM_BACKUP_PASSPHRASE_FILE": str(private(tmp_path / word, word))} for word in ("old", "new"))
    operator.load(20)
    for env in (old, new, new):
        operator.run("backup_automem", "--only", "falkordb", "--upload", url, env=env)
    oldest, middle, newest = (one.name for one in operator.manifests())
    listed = operator.run("backup_automem", "--list", url, "--json", env=new)
    assert [f"backup_{one['stamp']}.json" for one in listed.json["sets"]] == [newest, middle]
    assert listed.json["unreadable"] == [f"{tmp_path / 'copies'}/{oldest}"]
    assert f"--check {tmp_path / 'copies'}/{oldest}" in listed.err
    checked = operator.run("backup_automem", "--check", url, "--json", env=new, expect=4).json["proofs"]
    assert [one["fault"] for one in checked[:2]] == ["", ""]
    assert (checked[2]["level"], "another passphrase" in checked[2]["fault"]) == ("unknown", True)
    copy = tmp_path / "copies" / oldest  # as the warning prints it
    assert "another passphrase" in operator.run("backup_automem", "--check", copy, env=new, expect=2).err
    for path in (copy, f"{copy}.age"):
        assert operator.run("backup_automem", "--check", path, "--json", env=old).json["proofs"][0]["fault"] == ""
    operator.run("restore_from_backup", copy, "--dry-run", env=old)
    cleanup = ("backup_automem", "--cleanup", "--upload", url, "--keep", "1", "--json")
    assert operator.run(*cleanup, env=new).json["sets"] == [middle]
    assert len(operator.run("backup_automem", "--list", url, "--json", env=old).json["sets"]) == 1
    wrong = {"AUTOMEM_BACKUP_PASSPHRASE_FILE": str(private(tmp_path / "wrong", "wrong"))}
    for words in (("--list", url), ("--check", url), cleanup[1:]):
        assert "another passphrase" in operator.run("backup_automem", *words, env=wrong, expect=2).err


def test_a_machine_that_is_too_slow_for_the_passphrase_does_not_call_it_wrong(operator, tmp_path):
    """A faster machine made the key file: it lets a guess cost 2^40 steps."""
    copies = tmp_path / "copies"
    keys = {"AUTOMEM_BACKUP_PASSPHRASE_FILE": str(private(tmp_path / "words", "words"))}
    operator.load(20)
    operator.run("backup_automem", "--only", "falkordb", "--upload", str(copies), env=keys)
    (key_file,) = copies.glob("*.key.age")
    key_file.write_bytes(re.sub(rb"(-> scrypt \S+) \d+", rb"\1 40", key_file.read_bytes()))
    shutil.rmtree(operator.backups)
    for words in (
        ("backup_automem", "--check", f"file://{copies}"),
        ("restore_from_backup", f"file://{copies}/latest"),
    ):
        err = operator.run(*words, env=keys, expect=2).err
        assert "this machine is too slow or too busy to try the passphrase" in err
        assert "another passphrase" not in err
        assert "age -d -i backup_*.key.age FILE.age" in err


@pytest.mark.parametrize("what", matrix(["bit", "cut", "endless header", "another key"], "bit", "another key"))
def test_a_copy_that_does_not_decrypt_is_refused(operator, tmp_path, key, what):
    copies = tmp_path / "copies"
    operator.export(AUTOMEM_BACKUP_RECIPIENTS=public(key), AUTOMEM_BACKUP_IDENTITY=str(key))
    operator.load(40)
    operator.run("backup_automem", "--upload", str(copies))
    before = operator.state()
    (rdb,) = copies.rglob("*.rdb.age")
    data = rdb.read_bytes()
    if what == "bit":
        rdb.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    elif what == "cut":
        rdb.write_bytes(data[: len(data) // 2])
    elif what == "endless header":
        rdb.write_bytes(b"age-encryption.org/v1\n-> X25519 " + b"A" * 200_000)
    else:
        other = pyrage.x25519.Identity.generate()
        private(tmp_path / "other", str(other))
        operator.export(AUTOMEM_BACKUP_IDENTITY=str(tmp_path / "other"))
    shutil.rmtree(operator.backups)
    checked = operator.run("backup_automem", "--check", f"file://{copies}", expect=2 if what == "another key" else 4)
    expected = {
        "endless header": "its header has no end",
        "another key": "is encrypted for another key",
    }.get(what, "was changed or cut off")
    assert expected in checked.out + checked.err
    operator.run("restore_from_backup", f"file://{copies}/latest", expect=2 if what == "another key" else 4)
    assert operator.state() == before
    assert not list(operator.backups.glob("backup_*"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"AUTOMEM_BACKUP_RECIPIENTS": "{public}", "AUTOMEM_BACKUP_PASSPHRASE_FILE": "{words}"}, "both set"),
        ({"AUTOMEM_BACKUP_RECIPIENTS": "age1nonsense"}, "is no public key"),
        ({"AUTOMEM_BACKUP_RECIPIENTS": "{secret}"}, "holds a private key"),
        ({"AUTOMEM_BACKUP_IDENTITY": "{secret}"}, "holds a private key"),
        ({"AUTOMEM_BACKUP_RECIPIENTS": "{empty}"}, "names no public key"),
        ({"AUTOMEM_BACKUP_RECIPIENTS": "/nowhere/keys"}, "cannot be read"),
        ({"AUTOMEM_BACKUP_PASSPHRASE_FILE": "{open}"}, "chmod 600"),
        ({"AUTOMEM_BACKUP_PASSPHRASE_FILE": "{empty}"}, "has 0 lines"),
        ({"AUTOMEM_BACKUP_PASSPHRASE_FILE": "{folder}"}, "Is a directory"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_before_the_backup(operator, tmp_path, key, settings, expected):
    opened = private(tmp_path / "open", WORDS)
    opened.chmod(0o640)
    secret = key.read_text().splitlines()[1]
    named = {
        "public": public(key),
        "words": private(tmp_path / "words", WORDS),
        "secret": secret,
        "empty": private(tmp_path / "empty", "\n"),
        "open": opened,
        "folder": tmp_path,
    }
    env = {name: value.format(**named) for name, value in settings.items()}
    refused = operator.run("backup_automem", "--upload", str(tmp_path / "copies"), env=env, expect=2)
    assert expected in refused.err
    shown = operator.run("backup_automem", "--show-config", env=env, expect=None)
    assert secret not in refused.out + refused.err + shown.out + shown.err
    assert not operator.backups.exists()
    assert not (tmp_path / "copies").exists()


def test_without_the_package_it_is_named_before_the_backup(operator, tmp_path, key, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyrage" else find_spec(name))
    words = ("backup_automem", "--upload", str(tmp_path / "copies"))
    refused = operator.run(*words, env={"AUTOMEM_BACKUP_RECIPIENTS": public(key)}, expect=2)
    assert re.search(r"python\S* -m pip install pyrage", refused.err)  # into the Python that runs this
    assert not operator.backups.exists()


def test_both_directions_stream_in_small_pieces_and_an_endless_header_is_not_buffered(tmp_path, key):
    plain, sealed = tmp_path / "plain", tmp_path / "sealed"
    plain.write_bytes(bytes(range(256)) * 40_000)
    encrypt(plain, sealed, recipients(CopyKeys(recipients=public(key))))
    pieces: list[bytes] = []
    stream = io.BytesIO(sealed.read_bytes())
    identity = pyrage.x25519.Identity.from_str(key.read_text().splitlines()[1])
    decrypt(iter(lambda: stream.read(1 << 20), b""), pieces.append, [identity], "sealed")
    assert b"".join(pieces) == plain.read_bytes()
    assert max(map(len, pieces)) <= 1 << 20

    taken = 0

    def endless():
        nonlocal taken
        yield b"age-encryption.org/v1\n-> X25519 "
        while taken < 1 << 30:
            taken += 1 << 16
            yield b"A" * (1 << 16)

    with pytest.raises(BackupDamaged, match="header has no end"):
        decrypt(endless(), pieces.append, [identity], "sealed")
    assert taken < 1 << 20
