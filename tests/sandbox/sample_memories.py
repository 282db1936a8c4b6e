"""A realistic AutoMem graph of any size, including memories that careless tools damage."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from tests.sandbox.automem_stores import iso, point_payload, tag_prefixes
from tests.sandbox.sample_texts import Draft, chinese_text, long_text, write_draft

FIRST_MOMENT = datetime(2026, 1, 5, 8, 0, tzinfo=timezone.utc)
SPAN = timedelta(days=300)  # all samples are between FIRST_MOMENT and this much later, however many there are
REACH = 60  # a relationship refers to one of this many preceding nodes at most: a loader remembers few ids
CLUSTER = 100  # AutoMem's consolidation runs once per so many memories
CYCLE = 200  # the awkward kinds repeat after so many memories; "long_text" occurs in the first cycle only
LONG_TEXT_WORDS = 5300  # about 7,400 tokens of cl100k, below the 8,192 that OpenAI accepts

_POSITIONS = {
    5: "point_only_keys",
    8: "quotes",
    13: "newlines",
    17: "emoji",
    23: "chinese",
    29: "archived",
    31: "long_text",
    37: "blank",
    41: "missing_content",
    44: "empty",
    48: "duplicate_text",
    53: "malformed_metadata",
    59: "foreign_id",
    64: "several_labels",
    71: "parallel_relationships",
    76: "self_relationship",
    79: "no_id",
    83: "updated",
    89: "invalidated",
    97: "point_only_keys",
    101: "integer_id",
    107: "numbers",
    113: "archived",
    131: "point_only_keys",
    149: "duplicate_text",
    167: "archived",
    181: "emoji",
}
KINDS = frozenset(_POSITIONS.values())
_WITHOUT_POINT = ("blank", "empty", "missing_content", "foreign_id", "no_id")
_PROPERTIES: dict[str, dict[str, object]] = {
    "blank": {"content": "  \n\t "},
    "empty": {"content": ""},
    "missing_content": {"content": None},
    "malformed_metadata": {"metadata": '{"source": "import", "broken": '},
    "numbers": {
        "metadata": '{"n": null, "f": 0.30000000000000004, "big": 12345678901234567890, "a": {"b": [1]}}',
        "relevance_score": 0.1 + 0.2,
    },
    "updated": {"relevance_score": None},
    "invalidated": {"t_invalid": "2026-11-01T00:00:00+00:00"},
}
_RELATIONSHIPS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "parallel_relationships": [("RELATES_TO", {"strength": 0.25}), ("RELATES_TO", {"strength": 0.75})],
    "self_relationship": [("RELATES_TO", {"strength": 0.5})],
    "invalidated": [("INVALIDATED_BY", {"reason": "superseded"})],
}


@dataclass(frozen=True)
class Relationship:
    """A relationship to the node with the sequence number `target` (the node itself, or an earlier one)."""

    type: str
    target: int
    properties: dict[str, object]


@dataclass(frozen=True)
class SampleMemory:
    """One node, its relationships to earlier nodes and its point, if AutoMem would have one.

    `kind` is "plain", an awkward kind, or "other" for nodes without the label Memory.
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
        """The text that is embedded; "" if there is none."""
        return str(self.properties.get("content") or "")


@dataclass
class _Run:
    """The state of one generation: its random numbers, the last sequence numbers, a few texts."""

    rng: random.Random
    count: int
    sequence: int = 0
    tail: list[int] = field(default_factory=list)
    last_content: str = ""
    entities: set[str] = field(default_factory=set)

    def moment(self, number: int) -> datetime:
        """Choose when memory `number` was stored: evenly spread, with a jitter below the step."""
        step = SPAN / max(self.count, 1)
        return FIRST_MOMENT + step * (number + self.rng.random() * 0.9)

    def new_id(self) -> str:
        """Create a version 4 UUID from the run's random numbers."""
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def next_sequence(self) -> int:
        """Count one more node."""
        self.sequence += 1
        return self.sequence - 1


