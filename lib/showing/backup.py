"""What backup_automem.py tells: the new set, the sets there are, proofs, deletions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from lib.console import Console, size_text, table
from lib.errors import DONE, REMAINING, VERIFICATION_FAILED

if TYPE_CHECKING:
    from lib.backup_set.manifest import Manifest
    from lib.steps.drill import Proof
    from lib.steps.take_collection import CollectionSource
    from lib.steps.take_graph import GraphSource


def show_sources(
    graph: GraphSource | None, collection: CollectionSource | None, folder: Path, console: Console
) -> int:
    """What a backup would take: --dry-run."""
    from lib.files import free_bytes
    from lib.graph.client import require_graph
    from lib.graph.read import counts
    from lib.vectors.collection import get_state

    rows: list[tuple[str, str]] = []
    if graph:
        require_graph(graph.conn, graph.graph, graph.address)
        seen = counts(graph.conn, graph.graph)
        rows.append((f"graph '{graph.graph}'", f"{seen.nodes:,} nodes, {seen.relationships:,} relationships"))
    if collection:
        state = get_state(collection.qdrant, collection.collection)
        rows.append((f"collection '{state.name}'", f"{state.points:,} points of {state.size}d"))
    rows.append(("folder", f"{folder}, {size_text(free_bytes(folder))} free"))
    console.result(dict(rows), "would back up:\n" + table(rows))
    return DONE


def show_backup(manifest: Manifest, console: Console) -> int:
    """The new set; exit code 3 where a half is not even `checked`."""
    from lib.backup_set.manifest import UNPROVED

    rows = []
    if manifest.graph:
        half = manifest.graph
        what = f"{half.nodes:,} nodes, {half.relationships:,} relationships"
        rows.append((half.file.name, size_text(half.file.size), what, _proof(half.proof, half.proof_note)))
    if manifest.collection:
        one = manifest.collection
        what = f"{one.points:,} points, {one.size}d, {one.model} ({one.model_known})"
        rows.append((one.file.name, size_text(one.file.size), what, _proof(one.proof, one.proof_note)))
    lines = [table(rows), "", f"backup set: {manifest.path}"]
    drift = manifest.drift
    if drift and (drift.only_graph or drift.only_collection):
        lines.append(
            f"drift: {drift.only_graph} memories without a point, {drift.only_collection} points without a memory"
            "   (reembed_embeddings.py --only-missing repairs it)"
        )
    console.result(manifest.as_json(), "\n".join(lines))
    if manifest.proof == UNPROVED:
        console.warn("the backup was not proved (--no-verify): re-embed will not rely on it")
        return REMAINING
    return DONE


def _proof(level: str, note: str) -> str:
    return f"{level.upper()}: {note}"


def show_sets(folder: Path, console: Console) -> int:
    """Every set, newest first."""
    from lib.backup_set.sets import all_sets, is_complete, manifest_paths

    sets = all_sets(folder)
    for path in set(manifest_paths(folder)) - {one.path for one in sets}:
        console.warn(f"{path.name} cannot be read: backup_automem.py --check {path} says why")
    rows = [
        (
            one.stamp,
            size_text(sum(half.file.size for half in one.halves)),
            f"{one.graph.nodes:,}" if one.graph else "-",
            f"{one.collection.points:,}" if one.collection else "-",
            f"{one.collection.size}d" if one.collection else "-",
            one.collection.model if one.collection else "-",
            one.proof if is_complete(one) else "INCOMPLETE",
        )
        for one in sets
    ]
    header = ("set (UTC)", "size", "nodes", "points", "dimension", "model", "proof")
    text = table(rows, header) if rows else f"no backup in {folder}"
    console.result({"sets": [one.as_json() for one in sets]}, text)
    return DONE


def show_proofs(proofs: list[Proof], console: Console) -> int:
    """The restore drill; exit code 4 where a file is damaged."""
    rows = [(one.level.upper(), str(one.path), one.fault or one.note) for one in proofs]
    console.result(
        {"proofs": [dataclasses.asdict(one) for one in proofs]}, table(rows) if rows else "nothing to prove"
    )
    return VERIFICATION_FAILED if any(one.fault for one in proofs) else DONE


def show_deleted(chosen: list[Manifest], console: Console, *, dry_run: bool) -> int:
    """What --cleanup deleted, or would delete."""
    word = "would delete" if dry_run else "deleted"
    text = "\n".join(f"{word} {one.name} and its files" for one in chosen) or "nothing to delete"
    console.result({"dry_run": dry_run, "sets": [one.name for one in chosen]}, text)
    return DONE
