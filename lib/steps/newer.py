"""What stands there and is not in the backup: counted and named before it is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import redis

from lib.graph.client import list_graphs
from lib.graph.read import iter_memories
from lib.steps.pages import pages
from lib.steps.payloads import PointId
from lib.steps.present import IdTable, as_id
from lib.steps.restore_graph import GraphBackup
from lib.steps.restore_site import Newer, NewerThanBackup, Proved, Site
from lib.steps.restored_points import CollectionBackup
from lib.steps.take_collection import CollectionSource
from lib.steps.take_graph import GraphSource
from lib.vectors.collection import health
from lib.vectors.points import scroll

_PAGE = 500
_HASH, _MODULUS = "content", 1 << 62


def newer_than(site: Site, proved: Proved) -> NewerThanBackup:
    """Compare the memories' ids and contents, and the points' ids, with the backup's; only reads."""
    found = NewerThanBackup()
    if proved.graph and site.graph:
        found.graph = _newer_memories(proved.graph, site.graph)
    if proved.collection and site.collection:
        found.collection = _newer_points(proved.collection, site.collection)
    return found


def _newer_memories(backup: GraphBackup, live: GraphSource) -> Newer | None:
    if backup.scratch is None or live.graph not in list_graphs(live.conn):
        return None
    found = Newer()
    with (
        _contents_of(backup.scratch.conn, backup.graph) as kept,
        _contents_of(live.conn, live.graph) as standing,
    ):
        for page in standing.ids():
            known, now = kept.payloads(page), standing.payloads(page)
            added = [identity for identity in page if identity not in known]
            changed = [identity for identity in page if known.get(identity, now[identity]) != now[identity]]
            found.added += len(added)
            found.changed += len(changed)
            for identity in (*added, *changed):
                found.name(identity)
    return found


def _contents_of(conn: redis.Redis, graph: str) -> IdTable:
    """By id, the sum of the hashes of all contents that bear it: an id may be used twice."""
    table = IdTable()
    for page in pages(_contents(conn, graph), _PAGE):
        sums = {one: int(row[_HASH]) for one, row in table.payloads([one for one, _ in page]).items()}
        for identity, value in page:
            sums[identity] = (sums.get(identity, 0) + value) % _MODULUS
        table.put((identity, {_HASH: value}) for identity, value in sums.items())
    return table


def _contents(conn: redis.Redis, graph: str) -> Iterator[tuple[PointId, int]]:
    """Each memory's id with a hash of its content; one without an id cannot be told from another."""
    for node in iter_memories(conn, graph, keys=("id", "content")):
        identity, content = node.properties["id"], node.properties["content"]
        if identity is not None:
            value = blake2b(repr(content).encode(), digest_size=8).digest()
            yield as_id(str(identity)), int.from_bytes(value, "big") % _MODULUS


def _newer_points(backup: CollectionBackup, live: CollectionSource) -> Newer | None:
    if backup.bare and backup.ids.count is None:
        return None
    if health(live.qdrant, live.collection) != "live":
        return None
    found = Newer()
    with IdTable() as kept:
        for page in backup.promised():
            kept.put((one, None) for one in page)
        for points in scroll(live.qdrant, live.collection):
            known = kept.payloads([point.id for point in points])
            for point in points:
                if point.id not in known:
                    found.added += 1
                    found.name(point.id)
    return found
