"""Set-ups of the table of messages: each puts an operator into one situation, and takes it back at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import wraps
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from lib.backup.manifest import sealed
from lib.backup.phases import DELETING
from lib.clients.falkordb.connection import connect
from lib.config import load_config
from lib.files import lock_targets
from lib.journal import open_journals
from tests.automem_json import graph_file
from tests.http_proxy import HttpProxy
from tests.operator_support import LARGE, NEW_SIZE, Operator, Servers
from tests.restore_support import wait_for
from tests.sandbox.automem_server import AutoMemServer
from tests.sandbox.falkordb_server import FalkorServer
from tests.sandbox.process import free_port
from tests.small_disk import fill, small_disk
from tests.vectors_support import REAL_SERVER, own_server

PASSWORD = "s3cr3t-that-nobody-sees"
NEWER = "00000000-0000-4000-8000-000000000001"
MIGRATE = {"VECTOR_SIZE": str(NEW_SIZE), "EMBEDDING_MODEL": LARGE}


@dataclass
class Night:
    """One situation: its operator, who has a backup of both stores, and what the placeholders of its row mean."""

    operator: Operator
    shared: Shared
    patch: pytest.MonkeyPatch
    named: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """A folder of this row alone."""
        return self.operator.folder

    def name(self, **values: object) -> None:
        """Give placeholders their values."""
        self.named |= {name: str(value) for name, value in values.items()}

    def fill(self, text: str) -> str:
        """The text with its placeholders replaced."""
        for name, value in self.named.items():
            text = text.replace(f"{{{name}}}", value)
        return text

    def manifest(self) -> Path:
        """The manifest of the one backup set."""
        return self.operator.manifests()[0]


class Shared:
    """What several rows use: the stores with their backup, and servers that refuse a login, started when needed."""

    def __init__(self, servers: Servers, make_folder: Callable[[str], Path]) -> None:
        self.servers, self.make_folder = servers, make_folder
        self._stack = ExitStack()
        self._made: dict[str, Any] = {}
        self.stocked = self.operator(60)
        self.stocked.run("backup_automem")

    def operator(self, count: int) -> Operator:
        """An operator with sample memories in both stores; they are removed at the end."""
        someone = Operator(self.servers, self.make_folder("operator"))
        self._stack.callback(someone.clean_up)
        someone.load(count)
        return someone

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def enter(self, manager: AbstractContextManager[Any]) -> Any:
        """Enter a context that is left at the end."""
        return self._stack.enter_context(manager)

    def close(self) -> None:
        """Stop the servers, remove the stores."""
        self._stack.close()


Setup = Callable[[Night], AbstractContextManager[None]]


def setup(function: Callable[..., Iterator[None] | None]) -> Callable[..., Any]:
    """Make a set-up of a function that prepares, or that prepares, yields and cleans up.

    Without further arguments it is a set-up itself; with some (`missing_file("x")`), it returns one.
    """

    @contextmanager
    def run(night: Night, *words: Any, **more: Any) -> Iterator[None]:
        made = function(night, *words, **more)
        if made is None:
            yield
        else:
            yield from made

    @wraps(function)
    def either(*words: Any, **more: Any) -> Any:
        if words and isinstance(words[0], Night):
            return run(*words, **more)
        return lambda night: run(night, *words, **more)

    return either


@setup
def nothing(_night: Night) -> None:
    """Both stores run and have a backup."""


# --- settings -----------------------------------------------------------------------------------------------------


@setup
def env_file(night: Night, text: str) -> None:
    """A `.env` in the working directory."""
    path = night.folder / ".env"
    path.write_text(night.fill(text))
    night.name(env=path)


@setup
def broken_link(night: Night) -> None:
    """A `.env` that links to nothing."""
    (night.folder / ".env").symlink_to("../automem/.env")
    night.name(env=night.folder / ".env")


@setup
def automems_file(night: Night, text: str) -> None:
    """AutoMem's own `.env`, linked as the guide does it."""
    file = night.folder / "automem.env"
    file.write_text(text)
    (night.folder / ".env").symlink_to(file)
    night.name(env=night.folder / ".env")


# --- the servers --------------------------------------------------------------------------------------------------


@setup
def falkordb_down(night: Night) -> None:
    """Nothing listens at FalkorDB's address."""
    port = free_port()
    night.operator.export(FALKORDB_PORT=port)
    night.name(falkordb=f"127.0.0.1:{port}")


@setup
def qdrant_down(night: Night) -> None:
    """Nothing listens at Qdrant's address."""
    _no_retries(night)
    url = f"http://127.0.0.1:{free_port()}"
    night.operator.export(QDRANT_URL=url.replace("//", f"//me:{PASSWORD}@"))
    night.name(qdrant=url)


