"""A believable AutoMem graph of any size, with the memories in it that break careless tools."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from tests.sandbox.automem_stores import iso, point_payload, tag_prefixes
from tests.sandbox.sample_awkward import Node, kind_at, make_awkward
from tests.sandbox.sample_texts import Draft, write_draft

FIRST_MOMENT = datetime(2026, 1, 5, 8, 0, tzinfo=timezone.utc)
SPAN = timedelta(days=300)  # all samples lie between FIRST_MOMENT and this much later, however many there are
REACH = 60  # a relationship reaches back over at most this many memories, so that loading needs no memory
CLUSTER = 100  # after so many memories AutoMem's consolidation has run once more


@dataclass(frozen=True)
class Relationship:
    """A relationship to the node with the sequence number `target` (its own, or an earlier one)."""

    type: str
    target: int
    properties: dict[str, object]


@dataclass(frozen=True)
class SampleMemory:
    """One node, with its relationships to earlier nodes and, where AutoMem would have one, its point.

    `kind` is "plain", the name of what is awkward about it, or, for nodes without the label Memory, "other".
    """

    sequence: int
    kind: str
    labels: tuple[str, ...]
    properties: dict[str, object]
    point_id: str | int | None = None
    payload: dict[str, object] | None = None
    relationships: tuple[Relationship, ...] = ()

    @property
    def content(self) -> str:
        """The text that was embedded, "" where there is none."""
        return str(self.properties.get("content") or "")


@dataclass
class _Run:
    """What generating remembers: the random numbers, a short tail of sequence numbers, a few texts."""

    rng: random.Random
    count: int
    sequence: int = 0
    tail: list[int] = field(default_factory=list)
    last_content: str = ""
    entities: set[str] = field(default_factory=set)

    def moment(self, number: int) -> datetime:
        """When memory `number` was stored: evenly spread, with a jitter below the step, so order is kept."""
        step = SPAN / max(self.count, 1)
        return FIRST_MOMENT + step * (number + self.rng.random() * 0.9)

    def new_id(self) -> str:
        """A version 4 UUID out of the run's own random numbers."""
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def next_sequence(self) -> int:
        """Count one more node."""
        self.sequence += 1
        return self.sequence - 1


def generate(count: int, seed: int = 7) -> Iterator[SampleMemory]:
    """Exactly `count` nodes labelled Memory, and a few others between them; equal for equal arguments.

    Memory stays flat whatever `count` is. From 200 memories on, each awkward kind is there (see `sample_awkward`).
    """
    run = _Run(random.Random(seed), count)
    yield _consolidation_control(run)
    for number in range(count):
        draft = write_draft(run.rng, number)
        memory = _memory(run, number, draft)
        run.tail = [*run.tail[-REACH:], memory.sequence]
        run.last_content = memory.content or run.last_content
        yield memory
        if draft.project not in run.entities:
            run.entities.add(draft.project)
            yield _entity(run, draft, memory)
        if number % CLUSTER == CLUSTER - 1:
            yield from _consolidated(run, draft, memory)


def _memory(run: _Run, number: int, draft: Draft) -> SampleMemory:
    node = Node(run.new_id(), _properties(run, number, draft), number=number)
    payload_changes = _lag(run, node)
    node.payload.update(payload_changes)
    node.kind = kind_at(number)
    sequence = run.next_sequence()
    relationships = _relationships(run)
    make_awkward(node, run.rng, draft, run.last_content)
    for type_, properties, targets_itself in node.relationships:
        target = sequence if targets_itself or not run.tail else run.tail[-1]
        relationships.append(Relationship(type_, target, properties))
    properties = {"id": node.id, **node.properties} if node.id is not None else node.properties
    payload = None
    if node.has_point:
        payload = {**point_payload(properties), **node.payload}
        for key in node.dropped_from_payload:
            payload.pop(key, None)
    return SampleMemory(
        sequence=sequence,
        kind=node.kind,
        labels=("Memory", *node.extra_labels),
        properties={key: value for key, value in properties.items() if value is not None},
        point_id=node.id if node.has_point else None,
        payload=payload,
        relationships=tuple(relationships),
    )


