"""What backup_automem.py prints: the new set, the existing sets, verifications, deletions, pins; and its metrics."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from lib.backup import manifest as manifests
from lib.backup.catalog import Deployment, backup_sets, is_complete
from lib.backup.manifest import GraphComponent, Manifest
from lib.console import Console, size_text, table
from lib.errors import (
    DONE,
    FAILED,
    INTERRUPTED,
    REMAINING,
    VERIFICATION_FAILED,
    MigrationError,
    UsageProblem,
    listed,
    one_line,
)
from lib.files import atomic_writer, free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from lib.backup.check import FileVerification
    from lib.backup.collection import CollectionSource
    from lib.backup.copies import Catalog, Uploaded
    from lib.backup.graph import GraphSource
    from lib.backup.retention import Cleanup

# Of the kinds of sets that are never `latest`.
_REMARKS = {
    manifests.GRAPH_ONLY: "  graph only",
    manifests.COLLECTION_ONLY: "  collection only",
    manifests.SAFETY_COPY: "  safety copy: a restore took it of what it replaced",
}
_SAME_DISK = "the copies at {} are on the disk of the backup folder: is the other one mounted? A lost disk takes both"


def show_sources(
    graph: GraphSource | None, collection: CollectionSource | None, folder: Path, console: Console, elsewhere: str = ""
) -> int:
    """Show what a backup would hold (--dry-run)."""
    from lib.clients.falkordb.queries import counts
    from lib.clients.qdrant.collection import get_state

    rows: dict[str, str] = {}
    if graph:
        seen = counts(graph.conn, graph.graph)
        held = f"{seen.nodes:,} nodes, {seen.relationships:,} relationships"
        rows[f"graph '{graph.graph}' at {graph.address.display}"] = held
    if collection:
        state = get_state(collection.qdrant, collection.collection)
        held = f"{state.points:,} points of {state.size}d"
        rows[f"collection '{state.name}' at {collection.qdrant.display}"] = held
    rows["folder"] = f"{folder}, {size_text(free_bytes(folder))} free"
    if elsewhere:
        rows["copy"] = elsewhere
    console.result(rows, "would back up:\n" + table(list(rows.items())))
    return DONE


def show_backup(manifest: Manifest, console: Console, uploaded: Uploaded | None = None) -> int:
    """Show the new set; exit code 3 if it was not verified, or if one of the stores seems to be lost."""
    rows = []
    for one in manifest.components:
        if isinstance(one, GraphComponent):
            what = f"{one.nodes:,} nodes, {one.relationships:,} relationships"
        else:
            what = f"{one.points:,} points, {one.size}d, {one.model} ({one.model_known})"
        rows.append((one.file.name, size_text(one.file.size), what, f"{one.proof.upper()}: {one_line(one.proof_note)}"))
    lines = [table(rows), "", f"backup set: {manifest.path}"]
    drift, lost = manifest.drift, manifest.lost_store
    if drift and (drift.only_graph or drift.only_collection):
        repair = "" if lost else "; this repairs it:\n  python scripts/reembed_embeddings.py --only-missing"
        ids = f"{drift.only_graph} memories without a point, {drift.only_collection} points without a memory"
        lines.append(f"drift: {ids}{repair}")
    document = manifest.as_json()
    if uploaded:
        document["uploaded"] = asdict(uploaded)
        lines.append(_upload_line(uploaded))
    console.result(document, "\n".join(lines))
    _warn_same_disk([uploaded] if uploaded else [], console)
    for component in manifest.components:
        if component.proof == manifests.CHECKED:
            console.warn(f"{component.file.name} is CHECKED only, it was not loaded: {one_line(component.proof_note)}")
    if manifest.graph:
        _warn_left_out(manifest.graph, console)
    if manifest.proof == manifests.UNVERIFIED:
        console.warn("the backup was not verified (--no-verify): re-embed will not rely on it")
        return REMAINING
    if lost:
        console.warn(f"{lost}. If its data are lost, delete no older set and go to docs/worst-day.md")
        return REMAINING
    return DONE


def _warn_left_out(component: GraphComponent, console: Console) -> None:
    if component.expires:
        console.warn(
            f"graph '{component.graph}' has an expiry: the server deletes it at {component.expires}."
            f" `PERSIST {component.graph}` in redis-cli removes the expiry"
        )
    if component.functions:
        console.warn(
            f"the server has function libraries (GRAPH.UDF): {listed(component.functions)}. A restore of the graph does"
            " not bring them back: save their code"
        )


def show_sets(catalog: Catalog, console: Console) -> int:
    """List the sets, newest first: a line of figures and one of contents for each, within 80 columns."""
    for path in catalog.unreadable:
        command = f"python scripts/backup_automem.py --check {quote(path)}"
        console.warn(f"{path.rpartition('/')[2]} cannot be read; to see what is wrong:  {command}")
    rows = []
    for one, complete in catalog.sets:
        graph, collection, drift = one.graph, one.collection, one.drift
        row = (
            one.stamp,
            size_text(sum(file.size for file in one.files)),
            f"{graph.nodes:,}" if graph else "-",
            f"{collection.points:,}" if collection else "-",
            f"{collection.size}d" if collection else "-",
            f"{drift.only_graph + drift.only_collection:,}" if drift else "-",
            one.proof if complete else "INCOMPLETE",
        )
        rows.append(row)
    figures = table(rows, ("set (UTC)", "size", "nodes", "points", "vectors", "drift", "level")).splitlines()
    lines, sets = figures[: len(figures) - len(rows)], []
    for line, (one, complete) in zip(figures[len(lines) :], catalog.sets, strict=True):
        pinned = one.name in catalog.pinned
        lines += [line, f"  {_contents(one)}", *([_REMARKS[one.kind]] if one.kind in _REMARKS else [])]
        if pinned:
            lines.append("  pinned: no cleanup deletes it")
        sets.append(one.as_json() | {"kind": one.kind, "proof": one.proof, "complete": complete, "pinned": pinned})
    if any(one.kind in _REMARKS for one, _ in catalog.sets):
        lines += ["", "`latest` is the newest full set (no remark); restore the others by name."]
    document: dict[str, object] = {"where": catalog.where, "sets": sets, "unreadable": catalog.unreadable}
    if not rows:
        lines = [f"no backup in {catalog.where}"]
    if catalog.automem:
        document["automem"] = list(map(str, catalog.automem))
        lines += ["", "by AutoMem's own scripts, no sets; restore them by name:"]
        lines += [f"  {one}   {size_text(one.stat().st_size)}" for one in catalog.automem]
    console.result(document, "\n".join(lines))
    return DONE


def _contents(one: Manifest) -> str:
    """The day, the sizes of the components, the model (with `?` if it is guessed)."""
    parts = [one.created[:16].replace("T", " ")]
    if one.graph:
        parts.append(f"graph {size_text(one.graph.file.size)}")
    if one.collection:
        guessed = "?" if one.collection.model_known == "guessed" else ""
        parts.append(f"collection {size_text(one.collection.file.size)}, {one.collection.model}{guessed}")
    return ", ".join(parts)


def show_verifications(files: list[FileVerification], uploaded: list[Uploaded] | None, console: Console) -> int:
    """Show the verified files and what was uploaded; exit code 4 if a file has a fault."""
    rows = [(one.level.upper(), str(one.path), one.fault.removeprefix(f"{one.path} ") or one.note) for one in files]
    document: dict[str, object] = {"proofs": [asdict(one) for one in files]}
    lines = [table(rows)]
    if uploaded is not None:
        document["uploaded"] = [asdict(one) for one in uploaded]
        lines += ["", *(map(_upload_line, uploaded) if uploaded else ["nothing was uploaded"])]
    if damaged := sum(bool(one.fault) for one in files):
        lines += ["", f"{damaged} of {len(files)} files cannot be restored. Take a new backup:"]
        lines.append("  python scripts/backup_automem.py")
    console.result(document, "\n".join(lines))
    _warn_same_disk(uploaded or [], console)
    return VERIFICATION_FAILED if damaged else DONE


def _warn_same_disk(uploaded: list[Uploaded], console: Console) -> None:
    """Warn of copies that are lost with the sets. Cron shows warnings, and no result."""
    for url in sorted({one.url for one in uploaded if one.same_disk}):
        console.warn(_SAME_DISK.format(url))


def _upload_line(one: Uploaded) -> str:
    existing = f", {one.there} existed already" if one.there else ""
    how = ", encrypted" if one.encrypted else ""
    return (
        f"uploaded: {one.manifest} is complete at {one.url}{how} ({one.sent} files sent and read back, "
        f"{size_text(one.sent_bytes)}{existing})"
    )


def show_deleted(plan: Cleanup, console: Console, *, dry_run: bool) -> int:
    """Show what --cleanup deleted and which sets are protected; with --dry-run each set with what keeps it."""
    if dry_run:
        rows = [(one.stamp, one.kind, verdict) for one, verdict in plan.verdicts]
        lines = [table(rows, ("set (UTC)", "kind", "kept by")) if rows else "no set of these stores"]
        lines += ["", f"would delete {len(plan.delete)} of {len(rows)}"]
    else:
        lines = [f"deleted {one.name} and its files" for one in plan.delete] or ["nothing to delete"]
        lines += [f"kept {name}: {why}" for name, why in plan.protected.items()]
    document = {
        "dry_run": dry_run,
        "sets": [one.name for one in plan.delete],
        "kept": {one.name: verdict for one, verdict in plan.verdicts if one not in plan.delete},
        "protected": plan.protected,
    }
    console.result(document, "\n".join(lines))
    return DONE


def show_pin(stamp: str, where: str, console: Console, *, pinned: bool) -> int:
    """Show that a set is pinned now, or not any more."""
    state = "pinned: no cleanup deletes it" if pinned else "not pinned: a cleanup may delete it"
    console.result({"stamp": stamp, "where": where, "pinned": pinned}, f"{stamp} in {where} is {state}")
    return DONE


# For the textfile collector of node exporter, in the text format of
# https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
_PREFIX = "automem_backup_"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_HELP = {
    "last_success_timestamp_seconds": "When the newest complete and verified backup set began.",
    "last_success_verification_level": "Level of verification of that set: 1 checked, 2 restored.",
    "size_bytes": "Size of each component of that set.",
    "graph_nodes": "Nodes in that set.",
    "collection_points": "Points in that set.",
    "drift_ids": "Ids that are in one store only: memories without a point, points without a memory.",
    "last_run_duration_seconds": "How long the last run took.",
    "last_run_exit_code": "Exit code of the last run: 0 done, 3 not verified, others failed.",
}
_Samples = dict[str, list[tuple[dict[str, str], float]]]
_LEFT_OUT = {None: "", "falkordb": "collection", "qdrant": "graph"}  # by `--only`


def recorded(
    run: Callable[[], int], path: Path, folder: Path, owner: Deployment, only: str | None, warn: Callable[[str], None]
) -> int:
    """Run a backup, and write its metrics to `path` (`*.prom`), also if it fails. Returns its exit code.

    `only`: the store that is backed up if it is one alone. If `path` cannot be written after the run, `warn` gets the
    reason. Raises what `run` raises, and UsageProblem before it if the folder of `path` does not exist.
    """
    target = Path(os.path.realpath(path))  # a link stays
    other = target.exists() and not target.is_file()  # a folder, or a device or pipe, which root could replace
    if other or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise UsageProblem(
            f"--metrics {path} cannot be written: it must be a file in an existing folder that you may write",
            next_step="name a file in the folder of node exporter's --collector.textfile.directory; this shows yours:\n"
            f"ls -ld {quote(str(path.parent))}",
        )
    started, code = time.monotonic(), FAILED
    try:
        code = run()
    except MigrationError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    finally:
        seconds = time.monotonic() - started
        try:
            # The labels of every metric: the names of the stores that the run backs up.
            names = {"graph": owner.graph, "collection": owner.collection}
            names.pop(_LEFT_OUT[only], None)
            text = _text(_samples(folder, owner, only, seconds, code), names)
            with atomic_writer(target) as stream:
                os.fchmod(stream.fileno(), 0o644)  # node exporter runs as another user
                stream.write(text.encode())
        except (OSError, MigrationError) as error:
            warn(f"the metrics were not written to {path}: {error}")
    return code


def _samples(folder: Path, owner: Deployment, only: str | None, seconds: float, code: int) -> _Samples:
    """The values of each metric with their own labels: of the run, and of the newest complete and verified set.

    Of a set only the stores count that the run backs up. Safety copies do not count.
    """
    found: _Samples = {"last_run_duration_seconds": [({}, round(seconds, 3))], "last_run_exit_code": [({}, code)]}
    kind = {None: manifests.FULL, "falkordb": manifests.GRAPH_ONLY, "qdrant": manifests.COLLECTION_ONLY}[only]
    absent: dict[str, Any] = {_LEFT_OUT[only]: None, "drift": None} if only else {}
    sets = (replace(one, **absent) for one in backup_sets(folder))
    verified = (
        one for one in sets if one.kind == kind and one.proof != manifests.UNVERIFIED and not one.is_from_future
    )
    manifest = next((one for one in verified if owner.owns(one) and is_complete(one)), None)
    if manifest is None:
        return found
    graph, collection, drift = manifest.graph, manifest.collection, manifest.drift
    found["last_success_timestamp_seconds"] = [({}, datetime.fromisoformat(manifest.created).timestamp())]
    found["last_success_verification_level"] = [({}, manifests.VERIFICATION_LEVELS.index(manifest.proof))]
    sizes = [(one.file.name.partition("/")[0], one.file.size) for one in manifest.components]
    found["size_bytes"] = [({"component": store}, size) for store, size in sizes]
    if graph:
        found["graph_nodes"] = [({}, graph.nodes)]
    if collection:
        found["collection_points"] = [({}, collection.points)]
    if drift:
        sides = {"falkordb": drift.only_graph, "qdrant": drift.only_collection}
        found["drift_ids"] = [({"only_in": side}, count) for side, count in sides.items()]
    return found


def _text(samples: _Samples, labels: dict[str, str]) -> str:
    lines = []
    for name, meaning in _HELP.items():
        if name in samples:
            lines += [f"# HELP {_PREFIX}{name} {meaning}", f"# TYPE {_PREFIX}{name} gauge"]
        for own, value in samples.get(name, []):
            pairs = ",".join(f'{label}="{one.translate(_ESCAPES)}"' for label, one in {**labels, **own}.items())
            lines.append(f"{_PREFIX}{name}{{{pairs}}} {value}")
    return "\n".join(lines) + "\n"
