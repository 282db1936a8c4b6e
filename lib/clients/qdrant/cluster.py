"""The shards of a collection on the nodes of a cluster, and the nodes whose snapshots hold all of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lib.clients.qdrant.transport import NotFound, Qdrant, collection_path
from lib.errors import AccessRefused, MigrationError, StoreFailed, StoreUnreachable, UsageProblem

ACTIVE = "Active"
_POLL_SECONDS, _STABLE_POLLS = 0.2, 3
_VARIABLE = "QDRANT_NODE_URLS"
LIST_NODES = f"list every node's own address:\nexport {_VARIABLE}=http://node1:6333,http://node2:6333"


@dataclass(frozen=True)
class Shard:
    """One replica of one shard."""

    shard_id: int
    peer: int
    state: str


@dataclass(frozen=True)
class Topology:
    """The collection's shards and the cluster's nodes, as the node `this_peer` reports them.

    `peers` is 1 without a cluster. `known` maps the peer ids of the nodes to the addresses that they use among
    themselves; it is empty without a cluster, or if the key may not ask for it.
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

    @property
    def local_ids(self) -> tuple[int, ...]:
        """The ids of `local`, in order."""
        return tuple(sorted({shard.shard_id for shard in self.local}))


@dataclass(frozen=True)
class Node:
    """A node of a cluster, its peer id, and the ids of the collection's shards on it."""

    qdrant: Qdrant
    peer: int
    shards: tuple[int, ...]


def topology(q: Qdrant, name: str) -> Topology:
    """Ask the node at `q` for the shards of a collection. Raises NotFound.

    The peers are counted, because Qdrant Cloud reports an enabled cluster with one node too. A key for one collection
    may not list them; then the nodes that hold shards are counted.
    """
    result = q.json("GET", collection_path(name, "cluster"))
    this_peer = int(result["peer_id"])
    local = [Shard(s["shard_id"], this_peer, s["state"]) for s in result["local_shards"]]
    remote = [Shard(s["shard_id"], int(s["peer_id"]), s["state"]) for s in result["remote_shards"]]
    try:
        nodes = q.json("GET", "/cluster").get("peers") or {}
    except AccessRefused:
        nodes = {}
    known = {int(peer): str(entry.get("uri", "")) for peer, entry in nodes.items()}
    peers = max(1, len(known), len({shard.peer for shard in (*local, *remote)}))
    return Topology(peers, this_peer, (*local, *remote), len(result.get("shard_transfers") or ()), known)


def peers_of(q: Qdrant) -> tuple[int, int]:
    """The peer id of the node at `q` and the number of nodes in its cluster; (0, 0) without a cluster."""
    cluster = q.json("GET", "/cluster")
    return int(cluster.get("peer_id") or 0), len(cluster.get("peers") or ())


def wait_active(nodes: Sequence[Qdrant], name: str, node: Qdrant, shards: Iterable[int], seconds: float) -> None:
    """Poll until `node` holds these shards and all `nodes` report every replica as active.

    A restore into a cluster answers seconds earlier. Until then counts lack points, and the restore of another part
    can leave a shard without an active replica (seen on 1.11.3 and 1.18.3). Raises StoreFailed.
    """
    wanted, deadline, stable = set(shards), time.monotonic() + seconds, 0
    while stable < _STABLE_POLLS:
        states: set[str] = set()
        for one in nodes:
            try:
                view = topology(one, name)
            except NotFound:
                states.add("not known to every node yet")
            else:
                states |= {shard.state for shard in view.shards} | ({"being moved"} if view.transfers else set())
        held = set(topology(node, name).local_ids)
        stable = stable + 1 if states == {ACTIVE} and wanted <= held else 0
        if time.monotonic() >= deadline:
            found = ", ".join(sorted(states))
            raise StoreFailed(f"the shards of '{name}' did not become active on the nodes ({found})")
        node.sleep(_POLL_SECONDS)