@setup
def https(night: Night) -> None:
    """QDRANT_URL begins with https, and Qdrant has no certificate."""
    _no_retries(night)
    url = night.operator.servers.qdrant_url.replace("http:", "https:")
    night.operator.export(QDRANT_URL=url)
    night.name(https=url)


def _no_retries(night: Night) -> None:
    night.patch.setattr("lib.clients.qdrant.transport.PAUSES_SECONDS", ())


@setup
def locked_falkordb(night: Night) -> None:
    """A FalkorDB with another password."""

    def start() -> FalkorServer:
        server = FalkorServer(night.shared.make_folder("locked"), password="the-right-one")
        server.start()
        night.shared.enter(_stopping(server))
        return server

    port = night.shared.once("falkordb", start).port
    night.operator.export(FALKORDB_PORT=port)
    night.name(falkordb=f"127.0.0.1:{port}")


@contextmanager
def _stopping(server: FalkorServer) -> Iterator[None]:
    yield
    server.stop()


@setup
def locked_qdrant(night: Night) -> None:
    """A Qdrant with another API key."""

    def start() -> str:
        folder = night.shared.make_folder("locked_qdrant")
        version = "real" if REAL_SERVER else "1.18.3"
        return str(night.shared.enter(own_server(version, folder, api_key="the-right-one")).base_url)

    url = night.shared.once("qdrant", start)
    night.operator.export(QDRANT_URL=url)
    night.name(qdrant=url)


class Answering(HttpProxy):
    """Some other program behind a port: answers every request with the same status and body."""

    def __init__(self, status: int, body: bytes = b"") -> None:
        super().__init__("127.0.0.1", 1)
        self.status, self.body = status, body

    def open(self) -> None:
        """Nothing to connect to."""

    def answer(self, request: Any, body: Any) -> None:
        """Answer."""
        request.reply(self.status, [("Content-Type", "text/plain")], self.body)


@setup
def web_server(night: Night, variable: str, status: int = 200) -> Iterator[None]:
    """Some other program at the address that this setting names."""
    with Answering(status, b"<html>a web site") as server:
        port = server.url.rpartition(":")[2]
        night.operator.export(**{variable: port if variable.endswith("PORT") else server.url})
        night.name(web=server.url, web_host=server.url.partition("//")[2])
        night.name(server=f"{BaseHTTPRequestHandler.server_version} {BaseHTTPRequestHandler.sys_version}")
        yield


@setup
def half_granted(night: Night) -> Iterator[None]:
    """A user of FalkorDB who may not rename."""
    user = "messages_user"
    with connect(night.operator.servers.falkordb.address) as conn:
        conn.execute_command("ACL", "SETUSER", user, "reset", "on", f">{PASSWORD}", "&*", "~*", "+@all", "-rename")
        try:
            night.operator.export(FALKORDB_USERNAME=user, FALKORDB_PASSWORD=PASSWORD)
            yield
        finally:
            conn.execute_command("ACL", "DELUSER", user)


# --- the stores ---------------------------------------------------------------------------------------------------


@setup
def empty_graph(night: Night) -> Iterator[None]:
    """A graph without a memory."""
    name = f"{night.operator.graph}_empty"
    with connect(night.operator.servers.falkordb.address) as conn:
        conn.execute_command("GRAPH.QUERY", name, "CREATE (:Entity {name: 'x'})")
        night.operator.export(FALKORDB_GRAPH=name)
        try:
            yield
        finally:
            conn.execute_command("GRAPH.DELETE", name)


@setup
def key_in_the_way(night: Night) -> Iterator[None]:
    """Somebody deleted the graph and has a key under its name."""
    name = night.operator.graph
    with connect(night.operator.servers.falkordb.address) as conn:
        conn.rename(name, f"{name}_moved")
        conn.set(name, "somebody's own")
        try:
            yield
        finally:
            conn.delete(name)
            conn.rename(f"{name}_moved", name)


@setup
def collection(night: Night, vectors: Any, ending: str = "_other") -> Iterator[None]:
    """Another collection, by the settings of its vectors; QDRANT_COLLECTION names it unless it is the staged one's."""
    name = night.operator.collection + ending
    night.operator.qdrant.json("PUT", f"/collections/{name}", {"vectors": vectors})
    if ending != "__next":
        night.operator.export(QDRANT_COLLECTION=name)
    try:
        yield
    finally:
        night.operator.qdrant.json("DELETE", f"/collections/{name}")


@setup
def alias(night: Night) -> Iterator[None]:
    """QDRANT_COLLECTION is an alias."""
    name = f"{night.operator.collection}_alias"

    def change(action: dict[str, Any]) -> None:
        night.operator.qdrant.json("POST", "/collections/aliases", {"actions": [action]})

    change({"create_alias": {"collection_name": night.operator.collection, "alias_name": name}})
    night.operator.export(QDRANT_COLLECTION=name)
    try:
        yield
    finally:
        change({"delete_alias": {"alias_name": name}})


