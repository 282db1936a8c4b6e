"""Answers and names that OpenAI's own endpoint never gives: every kind of index, prefixed models, learned limits, queries."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lib.backup.points import TemporaryIdTable
from lib.clients.embeddings.answers import (
    BadAnswer,
    Transient,
    billed_tokens,
    context_limit,
    read_answer,
    refusal_error,
)
from lib.clients.embeddings.cache import TextRow
from lib.clients.embeddings.cache_file import VALUES_AT_ONCE
from lib.clients.embeddings.client import Provider
from lib.clients.embeddings.pricing import count_tokens, input_limit, price_of
from lib.clients.embeddings.rate_limits import RateLimited
from lib.clients.embeddings.worker_pool import _cut_to_limit
from lib.config import load_config
from lib.dimensions import EmbeddingSpec, check_model, facts_of, takes_dimensions
from lib.errors import ProviderRefused, UsageProblem

SPEC = EmbeddingSpec("", "a-model", 4)
MISSING = object()


def answer(indices: list[object], *, rows: list[int] | None = None) -> dict:
    """Vectors of which number n is the nth unit vector; `rows` names the one that each item holds."""
    data = []
    for at, index in enumerate(indices):
        item: dict = {"embedding": np.eye(4)[rows[at] if rows else at].tolist()}
        if index is not MISSING:
            item["index"] = index
        data.append(item)
    return {"data": data, "usage": {"total_tokens": 9}}


@pytest.mark.parametrize(
    ("indices", "rows"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([3, 2, 1, 0], [3, 2, 1, 0]),
        ([MISSING, 1, 2, 3], [0, 1, 2, 3]),  # an encoder that omits zeros
        ([2, 1, MISSING, 3], [2, 1, 0, 3]),  # the same, in another order
        ([None, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 1, MISSING, 3], [0, 1, 2, 3]),
        ([MISSING] * 4, [0, 1, 2, 3]),
    ],
)
def test_every_vector_belongs_to_its_text(indices, rows):
    read = read_answer(answer(indices, rows=rows), 4, SPEC)
    assert (read.vectors == np.eye(4)).all()


@pytest.mark.parametrize(
    "indices",
    [
        [1, 2, 3, 4],
        [0, 0, 1, 2],
        [2, 1, 0, 5],
        [MISSING, MISSING, 2, 3],
        [MISSING, 1, 2, 2],
        ["0", "1", "2", "3"],
        [0.0, 1.0, 2.0, 3.0],
        [True, False, 2, 3],
        [-1, 0, 1, 2],
    ],
)
def test_indices_that_do_not_fit_end_the_run_instead_of_splitting_the_batch(indices):
    with pytest.raises(ProviderRefused) as refused:
        read_answer(answer(indices), 4, SPEC)
    assert "--batch-size 1" in refused.value.next_step


def test_a_number_as_long_as_a_book_is_a_bad_answer():
    with pytest.raises(BadAnswer, match="neither base64 nor a list of numbers"):
        read_answer({"data": [{"embedding": [10**400, 0, 0, 0]}]}, 1, SPEC)


@pytest.mark.parametrize("more", [{}, {"data": None}, {"data": []}])
def test_an_error_inside_a_200_is_that_error(more):
    provider = Provider(SPEC, "key", 1.0)
    for code, kind in ((429, RateLimited), (402, ProviderRefused), (503, Transient)):
        body = {"error": {"message": "of the model's host", "code": code}, **more}
        with pytest.raises(kind, match="of the model's host"):
            provider.opened(["a", "b"], {}, json.dumps(body).encode())


def test_a_redirect_names_the_endpoint_alone():
    error = refusal_error(308, {}, "", secret="k", sent_tokens=1, provider="p", spec=SPEC)
    assert isinstance(error, ProviderRefused)
    assert error.next_step.startswith("OPENAI_BASE_URL is redirected")


def test_a_403_of_an_ollama_names_its_address_because_there_is_no_key():
    """Ollama answers so to a host name that it does not know."""
    spec = EmbeddingSpec("http://ollama.example.com:11434/v1", "nomic-embed-text", 768, "ollama")
    error = refusal_error(403, {}, "", secret="", sent_tokens=1, provider="p", spec=spec)
    assert isinstance(error, ProviderRefused)
    assert error.next_step.startswith("check OLLAMA_BASE_URL,")


def test_tokens_below_zero_pay_for_nothing():
    """Otherwise a provider could keep a run below its --max-cost for ever."""
    assert billed_tokens({"usage": {"total_tokens": -1_000_000}}) == 0
    assert billed_tokens({"usage": {"total_tokens": 7}}) == 7


@pytest.mark.parametrize("prefix", ["", "openai/", "azure/openai/"])
def test_the_model_behind_a_prefix_is_known(prefix):
    model = f"{prefix}text-embedding-3-large"
    assert facts_of(model).native == 3072
    assert takes_dimensions(model)
    assert input_limit(model) == 8192
    assert price_of(1_000_000, model) == 0.13
    with pytest.raises(UsageProblem, match="at most 3072d"):
        check_model(model, 4096)
    assert Provider(EmbeddingSpec("", model, 768), "k", 1.0)._options["dimensions"] == 768
    assert facts_of(f"{prefix}another-model").native is None


@pytest.mark.parametrize(
    ("output", "limit"),
    [
        ("400: This model's maximum context length is 8192 tokens, however you requested 9000 tokens", 8192),
        ("maximum context length of 512", 512),
        ("Maximum context length is 32,768 tokens", 32768),
        ("the text is too long", None),
    ],
)
def test_the_limit_that_a_refusal_names(output, limit):
    assert context_limit(output) == limit


def test_a_text_is_cut_to_what_the_refusal_names_and_further_if_that_is_refused_too():
    row = TextRow(b"k" * 16, "word " * 900, "m1")
    output = "maximum context length is 512 tokens"
    once = _cut_to_limit(row, output)
    assert once is not None
    assert count_tokens([once.text])[0] == 511
    assert row.text.startswith(once.text)
    assert (once.key, once.label) == (row.key, row.label)
    twice = _cut_to_limit(once, output)
    assert twice is not None
    assert count_tokens([twice.text])[0] == int(511 * 0.9)
    assert _cut_to_limit(row, "no limit in it") is None


def test_the_query_of_the_endpoint_is_sent(tmp_path):
    azure = "https://host/openai/deployments/d?api-version=2024-06-01"
    config = load_config({"OPENAI_BASE_URL": azure}, cwd=tmp_path, root=tmp_path)
    provider = Provider(config.spec, "k", 1.0)
    client = provider.client()
    assert str(client.base_url).rstrip("/") == "https://host/openai/deployments/d"
    assert client.default_query == {"api-version": "2024-06-01"}
    assert provider.name.endswith("at https://host/openai/deployments/d")


def test_a_model_name_with_blanks_around_it_is_stripped(tmp_path):
    config = load_config({"EMBEDDING_MODEL": " text-embedding-3-large "}, cwd=tmp_path, root=tmp_path)
    assert config.embedding_model == "text-embedding-3-large"


def test_no_statement_binds_more_values_than_an_older_sqlite_takes(monkeypatch):
    """5,000 ids at once: SQLite before 3.32 refuses more than 999 variables."""
    most = 0
    with TemporaryIdTable() as table:
        table.put((n, {"n": n}) for n in range(6000))
        inner = table._db

        class Watched:
            def execute(self, sql, values=()):
                nonlocal most
                most = max(most, len(values))
                return inner.execute(sql, values)

            def close(self):
                inner.close()

        table._db = Watched()
        found = table.payloads(range(5000))
    assert found == {n: {"n": n} for n in range(5000)}
    assert most <= VALUES_AT_ONCE <= 999
