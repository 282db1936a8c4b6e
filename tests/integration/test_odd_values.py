"""Odd values in a node or in a point: nothing is lost or changed without a report."""

from __future__ import annotations

import pytest

from lib.clients.falkordb.connection import connect
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, SMALL
from tests.reembed_support import assert_vectors, points_of, upgrade
from tests.sandbox.vectors import vector_for

pytestmark = pytest.mark.qdrant

IDS = [f"00000000-0000-4000-8000-{number:012d}" for number in range(12)]
INDEXES = {"tags": "keyword", "tag_prefixes": "keyword", "where": "geo"}


@pytest.fixture
def odd(operator):
    """Twelve plain memories with points; each test makes some of them odd."""
    for number, identity in enumerate(IDS):
        operator.cypher(
            "CREATE (:Memory {id: $id, content: $text, tags: ['a'], tag_prefixes: ['a'], importance: 0.5,"
            " timestamp: '2026-01-01T00:00:00+00:00', type: 'Memory', confidence: 0.9, metadata: '{}'})",
            id=identity,
            text=f"caf\u00e9 number {number}",
        )
    operator.call("PUT", "", {"vectors": {"size": OLD_SIZE, "distance": "Cosine"}})
    for field, kind in INDEXES.items():
        operator.call("PUT", "/index?wait=true", {"field_name": field, "field_schema": kind})
    put(operator, {identity: payload_of(number) for number, identity in enumerate(IDS)})
    return operator


def payload_of(number: int) -> dict:
    return {
        "content": f"caf\u00e9 number {number}",
        "tags": ["a"],
        "tag_prefixes": ["a"],
        "importance": 0.5,
        "timestamp": "2026-01-01T00:00:00+00:00",
        "type": "Memory",
        "confidence": 0.9,
        "metadata": {},
    }


def put(operator, payloads: dict[str, dict]) -> None:
    rows = [
        {
            "id": one,
            "payload": payload,
            "vector": vector_for(SMALL, payload.get("content", ""), OLD_SIZE).tolist(),
        }
        for one, payload in payloads.items()
    ]
    operator.call("PUT", "/points?wait=true", {"points": rows})


def raw_cypher(operator, query: bytes) -> None:
    with connect(operator.servers.falkordb.address) as conn:
        conn.execute_command("GRAPH.QUERY", operator.graph, query)


def migrate(operator, *words: str, expect: int = 0):
    operator.run("backup_automem")
    upgrade(operator)
    return operator.run("reembed_embeddings", *words, expect=expect)


def payloads(operator) -> dict[str, dict]:
    return {one: payload for one, (payload, _) in points_of(operator).items()}


def found(operator, condition: dict) -> int:
    return operator.call("POST", "/points/count", {"filter": {"must": [condition]}, "exact": True})["count"]


ODD = {
    "a byte that is not UTF-8": ("'caf\xe9 number 3'", "content is not valid UTF-8"),
    "an emptied one": ("''", "blank content"),
    "spaces": ("' \\n '", "blank content"),
    "a number": ("5", "content is a number, not text"),
    "a double": ("0.5", "content is a number, not text"),
    "a truth value": ("true", "content is true or false, not text"),
    "a list": ("['caf']", "content is a list, not text"),
    "a list that is not UTF-8": ("['caf\xe9']", "content is a list, not text"),
    "a point": ("point({latitude: 1, longitude: 2})", "content is a geo point, not text"),
    "a vector": ("vecf32([0.5])", "content is a list, not text"),
    "no content": ("null", "blank content"),
}


def make_odd(operator, cypher: str) -> None:
    query = f"MATCH (m:Memory {{id: '{IDS[3]}'}}) SET m.content = {cypher}"
    raw_cypher(operator, query.encode("latin-1"))


