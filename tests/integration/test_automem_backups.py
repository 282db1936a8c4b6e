"""Backups that AutoMem's own scripts wrote are restored as they are, and refused before anything is touched.

The damaged ones are in tests/faults/test_automem_backup_damage.py.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import automem_json
from tests.automem_json_support import (
    COLLECTION_FILE,
    DATA,
    GRAPH_FILE,
    KEPT_GRAPH,
    KEPT_POINTS,
    ODD_TYPES,
    TAR,
    assert_restored,
    automem_operator,
    changed,
    graph_in_store,
    graph_of,
    json_of,
    make_live,
    members_of,
    packed,
    points_in_store,
    points_of_rows,
    refused,
    saved,
    tar_with,
)
from tests.bench.peak import peak_mb
from tests.faulty_proxy import Fault, FaultyProxy, answer
from tests.matrix import matrix
from tests.operator_support import OLD_SIZE, Operator
from tests.restore_support import assert_tidy
from tests.sandbox.sample_memories import generate

pytestmark = pytest.mark.qdrant


@pytest.fixture
def live(session_servers, tmp_path) -> Iterator[Operator]:
    """An operator of the names in the files, whose stores hold something else."""
    with automem_operator(session_servers, tmp_path) as someone:
        make_live(someone)
        yield someone


# --- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["pair", "tar"])
def test_the_files_hold_what_the_stores_held(source):
    """AutoMem's output agrees with what was read from the stores without its code."""
    files = {"pair": [json_of(GRAPH_FILE), json_of(COLLECTION_FILE)]}
    files["tar"] = [json.loads(gzip.decompress(data)) for _, data in sorted(members_of(TAR).items())]
    graph, collection = files[source]
    assert graph_of(graph["nodes"], graph["relationships"]) == KEPT_GRAPH
    assert points_of_rows(collection["points"]) == KEPT_POINTS


def test_the_writer_of_large_files_writes_what_automem_writes(tmp_path):
    graph, collection = json_of(GRAPH_FILE), json_of(COLLECTION_FILE)
    paths = tmp_path / "graph.json.gz", tmp_path / "collection.json.gz"
    with automem_json.graph_file(paths[0], "memories", graph["timestamp"]) as file:
        for key in ("nodes", "relationships"):
            file.array(key)
            for row in graph[key]:
                file.add(row)
    with automem_json.collection_file(paths[1], "memories", OLD_SIZE, collection["timestamp"]) as file:
        for row in collection["points"]:
            file.add_point(row, np.asarray(row["vector"], dtype=np.float32))
    for written, kept in zip(paths, (GRAPH_FILE, COLLECTION_FILE), strict=True):
        assert gzip.decompress(written.read_bytes()) == gzip.decompress(kept.read_bytes())


# --- restored -----------------------------------------------------------------------------------------------------


KINDS = ["both files", "both files, the other order", "both files, not compressed", "a folder", "a tar.gz"]


def words_of(kind: str, folder: Path) -> list[Path]:
    """The FILE arguments; `folder` is for a copy."""
    if kind == "both files, not compressed":
        paths = (GRAPH_FILE, COLLECTION_FILE)
        return [saved(folder / path.stem, gzip.decompress(path.read_bytes())) for path in paths]
    words = {
        "both files": [GRAPH_FILE, COLLECTION_FILE],
        "both files, the other order": [COLLECTION_FILE, GRAPH_FILE],
        "a folder": [DATA],
        "a tar.gz": [TAR],
    }
    return words[kind]


@pytest.mark.parametrize("kind", matrix(KINDS, "both files", "a tar.gz"))
def test_it_restores_both_stores(live, tmp_path, kind):
    """`last_accessed` and relationships between nodes without an id included, which AutoMem's own restore changes."""
    words = words_of(kind, tmp_path / "copies")
    optimizers = live.info()["config"]["optimizer_config"]
    live.run("restore_from_backup", *words)
    assert_restored(live)
    assert live.info()["config"]["optimizer_config"] == optimizers  # the trial had no vector index
    assert_tidy(live)


