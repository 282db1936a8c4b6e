"""A collection on two nodes of a real cluster: each node's snapshot is in the backup, and goes back to its node."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator

import pytest

from lib.backup.archive import read_archive
from lib.journal import open_journals
from tests.gate import CancelToken, Gate
from tests.kill_support import run_killed
from tests.operator_support import Operator
from tests.qdrant_pair import Pair
from tests.real_qdrant import test_server
from tests.reembed_support import assert_vectors, points_of, settings, upgrade
from tests.restore_support import delete_printed_snapshots

SERVER = test_server()
pytestmark = [
    pytest.mark.qdrant,
    pytest.mark.skipif(
        SERVER is None,
        reason="a cluster needs a real Qdrant: QDRANT_TEST_SERVER is the path of one",
    ),
]
POINTS = 220


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Iterator[dict[int, Pair]]:
    """Clusters of two nodes, the first and a second one; started when first asked for."""
    started: dict[int, Pair] = {}

    class Pairs(dict[int, Pair]):
        def __missing__(self, number: int) -> Pair:
            assert SERVER is not None
            folder = tmp_path_factory.mktemp(f"cluster-{number}")
            self[number] = started[number] = Pair(SERVER, folder).__enter__()
            return self[number]

    yield Pairs()
    for pair in started.values():
        pair.__exit__()


@pytest.fixture
def pair(pairs) -> Pair:
    return pairs[1]


def operator_at(pair: Pair, session_servers, folder) -> Iterator[Operator]:
    someone = Operator(dataclasses.replace(session_servers, qdrant_url=pair.one.url), folder)
    someone.load(POINTS)
    pair.wait_active(someone.collection)
    someone.export(QDRANT_NODE_URLS=pair.urls)
    yield someone
    pair.clean_up(someone.collection)
    someone.clean_up()


@pytest.fixture
def operator(pair, session_servers, tmp_path) -> Iterator[Operator]:
    """An operator whose collection has a shard on each node, and who lists both."""
    yield from operator_at(pair, session_servers, tmp_path)


@pytest.fixture
def replicated(operator, pair) -> Operator:
    """An operator whose collection has two shards, each on both nodes."""
    pair.replicate(operator.collection)
    return operator


def component(operator: Operator) -> dict:
    return json.loads(operator.manifests()[-1].read_text())["collection"]


def assert_nothing_left(operator: Operator, pair: Pair) -> None:
    assert [node.snapshots(operator.collection) for node in pair.nodes] == [[], []]
    assert open_journals(operator.backups) == []
    assert not [path for path in operator.backups.rglob("*") if path.name.endswith(".partial")]


def test_each_nodes_part_is_in_the_backup(operator, pair):
    points = operator.state().points
    done = operator.run("backup_automem")
    assert f"{points:,} points" in done.out
    found = component(operator)
    assert [one["address"] for one in found["nodes"]] == [node.url for node in pair.nodes]
    assert [one["peer"] for one in found["nodes"]] == [node.peer for node in pair.nodes]
    shards = [set(one["shards"]) for one in found["nodes"]]
    assert shards == [node.shards(operator.collection) for node in pair.nodes]
    assert shards[0] | shards[1] == {0, 1}
    assert not shards[0] & shards[1]
    assert found["points"] == found["promised_ids"] == points
    assert found["snapshot_size"] == sum(one["snapshot_size"] for one in found["nodes"])
    ids: list[str] = []
    inside = read_archive(operator.backups / found["file"]["name"], on_ids=ids.extend)
    assert [one.name for one in inside.snapshots] == [one["snapshot_name"] for one in found["nodes"]]
    assert len(set(ids)) == points
    assert_nothing_left(operator, pair)
    assert operator.run("backup_automem", "--check", "all").out.count("  ") > 0
    listed = operator.run("backup_automem", "--list", "--json").json["sets"]
    assert [one["collection"]["nodes"] for one in listed] == [found["nodes"]]


def test_the_order_of_the_nodes_does_not_matter_and_each_is_asked_itself(operator, pair):
    operator.export(QDRANT_NODE_URLS=",".join(reversed(pair.urls.split(","))))
    operator.run("backup_automem")
    assert [one["peer"] for one in component(operator)["nodes"]] == [pair.two.peer, pair.one.peer]


def test_without_a_list_of_the_nodes_the_backup_asks_for_it(operator, pair):
    operator.export(QDRANT_NODE_URLS="")
    refused = operator.run("backup_automem", expect=1)
    assert "spread over 2 Qdrant nodes" in refused.err
    assert "export QDRANT_NODE_URLS=" in refused.err
    assert not operator.manifests()


def test_a_node_that_is_missing_twice_there_or_of_another_cluster_is_named(operator, pair, session_servers):
    one, two = pair.nodes
    for urls, code, message in (
        (one.url, 1, f"peer {two.peer}"),
        (f"{one.url},{one.url}/", 2, "lists one node twice"),
        (f"{one.url},{two.url},{session_servers.qdrant_url}", 2, session_servers.qdrant_url),
        (f"{one.url},http://127.0.0.1:1", 1, "http://127.0.0.1:1"),
    ):
        operator.export(QDRANT_NODE_URLS=urls)
        refused = operator.run("backup_automem", expect=code)
        assert message in refused.err
        assert "QDRANT_NODE_URLS" in refused.err
        assert not operator.manifests()
        assert_nothing_left(operator, pair)


def test_a_node_of_a_cluster_that_has_a_collection_of_that_name_is_distinguished(operator, pairs):
    strange = pairs[2]
    strange.one.ask("PUT", f"/collections/{operator.collection}", {"vectors": {"size": 4, "distance": "Dot"}})
    try:
        operator.export(QDRANT_NODE_URLS=f"{pairs[1].urls},{strange.two.url}")
        refused = operator.run("backup_automem", expect=2)
        assert f"{strange.two.url}, which QDRANT_NODE_URLS lists, is a node of another cluster" in refused.err
    finally:
        strange.clean_up(operator.collection)


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("after snapshot made", [1, 0]),  # the first node's
        ("called snapshot downloaded", [1, 1]),
        ("entering snapshot deleted", [1, 1]),
        ("before snapshot removed", [1, 0]),  # deleted on the second node, which the journal does not record
    ],
)
def test_a_killed_backup_is_cleaned_up_on_every_node(operator, pair, where, left):
    run_killed(operator, where, "backup_automem")
    assert [len(node.snapshots(operator.collection)) for node in pair.nodes] == left
    operator.run("backup_automem")
    assert len(operator.manifests()) == 1
    assert_nothing_left(operator, pair)


def test_an_operators_own_snapshots_stay_on_their_nodes(operator, pair):
    own = [node.ask("POST", f"/collections/{operator.collection}/snapshots")["name"] for node in pair.nodes]
    run_killed(operator, "before snapshot removed", "backup_automem")
    operator.run("backup_automem")
    assert [node.snapshots(operator.collection) for node in pair.nodes] == [[own[0]], [own[1]]]


def test_a_node_that_is_not_listed_any_more_is_asked_for_before_its_file_is_forgotten(operator, pair):
    with Gate(pair.two.url) as gate:
        operator.export(QDRANT_NODE_URLS=f"{pair.one.url},{gate.url}")
        run_killed(operator, "before snapshot removed", "backup_automem")
    operator.export(QDRANT_NODE_URLS=pair.urls)
    refused = operator.run("backup_automem", expect=2)
    assert gate.url in refused.err
    (journal,) = open_journals(operator.backups)
    assert f"delete {journal.path}" in refused.err
    journal.path.unlink()
    operator.run("backup_automem")


def test_a_download_that_fails_on_one_node_leaves_nothing_on_either(operator, pair):
    with Gate(pair.two.url) as gate:
        operator.export(QDRANT_NODE_URLS=f"{pair.one.url},{gate.url}")
        stop = CancelToken("GET", r"/snapshots/.*\.snapshot$")
        gate.stops.append(stop)
        running = operator.start("backup_automem")
        assert stop.reached.wait(300)
        (name,) = pair.two.snapshots(operator.collection)
        assert len(pair.one.snapshots(operator.collection)) == 1
        pair.two.ask("DELETE", f"/collections/{operator.collection}/snapshots/{name}")
        stop.let_go.set()
        _, err = running.communicate(timeout=300)
    assert running.returncode == 1, err
    assert gate.url in err
    assert not operator.manifests()
    assert_nothing_left(operator, pair)


def test_a_node_that_is_down_is_named_and_the_next_run_is_whole(operator, pair):
    pair.two.kill()
    try:
        refused = operator.run("backup_automem", expect=1)
        assert pair.two.url in refused.err
        assert "QDRANT_NODE_URLS" in refused.err
    finally:
        pair.two.start()
        pair.wait_active(operator.collection)
    operator.run("backup_automem")


def test_replicas_are_counted_once(replicated, pair):
    points = replicated.state().points
    replicated.run("backup_automem")
    found = component(replicated)
    assert [one["shards"] for one in found["nodes"]] == [[0, 1], [0, 1]]
    assert found["points"] == found["promised_ids"] == points
    message = replicated.run("backup_automem", "--check", "all").out
    assert "DAMAGED" not in message
    if found["proof"] == "restored":
        assert f"{points} points counted" in message
    assert_nothing_left(replicated, pair)


def test_a_node_that_is_down_may_be_left_out_if_the_other_holds_every_shard(replicated, pair):
    points = replicated.state().points
    pair.two.kill()
    try:
        replicated.export(QDRANT_NODE_URLS=pair.one.url)
        replicated.run("backup_automem")
        assert component(replicated)["nodes"] == []
        assert component(replicated)["promised_ids"] == points
    finally:
        pair.two.start()
        pair.wait_active(replicated.collection)


def test_the_settings_show_no_login_of_a_node(operator):
    operator.export(QDRANT_NODE_URLS="http://me:s3cr3t@127.0.0.1:1,http://127.0.0.1:2")
    shown = operator.run("backup_automem", "--show-config")
    assert "http://****@127.0.0.1:1,http://127.0.0.1:2" in shown.out
    refused = operator.run("backup_automem", expect=1)
    assert "s3cr3t" not in shown.out + refused.err + refused.out


def test_a_collection_on_two_nodes_is_re_embedded(operator, pair):
    operator.run("backup_automem")
    before, was = points_of(operator), settings(operator)
    upgrade(operator)
    operator.run("reembed_embeddings")
    after = points_of(operator)
    assert after.keys() == before.keys()
    assert all(after[one][0]["content"] == payload["content"] for one, (payload, _) in before.items())
    assert_vectors(after)
    pair.wait_active(operator.collection)
    assert settings(operator) == was
    assert [len(node.shards(operator.collection)) for node in pair.nodes] == [1, 1]
    operator.call("POST", "/points/delete?wait=true", {"points": sorted(before, key=str)[:9]})
    operator.run("reembed_embeddings", "--only-missing")
    assert points_of(operator).keys() == before.keys()


def test_without_a_backup_of_every_node_nothing_is_re_embedded(operator):
    upgrade(operator)
    assert "It is not changed without a verified backup" in operator.run("reembed_embeddings", expect=2).err
    operator.export(QDRANT_NODE_URLS="")
    refused = operator.run("reembed_embeddings", expect=1)
    assert "export QDRANT_NODE_URLS=" in refused.err


def contents(operator: Operator) -> dict:
    """Every point, payload and vector."""
    found, offset = {}, None
    while True:
        body = {"limit": 200, "with_payload": True, "with_vector": True, "offset": offset}
        page = operator.call("POST", "/points/scroll", body)
        found |= {one["id"]: (one["payload"], one["vector"]) for one in page["points"]}
        offset = page["next_page_offset"]
        if offset is None:
            return found


def spoil(operator: Operator) -> None:
    """Delete a third of the points, and change the payload of the others."""
    ids = sorted(contents(operator), key=str)
    operator.call("POST", "/points/delete?wait=true", {"points": ids[::3]})
    operator.call("POST", "/points/payload?wait=true", {"payload": {"spoilt": True}, "points": ids[1::3]})


def assert_restored(operator: Operator, pair: Pair, before: dict) -> None:
    assert contents(operator) == before
    pair.wait_active(operator.collection)
    assert operator.collections() == [operator.collection]
    assert [node.snapshots(operator.collection) for node in pair.nodes] == [[], []]


def test_each_nodes_snapshot_goes_back_to_its_own_node(operator, pair):
    before, places = contents(operator), [node.shards(operator.collection) for node in pair.nodes]
    operator.run("backup_automem", "--only", "qdrant")
    spoil(operator)
    spoilt = contents(operator)
    dry = operator.run("restore_from_backup", operator.archive(), "--dry-run")
    assert f"{len(before)} points" in dry.out
    assert contents(operator) == spoilt
    operator.run("restore_from_backup", operator.archive())
    assert_restored(operator, pair, before)
    assert [node.shards(operator.collection) for node in pair.nodes] == places
    assert open_journals(operator.backups) == []
    operator.run("restore_from_backup", str(operator.manifests()[-1]))  # its safety backup covers both nodes, too
    assert contents(operator) == spoilt


def test_the_snapshots_go_back_by_hand_too(operator, pair, tmp_path):
    """The README's lines: unpack, upload each to its own node, wait in between."""
    before = contents(operator)
    operator.run("backup_automem", "--only", "qdrant")
    subprocess.run(["tar", "-xzf", operator.archive(), "-C", str(tmp_path)], check=True)
    operator.call("DELETE", "")
    for node, one in zip(pair.nodes, component(operator)["nodes"], strict=True):
        url = f"{node.url}/collections/{operator.collection}/snapshots/upload?wait=true&priority=snapshot"
        file = tmp_path / "snapshot" / one["snapshot_name"]
        subprocess.run(["curl", "-sf", "-F", f"snapshot=@{file}", url], check=True, capture_output=True)
        pair.wait_active(operator.collection)
    assert contents(operator) == before


