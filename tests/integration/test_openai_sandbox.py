"""The sandbox's embeddings endpoint, asked by the unmodified openai client."""

from __future__ import annotations

import math
import time

import numpy as np
import openai
import pytest

from tests.sandbox.openai_server import OpenAIServer

pytestmark = pytest.mark.matrix

LARGE = "text-embedding-3-large"


@pytest.fixture(scope="module")
def server():
    with OpenAIServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _clean(server):
    server.clear_faults()
    server.reset()


def client_of(server, key="sk-sandbox", **options):
    return openai.OpenAI(api_key=key, base_url=server.base_url, max_retries=0, **options)


def embed(server, texts, **options):
    answer = client_of(server).embeddings.create(model=options.pop("model", LARGE), input=texts, **options)
    return np.array([each.embedding for each in answer.data], dtype=np.float32)


def test_float_and_base64_answers_hold_the_same_unit_vectors(server):
    texts = ["FalkorDB holds the graph", "Qdrant holds the vectors", "喜欢喝咖啡 ☕"]
    floats = embed(server, texts, encoding_format="float")
    assert floats.shape == (3, 3072)
    assert np.array_equal(floats, embed(server, texts))  # the client asks for base64 by itself
    assert np.allclose(np.linalg.norm(floats, axis=1), 1, atol=1e-6)


def test_dimensions_are_the_full_vector_cut_and_scaled(server):
    full, small = embed(server, ["one text"]), embed(server, ["one text"], dimensions=768)
    cut = full[:, :768] / np.linalg.norm(full[:, :768])
    assert np.allclose(small, cut, atol=1e-6)


def test_texts_that_share_words_are_near_and_models_differ(server):
    rows = embed(
        server,
        [
            "Which database holds our graph?",
            "The graph database is FalkorDB",
            "Dinner with Anna on Friday",
            "咖啡很好喝",
            "他爱喝咖啡",
        ],
    )
    near = rows @ rows.T
    assert near[0, 1] > near[0, 2] + 0.3
    assert near[3, 4] > near[3, 1] + 0.2
    other = embed(server, ["Which database holds our graph?"], model="text-embedding-3-small", dimensions=768)
    assert abs(float(other[0] @ rows[0, :768])) < 0.1


@pytest.mark.parametrize(
    ("texts", "options", "status", "part"),
    [
        (["fine", ""], {}, 400, "'$.input' is invalid"),
        (["fine", "  \n"], {}, 400, "'$.input' is invalid"),
        (["x"] * 2049, {}, 400, "array too long"),
        (["word " * 9000], {}, 400, "maximum context length is 8192 tokens"),
        (["word " * 8000] * 38, {}, 400, "max 300000 tokens per request"),
        (["x"], {"dimensions": 4000}, 400, "Must be less than or equal to 3072"),
        (
            ["x"],
            {"model": "text-embedding-ada-002", "dimensions": 512},
            400,
            "does not support specifying dimensions",
        ),
        (["x"], {"model": "text-embedding-9"}, 404, "does not exist"),
    ],
)
def test_refused_as_the_real_endpoint_refuses(server, texts, options, status, part):
    with pytest.raises(openai.APIStatusError) as caught:
        embed(server, texts, **options)
    assert caught.value.status_code == status
    assert part in str(caught.value)
    assert server.stats()["texts"] == 0


def test_keys(server):
    with pytest.raises(openai.AuthenticationError) as caught:
        client_of(server, key="sk-wrong-0123456789").embeddings.create(model=LARGE, input=["x"])
    assert caught.value.code == "invalid_api_key"
    assert "sk-wrong-0123456789" not in str(caught.value)


def test_faults_are_hit_as_often_as_ordered_and_counted(server):
    server.fault(status=429, code="insufficient_quota", after=1, times=1)
    embed(server, ["a"])
    with pytest.raises(openai.RateLimitError) as caught:
        embed(server, ["a"])
    assert caught.value.code == "insufficient_quota"
    embed(server, ["a", "b"])
    stats = server.stats()
    assert (stats["requests"], stats["texts"], stats["paid_twice"]) == (3, 3, 1)
    assert stats["statuses"] == {"200": 2, "429": 1}


def test_a_cut_answer_breaks_the_connection_and_is_charged(server):
    server.fault(cut=0.5, times=1)
    with pytest.raises(openai.APIConnectionError):
        embed(server, ["a"])
    assert server.stats()["texts"] == 1


def test_a_hanging_answer_runs_into_the_timeout(server):
    server.fault(hang_seconds=300, times=1)
    started = time.monotonic()
    with pytest.raises(openai.APITimeoutError):
        client_of(server, timeout=0.3).embeddings.create(model=LARGE, input=["a"])
    assert time.monotonic() - started < 60


def test_an_unknown_fault_setting_is_an_error(server):
    with pytest.raises(ValueError, match="unknown fault settings: colour"):
        server.fault(colour="red")


def test_the_limits_refill_and_are_announced():
    with OpenAIServer(tokens_per_minute=6000, requests_per_minute=600) as server:
        create = client_of(server).embeddings.with_raw_response.create
        text, started = "x" * 4 * 5900, time.monotonic()
        headers = create(model=LARGE, input=["y" * 400]).headers
        assert headers["x-ratelimit-limit-tokens"] == "6000"
        assert math.isclose(int(headers["x-ratelimit-remaining-tokens"]), 5900, abs_tol=20)
        assert headers["x-ratelimit-remaining-requests"] == "599"
        assert headers["x-ratelimit-reset-tokens"] == "1s" or headers["x-ratelimit-reset-tokens"].endswith("ms")
        create(model=LARGE, input=[text[: 4 * 5800]])
        with pytest.raises(openai.RateLimitError) as caught:  # 100 are left, and 100 come in a second
            create(model=LARGE, input=["z" * 4 * 3000])
        assert caught.value.code == "rate_limit_exceeded"
        wait = int(caught.value.response.headers["retry-after-ms"]) / 1000
        assert 29 - (time.monotonic() - started) - 0.01 <= wait <= 29.01
        time.sleep(1)
        create(model=LARGE, input=["z" * 4 * 200])
