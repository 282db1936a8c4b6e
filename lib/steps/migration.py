"""One re-embedding: its opened stores, what it was asked, and what it has done so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lib.dimensions import EmbeddingSpec
from lib.embedding.spool import Spool
from lib.journal import Journal
from lib.steps.embed import Bought
from lib.steps.progress import ProgressBar
from lib.steps.switch import Target
from lib.steps.take_graph import GraphSource


@dataclass
class Migration:
    """A run on one target.

    `fresh`: what was bought earlier does not count. `planned`: memories to have a point when the plan was shown.
    `undo`: the way back, as commands. `absent_seconds`: how long the collection was absent or incomplete.
    `aliases_taken`: aliases that somebody else took meanwhile. `indexed`: whether the index was seen whole.
    """

    graph: GraphSource
    target: Target
    spool: Spool
    folder: Path
    targets: list[str]
    bar: ProgressBar
    fresh: bool = False
    journal: Journal | None = None
    planned: int = 0
    bought: Bought = field(default_factory=Bought)
    mended: int = 0
    absent_seconds: float = 0.0
    undo: str = ""
    aliases_taken: list[str] = field(default_factory=list)
    indexed: bool = True

    @property
    def spec(self) -> EmbeddingSpec:
        """What the new vectors are."""
        return self.target.spec

    def reached(self, phase: str) -> bool:
        """Whether the run that is gone on with ever announced `phase`."""
        return self.journal is not None and self.journal.has_reached(phase)
