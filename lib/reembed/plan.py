"""Plan a re-embedding: which memories can be embedded, what it will cost, what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson
import redis

from lib.backup.graph import GraphSource
from lib.backup.points import UNREADABLE, TemporaryIdTable, orphan_ids, point_id, spellings, unusable
from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow, Missing
from lib.clients.embeddings.cache_file import chunks
from lib.clients.embeddings.pricing import count_tokens, forget_tokenizer, input_limit, price_of
from lib.clients.falkordb.queries import NOT_UTF8, MemoryNode, existing_memory_ids, iter_memories, read_rows
from lib.clients.qdrant.collection import CollectionState
from lib.clients.qdrant.points import PointId
from lib.concurrency import ProgressBar, read_ahead
from lib.dimensions import EmbeddingSpec
from lib.errors import MigrationError

_PAGE = 500
_EXAMPLES = 200
DUPLICATE = "id used twice"
# The payloads, by id, that the points of these ids have now, or had when the collection was deleted.
Payloads = Callable[[Sequence[PointId]], Mapping[PointId, Mapping[str, Any]]]


@dataclass
class Scan:
    """One reading of the graph: `memories` nodes were read, `usable` ones planned, the rest counted by reason.

    `too_long` memories are embedded without their end. `payload_bytes` is the size of the usable ones' properties as
    JSON. `odd` are (id, reason) of planned memories whose content in the graph is not what is embedded.
    """

    memories: int = 0
    usable: int = 0
    payload_bytes: int = 0
    too_long: int = 0
    too_long_examples: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)
    odd: list[tuple[str, str]] = field(default_factory=list)

    @property
    def own_text(self) -> int:
        """The number of memories that are embedded with their own content."""
        return self.usable - len(self.odd)

    def skip(self, node: MemoryNode, reason: str) -> None:
        """Count a memory that cannot be embedded; the first ones are examples."""
        self.skipped[reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append((str(node.properties.get("id", f"node {node.node_id}")), reason))

    def cut(self, identity: str) -> None:
        """Count a memory whose text is longer than the model takes."""
        self.too_long += 1
        if self.too_long <= _EXAMPLES:
            self.too_long_examples.append(identity)


def embeddable_now(conn: redis.Redis, graph: str, ids: Sequence[PointId]) -> set[PointId]:
    """Those of `ids` whose memory is in the graph now, with content to embed."""
    query = "MATCH (m:Memory) WHERE m.id IN $ids RETURN m.id, m.content"
    asked = [spelling for one in ids for spelling in spellings(one)]
    rows = read_rows(conn, graph, query, {"ids": asked}) if asked else []
    found = [point_id(identity) for identity, content in rows if not unusable({"id": identity, "content": content})]
    return {one for one in found if one is not None}


def memories_now(conn: redis.Redis, graph: str, ids: Iterable[Sequence[PointId]]) -> set[PointId]:
    """Those of `ids` (pages) whose memory is in the graph now, whatever its content is.

    The graph is asked for the usual spellings. If ids are left after that, every id of the graph is read, once.
    """
    found: set[PointId] = set()
    with TemporaryIdTable() as left:
        for page in ids:
            known = usually_spelled(conn, graph, page)
            found |= known
            left.put((one, None) for one in page if one not in known)
        if len(left):
            for nodes in chunks(iter_memories(conn, graph, keys=("id",)), _PAGE):
                spelled = [point_id(node.properties["id"]) for node in nodes]
                found |= left.payloads([one for one in spelled if one is not None]).keys()
    return found


def usually_spelled(conn: redis.Redis, graph: str, ids: Sequence[PointId]) -> set[PointId]:
    """Those of `ids` whose memory is in the graph now under one of the usual spellings."""
    asked = [spelling for one in ids for spelling in spellings(one)]
    found = {point_id(one) for one in existing_memory_ids(conn, graph, asked)}
    return {one for one in found if one is not None}


@dataclass(frozen=True)
class _Candidate:
    """A memory, its point id, the text to embed, and why that is not its own content ("" if it is)."""

    node: MemoryNode
    identity: PointId
    text: str
    reason: str = ""


def scan_graph(
    graph: GraphSource,
    cache: EmbeddingCache,
    spec: EmbeddingSpec,
    bar: ProgressBar,
    payloads: Payloads,
    *,
    title: str = "read graph",
) -> Scan:
    """Read every memory into the cache's plan, in pages of 500, and derive missing vectors from larger ones.

    The plan of an earlier scan is replaced. Of several nodes with one id the first is planned, the others are listed.
    A memory whose content cannot be embedded is planned with the content that its point has by `payloads`, so that it
    does not lose its point.
    """
    scan, others = Scan(), list[_Candidate]()
    cache.begin_scan()
    with bar(title, None, "memories") as progress:
        odd = list[tuple[MemoryNode, str]]()
        for page in read_ahead(chunks(iter_memories(graph.conn, graph.graph), _PAGE)):
            usable = list[_Candidate]()
            for node in page:
                identity, reason = point_id(node.properties.get("id")), unusable(node.properties)
                if reason or identity is None:
                    odd.append((node, reason or ""))
                else:
                    usable.append(_Candidate(node, identity, str(node.properties["content"])))
            _plan(usable, cache, spec, scan)
            if len(odd) >= _PAGE:  # not for each page: every look-up is a request
                others += _with_other_text(odd, payloads, scan)
                odd.clear()
            scan.memories += len(page)
            progress(len(page))
        others += _with_other_text(odd, payloads, scan)
    for some in chunks(others, _PAGE):  # last, since a usable memory with the same id has priority
        _plan(some, cache, spec, scan)
    cache.end_scan()
    forget_tokenizer()
    cache.derive_missing(spec)
    return scan


def _with_other_text(odd: list[tuple[MemoryNode, str]], payloads: Payloads, scan: Scan) -> list[_Candidate]:
    """Find another text for each: its point's content, or the readable part of its own. Skips those without one."""
    identities = [point_id(node.properties.get("id")) for node, _ in odd]
    asked = [one for one in identities if one is not None]
    known = payloads(asked) if asked else {}
    found = []
    for (node, reason), identity in zip(odd, identities, strict=True):
        text = known.get(identity, {}).get("content") if identity is not None else None
        if reason == UNREADABLE and not (isinstance(text, str) and text.strip()):
            text = node.properties["content"][NOT_UTF8]  # type: ignore[index]
        if identity is not None and isinstance(text, str) and text.strip():
            found.append(_Candidate(node, identity, text, reason))
        else:
            scan.skip(node, reason)
    return found


