"""What a re-embedding will do, cost and leave out: told before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from lib.dimensions import EmbeddingSpec
from lib.embedding.plan_table import Missing
from lib.embedding.pricing import price_per_million
from lib.embedding.spool import Spool
from lib.steps.memories import Payloads, Scan, embeddable_now, memories_now, scan_graph
from lib.steps.pages import pages
from lib.steps.present import IdTable, points_present, surplus_ids
from lib.steps.progress import ProgressBar
from lib.steps.take_graph import GraphSource
from lib.vectors.collection import CollectionState
from lib.vectors.transport import Qdrant

_ORPHAN_EXAMPLES = 20
_ID_PAGE = 60  # ids a question: each has up to eight spellings
# Beside its vector a point takes about so much on the server's disk: its payload with indexes, its links.
_PAYLOAD_SHARE, _LINKS_BYTES = 1.5, 400
# The 64 MiB below which the server takes no write; log files, and pages of each segment, of 32 MiB (1.11.3, 1.18.3).
_FIXED_BYTES = 320 << 20


@dataclass(frozen=True)
class Plan:
    """The whole of a re-embedding.

    `texts` and `tokens` are what must be bought, `price` in US dollars (None: unknown model), `only_live` the ids
    that the collection alone holds, `disk_peak` bytes that the Qdrant server holds at the worst moment: the old
    collection, the new one, its snapshot and the copy restored from that.
    """

    scan: Scan
    spec: EmbeddingSpec
    live_size: int | None
    live_points: int
    texts: int
    tokens: int
    price: float | None
    only_live: int
    only_live_examples: list[str]
    disk_peak: int

    @property
    def spooled(self) -> int:
        """Memories whose vector is paid for already (identical texts count for each memory)."""
        return self.scan.usable - self.texts


def read_plan(
    graph: GraphSource, spool: Spool, spec: EmbeddingSpec, bar: ProgressBar, payloads: Payloads
) -> Scan:
    """Read the graph into the spool, and cut what vectors can be had from larger ones; `payloads`: see `scan_graph`."""
    with bar("read graph", None, "memories") as progress:
        scan = scan_graph(graph.conn, graph.graph, spool, spec, payloads=payloads, progress=progress)
    spool.derive_missing(spec)
    return scan


def only_live_ids(qdrant: Qdrant, collection: str, spool: Spool, graph: GraphSource) -> IdTable:
    """The ids that the collection holds and no memory does that can be embedded.

    The graph is asked after the points were read: a memory stored since its scan is none of them.
    """
    table = IdTable()
    with points_present(qdrant, collection, payload=False) as present:
        surplus = surplus_ids(present, lambda ids: set(spool.memories_of(ids)))
        for page in pages(surplus, _ID_PAGE):
            newer = embeddable_now(graph.conn, graph.graph, page)
            table.put((one, None) for one in page if one not in newer)
    return table


def textless_points(only_live: IdTable, graph: GraphSource) -> list[str]:
    """Those of the points without a planned memory whose memory exists: neither it nor the point has a text."""
    return sorted(map(str, memories_now(graph.conn, graph.graph, only_live.ids())))


def whole_plan(
    scan: Scan,
    missing: Missing,
    spec: EmbeddingSpec,
    live: CollectionState | None,
    only_live: IdTable | None,
    textless: list[str],
) -> Plan:
    """Put the plan together for printing; `missing` is what must be bought, `textless` are no part of `only_live`."""
    price = price_per_million(spec.model)
    alone = (str(one) for page in only_live.ids() for one in page) if only_live else iter(())
    examples = list(islice((one for one in alone if one not in textless), _ORPHAN_EXAMPLES))
    return Plan(
        scan=scan,
        spec=spec,
        live_size=live.size if live else None,
        live_points=live.points if live else 0,
        texts=missing.texts,
        tokens=missing.tokens,
        price=None if price is None else missing.tokens * price / 1e6,
        only_live=len(only_live) - len(textless) if only_live else 0,
        only_live_examples=examples,
        disk_peak=_disk_peak(scan, spec, live),
    )


def _disk_peak(scan: Scan, spec: EmbeddingSpec, live: CollectionState | None) -> int:
    old = live.points * (live.size * 4 + _beside(scan)) if live else 0.0
    return round(old) + room_needed(scan, spec)


def room_needed(scan: Scan, spec: EmbeddingSpec) -> int:
    """Bytes on the server beside the live collection: the staged one, its snapshot, what is made of that, twice.

    And what does not grow with the points.
    """
    return round(4 * scan.usable * (spec.size * 4 + _beside(scan))) + _FIXED_BYTES


def _beside(scan: Scan) -> float:
    return _PAYLOAD_SHARE * scan.payload_bytes / max(1, scan.usable) + _LINKS_BYTES
