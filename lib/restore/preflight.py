"""Before a restore changes anything: files verified, targets able, AutoMem stopped, newer data counted."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import urlsplit

from lib.backup.automem_contents import NOT_HELD, GraphFacts, require_uncut
from lib.backup.automem_files import AutoMemFile
from lib.backup.collection import CollectionSource
from lib.backup.graph import GraphSource
from lib.backup.manifest import CollectionComponent, GraphComponent
from lib.backup.points import TemporaryIdTable, as_id
from lib.clients.automem import AutoMemApi, HealthAnswer, ask_health
from lib.clients.falkordb.connection import expires_at, function_libraries, list_graphs
from lib.clients.falkordb.queries import MEMORY_LABEL, Row, nodes, pages, plain_value
from lib.clients.falkordb.scratch import Engine
from lib.clients.falkordb.swap import other_clients
from lib.clients.qdrant.collection import health, refuse_alias
from lib.clients.qdrant.points import PointId, scroll
from lib.clients.qdrant.snapshots import preflight_upload, restorable
from lib.concurrency import BackgroundTask, CancelToken, ProgressBar
from lib.errors import MigrationError, StoreFailed, UsageProblem, listed, one_line
from lib.network import container_hint, is_loopback, is_this_machine, same_server, without_login
from lib.restore import graph as graphs
from lib.restore.collection import FROM_GRAPH, Part, RestorePlan, plan_restore
from lib.restore.graph import GraphBackup
from lib.restore.inputs import Input, Inputs, open_archive, open_bare

_STOP_AUTOMEM = (
    "stop AutoMem, not the stores, in its folder:\ndocker compose stop flask-api\n"
    "then run the same command again, and start AutoMem afterwards:\n"
    "docker compose up -d --force-recreate flask-api\n"
    "if it is not AutoMem that listens there, or only a proxy answers for it, name AutoMem's own address:\n"
    "export AUTOMEM_API_URL=http://localhost:8001"
)
_NAMED_CLIENTS = 3
_NAMED_IDS = 20


@dataclass(frozen=True)
class Site:
    """The opened stores (None: not needed), the backup folder, the scratch engines, AutoMem's API, and callbacks.

    `say` is silent with --quiet, `notice` is not. `again` is the command line of this run.
    """

    graph: GraphSource | None
    collection: CollectionSource | None
    folder: Path
    targets: list[str]
    engines: list[Engine]
    api: AutoMemApi
    bar: ProgressBar
    say: Callable[[str], None]
    notice: Callable[[str], None]
    again: str = "the same command again"
    forget_saved: Callable[[], None] = lambda: None  # drops the payloads that migrations saved of the collection
    safety: bool = True  # take a safety backup
    force_version: bool = False
    while_running: bool = False
    force_incomplete: bool = False  # restore what a cut backup of AutoMem's holds


@dataclass(frozen=True)
class VerifiedFiles:
    """The verified backups. A scratch server has the graph's loaded while the restore runs.

    `left_out`: what the files do not hold, for the operator.
    """

    graph: GraphBackup | None = None
    plan: RestorePlan | None = None
    left_out: tuple[str, ...] = ()


def verify_files(site: Site, inputs: Inputs, stack: ExitStack) -> VerifiedFiles:
    """Verify every file before any store is touched. Raises BackupDamaged, NoEngine, StoreFailed."""
    if inputs.warning:
        site.notice(f"warning: {inputs.warning}")
    plan = None
    left_out = [NOT_HELD[one.automem.kind] for one in (inputs.graph, inputs.collection) if one and one.automem]
    for text in left_out:
        site.notice(text)
    for path in [one.path for one in (inputs.collection, inputs.graph) if one]:
        site.say(f"verifying {path}")
    with BackgroundTask(lambda task: _loaded(site, inputs.graph, stack, task.stop)) as loading:
        if inputs.collection:
            assert site.collection is not None
            plan = _verified_archive(site, site.collection, inputs.collection, stack)
        graph, held = loading.result()
    if graph and inputs.graph:
        if held and inputs.graph.automem:
            points = plan.backup.archive.ids if plan and inputs.collection and inputs.collection.automem else 0
            left_out += _left_out_of(site, inputs.graph.automem, held, points)
        graphs.require_swap(graph)
        _warn_left_out(site, graph, inputs.graph.component)
    servers = (graph.target.address.display if graph else "", plan.target.qdrant.display if plan else "")
    for one, server in zip((inputs.graph, inputs.collection), servers, strict=True):
        component = one.component if one else None
        if component and not same_server(component.server["address"], server):
            site.notice(
                f"warning: {component.file.name} was taken from {component.server['address']}, it goes to {server}"
            )
    return VerifiedFiles(graph, plan, tuple(left_out))


def _verified_archive(
    site: Site, target: CollectionSource, file: Input[CollectionComponent], stack: ExitStack
) -> RestorePlan:
    """Verify the archive, and that this server can take it and this key may restore it. The stack closes it."""
    if file.automem:
        from lib.restore.automem_backup import PointsPlan, open_points  # imports numpy

        backup = open_points(file.automem, target)
    else:
        backup = open_bare(file.path, target) if file.bare else open_archive(file.path, file.component)
    stack.callback(backup.close)
    facts = backup.archive.facts
    if facts["collection"] != target.collection:
        raise UsageProblem(
            f"{backup.path} is a backup of collection '{facts['collection']}', not of '{target.collection}'"
            " (QDRANT_COLLECTION)",
            next_step=f"if that is the collection to restore:\nexport QDRANT_COLLECTION={quote(facts['collection'])}",
        )
    # A bare snapshot does not record its server's version, so only the trial restore can find out.
    is_checked = not (backup.bare or site.force_version)
    if is_checked and (reason := restorable(str(facts["server"]["version"]), target.qdrant.version())):
        raise StoreFailed(
            f"{backup.path.name} cannot be restored here: {reason}",
            next_step=f"run a Qdrant of the backup's version (or its next minor), or add --force-version\n{FROM_GRAPH}",
        )
    refuse_alias(target.qdrant, target.collection)
    preflight_upload(target.qdrant, f"{target.collection}__try_{secrets.token_hex(4)}")
    if file.automem:
        return PointsPlan(backup, target, (Part(target.qdrant, backup.archive.snapshot),))
    return plan_restore(backup, target)


def _loaded(
    site: Site, file: Input[GraphComponent] | None, stack: ExitStack, stop: CancelToken
) -> tuple[GraphBackup | None, GraphFacts | None]:
    """Verify the graph's file and load it into a scratch FalkorDB until the stack ends; of AutoMem's: what it holds."""
    if not file or not site.graph:
        return None, None
    if file.automem:
        from lib.restore.automem_backup import open_graph

        return stack.enter_context(open_graph(file.automem, site.graph, site.engines, stop))
    return stack.enter_context(graphs.open_rdb(file.path, site.graph, site.engines, file.component, stop)), None


def _left_out_of(site: Site, source: AutoMemFile, facts: GraphFacts, points: int) -> list[str]:
    """Report what a backup of AutoMem's does not hold of its graph. Raises BackupDamaged if it shows signs of a cut."""
    signs = facts.signs_of_a_cut(points)
    if not site.force_incomplete:
        require_uncut(source, signs)
    left_out = [f"{source.display} is incomplete: {sign}" for sign in signs]
    if facts.points:
        left_out.append(f"maps of latitude and longitude come back as points: {listed(sorted(facts.points))}")
    for text in left_out:
        site.notice(f"warning: {text}")
    return left_out


