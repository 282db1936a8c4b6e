"""The content of a point: ids as Qdrant accepts them, payloads by the rule."""

from __future__ import annotations

import pytest

from lib.backup.points import (
    PAYLOAD_KEYS,
    base_payload,
    in_form_of,
    merged_payload,
    node_payload,
    point_id,
    same,
)

UUID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        (UUID, UUID),
        (UUID.upper(), UUID),
        (UUID.replace("-", ""), UUID),
        (f"urn:uuid:{UUID}", UUID),
        (f"{{{UUID}}}", UUID),
        ("0" * 30 + "42", "00000000-0000-0000-0000-000000000042"),
        (0, 0),
        (42, 42),
        ((1 << 64) - 1, (1 << 64) - 1),
        ("42", 42),
        (str((1 << 64) - 1), (1 << 64) - 1),
        ("0", 0),
    ],
)
def test_ids_that_qdrant_can_hold(spelling, expected):
    assert point_id(spelling) == expected
    assert type(point_id(spelling)) is type(expected)


@pytest.mark.parametrize(
    "spelling",
    [
        "legacy-42", "", " ", f" {UUID}", f"{UUID} ", f"{UUID}\n", UUID[:-1], f"{UUID}0", UUID.replace("-", "_"),
        "007", "+1", "-1", "1.0", "1e3", "\u0664\u0662", str(1 << 64), "9" * 40, -1, 1 << 64, 1.0, True, None, [UUID],
    ],
)  # fmt: skip
def test_ids_that_qdrant_cannot_hold(spelling):
    assert point_id(spelling) is None


def test_what_only_the_point_holds_stays_and_what_only_the_node_holds_stays_out():
    live = {"content": "old", "tags": ["a"], "source_app": "import"}
    node = {
        "content": "new",
        "tags": ["a", "b"],
        "summary": "s",
        "enriched": True,
        "t_valid": "2026",
        "id": UUID,
    }
    assert merged_payload(live, node) == {"content": "new", "tags": ["a", "b"], "source_app": "import"}


@pytest.mark.parametrize("key", ["archived", "relevance_score"])
def test_consolidations_keys_are_taken_whenever_the_node_has_them(key):
    assert merged_payload({"content": "c"}, {"content": "c", key: 0.5}) == {"content": "c", key: 0.5}
    assert merged_payload({"content": "c", key: 0.9}, {"content": "c", key: 0.5})[key] == 0.5
    assert merged_payload({"content": "c"}, {"content": "c", key: False}) == {"content": "c", key: False}
    assert merged_payload({"content": "c", key: 0.9}, {"content": "c"})[key] == 0.9


def test_nulls_of_the_point_stay_until_the_graph_has_a_value():
    live = {"content": "c", "relevance_score": None, "t_invalid": None}
    assert merged_payload(live, {"content": "c"}) == live
    assert merged_payload(live, {"content": "c", "t_invalid": None}) == live
    assert merged_payload(live, {"content": "c", "t_invalid": "2026"})["t_invalid"] == "2026"
    assert merged_payload({"content": "c", "tags": ["a"]}, {"content": "c", "tags": None})["tags"] == ["a"]


def test_metadata_is_decoded():
    live = {"content": "c", "metadata": {"a": 1}}
    assert merged_payload(live, {"metadata": '{"a": 2, "b": null}'})["metadata"] == {"a": 2, "b": None}
    assert merged_payload(live, {"metadata": {"a": 3}})["metadata"] == {"a": 3}
    only_here = {"metadata": {"a": 1, "here": [1], "deep": {"b": 1, "c": 2}}}
    newer = {"metadata": '{"a": 2, "deep": {"b": 3}}'}
    wanted = {"a": 2, "here": [1], "deep": {"b": 3, "c": 2}}
    assert merged_payload(only_here, newer)["metadata"] == wanted
    as_text = {"metadata": '{"a":1,"here":[1]}'}
    assert merged_payload(as_text, {"metadata": '{"a": 2}'})["metadata"] == '{"a":2,"here":[1]}'
    assert merged_payload({"content": '{"a":1,"b":2}'}, {"content": '{"a": 2}'})["content"] == '{"a": 2}'
    assert node_payload({"metadata": '{"a": 2}'}) == {"metadata": {"a": 2}}