def refuse_partial(topology: Topology) -> None:
    """Raise MigrationError unless the node that was asked holds every shard, and StoreFailed unless all are active.

    Restored alone, a snapshot of one node answers `true`, with a part of the points (seen on 1.11.3 and 1.18.3).
    """
    if topology.holders - {topology.this_peer}:
        why = f"a snapshot of one node is not a backup, and {_VARIABLE} does not list the nodes"
        text = f"the collection's shards are spread over {len(topology.holders)} Qdrant nodes"
        raise MigrationError(f"{text}; {why}", next_step=LIST_NODES)
    _require_active(topology.shards, topology.transfers)


def whole_nodes(q: Qdrant, listed: Sequence[Qdrant], name: str) -> list[Node]:
    """The nodes whose snapshots together hold the collection, in the order of `listed`.

    If `listed` is empty, that at `q` must hold all. Raises UsageProblem if `listed` is wrong, MigrationError if it
    lacks a shard, StoreFailed if one is not active, StoreUnreachable if a node does not answer, NotFound if the
    collection does not exist.
    """
    whole = topology(q, name)
    if not listed:
        refuse_partial(whole)
        return [Node(q, whole.this_peer, whole.local_ids)]
    views = []
    for node in listed:
        try:
            views.append(topology(node, name))
        except StoreUnreachable as error:
            step = f"start it, or take it out of {_VARIABLE}, if the other nodes hold every shard, too"
            raise StoreUnreachable(f"a node that {_VARIABLE} lists does not answer: {error}", next_step=step) from error
        except NotFound as error:
            text = f"{node.display}, which {_VARIABLE} lists, has no collection '{name}'"
            raise UsageProblem(f"{text}: it is a node of another cluster", next_step=LIST_NODES) from error
    require_match(whole, [(node.display, view) for node, view in zip(listed, views, strict=True)], q.display)
    require_cover(whole, views)
    nodes = [Node(node, view.this_peer, view.local_ids) for node, view in zip(listed, views, strict=True)]
    return [node for node in nodes if node.shards]


def require_match(whole: Topology, views: Sequence[tuple[str, Topology]], display: str) -> None:
    """Raise UsageProblem unless each of `views` (address and its topology) is another node of the same cluster."""
    seen: dict[int, str] = {}
    for address, view in views:
        peer = view.this_peer
        if peer in seen:
            text = f"{_VARIABLE} lists one node twice: {seen[peer]} and {address} are both peer {peer}"
            why = "behind a load balancer there are several nodes at one address"
            raise UsageProblem(f"{text} ({why})", next_step=LIST_NODES)
        seen[peer] = address
        ours = {whole.this_peer, *whole.holders, *whole.known}
        if peer not in ours or whole.this_peer not in {peer, *view.holders, *view.known}:
            text = f"{address}, which {_VARIABLE} lists, is a node of another cluster (peer {peer})"
            raise UsageProblem(f"{text} than {display} (peer {whole.this_peer})", next_step=LIST_NODES)


def require_cover(whole: Topology, views: Sequence[Topology]) -> None:
    """Raise MigrationError unless `views` hold every shard, StoreFailed unless their replicas are active."""
    local = [shard for view in views for shard in view.local]
    _require_active(local, max(one.transfers for one in (whole, *views)))
    covered = {shard.shard_id for shard in local}
    missing = [shard for view in (whole, *views) for shard in view.shards if shard.shard_id not in covered]
    if missing:
        first = min(missing, key=lambda shard: shard.shard_id)
        address = whole.known.get(first.peer)
        node = f"peer {first.peer}" + (f" (to the other nodes: {address})" if address else "")
        text = f"shard {first.shard_id} of the collection is on {node} alone, which {_VARIABLE} does not list"
        raise MigrationError(f"{text}: a backup would not hold it", next_step=LIST_NODES)


def _require_active(shards: Iterable[Shard], transfers: int) -> None:
    inactive = sorted({shard.state for shard in shards} - {ACTIVE})
    if inactive or transfers:
        what = f"in state {', '.join(inactive)}" if inactive else "being moved"
        step = "wait until all shards of the cluster are active, then run the same command again"
        raise StoreFailed(f"a shard of the collection is {what}", next_step=step)
