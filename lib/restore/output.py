"""What restore_from_backup.py prints: the plan, what was restored, the settings that go with it."""

from __future__ import annotations

from shlex import quote
from typing import Any

from lib.backup.manifest import Manifest
from lib.clients.falkordb.connection import list_graphs
from lib.clients.falkordb.queries import counts
from lib.clients.falkordb.swap import memory_used
from lib.clients.qdrant.collection import get_state, health
from lib.config import Config
from lib.console import Console, size_text
from lib.dimensions import is_plain, provider_of
from lib.errors import DONE, listed
from lib.restore.collection import RestorePlan
from lib.restore.graph import GraphBackup
from lib.restore.preflight import Newer, Site, VerifiedFiles, newer_memories, newer_points
from lib.restore.run import Restored
from lib.show_config import restart_lines, settings_lines

# The graph alone: no setting goes with it, but AutoMem has cached labels and keys by the old graph's numbers.
_RESTART_GRAPH = """\
  restart AutoMem: its caches are of the old graph
    Docker:   docker compose up -d --force-recreate flask-api
    systemd:  sudo systemctl restart automem
    Railway:  railway redeploy"""


def show_restore_plan(site: Site, files: VerifiedFiles, console: Console) -> int:
    """Print what a restore would do: --dry-run stops before the first write."""
    document: dict[str, Any] = {}
    stores, plans = [], []
    memories = points = None
    if files.graph:
        memories = newer_memories(files.graph)
        plan, text = _graph_plan(files.graph)
        document["graph"] = plan | {"newer": _newer(memories)}
        plans.append(text)
    if files.plan:
        points = newer_points(files.plan)
        plan, text = _collection_plan(files.plan)
        document["collection"] = plan | {"newer": _newer(points)}
        plans.append(text)
    if site.graph:
        stores.append(f"FalkorDB {site.graph.address.display}/{site.graph.graph}")
    if site.collection:
        stores.append(f"Qdrant {site.collection.qdrant.display}/{site.collection.collection}")
    how, where = "without a safety backup", "nowhere: --no-safety-backup"
    if site.safety:
        how, where = "after a safety backup", "in the safety backup that a restore takes"
    first = f"would restore, {how}, onto {' and '.join(stores)}:"
    console.result(document, "\n".join([first, *plans, *files.left_out, *newer_lines(memories, points, where)]))
    return DONE


def _graph_plan(backup: GraphBackup) -> tuple[dict[str, Any], str]:
    """The graph of the file and the one that it replaces, as JSON and as a line."""
    target, held, live, now = backup.target, backup.verification.counts, None, "absent"
    if target.graph in list_graphs(target.conn):
        seen = counts(target.conn, target.graph)
        live = {"nodes": seen.nodes, "relationships": seen.relationships}
        now = f"{seen.nodes:,} nodes, {seen.relationships:,} relationships"
    size, memory = backup.path.stat().st_size, memory_used(backup.scratch.conn) if backup.scratch else None
    text = backup.verification.note
    if held:
        text = f"{held.nodes:,} nodes, {held.relationships:,} relationships, {size_text(memory or 0)} in memory"
    document = {
        "name": target.graph,
        "file": str(backup.path),
        "bytes": size,
        "memory_bytes": memory,
        "nodes": held.nodes if held else None,
        "relationships": held.relationships if held else None,
        "note": backup.verification.note,
        "live": live,
    }
    return document, f"graph '{target.graph}': {text} ({size_text(size)} file); now: {now}"


