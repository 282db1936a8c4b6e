from __future__ import annotations

import json
import uuid
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

from lib.backup.points import all_points
from lib.clients.qdrant import collection, points
from lib.clients.qdrant import points as upsert
from lib.clients.qdrant.transport import NotFound, Qdrant, QdrantError, encode
from lib.errors import MissingData
from lib.verify.compare import vectors_differ
from tests.far_proxy import FarProxy
from tests.faulty_proxy import Fault, FaultyProxy, answer
from tests.vectors_support import (
    create_small,
    ids_of,
    payload_of,
    vectors_of,
)

pytest_plugins = ["tests.vectors_fixtures"]
pytestmark = pytest.mark.qdrant


def everything(q: Qdrant, name: str, **options) -> list[points.Point]:
    return [point for page in points.scroll(q, name, **options) for point in page]


def test_what_was_written_is_read_back_in_order_over_many_pages(q: Qdrant, filled: str):
    pages = list(points.scroll(q, filled, payload=True, vector=True, page=7))
    assert [len(page) for page in pages] == [7] * 7 + [1]
    found = [point for page in pages for point in page]
    assert [point.id for point in found] == ids_of(50)
    assert [point.payload for point in found] == [payload_of(index) for index in range(50)]
    stored = np.stack([point.vector for point in found])
    assert stored.dtype == np.float32
    assert not vectors_differ(stored, vectors_of(50, 8)).any()


def test_pages_hold_only_what_was_asked_for(q: Qdrant, filled: str):
    point = everything(q, filled)[0]
    assert (point.payload, point.vector) == (None, None)
    assert everything(q, filled, payload=["content"])[3].payload == {"content": payload_of(3)["content"]}


def test_a_last_page_that_is_full_is_not_followed_by_a_missing_one(q: Qdrant, filled: str):
    assert [len(page) for page in points.scroll(q, filled, page=25)] == [25, 25]


def test_count_retrieve_and_delete(q: Qdrant, filled: str):
    wanted = ids_of(50)[:3]
    points.delete_points(q, filled, [wanted[0], 77])
    assert points.count(q, filled) == 49
    found = points.retrieve(q, filled, wanted, payload=["importance"], vector=True)
    assert sorted(point.id for point in found) == wanted[1:]
    assert {point.payload["importance"] for point in found} == {0.01, 0.02}
    assert all(point.vector.shape == (8,) for point in found)


def test_retrieved_pages_hold_the_points_of_their_ids_in_the_order_of_the_pages(q: Qdrant, filled: str):
    ids = ids_of(50)
    asked = [[*ids[start : start + 7], start] for start in range(0, 50, 7)]  # no point has the number `start`
    pages = list(points.retrieve_pages(q, filled, asked, vector=True))
    assert [sorted(point.id for point in page) for page in pages] == [one[:-1] for one in asked]
    found = {point.id: point for page in pages for point in page}
    assert [found[one].payload for one in ids] == [payload_of(index) for index in range(50)]
    assert not vectors_differ(np.stack([found[one].vector for one in ids]), vectors_of(50, 8)).any()


@pytest.mark.parametrize("numbers", [[0.1, -2, 3.5e-40], [0.1, None, 2.0], [1e39, 0.0, -1e39]])
def test_a_vector_is_read_as_numpy_reads_its_numbers(numbers):
    with np.errstate(over="ignore"):
        wanted = np.array(numbers, dtype=np.float32)
    assert np.array_equal(points.float32s(numbers), wanted, equal_nan=True)


ROW = '{"id": 1, "payload": {"content": "%s", "n": %s}, "vector": %s}'


@pytest.mark.parametrize(
    ("payload", "vector"),
    [
        (("h\\u00e4llo \\ud83d\\ude00", "18446744073709551615"), "[0.1, -0.0, 3.5e-40, 1, 1e39, 0.30000001192092896]"),
        (("", "0.30000000000000004"), "[0.1, null, 2.0]"),
        (("", "18446744073709551616"), "[0.1, 2.0]"),
        (("", "-9223372036854775808"), "null"),
        (("", "null"), '{"": [0.5, 1], "sparse": {"indices": [1], "values": [0.5]}}'),
    ],
)
def test_every_form_of_a_page_is_read_as_pythons_json_reads_it(monkeypatch, payload, vector):
    """Pages of plain vectors are read by simdjson, which refuses the others."""
    text, response = ROW % (*payload, vector), requests.Response()
    response._content = f'{{"result": [{text}], "status": "ok", "time": 0.1}}'.encode()
    monkeypatch.setattr(Qdrant, "send", lambda *_args, **_options: response)
    pages = points.retrieve_pages(Qdrant("http://127.0.0.1:1"), "any", [[1]], vector=True)
    raw = json.loads(text)
    numbers = raw["vector"][""] if isinstance(raw["vector"], dict) else raw["vector"]
    with np.errstate(over="ignore"):
        ((found,),) = pages
        wanted = numbers and np.array(numbers, dtype=np.float32)
    assert (found.id, found.payload) == (1, raw["payload"])
    assert (found.vector is None) == (wanted is None)
    assert wanted is None or (found.vector.dtype == np.float32 and found.vector.tobytes() == wanted.tobytes())


