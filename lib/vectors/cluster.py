"""Where a collection's shards are."""

from __future__ import annotations

from dataclasses import dataclass

from lib.errors import AccessRefused, MigrationError, StoreFailed
from lib.vectors.address import collection_path
from lib.vectors.transport import Qdrant


@dataclass(frozen=True)
class Shard:
    """One replica of one shard; `points` is known on the node asked only."""

    shard_id: int
    peer: int
    state: str
    points: int | None


@dataclass(frozen=True)
class Topology:
    """The collection's shards and the cluster's nodes. `peers` is 1 on a server without a cluster."""

    peers: int
    this_peer: int
    shards: tuple[Shard, ...]
    transfers: int

    @property
    def holders(self) -> frozenset[int]:
        """The nodes that hold a replica."""
        return frozenset(shard.peer for shard in self.shards)


def topology(q: Qdrant, name: str) -> Topology:
    """Ask the node at `q` for the shards of a collection. Raises NotFound.

    Qdrant Cloud always says that the cluster is enabled, also with one node: so the peers are counted. A key that
    may see one collection only is not told them; the shards tell the same then.
    """
    result = q.json("GET", collection_path(name, "cluster"))
    this_peer = int(result["peer_id"])
    local = [Shard(s["shard_id"], this_peer, s["state"], s["points_count"]) for s in result["local_shards"]]
    remote = [Shard(s["shard_id"], int(s["peer_id"]), s["state"], None) for s in result["remote_shards"]]
    shards = (*local, *remote)
    peers = max(_peers(q), len({shard.peer for shard in shards}))
    return Topology(peers, this_peer, shards, len(result.get("shard_transfers") or ()))


def refuse_partial(topology: Topology) -> None:
    """Raise unless one node holds every shard whole, and it is the one asked.

    A snapshot holds only the segments of the node that made it: restored alone it answers `true` with a part of
    the points (seen on 1.11.3 and 1.18.3).
    """
    if topology.holders - {topology.this_peer}:
        raise MigrationError(
            f"the collection's shards are spread over {len(topology.holders)} Qdrant nodes; a snapshot of one node "
            "is not a backup",
            next_step="move the shards to one node, and point QDRANT_URL at it",
        )
    unfit = sorted({shard.state for shard in topology.shards} - {"Active"})
    if unfit or topology.transfers:
        what = f"in state {', '.join(unfit)}" if unfit else "being moved"
        raise StoreFailed(
            f"a shard of the collection is {what}", next_step="wait until the cluster is whole again"
        )


def _peers(q: Qdrant) -> int:
    try:
        cluster = q.json("GET", "/cluster")
    except AccessRefused:
        return 1
    return max(1, len(cluster.get("peers") or ()))
