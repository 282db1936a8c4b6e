from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lib.clients.embeddings.cache import EmbeddingCache, MemoryRow, SavedPoint
from lib.clients.embeddings.cache_file import CacheDamaged, prune_cache
from lib.dimensions import VOYAGE, EmbeddingSpec
from tests.cache_support import stored_count

SPEC = EmbeddingSpec("http://127.0.0.1:9/v1", "text-embedding-3-large", 8)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "embeddings" / "memories.sqlite3"


@pytest.fixture
def cache(path):
    with EmbeddingCache(path) as opened:
        yield opened


def blob(seed, size=8):
    row = np.random.default_rng(seed).normal(size=size)
    return (row / np.linalg.norm(row)).astype("<f4").tobytes()


def memory(cache, number, text, spec=SPEC):
    key = cache.text_key(spec, text)
    return MemoryRow(f"00000000-0000-4000-8000-{number:012d}", number, key, text, b'{"content":"x"}', 3)


def scan(cache, texts, spec=SPEC):
    cache.begin_scan()
    cache.put_memories([memory(cache, number, text, spec) for number, text in texts.items()])
    return cache.end_scan()


def test_the_file_is_private_and_durable(cache, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    wal = path.with_name(path.name + "-wal")
    assert stat.S_IMODE(wal.stat().st_mode) == 0o600
    assert cache.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert cache.db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert cache.size_bytes() > 0


def test_a_key_changes_with_endpoint_model_size_and_text_but_not_with_credentials(cache):
    key = cache.text_key(SPEC, "a text")
    others = [
        cache.text_key(replace(SPEC, base_url="http://127.0.0.1:10/v1"), "a text"),
        cache.text_key(replace(SPEC, model="text-embedding-3-small"), "a text"),
        cache.text_key(replace(SPEC, size=4), "a text"),
        cache.text_key(SPEC, "a text "),
        cache.text_key(SPEC, "A text"),
    ]
    assert len(key) == 16
    assert len({key, *others}) == 6
    assert cache.text_key(replace(SPEC, base_url="http://user:secret@127.0.0.1:9/v1/"), "a text") == key
    assert cache.text_key(replace(SPEC, base_url=""), "a") == cache.text_key(
        replace(SPEC, base_url="https://api.openai.com/v1"), "a"
    )


def test_vectors_come_back_as_stored_and_outlive_the_process(path):
    with EmbeddingCache(path) as cache:
        keys = [cache.text_key(SPEC, f"text {n}") for n in range(1200)]
        cache.put_vectors([(key, blob(n)) for n, key in enumerate(keys)])
        stranger = cache.text_key(SPEC, "never stored")
    with EmbeddingCache(path) as cache:
        assert stored_count(cache, SPEC) == 1200
        assert stored_count(cache, replace(SPEC, size=4)) == 0
        assert cache.known([*keys, stranger]) == set(keys)
        found = cache.get_vectors([*keys, stranger])
        assert found == {key: blob(n) for n, key in enumerate(keys)}


def test_a_stored_vector_is_never_replaced(cache):
    key = cache.text_key(SPEC, "x")
    cache.put_vectors([(key, blob(1))])
    cache.put_vectors([(key, blob(2))])
    assert cache.get_vectors([key]) == {key: blob(1)}


DAMAGES = {
    "a bit": lambda stored, _: bytes([stored[0] ^ 1]) + stored[1:],
    "a bit of the checksum": lambda stored, _: stored[:-1] + bytes([stored[-1] ^ 128]),
    "all zeros": lambda stored, _: bytes(len(stored)),
    "cut": lambda stored, _: stored[:-5],
    "empty": lambda *_: b"",
    "longer": lambda stored, _: stored + b"\0",
    "another text's": lambda _, other: other,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_vector_is_never_given_and_only_it_is_embedded_again(path, damage):
    with EmbeddingCache(path) as cache:
        keys = [cache.text_key(SPEC, text) for text in ("good", "bad")]
        cache.put_vectors([(key, blob(n)) for n, key in enumerate(keys)])
        good, bad = (stored for (stored,) in cache.rows("SELECT vector FROM vectors ORDER BY id"))
        cache.db.execute("UPDATE vectors SET vector = ? WHERE id = 2", [DAMAGES[damage](bad, good)])
    with EmbeddingCache(path) as cache:
        with pytest.raises(CacheDamaged, match=r"embeddings in .* were damaged .*: 1, which were removed") as caught:
            cache.get_vectors(keys)
        assert "run the same command again" in caught.value.next_step
        assert cache.known(keys) == {keys[0]}
        assert cache.get_vectors(keys) == {keys[0]: blob(0)}


def test_vectors_cached_under_another_name_of_the_model_are_reused(cache):
    """A gateway calls it `openai/...`; an unknown model behind a prefix is another one."""
    named, other = replace(SPEC, model=f"openai/{SPEC.model}"), replace(SPEC, model="openai/one of its own")
    cache.put_vectors([(cache.text_key(named, "a"), blob(1)), (cache.text_key(other, "b"), blob(2))])
    assert cache.derive(SPEC, ["a", "b"]) == [(cache.text_key(SPEC, "a"), blob(1))]
    assert cache.derive(replace(SPEC, base_url="http://127.0.0.1:10/v1"), ["a"]) == []


def test_a_cache_that_cannot_be_written_is_not_to_be_moved_away(path):
    """Missing rights, or a disk mounted read-only: the paid vectors are intact."""
    with EmbeddingCache(path):
        pass
    with EmbeddingCache(path) as cache:
        cache.db.execute("PRAGMA query_only = ON")
        with pytest.raises(CacheDamaged, match="readonly") as caught:
            cache.set_meta("a", "b")
    assert "make it writable again" in caught.value.next_step
    assert "paid for again" not in caught.value.next_step


@pytest.mark.parametrize(
    ("answer", "step"),
    [
        ("disk I/O error", "look at its disk, and name a folder on a local one with --backup-dir:"),
        ("database is locked", "its disk cannot lock files: name a folder on a local disk with --backup-dir"),
    ],
)
def test_a_network_disk_without_locks_or_mapped_files_is_to_be_replaced_by_a_local_one(cache, answer, step):
    """What SQLite answers there. To wait for another process, or to change the rights, would not help."""
    with pytest.raises(CacheDamaged, match=answer) as caught, cache.guarded():
        raise sqlite3.OperationalError(answer)
    assert step in caught.value.next_step


def test_vectors_that_an_earlier_version_stored_are_read(path):
    """The files have no checksum."""
    with EmbeddingCache(path) as cache:
        key = cache.text_key(SPEC, "old")
        cache.db.execute("INSERT INTO vectors (key, vector) VALUES (?, ?)", [key, blob(3)])
    with EmbeddingCache(path) as cache:
        assert cache.get_vectors([cache.text_key(SPEC, "old")]) == {key: blob(3)}


@pytest.mark.parametrize("bad", [b"", blob(1, 4), blob(1, 16)])
def test_a_vector_of_the_wrong_width_stores_nothing(cache, bad):
    good, wrong = cache.text_key(SPEC, "good"), cache.text_key(SPEC, "wrong")
    with pytest.raises(ValueError, match="dimensions"):
        cache.put_vectors([(good, blob(1)), (wrong, bad)])
    assert cache.known([good, wrong]) == set()


def test_only_the_texts_and_size_of_the_plan_are_forgotten(cache):
    other = replace(SPEC, size=4)
    preserved = [cache.text_key(SPEC, "of another graph"), cache.text_key(other, "a")]
    mine = cache.text_key(SPEC, "a")
    cache.put_memories([MemoryRow(1, 1, mine, "a", b"{}", 1)])
    cache.put_vectors([(mine, blob(1)), (preserved[0], blob(2)), (preserved[1], blob(1, 4))])
    assert cache.missing_total().texts == 0
    assert cache.forget_planned() == 1
    assert cache.known([mine, *preserved]) == set(preserved)
    assert cache.missing_total() == cache.text_total()


def test_a_smaller_size_is_cut_and_scaled_from_the_nearest_larger_one(cache):
    large, smaller = replace(SPEC, size=16), replace(SPEC, size=4)
    cache.put_vectors([(cache.text_key(large, "a"), blob(1, 16)), (cache.text_key(SPEC, "b"), blob(2))])
    derived = dict(cache.derive(smaller, ["a", "b", "c"]))
    assert set(derived) == {cache.text_key(smaller, "a"), cache.text_key(smaller, "b")}
    full = np.frombuffer(blob(1, 16), "<f4")[:4].astype(float)
    made = np.frombuffer(derived[cache.text_key(smaller, "a")], "<f4")
    assert np.allclose(made, full / np.linalg.norm(full), atol=1e-7)


def test_nothing_is_derived_upwards_across_models_endpoints_or_for_models_that_cannot_be_cut(cache):
    cache.put_vectors([(cache.text_key(SPEC, "a"), blob(1))])
    assert cache.derive(replace(SPEC, size=16), ["a"]) == []
    assert cache.derive(replace(SPEC, size=4, model="text-embedding-3-small"), ["a"]) == []
    assert cache.derive(replace(SPEC, size=4, base_url="http://elsewhere/v1"), ["a"]) == []
    local = replace(SPEC, model="nomic-embed-text")
    cache.put_vectors([(cache.text_key(local, "a"), blob(1))])
    assert cache.derive(replace(local, size=4), ["a"]) == []


def test_a_size_of_voyage_is_cut_from_a_larger_one(cache):
    large = EmbeddingSpec("https://api.voyageai.com/v1", "voyage-4", 8, VOYAGE)
    cache.put_vectors([(cache.text_key(large, "a"), blob(1))])
    smaller = replace(large, size=4)
    assert [key for key, _ in cache.derive(smaller, ["a"])] == [cache.text_key(smaller, "a")]
    assert cache.derive(replace(smaller, model="voyage-4-lite"), ["a"]) == []


def test_derive_missing_fills_the_plan(cache):
    smaller = replace(SPEC, size=4)
    texts = {n: f"text {n}" for n in range(1100)}
    scan(cache, texts, smaller)
    cache.put_vectors([(cache.text_key(SPEC, text), blob(n)) for n, text in texts.items() if n != 7])
    cache.derive_missing(smaller)
    assert [row.text for row in cache.missing_texts(smaller)] == ["text 7"]


def test_a_scan_replaces_the_plan(cache):
    assert scan(cache, {1: "one", 2: "two", 3: "three"}) == 0
    assert scan(cache, {1: "one", 3: "changed"}) == 1
    assert [(row.node_id, row.content) for row in cache.memories(page=1)] == [(1, "one"), (3, "changed")]
    assert cache.memory_count() == 2
    third = memory(cache, 3, "changed")
    assert cache.memories_of([third.point_id, 17]) == {third.point_id: third}


def test_a_scan_that_never_ended_drops_nothing(path):
    with EmbeddingCache(path) as cache:
        scan(cache, {1: "one", 2: "two"})
        cache.begin_scan()
        cache.put_memories([memory(cache, 1, "one")])
    with EmbeddingCache(path) as cache:
        assert cache.memory_count() == 2
        assert scan(cache, {1: "one"}) == 1


def test_missing_texts_are_distinct_and_shrink_while_they_are_read(cache):
    scan(cache, {1: "same", 2: "same", 3: "other", 4: "bought", 5: "same"})
    cache.put_vectors([(cache.text_key(SPEC, "bought"), blob(1))])
    missing = cache.missing_total()
    assert (missing.texts, missing.tokens) == (2, 6)
    seen = []
    for row in cache.missing_texts(SPEC, page=1):
        seen.append((row.text, row.label[-1]))
        cache.put_vectors([(row.key, blob(2))])
    assert seen == [("same", "1"), ("other", "3")]
    assert cache.missing_total().texts == 0


def test_a_plan_for_another_size_is_refused(cache):
    scan(cache, {1: "one"})
    with pytest.raises(ValueError, match="another model, size or endpoint"):
        list(cache.missing_texts(replace(SPEC, size=4)))


@pytest.mark.parametrize("point_id", [0, 17, 2**64 - 1, "8a2f0d3e-0000-4000-8000-000000000000"])
def test_point_ids_keep_their_kind(cache, point_id):
    row = replace(memory(cache, 1, "x"), point_id=point_id)
    cache.begin_scan()
    cache.put_memories([row])
    cache.save_points([SavedPoint(point_id, b"{}")])
    assert next(cache.memories()).point_id == point_id
    assert list(cache.saved_points([point_id])) == [point_id]


def test_saved_points_keep_their_vector_when_read_again_without_it(cache):
    cache.save_points([SavedPoint(1, b'{"a":1}', b"vector"), SavedPoint(2, b"{}")])
    cache.save_points([SavedPoint(1, b'{"a":2}')])
    assert cache.saved_points([1, 3]) == {1: SavedPoint(1, b'{"a":2}', b"vector")}
    assert list(cache.saved_points([1, 2, 3])) == [1, 2]
    assert cache.saved_count() == 2
    cache.clear_saved()
    assert list(cache.saved_points([1, 2])) == [1]  # saved with its vector: it was removed from the collection
    assert cache.saved_count() == 1


def test_meta(cache):
    assert cache.get_meta("run") is None
    cache.set_meta("run", "1")
    cache.set_meta("run", "2")
    assert cache.get_meta("run") == "2"


def test_a_reader_sees_commits_and_cannot_write(cache, path):
    key = cache.text_key(SPEC, "x")
    with EmbeddingCache(path) as reader:
        reader.db.execute("PRAGMA query_only = ON")
        cache.put_vectors([(key, blob(1))])
        assert reader.known([key]) == {key}
        with pytest.raises(CacheDamaged):
            reader.set_meta("a", "b")


def test_a_damaged_or_foreign_file_is_reported_with_what_to_do(tmp_path):
    damaged = tmp_path / "a.sqlite3"
    damaged.write_bytes(b"no database at all" * 100)
    with pytest.raises(CacheDamaged) as caught:
        EmbeddingCache(damaged)
    assert "mv " in caught.value.next_step
    foreign = tmp_path / "b.sqlite3"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE things (x)")
    with pytest.raises(CacheDamaged, match="not an embedding cache"):
        EmbeddingCache(foreign)


@pytest.mark.parametrize("name", ["vectors", "memories", "other"])
def test_a_cache_of_a_newer_version_is_not_to_be_moved_away(tmp_path, name):
    """Without it every text would be paid for again."""
    plan = tmp_path / "memories.sqlite3"
    EmbeddingCache(plan).close()
    EmbeddingCache(tmp_path / "other.sqlite3").close()
    with closing(sqlite3.connect(tmp_path / f"{name}.sqlite3")) as db:
        db.execute("PRAGMA user_version = 2")
    newer = pytest.raises(CacheDamaged, match=f"{name}.sqlite3 is of format 2, this version reads up to 1")
    with newer as caught, EmbeddingCache(plan) as cache:
        prune_cache(cache, tmp_path, dry_run=True)
    assert "mv " not in caught.value.next_step


@pytest.mark.parametrize(("name", "cost"), [("vectors", "its vectors are"), ("memories", "no vector is")])
@pytest.mark.parametrize("at", [0, 4096])
def test_of_both_files_the_damaged_one_is_named_and_can_be_moved_away(tmp_path, name, cost, at):
    plan, damaged = tmp_path / "memories.sqlite3", tmp_path / f"{name}.sqlite3"
    EmbeddingCache(plan).close()
    content = damaged.read_bytes()
    damaged.write_bytes(content[:at] + b"x" * (len(content) - at))

    def used() -> None:
        with EmbeddingCache(plan) as cache:
            cache.missing_total()
            cache.known([bytes(16)])

    with pytest.raises(CacheDamaged, match=f"cache {damaged} cannot be used") as caught:
        used()
    assert f"{cost} paid for again" in caught.value.next_step
    subprocess.run(caught.value.next_step.splitlines()[-1], shell=True, check=True)
    used()


def test_a_damaged_payload_is_reported_with_what_to_do(path):
    with EmbeddingCache(path) as cache:
        cache.save_points([SavedPoint(1, b'{"a":"\xff"}')])
        with pytest.raises(CacheDamaged, match=f"cache {path} cannot be used: .* not JSON") as caught:
            cache.decoded(cache.saved_points([1])[1].payload)
    assert "no vector is paid for again" in caught.value.next_step


@pytest.mark.matrix
def test_the_memory_stays_flat_while_much_is_read(path):
    """2,000 vectors of 3072d are 24 MB; reading them page by page takes a few."""
    import tracemalloc

    spec = replace(SPEC, size=3072)
    with EmbeddingCache(path) as cache:
        for start in range(0, 2000, 500):
            scan_rows = [memory(cache, n, f"text {n} " + "word " * 400, spec) for n in range(start, start + 500)]
            cache.put_memories(scan_rows)
            cache.put_vectors([(row.key, blob(1, 3072)) for row in scan_rows])
        tracemalloc.start()
        for row in cache.memories(page=100):
            assert cache.known([row.key])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2_000_000


_WRITER = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from lib.dimensions import VOYAGE, EmbeddingSpec
from lib.clients.embeddings.cache import EmbeddingCache
spec = EmbeddingSpec("http://127.0.0.1:9/v1", "text-embedding-3-large", 8)
cache = EmbeddingCache(Path({path!r}))
for n in range(100000):
    cache.put_vectors([(cache.text_key(spec, f"{{n}}/{{m}}"), b"abcd" * 8) for m in range(50)])
    print(n, flush=True)
"""


def test_kill_9_loses_nothing_that_was_confirmed(path):
    code = _WRITER.format(root=str(ROOT), path=str(path))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    confirmed = [int(child.stdout.readline()) for _ in range(40)]
    os.kill(child.pid, signal.SIGKILL)
    confirmed += [int(line) for line in child.stdout.read().split("\n")[:-1]]
    child.wait()
    with EmbeddingCache(path) as cache:
        stored = stored_count(cache, SPEC)
        assert stored % 50 == 0
        assert stored // 50 >= len(confirmed)
        assert cache.known([cache.text_key(SPEC, f"{confirmed[-1]}/49")])
        assert cache.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_two_targets_share_paid_vectors_and_nothing_else(tmp_path):
    with EmbeddingCache(tmp_path / "one.sqlite3") as one:
        key = one.text_key(SPEC, "hello")
        one.put_vectors([(key, np.ones(SPEC.size, dtype="<f4").tobytes())])
        one.save_points([SavedPoint("00000000-0000-4000-8000-000000000001", b'{"a":1}')])
    with EmbeddingCache(tmp_path / "other.sqlite3") as other:
        assert other.known([key]) == {key}
        assert other.saved_count() == 0
        assert other.memory_count() == 0
    with EmbeddingCache(tmp_path / "one.sqlite3") as again:
        assert again.saved_count() == 1
