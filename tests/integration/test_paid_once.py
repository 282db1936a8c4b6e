"""Nothing is embedded that cannot be stored or already exists, and everything paid for is counted, even if unused."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3

import numpy as np
import pytest

from lib.clients.embeddings.cache_file import room_of
from lib.clients.embeddings.pricing import cut_to_tokens, price_of
from tests.faulty_proxy import Fault, FaultyProxy, answer
from tests.matrix import matrix
from tests.operator_support import LARGE, NEW_SIZE, OLD_SIZE, SMALL
from tests.reembed_support import assert_migrated, make_ready, points_of
from tests.sandbox.vectors import vectors_for
from tests.small_disk import small_disk

pytestmark = pytest.mark.qdrant
MIB = 1 << 20


@pytest.fixture
def ready(operator):
    return make_ready(operator)


def cached(operator) -> int:
    with contextlib.closing(sqlite3.connect(operator.backups / "embeddings/vectors.sqlite3")) as db:
        return db.execute("SELECT count(*) FROM vectors").fetchone()[0]


def limit_disk(monkeypatch, free) -> None:
    """The backup folder's disk has `free()` bytes left."""
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=free()))


def stats(operator) -> dict:
    return operator.servers.openai.stats()


def test_without_room_for_all_texts_none_is_embedded(ready, monkeypatch):
    limit_disk(monkeypatch, lambda: 8 * MIB)
    before = points_of(ready)
    result = ready.run("reembed_embeddings", expect=1)
    assert "no room for 2" in result.err
    assert "what does not fit is not embedded" in result.err
    assert stats(ready)["tokens"] == 0
    assert points_of(ready).keys() == before.keys()
    assert not list(ready.backups.glob("journal_*_reembed.jsonl"))


@pytest.mark.parametrize("words", [pytest.param(["--no-switch"], marks=pytest.mark.matrix), [], ["--only-missing"]])
def test_with_a_key_that_may_only_read_nothing_is_paid(ready, words):
    size = OLD_SIZE if words == ["--only-missing"] else NEW_SIZE
    refused = Fault(
        rb"^(PUT|PATCH|DELETE) |/points/delete|/snapshots",
        answer=answer(403, "Global manage access is required"),
        times=None,
    )
    with FaultyProxy(int(ready.servers.qdrant_url.rpartition(":")[2])) as proxy:
        ready.export(QDRANT_URL=f"http://127.0.0.1:{proxy.port}", VECTOR_SIZE=size)
        ready.run("backup_automem")
        proxy.faults.append(refused)
        result = ready.run("reembed_embeddings", *words, expect=2)
    assert "refuses access: 403 Global manage access is required" in result.err
    assert refused.hits == 1
    assert stats(ready)["tokens"] == 0


@pytest.mark.parametrize("words", [["--dry-run"], ["--limit", "20"]])
def test_a_sample_is_not_embedded_without_room_either(ready, monkeypatch, words):
    limit_disk(monkeypatch, lambda: MIB)
    result = ready.run("reembed_embeddings", *words, expect=1)
    assert "no room for" in result.err
    assert stats(ready)["tokens"] == 0


def test_what_is_paid_for_is_stored_though_the_disk_fills_meanwhile(ready, monkeypatch):
    """Another process takes the room: the sent batches are stored, no other is sent, and the next run resumes."""
    wanted = json.loads(ready.run("reembed_embeddings", "--dry-run", "--batch-size", "10", "--json").out)
    texts = wanted["plan"]["texts"]
    assert cached(ready) == 10
    looks = iter([1 << 40] * 4)
    limit_disk(monkeypatch, lambda: next(looks, MIB))
    result = ready.run("reembed_embeddings", "--batch-size", "10", "--workers", "2", expect=1)
    assert "no room for" in result.err
    paid = stats(ready)["texts"]
    assert cached(ready) == paid
    assert 10 < paid < texts
    monkeypatch.undo()
    ready.run("reembed_embeddings")
    assert stats(ready)["texts"] == texts  # each text was paid for once


def test_a_real_disk_that_is_nearly_full(ready, tmp_path):
    """Enough room for all vectors, but not for writing them."""
    ready.export(VECTOR_SIZE=3072)
    with small_disk(tmp_path / "small", "10m") as disk:
        result = ready.run("reembed_embeddings", "--limit", "200", "--backup-dir", str(disk), expect=1)
        assert "no room for" in result.err
        assert stats(ready)["tokens"] == 0


