"""Voyage and Ollama through the real openai package against the sandbox: requests, limits, refusals, and their spaces."""

from __future__ import annotations

import numpy as np
import pytest
import requests

from lib.clients.embeddings import client as client_module
from lib.clients.embeddings.answers import BadInput, WrongWidth
from lib.clients.embeddings.cache import EmbeddingCache, TextRow
from lib.clients.embeddings.client import EmbeddingClient
from lib.clients.embeddings.pricing import count_tokens
from lib.clients.embeddings.worker_pool import embed_missing
from lib.dimensions import OLLAMA, OPENAI, VOYAGE, EmbeddingSpec
from lib.errors import ProviderRefused, UsageProblem
from tests.matrix import matrix
from tests.sandbox.automem_embedding import EMBEDDING_DEFAULTS, Embedder
from tests.sandbox.openai_requests import cut_text
from tests.sandbox.openai_server import OpenAIServer
from tests.sandbox.process import free_port
from tests.sandbox.provider_requests import OLLAMA_CONTEXT, PAYMENT_NEEDED
from tests.sandbox.vectors import vector_for, vectors_for

NOMIC = "nomic-embed-text"
KEYS = {VOYAGE: "pa-sandbox-0123456789abcdef", OLLAMA: "", OPENAI: "sk-sandbox"}
TEXTS = ["the graph is the source of truth", "vectors live in Qdrant", "一个记忆", 'quotes "and"\nlines 🙂']

pytestmark = pytest.mark.usefixtures("clean_endpoint")


@pytest.fixture(scope="module")
def server():
    with OpenAIServer() as running:
        yield running


def spec_of(server, provider, model, size):
    urls = {VOYAGE: server.voyage_url, OLLAMA: f"{server.ollama_url}/v1", OPENAI: server.base_url}
    return EmbeddingSpec(urls[provider], model, size, provider)


def client_for(server, provider, model="", size=0, key=None, **options):
    model = model or {VOYAGE: "voyage-4", OLLAMA: NOMIC}[provider]
    spec = spec_of(server, provider, model, size or {VOYAGE: 1024, OLLAMA: 768}[provider])
    return EmbeddingClient(spec, KEYS[provider] if key is None else key, **options)


def embed_all(client, texts, tmp_path, **options):
    """Embed the texts into a new cache; returns the outcome and the stored vectors by text."""
    with EmbeddingCache(tmp_path / "cache" / "memories.sqlite3") as cache:
        rows = [TextRow(cache.text_key(client.spec, text), text, f"id-{n}") for n, text in enumerate(texts)]
        options = {"workers": 2, "batch_size": 100, **options}
        outcome = embed_missing(client, rows, cache.put_vectors, **options)
        found = cache.get_vectors([row.key for row in rows])
        return outcome, {row.text: np.frombuffer(found[row.key], "<f4") for row in rows if row.key in found}


# --- requests


@pytest.mark.parametrize("size", [256, 512, 1024, 2048])
@pytest.mark.parametrize("model", matrix(["voyage-4", "voyage-4-large", "voyage-4-lite"], "voyage-4"))
def test_voyage_makes_each_of_its_sizes(server, model, size):
    answer = client_for(server, VOYAGE, model, size).embed(TEXTS)
    assert np.array_equal(answer.vectors, vectors_for(model, TEXTS, size))
    assert answer.tokens == server.stats()["tokens"] == sum(count_tokens(TEXTS))


@pytest.mark.parametrize(("model", "size"), [(NOMIC, 768), (f"{NOMIC}:latest", 768), ("mxbai-embed-large", 1024)])
def test_ollama_is_asked_for_no_size_and_needs_no_key(server, model, size):
    answer = client_for(server, OLLAMA, model, size).embed(TEXTS)
    assert np.array_equal(answer.vectors, vectors_for(model.removesuffix(":latest"), TEXTS))


