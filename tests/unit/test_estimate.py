from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from lib.clients.embeddings.cache import Missing
from lib.clients.embeddings.pricing import expected
from lib.clients.embeddings.rate_limits import BucketState, Pacer, RateLimits
from lib.dimensions import LOCAL, OLLAMA, OPENAI, VOYAGE, EmbeddingSpec
from lib.reembed.embed import EmbeddingRunner

GO = threading.Event()  # never set


def pacer(requests=None, tokens=None):
    """A pacer that has had one answer with these limits."""
    made = Pacer(clock=lambda: 1000.0)
    made.acquire(0, GO)
    made.answered(0, RateLimits(requests, tokens) if requests or tokens else None)
    return made


def test_without_limits_the_workers_and_the_first_request_decide():
    found = expected(pacer(), 0.5, 10_000, 500_000, workers=16, batch_size=100)
    assert found.seconds == 7 * 0.5  # 100 requests, 16 at once
    assert "16 workers, 0.50 s a request" in found.text


@pytest.mark.parametrize(
    ("provider", "seconds"),
    [
        (OPENAI, 2 * 0.5),
        (VOYAGE, 2 * 0.5),
        (OLLAMA, 125 * 0.5),
        (LOCAL, 125 * 0.5),
    ],  # 125 requests of 16, no two at once
)
def test_providers_that_compute_one_request_at_a_time_take_as_long_as_one_worker(provider, seconds):
    client = SimpleNamespace(request_seconds=0.5, pacer=pacer())
    spec = EmbeddingSpec("", "a-model", 768, provider)
    runner = EmbeddingRunner(client, spec, 10, 100, None, print, print)  # type: ignore[arg-type]
    found = runner.expected(Missing(2000, 100_000))
    assert found is not None
    assert found.seconds == seconds


def test_fewer_requests_than_workers_take_one_turn():
    assert expected(pacer(), 0.5, 150, 9_000, workers=16, batch_size=100).seconds == 0.5


def test_a_token_limit_that_is_slower_decides():
    # 600,000 a minute: 10,000 a second; 100,000 are left of the first bucket.
    limits = BucketState(600_000, 100_000, 50.0)
    found = expected(pacer(tokens=limits), 0.1, 10_000, 400_000, workers=16, batch_size=100)
    assert found.seconds == pytest.approx(30.0)
    assert found.text == "30 s, paced by the provider's limit of 600,000 tokens a minute"


def test_a_request_limit_that_is_slower_decides():
    limits = BucketState(60, 10, 50.0)  # one a second
    found = expected(pacer(requests=limits), 0.1, 10_000, 400_000, workers=16, batch_size=100)
    assert found.seconds == pytest.approx(90.0)
    assert found.text == "1 min 30 s, paced by the provider's limit of 60 requests a minute"


def test_a_limit_that_is_never_met_changes_nothing():
    limits = BucketState(10_000_000, 9_000_000, 6.0)
    assert "workers" in expected(pacer(tokens=limits), 0.5, 1000, 50_000, workers=4, batch_size=100).text
