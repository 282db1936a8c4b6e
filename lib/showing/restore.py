"""What restore_from_backup.py tells: the plan, what was restored, the settings that go with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.console import Console
from lib.errors import DONE
from lib.showing.settings import RESTART, settings_lines

if TYPE_CHECKING:
    from lib.backup_set.manifest import Manifest
    from lib.config import Config
    from lib.steps.restore import Proved, Restored, Site


def show_restore_plan(site: Site, proved: Proved, console: Console) -> int:
    """What a restore would do: --dry-run stops before the first write."""
    from lib.vectors.collection import exists, get_state

    lines = []
    document: dict[str, object] = {}
    if proved.graph and proved.graph.proof.counts:
        counts = proved.graph.proof.counts
        lines.append(
            f"graph '{proved.graph.graph}': {counts.nodes:,} nodes, {counts.relationships:,} relationships"
        )
        document["graph"] = {"nodes": counts.nodes, "relationships": counts.relationships}
    if proved.collection and site.collection:
        one, name, qdrant = proved.collection, site.collection.collection, site.collection.qdrant
        live = (
            f"{get_state(qdrant, name).points:,} points stand there" if exists(qdrant, name) else "absent now"
        )
        lines.append(f"collection '{name}': {one.proof.archive.ids:,} points of {one.size}d ({live})")
        document["collection"] = {"points": one.proof.archive.ids, "size": one.size}
    console.result(document, "would restore, after a safety backup:\n" + "\n".join(lines))
    return DONE


def show_restored(done: Restored, proved: Proved, config: Config, console: Console) -> int:
    """What was restored, where the old state is, and the settings that go with it."""
    lines = [*done.notes]
    document: dict[str, object] = {"safety_backup": done.safety.name if done.safety else None}
    if proved.graph:
        lines.append(f"graph '{proved.graph.graph}' restored from {proved.graph.path}, digest equal")
        document["graph"] = {"file": str(proved.graph.path), "digest": proved.graph.digest.digest}
    if proved.collection:
        one = proved.collection
        lines.append(
            f"collection '{config.collection}' restored: {one.proof.archive.ids:,} points of {one.size}d"
        )
        document["collection"] = {"file": str(one.path), "points": one.proof.archive.ids, "size": one.size}
    if done.safety:
        lines.append(f"what stood there before: {done.safety.path}")
    if done.late_writes:
        lines.append(f"writes after the safety backup: {done.late_writes}")
    if proved.collection:
        lines += settings_lines(proved.collection.size, str(proved.collection.facts["model"]), config)
    lines += ["", "next:", RESTART, "  python scripts/verify_migration.py"]
    console.result(document, "\n".join(lines))
    return DONE


def undo_restore(safety: Manifest | None) -> str:
    """The way back from a restore."""
    if safety is None:
        return "  (none: there was nothing before, or --no-safety-backup was given)"
    return f"  python scripts/restore_from_backup.py {safety.path}"