def _plan(candidates: list[_Candidate], cache: EmbeddingCache, spec: EmbeddingSpec, scan: Scan) -> None:
    """Put these memories into the plan and count them; an id that is planned already is skipped."""
    rows: dict[PointId, MemoryRow] = {}
    keys = [cache.text_key(spec, one.text) for one in candidates]
    tokens = _tokens(cache, {key: one.text for key, one in zip(keys, candidates, strict=True)})
    limit, known = input_limit(spec.model, spec.provider), cache.scanned([one.identity for one in candidates])
    for one, key in zip(candidates, keys, strict=True):
        if one.identity in known or one.identity in rows:
            scan.skip(one.node, DUPLICATE)
            continue
        payload = _payload(one)
        rows[one.identity] = MemoryRow(one.identity, one.node.node_id, key, one.text, payload, tokens[key])
        scan.payload_bytes += len(payload)
        if one.reason:
            scan.odd.append((str(one.identity), one.reason))
        if limit is not None and tokens[key] > limit:
            scan.cut(str(one.identity))
    cache.put_memories(list(rows.values()))
    scan.usable += len(rows)


def _payload(one: _Candidate) -> bytes:
    """The graph's values as JSON. Without a content that is not embedded: the point keeps its own (`sync.changes`)."""
    properties = dict(one.node.properties)
    if properties.get("content") != one.text:
        properties.pop("content", None)
    try:
        return orjson.dumps(properties)
    except TypeError as error:
        problem = f"memory {one.identity} has a property that a payload cannot hold: {error}"
        raise MigrationError(
            problem, next_step="change that property in the graph, then run the same command again"
        ) from error


