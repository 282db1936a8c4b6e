"""What is awkward about some sample memories, and where in a run each of it stands."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.sandbox.automem_stores import tag_prefixes
from tests.sandbox.sample_texts import Draft, chinese_text, long_text

CYCLE = 200  # the kinds come again every so many memories; those named in _ONCE only in the first cycle
LONG_TEXT_WORDS = 5300  # about 7,400 tokens of cl100k: long, yet below the 8,192 that OpenAI takes
_ONCE = ("long_text",)


@dataclass
class Node:
    """A memory in the making. `id` None: the node has no id property."""

    id: str | int | None
    properties: dict[str, object]
    number: int
    kind: str = "plain"
    extra_labels: tuple[str, ...] = ()
    has_point: bool = True
    payload: dict[str, object] = field(default_factory=dict)  # laid over what AutoMem writes
    dropped_from_payload: tuple[str, ...] = ()
    relationships: list[tuple[str, dict[str, object], bool]] = field(
        default_factory=list
    )  # the flag: to itself

    def set_content(self, text: str) -> None:
        """Another text, and the summary that goes with it."""
        self.properties["content"] = text
        if self.properties.get("summary") is not None:
            self.properties["summary"] = text[:160]


def kind_at(number: int) -> str:
    """The kind of the memory with this number: "plain" for most."""
    kind = _POSITIONS.get(number % CYCLE, "plain")
    return "plain" if kind in _ONCE and number >= CYCLE else kind


def make_awkward(node: Node, rng: random.Random, draft: Draft, earlier_text: str) -> None:
    """Turn a plain memory into one of its kind."""
    if node.kind == "duplicate_text":
        node.set_content(earlier_text)
    elif node.kind == "chinese":
        node.set_content(chinese_text(rng, draft))
    elif node.kind == "long_text":
        node.set_content(long_text(rng, node.number, LONG_TEXT_WORDS))
    elif node.kind != "plain":
        _CHANGES[node.kind](node)


def _content(node: Node) -> str:
    return str(node.properties["content"])


def _quotes(node: Node) -> None:
    node.set_content(
        '"' + _content(node) + "\" she said; it's C:\\temp\\new, `$id` and {\"a\": 'b'} -- DROP TABLE"
    )


def _newlines(node: Node) -> None:
    node.set_content("- " + _content(node).replace(", ", ",\n\t- ") + "\r\n\n```sql\nSELECT 1;\n```\n")


def _emoji(node: Node) -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    node.set_content(f"{_content(node)} \U0001f36b{family} cafe\u0301 \u202eabc\u202c")
    node.properties["tags"] = tags = ["mood:\U0001f60a", *_tags(node)]
    node.properties["tag_prefixes"] = tag_prefixes(tags)


def _blank(node: Node) -> None:
    node.properties["content"] = "  \n\t "
    node.has_point = False


def _empty(node: Node) -> None:
    node.properties["content"] = ""
    node.has_point = False


def _missing(node: Node) -> None:
    node.properties["content"] = None
    node.has_point = False


def _malformed_metadata(node: Node) -> None:
    node.properties["metadata"] = '{"source": "import", "broken": '


def _numbers(node: Node) -> None:
    node.properties["metadata"] = (
        '{"n": null, "f": 0.30000000000000004, "big": 12345678901234567890, "a": {"b": [1]}}'
    )
    node.properties["relevance_score"] = 0.1 + 0.2


def _foreign_id(node: Node) -> None:
    node.id = f"legacy-{42 + node.number - _position('foreign_id')}"
    node.has_point = False


def _integer_id(node: Node) -> None:
    node.id = 4200 + node.number


def _no_id(node: Node) -> None:
    node.id = None
    node.has_point = False


def _archived(node: Node) -> None:
    node.properties.update(archived=True, archived_at=node.properties["updated_at"], relevance_score=0.07)
    node.payload["archived"] = True


def _several_labels(node: Node) -> None:
    node.extra_labels = ("MetaMemory", "Pinned")


def _parallel(node: Node) -> None:
    node.relationships += [("RELATES_TO", {"strength": strength}, False) for strength in (0.25, 0.75)]


def _self(node: Node) -> None:
    node.relationships.append(("RELATES_TO", {"strength": 0.5}, True))


def _updated(node: Node) -> None:
    """PATCH /memory writes t_valid and t_invalid into the point, and no relevance_score."""
    node.properties["relevance_score"] = None
    node.payload.update(t_valid=node.properties["t_valid"], t_invalid=None)
    node.dropped_from_payload = ("relevance_score",)


def _invalidated(node: Node) -> None:
    node.properties["t_invalid"] = "2026-11-01T00:00:00+00:00"
    node.payload.update(t_valid=node.properties["t_valid"], t_invalid=node.properties["t_invalid"])
    node.relationships.append(("INVALIDATED_BY", {"reason": "superseded"}, False))


def _point_only(node: Node) -> None:
    node.payload.update(source_app="legacy-import", legacy_score=round(0.5 + node.number % 50 / 100, 2))


def _tags(node: Node) -> list[str]:
    tags = node.properties["tags"]
    return list(tags) if isinstance(tags, list) else []


_CHANGES: dict[str, Callable[[Node], None]] = {
    "quotes": _quotes,
    "newlines": _newlines,
    "emoji": _emoji,
    "blank": _blank,
    "empty": _empty,
    "missing_content": _missing,
    "malformed_metadata": _malformed_metadata,
    "numbers": _numbers,
    "foreign_id": _foreign_id,
    "integer_id": _integer_id,
    "no_id": _no_id,
    "archived": _archived,
    "several_labels": _several_labels,
    "parallel_relationships": _parallel,
    "self_relationship": _self,
    "updated": _updated,
    "invalidated": _invalidated,
    "point_only_keys": _point_only,
}
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


def _position(kind: str) -> int:
    return next(position for position, name in _POSITIONS.items() if name == kind)
