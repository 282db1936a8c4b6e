"""What restore_from_backup.py tells: the plan, what was restored, the settings that go with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.console import Console
from lib.errors import DONE
from lib.showing.settings import RESTART, settings_lines

if TYPE_CHECKING:
    from lib.backup_set.manifest import Manifest
    from lib.config import Config
    from lib.steps.restore_site import Options, Proved, Restored, Site
    from lib.vectors.transport import Qdrant


def show_restore_plan(site: Site, proved: Proved, options: Options, console: Console) -> int:
    """What a restore would do: --dry-run stops before the first write."""
    lines = []
    document: dict[str, object] = {}
    if proved.graph:
        counts, graph = proved.graph.proof.counts, proved.graph.graph
        held = f"{counts.nodes:,} nodes, {counts.relationships:,} relationships" if counts else None
        lines.append(f"graph '{graph}': {held or proved.graph.proof.note}")
        document["graph"] = {
            "nodes": counts.nodes if counts else None,
            "relationships": counts.relationships if counts else None,
        }
    if proved.collection and site.collection:
        one, name, qdrant = proved.collection, site.collection.collection, site.collection.qdrant
        live = _standing(qdrant, name)
        lines.append(f"collection '{name}': {one.proof.archive.ids:,} points of {one.size}d ({live})")
        document["collection"] = {"points": one.proof.archive.ids, "size": one.size}
    how = "after a safety backup" if options.safety else "without a safety backup"
    console.result(document, f"would restore, {how}:\n" + "\n".join(lines))
    return DONE


def _standing(qdrant: Qdrant, name: str) -> str:
    from lib.vectors.collection import get_state, health

    state = health(qdrant, name)
    if state == "missing":
        return "absent now"
    return f"{get_state(qdrant, name).points:,} points stand there" if state == "live" else f"{state} now"


def show_restored(done: Restored, proved: Proved, config: Config, console: Console) -> int:
    """What was restored, where the old state is, and the settings that go with it."""
    lines = [*done.notes]
    document: dict[str, object] = {"safety_backup": done.safety.name if done.safety else None}
    if proved.graph:
        digest, how = proved.graph.digest, "digest equal"
        if digest is None:
            how = "not compared: no FalkorDB engine is installed here"
        lines.append(f"graph '{proved.graph.graph}' restored from {proved.graph.path}, {how}")
        document["graph"] = {
            "file": str(proved.graph.path),
            "digest": digest.digest if digest else None,
        }
    if proved.collection:
        one = proved.collection
        lines.append(
            f"collection '{config.collection}' restored: {one.proof.archive.ids:,} points of {one.size}d"
        )
        document["collection"] = {"file": str(one.path), "points": one.proof.archive.ids, "size": one.size}
    if done.safety:
        lines.append(f"what stood there before: {done.safety.path}")
    if done.late_writes:
        lines.append(
            f"the old graph as it was at the switch, with writes after the safety backup: {done.late_writes}"
        )
        document["late_writes"] = str(done.late_writes)
    if proved.collection:
        settings = settings_lines(proved.collection.size, str(proved.collection.facts["model"]), config)
        document["settings"] = [line.strip() for line in settings if line]
        lines += settings
    document["notes"] = done.notes
    lines += ["", "next:", RESTART, "  python scripts/verify_migration.py"]
    console.result(document, "\n".join(lines))
    return DONE


def undo_restore(safety: Manifest | None) -> str:
    """The way back from a restore."""
    if safety is None:
        return "  (none: there was nothing before, or --no-safety-backup was given)"
    return f"  python scripts/restore_from_backup.py {safety.path}"
