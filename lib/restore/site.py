"""What a restore is given and what it finds: the site, the operator's choices, the proved files, the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lib.backup.collection import CollectionSource
from lib.backup.existing_points import as_text
from lib.backup.graph import GraphSource
from lib.backup.manifest import Manifest
from lib.backup.payloads import PointId
from lib.backup.snapshot_restore import CollectionBackup, Placement
from lib.clients.automem import AutoMemApi
from lib.clients.falkordb.scratch import Engine
from lib.concurrency import ProgressBar
from lib.restore.graph import GraphBackup

_NAMED = 20

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
    again: str = "the same command again"  # that very command line, where it is known


@dataclass(frozen=True)
class Options:
    """The operator's choices."""

    safety: bool = True
    force_version: bool = False
    while_running: bool = False


@dataclass
class VerifiedFiles:
    """The files, proved; the graph's stays loaded while the restore runs."""

    graph: GraphBackup | None = None
    placement: Placement | None = None

    @property
    def collection(self) -> CollectionBackup | None:
        """The collection's backup, wherever its snapshots go."""
        return self.placement.backup if self.placement else None

    @property
    def files(self) -> list[str]:
        """The paths of the files that are restored."""
        return [str(one.path) for one in (self.graph, self.collection) if one]


@dataclass
class Newer:
    """Of one store: how many ids the backup lacks, of how many it has another content, and the first of their ids."""

    added: int = 0
    changed: int = 0
    named: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.changed)

    def name(self, identity: PointId) -> None:
        """Name one more, while there are few."""
        if len(self.named) < _NAMED:
            self.named.append(as_text(identity))


@dataclass
class NewerThanBackup:
    """What a restore takes away; None where the file does not tell, or nothing stands there."""

    graph: Newer | None = None
    collection: Newer | None = None


@dataclass
class Restored:
    """What was done: the safety backup, where late writes to the old graph went, what an earlier run had left.

    `newer` is what stood there and was not in the files.
    """

    safety: Manifest | None = None
    late_writes: Path | None = None
    notes: list[str] = field(default_factory=list)
    newer: NewerThanBackup | None = None