NEW_PAYLOAD = {"content": "new", "relevance_score": 0.12345678901234567}


def test_a_payload_that_loses_keys_is_replaced_as_a_whole_and_the_vector_stays(q: Qdrant, filled: str):
    (before,) = points.retrieve(q, filled, ids_of(50)[7:8], payload=True, vector=True)
    points.update_payload(q, filled, before.id, before.payload, NEW_PAYLOAD)
    (after,) = points.retrieve(q, filled, [before.id], payload=True, vector=True)
    assert after.payload == NEW_PAYLOAD
    assert np.array_equal(after.vector, before.vector)


@pytest.mark.parametrize("score", [0.5, None, True, {"a": None}])
def test_only_what_differs_is_written_into_a_payload(q: Qdrant, filled: str, score):
    """Whatever the type of the value: a Qdrant removes keys that are set to null."""
    one = ids_of(50)[7]
    points.update_payload(q, filled, one, {"lost": 1}, {"content": "new", "other": [1, None], "score": 1})
    old = {"content": "was new", "other": [1, None], "score": 1}
    points.update_payload(q, filled, one, old, {**old, "score": score})
    (after,) = points.retrieve(q, filled, [one], payload=True)
    # With a null the whole payload is written, that of `old` included.
    assert after.payload == {**old, "content": "was new" if score is None else "new", "score": score}


def test_the_payload_of_a_deleted_point_is_not_written(q: Qdrant, filled: str):
    gone = str(uuid.uuid4())
    for old in ({}, {"lost": 1}):
        points.update_payload(q, filled, gone, old, NEW_PAYLOAD)
        assert points.retrieve(q, filled, [gone]) == []
        with pytest.raises(NotFound, match="doesn't exist"):
            points.update_payload(q, f"{filled}_missing", gone, old, NEW_PAYLOAD)


@pytest.mark.parametrize("is_read", [True, False])
def test_points_for_a_far_server_are_sent_compressed_unless_something_in_front_refuses_that(
    q: Qdrant, names: list[str], is_read: bool
):
    refused = Fault(b"(?i)content-encoding: gzip", answer=answer(415, "no gzip here"), times=None)
    port = urlsplit(q.base_url).port
    collection.create_like(q, names[1], collection.AUTOMEM_INFO, 768)
    with FaultyProxy(port, *([] if is_read else [refused])) as front, FarProxy(front.port) as counting:
        far = Qdrant(f"http://127.1:{counting.port}")  # an address that is not taken for this machine
        vectors = vectors_of(200, 768)
        for half in (slice(100), slice(100, 200)):
            payloads = [payload_of(index) for index in range(200)]
            assert points.upsert(far, names[1], ids_of(200)[half], vectors[half], payloads[half]) == []
        plain = sum(len(encode(vector)) for vector in vectors)
        assert (counting.up.bytes < 0.6 * plain) == is_read
    assert refused.hits == (0 if is_read else 1)
    stored = {point.id: point.vector for point in everything(q, names[1], vector=True)}
    assert not vectors_differ(np.stack([stored[one] for one in ids_of(200)]), vectors).any()


def test_integers_are_ids_too_and_come_first(q: Qdrant, filled: str):
    assert upsert.upsert(q, filled, [2**64 - 1, 5], vectors_of(2, 8), [{}, {"content": "x"}]) == []
    assert [point.id for point in everything(q, filled)] == [5, 2**64 - 1, *ids_of(50)]


def test_a_missing_collection_is_missing_data(q: Qdrant, names: list[str]):
    with pytest.raises(MissingData, match=names[1]):
        points.count(q, names[1])
    with pytest.raises(MissingData):
        everything(q, names[1])
    with pytest.raises(MissingData):
        upsert.upsert(q, names[1], [1], vectors_of(1, 8), [{}])


