"""What backup_automem.py tells: the new set, the sets there are, proofs, deletions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from lib.console import Console, size_text, table
from lib.errors import DONE, REMAINING, VERIFICATION_FAILED, listed

if TYPE_CHECKING:
    from lib.backup.catalog import Cleanup
    from lib.backup.check import FileVerification
    from lib.backup.collection import CollectionSource
    from lib.backup.copies import Catalog, Uploaded
    from lib.backup.graph import GraphSource
    from lib.backup.manifest import GraphComponent, Manifest

# Of the kinds of sets that `latest` never means.
_REMARKS = {
    "graph only": ("  graph only",),
    "collection only": ("  collection only",),
    "safety copy": ("  safety copy: a restore took it of what it replaced",),
}


def show_sources(
    graph: GraphSource | None,
    collection: CollectionSource | None,
    folder: Path,
    console: Console,
    elsewhere: str = "",
) -> int:
    """What a backup would take: --dry-run."""
    from lib.clients.falkordb.connection import require_graph
    from lib.clients.falkordb.queries import counts
    from lib.clients.qdrant.collection import get_state
    from lib.files import free_bytes

    rows: list[tuple[str, str]] = []
    if graph:
        require_graph(graph.conn, graph.graph, graph.address)
        seen = counts(graph.conn, graph.graph)
        rows.append((f"graph '{graph.graph}'", f"{seen.nodes:,} nodes, {seen.relationships:,} relationships"))
    if collection:
        state = get_state(collection.qdrant, collection.collection)
        rows.append((f"collection '{state.name}'", f"{state.points:,} points of {state.size}d"))
    rows.append(("folder", f"{folder}, {size_text(free_bytes(folder))} free"))
    if elsewhere:
        rows.append(("copy", elsewhere))
    console.result(dict(rows), "would back up:\n" + table(rows))
    return DONE


_SAME_DISK = "; that is the disk of the backup folder: is the other one mounted? A lost disk takes both"


def show_backup(manifest: Manifest, console: Console, uploaded: Uploaded | None = None) -> int:
    """The new set; exit code 3 where a half is not even `checked`."""
    from lib.backup.manifest import CHECKED, UNVERIFIED

    rows = []
    if manifest.graph:
        graph = manifest.graph
        what = f"{graph.nodes:,} nodes, {graph.relationships:,} relationships"
        rows.append(
            (graph.file.name, size_text(graph.file.size), what, _proof(graph.proof, graph.proof_note))
        )
    if manifest.collection:
        one = manifest.collection
        what = f"{one.points:,} points, {one.size}d, {one.model} ({one.model_known})"
        rows.append((one.file.name, size_text(one.file.size), what, _proof(one.proof, one.proof_note)))
    lines = [table(rows), "", f"backup set: {manifest.path}"]
    drift = manifest.drift
    if drift and (drift.only_graph or drift.only_collection):
        lines.append(
            f"drift: {drift.only_graph} memories without a point, {drift.only_collection} points without a memory"
            "   (python scripts/reembed_embeddings.py --only-missing repairs it)"
        )
    document = manifest.as_json()
    if uploaded:
        document["uploaded"] = dataclasses.asdict(uploaded)
        lines.append(_arrived(uploaded))
    console.result(document, "\n".join(lines))
    for component in manifest.components:
        if component.proof == CHECKED:
            console.warn(f"{component.file.name} is CHECKED only, it was not loaded: {component.proof_note}")
    if manifest.graph:
        _warn_left_out(manifest.graph, console)
    _warn_of_clock(manifest, console)
    if manifest.proof == UNVERIFIED:
        console.warn("the backup was not proved (--no-verify): re-embed will not rely on it")
        return REMAINING
    return DONE


def _warn_of_clock(manifest: Manifest, console: Console) -> None:
    """A newer set that is dated earlier than others counts as an older one."""
    from lib.backup.catalog import dated_later

    for one in dated_later(manifest)[:1]:
        console.warn(
            f"{one.name} of the same stores is dated later than this set: a clock was or is wrong. This set does not"
            f" count as the newest; restore it by name: {manifest.path}"
        )


def _warn_left_out(component: GraphComponent, console: Console) -> None:
    """What a restore of the graph will not bring back."""
    if component.expires:
        console.warn(
            f"graph '{component.graph}' has an expiry: the server deletes it at {component.expires}."
            f" `PERSIST {component.graph}` in redis-cli keeps it"
        )
    if component.functions:
        console.warn(
            f"the server has function libraries (GRAPH.UDF): {listed(component.functions)}. A restore of the graph does"
            " not bring them back: keep their code"
        )


def _proof(level: str, note: str) -> str:
    return f"{level.upper()}: {note}"


def show_sets(catalog: Catalog, console: Console) -> int:
    """Every set, newest first: a line of figures, and one of what they are made of, within 80 columns."""
    for where in catalog.unreadable:
        why = f"python scripts/backup_automem.py --check {quote(where)}"
        console.warn(f"{where.rpartition('/')[2]} cannot be read; what is wrong says:  {why}")
    rows = [_set_row(one, complete=complete) for one, complete in catalog.sets]
    header = ("set (UTC)", "size", "nodes", "points", "vectors", "drift", "proof")
    lines = table(rows, header).splitlines()
    for at, (one, _) in reversed(list(enumerate(catalog.sets, len(lines) - len(rows)))):
        lines[at + 1 : at + 1] = [f"  {_made_of(one)}", *_REMARKS.get(one.kind, ())]
    if any(one.kind in _REMARKS for one, _ in catalog.sets):
        lines += ["", "`latest` is the newest full set (no remark); restore the others by name."]
    console.result(
        {
            "where": catalog.where,
            "sets": [
                {**one.as_json(), "kind": one.kind, "proof": one.proof, "complete": whole}
                for one, whole in catalog.sets
            ],
            "unreadable": catalog.unreadable,
        },
        "\n".join(lines) if rows else f"no backup in {catalog.where}",
    )
    return DONE


def _set_row(one: Manifest, *, complete: bool) -> tuple[str, ...]:
    graph, collection, drift = one.graph, one.collection, one.drift
    return (
        one.stamp,
        size_text(sum(file.size for file in one.files)),
        f"{graph.nodes:,}" if graph else "-",
        f"{collection.points:,}" if collection else "-",
        f"{collection.size}d" if collection else "-",
        f"{drift.only_graph + drift.only_collection:,}" if drift else "-",
        one.proof if complete else "INCOMPLETE",
    )


def _made_of(one: Manifest) -> str:
    """The second line of a set: the day, the sizes of its halves, the model (with `?` where it is guessed)."""
    parts = [one.created[:16].replace("T", " ")]
    if one.graph:
        parts.append(f"graph {size_text(one.graph.file.size)}")
    if one.collection:
        component = one.collection
        guessed = "?" if component.model_known == "guessed" else ""
        parts += [f"collection {size_text(component.file.size)}", f"{component.model}{guessed}"]
    return ", ".join(parts)


def show_verifications(
    proofs: list[FileVerification], uploaded: list[Uploaded] | None, console: Console
) -> int:
    """The restore drill, and what of it was uploaded; exit code 4 where a file is damaged."""
    rows = [(one.level.upper(), str(one.path), one.fault or one.note) for one in proofs]
    document: dict[str, object] = {"proofs": [dataclasses.asdict(one) for one in proofs]}
    lines = [table(rows) if rows else "nothing to prove"]
    if uploaded is not None:
        document["uploaded"] = [dataclasses.asdict(one) for one in uploaded]
        lines += ["", *map(_arrived, uploaded)] if uploaded else ["", "nothing was uploaded"]
    console.result(document, "\n".join(lines))
    return VERIFICATION_FAILED if any(one.fault for one in proofs) else DONE


def _arrived(one: Uploaded) -> str:
    there = f", {one.there} were there already" if one.there else ""
    how = ", encrypted" if one.encrypted else ""
    return (
        f"uploaded: {one.manifest} is whole at {one.url}{how} ({one.sent} files sent and read back, "
        f"{size_text(one.sent_bytes)}{there}){_SAME_DISK if one.same_disk else ''}"
    )


def show_deleted(plan: Cleanup, console: Console, *, dry_run: bool) -> int:
    """What --cleanup deleted, or would delete, and what it protects."""
    word = "would delete" if dry_run else "deleted"
    lines = [f"{word} {one.name} and its files" for one in plan.delete] or ["nothing to delete"]
    lines += [f"kept {name}: {why}" for name, why in plan.protected.items()]
    document = {"dry_run": dry_run, "sets": [one.name for one in plan.delete], "protected": plan.protected}
    console.result(document, "\n".join(lines))
    return DONE
