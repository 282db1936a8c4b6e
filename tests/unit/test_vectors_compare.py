from __future__ import annotations

from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from lib.clients.qdrant.snapshots import restorable
from lib.verify.compare import Findings, Sample, cosine, vectors_differ


def rows(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, size)).astype(np.float32)


def stored(vectors: np.ndarray) -> np.ndarray:
    lengths = np.sqrt((vectors * vectors).sum(axis=1, dtype=np.float32, keepdims=True))
    return (vectors / lengths).astype(np.float32)


@pytest.mark.parametrize("size", [4, 768, 3072])
def test_normalised_storage_is_equal_and_a_changed_number_is_not(size: int):
    sent = rows(50, size)
    saved = stored(sent)
    assert not vectors_differ(saved, sent).any()
    changed = saved.copy()
    changed[7, 2] += 1e-4
    changed[9] = -changed[9]
    assert list(np.flatnonzero(vectors_differ(changed, sent))) == [7, 9]


def test_other_distances_keep_the_bits():
    sent = rows(3, 8)
    assert not vectors_differ(sent, sent, "Dot").any()
    assert vectors_differ(stored(sent), sent, "Dot").all()


@pytest.mark.parametrize("distance", ["Cosine", "Dot", "Euclid", "Manhattan"])
@pytest.mark.parametrize("datatype", ["float32", "float16", "uint8", "turbo4"])
def test_every_datatype_is_compared_as_the_engine_stores_it(datatype, distance, tmp_path):
    edge = pytest.importorskip("qdrant_edge")
    sent = rows(20, 96) * (100 if datatype == "uint8" else 1)
    params = edge.EdgeVectorParams(
        size=96,
        distance=getattr(edge.Distance, distance),
        datatype=getattr(edge.VectorStorageDatatype, datatype.capitalize()),
    )
    shard = edge.EdgeShard.create(str(tmp_path), edge.EdgeConfig(vectors=params))
    points = [edge.Point(id=number, vector=one.tolist(), payload={}) for number, one in enumerate(sent)]
    shard.update(edge.UpdateOperation.upsert_points(points))
    found = sorted(shard.retrieve(list(range(20)), False, True), key=lambda one: one.id)
    saved = np.array([one.vector for one in found], dtype=np.float32)
    shard.close()
    assert not vectors_differ(saved, sent, distance, datatype).any()
    changed = saved.copy()
    changed[7] = changed[8]
    changed[9, 3] = np.nan
    changed[11, 5] += 0 if datatype == "turbo4" else 1
    wrong = [7, 9] if datatype == "turbo4" else [7, 9, 11]
    assert list(np.flatnonzero(vectors_differ(changed, sent, distance, datatype))) == wrong


def test_a_float16_may_be_rounded_to_its_neighbour_and_no_further():
    sent = rows(4, 768)
    component = stored(sent).astype(np.float16)
    near = np.nextafter(component, np.float16(1)).astype(np.float32)
    far = np.nextafter(np.nextafter(component, np.float16(1)), np.float16(1)).astype(np.float32)
    assert not vectors_differ(near, sent, "Cosine", "float16").any()
    assert vectors_differ(far, sent, "Cosine", "float16").all()


def test_a_datatype_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="float8"):
        vectors_differ(rows(1, 4), rows(1, 4), "Cosine", "float8")


def test_zeros_widths_and_infinities():
    zeros = np.zeros((1, 4), np.float32)
    assert not vectors_differ(zeros, zeros).any()
    assert vectors_differ(zeros, rows(1, 4)).all()
    assert vectors_differ(rows(2, 4), rows(2, 5)).tolist() == [True, True]
    broken = rows(1, 4)
    broken[0, 0] = np.nan
    assert vectors_differ(broken, broken).all()


@pytest.mark.parametrize(
    ("backup", "server"),
    [("1.11.3", "1.11.3"), ("1.11.3", "1.11.5"), ("1.11.5", "1.11.3"), ("1.11.3", "1.12.0")],
)
def test_the_same_and_the_next_minor_take_a_snapshot(backup: str, server: str):
    assert restorable(backup, server) is None


@pytest.mark.parametrize(
    ("backup", "server"),
    [("1.11.3", "1.18.3"), ("1.11.3", "1.13.0"), ("1.18.3", "1.17.0"), ("1.11.3", "2.11.3")],
)
def test_other_versions_do_not(backup: str, server: str):
    reason = restorable(backup, server)
    assert reason is not None
    assert backup in reason
    assert server in reason


def test_an_unknown_version_does_not():
    assert "not known" in str(restorable("", "1.11.3"))
    assert "not known" in str(restorable("1.11.3", "dev"))


def test_the_cosine_of_a_vector_of_zeros_is_no_likeness():
    one = np.array([3, 4], dtype=np.float32)
    assert cosine(one, 2 * one) == pytest.approx(1)
    assert cosine(one, np.zeros(2, dtype=np.float32)) == 0


def test_of_the_memories_since_the_migration_the_newest_and_the_same_few_are_chosen():
    begin = datetime(2026, 1, 1, tzinfo=timezone.utc)
    written = [(begin + timedelta(minutes=number), Sample(f"id-{number}", "text")) for number in range(100)]
    chosen = []
    for order in (written, written[::-1]):
        found = Findings()
        for one in order:
            found.add_since(*one)
        chosen.append(found.since)
    assert chosen[0] == chosen[1]
    assert chosen[0][:3] == written[:-4:-1]
    assert 8 <= len(chosen[0]) <= 11
    assert min(chosen[0]) < written[50]
