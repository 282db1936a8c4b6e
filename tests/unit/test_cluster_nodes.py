"""Which nodes' snapshots together are the whole collection, from recorded answers of two-node clusters."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from lib.clients.qdrant.cluster import Shard, Topology, require_cover, require_match
from lib.errors import MigrationError, StoreFailed, UsageProblem

RECORDINGS = Path(__file__).resolve().parent.parent / "qdrant_recordings"
ONE, TWO = "http://one:6333", "http://two:6333"


def recorded(version: str) -> list[dict]:
    with gzip.open(RECORDINGS / version / "cluster.jsonl.gz") as lines:
        return [json.loads(line) for line in lines]


def looks_of(version: str) -> list[Topology]:
    """The topology as the first and the second node reported it, right after the collection was filled."""
    found = []
    for node in (1, 2):
        answers = [one for one in recorded(version) if one.get("node") == node]
        shards = next(one for one in answers if one["title"] == "shards")["response"]["json"]["result"]
        peers = next(one for one in answers if one["title"] == "cluster")["response"]["json"]["result"]["peers"]
        peer = shards["peer_id"]
        local = [Shard(one["shard_id"], peer, one["state"]) for one in shards["local_shards"]]
        remote = [Shard(one["shard_id"], one["peer_id"], one["state"]) for one in shards["remote_shards"]]
        known = {int(one): entry["uri"] for one, entry in peers.items()}
        found.append(Topology(len(peers), peer, (*local, *remote), len(shards["shard_transfers"]), known))
    return found


@pytest.fixture(params=["1.11.3", "1.18.3"])
def looks(request) -> list[Topology]:
    return looks_of(request.param)


def require(whole: Topology, listed: list[tuple[str, Topology]]) -> None:
    require_match(whole, listed, ONE)
    require_cover(whole, [look for _, look in listed])


def test_both_nodes_are_the_whole_collection_whichever_is_listed_first(looks):
    one, two = looks
    assert {shard.shard_id for shard in (*one.local, *two.local)} == {0, 1}
    for whole in looks:
        require(whole, [(ONE, one), (TWO, two)])
        require(whole, [(TWO, two), (ONE, one)])


@pytest.mark.parametrize("listed", [0, 1])
def test_a_shard_of_a_node_that_is_not_listed_is_refused_and_its_node_named(looks, listed):
    other = looks[1 - listed]
    for whole in looks:
        with pytest.raises(MigrationError, match=f"peer {other.this_peer} .*http://127.0.0.1:74.2/.*QDRANT_NODE_URLS"):
            require(whole, [(ONE, looks[listed])])


def test_one_node_under_two_addresses_is_refused(looks):
    one, two = looks
    with pytest.raises(UsageProblem, match=f"lists one node twice: {ONE} and http://balancer"):
        require(one, [(ONE, one), (TWO, two), ("http://balancer", one)])


def test_a_node_of_another_cluster_is_refused():
    (one, two), (stranger, _) = looks_of("1.11.3"), looks_of("1.18.3")
    with pytest.raises(UsageProblem, match=f"http://stranger.*another cluster .*peer {stranger.this_peer}"):
        require(one, [(ONE, one), (TWO, two), ("http://stranger", stranger)])
    with pytest.raises(UsageProblem, match="another cluster"):
        require(stranger, [(ONE, one), (TWO, two)])


def test_a_key_that_may_not_ask_for_the_peers_is_enough(looks):
    one, two = (dataclasses.replace(look, known={}) for look in looks)
    require(one, [(ONE, one), (TWO, two)])
    with pytest.raises(MigrationError, match=f"shard . of the collection is on peer {two.this_peer} alone"):
        require(one, [(ONE, one)])


def replicated(looks: list[Topology], state: str = "Active") -> list[Topology]:
    """Both shards on both nodes; the second node's replicas in `state`."""
    one, two = (look.this_peer for look in looks)
    shards = [Shard(number, one, "Active") for number in (0, 1)]
    shards += [Shard(number, two, state) for number in (0, 1)]
    return [dataclasses.replace(look, shards=tuple(shards)) for look in looks]


def test_a_node_may_be_left_out_if_the_other_holds_every_shard(looks):
    one, two = replicated(looks, "Dead")
    require(one, [(ONE, one)])
    with pytest.raises(StoreFailed, match="in state Dead"):
        require(one, [(ONE, one), (TWO, two)])


@pytest.mark.parametrize("state", ["Dead", "Partial", "Initializing", "Listener", "Recovery", "ManualRecovery"])
def test_a_replica_that_is_not_active_covers_nothing(looks, state):
    one, two = replicated(looks, state)
    with pytest.raises(StoreFailed, match=f"in state {state}"):
        require(one, [(TWO, two)])


def test_shards_on_the_move_are_refused(looks):
    one, two = looks
    with pytest.raises(StoreFailed, match="being moved"):
        require(one, [(ONE, one), (TWO, dataclasses.replace(two, transfers=1))])