def assert_only(live: Operator, store: str, graph, points) -> None:
    """This store is the file's, the other one is what it was."""
    if store == "graph":
        assert_restored(live, points=None)
        assert points_in_store(live) == points
    else:
        assert_restored(live, graph=None)
        assert graph_in_store(live) == graph
    assert_tidy(live)


@pytest.mark.parametrize("only", matrix(["graph", "collection"], "graph"))
def test_one_file_restores_one_store(live, only):
    before, graph, points = live.state(), graph_in_store(live), points_in_store(live)
    live.run("restore_from_backup", GRAPH_FILE if only == "graph" else COLLECTION_FILE)
    assert_only(live, only, graph, points)
    if only == "collection":
        assert live.state().graph == before.graph


@pytest.mark.matrix
@pytest.mark.parametrize("member", ["falkordb", "qdrant"])
def test_a_tar_with_one_member_restores_one_store(live, tmp_path, member):
    """As `GET /backup?include=` answers it."""
    graph, points = graph_in_store(live), points_in_store(live)
    live.run("restore_from_backup", tar_with(tmp_path, member))
    assert_only(live, "graph" if member == "falkordb" else "collection", graph, points)


@pytest.mark.matrix
def test_what_was_there_before_is_in_the_safety_backup(live):
    before = live.state()
    result = live.run("restore_from_backup", "--json", DATA)
    safety = live.backups / result.json["safety_backup"]
    live.run("restore_from_backup", safety)
    assert live.state() == before
    live.run("restore_from_backup", DATA)
    live.run("backup_automem")
    live.run("backup_automem", "--check", "latest")


@pytest.mark.matrix
def test_it_restores_into_empty_stores(live):
    live.clean_up()
    live.run("restore_from_backup", DATA)
    assert_restored(live)
    assert_tidy(live)


# --- what such a file cannot hold ---------------------------------------------------------------------------------

NEVER_HELD = ("index", "settings")  # definitions of indexes, settings of the collection


def test_what_the_files_cannot_hold_is_listed_before_and_after(live):
    before = live.run("restore_from_backup", DATA, "--dry-run")
    after = live.run("restore_from_backup", DATA)
    for text in (before.out + before.err, after.out + after.err):
        for word in NEVER_HELD:
            assert word in text, text


@pytest.mark.matrix
def test_values_that_json_does_not_have_come_back_as_the_file_has_them(live, tmp_path):
    """A vectorf32 as a list, dates and times as texts; points, infinity and NaN as they were."""
    odd = changed(ODD_TYPES, tmp_path, lambda data: data.update(graph_name="memories"))
    before = live.run("restore_from_backup", odd, "--dry-run")
    after = live.run("restore_from_backup", odd)
    for text in (before.out + before.err, after.out + after.err):
        for word in ("vectors", "dates"):
            assert word in text, text
    wanted = {one["properties"]["id"]: one["properties"] for one in json_of(ODD_TYPES)["nodes"]}
    found = dict(live.cypher("MATCH (n:Memory) RETURN n.id, properties(n)"))
    assert found["plain"] == wanted["plain"]
    assert math.isnan(found["odd"].pop("nan"))
    assert math.isnan(wanted["odd"].pop("nan"))
    assert found["odd"].pop("vector") == pytest.approx(wanted["odd"].pop("vector"), rel=1e-14)
    assert found["odd"] == wanted["odd"]
    distance = "MATCH (m {id: 'odd'}) RETURN distance(m.place, point({latitude: 1.5, longitude: -2.25}))"
    assert live.cypher(distance) == [[0]]
    assert live.cypher("MATCH ()-[r]->() RETURN properties(r)") == [[{"strength": 0.5, "at": "2020-01-01"}]]


# --- files of two moments -----------------------------------------------------------------------------------------


