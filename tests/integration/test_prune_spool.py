"""`--prune-spool`: what no plan needs is deleted, what any plan needs stays, and no other run is active meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from lib.clients.embeddings import cache_file as pruning
from lib.clients.embeddings.cache import SUM_BYTES, EmbeddingCache, MemoryRow
from lib.clients.embeddings.cache_file import CacheDamaged, prune_cache
from lib.dimensions import EmbeddingSpec
from lib.errors import GuardRefused, LockHeld
from lib.journal import start_journal
from tests.cache_support import stored_count
from tests.operator_support import LARGE, NEW_SIZE
from tests.reembed_support import assert_migrated, points_of, upgrade

MODEL = "text-embedding-3-large"
BIG, SMALL = (EmbeddingSpec("", MODEL, size) for size in (64, 16))


def vector(text, size):
    row = np.random.default_rng(abs(hash(text)) % 2**32).standard_normal(size).astype("<f4")
    return (row / np.linalg.norm(row)).astype("<f4").tobytes()


def opened(folder, name):
    return EmbeddingCache(folder / "embeddings" / f"{name}.sqlite3")


def plan(cache, spec, texts):
    cache.begin_scan()
    cache.put_memories(
        [MemoryRow(number, number, cache.text_key(spec, text), text, b"{}", 3) for number, text in enumerate(texts)]
    )
    cache.end_scan()


def embed(cache, spec, texts):
    cache.put_vectors([(cache.text_key(spec, text), vector(text, spec.size)) for text in texts])


def texts(first, last):
    return [f"text {number}" for number in range(first, last)]


def test_what_any_plan_names_stays_and_the_rest_goes(tmp_path):
    with opened(tmp_path, "other") as other:
        plan(other, SMALL, texts(50, 60))
        embed(other, SMALL, texts(50, 70))
    with opened(tmp_path, "own") as cache:
        plan(cache, BIG, texts(0, 30))
        embed(cache, BIG, texts(0, 40))
        counted = prune_cache(cache, tmp_path, dry_run=True)
        assert [(one.spec.size, one.vectors, one.unneeded) for one in counted.stored] == [
            (16, 20, 10),
            (64, 40, 10),
        ]
        assert sum(one.unneeded_bytes for one in counted.stored) == 10 * ((64 + 16) * 4 + 2 * SUM_BYTES)
        assert (counted.removed, stored_count(cache, BIG)) == (0, 40)
        done = prune_cache(cache, tmp_path, dry_run=False)
        assert (done.removed, done.shrunk) == (20, True)
        keys = [cache.text_key(BIG, text) for text in texts(0, 30)]
        keys += [cache.text_key(SMALL, text) for text in texts(50, 60)]
        assert cache.known(keys) == set(keys)
        assert (stored_count(cache, BIG), stored_count(cache, SMALL)) == (30, 10)
        assert cache.get_vectors(keys[:1]) == {keys[0]: vector("text 0", 64)}


def test_the_file_gives_its_room_back(tmp_path):
    with opened(tmp_path, "own") as cache:
        plan(cache, BIG, texts(0, 5))
        embed(cache, BIG, texts(0, 3000))
        done = prune_cache(cache, tmp_path, dry_run=False)
        assert done.removed == 2995
        assert done.bytes_after < done.bytes_before / 4


def test_without_room_for_the_copy_the_vectors_go_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "free_bytes", lambda _path: 1000)
    with opened(tmp_path, "own") as cache:
        embed(cache, BIG, texts(0, 100))
        done = prune_cache(cache, tmp_path, dry_run=False)
        assert (done.removed, done.shrunk, stored_count(cache, BIG)) == (100, False, 0)


def test_no_plan_at_all_needs_nothing(tmp_path):
    with opened(tmp_path, "own") as cache:
        embed(cache, BIG, texts(0, 10))
        assert prune_cache(cache, tmp_path, dry_run=False).removed == 10


def test_a_plan_that_cannot_be_read_stops_it(tmp_path):
    with opened(tmp_path, "own") as cache:
        embed(cache, BIG, texts(0, 10))
        (tmp_path / "embeddings" / "broken.sqlite3").write_bytes(b"no database at all, but long enough to look" * 99)
        with pytest.raises(CacheDamaged):
            prune_cache(cache, tmp_path, dry_run=False)
        assert stored_count(cache, BIG) == 10


def test_an_empty_file_is_no_plan_either(tmp_path):
    with opened(tmp_path, "own") as cache:
        embed(cache, BIG, texts(0, 10))
        (tmp_path / "embeddings" / "empty.sqlite3").touch()
        with pytest.raises(CacheDamaged, match="nothing is removed"):
            prune_cache(cache, tmp_path, dry_run=False)
        assert stored_count(cache, BIG) == 10


def test_an_unfinished_run_stops_it(tmp_path):
    with opened(tmp_path, "own") as cache:
        embed(cache, BIG, texts(0, 10))
        journal = start_journal(tmp_path, "reembed", ["a", "b"])
        with pytest.raises(GuardRefused, match="unfinished"):
            prune_cache(cache, tmp_path, dry_run=False)
        assert prune_cache(cache, tmp_path, dry_run=True).stored[0].unneeded == 10
        journal.close("done")
        assert prune_cache(cache, tmp_path, dry_run=False).removed == 10


def test_another_run_on_the_same_vectors_stops_it(tmp_path):
    with opened(tmp_path, "own") as cache, opened(tmp_path, "other") as other:
        embed(cache, BIG, texts(0, 10))
        with pytest.raises(LockHeld, match=r"vectors\.sqlite3"):
            prune_cache(cache, tmp_path, dry_run=False)
        assert stored_count(other, BIG) == 10


def test_nobody_begins_while_it_works(tmp_path):
    with opened(tmp_path, "own") as cache, cache.used_vectors.alone(), pytest.raises(LockHeld):
        opened(tmp_path, "other")


@pytest.mark.qdrant
def test_the_command_keeps_what_the_migration_needs(operator):
    operator.load(80)
    before = points_of(operator)
    upgrade(operator)
    operator.run("backup_automem")
    operator.export(VECTOR_SIZE=NEW_SIZE // 2, EMBEDDING_MODEL=LARGE)
    operator.run("reembed_embeddings", "--limit", "20")  # another size, which nothing needs after the next plan
    upgrade(operator)
    operator.run("reembed_embeddings")
    dry = operator.run("reembed_embeddings", "--prune-spool", "--dry-run", "--json").json
    sizes = {one["spec"]["size"]: one for one in dry["stored"]}
    assert sizes[NEW_SIZE // 2]["unneeded"] == sizes[NEW_SIZE // 2]["vectors"] > 0
    assert sizes[NEW_SIZE]["unneeded"] == 0
    output = operator.run("reembed_embeddings", "--prune-spool", env={"OPENAI_API_KEY": ""})
    assert f"{sizes[NEW_SIZE // 2]['vectors']} vectors deleted" in output.out
    operator.servers.openai.reset()
    operator.run("reembed_embeddings")
    assert operator.servers.openai.stats()["texts"] == 0
    assert_migrated(operator, before)
