"""Mistakes of operators: one clear message, the right exit code, no traceback, nothing touched, no secret revealed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module

import pytest

from lib.config import load_config
from lib.files import lock_targets
from tests.matrix import matrix
from tests.operator_support import LARGE, SMALL, Operator
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.process import ServerProcess, free_port
from tests.vectors_support import REAL_SERVER, own_server

pytestmark = pytest.mark.qdrant

COMMANDS = {
    "backup": ("backup_automem",),
    "reembed": ("reembed_embeddings",),
    "restore": ("restore_from_backup", "latest"),
    "verify": ("verify_migration",),
}
every_command = pytest.mark.parametrize("command", COMMANDS)
SECRET = "s3cr3t-that-nobody-sees"


@pytest.fixture(scope="module")
def stocked(session_servers, tmp_path_factory):
    """An operator with both stores filled and one backup: nothing here may change any of it."""
    someone = Operator(session_servers, tmp_path_factory.mktemp("bad_input"))
    someone.load()
    someone.run("backup_automem")
    before = someone.state()
    yield someone
    someone.exports.clear()
    assert someone.state() == before
    someone.clean_up()


def tree(operator) -> dict[str, str]:
    """Every file of the backups, with its content."""
    files = [path for path in operator.backups.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(operator) -> tuple[object, ...]:
    """What exists on the servers, by name."""
    return operator.collections(), operator.graphs(), operator.call("GET", "/snapshots")


@pytest.fixture
def operator(stocked):
    """The stocked operator; afterwards the names on the servers and the backups are what they were."""
    stocked.exports.clear()
    before = (names(stocked), tree(stocked))
    yield stocked
    stocked.exports.clear()
    assert (names(stocked), tree(stocked)) == before


def refused(operator, code: int, *words: str, expected: tuple[str, ...], next_step: str | None = None, **env: str):
    """The command ends with this code, one message on stderr and one document on stdout.

    The newest set is named by its file: `latest` depends on the configured address, which is wrong here.
    """
    if "--backup-dir" not in words:
        words = tuple(str(operator.manifests()[-1]) if word == "latest" else word for word in words)
    result = operator.run(words[0], *words[1:], "--json", expect=code, env=env)
    heads = [line for line in result.err.splitlines() if line.startswith(("error:", "ValueError:", "usage:"))]
    assert len(heads) == 1, result.err
    assert set(result.json) == {"error", "next", "exit_code"}
    assert result.json["exit_code"] == code
    for text in expected:
        assert text in result.json["error"]
        assert text in result.err
    assert result.json["next"]
    assert "\nnext:\n" in result.err
    if next_step:
        assert next_step in result.json["next"]
        assert next_step in result.err
    for text in (result.out, result.err):
        assert SECRET not in text
    return result


# --- servers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", matrix(COMMANDS, "backup"))
def test_falkordb_is_down(operator, command):
    port = str(free_port())
    where = f"FalkorDB at 127.0.0.1:{port} does not answer"
    operator.export(FALKORDB_PORT=port, FALKORDB_PASSWORD=SECRET)
    refused(operator, 1, *COMMANDS[command], expected=(where,), next_step="docker compose up -d falkordb")


@pytest.mark.parametrize("command", matrix(COMMANDS, "reembed"))
def test_qdrant_is_down(operator, monkeypatch, command):
    monkeypatch.setattr("lib.clients.qdrant.transport.PAUSES_SECONDS", (0.02, 0.02, 0.02))
    url = f"http://127.0.0.1:{free_port()}"
    operator.export(QDRANT_URL=url.replace("//", f"//me:{SECRET}@"), QDRANT_API_KEY=SECRET)
    refused(
        operator,
        1,
        *COMMANDS[command],
        expected=(f"Qdrant at {url} is unreachable",),
        next_step=f"docker compose up -d {'falkordb qdrant' if command == 'restore' else 'qdrant'}",
    )


@pytest.mark.parametrize("name", matrix(["FALKORDB_HOST", "QDRANT_URL"], "FALKORDB_HOST"))
def test_a_name_that_no_one_knows(operator, name):
    host = "no-such-host.invalid"
    operator.export(**{name: host if name == "FALKORDB_HOST" else f"http://{host}"})
    refused(operator, 1, "backup_automem", expected=(host,))


@contextlib.contextmanager
def web_server(status: int, body: bytes, kind: str):
    """Some other program behind a port."""

    class Other(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, b"<html>a web site</html>", "text/html"),
        (200, b'{"title": "another", "version": "1"}', "application/json"),
        (200, b"[]", "application/json"),
        (404, b"<html>no such page</html>", "text/html"),
        (302, b"", "text/html"),
    ],
)
def test_another_service_listens_on_qdrants_port(operator, status, body, kind):
    with web_server(status, body, kind) as port:
        operator.export(QDRANT_URL=f"http://127.0.0.1:{port}")
        refused(
            operator,
            1,
            "backup_automem",
            expected=(f"http://127.0.0.1:{port} is not Qdrant",),
            next_step="QDRANT_URL",
        )


@every_command
def test_each_command_notices_a_server_that_is_not_qdrant(operator, command):
    with web_server(200, b"hello", "text/plain") as port:
        operator.export(QDRANT_URL=f"http://127.0.0.1:{port}")
        refused(operator, 1, *COMMANDS[command], expected=("is not Qdrant",), next_step="QDRANT_URL")


@pytest.mark.matrix
def test_falkordb_listens_on_qdrants_port(operator):
    port = operator.servers.falkordb.port
    operator.export(QDRANT_URL=f"http://127.0.0.1:{port}")
    refused(operator, 1, "verify_migration", expected=(f"Qdrant at http://127.0.0.1:{port}",))


@every_command
def test_a_web_server_listens_on_falkordbs_port(operator, command):
    with web_server(200, b"hello", "text/plain") as port:
        operator.export(FALKORDB_PORT=port)
        expected = (f"127.0.0.1:{port}", "is not FalkorDB")
        refused(operator, 1, *COMMANDS[command], expected=expected, next_step="FALKORDB_PORT")


@pytest.mark.matrix
def test_a_server_that_never_answers(operator):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        operator.export(FALKORDB_PORT=silent.getsockname()[1])
        refused(
            operator,
            1,
            "backup_automem",
            "--only",
            "falkordb",
            expected=("does not answer",),
            next_step="FALKORDB_PORT",
        )


def test_a_redis_without_the_graph_module(operator, tmp_path):
    port = free_port()
    server = ServerProcess(
        [operator.servers.falkordb.engine.server, "--port", str(port), "--save", "", "--dir", tmp_path],
        tmp_path / "log",
    )

    def answers():
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True

    server.start().wait_ready(answers)
    try:
        operator.export(FALKORDB_PORT=port)
        for command in ("backup", "restore"):
            expected = (f"127.0.0.1:{port}", "FalkorDB")
            refused(operator, 1, *COMMANDS[command], expected=expected, next_step="FALKORDB_PORT")
    finally:
        server.stop()


# --- passwords and keys -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked_falkordb(tmp_path_factory):
    server = FalkorServer(tmp_path_factory.mktemp("locked"), password="the-right-one")
    server.start()
    yield server
    server.stop()


@every_command
@pytest.mark.parametrize(
    "login", [{}, {"FALKORDB_PASSWORD": SECRET}, {"FALKORDB_USERNAME": "u", "FALKORDB_PASSWORD": SECRET}]
)
def test_a_wrong_falkordb_password(operator, locked_falkordb, command, login):
    operator.export(FALKORDB_PORT=locked_falkordb.port, **login)
    where = f"FalkorDB at 127.0.0.1:{locked_falkordb.port} refused the login"
    refused(operator, 2, *COMMANDS[command], expected=(where,), next_step="FALKORDB_PASSWORD")


@pytest.fixture(scope="module")
def locked_qdrant(tmp_path_factory):
    version = "real" if REAL_SERVER else "1.18.3"
    with own_server(version, tmp_path_factory.mktemp("locked_qdrant"), api_key="the-right-one") as qdrant:
        yield qdrant.base_url


@every_command
@pytest.mark.parametrize("key", [{}, {"QDRANT_API_KEY": SECRET}])
def test_a_wrong_qdrant_key(operator, locked_qdrant, command, key):
    operator.export(QDRANT_URL=locked_qdrant, **key)
    expected = (f"Qdrant at {locked_qdrant} refuses access",)
    refused(operator, 2, *COMMANDS[command], expected=expected, next_step="QDRANT_API_KEY")


# --- missing stores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["backup", "reembed", "verify"])
def test_the_graph_is_missing(operator, command):
    operator.export(FALKORDB_GRAPH="no_such_graph")
    expected = ("graph 'no_such_graph' does not exist", operator.graph)
    refused(operator, 1, *COMMANDS[command], expected=expected, next_step="FALKORDB_GRAPH")


@pytest.mark.parametrize(
    "words", [("backup_automem",), ("verify_migration",), ("reembed_embeddings", "--only-missing")]
)
def test_the_collection_is_missing(operator, words):
    operator.export(QDRANT_COLLECTION="no_such_collection")
    refused(operator, 1, *words, expected=("no_such_collection",))


def test_a_dry_run_of_a_backup_notices_what_is_missing(operator):
    operator.export(FALKORDB_GRAPH="no_such_graph")
    refused(operator, 1, "backup_automem", "--dry-run", expected=("no_such_graph",))


def test_latest_without_any_backup(operator, tmp_path):
    for words in (("restore_from_backup", "latest"), ("backup_automem", "--check", "all")):
        expected = (f"no backup in {tmp_path / 'none'}",)
        refused(
            operator,
            1,
            *words,
            "--backup-dir",
            str(tmp_path / "none"),
            expected=expected,
            next_step="backup_automem.py",
        )
    assert not (tmp_path / "none").exists()


# --- settings ---------------------------------------------------------------------------------------------------


@every_command
def test_every_fault_of_the_configuration_in_one_message(operator, command):
    """Without a network: nothing listens at these addresses."""
    operator.export(
        VECTOR_SIZE="abc",
        QDRANT_URL=f"me:{SECRET}@127.0.0.1:{free_port()}",
        FALKORDB_PORT="none",
        OPENAI_API_KEY=f"{SECRET}\n",
    )
    names = (
        "4 faults",
        "VECTOR_SIZE=abc (environment)",
        "QDRANT_URL=****@",
        "FALKORDB_PORT=none",
        "OPENAI_API_KEY=****",
    )
    refused(operator, 2, *COMMANDS[command], expected=names, next_step="--show-config")


def test_a_faulty_env_file_is_named_with_its_line(operator, tmp_path):
    path = tmp_path / "automem.env"
    path.write_text(f"A=1\nOPENAI_API_KEY={SECRET}VECTOR_SIZE=3072\n")
    expected = (f"{path}:2", "also holds VECTOR_SIZE=")
    refused(operator, 2, "verify_migration", "--env-file", str(path), expected=expected)
    refused(operator, 2, "verify_migration", expected=expected, AUTOMEM_ENV_FILE=str(path))
    expected = (f"--env-file names {tmp_path / 'none'}, which is not a file",)
    refused(operator, 2, "verify_migration", "--env-file", str(tmp_path / "none"), expected=expected)


def offline(operator) -> None:
    """Nothing listens at the stores' addresses: what is reported was found without a network."""
    operator.export(FALKORDB_PORT=free_port(), QDRANT_URL=f"http://127.0.0.1:{free_port()}")


