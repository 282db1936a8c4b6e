"""Where a collection's shards are, and on which nodes a snapshot of all of them can be made."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lib.clients.qdrant.transport import NotFound, Qdrant, collection_path
from lib.errors import AccessRefused, MigrationError, StoreFailed, StoreUnreachable, UsageProblem

ACTIVE = "Active"
_POLL_SECONDS, _STABLE_POLLS = 0.2, 3
_VARIABLE = "QDRANT_NODE_URLS"
_EXAMPLE = f"export {_VARIABLE}=http://node1:6333,http://node2:6333   (every node's own address)"


@dataclass(frozen=True)
class Shard:
    """One replica of one shard; `points` is known on the node asked only."""

    shard_id: int
    peer: int
    state: str
    points: int | None


@dataclass(frozen=True)
class Topology:
    """The collection's shards and the cluster's nodes. `peers` is 1 on a server without a cluster.

    `known` maps the peer ids of the nodes to the addresses at which they find each other; empty where the key may not
    ask or there is no cluster.
    """

    peers: int
    this_peer: int
    shards: tuple[Shard, ...]
    transfers: int
    known: Mapping[int, str] = field(default_factory=dict)

    @property
    def holders(self) -> frozenset[int]:
        """The nodes that hold a replica."""
        return frozenset(shard.peer for shard in self.shards)

    @property
    def local(self) -> tuple[Shard, ...]:
        """The replicas on the node that was asked."""
        return tuple(shard for shard in self.shards if shard.peer == self.this_peer)


@dataclass(frozen=True)
class Node:
    """One node of a cluster: how to ask it, its peer id, and the shards of the collection that it holds."""

    qdrant: Qdrant
    peer: int
    shards: tuple[int, ...]


def topology(q: Qdrant, name: str) -> Topology:
    """Ask the node at `q` for the shards of a collection. Raises NotFound.

    Qdrant Cloud always says that the cluster is enabled, also with one node: so the peers are counted. A key that
    may see one collection only is not told them; the shards tell the same then.
    """
    result = q.json("GET", collection_path(name, "cluster"))
    this_peer = int(result["peer_id"])
    local = [Shard(s["shard_id"], this_peer, s["state"], s["points_count"]) for s in result["local_shards"]]
    remote = [Shard(s["shard_id"], int(s["peer_id"]), s["state"], None) for s in result["remote_shards"]]
    shards, known = (*local, *remote), _known_peers(q)
    peers = max(1, len(known), len({shard.peer for shard in shards}))
    return Topology(peers, this_peer, shards, len(result.get("shard_transfers") or ()), known)


def _known_peers(q: Qdrant) -> dict[int, str]:
    try:
        cluster = q.json("GET", "/cluster")
    except AccessRefused:
        return {}
    return {int(peer): str(entry.get("uri", "")) for peer, entry in (cluster.get("peers") or {}).items()}


def peers_of(q: Qdrant) -> tuple[int, int]:
    """The peer id of the node at `q`, and how many nodes its cluster has; (0, 0) for a server without a cluster."""
    cluster = q.json("GET", "/cluster")
    return int(cluster.get("peer_id") or 0), len(cluster.get("peers") or ())


def wait_settled(
    nodes: Sequence[Qdrant], name: str, place: Qdrant, shards: Iterable[int], seconds: float
) -> None:
    """Poll until the node at `place` holds these shards and every node calls each replica active.

    A restore into a cluster answers seconds before that: until then counts lack points, and another restore begun
    meanwhile can leave a shard without any active replica (seen on 1.11.3 and 1.18.3). Raises StoreFailed.
    """
    wanted, deadline, stable = set(shards), time.monotonic() + seconds, 0
    while stable < _STABLE_POLLS:
        states, there = _states(nodes, name), set(_ids(topology(place, name).local))
        stable = stable + 1 if states == {ACTIVE} and wanted <= there else 0
        if time.monotonic() >= deadline:
            raise StoreFailed(
                f"the shards of '{name}' did not come to rest on the nodes ({', '.join(sorted(states))})",
                next_step="look at the Qdrant servers' logs, then run the same command again",
            )
        place.sleep(_POLL_SECONDS)


def _states(nodes: Iterable[Qdrant], name: str) -> set[str]:
    """The states of all replicas, as all nodes tell them."""
    found: set[str] = set()
    for node in nodes:
        try:
            view = topology(node, name)
        except NotFound:
            found.add("not known to every node yet")
        else:
            found |= {shard.state for shard in view.shards} | ({"being moved"} if view.transfers else set())
    return found


def refuse_partial(topology: Topology) -> None:
    """Raise unless one node holds every shard whole, and it is the one asked.

    A snapshot holds only the segments of the node that made it: restored alone it answers `true` with a part of
    the points (seen on 1.11.3 and 1.18.3).
    """
    if topology.holders - {topology.this_peer}:
        raise MigrationError(
            f"the collection's shards are spread over {len(topology.holders)} Qdrant nodes; a snapshot of one node "
            f"is not a backup, and {_VARIABLE} does not list the nodes",
            next_step=_EXAMPLE,
        )
    _require_settled(topology.shards, topology.transfers)


def whole_nodes(q: Qdrant, listed: Sequence[Qdrant], name: str) -> list[Node]:
    """The nodes whose snapshots together hold the whole collection, in the order of `listed`.

    `q` is asked first, then each of `listed` itself; without any, the node at `q` must hold everything. Raises
    UsageProblem where `listed` is wrong, MigrationError where it leaves a shard out, StoreFailed where a shard is not
    whole, StoreUnreachable where a node does not answer, NotFound where there is no such collection.
    """
    whole = topology(q, name)
    if not listed:
        refuse_partial(whole)
        return [Node(q, whole.this_peer, _ids(whole.local))]
    looks = [(one.display, _look(one, name)) for one in listed]
    require_match(whole, looks, q.display)
    require_cover(whole, [look for _, look in looks])
    found = [
        Node(one, look.this_peer, _ids(look.local)) for one, (_, look) in zip(listed, looks, strict=True)
    ]
    return [node for node in found if node.shards]


def _look(node: Qdrant, name: str) -> Topology:
    try:
        return topology(node, name)
    except StoreUnreachable as error:
        raise StoreUnreachable(
            f"a node that {_VARIABLE} lists does not answer: {error}",
            next_step=f"start it; or take it out of {_VARIABLE}, if the other nodes hold every shard, too",
        ) from error
    except NotFound as error:
        raise UsageProblem(
            f"{node.display}, which {_VARIABLE} lists, has no collection '{name}': it is a node of another cluster",
            next_step=_EXAMPLE,
        ) from error


def require_match(whole: Topology, looks: Sequence[tuple[str, Topology]], display: str) -> None:
    """Raise UsageProblem unless each of `looks` (address, what it says) is another node of the one cluster."""
    seen: dict[int, str] = {}
    for address, look in looks:
        if look.this_peer in seen:
            raise UsageProblem(
                f"{_VARIABLE} lists one node twice: {seen[look.this_peer]} and {address} are both peer "
                f"{look.this_peer} (behind a load balancer there are several nodes at one address)",
                next_step=_EXAMPLE,
            )
        seen[look.this_peer] = address
        ours = {whole.this_peer, *whole.holders, *whole.known}
        theirs = {look.this_peer, *look.holders, *look.known}
        if look.this_peer not in ours or whole.this_peer not in theirs:
            raise UsageProblem(
                f"{address}, which {_VARIABLE} lists, is a node of another cluster (peer {look.this_peer}) than "
                f"{display} (peer {whole.this_peer})",
                next_step=_EXAMPLE,
            )


def require_cover(whole: Topology, looks: Sequence[Topology]) -> None:
    """Raise unless an active replica of every shard is on one of the nodes that were asked."""
    local = [shard for look in looks for shard in look.local]
    _require_settled(local, max(one.transfers for one in (whole, *looks)))
    covered = set(_ids(local))
    views = [shard for one in (whole, *looks) for shard in one.shards]
    left = [shard for shard in views if shard.shard_id not in covered]
    if left:
        first = min(left, key=lambda shard: shard.shard_id)
        address = whole.known.get(first.peer)
        place = f"peer {first.peer}" + (f" (to the other nodes: {address})" if address else "")
        raise MigrationError(
            f"shard {first.shard_id} of the collection is on {place} alone, which {_VARIABLE} does not list: "
            "a backup would not hold it",
            next_step=_EXAMPLE,
        )


def _require_settled(shards: Iterable[Shard], transfers: int) -> None:
    unfit = sorted({shard.state for shard in shards} - {ACTIVE})
    if unfit or transfers:
        what = f"in state {', '.join(unfit)}" if unfit else "being moved"
        raise StoreFailed(
            f"a shard of the collection is {what}", next_step="wait until the cluster is whole again"
        )


def _ids(shards: Iterable[Shard]) -> tuple[int, ...]:
    return tuple(sorted({shard.shard_id for shard in shards}))
