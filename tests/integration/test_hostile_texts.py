"""Names, ids, contents and errors of others are shown as they are: they run nothing and move nothing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile

import pytest

from lib.backup.manifest import sealed
from lib.config import load_config
from lib.errors import escaped, listed, one_line
from lib.show_config import settings_lines
from tests.integration.test_hostile_network import replying, serving
from tests.operator_support import ROOT

pytestmark = pytest.mark.qdrant
FORGED = "x\n::forged\x1b[2J\u202e"
NASTY = "a\x1b]0;owned\x07\x1b[2J\r\n::forged line\u202ec\x9b31m"


def raw(text: str) -> bool:
    """Whether a character in it could move the cursor or turn the text."""
    return any(not (one.isprintable() or one in "\n\t") for one in text)


def test_what_is_escaped():
    assert (
        escaped("a\x1b[31m\r\x00\u202e\u2028\ud800 ä \U0001f600\n\t")
        == "a\\x1b[31m\\r\\x00\\u202e\\u2028\\ud800 ä \U0001f600\n\t"
    )
    assert one_line("a\nb\tc\x07") == "a\\nb\\tc\\x07"
    assert listed(["a\nb", 1]) == "a\\nb, 1"
    assert not raw(one_line(NASTY))


def test_an_id_and_an_error_of_others_stay_in_their_line(operator):
    operator.load(12)
    operator.cypher("MATCH (m:Memory) WITH m LIMIT 1 SET m.id = $id, m.content = $id", id=NASTY)
    operator.run("backup_automem")
    for script, *words in (
        ("verify_migration",),
        ("reembed_embeddings", "--dry-run"),
        ("reembed_embeddings", "--only-missing"),
    ):
        result = operator.run(script, *words, env={"VECTOR_SIZE": "48"}, expect=None)
        assert not raw(result.out + result.err)
        assert not [line for line in (result.out + result.err).splitlines() if line.startswith("::forged")]
    error = json.dumps({"status": {"error": NASTY}}).encode()
    with serving(replying(500, {"Content-Type": "application/json"}, error)) as (url, _):
        result = operator.run("backup_automem", env={"QDRANT_URL": url}, expect=1)
    assert "owned" in result.err
    assert not raw(result.err)
    assert not [line for line in result.err.splitlines() if line.startswith("::forged")]


def test_a_forged_model_is_not_run_when_the_lines_are_pasted(operator, tmp_path):
    """For example for a set whose archive was forged with its manifest."""
    model = f"text-embedding-3-small; touch {tmp_path}/PASTED #"
    config = load_config({**operator.environ, "VECTOR_SIZE": "96"}, cwd=tmp_path, root=tmp_path)
    lines = [line.strip() for line in settings_lines(48, model, config) if line.strip().startswith("export ")]
    done = subprocess.run(
        ["sh", "-c", "\n".join([*lines, 'echo "$EMBEDDING_MODEL"'])],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == model
    assert not (tmp_path / "PASTED").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("QDRANT_COLLECTION", ".."),
        ("QDRANT_COLLECTION", "a\x1b[2Jb"),
        ("FALKORDB_GRAPH", "."),
        ("FALKORDB_GRAPH", "a\nb"),
        ("FALKORDB_GRAPH", "x" * 221),  # its backups' files would have too long names
        ("EMBEDDING_MODEL", "text\u202eembedding"),
    ],
)
def test_a_name_that_could_not_be_real_is_refused(operator, name, value):
    for script in ("backup_automem", "reembed_embeddings", "verify_migration"):
        result = operator.run(script, env={name: value}, expect=2)
        assert name in result.err
        assert not raw(result.err)


def test_a_manifest_with_such_a_name_is_damaged(operator):
    operator.load(12)
    operator.run("backup_automem")
    (path,) = operator.manifests()
    document = json.loads(path.read_text())
    document["collection"]["model"] = NASTY
    path.write_text(json.dumps(sealed(document)))
    for words in (["--list"], ["--check", "all"]):
        result = operator.run("backup_automem", *words, expect=None)
        assert path.name in result.out + result.err
        assert not raw(result.out + result.err)


@pytest.mark.parametrize("flag", [[], ["--backup-dir"]])
def test_a_files_name_that_is_no_utf8_is_refused(operator, flag):
    """It is written into journals, which are UTF-8."""
    path = operator.folder / os.fsdecode(b"caf\xe9.rdb")
    path.write_bytes(b"REDIS0012")
    output = operator.run("restore_from_backup", *flag, str(path), expect=2).err
    assert "an argument has bytes that are not UTF-8" in output
    assert not raw(output)


@pytest.mark.parametrize("flag", [[], ["--backup-dir"]])
def test_a_files_name_forges_no_line(operator, tmp_path, flag):
    """As with `restore_from_backup.py incoming/*`."""
    path = tmp_path / FORGED.replace("/", "")
    path.write_bytes(b"REDIS0012")
    output = operator.run("restore_from_backup", *flag, str(path), expect=2).err
    assert "an argument has a control character" in output
    assert "\n::forged" not in output
    assert not raw(output)


@pytest.mark.parametrize("flag", ["--backup-dir", "--upload", "--metrics"])
def test_an_argument_that_is_not_utf8_is_refused(operator, flag):
    assert (
        "an argument has bytes that are not UTF-8"
        in operator.run("backup_automem", flag, "file:///x\udce9", expect=2).err
    )


@pytest.mark.parametrize("where", ["argument", "environment", "file", "graph"])
def test_a_name_that_the_locale_cannot_read_is_reported_with_what_helps(operator, where):
    """Its bytes are UTF-8. Python reads them as ASCII: LC_ALL=C in a crontab, with its UTF-8 mode switched off."""
    folder, words, env = str(operator.folder / "s\u00fc\u00df"), ["--list"], {"LC_ALL": "C", "PYTHONUTF8": "0"}
    if where == "argument":
        words += ["--backup-dir", folder]
    elif where == "environment":
        env["AUTOMEM_BACKUP_DIR"] = folder
    else:
        line = f"AUTOMEM_BACKUP_DIR={folder}" if where == "file" else "FALKORDB_GRAPH=gr\u00fc\u00df"
        (operator.folder / ".env").write_text(f"{line}\n", encoding="utf-8")
        env |= {"AUTOMEM_BACKUP_DIR" if where == "file" else "FALKORDB_GRAPH": ""}
    refused = operator.run("backup_automem", *words, expect=2, env=env).err
    assert "not ascii, the encoding of this locale" in refused
    assert "export PYTHONUTF8=1" in refused
    operator.run("backup_automem", *words, env=env | {"PYTHONUTF8": "1"})


WORDS = [
    ("collection", "distance"),
    *(
        pytest.param(component, name, marks=pytest.mark.matrix)
        for component, names in {
            "collection": ("model_known", "proof", "proof_note", "snapshot_name", "snapshot_sha256"),
            "graph": ("digest", "expires", "kind", "proof", "proof_note"),
        }.items()
        for name in names
    ),
]


@pytest.mark.parametrize(("component", "name"), WORDS)
def test_no_word_of_a_manifest_forges_a_line(operator, component, name):
    """Sealed again, as who may write at the place of the copies can."""
    operator.load(12)
    operator.run("backup_automem")
    (path,) = operator.manifests()
    document = json.loads(path.read_text())
    document[component][name] = FORGED
    path.write_text(json.dumps(sealed(document)))
    for words in (["backup_automem", "--list"], ["restore_from_backup", "latest", "--dry-run"]):
        result = operator.run(*words, expect=None)
        assert not raw(result.out + result.err)
        assert "\n::forged" not in result.out + result.err


FACTS = [
    ("collection", FORGED),
    ("collection", {"a": 1}),
    ("promised_ids", FORGED),
    ("server", {"version": FORGED}),
]


@pytest.mark.parametrize(("name", "value"), FACTS)
def test_no_word_of_an_archive_forges_a_line(operator, tmp_path, name, value):
    """An archive that is restored by its name, without a manifest to compare its texts with."""
    operator.load(12)
    operator.run("backup_automem", "--only", "qdrant")
    (archive,) = (operator.backups / "qdrant").glob("*.tar.gz")
    forged = tmp_path / "forged.tar.gz"
    with tarfile.open(archive) as old, tarfile.open(forged, "w:gz", compresslevel=1) as new:
        for member in old:
            content = old.extractfile(member).read()
            if member.name == "collection.json":
                content = json.dumps({**json.loads(content), name: value}).encode()
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    result = operator.run("restore_from_backup", str(forged), "--dry-run", expect=4)
    assert "its collection.json is incomplete" in result.err
    assert not raw(result.err)
    assert "\n::forged" not in result.err


def test_a_password_in_an_unknown_flag_or_a_proxy_is_not_shown(operator):
    for words in (["--chek=sftp://u:pa/ss@host/f"], ["--check", "x", "sftp://u:pa/ss@host/f"]):
        result = operator.run("backup_automem", *words, expect=2)
        assert "pa/ss" not in result.err
        assert "ss@" not in result.err
    for value in ("http://user:pa#ss@proxy:3128", "http://user:pa?ss@proxy:3128", "http://proxy:pa55"):
        for name in ("HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            result = operator.run("backup_automem", env={name: value, "QDRANT_URL": "http://192.0.2.1:6333"}, expect=2)
            assert f"{name} (environment): is not the URL of a proxy" in result.err
            assert not any(part in result.err for part in ("pa#", "ss@", "pa?", "pa55"))


def test_the_traceback_of_a_bug_moves_nothing_and_shows_no_login():
    code = "from lib import cli\ndef fail(): raise KeyError(Text())\nclass Text:\n    def __repr__(self): return %r\n"
    code = code % f"{NASTY} http://user:word@host/" + "cli.run(fail)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "http://***@host/" in ended.stderr
    assert not raw(ended.stderr)