def test_a_whole_set_goes_back_though_the_collection_is_gone(operator, pair):
    before = contents(operator)
    operator.run("backup_automem")
    graph = operator.state().graph
    operator.call("DELETE", "")
    operator.cypher("MATCH (m:Memory) SET m.content = 'lost'")
    operator.run("restore_from_backup", "latest")
    assert_restored(operator, pair, before)
    assert operator.state().graph == graph


def test_replicas_come_back_on_both_nodes(replicated, pair):
    before = contents(replicated)
    replicated.run("backup_automem", "--only", "qdrant")
    spoil(replicated)
    replicated.run("restore_from_backup", replicated.archive())
    assert_restored(replicated, pair, before)
    assert [node.shards(replicated.collection) for node in pair.nodes] == [{0, 1}, {0, 1}]


def test_a_cluster_that_the_backup_does_not_know_takes_it_in_the_listed_order(operator, pairs):
    before = contents(operator)
    operator.run("backup_automem", "--only", "qdrant")
    recreated = pairs[2]
    operator.export(QDRANT_URL=recreated.two.url, QDRANT_NODE_URLS=recreated.urls)
    operator.run("restore_from_backup", operator.archive())
    moved = dataclasses.replace(operator, servers=dataclasses.replace(operator.servers, qdrant_url=recreated.one.url))
    try:
        assert contents(moved) == before
    finally:
        recreated.clean_up(operator.collection)