def test_another_width_of_ollama_names_the_setting(server):
    with pytest.raises(WrongWidth, match="768d vectors, VECTOR_SIZE is 512") as caught:
        client_for(server, OLLAMA, size=512).embed(TEXTS)
    assert "export VECTOR_SIZE=768" in caught.value.next_step
    assert "OLLAMA_MODEL" in caught.value.next_step


def test_vectors_of_two_models_or_providers_are_unrelated(server):
    text = ["FalkorDB holds the graph, Qdrant the vectors"]
    rows = [
        client_for(server, VOYAGE, "voyage-4", 512).embed(text).vectors[0],
        client_for(server, VOYAGE, "voyage-4-lite", 512).embed(text).vectors[0],
        client_for(server, OPENAI, "text-embedding-3-large", 512).embed(text).vectors[0],
    ]
    near = np.array(rows) @ np.array(rows).T
    assert np.abs(near - np.eye(3)).max() < 0.2


def test_a_smaller_size_of_voyage_is_cut_from_the_larger_one_in_the_cache(server, tmp_path):
    large, small = spec_of(server, VOYAGE, "voyage-4", 2048), spec_of(server, VOYAGE, "voyage-4", 512)
    with EmbeddingCache(tmp_path / "cache" / "memories.sqlite3") as cache:
        rows = [TextRow(cache.text_key(large, text), text, text) for text in TEXTS]
        client = EmbeddingClient(large, KEYS[VOYAGE])
        embed_missing(client, rows, cache.put_vectors, workers=1, batch_size=100)
        cut = dict(cache.derive(small, TEXTS))
        made = np.array([np.frombuffer(cut[cache.text_key(small, text)], "<f4") for text in TEXTS])
        other = spec_of(server, VOYAGE, "voyage-4-lite", 512)
        assert cache.derive(other, TEXTS) == []  # of the same family, but another model
    assert np.allclose(made, EmbeddingClient(small, KEYS[VOYAGE]).embed(TEXTS).vectors, atol=1e-6)


# --- limits


def test_voyage_gets_1000_texts_a_request(server, tmp_path):
    texts = [f"memory {n}" for n in range(1300)]
    outcome, stored = embed_all(client_for(server, VOYAGE), texts, tmp_path, batch_size=2048)
    assert (outcome.embedded, outcome.requests, server.stats()["largest_batch"]) == (1300, 2, 1000)
    assert np.array_equal(stored["memory 1299"], vector_for("voyage-4", "memory 1299", 1024))


@pytest.mark.parametrize(
    ("model", "sent"),
    matrix([("voyage-4-large", 4), ("voyage-4", 2), ("voyage-4-lite", 1)], ("voyage-4-large", 4)),
)
def test_voyage_gets_the_tokens_that_the_model_takes(server, tmp_path, model, sent):
    texts = [f"{n} " + "word " * 4000 for n in range(75)]  # 300,000 tokens
    outcome, stored = embed_all(client_for(server, VOYAGE, model, 256), texts, tmp_path, workers=1)
    assert (outcome.embedded, outcome.requests, len(stored)) == (75, sent, 75)
    assert set(server.stats()["statuses"]) == {"200"}


def test_a_batch_over_voyages_limit_is_halved(server, tmp_path, monkeypatch):
    """Voyage's models may count more tokens than ours."""
    monkeypatch.setattr("lib.clients.embeddings.worker_pool._VOYAGE_TOKENS", 10**9)
    texts = [f"{n} " + "word " * 4000 for n in range(40)]  # 160,000 tokens, voyage-4-large takes 120,000
    outcome, stored = embed_all(client_for(server, VOYAGE, "voyage-4-large", 256), texts, tmp_path, workers=1)
    assert (outcome.embedded, outcome.refused, len(stored)) == (40, [], 40)
    assert server.stats()["statuses"] == {"400": 1, "200": 2}


