"""From the graph to the plan: which memories can be embedded, what is known of them, what is left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import redis

from lib.dimensions import EmbeddingSpec
from lib.embedding.plan_table import MemoryRow
from lib.embedding.pricing import count_tokens, forget_tokenizer, input_limit
from lib.embedding.spool import Spool
from lib.errors import MigrationError
from lib.graph.read import MemoryNode, iter_memories, read_rows
from lib.steps.pages import pages
from lib.steps.payloads import PointId, point_id, spellings
from lib.steps.progress import Progress

_PAGE = 500
_EXAMPLES = 200
BLANK, BAD_ID, DUPLICATE = "blank content", "id is neither a UUID nor an unsigned integer", "id used twice"


@dataclass
class Scan:
    """One reading of the graph: `memories` nodes seen, `usable` planned, the rest counted by reason with examples.

    `tokens` are all of them, identical texts for each memory; `too_long` memories are embedded without their end;
    `payload_bytes` are those of the usable ones' properties as JSON.
    """

    memories: int = 0
    usable: int = 0
    tokens: int = 0
    payload_bytes: int = 0
    too_long: int = 0
    too_long_examples: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)

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


def unusable(properties: Mapping[str, Any]) -> str | None:
    """Why a memory cannot have a point, or None. Verify exempts exactly what this names."""
    content = properties.get("content")
    if not isinstance(content, str) or not content.strip():
        return BLANK
    return None if point_id(properties.get("id")) is not None else BAD_ID


def embeddable_now(conn: redis.Redis, graph: str, ids: Sequence[PointId]) -> set[PointId]:
    """Those of `ids` whose memory is in the graph right now, with content to embed."""
    query = "MATCH (m:Memory) WHERE m.id IN $ids RETURN m.id, m.content"
    asked = [spelling for one in ids for spelling in spellings(one)]
    rows = read_rows(conn, graph, query, {"ids": asked}) if asked else []
    found = [
        point_id(identity) for identity, content in rows if not unusable({"id": identity, "content": content})
    ]
    return {one for one in found if one is not None}


def _row(node: MemoryNode, identity: PointId, key: bytes, tokens: int) -> MemoryRow:
    content = str(node.properties["content"])
    try:
        payload = orjson.dumps(node.properties)
    except TypeError as error:
        raise MigrationError(f"memory {identity} holds a property that no payload can: {error}") from error
    return MemoryRow(identity, node.node_id, key, content, payload, tokens)


def scan_graph(
    conn: redis.Redis, graph: str, spool: Spool, spec: EmbeddingSpec, *, progress: Progress | None = None
) -> Scan:
    """Read every memory into the spool's plan; rows of an earlier scan that are gone from the graph leave it.

    Flat in memory: pages of 500. The first node with an id keeps it, further ones are listed.
    """
    scan = Scan()
    spool.begin_scan()
    for page in pages(iter_memories(conn, graph), _PAGE):
        usable = []
        for node in page:
            reason = unusable(node.properties)
            if reason:
                scan.skip(node, reason)
            else:
                usable.append(node)
        _plan(usable, spool, spec, scan)
        scan.memories += len(page)
        if progress:
            progress(len(page))
    spool.end_scan()
    forget_tokenizer()
    return scan


def _plan(nodes: list[MemoryNode], spool: Spool, spec: EmbeddingSpec, scan: Scan) -> None:
    rows: dict[PointId, MemoryRow] = {}
    identities = [point_id(node.properties["id"]) for node in nodes]
    texts = [str(node.properties["content"]) for node in nodes]
    keys = [spool.text_key(spec, text) for text in texts]
    tokens, limit = _tokens(spool, dict(zip(keys, texts, strict=True))), input_limit(spec.model)
    known = spool.scanned([one for one in identities if one is not None])
    for node, identity, key in zip(nodes, identities, keys, strict=True):
        assert identity is not None
        if identity in known or identity in rows:
            scan.skip(node, DUPLICATE)
            continue
        rows[identity] = _row(node, identity, key, tokens[key])
        if limit is not None and tokens[key] > limit:
            scan.cut(str(identity))
    spool.put_memories(list(rows.values()))
    scan.usable += len(rows)
    scan.tokens += sum(row.tokens for row in rows.values())
    scan.payload_bytes += sum(len(row.payload) for row in rows.values())


def _tokens(spool: Spool, texts: dict[bytes, str]) -> dict[bytes, int]:
    """The tokens of each text; what the plan holds already is not counted again."""
    known = spool.tokens_of(list(texts))
    new = {key: text for key, text in texts.items() if key not in known}
    return known | (dict(zip(new, count_tokens(list(new.values())), strict=True)) if new else {})
