"""A run's journal as one node of a cluster has it: each node makes a snapshot, and each is settled by itself."""

from __future__ import annotations

from lib.journal import Journal

NODE = "node"  # the fact that tells the address of the node an entry is about


class NodeJournal(Journal):
    """The entries of one run that are about one node; what is appended is in the run's own journal, too."""

    def __init__(self, whole: Journal, node: str) -> None:
        about = [entry for entry in whole.entries[1:] if entry.get(NODE) == node]
        super().__init__(whole.path, [*whole.entries[:1], *about])
        self.node = node
        self._whole = whole

    def append(self, phase: str, **facts: object) -> None:
        """Record a phase with facts; on disk when this returns."""
        self._whole.append(phase, **facts, **{NODE: self.node})
        self.entries.append(self._whole.entries[-1])


def by_node(journal: Journal) -> list[tuple[str | None, Journal]]:
    """The journal by the addresses of the nodes that it tells of; itself, under None, where it tells of none."""
    if isinstance(journal, NodeJournal):
        return [(journal.node, journal)]
    nodes = dict.fromkeys(str(entry[NODE]) for entry in journal.entries if NODE in entry)
    return [(node, NodeJournal(journal, node)) for node in nodes] or [(None, journal)]