@setup
def lacks_index(night: Night) -> Iterator[None]:
    """A collection without the index on tags."""
    night.operator.call("DELETE", "/index/tags?wait=true")
    try:
        yield
    finally:
        night.operator.call("PUT", "/index?wait=true", {"field_name": "tags", "field_schema": "keyword"})


# --- files --------------------------------------------------------------------------------------------------------


@setup
def file(night: Night, name: str, content: str = "") -> None:
    """A file that is no backup."""
    path = night.folder / name
    path.write_text(content)
    night.name(file=path)


@setup
def a_folder(night: Night) -> None:
    """A folder where a file is expected."""
    (night.folder / "copies").mkdir()
    night.name(file=night.folder / "copies")


@setup
def foreign_tar(night: Night) -> None:
    """A tar.gz of another program."""
    path = night.folder / "photos.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(night.manifest(), "notes.txt")
    night.name(file=path)


@setup
def damaged(night: Night, kind: str) -> None:
    """One byte in the middle of a file of the set is another one."""
    path = Path(night.operator.rdb() if kind == "rdb" else night.operator.archive())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    night.name(file=path)


@setup
def cut(night: Night, kind: str) -> None:
    """A copy of a file that stopped half way, without its manifest."""
    source = Path(night.operator.rdb() if kind == "rdb" else night.operator.archive())
    path = night.folder / source.name
    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    night.name(file=path)


@setup
def gone(night: Night) -> None:
    """A set whose RDB is missing."""
    path = Path(night.operator.rdb())
    path.unlink()
    night.name(file=path)


@setup
def edited(night: Night, **changes: Any) -> None:
    """A manifest that somebody edited by hand."""
    path = night.manifest()
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    night.name(manifest=path)


@setup
def of_time(night: Night, hours: float) -> None:
    """The set was taken so many hours from now."""
    moment = datetime.now(timezone.utc) + timedelta(hours=hours)
    path = night.manifest()
    document = json.loads(path.read_text()) | {"created": moment.isoformat()}
    path.write_text(json.dumps(sealed(document)))
    night.name(manifest=path, created=moment.isoformat())


@setup
def no_backup(night: Night) -> None:
    """The backup folder is empty."""
    shutil.rmtree(night.operator.backups)
    night.operator.backups.mkdir(mode=0o700)


@setup
def one_store(night: Night) -> None:
    """The only set has no graph."""
    no_backup(night).__enter__()
    night.operator.run("backup_automem", "--only", "qdrant")
    night.name(stamp=night.manifest().stem.removeprefix("backup_"), manifest=night.manifest())


@setup
def cut_automem_backup(night: Night) -> None:
    """A backup by AutoMem's own script that lost rows: a relationship leads to a node that is not in it."""
    path = night.folder / "falkordb_20261127_000000.json.gz"
    with graph_file(path, night.operator.graph, "2026-11-27T00:00:00+00:00") as written:
        written.array("nodes")
        written.add({"id": 1, "labels": ["Memory"], "properties": {"id": "a", "content": "x"}})
        written.array("relationships")
        written.add({"source_id": 1, "type": "RELATES_TO", "target_id": 2, "properties": {}})
    night.name(file=path)


# --- locks, folders, disks ----------------------------------------------------------------------------------------


@setup
def locked(night: Night, target: int, kind: str = "") -> Iterator[None]:
    """Another run holds the lock of the graph (0) or the collection (1)."""
    targets = load_config(night.operator.environ).targets()
    holder = "reembed_embeddings.py, process 4711 on db1, since 2026-11-27 01:12:13 UTC"
    night.name(target=targets[target], holder=holder)
    with lock_targets([targets[target]], kind=kind, holder=holder):
        yield


@setup
def open_to_all(night: Night) -> None:
    """Everybody may write into the backup folder."""
    night.operator.backups.chmod(0o777)


@setup
def full_disk(night: Night) -> Iterator[None]:
    """The disk of the backup folder is full."""
    with small_disk(night.folder / "disk", "1m") as disk:
        disk.chmod(0o700)
        fill(disk / "other data")
        night.operator.export(AUTOMEM_BACKUP_DIR=disk)
        night.name(folder=disk)
        yield


# --- runs ---------------------------------------------------------------------------------------------------------


@setup
def interrupted(night: Night) -> Iterator[None]:
    """Ctrl-C when the first request waits for its answer."""
    openai = night.operator.servers.openai
    openai.reset()
    openai.fault(hang_seconds=300)
    ended = threading.Event()

    def press() -> None:
        wait_for(lambda: ended.is_set() or openai.stats()["requests"], 60, 0.02)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            openai.clear_faults()

    thread = threading.Thread(target=press)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        openai.clear_faults()


