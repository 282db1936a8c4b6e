"""Plan a re-embedding: which memories can be embedded, what it will cost, what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson
import redis

from lib.backup.existing_points import TemporaryIdTable, existing_points, orphan_ids, pages
from lib.backup.graph import GraphSource
from lib.backup.payloads import UNREADABLE, PointId, point_id, spellings, unusable
from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow, Missing
from lib.clients.embeddings.pricing import count_tokens, forget_tokenizer, input_limit, price_per_million
from lib.clients.falkordb.queries import NOT_UTF8, MemoryNode, existing_memory_ids, iter_memories, read_rows
from lib.clients.qdrant.collection import CollectionState
from lib.clients.qdrant.transport import Qdrant
from lib.concurrency import Progress, ProgressBar
from lib.dimensions import EmbeddingSpec
from lib.errors import MigrationError

_PAGE = 500
_EXAMPLES = 200
DUPLICATE = "id used twice"
# The payloads, by id, that the points of these ids have now, or had when the collection was deleted.
Payloads = Callable[[Sequence[PointId]], Mapping[PointId, Mapping[str, Any]]]


@dataclass
class Scan:
    """One reading of the graph: `memories` nodes seen, `usable` planned, the rest counted by reason with examples.

    `tokens` are all of them, identical texts for each memory; `too_long` memories are embedded without their end;
    `payload_bytes` are those of the usable ones' properties as JSON. `odd` are ids of planned memories whose content
    in the graph is not what is embedded, each with the reason.
    """

    memories: int = 0
    usable: int = 0
    tokens: int = 0
    payload_bytes: int = 0
    too_long: int = 0
    too_long_examples: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)
    odd: list[tuple[str, str]] = field(default_factory=list)

    @property
    def own_text(self) -> int:
        """Memories that are embedded with their own content."""
        return self.usable - len(self.odd)

    def skip(self, node: MemoryNode, reason: str) -> None:
        """Count a memory that cannot be embedded, and keep it as an example."""
        self.skipped[reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append((str(node.properties.get("id", f"node {node.node_id}")), reason))

    def cut(self, identity: str) -> None:
        """Count a memory whose text is longer than the model takes."""
        self.too_long += 1
        if self.too_long <= _EXAMPLES:
            self.too_long_examples.append(identity)


def embeddable_now(conn: redis.Redis, graph: str, ids: Sequence[PointId]) -> set[PointId]:
    """Those of `ids` whose memory is in the graph right now, with content to embed."""
    query = "MATCH (m:Memory) WHERE m.id IN $ids RETURN m.id, m.content"
    asked = [spelling for one in ids for spelling in spellings(one)]
    rows = read_rows(conn, graph, query, {"ids": asked}) if asked else []
    found = [
        point_id(identity) for identity, content in rows if not unusable({"id": identity, "content": content})
    ]
    return {one for one in found if one is not None}


def memories_now(conn: redis.Redis, graph: str, ids: Iterable[Sequence[PointId]]) -> set[PointId]:
    """Those of `ids`, which come in pages, whose memory is in the graph right now, whatever its content is.

    Asked for by the usual spellings; if that leaves any, every id of the graph is read, once.
    """
    found: set[PointId] = set()
    with TemporaryIdTable() as left:
        for page in ids:
            here = usually_spelled(conn, graph, page)
            found |= here
            left.put((one, None) for one in page if one not in here)
        if len(left):
            for nodes in pages(iter_memories(conn, graph, keys=("id",)), _PAGE):
                spelled = [point_id(node.properties["id"]) for node in nodes]
                found |= left.payloads([one for one in spelled if one is not None]).keys()
    return found


def usually_spelled(conn: redis.Redis, graph: str, ids: Sequence[PointId]) -> set[PointId]:
    """Those of `ids` whose memory is in the graph right now under one of the usual spellings."""
    asked = [spelling for one in ids for spelling in spellings(one)]
    found = {point_id(one) for one in existing_memory_ids(conn, graph, asked)}
    return {one for one in found if one is not None}


def _row(node: MemoryNode, identity: PointId, text: str, key: bytes, tokens: int) -> MemoryRow:
    properties = dict(node.properties)
    if properties.get("content") != text:
        properties.pop("content", None)  # the point's own is kept, see `sync.changes`
    try:
        payload = orjson.dumps(properties)
    except TypeError as error:
        raise MigrationError(f"memory {identity} holds a property that no payload can: {error}") from error
    return MemoryRow(identity, node.node_id, key, text, payload, tokens)


def scan_graph(
    conn: redis.Redis,
    graph: str,
    cache: EmbeddingCache,
    spec: EmbeddingSpec,
    *,
    payloads: Payloads | None = None,
    progress: Progress | None = None,
) -> Scan:
    """Read every memory into the embedding cache's plan; rows of an earlier scan that are gone from the graph leave it.

    Flat in memory: pages of 500. The first node with an id keeps it, further ones are listed. A memory whose content
    cannot be embedded is planned with the content that its point has by `payloads`, so that the point is kept.
    """
    scan, odd = Scan(), list[_Odd]()
    cache.begin_scan()
    for page in pages(iter_memories(conn, graph), _PAGE):
        usable, others = [], []
        for node in page:
            reason = unusable(node.properties)
            if reason:
                others.append((node, reason))
            else:
                usable.append((node, str(node.properties["content"])))
        _plan(usable, cache, spec, scan)
        odd += _with_text(others, payloads, scan)
        scan.memories += len(page)
        if progress:
            progress(len(page))
    for some in pages(odd, _PAGE):  # last: a usable memory of the same id goes before
        taken = _plan([(one.node, one.text) for one in some], cache, spec, scan)
        scan.odd += [
            (str(point_id(one.node.properties["id"])), one.reason)
            for one in some
            if one.node.node_id in taken
        ]
    cache.end_scan()
    forget_tokenizer()
    return scan


@dataclass(frozen=True)
class _Odd:
    """A memory whose content cannot be embedded, and the text that is embedded instead."""

    node: MemoryNode
    text: str
    reason: str


def _with_text(others: list[tuple[MemoryNode, str]], payloads: Payloads | None, scan: Scan) -> list[_Odd]:
    """Those for which there is a text: their point's own content, else what is readable of theirs; skip the rest."""
    identities = [point_id(node.properties.get("id")) for node, _ in others]
    asked = [one for one in identities if one is not None]
    known = payloads(asked) if payloads and asked else {}
    found = []
    for (node, reason), identity in zip(others, identities, strict=True):
        text = known.get(identity, {}).get("content") if identity is not None else None
        if reason == UNREADABLE and not (isinstance(text, str) and text.strip()):
            text = node.properties["content"][NOT_UTF8]  # type: ignore[index]
        if identity is not None and isinstance(text, str) and text.strip():
            found.append(_Odd(node, text, reason))
        else:
            scan.skip(node, reason)
    return found