def _warn_left_out(site: Site, backup: GraphBackup, component: GraphComponent | None) -> None:
    """Name what a restore of the graph does not restore: function libraries, and an expiry of its key."""
    target = backup.target
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
    for whose, moment in (("the backup's key had", component.expires if component else ""), ("the live key has", live)):
        if moment:
            site.notice(f"warning: {whose} an expiry ({moment}), the restored graph has none: EXPIREAT sets one")


def require_quiet(site: Site, backup: GraphBackup) -> None:
    """Refuse to replace the graph while AutoMem may run: its caches would write values under wrong names.

    With --while-running it is refused only if labels, relationship types or property keys differ, or their order.
    """
    answer, url, address = ask_health(site.api), without_login(site.api.url), backup.target.address
    if answer.presence == "unresolved":
        hint = container_hint(urlsplit(url).hostname or "", "AUTOMEM_API_URL=http://localhost:8001").strip()
        site.notice(
            f"warning: whether AutoMem is running cannot be checked: AUTOMEM_API_URL is {url}, and {answer.seen}."
            f" Make sure that AutoMem is stopped, wherever it runs{f'; {hint}' if hint else ''}"
        )
    elif answer.presence != "absent":
        _refuse_running(site, backup, answer)
    elif answer.seen:
        site.notice(
            f"warning: another service than AutoMem answers at {url} ({answer.seen}): make sure that AutoMem is"
            " stopped, wherever it runs"
        )
    elif is_this_machine(site.api.url) and not (address.unix_socket or is_loopback(address.host)):
        site.notice(
            f"warning: nothing listens at {url}, on this machine, and FalkorDB is at {address.display}: if AutoMem"
            " runs elsewhere, make sure that it is stopped, or set AUTOMEM_API_URL"
        )


