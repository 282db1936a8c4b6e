"""What a restore asks before it touches anything: files verified, targets able, AutoMem stopped, newer data counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import blake2b
from urllib.parse import urlsplit

import redis

from lib.backup.collection import CollectionSource
from lib.backup.existing_points import TemporaryIdTable, as_id, pages
from lib.backup.graph import GraphSource
from lib.backup.manifest import GraphComponent
from lib.backup.payloads import PointId
from lib.backup.snapshot_restore import CollectionBackup, place
from lib.clients.automem import HealthAnswer, ask_health
from lib.clients.falkordb.connection import expires_at, function_libraries, list_graphs
from lib.clients.falkordb.queries import iter_memories
from lib.clients.falkordb.swap import other_clients
from lib.clients.qdrant.collection import health
from lib.clients.qdrant.points import scroll
from lib.errors import MigrationError, UsageProblem, listed, one_line
from lib.network import container_hint, is_loopback, is_this_machine, same_server, without_login
from lib.restore import graph as graphs
from lib.restore.graph import GraphBackup
from lib.restore.inputs import (
    Wanted,
    check_version,
    open_backup,
    open_bare,
    require_same_name,
    require_target,
)
from lib.restore.site import Newer, NewerThanBackup, Options, Site, VerifiedFiles

_NAMED = 3  # clients that are named one by one
_STOP_AUTOMEM = (
    "stop it, not the stores:  docker compose stop flask-api\nthen run the same command again,"
    " and start it afterwards:  docker compose up -d --force-recreate flask-api\n"
    "(if it is not AutoMem that listens there: export AUTOMEM_API_URL=... to where AutoMem is; if only a proxy answers"
    " for a stopped AutoMem: to AutoMem's own address, such as http://localhost:8001)"
)


def verify_files(site: Site, wanted: Wanted, stack: ExitStack, options: Options) -> VerifiedFiles:
    """Prove every file before any store is touched. Raises BackupDamaged, NoEngine, StoreFailed."""
    proved = VerifiedFiles()
    for text in wanted.notes:
        site.notice(f"warning: {text}")
    if wanted.archive:
        assert site.collection is not None
        site.say(f"proving {wanted.archive}")
        if wanted.bare:
            backup = open_bare(wanted.archive, site.collection)
        else:
            backup = open_backup(wanted.archive, wanted.collection_component)
        require_same_name(backup, site.collection)
        check_version(backup, site.collection.qdrant, force=options.force_version)
        require_target(site.collection.qdrant, site.collection.collection)
        proved.placement = place(backup, site.collection)
    if wanted.rdb:
        assert site.graph is not None
        site.say(f"proving {wanted.rdb}: loading it into a scratch FalkorDB")
        opened = graphs.open_backup(wanted.rdb, site.graph, site.engines, wanted.graph_component)
        proved.graph = stack.enter_context(opened)
        graphs.require_version(proved.graph, site.graph)
        graphs.require_target(proved.graph, site.graph)
        _tell_left_out(site, site.graph, proved.graph, wanted.graph_component)
    for component, server in (
        (wanted.graph_component, _server(site.graph)),
        (wanted.collection_component, _server(site.collection)),
    ):
        if component and not same_server(component.server["address"], server):
            site.notice(
                f"warning: {component.file.name} was taken from {component.server['address']}, it goes to {server}"
            )
    return proved


def _tell_left_out(
    site: Site, target: GraphSource, backup: graphs.GraphBackup, component: GraphComponent | None
) -> None:
    """Name what a restore of the graph does not bring back: function libraries, and an expiry of its key."""
    held = component.functions if component else []
    if backup.scratch:
        held = [*held, *function_libraries(backup.scratch.conn)]
    missing = sorted(set(held) - set(function_libraries(target.conn))) if held else []
    if missing:
        site.notice(
            "warning: the backup's server had function libraries (GRAPH.UDF) that this one lacks:"
            f" {listed(missing)}. A restore of the graph does not bring them back: GRAPH.UDF LOAD brings them from"
            " their code"
        )
    live = expires_at(target.conn, target.graph)
    for whose, moment in (
        ("the backup's key had", component.expires if component else ""),
        ("the live key has", live),
    ):
        if moment:
            site.notice(
                f"warning: {whose} an expiry ({moment}), the restored graph has none: EXPIREAT sets one"
            )


def _server(source: GraphSource | CollectionSource | None) -> str:
    if isinstance(source, GraphSource):
        return source.address.display
    return source.qdrant.display if source else ""


def _is_here(target: GraphSource) -> bool:
    return bool(target.address.unix_socket) or is_loopback(target.address.host)


def require_quiet(site: Site, backup: graphs.GraphBackup, options: Options) -> None:
    """Refuse the graph while AutoMem may run: its caches would write values under wrong names.

    With `while_running` it goes on only where labels, relationship types and property keys are the same, in order.
    """
    assert site.graph is not None
    answer, url = ask_health(site.api), without_login(site.api.url)
    if answer.presence == "unresolved":
        site.notice(_unknown(answer, url))
        return
    if answer.presence == "absent":
        if not answer.seen and is_this_machine(site.api.url) and not _is_here(site.graph):
            site.notice(
                f"warning: nothing listens at {url}, on this machine, and FalkorDB is at {_server(site.graph)}: if"
                " AutoMem runs elsewhere, make sure that it is stopped, or set AUTOMEM_API_URL"
            )
        if answer.seen:
            site.notice(
                f"warning: another service than AutoMem answers at {url} ({answer.seen}): make sure that AutoMem is"
                " stopped, wherever it runs"
            )
        return
    _require_harmless(site.graph, backup, options, _may_run(answer, url))


def require_still_quiet(site: Site, backup: graphs.GraphBackup | None, options: Options) -> None:
    """`require_quiet` once more, right before a switch: hours may have passed, and AutoMem may have been started."""
    if backup is None or site.graph is None:
        return
    answer = ask_health(site.api)
    if answer.presence in {"running", "silent"}:
        text = f"AutoMem was started meanwhile: {_may_run(answer, without_login(site.api.url))}"
        _require_harmless(site.graph, backup, options, text)


def _require_harmless(target: GraphSource, backup: graphs.GraphBackup, options: Options, text: str) -> None:
    """Raise UsageProblem with this text; with `while_running` only where names have other numbers in the backup."""
    if not options.while_running:
        raise UsageProblem(text, next_step=_STOP_AUTOMEM)
    if target.graph in list_graphs(target.conn):
        graphs.require_same_numbers(backup, target)


def notify_other_clients(site: Site) -> None:
    """Name who else is connected to FalkorDB: they are never told that the graph was replaced."""
    assert site.graph is not None
    try:
        others = other_clients(site.graph.conn)
    except MigrationError as error:
        site.notice(f"warning: who else is connected to FalkorDB cannot be told: {error}")
        return
    if not others:
        return
    named = ", ".join(
        one_line(f"{one.address} ({one.command}, {one.idle_seconds} s ago)") for one in others[:_NAMED]
    )
    more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    site.notice(
        f"warning: {len(others)} other client(s) of FalkorDB: {named}{more}. One that knows the graph reads and writes"
        " under wrong names after the switch, until it is restarted"
    )


def _unknown(answer: HealthAnswer, url: str) -> str:
    hint = container_hint(urlsplit(url).hostname or "", "AUTOMEM_API_URL=http://localhost:8001").strip()
    return (
        f"warning: whether AutoMem is running cannot be checked: AUTOMEM_API_URL is {url}, and {answer.seen}."
        f" Make sure that AutoMem is stopped, wherever it runs{f'; {hint}' if hint else ''}"
    )


def _may_run(answer: HealthAnswer, url: str) -> str:
    how = f"is running ({url} answers)" if answer.health else f"may be running ({url}: {answer.seen})"
    return f"AutoMem {how}: after the graph is replaced its caches would write values under wrong names"


_PAGE = 500
_HASH, _MODULUS = "content", 1 << 62


def newer_than(site: Site, proved: VerifiedFiles) -> NewerThanBackup:
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


def _contents_of(conn: redis.Redis, graph: str) -> TemporaryIdTable:
    """By id, the sum of the hashes of all contents that bear it: an id may be used twice."""
    table = TemporaryIdTable()
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
    with TemporaryIdTable() as kept:
        for page in backup.expected():
            kept.put((one, None) for one in page)
        for points in scroll(live.qdrant, live.collection):
            known = kept.payloads([point.id for point in points])
            for point in points:
                if point.id not in known:
                    found.added += 1
                    found.name(point.id)
    return found
