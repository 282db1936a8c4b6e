"""Damaged, edited, swapped and malicious files: a restore refuses every one before it touches anything."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tarfile
import zlib
from contextlib import ExitStack
from pathlib import Path

import pytest

from lib.backup.manifest import sealed
from lib.clients.falkordb.scratch import installed_engines
from lib.errors import BackupDamaged, BadFile, MigrationError
from lib.restore.preflight import verify_files
from tests.matrix import matrix
from tests.operator_support import OLD_SIZE, Operator
from tests.restore_support import damaged, site, wanted

pytestmark = pytest.mark.qdrant

KINDS = ("bit", "cut", "zeros", "junk", "gap")
EACH = 13  # of five kinds: 65 damages of each file


@pytest.fixture(scope="module")
def loaded(session_servers, tmp_path_factory):
    """Stores that no test of this module changes, and one backup of them."""
    someone = Operator(session_servers, tmp_path_factory.mktemp("loaded"))
    someone.load()
    someone.run("backup_automem")
    yield someone
    someone.clean_up()


@pytest.fixture
def backed(loaded, tmp_path):
    """The same stores with a copy of the backups that the test may damage."""
    shutil.copytree(loaded.backups, tmp_path / "work" / "backups")
    return Operator(loaded.servers, tmp_path / "work", loaded.graph, loaded.collection)


def verify(operator, place, *words: Path) -> None:
    """Verify as the restore does before it changes anything."""
    with ExitStack() as stack:
        verify_files(place, wanted(operator, *words), stack)


def assert_refused(operator, place, *words: Path) -> str:
    with pytest.raises(MigrationError) as caught:
        verify(operator, place, *words)
    # A file with a badly damaged head is not recognised as a backup.
    assert isinstance(caught.value, BackupDamaged | BadFile), repr(caught.value)
    return str(caught.value)


def file_of(operator, which: str) -> Path:
    return {
        "rdb": Path(operator.rdb()),
        "archive": Path(operator.archive()),
        "manifest": operator.manifests()[0],
    }[which]


def bare_snapshot(operator, path: Path, change=lambda body: body) -> Path:
    """Extract the server's snapshot from the archive."""
    with tarfile.open(operator.archive(), "r:gz") as tar:
        name = next(one for one in tar.getnames() if one.startswith("snapshot/"))
        path.write_bytes(change(tar.extractfile(name).read()))
    return path


def bare_with_checksum(operator, folder: Path) -> Path:
    """As a server keeps it on its disk."""
    path = bare_snapshot(operator, folder / "bare.snapshot")
    (folder / "bare.snapshot.checksum").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def same_content(bad: bytes, whole: bytes) -> bool:
    try:
        return gzip.decompress(bad) == gzip.decompress(whole)
    except (OSError, EOFError, zlib.error):
        return False


@pytest.mark.parametrize("which", ["rdb", "archive", "manifest", "rdb alone", "archive alone", "bare"])
def test_every_random_damage_is_refused(backed, tmp_path, which):
    name, _, alone = which.partition(" ")
    place, before = site(backed), backed.state()
    path = bare_with_checksum(backed, tmp_path) if name == "bare" else file_of(backed, name)
    whole, chance = path.read_bytes(), random.Random(f"restore {which}")
    if alone:  # without its manifest, only the checksums in the file remain
        path = shutil.copy(path, tmp_path / path.name)
    verify(backed, place, path)
    for kind in KINDS:
        for number in range(EACH):
            bad = damaged(whole, kind, chance)
            if bad == whole or (alone and same_content(bad, whole)):
                continue  # zeros onto zeros, or the writer in gzip's header
            path.write_bytes(bad)
            try:
                assert_refused(backed, place, path)
            except pytest.fail.Exception as error:
                raise AssertionError(f"{kind} {number} of {which} passed") from error
    assert backed.state() == before
    assert backed.collections() == [backed.collection]


@pytest.mark.parametrize(("which", "kind", "code"), [("rdb", "bit", 4), ("archive", "cut", 4), ("manifest", "gap", 4)])
@pytest.mark.core
def test_as_a_process_the_exit_code_is_4(backed, which, kind, code):
    before, path = backed.state(), file_of(backed, which)
    path.write_bytes(damaged(path.read_bytes(), kind, random.Random(7)))
    for more in ((), ("--dry-run",)):
        result = backed.run("restore_from_backup", str(path), *more, expect=code)
        assert result.err.count("error:") == 1
    assert backed.state() == before