def _properties(run: _Run, number: int, draft: Draft) -> dict[str, object]:
    """The properties AutoMem writes, in its order; `None` means that the node has no such property."""
    rng, moment = run.rng, run.moment(number)
    tags = _tags(rng, draft)
    enriched = rng.random() < 0.95
    metadata: dict[str, object] = {
        "source": rng.choice(("chat", "review", "ticket")),
        "reference": draft.reference,
    }
    if rng.random() < 0.2:
        metadata["files"] = [f"{draft.project.lower()}/{draft.topic}.md"]
    if enriched:
        metadata["entities"] = {"people": [draft.person], "projects": [draft.project]}
        metadata["enrichment"] = {
            "last_run": iso(moment + timedelta(seconds=2)),
            "forced": False,
            "temporal_links": 1,
        }
    return {
        "content": draft.content,
        "timestamp": iso(moment),
        "importance": round(rng.uniform(0.2, 0.95), 2),
        "tags": tags,
        "tag_prefixes": tag_prefixes(tags),
        "type": draft.type,
        "confidence": rng.choice((0.3, 0.6, 0.7, 0.85, 0.9)),
        "t_valid": iso(moment),
        "updated_at": iso(moment),
        "last_accessed": iso(moment),
        "metadata": json.dumps(metadata),
        # Consolidation has scored the older ones: full doubles, of which a client sees 15 digits.
        "relevance_score": rng.random() if rng.random() < 0.5 else None,
        "processed": True if enriched else None,
        "summary": draft.content.split(", ", maxsplit=1)[0] if enriched else None,
        "enriched": True if enriched else None,
        "enriched_at": iso(moment + timedelta(seconds=2)) if enriched else None,
    }


def _tags(rng: random.Random, draft: Draft) -> list[str]:
    tags = [f"project:{draft.project.lower()}", draft.type.lower()]
    if rng.random() < 0.6:
        tags.append(f"person:{draft.person.lower()}")
    if rng.random() < 0.5:
        tags.append(f"Topic/{draft.topic}/{draft.tool}")
    return tags


def _lag(run: _Run, node: Node) -> dict[str, object]:
    """Recall has moved `last_accessed` on in the graph for every third memory; the point still has the old one."""
    if run.rng.random() > 0.33:
        return {}
    old = node.properties["last_accessed"]
    later = datetime.fromisoformat(str(old)) + timedelta(hours=run.rng.randint(1, 500))
    node.properties["last_accessed"] = iso(later)
    return {"last_accessed": old}


def _relationships(run: _Run) -> list[Relationship]:
    """Links to earlier memories, as enrichment and agents make them."""
    rng = run.rng
    if not run.tail:
        return []
    found = [Relationship("PRECEDED_BY", run.tail[-1], {"count": 1, "updated_at": iso(FIRST_MOMENT)})]
    if rng.random() < 0.3:
        strength = round(rng.uniform(0.1, 1.0), 3)
        found.append(Relationship("RELATES_TO", rng.choice(run.tail), {"strength": strength}))
    if rng.random() < 0.1:
        type_ = rng.choice(
            ("LEADS_TO", "DERIVED_FROM", "PREFERS_OVER", "EXEMPLIFIES", "CONTRADICTS", "REINFORCES")
        )
        found.append(
            Relationship(type_, rng.choice(run.tail), {"strength": 0.5, "reason": "said in a review"})
        )
    return found


def _entity(run: _Run, draft: Draft, memory: SampleMemory) -> SampleMemory:
    slug = draft.project.lower()
    properties: dict[str, object] = {
        "id": f"entity:projects:{slug}",
        "slug": slug,
        "category": "projects",
        "name": draft.project,
        "aliases": [],
        "identity_version": 0,
        "created_at": iso(FIRST_MOMENT),
    }
    mention = Relationship("REFERENCED_IN", memory.sequence, {})
    return SampleMemory(run.next_sequence(), "other", ("Entity",), properties, relationships=(mention,))


def _consolidated(run: _Run, draft: Draft, memory: SampleMemory) -> Iterator[SampleMemory]:
    """What a consolidation leaves behind: a pattern without an id over three memories, and its run."""
    members = sorted({memory.sequence, run.tail[0], run.tail[len(run.tail) // 2]})
    links = tuple(Relationship("SUMMARIZES", member, {}) for member in members)
    pattern: dict[str, object] = {"name": f"{draft.topic} in {draft.project}", "cluster_size": len(members)}
    yield SampleMemory(run.next_sequence(), "other", ("MetaPattern",), pattern, relationships=links)
    ran: dict[str, object] = {"id": run.new_id(), "mode": "decay", "success": True, "affected": CLUSTER}
    ran["completed_at"] = str(memory.properties["timestamp"])
    yield SampleMemory(run.next_sequence(), "other", ("ConsolidationRun",), ran)


def _consolidation_control(run: _Run) -> SampleMemory:
    control: dict[str, object] = {"id": "global", "decay_last_run": iso(FIRST_MOMENT + SPAN)}
    return SampleMemory(run.next_sequence(), "other", ("ConsolidationControl",), control)