@pytest.mark.parametrize(
    "kind",
    [one if number < 2 else pytest.param(one, marks=pytest.mark.matrix) for number, one in enumerate(ODD)],
)
@pytest.mark.parametrize("words", [(), pytest.param(("--in-place",), marks=pytest.mark.matrix)])
def test_a_point_whose_memory_has_no_text_keeps_its_content_and_is_listed(odd, kind, words):
    cypher, reason = ODD[kind]
    make_odd(odd, cypher)
    before = payloads(odd)
    done = migrate(odd, *words, expect=3)
    assert f"memory {IDS[3]}: {reason}" in done.err
    assert "have no memory" not in done.err
    assert payloads(odd) == before
    assert_vectors(points_of(odd), LARGE, NEW_SIZE)
    odd.run("verify_migration")
    again = odd.run("reembed_embeddings", "--only-missing", "--json").json
    assert (again["added"], again["changed"], again["payloads"], again["removed"]) == (0, 0, 0, 0)
    assert payloads(odd) == before


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ODD)
def test_only_missing_and_verify_leave_such_a_point_alone(odd, kind):
    make_odd(odd, ODD[kind][0])
    before = odd.state()
    done = odd.run("reembed_embeddings", "--only-missing", "--json").json
    assert (done["added"], done["changed"], done["payloads"], done["removed"]) == (0, 0, 0, 0)
    assert odd.state() == before
    odd.run("verify_migration")


@pytest.mark.matrix
def test_neither_the_memory_nor_its_point_has_a_text(odd):
    make_odd(odd, "''")
    odd.call("POST", "/points/payload/clear?wait=true", {"points": [IDS[3]]})
    done = migrate(odd, expect=3)
    assert f"memory {IDS[3]} exists, but neither it nor its point has a text" in done.err
    assert "have no memory" not in done.err
    assert payloads(odd).keys() == {*IDS} - {IDS[3]}


@pytest.mark.parametrize("point", ["none", pytest.param("blank", marks=pytest.mark.matrix)])
def test_a_memory_with_a_bad_byte_and_no_text_in_a_point_is_embedded_as_far_as_it_is_readable(odd, point):
    make_odd(odd, ODD["a byte that is not UTF-8"][0])
    if point == "none":
        odd.call("POST", "/points/delete?wait=true", {"points": [IDS[3]]})
    else:
        odd.call("POST", "/points/payload?wait=true", {"points": [IDS[3]], "payload": {"content": " "}})
    migrate(odd, expect=3)
    assert payloads(odd)[IDS[3]]["content"] == "caf\ufffd number 3"
    assert_vectors(points_of(odd), LARGE, NEW_SIZE)


def test_other_text_that_is_not_utf8_replaces_nothing(odd):
    query = f"MATCH (m:Memory {{id: '{IDS[3]}'}}) SET m.tags = ['a', 'caf\xe9'], m.type = 'D\xe9cision'"
    raw_cypher(odd, query.encode("latin-1"))
    tags = {"tags": ["a", "caf\u00e9"], "type": "D\u00e9cision"}
    odd.call("POST", "/points/payload?wait=true", {"points": [IDS[3]], "payload": tags})
    before = payloads(odd)
    migrate(odd)
    assert payloads(odd) == before
    odd.run("verify_migration")


@pytest.mark.parametrize("words", [(), pytest.param(("--in-place",), marks=pytest.mark.matrix)])
def test_a_point_without_the_keys_that_recall_reads_gets_them_from_its_node(odd, words):
    """As AutoMem's own re-embed writes points, and after a payload was cleared."""
    before = payloads(odd)
    body = {"points": IDS[:6], "keys": ["tag_prefixes", "type", "importance", "metadata"]}
    odd.call("POST", "/points/payload/delete?wait=true", body)
    odd.call("POST", "/points/payload/clear?wait=true", {"points": IDS[6:9]})
    assert odd.run("verify_migration", expect=4)
    migrate(odd, *words)
    assert payloads(odd) == before
    assert found(odd, {"key": "tag_prefixes", "match": {"value": "a"}}) == len(IDS)
    odd.run("verify_migration")


def test_only_missing_repairs_missing_keys_and_cleared_payloads(odd):
    before = payloads(odd)
    odd.call("POST", "/points/payload/delete?wait=true", {"points": IDS[:3], "keys": ["tag_prefixes"]})
    odd.call("POST", "/points/payload/clear?wait=true", {"points": IDS[3:5]})
    done = odd.run("reembed_embeddings", "--only-missing", "--json").json
    # The vector of a point without its content may be of another text.
    assert (done["payloads"], done["changed"]) == (3, 2)
    assert payloads(odd) == before
    assert_vectors(points_of(odd), SMALL, OLD_SIZE)
    odd.run("verify_migration")