def test_swapped_files_and_other_graphs_are_refused(operator):
    backed = operator
    backed.load()
    backed.run("backup_automem")
    place = site(backed)
    first = json.loads(backed.manifests()[0].read_text())
    backed.cypher("CREATE (:Memory {id: 'x', content: 'one more'})")
    # Snapshots of one second have the same name: those of an unchanged collection would be the same bytes.
    point = {"id": 77, "vector": [0.5] * OLD_SIZE, "payload": {"content": "one more"}}
    backed.call("PUT", "/points?wait=true", {"points": [point]})
    backed.run("backup_automem")
    second = json.loads(backed.manifests()[1].read_text())
    for component in ("graph", "collection"):
        ours, theirs = (backed.backups / one[component]["file"]["name"] for one in (first, second))
        original = ours.read_bytes()
        assert original != theirs.read_bytes(), component
        shutil.copy(theirs, ours)
        message = assert_refused(backed, place, backed.manifests()[0])
        assert "sha256" in message or "bytes" in message
        ours.write_bytes(original)
    backed.export(FALKORDB_GRAPH="no_such_graph")
    result = backed.run("restore_from_backup", backed.rdb(), expect=2)
    assert "does not hold the graph 'no_such_graph'" in result.err


@pytest.mark.parametrize(
    "edit",
    [
        lambda one: one["graph"].update(nodes=one["graph"]["nodes"] + 1),
        lambda one: one["graph"]["file"].update(sha256="0" * 64),
        lambda one: one["collection"]["file"].update(size=1),
        lambda one: one["collection"]["file"].update(name="qdrant/another.tar.gz"),
    ],
)
def test_an_edited_manifest_is_refused_even_with_a_right_seal(backed, edit):
    manifest = backed.manifests()[0]
    document = json.loads(manifest.read_text())
    edit(document)
    manifest.write_text(json.dumps(document))
    assert "damaged or edited" in assert_refused(backed, site(backed), manifest)
    manifest.write_text(json.dumps(sealed(document)))
    assert_refused(backed, site(backed), manifest)


def test_a_digest_that_is_not_the_graphs_is_refused_by_the_trial_restore(backed):
    """The file has the manifest's sha256: its digest is computed once, on the target, before anything is replaced."""
    manifest, before = backed.manifests()[0], backed.state()
    document = json.loads(manifest.read_text())
    document["graph"]["digest"] = "0" * 32
    manifest.write_text(json.dumps(sealed(document)))
    refused = backed.run("restore_from_backup", manifest, expect=4)
    assert "differs from the backup" in refused.err
    assert f"instead of {'0' * 32}" in refused.err
    assert backed.state() == before


def test_an_rdb_without_a_checksum_needs_its_manifest(backed, tmp_path):
    place, path = site(backed), Path(backed.rdb())
    zeroed = path.read_bytes()[:-8] + bytes(8)
    alone = tmp_path / "alone.rdb"
    alone.write_bytes(zeroed)
    assert "has no checksum" in assert_refused(backed, place, alone)
    path.write_bytes(zeroed)
    assert "sha256" in assert_refused(backed, place, path)


def add(tar: tarfile.TarFile, name: str, body: bytes, **more: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(body))


def rebuilt(source: Path, target: Path, change) -> Path:
    """A copy of an archive, member by member; `change(tar, name, body)` may write a member and then returns true."""
    with tarfile.open(source, "r:gz") as old, tarfile.open(target, "w:gz", format=tarfile.GNU_FORMAT) as new:
        for member in old:
            body = old.extractfile(member).read()
            if not change(new, member.name, body):
                add(new, member.name, body)
    return target


def evil_snapshot(body: bytes, **entry: object) -> bytes:
    """The server's snapshot with one more entry."""
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(body)) as old,
        tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as new,
    ):
        info = tarfile.TarInfo(str(entry.pop("name")))
        for key, value in entry.items():
            setattr(info, key, value)
        new.addfile(info, io.BytesIO(bytes(info.size)) if info.isreg() else None)
        for member in old:
            if member.isfile():
                add(new, member.name, old.extractfile(member).read())
    return out.getvalue()


def sparse_claim(size: int) -> bytes:
    """A header of an old GNU sparse file that holds nothing and claims `size` bytes."""
    info = tarfile.TarInfo("0/segments/huge.tar")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(format=tarfile.GNU_FORMAT))
    header[386 : 386 + 24] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


