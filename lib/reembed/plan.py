"""Plan a re-embedding: which memories can be embedded, which points have no memory, the room that the server needs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from lib.backup.graph import GraphSource
from lib.backup.phases import DELETING
from lib.backup.points import UNREADABLE, TemporaryIdTable, point_id, spellings, unusable
from lib.clients.embeddings.cache import MemoryRow
from lib.clients.embeddings.cache_file import chunks
from lib.clients.embeddings.pricing import count_tokens, forget_tokenizer, input_limit
from lib.clients.falkordb.queries import NOT_UTF8, MemoryNode, existing_memory_ids, iter_memories, read_rows
from lib.clients.qdrant.points import PointId, retrieve
from lib.clients.qdrant.transport import QdrantError
from lib.concurrency import read_ahead
from lib.errors import MigrationError
from lib.journal import Journal
from lib.reembed.context import Context, is_fresh, reached, saved_payloads, unplanned_ids

_PAGE = 500
_ID_PAGE = 60  # ids per query: each has up to eight spellings
_EXAMPLES = 200
DUPLICATE = "id used twice"
# The disk space of a point on the server besides its vector: a multiple of its payload (with indexes), and its links.
_PAYLOAD_SHARE, _LINKS_BYTES = 1.5, 400


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

    def point_bytes(self, size: int) -> float:
        """Return the bytes of a point on the server, if its vector has `size` dimensions."""
        return size * 4 + _PAYLOAD_SHARE * self.payload_bytes / max(1, self.usable) + _LINKS_BYTES


def _point_ids(identities: Iterable[object]) -> set[PointId]:
    return {one for one in map(point_id, identities) if one is not None}


def usually_spelled(graph: GraphSource, ids: Sequence[PointId]) -> set[PointId]:
    """Return those of `ids` whose memory is in the graph now under one of the usual spellings."""
    asked = [spelling for one in ids for spelling in spellings(one)]
    return _point_ids(existing_memory_ids(graph.conn, graph.graph, asked))


def memories_now(graph: GraphSource, ids: Iterable[Sequence[PointId]]) -> set[PointId]:
    """Return those of `ids` (pages) whose memory is in the graph now, whatever its content is.

    The graph is asked for the usual spellings. If ids are left after that, every id of the graph is read, once.
    """
    found: set[PointId] = set()
    with TemporaryIdTable() as left:
        for page in ids:
            known = usually_spelled(graph, page)
            found |= known
            left.put((one, None) for one in page if one not in known)
        if len(left):
            for nodes in chunks(iter_memories(graph.conn, graph.graph, keys=("id",)), _PAGE):
                found |= left.payloads(list(_point_ids(node.properties["id"] for node in nodes))).keys()
    return found


def only_live_ids(ctx: Context, existing: TemporaryIdTable) -> TemporaryIdTable:
    """Return the `existing` ids without an embeddable memory. The graph is asked now: newer memories count."""
    table = TemporaryIdTable()
    query = "MATCH (m:Memory) WHERE m.id IN $ids RETURN m.id, m.content"
    for page in chunks(unplanned_ids(ctx.cache, existing), _ID_PAGE):
        asked = [spelling for one in page for spelling in spellings(one)]
        rows = read_rows(ctx.graph.conn, ctx.graph.graph, query, ids=asked)
        newer = _point_ids(one for one, content in rows if not unusable({"id": one, "content": content}))
        table.put((one, None) for one in page if one not in newer)
    return table


class _Candidate(NamedTuple):
    """A memory, its point id, the text to embed, and why that is not its own content ("" if it is)."""

    node: MemoryNode
    identity: PointId
    text: str
    reason: str = ""


def scan_graph(ctx: Context, journal: Journal | None, *, title: str = "read graph") -> Scan:
    """Read every memory into the cache's plan, in pages of 500; unless `--fresh`, cut missing vectors from larger ones.

    The plan of an earlier scan is replaced. Of several nodes with one id the first is planned, the others are listed.
    A memory whose content cannot be embedded is planned with the content of its point, so that it does not lose it.
    """
    scan, others = Scan(), list[_Candidate]()
    ctx.cache.begin_scan()
    with ctx.bar(title, None, "memories") as progress:
        odd = list[tuple[MemoryNode, str]]()
        for page in read_ahead(chunks(iter_memories(ctx.graph.conn, ctx.graph.graph), _PAGE)):
            usable = list[_Candidate]()
            for node in page:
                identity, reason = point_id(node.properties.get("id")), unusable(node.properties)
                if reason or identity is None:
                    odd.append((node, reason or ""))
                else:
                    usable.append(_Candidate(node, identity, str(node.properties["content"])))
            _plan(usable, ctx, scan)
            if len(odd) >= _PAGE:  # not for each page: every look-up is a request
                others += _with_other_text(odd, ctx, journal, scan)
                odd.clear()
            scan.memories += len(page)
            progress(len(page))
        others += _with_other_text(odd, ctx, journal, scan)
    for some in chunks(others, _PAGE):  # last, since a usable memory with the same id has priority
        _plan(some, ctx, scan)
    ctx.cache.end_scan()
    forget_tokenizer()
    if not is_fresh(ctx):
        ctx.cache.derive_missing(ctx.spec)
    return scan


def _with_other_text(
    odd: list[tuple[MemoryNode, str]], ctx: Context, journal: Journal | None, scan: Scan
) -> list[_Candidate]:
    """Find another text for each: its point's content, or the readable part of the node's. Skips those without one."""
    identities = [point_id(node.properties.get("id")) for node, _ in odd]
    asked = [one for one in identities if one is not None]
    known: dict[PointId, dict[str, Any]] = {}  # the payloads of the live points; after the delete also the saved ones
    if asked:
        known = saved_payloads(ctx.cache, asked) if reached(journal, DELETING) else {}
        with contextlib.suppress(QdrantError):  # the collection is missing, or being restored
            live = retrieve(ctx.qdrant, ctx.collection, asked, payload=True)
            known |= {point.id: point.payload for point in live if point.payload}
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


def _plan(candidates: list[_Candidate], ctx: Context, scan: Scan) -> None:
    """Put these memories into the plan and count them; an id that is planned already is skipped."""
    rows: dict[PointId, MemoryRow] = {}
    keys = [ctx.cache.text_key(ctx.spec, one.text) for one in candidates]
    texts = {key: one.text for key, one in zip(keys, candidates, strict=True)}
    tokens = ctx.cache.tokens_of(list(texts))  # of an earlier scan
    if new := [key for key in texts if key not in tokens]:
        tokens |= dict(zip(new, count_tokens([texts[key] for key in new]), strict=True))
    limit = input_limit(ctx.spec.model, ctx.spec.provider)
    known = ctx.cache.scanned([one.identity for one in candidates])
    for one, key in zip(candidates, keys, strict=True):
        if one.identity in known or one.identity in rows:
            scan.skip(one.node, DUPLICATE)
            continue
        properties = dict(one.node.properties)
        if properties.get("content") != one.text:  # the point keeps its own, see `sync.changes`
            properties.pop("content", None)
        try:
            payload = orjson.dumps(properties)
        except TypeError as error:
            problem = f"memory {one.identity} has a property that a payload cannot hold: {error}"
            step = "change that property in the graph, then run the same command again"
            raise MigrationError(problem, next_step=step) from error
        rows[one.identity] = MemoryRow(one.identity, one.node.node_id, key, one.text, payload, tokens[key])
        scan.payload_bytes += len(payload)
        if one.reason:
            scan.odd.append((str(one.identity), one.reason))
        if limit is not None and tokens[key] > limit:
            scan.too_long += 1
            if scan.too_long <= _EXAMPLES:
                scan.too_long_examples.append(str(one.identity))
    ctx.cache.put_memories(list(rows.values()))
    scan.usable += len(rows)