def test_a_target_that_cannot_take_the_parts_is_reported_before_anything_is_touched(operator, pair, session_servers):
    operator.run("backup_automem", "--only", "qdrant")
    archive, before = operator.archive(), contents(operator)
    operator.export(QDRANT_NODE_URLS="")
    refused = operator.run("restore_from_backup", archive, expect=2)
    assert "snapshots of 2 Qdrant nodes, and QDRANT_NODE_URLS lists none" in refused.err
    operator.export(QDRANT_URL=session_servers.qdrant_url, QDRANT_NODE_URLS=session_servers.qdrant_url)
    refused = operator.run("restore_from_backup", archive, expect=2)
    assert "a server that is no cluster" in refused.err
    assert contents(operator) == before
    assert operator.collections() == [operator.collection]


@pytest.mark.parametrize(
    "where",
    [
        "called copy uploaded",  # one of two parts is there
        "after collection rehearsed",
        "after deleting the live collection",
        "called copy recovered",
        "before collection restored",
    ],
)
def test_a_killed_restore_resumes(operator, pair, where):
    before = contents(operator)
    operator.run("backup_automem", "--only", "qdrant")
    archive = operator.archive()
    spoil(operator)
    run_killed(operator, where, "restore_from_backup", archive)
    # The kill may meet the safety backup: what may be its snapshot is named, and not deleted.
    delete_printed_snapshots(operator.run("restore_from_backup", archive).err)
    assert_restored(operator, pair, before)
    assert open_journals(operator.backups) == []


def test_a_part_lost_in_transfer_puts_the_old_collection_back(operator, pair):
    before = contents(operator)
    operator.run("backup_automem", "--only", "qdrant")
    archive = operator.archive()
    spoil(operator)
    spoilt = contents(operator)
    with Gate(pair.two.url) as gate:
        operator.export(QDRANT_NODE_URLS=f"{pair.one.url},{gate.url}")
        stop = CancelToken("PUT", rf"/collections/{operator.collection}/snapshots/recover")
        stop.let_go.set()  # the connection is closed at once, the node never receives it
        gate.stops.append(stop)
        failed = operator.run("restore_from_backup", archive, expect=1)
        assert stop.reached.is_set()
    assert "the old one was restored from the safety backup" in failed.err, failed.err
    assert_restored(operator, pair, spoilt)
    operator.export(QDRANT_NODE_URLS=pair.urls)
    operator.run("restore_from_backup", archive)
    assert_restored(operator, pair, before)