def _collection_plan(plan: RestorePlan) -> tuple[dict[str, Any], str]:
    """The collection of the file and the one that it replaces, as JSON and as a line."""
    backup, name, qdrant = plan.backup, plan.target.collection, plan.target.qdrant
    state = health(qdrant, name)
    live: dict[str, Any] | None = None if state == "missing" else {"state": state}
    now = "absent" if state == "missing" else str(state)
    if live and state == "live":
        seen = get_state(qdrant, name)
        live |= {"points": seen.points, "size": seen.size, "vector_bytes": 4 * seen.points * seen.size}
        now = f"{seen.points:,} points of {seen.size}d ({size_text(live['vector_bytes'])} of vectors)"
    size, snapshot = backup.path.stat().st_size, None
    sizes = f"{size_text(size)} file"
    if backup.snapshot.segments:  # a backup of AutoMem's has no snapshot
        snapshot = backup.archive.snapshot.size
        sizes += f", {size_text(snapshot)} snapshot"
    document = {
        "name": name,
        "file": str(backup.path),
        "bytes": size,
        "snapshot_bytes": snapshot,
        "points": backup.points,
        "size": backup.snapshot.size,
        "live": live,
    }
    points = "an unknown number of" if backup.points is None else f"{backup.points:,}"
    return document, f"collection '{name}': {points} points of {backup.snapshot.size}d ({sizes}); now: {now}"


def _newer(found: Newer | None) -> dict[str, Any] | None:
    return None if found is None else {"added": found.added, "changed": found.changed, "ids": found.named}


def newer_lines(memories: Newer | None, points: Newer | None, where: str) -> list[str]:
    """What the stores hold and the backup does not, and where it remains."""
    lines = []
    for what, found in (("memories", memories), ("points", points)):
        if not found:
            continue
        changed = f", with another content than in it: {found.changed:,}" if found.changed else ""
        more = "" if found.added + found.changed <= len(found.named) else ", ..."
        lines.append(
            f"{what} newer than the backup: {found.added:,}{changed} ({listed(found.named)}{more})"
            f"\n  they remain {where}"
        )
        if found is points and memories is None:
            lines.append(
                "  and in the graph; this embeds them again:\n  python scripts/reembed_embeddings.py --only-missing"
            )
    return lines


def show_restored(done: Restored, files: VerifiedFiles, config: Config, console: Console) -> int:
    """Print what was restored, where the old state is, and the settings that go with it."""
    lines = [*done.notes]
    document: dict[str, object] = {"safety_backup": done.safety.name if done.safety else None}
    if files.graph:
        digest, how = files.graph.digest, "digest equal"
        if digest is None:
            how = "not compared: no FalkorDB engine is installed here"
        lines.append(f"graph '{files.graph.target.graph}' restored from {files.graph.path}, {how}")
        document["graph"] = {"file": str(files.graph.path), "digest": digest.digest if digest else None}
    if files.plan:
        one = files.plan.backup
        lines.append(
            f"collection '{config.collection}' restored from {one.path}: {len(one.ids):,} points of"
            f" {one.snapshot.size}d"
        )
        document["collection"] = {"file": str(one.path), "points": len(one.ids), "size": one.snapshot.size}
    lines += files.left_out
    if files.left_out:
        document["left_out"] = list(files.left_out)
    if done.safety:
        lines.append(f"the state before: {done.safety.path}")
    saved = done.late_writes or (done.safety.path if done.safety else None)
    where = f"in {saved}" if saved else "nowhere: there was no safety backup"
    lines += newer_lines(done.memories, done.points, where)
    document["newer"] = {"graph": _newer(done.memories), "collection": _newer(done.points)}
    if done.late_writes:
        lines.append(f"the old graph as it was at the cutover, with writes after the safety backup: {done.late_writes}")
        document["late_writes"] = str(done.late_writes)
    restart = _RESTART_GRAPH
    if files.plan:
        facts = files.plan.backup.archive.facts
        provider = provider_of(facts)
        settings = settings_lines(files.plan.backup.snapshot.size, str(facts["model"]), config, provider)
        restart = restart_lines(provider, named=not is_plain(config.settings, config.spec.provider))
        document["settings"] = [line.strip() for line in settings if line]
        lines += settings
    document["notes"] = done.notes
    lines += ["", "next:", restart, "  python scripts/verify_migration.py"]
    console.result(document, "\n".join(lines))
    return DONE


def undo_restore(safety: Manifest | None) -> str:
    """The command that undoes a restore."""
    if safety is None:
        return "  (none: there was nothing before, or --no-safety-backup was given)"
    return f"  python scripts/restore_from_backup.py {quote(str(safety.path))}"