def generate(count: int, seed: int = 7) -> Iterator[SampleMemory]:
    """Generate exactly `count` nodes labelled Memory, and a few others between them.

    Equal arguments give equal nodes. Memory use does not grow with `count`. 200 memories contain every awkward kind.
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


def kind_at(number: int) -> str:
    """Look up the kind of the memory with this number: "plain" for most."""
    kind = _POSITIONS.get(number % CYCLE, "plain")
    return "plain" if kind == "long_text" and number >= CYCLE else kind


def _memory(run: _Run, number: int, draft: Draft) -> SampleMemory:
    kind = kind_at(number)
    properties = {"id": run.new_id(), **_properties(run, number, draft)}
    point_accessed = properties["last_accessed"]
    if run.rng.random() <= 0.33:  # a recall has changed `last_accessed` in the graph, not in the point
        later = datetime.fromisoformat(str(point_accessed)) + timedelta(hours=run.rng.randint(1, 500))
        properties["last_accessed"] = iso(later)
    sequence = run.next_sequence()
    relationships = _relationships(run)
    _make_awkward(properties, kind, number)
    text = _awkward_text(run, kind, draft, number)
    if text is not None:
        properties["content"] = text
        if properties["summary"] is not None:
            properties["summary"] = text[:160]
    target = run.tail[-1] if run.tail and kind != "self_relationship" else sequence
    relationships += [Relationship(type_, target, more) for type_, more in _RELATIONSHIPS.get(kind, [])]
    payload = None
    if kind not in _WITHOUT_POINT:
        payload = {**_payload(properties, kind, number), "last_accessed": point_accessed}
    return SampleMemory(
        sequence=sequence,
        kind=kind,
        labels=("Memory", "MetaMemory", "Pinned") if kind == "several_labels" else ("Memory",),
        properties={key: value for key, value in properties.items() if value is not None},
        point_id=properties["id"] if payload else None,  # type: ignore[arg-type]
        payload=payload,
        relationships=tuple(relationships),
    )


def _make_awkward(properties: dict[str, object], kind: str, number: int) -> None:
    """Change the properties for an awkward kind, except the text."""
    properties.update(_PROPERTIES.get(kind, {}))
    if kind == "archived":
        properties.update(archived=True, archived_at=properties["updated_at"], relevance_score=0.07)
    elif kind == "foreign_id":
        properties["id"] = f"legacy-{number - 17}"  # the first one is legacy-42
    elif kind == "integer_id":
        properties["id"] = 4200 + number
    elif kind == "no_id":
        properties["id"] = None
    elif kind == "emoji":
        tags = ["mood:\U0001f60a", *properties["tags"]]  # type: ignore[misc]
        properties.update(tags=tags, tag_prefixes=tag_prefixes(tags))


def _awkward_text(run: _Run, kind: str, draft: Draft, number: int) -> str | None:
    """Write the text of a kind whose text is awkward; None for the other kinds."""
    text, awkward = draft.content, None
    if kind == "quotes":
        awkward = f'"{text}" she said; it\'s C:\\temp\\new, `$id` and {{"a": \'b\'}} -- DROP TABLE'
    elif kind == "newlines":
        awkward = "- " + text.replace(", ", ",\n\t- ") + "\r\n\n```sql\nSELECT 1;\n```\n"
    elif kind == "emoji":
        family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
        awkward = f"{text} \U0001f36b{family} cafe\u0301 \u202eabc\u202c"
    elif kind == "duplicate_text":
        awkward = run.last_content
    elif kind == "chinese":
        awkward = chinese_text(run.rng, draft)
    elif kind == "long_text":
        awkward = long_text(run.rng, number, LONG_TEXT_WORDS)
    return awkward


def _payload(properties: dict[str, object], kind: str, number: int) -> dict[str, object]:
    """Build the payload of the point: what AutoMem's worker writes, changed for an awkward kind."""
    payload = point_payload(properties)
    if kind in {"updated", "invalidated"}:  # PATCH /memory writes both dates into the point
        payload.update(t_valid=properties["t_valid"], t_invalid=properties.get("t_invalid"))
    if kind == "updated":
        del payload["relevance_score"]
    elif kind == "archived":
        payload["archived"] = True
    elif kind == "point_only_keys":
        payload.update(source_app="legacy-import", legacy_score=round(0.5 + number % 50 / 100, 2))
    return payload


def _properties(run: _Run, number: int, draft: Draft) -> dict[str, object]:
    """Create the properties that AutoMem writes, in its order. None: the node has no such property."""
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
        # Consolidation has scored some of them: full doubles, of which a client sees 15 digits.
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


def _relationships(run: _Run) -> list[Relationship]:
    """Create relationships to earlier memories, as enrichment and agents do."""
    rng = run.rng
    if not run.tail:
        return []
    found = [Relationship("PRECEDED_BY", run.tail[-1], {"count": 1, "updated_at": iso(FIRST_MOMENT)})]
    if rng.random() < 0.3:
        strength = round(rng.uniform(0.1, 1.0), 3)
        found.append(Relationship("RELATES_TO", rng.choice(run.tail), {"strength": strength}))
    if rng.random() < 0.1:
        type_ = rng.choice(("LEADS_TO", "DERIVED_FROM", "PREFERS_OVER", "EXEMPLIFIES", "CONTRADICTS", "REINFORCES"))
        found.append(Relationship(type_, rng.choice(run.tail), {"strength": 0.5, "reason": "said in a review"}))
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
    """Create the nodes of one consolidation: a pattern without an id over three memories, and its run."""
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