def test_a_rate_limit_below_a_page_of_points_is_kept_to(live):
    """As of a server whose strict mode, in its own configuration, limits the reads of every new collection."""
    text = '{"status": {"error": "Rate limiting exceeded: request larger than rate limiter capacity"}}'
    page = Fault(rb"^POST /collections/\S+__try_\w+/points ", answer=answer(429, text))
    with FaultyProxy(int(live.servers.qdrant_url.rpartition(":")[2]), page) as proxy:
        live.run("restore_from_backup", str(COLLECTION_FILE), env={"QDRANT_URL": f"http://127.0.0.1:{proxy.port}"})
    assert page.hits == 1
    assert_restored(live, graph=None)


def test_a_folder_with_files_of_two_moments_is_refused(live, tmp_path):
    folder = tmp_path / "copies"
    saved(folder / "falkordb" / "falkordb_20261126_185327.json.gz", GRAPH_FILE.read_bytes())
    saved(folder / "qdrant" / COLLECTION_FILE.name, COLLECTION_FILE.read_bytes())
    err = refused(live, folder)
    assert "20261126_185327" in err
    assert "20261127_185327" in err


@pytest.mark.matrix
def test_files_of_two_moments_are_restored_if_both_are_named(live, tmp_path):
    other = saved(tmp_path / "falkordb_20261126_185327.json.gz", GRAPH_FILE.read_bytes())
    live.run("restore_from_backup", other, COLLECTION_FILE)
    assert_restored(live)


@pytest.mark.matrix
def test_a_folder_gives_the_newest_pair(live, tmp_path):
    folder = tmp_path / "copies"
    shutil.copytree(DATA / "falkordb", folder / "falkordb")
    shutil.copytree(DATA / "qdrant", folder / "qdrant")
    for path, key in ((GRAPH_FILE, "nodes"), (COLLECTION_FILE, "points")):
        data = json_of(path)
        data["timestamp"] = "20261001_000000"
        del data[key][1:], data.setdefault("relationships", [])[:]
        count = {"nodes": "node_count", "points": "points_count"}[key]
        data["stats"][count] = 1
        data["stats"]["relationship_count"] = 0
        name = path.name.replace("20261127_185327", "20261001_000000")
        saved(folder / path.parent.name / name, packed(data))
    live.run("restore_from_backup", folder)
    assert_restored(live)


# --- looked at ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", matrix(KINDS, "a tar.gz"))
def test_a_dry_run_says_what_it_would_do_and_touches_nothing(live, tmp_path, kind):
    before = live.state()
    words = words_of(kind, tmp_path / "copies")
    shown = live.run("restore_from_backup", *words, "--dry-run")
    assert "62" in shown.out
    assert "79" in shown.out
    assert "27" in shown.out
    document = live.run("restore_from_backup", *words, "--dry-run", "--json").json
    assert (document["graph"]["nodes"], document["graph"]["relationships"]) == (62, 79)
    assert document["collection"]["points"] == 27
    assert live.state() == before
    assert_tidy(live)


@pytest.mark.matrix
def test_the_result_is_one_json_document(live):
    document = live.run("restore_from_backup", DATA, "--json").json
    assert document["collection"]["points"] == 27
    assert document["graph"]["digest"]
    assert_restored(live)


@pytest.mark.parametrize("path", matrix([GRAPH_FILE, COLLECTION_FILE, TAR, ODD_TYPES], TAR), ids=lambda one: one.name)
def test_check_verifies_a_file_without_the_stores(live, path):
    live.export(FALKORDB_PORT=1, QDRANT_URL="http://127.0.0.1:1")
    shown = live.run("backup_automem", "--check", path)
    assert path.name in shown.out
    document = live.run("backup_automem", "--check", path, "--json").json
    assert path.name in json.dumps(document)
    assert "damaged" not in json.dumps(document)