@pytest.mark.parametrize("size", [48, 96, 256, 384, 768, 1024, 1536, 2048, 3072, 4096])
def test_the_room_that_is_asked_for_is_what_sqlite_takes(tmp_path, size):
    from lib.clients.embeddings.cache import EmbeddingCache
    from lib.dimensions import EmbeddingSpec

    spec, count = EmbeddingSpec("", LARGE, size), 700
    with EmbeddingCache(tmp_path / "cache.sqlite3") as cache:
        empty, file_before = cache.size_bytes(), cache.vectors_path.stat().st_size
        cache.put_vectors([(cache.text_key(spec, str(n)), bytes(4 * size)) for n in range(count)])
        taken = cache.size_bytes() - empty
    assert taken <= room_of(count, size)
    assert (
        cache.vectors_path.stat().st_size - file_before > 0.4 * (room_of(count, size) - 8 * MIB) / 2
    )  # and not far more


def stamped(operator) -> bool:
    return bool(operator.info()["config"].get("metadata"))


def test_a_collection_that_is_what_the_settings_ask_for_is_not_embedded_again(ready):
    ready.run("reembed_embeddings")
    if not stamped(ready):
        pytest.skip("this server keeps no metadata: nothing records which model made the vectors")
    before = points_of(ready)
    ready.servers.openai.reset()
    elsewhere = str(ready.folder / "other backups")
    for words in ([], ["--dry-run"], ["--in-place"], ["--no-switch"]):
        result = ready.run("reembed_embeddings", *words, "--backup-dir", elsewhere)
        assert f"is already {NEW_SIZE}d {LARGE}" in result.out
        assert "--only-missing" in result.out
        assert "--fresh" in result.out
    assert stats(ready)["tokens"] == 0
    assert {one: payload for one, (payload, _) in points_of(ready).items()} == {
        one: payload for one, (payload, _) in before.items()
    }
    ready.cypher("CREATE (:Memory {id: '3f0f2f0a-0000-4000-8000-00000000000a', content: 'new since then'})")
    result = ready.run("reembed_embeddings", "--json", "--backup-dir", elsewhere, expect=3)
    assert result.json["lacking"]["texts"] == 1
    assert stats(ready)["tokens"] == 0
    ready.run("backup_automem", "--only", "qdrant", "--backup-dir", elsewhere)
    ready.run("reembed_embeddings", "--fresh", "--backup-dir", elsewhere)
    assert stats(ready)["texts"] > len(before) / 2  # embedded again because it was asked for


@pytest.mark.parametrize("where", matrix(["elsewhere", "backups"]))
def test_the_same_model_behind_a_prefix_is_not_embedded_again(ready, where):
    """A gateway names it `openai/...`: the collection's stamp is of the same vectors."""
    ready.run("reembed_embeddings")
    if not stamped(ready):
        pytest.skip("this server keeps no metadata: nothing records which model made the vectors")
    ready.servers.openai.reset()
    ready.export(EMBEDDING_MODEL=f"openai/{LARGE}")
    result = ready.run("reembed_embeddings", "--backup-dir", str(ready.folder / where))
    if where == "elsewhere":  # in its own folder the run compares every vector with what was paid for
        assert f"is already {NEW_SIZE}d openai/{LARGE}" in result.out
    assert stats(ready)["tokens"] == 0
    checks = ready.run("verify_migration", "--json", expect=None).json["checks"]
    assert next(one["status"] for one in checks if one["name"] == "model stamp") == "passed"


@pytest.mark.matrix
def test_vectors_of_a_stopped_run_count_under_another_name_of_the_model(ready):
    before = points_of(ready)
    ready.run("reembed_embeddings", "--no-switch")
    paid = stats(ready)["texts"]
    ready.export(EMBEDDING_MODEL=f"openai/{LARGE}")
    ready.run("reembed_embeddings")
    assert stats(ready)["texts"] == paid
    assert_migrated(ready, before)