def test_one_bad_row_among_many_is_singled_out(q: Qdrant, filled: str):
    ids = list(range(1, 101))
    ids[37], ids[90] = "abc", -1
    payloads = [payload_of(index) for index in range(100)]
    payloads[11] = {"content": {1, 2}}
    vectors = vectors_of(100, 8)
    vectors[64, 3] = np.nan
    rejected = upsert.upsert(q, filled, ids, vectors, payloads)
    assert {row.id for row in rejected} == {"abc", -1, 12, 65}
    reasons = {row.id: row.reason for row in rejected}
    assert "not a valid point ID" in reasons["abc"]
    assert "not finite" in reasons[65]
    assert "not JSON" in reasons[12]
    assert points.count(q, filled) == 50 + 96


def test_no_rows_are_no_request(q: Qdrant, names: list[str]):
    assert upsert.upsert(q, names[1], [], np.empty((0, 8), np.float32), []) == []


def test_a_wrong_dimension_is_nobodys_row(q: Qdrant, filled: str):
    with pytest.raises(QdrantError, match="Vector dimension error: expected dim: 8, got 9"):
        upsert.upsert(q, filled, ids_of(5), vectors_of(5, 9), [{}] * 5)


def test_batches_stay_under_the_servers_limit_of_bytes(q: Qdrant, filled: str):
    payloads = [{"content": "x" * 400_000} for _ in range(100)]  # 40 MB, and the server takes 32 MiB
    assert upsert.upsert(q, filled, list(range(100)), vectors_of(100, 8), payloads) == []
    assert points.count(q, filled) == 150


def test_a_row_larger_than_any_request_is_rejected(q: Qdrant, filled: str):
    payloads = [{"content": "small"}, {"content": "x" * (31 * 1024 * 1024)}]
    (rejected,) = upsert.upsert(q, filled, [1, 2], vectors_of(2, 8), payloads)
    assert rejected.id == 2
    assert points.count(q, filled) == 51


def test_strict_mode_shrinks_batches_and_pages(q: Qdrant, names: list[str]):
    if q.version() < "1.13":
        pytest.skip("strict mode came with 1.13")
    create_small(q, names[0], 8)
    fields = {"enabled": True, "upsert_max_batchsize": 10, "max_query_limit": 6}
    q.json("PATCH", f"/collections/{names[0]}", {"strict_mode_config": fields})
    assert upsert.upsert(q, names[0], ids_of(64), vectors_of(64, 8), [{}] * 64) == []
    pages = list(points.scroll(q, names[0]))
    assert max(len(page) for page in pages) == 6
    assert [point.id for page in pages for point in page] == ids_of(64)


def test_points_are_counted_if_strict_mode_permits_nothing_exact(q: Qdrant, names: list[str]):
    if q.version() < "1.13":
        pytest.skip("strict mode came with 1.13")
    create_small(q, names[0], 8)
    upsert.upsert(q, names[0], ids_of(64), vectors_of(64, 8), [{}] * 64)
    fields = {"enabled": True, "search_allow_exact": False, "max_query_limit": 6}
    q.json("PATCH", f"/collections/{names[0]}", {"strict_mode_config": fields})
    with pytest.raises(QdrantError, match="Exact search disabled") as refused:
        q.json("POST", f"/collections/{names[0]}/points/count", {"exact": True})
    assert "strict_mode_config" in refused.value.next_step
    assert points.count(q, names[0]) == 64


def test_a_limit_of_reads_that_counts_each_id_stops_no_reading_of_all_points(q: Qdrant, names: list[str]):
    if q.version() < "1.13":
        pytest.skip("strict mode came with 1.13")
    create_small(q, names[0], 8)
    upsert.upsert(q, names[0], ids_of(64), vectors_of(64, 8), [payload_of(index) for index in range(64)])
    fields = {"enabled": True, "read_rate_limit": 30}
    q.json("PATCH", f"/collections/{names[0]}", {"strict_mode_config": fields})
    pages = list(all_points(q, names[0], page=40, vector=True))
    assert [[point.id for point in page] for page in pages] == [ids_of(64)[:40], ids_of(64)[40:]]
    assert pages[1][-1].payload == payload_of(63)
    assert pages[1][-1].vector is not None


def test_the_nearest_point_to_a_points_vector_is_itself(q: Qdrant, filled: str):
    hits = points.search(q, filled, vectors_of(50, 8)[17], 3)
    assert hits[0].id == ids_of(50)[17]
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert points.retrieve(q, filled, [hits[0].id], payload=True)[0].payload == payload_of(17)
    assert hits[0].score > hits[1].score > hits[2].score
    with pytest.raises(QdrantError, match="expected dim: 8, got 2"):
        points.search(q, filled, [1.0, 2.0], 3)