def test_list_shows_them_and_does_not_count_them_as_sets(live):
    """They lie where these scripts put their own files if both share a backup folder."""
    for path in (GRAPH_FILE, COLLECTION_FILE):
        saved(live.backups / path.parent.name / path.name, path.read_bytes())
    live.run("backup_automem")
    shown = live.run("backup_automem", "--list").out
    assert GRAPH_FILE.name in shown
    assert COLLECTION_FILE.name in shown
    document = json.dumps(live.run("backup_automem", "--list", "--json").json)
    assert GRAPH_FILE.name in document
    live.run("backup_automem", "--cleanup", "--keep", "1")
    assert (live.backups / "falkordb" / GRAPH_FILE.name).read_bytes() == GRAPH_FILE.read_bytes()
    assert (live.backups / "qdrant" / COLLECTION_FILE.name).read_bytes() == COLLECTION_FILE.read_bytes()
    assert len(live.manifests()) == 1


# --- guarded ------------------------------------------------------------------------------------------------------


def test_a_running_automem_is_refused(live):
    with live.restarted():
        err = refused(live, DATA, code=2)
        assert "AutoMem" in err
        assert "docker compose stop flask-api" in err
        live.run("restore_from_backup", DATA, "--dry-run")


SECRETS = {"OPENAI_API_KEY": "sk-k3y-of-openai", "AUTOMEM_API_TOKEN": "t0ken-of-automem"}


@pytest.mark.matrix
def test_no_secret_is_shown_or_written(live):
    address = live.servers.qdrant_url.replace("//", "//me:l0gin-of-a-proxy@")
    live.export(QDRANT_URL=address, QDRANT_API_KEY="k3y-of-qdrant", **SECRETS)
    revealed = ""
    for words in (["--dry-run"], ["-v"], ["--json"]):
        result = live.run("restore_from_backup", DATA, *words)
        revealed += result.out + result.err
    assert_restored(live)
    written = b"".join(path.read_bytes() for path in live.backups.rglob("*") if path.is_file())
    for secret in ("l0gin-of-a-proxy", "k3y-of-qdrant", *SECRETS.values()):
        assert secret not in revealed
        assert secret.encode() not in written


# --- large --------------------------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_more_nodes_than_a_result_of_the_server_has_rows(live, tmp_path):
    count = 10_000
    automem_json.write_samples(tmp_path / "large", "memories", "memories", count, OLD_SIZE)
    live.run("restore_from_backup", tmp_path / "large")
    memories = list(generate(count))
    links = [row for one in memories for row in automem_json.relationship_rows(one)]
    graph = graph_of(map(automem_json.node_row, memories), links)
    assert sum(graph[0].values()) > 10_000
    assert_restored(live, graph=graph, points=points_of_rows(automem_json.sample_points(count, OLD_SIZE)))
    assert_tidy(live)


@pytest.mark.matrix
def test_memory_is_flat_over_ten_times_the_points(live, tmp_path):
    peaks = []
    for count in (10_000, 100_000):
        folder = tmp_path / str(count)
        _, points = automem_json.write_samples(folder, "memories", "memories", count, OLD_SIZE)
        live.run("restore_from_backup", COLLECTION_FILE)  # the safety backup is of the same size both times
        peaks.append(peak_mb("restore_from_backup", "-q", str(points), env=live.environ, folder=live.folder))
        assert live.call("POST", "/points/count", {"exact": True})["count"] > count * 0.9
        shutil.rmtree(folder)
    assert peaks[1] / peaks[0] <= 1.15, peaks


@pytest.mark.matrix
def test_a_graph_takes_no_more_memory_than_from_an_rdb(live, tmp_path):
    """RESTORE takes a graph in one piece, so that each restore of a graph has the payload in memory."""
    count = 20_000
    graph, _ = automem_json.write_samples(tmp_path / "large", "memories", "memories", count, OLD_SIZE)
    peaks = [peak_mb("restore_from_backup", "-q", str(graph), env=live.environ, folder=live.folder)]
    assert live.cypher("MATCH (m:Memory) RETURN count(m)") == [[count]]
    live.run("backup_automem", "--only", "falkordb")
    peaks.append(peak_mb("restore_from_backup", "-q", live.rdb(), env=live.environ, folder=live.folder))
    assert peaks[0] / peaks[1] <= 1.15, peaks