def _plan(
    nodes: list[tuple[MemoryNode, str]], cache: EmbeddingCache, spec: EmbeddingSpec, scan: Scan
) -> set[int]:
    """Plan these memories with these texts; the node ids of those that were taken."""
    rows: dict[PointId, MemoryRow] = {}
    taken: set[int] = set()
    identities = [point_id(node.properties["id"]) for node, _ in nodes]
    texts = [text for _, text in nodes]
    keys = [cache.text_key(spec, text) for text in texts]
    tokens, limit = _tokens(cache, dict(zip(keys, texts, strict=True))), input_limit(spec.model)
    known = cache.scanned([one for one in identities if one is not None])
    for (node, text), identity, key in zip(nodes, identities, keys, strict=True):
        assert identity is not None
        if identity in known or identity in rows:
            scan.skip(node, DUPLICATE)
            continue
        rows[identity] = _row(node, identity, text, key, tokens[key])
        taken.add(node.node_id)
        if limit is not None and tokens[key] > limit:
            scan.cut(str(identity))
    cache.put_memories(list(rows.values()))
    scan.usable += len(rows)
    scan.tokens += sum(row.tokens for row in rows.values())
    scan.payload_bytes += sum(len(row.payload) for row in rows.values())
    return taken


def _tokens(cache: EmbeddingCache, texts: dict[bytes, str]) -> dict[bytes, int]:
    """The tokens of each text; what the plan holds already is not counted again."""
    known = cache.tokens_of(list(texts))
    new = {key: text for key, text in texts.items() if key not in known}
    return known | (dict(zip(new, count_tokens(list(new.values())), strict=True)) if new else {})


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
    def cached(self) -> int:
        """Memories whose vector is paid for already (identical texts count for each memory)."""
        return self.scan.usable - self.texts


def read_plan(
    graph: GraphSource, cache: EmbeddingCache, spec: EmbeddingSpec, bar: ProgressBar, payloads: Payloads
) -> Scan:
    """Read the graph into the cache, and cut what vectors can be had from larger ones; `payloads`: see `scan_graph`."""
    with bar("read graph", None, "memories") as progress:
        scan = scan_graph(graph.conn, graph.graph, cache, spec, payloads=payloads, progress=progress)
    cache.derive_missing(spec)
    return scan


def only_live_ids(
    qdrant: Qdrant, collection: str, cache: EmbeddingCache, graph: GraphSource
) -> TemporaryIdTable:
    """The ids that the collection holds and no memory does that can be embedded.

    The graph is asked after the points were read: a memory stored since its scan is none of them.
    """
    table = TemporaryIdTable()
    with existing_points(qdrant, collection, payload=False) as existing:
        orphans = orphan_ids(existing, lambda ids: set(cache.memories_of(ids)))
        for page in pages(orphans, _ID_PAGE):
            newer = embeddable_now(graph.conn, graph.graph, page)
            table.put((one, None) for one in page if one not in newer)
    return table


def textless_points(only_live: TemporaryIdTable, graph: GraphSource) -> list[str]:
    """Those of the points without a planned memory whose memory exists: neither it nor the point has a text."""
    return sorted(map(str, memories_now(graph.conn, graph.graph, only_live.ids())))


def whole_plan(
    scan: Scan,
    missing: Missing,
    spec: EmbeddingSpec,
    live: CollectionState | None,
    only_live: TemporaryIdTable | None,
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