def test_too_many_texts_and_too_many_tokens_are_bad_input(server):
    with pytest.raises(BadInput, match="batch size limit is 1000"):
        client_for(server, VOYAGE).embed(["x"] * 1001)
    with pytest.raises(BadInput, match="max allowed tokens per submitted batch is 120000"):
        client_for(server, VOYAGE, "voyage-4-large").embed(["word " * 25_000] * 5)
    assert server.stats()["requests"] == 2


def test_ollama_gets_few_texts_a_request_and_may_take_its_time_for_each(server, tmp_path):
    server.fault(hang_seconds=1.0, times=1)  # longer than for one text, shorter than for the request
    client = client_for(server, OLLAMA, timeout_seconds=0.5)
    outcome, stored = embed_all(client, [f"memory {n}" for n in range(40)], tmp_path)
    assert (outcome.embedded, outcome.requests, len(stored)) == (40, 3, 40)
    assert server.stats()["largest_batch"] == 16


def test_a_text_over_ollamas_context_is_cut_there_and_reported(server, tmp_path):
    long, limit = "word " * 2100 + "the end", OLLAMA_CONTEXT[NOMIC]
    outcome, stored = embed_all(client_for(server, OLLAMA), ["short", long], tmp_path)
    assert (outcome.cut, outcome.refused) == (["id-1"], [])
    assert np.array_equal(stored[long], vector_for(NOMIC, cut_text(long, limit)))


def test_a_text_that_ollama_refuses_as_too_long_is_listed_and_the_others_are_embedded(server, tmp_path):
    """Versions 0.13.5 to 0.15 do not cut."""
    server.fault(poisoned_text="far too long", status=400, message="the input length exceeds the context length")
    texts = [*TEXTS, "far too long"]
    outcome, stored = embed_all(client_for(server, OLLAMA), texts, tmp_path)
    assert [(one.label, "exceeds the context length" in one.reason) for one in outcome.refused] == [("id-4", True)]
    assert set(stored) == set(TEXTS)


# --- refusals


def test_a_wrong_key_of_voyage_is_asked_once(server):
    key = "pa-wrong-SecretSecret"
    with pytest.raises(ProviderRefused, match="401") as caught:
        client_for(server, VOYAGE, key=key).embed(TEXTS)
    assert caught.value.exit_code == 6
    assert "check VOYAGE_API_KEY and VOYAGE_BASE_URL" in caught.value.next_step
    assert "Secret" not in f"{caught.value} {caught.value.next_step}"
    assert server.stats()["requests"] == 1


def test_a_key_with_a_space_names_voyages_setting(server):
    with pytest.raises(UsageProblem, match="VOYAGE_API_KEY"):
        client_for(server, VOYAGE, key="pa-a b")


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"status": 429, "message": PAYMENT_NEEDED}, "have not yet added your payment method"),
        ({"status": 402, "message": "Payment required"}, "Payment required"),
    ],
)
def test_a_missing_payment_is_never_waited_for(server, fault, named):
    server.fault(**fault)
    with pytest.raises(ProviderRefused, match=named) as caught:
        client_for(server, VOYAGE).embed(TEXTS)
    assert "add credit" in caught.value.next_step
    assert server.stats()["requests"] == 1


def test_voyages_rate_limit_without_headers_is_waited_for(server, monkeypatch):
    monkeypatch.setattr("lib.clients.embeddings.rate_limits.FIRST_WAIT_SECONDS", 0.05)
    server.fault(status=429, message="Rate limit exceeded. Please slow down.", times=2)
    client = client_for(server, VOYAGE)
    assert len(client.embed(TEXTS).vectors) == len(TEXTS)
    assert client.pacer.rate_limited == 2
    assert client.pacer.buckets() == [None, None]


@pytest.mark.matrix
def test_real_limits_of_voyage_come_without_headers(monkeypatch):
    monkeypatch.setattr("lib.clients.embeddings.rate_limits.FIRST_WAIT_SECONDS", 0.05)
    with OpenAIServer(requests_per_minute=20) as limited:
        client = client_for(limited, VOYAGE)
        for n in range(21):  # the bucket of 20 refills by one in three seconds
            client.embed([f"text {n}"])
        assert client.pacer.rate_limited >= 1
        assert client.pacer.token_limit == float("inf")