OUTSIDE = [
    {"name": "/etc/evil"},
    {"name": "../evil"},
    {"name": "0/../../evil"},
    {"name": "link", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    {"name": "hard", "type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"},
    {"name": "device", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
    {"name": "pipe", "type": tarfile.FIFOTYPE},
]


def whole_tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize("entry", matrix(OUTSIDE, OUTSIDE[0], OUTSIDE[-1]), ids=lambda entry: entry["name"])
def test_malicious_members_write_nothing(backed, tmp_path, entry, monkeypatch):
    place, source = site(backed), Path(backed.archive())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()

    def outer(tar, name, _body):
        if name == "ids.txt":
            more = {key: value for key, value in entry.items() if key != "name"}
            add(tar, entry["name"], b"", **more)
        return False

    def inner(tar, name, body):
        if not name.startswith("snapshot/"):
            return False
        add(tar, name, evil_snapshot(body, **entry))
        return True

    evil = [rebuilt(source, tmp_path / f"evil{number}.tar.gz", one) for number, one in enumerate((outer, inner))]
    evil.append(bare_snapshot(backed, tmp_path / "evil.snapshot", lambda body: evil_snapshot(body, **entry)))
    for path in evil:
        before = whole_tree(tmp_path), whole_tree(backed.backups)
        assert_refused(backed, place, path)
        assert (whole_tree(tmp_path), whole_tree(backed.backups)) == before
    assert not Path("/etc/evil").exists()
    assert not (tmp_path.parent / "evil").exists()


def test_huge_claims_are_refused_at_once(backed, tmp_path):
    place, source = site(backed), Path(backed.archive())

    def sparse_outer(tar, name, _body):
        if name == "ids.txt":
            header = tarfile.TarInfo(name)
            header.pax_headers = {
                "GNU.sparse.map": "0,0",
                "GNU.sparse.size": str(1 << 60),
                "GNU.sparse.name": name,
            }
            tar.fileobj.write(header.tobuf(format=tarfile.PAX_FORMAT))
            return True
        return False

    def sparse_inner(tar, name, body):
        if not name.startswith("snapshot/"):
            return False
        add(tar, name, sparse_claim(1 << 62) + body)
        return True

    def no_lines(tar, name, _body):
        if name == "ids.txt":
            add(tar, name, bytes(1 << 26))
            return True
        return False

    def long_claim(tar, name, body):
        if name == "ids.txt":
            info = tarfile.TarInfo(name)
            info.size = 1 << 40
            tar.fileobj.write(info.tobuf(format=tarfile.GNU_FORMAT) + body)
            return True
        return False

    for number, change in enumerate((sparse_outer, sparse_inner, no_lines, long_claim)):
        path = rebuilt(source, tmp_path / f"claim{number}.tar.gz", change)
        began = os.times()
        assert_refused(backed, place, path)
        assert os.times().user - began.user < 10, change.__name__


@pytest.mark.parametrize(
    "edit",
    [
        lambda one: one.pop("server"),
        lambda one: one.update(server="1.18.3"),
        lambda one: one.update(config={}),
        lambda one: one["config"]["params"].update(vectors=None),
        lambda one: one["config"]["params"].update(vectors={"size": 7, "distance": "Dot"}),
        lambda one: one.update(aliases=[1]),
        lambda one: one.pop("model"),
        lambda one: one.update(promised_ids=3),
        lambda one: one.update(snapshot_sha256="0" * 64),
        lambda one: one.update(snapshot_size=1),
    ],
)
def test_an_archive_whose_own_facts_are_off_is_refused(backed, tmp_path, edit):
    def change(tar, name, body):
        if name != "collection.json":
            return False
        facts = json.loads(body)
        edit(facts)
        add(tar, name, json.dumps(facts).encode())
        return True

    path = rebuilt(Path(backed.archive()), tmp_path / "edited.tar.gz", change)
    assert_refused(backed, site(backed), path)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_scratch_servers_are_gone_after_damaged_loads(backed, tmp_path):
    """A file that passes its checksum and does not load: the scratch server reports it and leaves nothing."""
    from lib.clients.falkordb.rdb import crc64

    place, whole = site(backed), Path(backed.rdb()).read_bytes()
    chance, refused = random.Random(11), 0
    for _ in range(6):
        at = chance.randrange(len(whole) // 2, len(whole) - 4096)
        body = whole[:at] + chance.randbytes(2048) + whole[at + 2048 : -8]
        path = tmp_path / "forged.rdb"
        path.write_bytes(body + crc64(body).to_bytes(8, "little"))
        try:
            verify(backed, place, path)
        except BackupDamaged:
            refused += 1
    servers = {str(engine.server) for engine in installed_engines({})}
    left = [pid for pid in Path("/proc").glob("[0-9]*") if _runs(pid, servers) and _is_ours(pid)]
    assert left == []
    assert refused >= 4  # changed text with a forged checksum may load: only the manifest would detect it


def _runs(pid: Path, servers: set[str]) -> bool:
    try:
        return (pid / "cmdline").read_bytes().split(b"\0")[0].decode() in servers
    except OSError:
        return False


def _is_ours(pid: Path) -> bool:
    try:
        words = (pid / "cmdline").read_bytes().decode()
        parent = int((pid / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return False
    return "falkordb-scratch-" in words and parent == os.getpid()