@pytest.mark.parametrize("malformed", ['{"a": ', "free words", "[1, 2]", "5", ""])
def test_malformed_metadata_does_not_drop_the_metadata_of_the_point(malformed):
    assert merged_payload({"metadata": {"a": 1}}, {"metadata": malformed})["metadata"] == {"a": 1}
    assert merged_payload({"metadata": "older words"}, {"metadata": malformed})["metadata"] == malformed
    assert merged_payload({"metadata": '{"a":1}'}, {"metadata": malformed})["metadata"] == '{"a":1}'
    assert node_payload({"metadata": malformed}) == {"metadata": malformed}


def test_a_double_that_the_graph_shows_with_15_digits_does_not_replace_the_full_one():
    live = {"relevance_score": 0.1 + 0.2, "metadata": {"deep": [1, {"f": 0.30000000000000004}]}}
    node = {"relevance_score": 0.3, "metadata": '{"deep": [1, {"f": 0.3}]}'}
    merged = merged_payload(live, node)
    assert repr(merged["relevance_score"]) == "0.30000000000000004"
    assert repr(merged["metadata"]["deep"][1]["f"]) == "0.30000000000000004"
    assert merged_payload(live, {"relevance_score": 0.3001})["relevance_score"] == 0.3001


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (1, 1.0, True), (True, 1, False), (False, 0, False), (True, True, True), (None, 0, False), ("1", 1, False),
        (1 << 60, (1 << 60) + 1, False), ([1, 2], [1, 2.0], True), ([1, 2], [2, 1], False), ([1], [1, 1], False), ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"a": 1, "b": None}, False), (1e300, 1e300 * (1 + 1e-15), True), (0.0, 1e-300, False),
    ],
)  # fmt: skip
def test_values_are_compared_as_the_stores_distinguish_them(left, right, equal):
    assert same(left, right) is equal
    assert same(right, left) is equal


def test_a_memory_without_a_point_gets_automems_keys_that_its_node_has():
    node = dict.fromkeys(PAYLOAD_KEYS, "x") | {"metadata": "{}", "summary": "s", "enriched": True, "id": UUID}
    node |= {"t_invalid": None, "processed": True, "embedding": [0.1]}
    wanted = dict.fromkeys(PAYLOAD_KEYS, "x") | {"metadata": {}}
    del wanted["t_invalid"]
    assert merged_payload(None, node) == wanted


def test_nothing_given_is_changed():
    live, node = {"metadata": {"a": 1}, "tags": ["a"]}, {"metadata": '{"a": 2}', "tags": ["b"]}
    merged_payload(live, node)
    base_payload(live, {"source_app": "x"})
    assert (live, node) == ({"metadata": {"a": 1}, "tags": ["a"]}, {"metadata": '{"a": 2}', "tags": ["b"]})


def test_a_payload_starts_from_the_live_point_else_from_the_saved_one():
    saved = {"content": "c", "source_app": "import"}
    assert base_payload(None, None) is None
    assert base_payload(None, saved) == saved
    assert base_payload({"content": "d", "tags": []}, {"content": "c", "tags": ["a"]}) == {
        "content": "d",
        "tags": [],
    }


def test_a_recreated_point_gets_back_what_only_the_old_one_held_and_what_recall_needs():
    saved = {
        "content": "c",
        "tags": ["a"],
        "source_app": "import",
        "archived": True,
        "t_valid": "2026",
        "n": None,
    }
    assert base_payload({"content": "d"}, saved) == {
        "content": "d",
        "tags": ["a"],
        "source_app": "import",
        "n": None,
    }


def test_while_the_migration_is_under_way_every_key_of_the_old_point_comes_back():
    saved = {"content": "c", "t_valid": "2026", "source_app": "import"}
    assert base_payload({"content": "d"}, saved, whole=True) == {**saved, "content": "d"}


NEEDED = {
    "content": "c",
    "tags": ["a"],
    "tag_prefixes": ["a"],
    "importance": 0.5,
    "timestamp": "2026-01-01T00:00:00+00:00",
    "type": "Decision",
    "confidence": 0.9,
    "metadata": '{"a": 1}',
    "t_invalid": "2026-02-01T00:00:00+00:00",
    "archived": True,
    "relevance_score": 0.4,
}


