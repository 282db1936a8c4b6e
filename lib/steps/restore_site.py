"""What a restore is given and what it finds: the site, the operator's choices, the proved files, the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lib.automem_api import AutoMemApi
from lib.backup_set.manifest import Manifest
from lib.graph.engine import Engine
from lib.steps.progress import ProgressBar
from lib.steps.restore_graph import GraphBackup
from lib.steps.restored_points import CollectionBackup
from lib.steps.take_collection import CollectionSource
from lib.steps.take_graph import GraphSource

Say = Callable[[str], None]
Undo = Callable[[Manifest | None], str]


@dataclass(frozen=True)
class Site:
    """Where a restore happens: opened stores (None: not needed), the backup folder, the engines, AutoMem's API."""

    graph: GraphSource | None
    collection: CollectionSource | None
    folder: Path
    targets: list[str]
    engines: list[Engine]
    api: AutoMemApi
    bar: ProgressBar
    say: Say
    notice: Say


@dataclass(frozen=True)
class Options:
    """The operator's choices."""

    safety: bool = True
    force_version: bool = False
    while_running: bool = False


@dataclass
class Proved:
    """The files, proved; the graph's stays loaded while the restore runs."""

    graph: GraphBackup | None = None
    collection: CollectionBackup | None = None


@dataclass
class Restored:
    """What was done: the safety backup, where late writes to the old graph went, what an earlier run had left."""

    safety: Manifest | None = None
    late_writes: Path | None = None
    notes: list[str] = field(default_factory=list)
