from __future__ import annotations

import threading
import time

import pytest

from lib.clients.embeddings.rate_limits import (
    BucketState,
    Pacer,
    RateLimited,
    RateLimits,
    duration_seconds,
    estimated_tokens,
    rate_limits,
    retry_after,
)
from lib.concurrency import Cancelled

GO = threading.Event()  # never set


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pacer(clock):
    """A pacer whose probe has been answered without headers."""
    made = Pacer(clock=clock)
    made.acquire(1, GO)
    made.answered(1, None)
    return made


def tokens(limit, remaining, reset_seconds):
    return RateLimits(None, BucketState(limit, remaining, reset_seconds))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12ms", 0.012),
        ("1s", 1),
        ("6m0s", 360),
        ("1h2m3.5s", 3723.5),
        ("1d", 86400),
        ("7", 7),
        ("0s", 0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("nan", None),
    ],
)
def test_durations(text, seconds):
    assert duration_seconds(text) == (pytest.approx(seconds) if seconds is not None else None)


def test_headers():
    found = rate_limits(
        {
            "x-ratelimit-limit-tokens": "3000000",
            "x-ratelimit-remaining-tokens": "2400000",
            "x-ratelimit-reset-tokens": "12s",
            "x-ratelimit-limit-requests": "200",
            "x-ratelimit-remaining-requests": "199",
            "x-ratelimit-reset-requests": "7m12s",
        }
    )
    assert found.tokens.refill == 50_000
    assert found.requests.refill == pytest.approx(1 / 432)  # 200 a day, not a minute
    assert rate_limits({"x-ratelimit-limit-tokens": "many"}) is None
    assert rate_limits({}) is None


def test_a_reset_too_short_to_measure_is_not_a_rate():
    assert BucketState(1000, 999, 0.001).refill is None
    assert BucketState(1000, 1000, 0).refill is None


def test_retry_after():
    assert retry_after({"retry-after": "2", "retry-after-ms": "150"}) == 0.15
    assert retry_after({"retry-after": "2"}) == 2
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": "later"}) is None
    assert retry_after({}) is None


@pytest.mark.parametrize("reset", [None, "2026-11-28T10:00:00Z", "1795860000", "1795860000000"])
@pytest.mark.parametrize("refused", [False, True])
def test_a_used_up_limit_without_a_known_reset_is_not_waited_for_without_end(clock, reset, refused):
    """Many gateways send no reset, or a time instead of a duration."""
    headers = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"}
    limits = rate_limits(headers | ({"x-ratelimit-reset-requests": reset} if reset else {}))
    pacer = Pacer(clock=clock)
    pacer.acquire(1, GO)
    pacer.refused(1, 1, limits) if refused else pacer.answered(1, limits)
    clock.now += 2
    assert pacer._delay(1) == 0
    pacer.acquire(1, GO)
    assert pacer._delay(1) > 0  # the answer will say what remains


def test_the_estimate_is_a_quarter_of_the_characters_rounded_up():
    assert estimated_tokens(["", "a", "abcd", "abcde"]) == 0 + 1 + 1 + 2


def test_one_request_probes_alone(clock):
    pacer = Pacer(clock=clock)
    pacer.acquire(10, GO)
    assert pacer._delay(10) > 0
    pacer.answered(10, None)
    assert pacer._delay(10) == 0


def test_the_bucket_follows_the_server_less_what_is_in_flight(pacer, clock):
    pacer.acquire(100, GO)
    pacer.acquire(400, GO)
    pacer.answered(100, tokens(1000, 700, 10))  # 300 used refill in 10 s: 30 a second
    assert pacer._delay(300) == 0
    assert pacer._delay(330) == pytest.approx(1.0)
    clock.now += 1
    assert pacer._delay(330) == 0
    assert pacer.token_limit == 1000


def test_more_than_the_whole_bucket_waits_for_a_full_one(pacer, clock):
    pacer.acquire(10, GO)
    pacer.answered(10, tokens(1000, 900, 1))
    assert pacer._delay(5000) == pytest.approx(1.0)


def test_an_overtaken_answer_does_not_raise_the_level(pacer):
    for _ in range(2):
        pacer.acquire(100, GO)
    pacer.answered(100, tokens(1000, 200, 8))
    pacer.answered(100, tokens(1000, 900, 1))
    assert pacer._delay(250) > 0


def test_a_failed_request_gives_its_tokens_back(pacer):
    pacer.acquire(10, GO)
    pacer.answered(10, tokens(1000, 500, 5))
    pacer.acquire(500, GO)
    assert pacer._delay(500) > 0
    pacer.failed(500)
    assert pacer._delay(500) == 0


def test_a_refusal_holds_everyone_for_the_time_named_and_a_tenth_at_most(pacer, clock):
    pacer.acquire(10, GO)
    pacer.refused(10, 4.0, None)
    assert 4.0 <= pacer._delay(10) <= 4.4
    assert pacer.rate_limited == 1
    clock.now += 4.4
    assert pacer._delay(10) == 0


def test_a_refusal_slows_the_rate_once_a_second_and_it_recovers(pacer, clock):
    pacer.acquire(10, GO)
    pacer.answered(10, tokens(1000, 0, 10))  # 100 a second
    for _ in range(3):
        pacer._tokens.level = 10
        pacer.acquire(10, GO)
        pacer.refused(10, 0.0, None)
        pacer._gate = clock.now
    pacer._tokens.level = 0
    assert pacer._delay(85) == pytest.approx(1.0)  # 85 a second: one cut for a burst of refusals
    clock.now += 5
    assert pacer._share == pytest.approx(0.85)
    pacer._delay(0)
    assert pacer._share == pytest.approx(1.0)


def test_without_headers_a_refusal_halves_what_is_in_flight_and_success_brings_it_back(pacer, clock):
    for _ in range(8):
        pacer.acquire(10, GO)
    pacer.refused(10, 0.1, None)
    clock.now += 0.2
    assert pacer._concurrency == 4
    assert pacer._delay(10) > 0
    for _ in range(4):
        pacer.answered(10, None)
    assert pacer._delay(10) == 0
    assert 4 < pacer._concurrency < 5


@pytest.mark.parametrize("named", [None, 0.0])  # 0: `retry-after: 0`, or a date that has passed
def test_refusals_in_a_row_without_a_time_wait_longer_each(pacer, clock, named):
    waits = []
    for _ in range(4):
        pacer.acquire(10, GO)
        pacer.refused(10, named, None)
        waits.append(pacer._delay(10))
        clock.now += 40
    assert waits == sorted(waits)
    assert waits[0] >= 1
    assert 8 <= waits[3] <= 30 * 1.1


def test_a_turn_too_far_away_is_not_waited_for(clock):
    pacer = Pacer(longest_wait_seconds=300, clock=clock)
    pacer.acquire(1, GO)
    pacer.answered(1, RateLimits(BucketState(200, 0, 86400), None))
    with pytest.raises(RateLimited, match="its limits delay all requests") as caught:
        pacer.acquire(1, GO)
    assert caught.value.wait_seconds == pytest.approx(432)


def test_a_stop_ends_the_wait(pacer):
    pacer.acquire(1, GO)
    pacer.refused(1, 60.0, None)
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        pacer.acquire(1, stop)
    assert time.monotonic() - started < 30