def test_reembed_without_a_key(operator):
    offline(operator)
    operator.export(OPENAI_API_KEY="")
    refused(
        operator,
        2,
        "reembed_embeddings",
        expected=("OPENAI_API_KEY is not set",),
        next_step="export OPENAI_API_KEY=",
    )


def test_a_model_that_cannot_make_the_size(operator):
    offline(operator)
    operator.export(EMBEDDING_MODEL=SMALL, VECTOR_SIZE=3072)
    expected = (f"EMBEDDING_MODEL {SMALL} makes at most 1536d vectors, VECTOR_SIZE is 3072",)
    for words in ((), ("--only-missing",)):
        refused(
            operator,
            2,
            "reembed_embeddings",
            *words,
            expected=expected,
            next_step=f"export EMBEDDING_MODEL={LARGE}",
        )


# --- FILE -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(operator, tmp_path):
    """Wrong FILE arguments, by their fault."""
    made = {
        name: tmp_path / name for name in ("missing", "empty", "folder", "text.rdb", "theirs.json", "theirs.tar.gz")
    }
    made["empty"].touch()
    made["folder"].mkdir()
    made["text.rdb"].write_text("these are my notes\n")
    made["theirs.json"].write_text('{"name": "package", "version": "1"}')
    (tmp_path / "notes.txt").write_text("notes")
    shutil.make_archive(str(tmp_path / "theirs"), "gztar", tmp_path, "notes.txt")
    newer = json.loads(operator.manifests()[0].read_text()) | {"format": 99}
    made["newer.json"] = tmp_path / "newer.json"
    made["newer.json"].write_text(json.dumps(newer))
    return made