@setup
def unfinished(night: Night, *, deleted: bool = False) -> None:
    """A re-embed stopped before its cutover, or, `deleted`, after it deleted the collection."""

    def make() -> Operator:
        someone = night.shared.operator(20)
        someone.run("backup_automem")
        someone.run("reembed_embeddings", "--no-switch", env=MIGRATE)
        if deleted:
            (journal,) = open_journals(someone.backups)
            journal.append(DELETING, undo="  the commands of the undo", settings=someone.info())
            someone.call("DELETE", "")
        return someone

    someone, operator = night.shared.once(f"unfinished {deleted}", make), night.operator
    operator.graph, operator.collection = someone.graph, someone.collection
    shutil.rmtree(operator.backups)
    shutil.copytree(someone.backups, operator.backups)
    (journal,) = open_journals(operator.backups)
    night.name(graph=operator.graph, collection=operator.collection, run=journal.run_id, journal=journal.path.name)


@setup
def another_writer(night: Night) -> Iterator[None]:
    """Another program writes a point into the collection that is being staged."""
    from lib.reembed import staging

    verify, staged = staging.verify_points, f"{night.operator.collection}__next"
    qdrant, point = night.operator.qdrant, {"id": 7, "vector": [1.0] + [0.0] * (NEW_SIZE - 1)}

    def write_first(*words: Any, **more: Any) -> int:
        qdrant.json("PUT", f"/collections/{staged}/points", {"points": [point]}, params={"wait": "true"})
        return verify(*words, **more)

    night.patch.setattr(staging, "verify_points", write_first)
    try:
        yield
    finally:
        qdrant.json("DELETE", f"/collections/{staged}")


@setup
def changed_memory(night: Night) -> Iterator[None]:
    """A memory is newer than the backup."""
    night.operator.cypher("CREATE (:Memory {id: $id, content: 'newer'})", id=NEWER)
    try:
        yield
    finally:
        night.operator.cypher("MATCH (m:Memory {id: $id}) DELETE m", id=NEWER)


# --- the provider -------------------------------------------------------------------------------------------------


@setup
def fault(night: Night, **settings: Any) -> Iterator[None]:
    """The embeddings endpoint fails in this way; its client gives up at once."""
    _impatient(night)
    night.operator.servers.openai.fault(**settings)
    try:
        yield
    finally:
        night.operator.servers.openai.clear_faults()


def _impatient(night: Night) -> None:
    for name, seconds in (("FIRST_PAUSE_SECONDS", 0.01), ("FIRST_CONTACT_SECONDS", 0.1)):
        night.patch.setattr(f"lib.clients.embeddings.client.{name}", seconds)


@setup
def endpoint_down(night: Night, variable: str) -> None:
    """Nothing listens at the provider's address."""
    _impatient(night)
    url = f"http://127.0.0.1:{free_port()}"
    night.operator.export(**{variable: url})
    night.name(endpoint=url, endpoint_host=url.partition("//")[2])


@setup
def has_package(_night: Night, name: str) -> None:
    """A Python package is installed."""
    pytest.importorskip(name)


@setup
def lacks_package(night: Night, name: str) -> None:
    """A Python package is not installed."""
    for module in [one for one in sys.modules if one.partition(".")[0] == name]:
        night.patch.delitem(sys.modules, module)
    night.patch.setitem(sys.modules, name, None)


# --- AutoMem ------------------------------------------------------------------------------------------------------


@setup
def automem_runs(night: Night) -> Iterator[None]:
    """AutoMem answers."""
    environ = {**night.shared.stocked.environ, "AUTOMEM_API_TOKEN": PASSWORD}
    url = night.shared.once("automem", lambda: night.shared.enter(AutoMemServer(env=environ)).url)
    night.operator.export(AUTOMEM_API_URL=url)
    night.name(automem=url)
    yield


# --- copies elsewhere ---------------------------------------------------------------------------------------------


@setup
def occupied(night: Night) -> None:
    """The place of the copies holds another file under the name of the set's manifest."""
    place = night.folder / "copies"
    place.mkdir()
    (place / night.manifest().name).write_text("{}")
    night.name(place=place)


@setup
def sftp_down(night: Night) -> None:
    """Nothing listens at the place of the copies."""
    (night.folder / ".ssh").mkdir()
    port = free_port()
    night.name(place=f"sftp://me@127.0.0.1:{port}/copies", port=port)


@setup
def passphrase(night: Night, mode: int) -> None:
    """The file of a passphrase with this mode."""
    path = night.folder / "passphrase"
    path.write_text(PASSWORD)
    path.chmod(mode)
    night.operator.export(AUTOMEM_BACKUP_PASSPHRASE_FILE=path)
    night.name(file=path)