FORMS = {
    "where": ("point({latitude: 52.5, longitude: 13.4})", {"lon": 13.4, "lat": 52.5}),
    "places": ("[point({latitude: 52.5, longitude: 13.4})]", [{"lon": 13.4, "lat": 52.5}]),
    "origin": ('\'{"app": "import", "n": [1, null]}\'', {"app": "import", "n": [1, None]}),
    "seen": ("localdatetime('2026-01-01T00:00:00')", "2026-01-01T00:00:00Z"),
    "count": ("'5'", 5),
    "flag": ("'true'", True),
    "ratio": ("0.3", 0.1 + 0.2),
    "axis": ("vecf32([0.1, 0.7])", [0.1, 0.7]),
    "ttl": ("duration('P30D')", "P30D"),
    "day": ("date('2026-01-01')", "2026-01-01"),
    "text": ("'{\"a\": 1}'", '{"a": 1}'),
    "place": ("point({latitude: 52.5, longitude: 13.4})", {"lon": 13.4, "lat": 52.5, "name": "Berlin"}),
    "axes": ("[vecf32([0.1]), vecf32([0.7])]", [[0.100000001], [0.7]]),
    "epoch": ("localdatetime('2026-01-01T00:00:00')", 1767225600),
    "spoken": ("'2026-01-01 00:00:00.000'", "2026-01-01T00:00:00Z"),
    "labels": ("'a'", ["a"]),
}


@pytest.mark.parametrize("words", [(), pytest.param(("--in-place",), marks=pytest.mark.matrix)])
def test_the_same_value_in_two_forms_keeps_the_points_form(odd, words):
    sets = ", ".join(f"m.{key} = {cypher}" for key, (cypher, _) in FORMS.items())
    odd.cypher(f"MATCH (m:Memory) SET {sets}")
    body = {"points": IDS, "payload": {key: value for key, (_, value) in FORMS.items()}}
    odd.call("POST", "/points/payload?wait=true", body)
    before = payloads(odd)
    near = {"key": "where", "geo_radius": {"center": {"lon": 13.4, "lat": 52.5}, "radius": 10.0}}
    assert found(odd, near) == len(IDS)
    odd.run("verify_migration")
    migrate(odd, *words)
    after = payloads(odd)
    assert after == before
    assert {key: type(value) for key, value in after[IDS[0]].items()} == {
        key: type(value) for key, value in before[IDS[0]].items()
    }
    assert found(odd, near) == len(IDS)
    odd.run("verify_migration")


def test_a_newer_value_is_written_in_the_points_form(odd):
    odd.call(
        "POST",
        "/points/payload?wait=true",
        {"points": IDS[:1], "payload": {"where": {"lon": 13.4, "lat": 52.5}, "origin": {"n": 1}, "count": 5}},
    )
    odd.cypher(
        "MATCH (m:Memory {id: $id}) SET m.where = point({latitude: 48.1, longitude: 11.6}),"
        " m.origin = '{\"n\": 2}', m.count = '6'",
        id=IDS[0],
    )
    migrate(odd)
    after = payloads(odd)[IDS[0]]
    assert (after["where"], after["origin"], after["count"]) == ({"lon": 11.6, "lat": 48.1}, {"n": 2}, 6)
    near = {"key": "where", "geo_radius": {"center": {"lon": 11.6, "lat": 48.1}, "radius": 10.0}}
    assert found(odd, near) == 1
    odd.run("verify_migration")


