"""What a restore asks before it touches anything: the files proved, the targets able, AutoMem at rest."""

from __future__ import annotations

from contextlib import ExitStack
from urllib.parse import urlsplit

from lib.addresses import container_hint, is_loopback, is_this_machine, same_server, without_login
from lib.automem_api import HealthAnswer, ask_health
from lib.backup_set.manifest import GraphHalf
from lib.errors import MigrationError, UsageProblem
from lib.graph.client import expires_at, function_libraries, list_graphs
from lib.graph.preflight import other_clients
from lib.shown import listed, one_line
from lib.steps import restore_graph as graphs
from lib.steps.collection_backup import (
    check_version,
    open_backup,
    open_bare,
    require_same_name,
    require_target,
)
from lib.steps.restore_files import Wanted
from lib.steps.restore_parts import place
from lib.steps.restore_site import Options, Proved, Site
from lib.steps.take_collection import CollectionSource
from lib.steps.take_graph import GraphSource

_NAMED = 3  # clients that are named one by one
_STOP_AUTOMEM = (
    "stop it, not the stores:  docker compose stop flask-api\nthen run the same command again,"
    " and start it afterwards:  docker compose up -d --force-recreate flask-api\n"
    "(if it is not AutoMem that listens there: export AUTOMEM_API_URL=... to where AutoMem is; if only a proxy answers"
    " for a stopped AutoMem: to AutoMem's own address, such as http://localhost:8001)"
)


def prove_files(site: Site, wanted: Wanted, stack: ExitStack, options: Options) -> Proved:
    """Prove every file before any store is touched. Raises BackupDamaged, NoEngine, StoreFailed."""
    proved = Proved()
    for text in wanted.notes:
        site.notice(f"warning: {text}")
    if wanted.archive:
        assert site.collection is not None
        site.say(f"proving {wanted.archive}")
        if wanted.bare:
            backup = open_bare(wanted.archive, site.collection)
        else:
            backup = open_backup(wanted.archive, wanted.collection_half)
        require_same_name(backup, site.collection)
        check_version(backup, site.collection.qdrant, force=options.force_version)
        require_target(site.collection.qdrant, site.collection.collection)
        proved.placement = place(backup, site.collection)
    if wanted.rdb:
        assert site.graph is not None
        site.say(f"proving {wanted.rdb}: loading it into a scratch FalkorDB")
        opened = graphs.open_backup(wanted.rdb, site.graph, site.engines, wanted.graph_half)
        proved.graph = stack.enter_context(opened)
        graphs.require_version(proved.graph, site.graph)
        graphs.require_target(proved.graph, site.graph)
        _tell_left_out(site, site.graph, proved.graph, wanted.graph_half)
    for half, server in (
        (wanted.graph_half, _server(site.graph)),
        (wanted.collection_half, _server(site.collection)),
    ):
        if half and not same_server(half.server["address"], server):
            site.notice(
                f"warning: {half.file.name} was taken from {half.server['address']}, it goes to {server}"
            )
    return proved


def _tell_left_out(
    site: Site, target: GraphSource, backup: graphs.GraphBackup, half: GraphHalf | None
) -> None:
    """Name what a restore of the graph does not bring back: function libraries, and an expiry of its key."""
    held = half.functions if half else []
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
    for whose, moment in (("the backup's key had", half.expires if half else ""), ("the live key has", live)):
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


def tell_other_clients(site: Site) -> None:
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