def _tokens(cache: EmbeddingCache, texts: dict[bytes, str]) -> dict[bytes, int]:
    """The tokens of each text. Texts that the plan has already are not counted again."""
    known = cache.tokens_of(list(texts))
    new = {key: text for key, text in texts.items() if key not in known}
    return known | (dict(zip(new, count_tokens(list(new.values())), strict=True)) if new else {})


_ORPHAN_EXAMPLES = 20
_ID_PAGE = 60  # ids per query: each has up to eight spellings
# The disk space of a point on the server besides its vector: a multiple of its payload (with indexes), and its links.
_PAYLOAD_SHARE, _LINKS_BYTES = 1.5, 400
# The server refuses writes with less than 64 MiB free; log files and segment pages of 32 MiB each (1.11.3, 1.18.3).
_FIXED_BYTES = 320 << 20


@dataclass(frozen=True)
class Plan:
    """What a re-embedding will do.

    `texts` and `tokens` must be embedded, `price` is in US dollars (None: unknown model), `only_live` the number of
    points without a memory, `disk_peak` the most bytes that the Qdrant server will need: for the old collection, the
    new one, its snapshot and the copy restored from that.
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
        """Memories that need no embedding: cached, or with the text of another one."""
        return self.scan.usable - self.texts


def only_live_ids(existing: TemporaryIdTable, cache: EmbeddingCache, graph: GraphSource) -> TemporaryIdTable:
    """The ids of `existing` points without a memory that can be embedded.

    The graph is asked after the points were read, so that a memory stored since the scan counts.
    """
    table = TemporaryIdTable()
    orphans = orphan_ids(existing, lambda ids: set(cache.memories_of(ids)))
    for page in chunks(orphans, _ID_PAGE):
        newer = embeddable_now(graph.conn, graph.graph, page)
        table.put((one, None) for one in page if one not in newer)
    return table


def textless_points(only_live: TemporaryIdTable, graph: GraphSource) -> list[str]:
    """Those of the `only_live` points whose memory exists: neither it nor the point has a text to embed."""
    return sorted(map(str, memories_now(graph.conn, graph.graph, only_live.ids())))


def whole_plan(
    scan: Scan,
    missing: Missing,
    spec: EmbeddingSpec,
    live: CollectionState | None,
    only_live: TemporaryIdTable | None,
    textless: list[str],
) -> Plan:
    """Put the plan together. `missing` must be embedded; `textless` points are not counted in `only_live`."""
    orphans = (str(one) for page in only_live.ids() for one in page) if only_live else iter(())
    examples = list(islice((one for one in orphans if one not in textless), _ORPHAN_EXAMPLES))
    return Plan(
        scan=scan,
        spec=spec,
        live_size=live.size if live else None,
        live_points=live.points if live else 0,
        texts=missing.texts,
        tokens=missing.tokens,
        price=price_of(missing.tokens, spec.model, spec.provider),
        only_live=len(only_live) - len(textless) if only_live else 0,
        only_live_examples=examples,
        disk_peak=(round(live.points * (live.size * 4 + _other_bytes(scan))) if live else 0) + room_needed(scan, spec),
    )


def room_needed(scan: Scan, spec: EmbeddingSpec) -> int:
    """The bytes that the server needs besides the live collection.

    Four times the points (the staged collection, its snapshot, and the copies restored from it), and a fixed amount.
    """
    return round(4 * scan.usable * (spec.size * 4 + _other_bytes(scan))) + _FIXED_BYTES


def _other_bytes(scan: Scan) -> float:
    """Bytes of a point besides its vector."""
    return _PAYLOAD_SHARE * scan.payload_bytes / max(1, scan.usable) + _LINKS_BYTES