def test_no_test_of_the_endpoint_costs_more_than_max_cost(ready):
    refused = ready.run("reembed_embeddings", "--dry-run", "--max-cost", "0", expect=2)
    assert "--max-cost is $0; nothing was spent" in refused.err
    assert "in the graph" in refused.err  # the plan and its price
    assert stats(ready)["tokens"] == 0
    ready.run("reembed_embeddings", "--dry-run", "--max-cost", "1")
    ready.export(VECTOR_SIZE=OLD_SIZE, EMBEDDING_MODEL=SMALL)
    ready.servers.openai.reset()
    assert "--max-cost" in ready.run("reembed_embeddings", "--only-missing", "--max-cost", "0", expect=2).err
    assert stats(ready)["tokens"] == 0


def test_a_run_with_fresh_that_is_interrupted_after_its_verification_pays_for_nothing_again(ready, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lib.reembed.run.make_report", interrupted)
        ready.run("reembed_embeddings", "--fresh", expect=130)
    ready.servers.openai.reset()
    done = ready.run("reembed_embeddings", "--fresh", "--json").json
    assert (done["bought"]["texts"], stats(ready)["texts"]) == (0, 0)
    ready.run("backup_automem", "--only", "qdrant")
    assert ready.run("reembed_embeddings", "--fresh", "--json").json["bought"]["texts"] > 0


def test_nothing_is_forgotten_if_the_endpoint_answers_with_what_cannot_be_used(ready):
    ready.run("reembed_embeddings", "--no-switch")
    held = cached(ready)
    ready.servers.openai.fault(nan=True)
    refused = ready.run("reembed_embeddings", "--fresh", expect=6)
    assert "cannot embed even a plain word" in refused.err
    assert cached(ready) == held


@pytest.mark.matrix
def test_another_model_of_the_same_size_is_still_replaced(ready):
    ready.run("reembed_embeddings")
    ready.run("backup_automem", "--only", "qdrant")
    ready.export(EMBEDDING_MODEL=SMALL)
    result = ready.run("reembed_embeddings", "--json")
    assert result.json["model"] == SMALL
    assert result.json["bought"]["texts"] > 0


@pytest.mark.matrix
def test_discarded_answers_count_in_the_report_and_in_max_cost(ready):
    """One answer in which a vector is not a number is paid for and discarded."""
    ready.servers.openai.fault(nan=True, times=1)
    ready.run("reembed_embeddings", "--batch-size", "50", "--workers", "1")
    billed = stats(ready)["tokens"]
    report = json.loads(next((ready.backups / "reports").glob("*.json")).read_text())
    assert report["bought"]["tokens"] == billed
    assert 0 < report["bought"]["discarded"] < billed
    assert report["bought"]["price"] == pytest.approx(price_of(billed, LARGE))


@pytest.mark.matrix
def test_what_an_earlier_start_paid_and_discarded_counts_in_max_cost(ready):
    tokens = json.loads(ready.run("reembed_embeddings", "--dry-run", "--json", "--batch-size", "1").out)["plan"][
        "tokens"
    ]
    ready.servers.openai.fault(nan=True)
    ready.run("reembed_embeddings", "--batch-size", "50", "--workers", "1", expect=6)
    ready.servers.openai.clear_faults()
    ready.servers.openai.reset()
    just = price_of(tokens, LARGE)  # enough if nothing had been discarded
    refused = ready.run("reembed_embeddings", "--max-cost", f"{just:.8f}", expect=2)
    assert "was spent" in refused.err
    assert "nothing was spent" not in refused.err
    assert stats(ready)["tokens"] == 0


@pytest.mark.matrix
def test_max_cost_ends_a_run_whose_answers_cannot_be_used(ready):
    """Each batch is halved until its answer fits, and each answer is paid for."""
    before = points_of(ready)
    tokens = json.loads(ready.run("reembed_embeddings", "--dry-run", "--json", "--batch-size", "1").out)["plan"][
        "tokens"
    ]
    ready.servers.openai.reset()
    ready.servers.openai.fault(wrong_count=True, more_than=6)
    just = price_of(tokens, LARGE)
    refused = ready.run("reembed_embeddings", "--workers", "1", "--max-cost", f"{just:.8f}", expect=2)
    assert f"--max-cost is ${just:g}" in refused.err
    billed = stats(ready)["tokens"]
    assert f"${price_of(billed, LARGE):.4f} was spent" in refused.err
    assert billed <= tokens
    ready.servers.openai.clear_faults()
    ready.run("reembed_embeddings", "--max-cost", "1")
    assert_migrated(ready, before)


@pytest.mark.matrix
def test_requests_in_flight_count_in_max_cost(ready):
    tokens = ready.run("reembed_embeddings", "--dry-run", "--json", "--batch-size", "1").json["plan"]["tokens"]
    ready.servers.openai.reset()
    ready.servers.openai.fault(wrong_count=True, more_than=6)
    just = f"{price_of(tokens, LARGE):.8f}"
    ready.run("reembed_embeddings", "--batch-size", "10", "--max-cost", just, expect=2)
    assert tokens / 2 < stats(ready)["tokens"] <= tokens


@pytest.mark.matrix
def test_max_cost_suffices_for_what_it_names(ready):
    """Many requests in flight: each is counted once, in flight or billed."""
    tokens = ready.run("reembed_embeddings", "--dry-run", "--json", "--batch-size", "1").json["plan"]["tokens"]
    ready.run("reembed_embeddings", "--batch-size", "5", "--max-cost", f"{price_of(tokens, LARGE):.8f}")


@pytest.mark.matrix
@pytest.mark.parametrize("mixed", matrix([False, True], True))
def test_an_endpoint_that_omits_the_index_zero_is_served_by(ready, mixed):
    """As Gemini's compatible endpoint answers; also with the vectors in another order."""
    before = points_of(ready)
    ready.servers.openai.fault(omit_zero=True, wrong_order=mixed)
    ready.run("reembed_embeddings", "--batch-size", "20")
    assert stats(ready)["paid_twice"] == 0
    assert_migrated(ready, before)


@pytest.mark.matrix
def test_indices_that_do_not_fit_end_the_run_after_a_few_requests(ready):
    before = points_of(ready)
    ready.servers.openai.fault(wrong_indices=True)
    refused = ready.run("reembed_embeddings", "--batch-size", "50", "--workers", "2", expect=6)
    assert "do not say which vector is which text's" in refused.err
    assert stats(ready)["requests"] <= 4  # two workers: a batch and its half each, not down to single texts
    assert points_of(ready).keys() == before.keys()
    ready.servers.openai.clear_faults()
    ready.run("reembed_embeddings")


@pytest.mark.matrix
def test_a_text_that_is_too_long_for_the_model_is_cut_if_the_refusal_names_the_limit(ready):
    identity = "3f0f2f0a-0000-4000-8000-00000000000b"
    content = "word " * 300 + "BEYOND"
    ready.cypher("CREATE (:Memory {id: $id, content: $text})", id=identity, text=content)
    message = "This model's maximum context length is 200 tokens, however you requested 301 tokens."
    ready.servers.openai.fault(poisoned_text="BEYOND", status=400, message=message)
    done = ready.run("reembed_embeddings", "--json")
    assert done.json["cut"] == [identity]
    assert done.json["refused"] == []
    assert f"memory {identity} is longer than the model takes" in done.err
    payload, vector = points_of(ready)[identity]
    assert payload["content"] == content  # the text itself stays whole
    wanted = vectors_for(LARGE, [cut_to_tokens(content, 199)], NEW_SIZE)[0]
    assert np.abs(vector - wanted).max() < 1e-5


@pytest.mark.matrix
def test_the_undo_never_names_a_set_of_before_the_deleted_collection(ready):
    ready.run("reembed_embeddings")
    ready.call("DELETE", "")
    done = ready.run("reembed_embeddings", "--json").json
    assert done["undo"] == "  (none: no collection was replaced)"
    assert "restore_from_backup" not in done["undo"]


def test_a_damaged_row_of_the_cache_reaches_no_collection_and_alone_is_embedded_again(operator):
    make_ready(operator)
    before = points_of(operator)
    operator.run("reembed_embeddings", "--limit", "30")
    with sqlite3.connect(operator.backups / "embeddings" / "vectors.sqlite3") as db:
        (stored,) = db.execute("SELECT vector FROM vectors WHERE id = 7").fetchone()
        db.execute("UPDATE vectors SET vector = ? WHERE id = 7", [stored[:9] + bytes([stored[9] ^ 64]) + stored[10:]])
    refused = operator.run("reembed_embeddings", expect=1)
    assert "were damaged on the disk (wrong checksum): 1, which" in refused.err
    paid = operator.servers.openai.stats()["texts"]
    assert points_of(operator).keys() == before.keys()
    assert operator.run("reembed_embeddings", "--json").json["bought"]["texts"] >= 1
    assert operator.servers.openai.stats()["texts"] == paid + 1
    assert_migrated(operator, before)