WRONG = {
    "missing": "does not exist",
    "empty": "is empty",
    "folder": "is a folder, a file is needed",
    "text.rdb": "is no backup",
    "theirs.json": "is JSON, but no manifest of a backup",
    "theirs.tar.gz": "is a tar.gz, but not one that backup_automem.py wrote",
    "newer.json": "is of format 99",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_restored(operator, files, name):
    offline(operator)
    expected = (str(files[name]), WRONG[name])
    refused(operator, 2, "restore_from_backup", str(files[name]), expected=expected)


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_checked(operator, files, name):
    offline(operator)
    if name in {"theirs.json", "newer.json"}:  # reported with the other results: the check continues
        result = operator.run("backup_automem", "--check", str(files[name]), "--json", expect=4)
        assert WRONG[name] in result.json["proofs"][0]["fault"]
        return
    refused(operator, 2, "backup_automem", "--check", str(files[name]), expected=(str(files[name]), WRONG[name]))


@pytest.mark.parametrize("words", [("restore_from_backup",), ("backup_automem", "--check")])
def test_a_pipe_is_not_waited_for(operator, tmp_path, words):
    """As of `<(gunzip -c FILE)`: what is read to tell its kind is gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = operator.start(*words, str(pipe))
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert f"{pipe} is a pipe or a device, a file is needed" in err


def test_a_file_of_no_set_cannot_be_checked(operator, tmp_path):
    shutil.copy(operator.rdb(), tmp_path / "copy.rdb")
    expected = (f"{tmp_path / 'copy.rdb'} belongs to no backup set",)
    refused(operator, 2, "backup_automem", "--check", str(tmp_path / "copy.rdb"), expected=expected)


def test_two_files_of_one_store(operator, tmp_path):
    offline(operator)
    for file, store in ((operator.rdb(), "graph"), (operator.archive(), "collection")):
        expected = (f"are both of the {store}",)
        refused(operator, 2, "restore_from_backup", file, file, expected=expected)
        refused(operator, 2, "restore_from_backup", "latest", file, expected=expected)


def test_no_file_is_named(operator):
    offline(operator)
    refused(operator, 2, "restore_from_backup", expected=("no FILE is named",), next_step="--list")


def test_a_manifest_whose_file_is_gone(operator, tmp_path):
    manifest = operator.manifests()[0]
    shutil.copy(manifest, tmp_path)
    result = operator.run("restore_from_backup", str(tmp_path / manifest.name), "--json", expect=4)
    assert "is missing" in result.json["error"]
    result = operator.run("backup_automem", "--check", str(tmp_path / manifest.name), "--json", expect=4)
    assert [check["level"] for check in result.json["proofs"]] == ["damaged", "damaged"]


def test_one_broken_manifest_does_not_stop_the_backup_check(operator, tmp_path):
    shutil.copytree(operator.backups, tmp_path / "copy")
    whole = min((tmp_path / "copy").glob("backup_*.json"))
    (tmp_path / "copy" / "backup_20990101_000000.json").write_bytes(whole.read_bytes()[:200])
    folder = ("--backup-dir", str(tmp_path / "copy"))
    result = operator.run("backup_automem", "--check", "all", "--json", *folder, expect=4)
    levels = [check["level"] for check in result.json["proofs"]]
    assert levels[0] == "damaged"
    assert set(levels[1:]) <= {"checked", "restored"}
    assert len(levels) == 3
    listed = operator.run("backup_automem", "--list", "--json", *folder)
    assert "backup_20990101_000000.json cannot be read" in listed.err
    assert len(listed.json["sets"]) == 1
    refused_latest = operator.run("restore_from_backup", "latest", "--json", *folder, expect=4)
    assert "backup_20990101_000000.json" in refused_latest.json["error"]


# --- folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("backup_automem",), ("reembed_embeddings",), ("verify_migration",)])
def test_a_backup_folder_that_cannot_be_written(operator, tmp_path, words):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/1"):
        expected = (f"cannot write to the folder {folder}",)
        refused(operator, 2, *words, "--backup-dir", str(folder), expected=expected, next_step="--backup-dir")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_restore_into_a_backup_folder_that_cannot_be_written(operator):
    words = ("restore_from_backup", operator.archive(), "--backup-dir", "/proc/1")
    refused(operator, 2, *words, expected=("cannot write to the folder /proc/1",), next_step="--backup-dir")


# --- flags ------------------------------------------------------------------------------------------------------


VALUED = [
    (script, flag)
    for script in (
        "backup_automem",
        "reembed_embeddings",
        "restore_from_backup",
        "verify_migration",
        "quickstart",
    )
    for action in import_module(f"scripts.{script}").arguments()._actions
    for flag in action.option_strings
    if action.nargs != 0
]


@pytest.mark.parametrize(("script", "flag"), VALUED)
def test_an_empty_value_is_refused_by_every_flag_that_takes_one(operator, script, flag):
    """An unset variable between quotes: `--upload "$UNSET"` must not mean `no copy`."""
    offline(operator)
    before = sorted(operator.folder.rglob("*"))
    for words in ((flag, ""), (flag, "  "), (f"{flag}=",), (f"{flag}= ",)):
        result = operator.run(script, *words, expect=2)
        assert f"error: {flag} is empty: is a variable unset?" in result.err
        assert result.out == ""
    assert sorted(operator.folder.rglob("*")) == before


def test_every_flag_that_takes_a_value_is_known():
    """The list above is derived from the parsers: it must not become empty."""
    assert {("backup_automem", one) for one in ("--upload", "--check", "--list", "--keep", "--only")} <= set(VALUED)
    assert ("verify_migration", "--recall") in VALUED
    assert sum(flag == "--backup-dir" for _, flag in VALUED) == 4


def test_an_empty_file_argument_is_refused(operator):
    offline(operator)
    for words in (("",), ("latest", ""), ("", "latest"), ("--dry-run", "")):
        assert "is empty: is a variable unset?" in operator.run("restore_from_backup", *words, expect=2).err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("backup_automem", "--no-such-flag"), "--no-such-flag"),
        (("backup_automem", "--only", "redis"), "--only"),
        (("backup_automem", "--keep"), "--keep"),
        (("backup_automem", "--cleanup", "--keep", "0"), "--keep"),
        (("backup_automem", "--cleanup", "--keep", "-1"), "--keep"),
        (("backup_automem", "--cleanup", "--keep", "many"), "--keep"),
        (("backup_automem", "--clean"), "--clean"),
        (("backup_automem", "surplus"), "surplus"),
        (("backup_automem", "--list", "--check", "all"), "--check and --list do not go together"),
        (("backup_automem", "--cleanup", "--list"), "--list and --cleanup do not go together"),
        (("backup_automem", "--cleanup", "--pin", "20261126_220840"), "--cleanup and --pin do not go together"),
        (("backup_automem", "--metrics", "a.prom", "--check", "all"), "--metrics and --check do not go together"),
        (("backup_automem", "--metrics", "a.prom", "--dry-run"), "--metrics and --dry-run do not go together"),
        (("backup_automem", "--metrics", "no/such/folder/a.prom"), "--metrics no/such/folder/a.prom cannot be written"),
        (("backup_automem", "--pin", "20261126_220840", "--dry-run"), "--pin and --dry-run do not go together"),
        (("backup_automem", "--pin", "20261126_220840"), "no set 20261126_220840 in "),
        (("backup_automem", "--unpin", "../backup_20261126_220840"), "no set ../backup_20261126_220840 in "),
        (("backup_automem", "--keep-daily", "7"), "--keep-daily requires --cleanup"),
        (("backup_automem", "--cleanup", "--keep-weekly", "0"), "--keep-weekly must be at least 1"),
        (("backup_automem", "--keep", "3"), "--keep requires --cleanup"),
        (("backup_automem", "--cleanup", "--only", "qdrant"), "--only and --cleanup do not go together"),
        (("backup_automem", "--check", "all", "--only", "qdrant"), "--only and --check do not go together"),
        (("backup_automem", "--list", "--upload", "copies"), "--upload and --list do not go together"),
        (("backup_automem", "--check", "all", "--upload", "copies", "--dry-run"), "--check and --dry-run"),
        (("backup_automem", "--only", "falkordb", "--only", "qdrant"), "--only is given 2 times"),
        (("backup_automem", "--upload", "one", "--upload=other"), "--upload is given 2 times"),
        (
            ("backup_automem", "--backup-dir=one", "--backup-dir", "other", "--list"),
            "--backup-dir is given 2",
        ),
        (("reembed_embeddings", "--max-cost", "1", "--max-cost", "100"), "--max-cost is given 2 times"),
        (("reembed_embeddings", "--prune-spool", "--in-place"), "do not go together"),
        (("reembed_embeddings", "--batch-size", "0"), "--batch-size"),
        (("reembed_embeddings", "--workers", "two"), "--workers"),
        (("reembed_embeddings", "--max-cost", "nan"), "--max-cost"),
        (("reembed_embeddings", "--max-cost", "-1"), "--max-cost"),
        (("reembed_embeddings", "--fresh", "--dry-run"), "--fresh"),
        (("restore_from_backup", "latest", "--dry"), "--dry"),
        (("verify_migration", "--sample", "0"), "--sample"),
        (("quickstart", "--memories", "0"), "--memories"),
        (("quickstart", "serv"), "serv"),
    ],
)
def test_a_flag_that_is_not_there_or_cannot_be(operator, words, expected):
    offline(operator)
    if words[0] == "quickstart":
        result = operator.run(*words, expect=2)
        assert expected in result.err
        return
    refused(operator, 2, *words, expected=(expected,))


# --- the lock ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "kind"), [("backup", ""), ("reembed", "run on "), ("restore", ""), ("restore", "run on ")]
)
def test_another_run_holds_the_lock(operator, command, kind):
    targets = load_config(operator.environ).targets()
    with lock_targets([targets[1]], kind=kind):
        refused(operator, 5, *COMMANDS[command], expected=("another run is working on qdrant",), next_step="wait")
    with lock_targets([targets[0]], kind=kind, holder="x.py, process 7"):
        expected = ("another run is working on falkordb", "(x.py, process 7)")
        refused(operator, 5, *COMMANDS[command], expected=expected)


def test_another_run_holds_the_lock_of_a_cleanup(operator):
    targets = load_config(operator.environ).targets()
    with lock_targets([targets[1]]):
        words = ("backup_automem", "--cleanup", "--keep", "1")
        refused(operator, 5, *words, expected=("another run is working on qdrant",), next_step="wait")


# --- refusals of re-embed after its plan ------------------------------------------------------------------------


@pytest.fixture
def planner(session_servers, stocked):
    """The stocked operator, if only the embedding cache may change."""
    stocked.exports.clear()
    before = names(stocked)
    yield stocked
    stocked.exports.clear()
    assert names(stocked) == before
    shutil.rmtree(stocked.backups / "embeddings", ignore_errors=True)


def test_it_would_cost_too_much(planner):
    planner.export(VECTOR_SIZE=96, EMBEDDING_MODEL=LARGE)
    paid = planner.servers.openai.stats()
    refused(planner, 2, "reembed_embeddings", "--max-cost", "0", expected=("this would cost $0.", "was spent"))
    planner.export(EMBEDDING_MODEL="a-model-nobody-knows")
    expected = ("no list price", "--max-cost is $5")
    refused(planner, 2, "reembed_embeddings", "--max-cost", "5", expected=expected)
    assert planner.servers.openai.stats() == paid


def test_a_dry_run_only_warns_of_a_model_that_cannot_make_the_size(planner):
    planner.export(EMBEDDING_MODEL=SMALL, VECTOR_SIZE=3072)
    result = planner.run("reembed_embeddings", "--dry-run", "--json")
    assert result.err.startswith(f"warning: EMBEDDING_MODEL {SMALL} makes at most 1536d vectors")
    assert result.json["dry_run"]["size"] == 1536


def test_reembed_is_content_without_a_collection(planner):
    planner.export(QDRANT_COLLECTION=f"{planner.collection}_new", VECTOR_SIZE=96)
    result = planner.run("reembed_embeddings", "--dry-run")
    assert "absent" in result.err


@pytest.mark.parametrize("words", [("verify_migration",), ("reembed_embeddings", "--only-missing")])
def test_a_dimension_mismatch_comes_first_and_in_the_known_words(planner, words):
    planner.export(VECTOR_SIZE=96)
    result = refused(planner, 2, *words, expected=("VECTOR DIMENSION MISMATCH",), next_step="export VECTOR_SIZE=48")
    assert result.err.splitlines()[:3] == [
        "ValueError: VECTOR DIMENSION MISMATCH",
        f"Qdrant collection '{planner.collection}': 48d",
        "Config VECTOR_SIZE: 96d",
    ]
    assert "reembed_embeddings.py" in result.json["next"]


@every_command
@pytest.mark.parametrize("name", ["QDRANT_URL", "AUTOMEM_API_URL"])
def test_a_query_that_would_not_be_sent_is_refused_before_anything_is_asked(operator, command, name):
    offline(operator)
    before = sorted(operator.folder.rglob("*"))
    operator.export(**{name: f"http://127.0.0.1:1/sub?api-key={SECRET}"})
    for words in (COMMANDS[command], (*COMMANDS[command], "--json"), (COMMANDS[command][0], "--show-config")):
        result = operator.run(*words, expect=2)
        output = result.err + result.out
        assert f"{name}=http://127.0.0.1:1/sub?**** (environment): a query (from ? on) is not supported" in output
        assert SECRET not in output
    assert sorted(operator.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("text-embeding-3-large", " (did you mean text-embedding-3-large?)"),
        ("openai/text-embedding-3-smal", " (did you mean text-embedding-3-small?)"),
        ("nomic-embed-text-v2-moe", ""),
    ],
)
def test_a_misspelt_model_is_named_with_the_one_that_it_resembles(planner, model, hint):
    """Only in the error of the provider: it may be the name that another endpoint has given to a model."""
    refused(planner, 6, "reembed_embeddings", "--dry-run", expected=(f"{model}{hint} at ",), EMBEDDING_MODEL=model)