@pytest.mark.parametrize("key", NEEDED)
@pytest.mark.parametrize("live", [{}, {"content": "c", "relevance_score": 0.4}, {"source_app": "import"}])
def test_what_recall_reads_comes_from_the_node_wherever_the_point_lacks_it(key, live):
    node = {**NEEDED, "summary": "s", "t_valid": "2025", "updated_at": "2025", "last_accessed": "2025"}
    live = {one: value for one, value in live.items() if one != key}
    wanted = {"a": 1} if key == "metadata" else NEEDED[key]
    merged = merged_payload(base_payload(live, None), node)
    assert merged[key] == wanted
    assert merged_payload(base_payload(live, live), node)[key] == wanted
    assert merged.keys() == NEEDED.keys() | live.keys()


GEO = {"lon": 13.4, "lat": 52.52000812345}
FALKOR_POINT = {"latitude": 52.520008, "longitude": 13.4}  # as FalkorDB has it: 32 bits


@pytest.mark.parametrize(
    ("live", "node"),
    [
        (GEO, FALKOR_POINT),
        ([GEO, {"lon": 0.0, "lat": 0.0}], [FALKOR_POINT, {"latitude": 0.0, "longitude": 0.0}]),
        ({"a": 1, "b": [1, 2.5]}, '{"b": [1, 2.5], "a": 1}'),
        ([{"a": 1}, 2], '[{"a": 1}, 2]'),
        ('{"a":1}', {"a": 1}),
        ("[1, 2]", [1, 2]),
        (5, "5"),
        ("5", 5),
        (0.8, "0.80"),
        (True, "true"),
        ("false", False),
        ([0.123456789, 0.5], {"vecf32": [0.12345679, 0.5]}),
        ([0.123456789, 1], {"vecf32": [0.12345679, 1.0]}),
        ([[0.123456789]], {"vecf32": [[0.12345679]]}),
        ("[0.5]", {"vecf32": [0.5]}),
        ({"vecf32": [0.5]}, '{"vecf32": [0.5]}'),
        ({"not UTF-8": "a"}, '{"not UTF-8": "a"}'),
        ({**GEO, "name": "Berlin"}, FALKOR_POINT),
        ({"lon": 13, "lat": 52}, {"latitude": 52.0, "longitude": 13.0}),
        (["a"], "a"),
        ("a", ["a"]),
        ("2024-05-06T00:00:00Z", "2024-05-06"),
        ("2024-05-06", "2024-05-06T00:00:00+00:00"),
        ("2024-05-06 07:08:09.5", "2024-05-06t07:08:09.500z"),
        ("2024-05-06T07:08Z", "2024-05-06T09:08:00+0200"),
        ("2024-05-06T07:08:09.1234567Z", "2024-05-06T07:08:09.12345670+00:00"),
        (1714979289, "2024-05-06T07:08:09Z"),
        (1714979289000, "2024-05-06T07:08:09"),
        (1714979289.25, "2024-05-06T07:08:09.25Z"),
        (1714979289, "2024-05-06T07:08:09.75Z"),
        ("2024-05-06T07:08:09Z", 1714979289),
        ("2024-05-06T07:08:09Z", 1714979289000),
        (1767225600123456, 1.76722560012346e15),
        ("2024-05-06T07:08:09Z", "2024-05-06T07:08:09+00:00"),
        ("2024-05-06T09:08:09+02:00", "2024-05-06T07:08:09+00:00"),
        ("2024-05-06T07:08:09", "2024-05-06T07:08:09+00:00"),
        (["5", {"x": None}], [5, {"x": None}]),
        ({"deep": {"at": "2024-05-06T07:08:09Z"}}, {"deep": {"at": "2024-05-06T07:08:09+00:00"}}),
    ],
)
@pytest.mark.parametrize("key", ["mine", "metadata"])
def test_if_both_hold_the_same_value_in_two_forms_the_points_form_stays(live, node, key):
    merged = merged_payload({key: live}, {key: node})
    assert merged == {key: live}
    assert type(merged[key]) is type(live)


