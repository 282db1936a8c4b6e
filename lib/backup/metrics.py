"""Metrics of a backup: Prometheus text for the textfile collector of node exporter, which reads `*.prom` files.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from shlex import quote

from lib.backup.catalog import Deployment, backup_sets, is_complete
from lib.backup.manifest import COLLECTION_ONLY, FULL, GRAPH_ONLY, VERIFICATION_LEVELS, Manifest
from lib.errors import FAILED, INTERRUPTED, MigrationError, UsageProblem
from lib.files import atomic_writer

_MODE = 0o644  # node exporter runs as another user
_PREFIX = "automem_backup_"
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


def recorded(
    run: Callable[[], int], path: Path, folder: Path, owner: Deployment, only: str | None, warn: Callable[[str], None]
) -> int:
    """Run a backup, and write its metrics to `path`, also if it fails. Returns its exit code.

    `only` is the store that is backed up if it is one alone. If `path` cannot be written after the run, `warn` gets the
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
            text = _text(_samples(_newest_verified(folder, owner, only), seconds, code), _labels(owner, only))
            with atomic_writer(target) as stream:
                os.fchmod(stream.fileno(), _MODE)
                stream.write(text.encode())
        except (OSError, MigrationError) as error:
            warn(f"the metrics were not written to {path}: {error}")
    return code


def _labels(owner: Deployment, only: str | None) -> dict[str, str]:
    """The labels of every metric: the names of the stores that the run backs up."""
    names = {"graph": owner.graph, "collection": owner.collection}
    if only:
        del names["collection" if only == "falkordb" else "graph"]
    return names


def _newest_verified(folder: Path, owner: Deployment, only: str | None) -> Manifest | None:
    """The newest complete and verified set, as far as it holds the stores that the run backs up. No safety copy."""
    kind = {None: FULL, "falkordb": GRAPH_ONLY, "qdrant": COLLECTION_ONLY}[only]
    for one in (_narrowed(one, only) for one in backup_sets(folder)):
        if one.kind == kind and owner.owns(one) and _level(one) and is_complete(one) and not one.is_from_future:
            return one
    return None


def _narrowed(manifest: Manifest, only: str | None) -> Manifest:
    if only == "falkordb":
        return replace(manifest, collection=None, drift=None)
    return replace(manifest, graph=None, drift=None) if only else manifest


def _level(manifest: Manifest) -> int:
    """The verification level as a number; 0 if the set was not verified."""
    return VERIFICATION_LEVELS.index(manifest.proof)


def _samples(manifest: Manifest | None, seconds: float, code: int) -> _Samples:
    """The values of each metric with their own labels. Without a set, only those of the run."""
    found: _Samples = {"last_run_duration_seconds": [({}, round(seconds, 3))], "last_run_exit_code": [({}, code)]}
    if manifest is None:
        return found
    graph, collection, drift = manifest.graph, manifest.collection, manifest.drift
    found["last_success_timestamp_seconds"] = [({}, datetime.fromisoformat(manifest.created).timestamp())]
    found["last_success_verification_level"] = [({}, _level(manifest))]
    found["size_bytes"] = [
        ({"component": one.file.name.partition("/")[0]}, one.file.size) for one in manifest.components
    ]
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
            pairs = ",".join(f'{label}="{_escaped(one)}"' for label, one in {**labels, **own}.items())
            lines.append(f"{_PREFIX}{name}{{{pairs}}} {value}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
