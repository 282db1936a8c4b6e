"""Backups, unfinished runs and embedding caches of the version before the library was restructured are still read.

The files are described in tests/data/before_restructuring/README.md.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
import pytest
import requests

from lib.clients.falkordb.connection import connect
from lib.clients.qdrant.snapshots import restorable
from lib.files import lock_targets
from tests.http_proxy import HttpProxy, Request
from tests.matrix import matrix
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, SMALL, Operator
from tests.real_qdrant import test_server
from tests.reembed_support import Points, assert_migrated, embeddable, points_of, upgrade

DATA = Path(__file__).parents[1] / "data" / "before_restructuring"
QDRANT, EMBEDDINGS = "http://qdrant.invalid:6333", "http://embeddings.invalid/v1"
NAME, STAGED = "memories", "memories__next"
CACHED_WHEN_KILLED = 6  # two answers of three texts were stored before the run was killed
CACHED_BY_SPOT_CHECK = 6  # --limit 6
DELETED_NOTHING = ["reembed_no_switch", "reembed_staging", "reembed_delete_announced"]
DELETED = ["reembed_deleted", "reembed_placing", "in_place_deleted", "in_place_filling"]
STAGED_RESTORED = ["reembed_placed", "reembed_verified"]
TRIALS = ["restore_trial_graph", "restore_rehearsed"]
RESTORES = [*TRIALS, "restore_deleted", "restore_between", "restore_switched", "restore_graph_switched"]


class ByName(HttpProxy):
    """Leads the two host names of the recording to the servers of this test.

    The embedding cache, the journals and the archives contain these names.
    """

    def __init__(self, qdrant_url: str, embeddings_url: str) -> None:
        super().__init__("", 0)
        urls = {QDRANT: qdrant_url, EMBEDDINGS: embeddings_url}
        self.asked: list[str] = []
        self.servers = {urlsplit(name).hostname: urlsplit(url) for name, url in urls.items()}

    def open(self) -> None:
        """Pass every request."""

    def answer(self, request: Request, body: bytes) -> None:
        parts = urlsplit(request.path)
        server = self.servers[parts.hostname]
        request.path = parts._replace(scheme="", netloc="").geturl()
        self.asked.append(request.path)
        request.proxy = SimpleNamespace(target=(server.hostname, server.port), answer=self.answer)
        request.reply(*request.forward(body))


@functools.cache
def recorded() -> dict[str, Any]:
    """What was in the stores: `graphs`, `points`, and which of them at each of the `moments`."""
    return json.loads((DATA / "stores.json").read_text())


@pytest.fixture
def by_name(session_servers) -> Iterator[ByName]:
    with ByName(session_servers.qdrant_url, session_servers.openai.base_url) as proxy:
        yield proxy


@pytest.fixture
def operator(session_servers, by_name, tmp_path, monkeypatch) -> Iterator[Operator]:
    """An operator with the names of the recording, and with empty stores.

    The machine-wide lock is in a folder of the test: another test suite has the same name for its Qdrant.
    """
    own_lock = functools.partial(lock_targets, folder=tmp_path / "locks")
    monkeypatch.setattr("lib.connect.lock_targets", own_lock)
    # The recorded host name leads to this machine (see ByName): its sizes are those of a text-embedding-3 model.
    monkeypatch.setattr("lib.dimensions.is_this_machine", lambda url: url == EMBEDDINGS)
    someone = Operator(session_servers, tmp_path, NAME, NAME)
    someone.export(QDRANT_URL=QDRANT, OPENAI_BASE_URL=EMBEDDINGS, HTTP_PROXY=by_name.url)
    session_servers.openai.clear_faults()
    session_servers.openai.reset()
    yield someone
    someone.clean_up()


def load(operator: Operator, case: str, *, hours: float = 0.0, cache_only: bool = False) -> None:
    """Load the stores and the backup folder as they were when the run of `case` ended, which is now or `hours` ago.

    `cache_only`: the stores as before that run, and of its files the embedding cache alone.
    """
    snapshots = fill_stores(operator, "backup" if cache_only else case)
    shutil.copytree(DATA / "backup", operator.backups)
    cache = "embeddings" if cache_only else ""
    shutil.copytree(DATA / case / cache, operator.backups / cache, dirs_exist_ok=True)
    for packed in operator.backups.glob("embeddings/*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    words = {
        recorded()["falkordb"]: falkordb_of(operator),
        recorded()["backups"]: str(operator.backups),
        **snapshots,
    }
    recorded_at = datetime.fromisoformat(recorded()["moments"][case]["at"])
    later = datetime.now(timezone.utc) - timedelta(hours=hours) - recorded_at
    for path in operator.backups.glob("journal_*"):
        path.write_text(adapted(path.read_text(), words, later))
    for path in operator.manifests():
        path.write_bytes(sealed(json.loads(adapted(path.read_text(), words, later))))
    rename_plan(operator)


def falkordb_of(operator: Operator) -> str:
    return f"127.0.0.1:{operator.servers.falkordb.port}"


def adapted(text: str, words: dict[str, str], later: timedelta) -> str:
    """The text with this test's addresses and folder, all its times moved."""
    for old, new in words.items():
        text = text.replace(old, new)

    def moved(found: re.Match[str]) -> str:
        return f"{found[1]}{(datetime.fromisoformat(found[2]) + later).isoformat()}"

    return re.sub(r'("(?:at|created|server_time)": ")([^"]+)', moved, text)


def sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest as a file, with the checksum of its changed content."""
    del manifest["checksum"]
    checksum = hashlib.sha256(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return orjson.dumps({**manifest, "checksum": checksum}, option=orjson.OPT_INDENT_2)


def rename_plan(operator: Operator) -> None:
    """Name the plan by the addresses of this test: `<collection>-<hash of both targets>.sqlite3`."""
    targets = f"falkordb {falkordb_of(operator)} {NAME}\nqdrant {urlsplit(QDRANT).netloc} {NAME}"
    mark = hashlib.sha256(targets.encode()).hexdigest()[:8]
    for path in operator.backups.glob(f"embeddings/{NAME}-*"):
        path.rename(path.with_name(re.sub(rf"{NAME}-[0-9a-f]{{8}}", f"{NAME}-{mark}", path.name)))


def fill_stores(operator: Operator, case: str) -> dict[str, str]:
    """Load graphs and collections; returns the new name of each snapshot that the server is to hold."""
    moment = recorded()["moments"][case]
    with connect(operator.servers.falkordb.address) as conn:
        for name, known in moment["graphs"].items():
            conn.restore(name, 0, base64.b64decode(recorded()["graphs"][known]["dump"]))
    snapshots: dict[str, str] = {}
    for name, made in moment["collections"].items():
        snapshots |= fill_collection(operator, name, made)
    return snapshots


def fill_collection(operator: Operator, name: str, made: dict[str, Any]) -> dict[str, str]:
    """Make one collection; returns the new names of its snapshots by the old ones."""

    def call(method: str, path: str, body: object = None) -> Any:
        url = f"{operator.servers.qdrant_url}/collections{path}"
        answer = requests.request(method, url, json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()["result"]

    config = made["config"]
    settings = {"optimizers_config": config["optimizer_config"], "metadata": config.get("metadata")}
    settings |= {key: config[key] for key in ("hnsw_config", "wal_config", "quantization_config")}
    call("PUT", f"/{name}", {**config["params"], **settings})
    for field, schema in made["payload_schema"].items():
        call("PUT", f"/{name}/index?wait=true", {"field_name": field, "field_schema": schema["data_type"]})
    call("PUT", f"/{name}/points?wait=true", {"points": recorded()["points"][made["points"]]})
    for alias in made["aliases"]:
        action = {"create_alias": {"collection_name": name, "alias_name": alias}}
        call("POST", "/aliases", {"actions": [action]})
    return {old: call("POST", f"/{name}/snapshots?wait=true")["name"] for old in made["snapshots"]}


def points_in(case: str, name: str = NAME) -> Points:
    """Id to payload and vector, as recorded."""
    rows = recorded()["points"][recorded()["moments"][case]["collections"][name]["points"]]
    return {one["id"]: (one["payload"], np.array(one["vector"], np.float32)) for one in rows}


def assert_state(operator: Operator, case: str) -> None:
    """Both stores hold what they held at this moment, and nothing else exists."""
    moment = recorded()["moments"][case]
    assert operator.state().graph == recorded()["graphs"][moment["graphs"][NAME]]["digest"]
    assert_points(operator, case)
    assert aliases_of(operator) == [f"{NAME}_reader"]
    assert_tidy(operator)


def aliases_of(operator: Operator) -> list[str]:
    return sorted(one["alias_name"] for one in operator.call("GET", "/aliases")["aliases"])


def assert_points(operator: Operator, case: str) -> None:
    """The collection has exactly these points, with these payloads and vectors."""
    found, wanted = points_of(operator), points_in(case)
    assert found.keys() == wanted.keys()
    for one, (payload, vector) in wanted.items():
        assert found[one][0] == payload
        assert np.array_equal(found[one][1], vector)


def assert_tidy(operator: Operator) -> None:
    """No temporary graph, collection, snapshot or partial file, and no open journal."""
    assert operator.graphs() == [NAME]
    assert operator.collections() == [NAME]
    assert operator.call("GET", "/snapshots") == []
    assert not list(operator.backups.rglob("*.partial"))
    assert {last(path)["phase"] for path in operator.backups.glob("journal_*")} <= {"closed"}


def first(journal: Path) -> dict[str, Any]:
    """The first entry of a journal."""
    return json.loads(journal.read_text().splitlines()[0])


def last(journal: Path) -> dict[str, Any]:
    """The last entry of a journal."""
    return json.loads(journal.read_text().splitlines()[-1])


def words_of(case: str) -> list[str]:
    """The arguments of the re-embedding that was killed."""
    return ["--in-place"] if case.startswith("in_place") else []


def journals(operator: Operator, command: str) -> list[Path]:
    return sorted(operator.backups.glob(f"journal_*_{command}.jsonl"))


def paid(operator: Operator) -> int:
    """Texts that the provider was asked to embed since the test began."""
    return int(operator.servers.openai.stats()["texts"])


def distinct_texts(operator: Operator) -> int:
    return len({node["content"] for node in embeddable(operator).values()})


def assert_reembedded(operator: Operator) -> None:
    """Every memory has its new vector, and one journal records it."""
    assert_migrated(operator, points_in("backup"))
    assert aliases_of(operator) == [f"{NAME}_reader"]
    assert_tidy(operator)
    assert [last(path)["outcome"] for path in journals(operator, "reembed")] == ["done"]


def require_restorable(operator: Operator) -> None:
    """Skip if the server refuses the recorded snapshots, which are of 1.18.3, as it should."""
    version = requests.get(operator.servers.qdrant_url, timeout=30).json()["version"]
    if reason := restorable("1.18.3", version):
        pytest.skip(reason)


@pytest.mark.parametrize("folder", matrix(["backup", "backup_by_dump"], "backup"))
def test_a_backup_is_restored_unchanged(operator, folder):
    require_restorable(operator)
    shutil.copytree(DATA / folder, operator.backups)
    fill_stores(operator, "reembed_finished")
    operator.cypher("MATCH (m:Memory) WHERE id(m) % 3 = 0 DETACH DELETE m")
    operator.run("restore_from_backup", operator.manifests()[0])
    assert_state(operator, "backup")


@pytest.mark.matrix
@pytest.mark.parametrize("folder", ["backup", "backup_by_dump"])
def test_a_backup_passes_its_check(operator, folder):
    shutil.copytree(DATA / folder, operator.backups)
    fill_stores(operator, "backup")
    operator.run("backup_automem", "--check", operator.manifests()[0])


@pytest.mark.parametrize("case", matrix([*DELETED_NOTHING, *DELETED, *STAGED_RESTORED], "reembed_deleted"))
def test_an_unfinished_reembedding_resumes_and_pays_nothing(operator, by_name, case):
    load(operator, case)
    upgrade(operator)
    operator.run("reembed_embeddings", *words_of(case))
    assert_reembedded(operator)
    assert operator.servers.openai.stats()["requests"] == 0
    # The cutover to the staged collection. A real server does not know the recorded host names, so it gets an upload.
    if case in {"reembed_deleted", "reembed_placing"} and test_server() is None:
        assert any(path.startswith(f"/collections/{NAME}/snapshots/recover") for path in by_name.asked)


@pytest.mark.parametrize("case", ["reembed_deleted", "reembed_staging"])
def test_settings_that_are_refused_now_do_not_stop_a_run_that_has_deleted_the_collection(operator, monkeypatch, case):
    """A gateway at a shortened size: AutoMem would not use these vectors. But half a cutover is worse."""
    monkeypatch.setattr("lib.dimensions.is_this_machine", lambda _url: False)
    load(operator, case)
    upgrade(operator)
    deleted = case in DELETED
    result = operator.run("reembed_embeddings", *words_of(case), expect=0 if deleted else 2)
    assert "AutoMem sends no `dimensions` to embeddings.invalid (OPENAI_BASE_URL)" in result.err
    if deleted:
        assert_reembedded(operator)


@pytest.mark.matrix
@pytest.mark.parametrize("case", ["reembed_deleted", "in_place_deleted"])
def test_points_that_automem_wrote_after_the_delete_are_no_obstacle_and_no_loss(operator, case):
    load(operator, case)
    upgrade(operator)
    special = next(one for one, (payload, _) in points_in("backup").items() if "source_app" in payload)
    operator.call("PUT", "", {"vectors": {"size": NEW_SIZE, "distance": "Cosine"}})
    point = {"id": special, "vector": [1.0] * NEW_SIZE, "payload": {"content": "its own"}}
    operator.call("PUT", "/points?wait=true", {"points": [point]})
    operator.run("reembed_embeddings", *words_of(case))
    assert_reembedded(operator)


@pytest.mark.matrix
def test_the_new_collection_has_the_settings_of_the_journal(operator):
    """They may be newer than those of the backup."""
    load(operator, "in_place_deleted")
    upgrade(operator)
    (journal,) = journals(operator, "reembed")
    journal.write_text(journal.read_text().replace('"ef_construct": 100', '"ef_construct": 120'))
    operator.run("reembed_embeddings", "--in-place")
    assert_reembedded(operator)
    assert operator.info()["config"]["hnsw_config"]["ef_construct"] == 120


@pytest.mark.matrix
def test_a_run_killed_while_embedding_pays_only_for_the_rest(operator):
    load(operator, "reembed_embedding")
    upgrade(operator)
    operator.run("reembed_embeddings")
    assert_reembedded(operator)
    assert paid(operator) == distinct_texts(operator) - CACHED_WHEN_KILLED


@pytest.mark.parametrize("case", matrix(["reembed_finished", "reembed_no_switch"], "reembed_finished"))
def test_the_cache_of_a_finished_run_makes_the_same_reembedding_free(operator, case):
    load(operator, case, cache_only=True)
    upgrade(operator)
    operator.run("reembed_embeddings")
    assert_reembedded(operator)
    assert operator.servers.openai.stats()["requests"] == 0


@pytest.mark.matrix
def test_a_smaller_size_is_cut_from_the_old_cache(operator):
    load(operator, "reembed_finished", cache_only=True)
    operator.export(VECTOR_SIZE=32, EMBEDDING_MODEL=LARGE)
    operator.run("reembed_embeddings")
    assert_migrated(operator, points_in("backup"), size=32)
    assert operator.servers.openai.stats()["requests"] == 0


@pytest.mark.matrix
@pytest.mark.parametrize("case", DELETED_NOTHING)
def test_an_unfinished_reembedding_is_aborted(operator, case):
    load(operator, case)
    upgrade(operator)
    done = operator.run("reembed_embeddings", "--abort", "--json").json
    assert done["removed"] == [f"collection {STAGED}"]
    assert_state(operator, "backup")
    operator.run("reembed_embeddings")
    assert_migrated(operator, points_in("backup"))
    assert operator.servers.openai.stats()["requests"] == 0


@pytest.mark.matrix
@pytest.mark.parametrize("case", DELETED)
def test_after_the_delete_abort_is_refused_and_the_undo_brings_the_old_state_back(operator, case):
    require_restorable(operator)
    load(operator, case)
    upgrade(operator)
    collections = operator.collections()
    refused = operator.run("reembed_embeddings", "--abort", expect=2).err.split("next:")[1]
    assert operator.collections() == collections
    commands = [line.split("/scripts/")[1].split() for line in refused.splitlines() if "/scripts/" in line]
    (resume, undo, _) = commands
    assert resume == ["reembed_embeddings.py", *words_of(case)]
    old = {"VECTOR_SIZE": str(OLD_SIZE), "EMBEDDING_MODEL": SMALL}
    operator.run(undo[0].removesuffix(".py"), *undo[1:], env=old)
    assert_points(operator, "backup")
    assert {last(path)["phase"] for path in operator.backups.glob("journal_*")} == {"closed"}


@pytest.mark.matrix
@pytest.mark.parametrize("case", STAGED_RESTORED)
def test_abort_after_the_cutover_keeps_the_new_collection(operator, case):
    load(operator, case)
    upgrade(operator)
    operator.run("reembed_embeddings", "--abort")
    assert_migrated(operator, points_in("backup"))
    assert_tidy(operator)


@pytest.mark.matrix
def test_a_finished_reembedding_is_verified_and_its_backup_protected(operator):
    load(operator, "reembed_finished")
    upgrade(operator)
    for _ in range(2):
        operator.run("backup_automem", "--only", "qdrant")
    cleaned = operator.run("backup_automem", "--cleanup", "--keep", "1", "--json").json
    named = first(journals(operator, "reembed")[0])["manifest"]
    assert (operator.backups / named).exists(), cleaned
    operator.run("verify_migration")
    assert "nothing to abort" in operator.run("reembed_embeddings", "--abort").out


@pytest.mark.matrix
def test_the_journal_names_the_model_if_the_server_keeps_no_metadata(operator):
    load(operator, "reembed_finished")
    made = recorded()["moments"]["reembed_finished"]["collections"][NAME]
    operator.call("DELETE", "")
    fill_collection(operator, NAME, {**made, "config": {**made["config"], "metadata": None}})
    operator.export(VECTOR_SIZE=NEW_SIZE)
    found = operator.run("backup_automem", "--only", "qdrant", "--json").json["collection"]
    assert (found["model"], found["model_known"]) == (LARGE, "stamped")


@pytest.mark.parametrize("case", matrix(RESTORES, "restore_deleted"))
def test_an_unfinished_restore_resumes(operator, by_name, case):
    require_restorable(operator)
    load(operator, case)
    (journal,) = journals(operator, "restore")
    done = operator.run("restore_from_backup", *first(journal)["files"])
    assert_state(operator, "backup")
    assert last(journal)["phase"] == "closed"
    for trial in set(recorded()["moments"][case]["collections"]) - {NAME}:
        assert not any(path.startswith(f"/collections/{trial}/snapshots/upload") for path in by_name.asked)
    safety = list((DATA / case).glob("backup_*.json"))
    assert all(str(operator.backups / path.name) in done.out for path in safety)
    for path in safety:
        operator.run("restore_from_backup", operator.backups / path.name)
        assert_points(operator, "restore_rehearsed")


@pytest.mark.matrix
def test_an_alias_that_only_the_deleted_collection_had_is_put_back(operator):
    require_restorable(operator)
    load(operator, "restore_deleted")
    (journal,) = journals(operator, "restore")
    aliases = [f"{NAME}_reader", f"{NAME}_writer"]
    journal.write_text(journal.read_text().replace(json.dumps(aliases[:1]), json.dumps(aliases)))
    operator.run("restore_from_backup", *first(journal)["files"])
    assert aliases_of(operator) == aliases


@pytest.mark.matrix
@pytest.mark.parametrize("case", [one for one in RESTORES if one != "restore_deleted"])
def test_an_unfinished_restore_is_aborted(operator, case):
    load(operator, case)
    left = operator.run("restore_from_backup", "--abort", "--json").json["left"]
    assert not [one for one in left if f"{NAME}_reader" in one]
    assert_state(operator, "backup" if "switched" in case else case)


@pytest.mark.matrix
def test_writes_to_the_old_graph_after_its_safety_backup_are_saved(operator):
    load(operator, "restore_switched")
    (old,) = set(operator.graphs()) - {NAME}
    with connect(operator.servers.falkordb.address) as conn:
        conn.execute_command("GRAPH.QUERY", old, "CREATE (:Memory {id: 'late'})")
    operator.run("restore_from_backup", "--abort")
    assert_state(operator, "backup")
    assert (operator.backups / "falkordb" / f"{old}.rdb").exists()


@pytest.mark.matrix
def test_writes_to_the_restored_graph_do_not_keep_the_old_one(operator):
    load(operator, "restore_graph_switched")
    operator.cypher("CREATE (:Memory {id: 'new'})")
    operator.run("restore_from_backup", "--abort")
    assert_tidy(operator)


@pytest.mark.matrix
def test_a_restore_that_deleted_the_collection_is_not_aborted(operator):
    load(operator, "restore_deleted")
    collections = operator.collections()
    operator.run("restore_from_backup", "--abort", expect=2)
    assert operator.collections() == collections


def test_a_killed_backup_is_cleaned_up_by_the_next(operator):
    load(operator, "backup_killed")
    (unfinished,) = (operator.backups / "falkordb" / path.name for path in DATA.glob("backup_killed/falkordb/*"))
    operator.run("backup_automem")
    assert not unfinished.exists()
    assert_state(operator, "backup")


@pytest.mark.matrix
def test_a_backup_whose_snapshot_never_appeared_is_closed(operator):
    load(operator, "backup_awaited", hours=2)
    operator.run("backup_automem")
    assert_state(operator, "backup")


@pytest.mark.parametrize("unknown", matrix([["snapshot"], ["snapshot", "server_time"]], ["snapshot"]))
def test_a_snapshot_that_an_even_older_version_had_announced_is_named(operator, unknown):
    """Their announcements had fewer facts."""
    load(operator, "backup_awaited")
    (journal,) = journals(operator, "backup")
    entries = [json.loads(line) for line in journal.read_text().splitlines()][:-1]
    entries[-1] = {name: value for name, value in entries[-1].items() if name not in unknown}
    journal.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    made = operator.call("POST", "/snapshots?wait=true")["name"]
    err = operator.run("backup_automem").err
    assert "a killed run may have left a snapshot" in err
    assert f"/snapshots/{made}" in err
    assert last(journal)["phase"] == "closed"


@pytest.mark.matrix
@pytest.mark.parametrize("words", ["--limit 6", "--abort", ""])
def test_a_killed_spot_check_is_cleaned_up(operator, words):
    load(operator, "spot_check")
    upgrade(operator)
    operator.run("reembed_embeddings", *words.split())
    assert_tidy(operator)
    assert not list(operator.backups.glob("embeddings/*-check-*"))
    assert paid(operator) == (0 if words else distinct_texts(operator) - CACHED_BY_SPOT_CHECK)