@pytest.mark.parametrize(
    ("provider", "model", "size", "refusal", "step"),
    [
        (VOYAGE, "voyage-4", 768, "argument 'output_dimension' is not valid", "check VOYAGE_MODEL, VECTOR_SIZE"),
        (VOYAGE, "voyage-9", 1024, "Model voyage-9 is not supported", "check VOYAGE_MODEL, VECTOR_SIZE"),
        (OLLAMA, "bge-m3", 1024, "model 'bge-m3' not found", "ollama pull bge-m3\n"),
    ],
)
def test_a_model_or_size_that_the_provider_lacks_ends_the_run(server, tmp_path, provider, model, size, refusal, step):
    client = client_for(server, provider, model, size)
    with pytest.raises(ProviderRefused, match=refusal) as caught:
        embed_all(client, [f"text {n}" for n in range(60)], tmp_path)
    assert step in caught.value.next_step
    assert server.stats()["texts"] == 0
    assert server.stats()["requests"] <= 16


def test_an_ollama_that_does_not_run_names_its_address(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_CONTACT_SECONDS", 0.2)
    url = f"http://127.0.0.1:{free_port()}/v1"
    client = EmbeddingClient(EmbeddingSpec(url, NOMIC, 768, OLLAMA), "")
    with pytest.raises(ProviderRefused, match="gave no good answer") as caught:
        client.embed(TEXTS)
    assert "check OLLAMA_BASE_URL" in caught.value.next_step


# --- the stand-in of AutoMem embeds with the same vectors


def automem(server, size, **settings):
    urls = {
        "OPENAI_BASE_URL": server.base_url,
        "VOYAGE_BASE_URL": server.voyage_url,
        "OLLAMA_BASE_URL": "",
        "OPENAI_API_KEY": KEYS[OPENAI],
    }
    return Embedder({**EMBEDDING_DEFAULTS, **urls, **settings}, size)


def test_automem_asks_the_provider_that_its_settings_choose(server):
    voyage, ollama = {"VOYAGE_API_KEY": KEYS[VOYAGE]}, {"OLLAMA_BASE_URL": server.ollama_url}
    chosen = {
        "voyage": automem(server, 1024, **voyage),
        "openai": automem(server, 768, **voyage),  # Voyage makes no 768
        "ollama": automem(server, 768, **ollama, OPENAI_API_KEY=""),
        "placeholder": automem(server, 768, OPENAI_API_KEY=""),
    }
    assert [one.provider for one in chosen.values()] == list(chosen)
    ours = client_for(server, VOYAGE).embed(TEXTS[:1]).vectors[0]
    assert np.allclose(chosen["voyage"].embed(TEXTS[0]), ours, atol=1e-6)
    theirs = np.array(chosen["ollama"].embed(TEXTS[0]))  # Ollama's older endpoint does not scale to length 1
    ours = client_for(server, OLLAMA).embed(TEXTS[:1]).vectors[0]
    assert np.linalg.norm(theirs) > 2
    assert np.allclose(theirs / np.linalg.norm(theirs), ours, atol=1e-6)


def test_automem_does_not_start_with_a_size_that_voyage_has_not(server):
    with pytest.raises(ValueError, match="voyage supported dimensions"):
        automem(server, 768, EMBEDDING_PROVIDER="voyage", VOYAGE_API_KEY=KEYS[VOYAGE])


def test_voyages_endpoint_takes_neither_float_nor_dimensions(server):
    headers = {"Authorization": f"Bearer {KEYS[VOYAGE]}"}
    for more in ({"encoding_format": "float"}, {"dimensions": 512}):
        body = {"model": "voyage-4", "input": ["x"], **more}
        answer = requests.post(f"{server.voyage_url}/embeddings", json=body, headers=headers, timeout=10)
        assert answer.status_code == 400
        assert next(iter(more)) in answer.json()["detail"]