@pytest.mark.parametrize(
    ("live", "node", "written"),
    [
        (
            {**GEO, "name": "Berlin"},
            {"latitude": 1.5, "longitude": 2.5},
            {"lon": 2.5, "lat": 1.5, "name": "Berlin"},
        ),
        (1234567890123456788, 1234567890123456789, 1234567890123456789),
        (1767225600000000, 1767225600000001, 1767225600000001),
        (1767225600000000.0, 1767225600000001, 1767225600000001.0),
        (float(1 << 62), (1 << 62) + 1, (1 << 62) + 1),
        ({"n": 9007199254740992}, '{"n": 9007199254740993}', {"n": 9007199254740993}),
        (5, 6.0, 6),
        (5, 6.5, 6.5),
        (0.5, 1, 1.0),
        ([1767225600.0], [1767225610.0], [1767225610.0]),  # doubles, no vector
        ([52.5200065], [52.5200066], [52.5200066]),
        (["a"], "b", ["b"]),
        ("a", ["b"], "b"),
        ("a", ["a", "b"], ["a", "b"]),
        (["a"], [["a"], ["b"]], [["a"], ["b"]]),
        ("2024-05-06T07:08:09.1234567Z", "2024-05-06T07:08:09.1234568Z", "2024-05-06T07:08:09.1234568Z"),
        ("2024-05-06T07:08:09Z", "2025-05-06", "2025-05-06"),
        (1714979289, "2024-05-06T07:08:19Z", 1714979299),
        (1714979289000, "2024-05-06T07:08:09.001Z", 1714979289001),
        ("2024-05-06T07:08:09Z", 1714979299, "2024-05-06T07:08:19Z"),
        (5, "2024-05-06T07:08:09Z", "2024-05-06T07:08:09Z"),
        ("2024-05-06T07:08:09Z", 5, 5),
        ("2024-05-06T07:08:09Z", -90_000_000_000, -90_000_000_000),  # before the year 1
        (GEO, {"latitude": 1.5, "longitude": 13.4}, {"lon": 13.4, "lat": 1.5}),
        ([GEO], [{"latitude": 1.5, "longitude": 2.5}] * 2, [{"lon": 2.5, "lat": 1.5}] * 2),
        ({"a": 1}, '{"a": 2}', {"a": 2}),
        ('{"a":1}', {"a": 2}, '{"a":2}'),
        ([1], "[1, 2]", [1, 2]),
        ("[1]", [1, 2], "[1,2]"),
        (5, "6", 6),
        ("5", 6, "6"),
        (True, "false", False),
        ("2024-05-06T07:08:09Z", "2025-05-06T07:08:09+00:00", "2025-05-06T07:08:09Z"),
        ("2024-05-06T07:08:09+00:00", "2025-05-06T07:08:09Z", "2025-05-06T07:08:09+00:00"),
        ("2024-05-06T07:08:09", "2025-05-06T07:08:09+00:00", "2025-05-06T07:08:09"),
        ("2024-05-06T07:08:09Z", "2025-05-06T07:08:09+02:00", "2025-05-06T07:08:09+02:00"),
        # A form that cannot be preserved is replaced.
        ({"a": 1}, "free words", "free words"),
        ({"a": 1}, "[1]", "[1]"),
        ("free words", 5, 5),
        (None, '{"a": 1}', '{"a": 1}'),
        (1, True, True),
        ("null", 5, 5),
        ("5", "6", "6"),
        (["a"], ["b", "c"], ["b", "c"]),
        (["a"], [], []),
        ([], ["b"], ["b"]),
    ],
)
def test_what_is_newer_in_the_graph_is_written_in_the_points_form(live, node, written):
    formed = in_form_of(live, node)
    assert formed == written
    assert type(formed) is type(written)
    assert merged_payload({"mine": live}, {"mine": node}) == {"mine": written}


def test_text_that_is_no_utf8_replaces_nothing_readable():
    node = {"tags": {"not UTF-8": ["a", "caf\ufffd"]}, "type": {"not UTF-8": "D\ufffdcision"}}
    live = {"tags": ["a", "caf\u00e9"], "type": "D\u00e9cision"}
    assert merged_payload(live, node) == live
    assert merged_payload({"tags": None}, node) == {"tags": ["a", "caf\ufffd"], "type": "D\ufffdcision"}
    assert node_payload(node) == {"tags": ["a", "caf\ufffd"], "type": "D\ufffdcision"}