NEWER = {
    "number": ("1234567890123456789", 1234567890123456788, 1234567890123456789),
    "micros": ("1767225600000001", 1767225600000000.0, 1767225600000001.0),
    "whole": ("6.0", 5, 6),
    "times": ("[1767225610.0]", [1767225600.0], [1767225610.0]),
    "nanos": (
        "'2026-01-01T00:00:00.1234568Z'",
        "2026-01-01T00:00:00.1234561Z",
        "2026-01-01T00:00:00.1234568Z",
    ),
    "flag": ("true", 1, True),
    "flags": ("[true, false]", [1, 0], [True, False]),
    "labels": ("'b'", ["a"], ["b"]),
    "place": (
        "point({latitude: 48.5, longitude: 11.5})",
        {"lon": 13.4, "lat": 52.5, "name": "Berlin"},
        {"lon": 11.5, "lat": 48.5, "name": "Berlin"},
    ),
}


@pytest.mark.parametrize("words", [("--only-missing",), pytest.param((), marks=pytest.mark.matrix)])
def test_a_small_difference_is_reported_and_written(odd, words):
    """Python takes 1 for true, a double or its own moments for what they only come near to: JSON does not."""
    sets = ", ".join(f"m.{key} = {cypher}" for key, (cypher, _, _) in NEWER.items())
    odd.cypher(f"MATCH (m:Memory {{id: $id}}) SET {sets}", id=IDS[0])
    body = {"points": IDS[:1], "payload": {key: value for key, (_, value, _) in NEWER.items()}}
    odd.call("POST", "/points/payload?wait=true", body)
    before = payloads(odd)
    checks = odd.run("verify_migration", "--json", expect=4).json["checks"]
    (detail,) = (one["detail"] for one in checks if one["name"] == "payloads")
    assert f"{IDS[0]} ({', '.join(sorted(NEWER))})" in detail
    if words:
        assert odd.run("reembed_embeddings", *words, "--json").json["payloads"] == 1
    else:
        migrate(odd)
    after = payloads(odd)
    wanted = {**before[IDS[0]], **{key: value for key, (_, _, value) in NEWER.items()}}
    assert repr(sorted(after[IDS[0]].items())) == repr(sorted(wanted.items()))
    assert {**after, IDS[0]: before[IDS[0]]} == before
    odd.run("verify_migration")


@pytest.mark.parametrize("words", [("--only-missing",), pytest.param((), marks=pytest.mark.matrix)])
def test_a_memory_whose_id_is_spelled_in_mixed_case_exists(odd, words):
    one = "abcdef00-0000-4000-8000-000000000000"
    odd.cypher("CREATE (:Memory {id: $id, content: ''})", id=one.replace("abc", "aBc"))
    row = {"id": one, "payload": {"note": "mine"}, "vector": vector_for(SMALL, "x", OLD_SIZE).tolist()}
    odd.call("PUT", "/points?wait=true", {"points": [row]})
    before = payloads(odd)
    odd.run("backup_automem", "--only", "qdrant")
    if words:
        assert odd.run("reembed_embeddings", *words, "--json").json["removed"] == 0
        assert payloads(odd) == before
        odd.run("verify_migration")
    else:
        done = migrate(odd, expect=3)
        assert f"memory {one} exists, but neither it nor its point has a text" in done.err
        assert "have no memory" not in done.err


def test_every_type_of_a_property_is_no_obstacle(odd):
    """Durations ended verify in a traceback and a re-embedding in an error without a next step."""
    odd.cypher(
        "MATCH (m:Memory) SET m.ttl = duration('P1Y2M3DT4H5M6S'), m.each = [duration('PT1S'), date('2026-01-01')],"
        " m.at = localtime('07:08:09'), m.inf = 1.0 / 0.0, m.infs = [1.0 / 0.0], m.far = localdatetime('9999-12-31T23:59:59')"
    )
    odd.call(
        "POST",
        "/points/payload?wait=true",
        {"points": IDS[:2], "payload": {"ttl": "P1D", "inf": 5, "infs": [5]}},
    )
    odd.run("verify_migration", expect=4)  # ttl differs
    migrate(odd)
    after = payloads(odd)
    assert (after[IDS[0]]["ttl"], after[IDS[0]]["inf"], after[IDS[0]]["infs"]) == ("P1Y2M3DT4H5M6S", 5, [5])
    assert "ttl" not in after[IDS[5]]
    odd.run("verify_migration")