def require_still_quiet(site: Site, backup: GraphBackup) -> None:
    """`require_quiet` right before a cutover: AutoMem may have been started during the trial restores."""
    answer = ask_health(site.api)
    if answer.presence in {"running", "silent"}:
        _refuse_running(site, backup, answer, "AutoMem was started meanwhile: ")


def _refuse_running(site: Site, backup: GraphBackup, answer: HealthAnswer, before: str = "") -> None:
    """Raise UsageProblem; with --while-running only if names have other numbers in the backup."""
    if not site.while_running:
        url = without_login(site.api.url)
        how = f"is running ({url} answers)" if answer.health else f"may be running ({url}: {answer.seen})"
        text = f"{before}AutoMem {how}: after the graph is replaced its caches would write values under wrong names"
        raise UsageProblem(text, next_step=_STOP_AUTOMEM)
    if backup.target.graph in list_graphs(backup.target.conn):
        graphs.require_same_numbers(backup)


def notify_other_clients(site: Site, target: GraphSource) -> None:
    """Name who else is connected to FalkorDB: clients are not notified that the graph was replaced."""
    try:
        others = other_clients(target.conn)
    except MigrationError as error:
        site.notice(f"warning: the other clients of FalkorDB cannot be listed: {error}")
        return
    if not others:
        return
    named = ", ".join(one_line(f"{one['addr']} ({one['cmd']}, {one['idle']} s ago)") for one in others[:_NAMED_CLIENTS])
    more = f" and {len(others) - _NAMED_CLIENTS} more" if len(others) > _NAMED_CLIENTS else ""
    clients = "1 other client" if len(others) == 1 else f"{len(others)} other clients"
    site.notice(
        f"warning: {clients} of FalkorDB: {named}{more}. A client that has cached this graph will mix up names after"
        " the cutover, until it is restarted"
    )


@dataclass(frozen=True)
class Newer:
    """Of one store: how many ids the backup lacks, of how many it has another content, and the first of these ids."""

    added: int = 0
    changed: int = 0
    named: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.changed)

    def plus(self, added: Iterable[PointId], changed: Iterable[PointId] = ()) -> Newer:
        """This and more ids."""
        added, changed = list(added), list(changed)
        named = [*self.named, *map(str, added), *map(str, changed)][:_NAMED_IDS]
        return Newer(self.added + len(added), self.changed + len(changed), named)


def newer_memories(backup: GraphBackup) -> Newer | None:
    """Compare the memories' ids and contents with the backup's; None if no engine loaded it or no graph is there."""
    live, found = backup.target, Newer()
    if backup.scratch is None or live.graph not in list_graphs(live.conn):
        return None
    stores = (backup.scratch.conn, live.graph), (live.conn, live.graph)
    read = (pages(conn, graph, nodes(MEMORY_LABEL), "n.id, n.content") for conn, graph in stores)
    with TemporaryIdTable() as saved, TemporaryIdTable() as current:
        for before, after in zip_longest(*read, fillvalue=[]):
            if before != after:  # most pages are equal
                saved.put(_contents(before))
                current.put(_contents(after))
        for page in current.ids():
            known, now = saved.payloads(page), current.payloads(page)
            found = found.plus(
                (one for one in page if one not in known), (one for one in page if known.get(one, now[one]) != now[one])
            )
    return found


def _contents(rows: Iterable[Row]) -> Iterator[tuple[PointId, dict[str, Any]]]:
    """A hash of each memory's content with its id. A memory without an id is left out: it cannot be identified."""
    for identity, content in ([plain_value(cell) for cell in row] for row in rows):
        if identity is not None:
            yield as_id(str(identity)), {"content": blake2b(repr(content).encode(), digest_size=8).hexdigest()}


def newer_points(plan: RestorePlan) -> Newer | None:
    """Compare the points' ids with the backup's; None if its ids are not known or the collection is not live."""
    ids, live, found = plan.backup.ids, plan.target, Newer()
    if not ids.complete or health(live.qdrant, live.collection) != "live":
        return None
    for points in scroll(live.qdrant, live.collection):
        known = ids.payloads([point.id for point in points])
        found = found.plus(point.id for point in points if point.id not in known)
    return found
