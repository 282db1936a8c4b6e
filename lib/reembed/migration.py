"""One re-embedding: its opened stores, what it was asked, and what it has done so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lib.backup.graph import GraphSource
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import ProgressBar
from lib.dimensions import EmbeddingSpec
from lib.journal import Journal
from lib.reembed.embed import EmbeddingTotals


@dataclass(frozen=True)
class Target:
    """The collection that is made anew, and what its vectors are."""

    qdrant: Qdrant
    collection: str
    spec: EmbeddingSpec


@dataclass
class Migration:
    """A run on one target.

    `fresh`: what was bought earlier does not count. `in_place`: no staged collection. `no_switch`: nothing but that.
    `planned`: memories to have a point when the plan was shown. `room`: bytes that the server needs beside the live
    collection. `undo`: the way back, as commands. `absent_seconds`: how long the collection was absent or incomplete.
    `way`: how the new one came under its name. `upsert_rate`: points a second, as seen. `aliases_taken`: aliases that
    somebody else took meanwhile. `odd`: memories whose content in the graph is not what was embedded, with the reason.
    `textless`: points that leave the collection though their memory exists, for neither has a text. `indexed`: whether
    the index was seen whole. `unlike`: the backup whose settings the collection, which is empty, does not have.
    `report`: the files that tell of the run.
    `again`: the command line, without secrets.
    """

    graph: GraphSource
    target: Target
    cache: EmbeddingCache
    folder: Path
    targets: list[str]
    bar: ProgressBar
    fresh: bool = False
    in_place: bool = False
    no_switch: bool = False
    journal: Journal | None = None
    planned: int = 0
    room: int = 0
    bought: EmbeddingTotals = field(default_factory=EmbeddingTotals)
    mended: int = 0
    removed: int = 0
    absent_seconds: float = 0.0
    way: str = ""
    upsert_rate: float = 0.0
    undo: str = ""
    aliases_taken: list[str] = field(default_factory=list)
    odd: list[tuple[str, str]] = field(default_factory=list)
    textless: list[str] = field(default_factory=list)
    unlike: str = ""
    indexed: bool = True
    report: list[Path] = field(default_factory=list)
    again: str = "python scripts/reembed_embeddings.py"

    @property
    def spec(self) -> EmbeddingSpec:
        """What the new vectors are."""
        return self.target.spec

    @property
    def staged(self) -> str:
        """The name of the collection that is built beside the live one."""
        return f"{self.target.collection}__next"

    @property
    def has_staged(self) -> bool:
        """Whether the staged collection, if one stands there, is this run's own."""
        return self.journal is not None and self.journal.fact("staged_collection") == self.staged

    def reached(self, phase: str) -> bool:
        """Whether the run that is gone on with ever announced `phase`."""
        return self.journal is not None and self.journal.has_reached(phase)


def journal_of(run: Migration) -> Journal:
    """The run's journal, which is open by now."""
    assert run.journal is not None
    return run.journal
