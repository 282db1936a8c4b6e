"""One embeddings endpoint: paced, retried on named conditions, every answer checked."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any

from lib.dimensions import EmbeddingSpec
from lib.embedding.answers import Answer, billed_tokens, read_answer
from lib.embedding.limit_headers import rate_limits
from lib.embedding.pacing import Pacer, Stopped, estimated_tokens
from lib.embedding.provider import Provider
from lib.embedding.refusals import AGAIN, BadInput, RateLimited, Transient
from lib.errors import ProviderRefused

FIRST_CONTACT_SECONDS = 60.0  # an endpoint that never answered yet is given up sooner
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0
FAILURES_BEFORE_SPLIT = 5
CONTROL_TEXT = "hello"


class EmbeddingClient:
    """Embeds texts with one model at one size. Thread-safe; the workers of a run share one.

    Args:
        spec: endpoint ("" for OpenAI's), model and size.
        api_key: never shown, in no message and no repr; raises UsageProblem where it cannot be one.
        timeout_seconds: of one request.
        max_wait_seconds: of rate limits, or of failures, before the run gives up.
    """

    def __init__(
        self,
        spec: EmbeddingSpec,
        api_key: str,
        *,
        timeout_seconds: float = 60.0,
        max_wait_seconds: float = 600.0,
    ) -> None:
        self.spec = spec
        self.pacer = Pacer(max_wait_seconds)
        self._provider = Provider(spec, api_key, timeout_seconds)
        self._max_wait = max_wait_seconds
        self.request_seconds: float | None = None  # what the first good answer took
        self._last_answer: float | None = None
        self.billed_tokens = 0  # of every answer of the provider, those included that are of no use
        # One answer at a time: more would share the interpreter's lock anyway, and each takes four times its size.
        self._decoding = threading.Lock()

    @property
    def provider(self) -> str:
        """Model and endpoint, to be shown."""
        return self._provider.name

    def answered_since(self, moment: float) -> bool:
        """Whether good vectors came after `moment` (monotonic seconds)."""
        return self._last_answer is not None and self._last_answer >= moment

    def embed(self, texts: Sequence[str], *, stop: threading.Event | None = None) -> Answer:
        """Vectors of `texts` (at most 2,048, none blank), in their order.

        Raises:
            ProviderRefused: key, permission, quota, or no good answer for `max_wait_seconds`.
            WrongWidth: the model makes another size.
            BadInput: the batch is to be split, or its only text refused.
            Stopped: `stop` was set while the request waited.
        """
        import backoff

        stop = stop or threading.Event()
        started = time.monotonic()

        def waits() -> Generator[float, Any, None]:
            return self._waits(stop, started)

        retried = backoff.on_exception(waits, (RateLimited, Transient), jitter=None, logger=None)(
            self._attempt
        )
        try:
            answer: Answer = retried(list(texts), stop)
        except (RateLimited, Transient) as error:
            if stop.is_set():
                raise Stopped from error
            raise self._given_up(error, started) from error
        return answer

    def close(self) -> None:
        """Close the connections."""
        self._provider.close()

    def _attempt(self, texts: list[str], stop: threading.Event) -> Answer:
        tokens = estimated_tokens(texts)
        self._provider.prepare()
        self.pacer.acquire(tokens, stop)
        began = time.monotonic()
        try:
            headers, content = self._provider.send(texts)
            limits = rate_limits(headers)
            with self._decoding:
                body = self._provider.opened(texts, headers, content)
                self.billed_tokens += billed_tokens(body)
                answer = read_answer(body, len(texts), self.spec, limits)
            self._refuse_one_for_all(texts, answer)
        except BadInput:
            self.pacer.answered(tokens, None)
            raise
        except RateLimited as error:
            self.pacer.refused(tokens, error.wait_seconds, error.limits)
            raise
        except BaseException:
            self.pacer.failed(tokens)
            raise
        self.pacer.answered(tokens, limits)
        self._last_answer = time.monotonic()
        self.request_seconds = self.request_seconds or self._last_answer - began
        return answer

    def _refuse_one_for_all(self, texts: list[str], answer: Answer) -> None:
        """Raise ProviderRefused where several different texts got one and the same vector: nothing could be found."""
        if len(set(texts)) > 2 and bool((answer.vectors == answer.vectors[0]).all()):
            raise ProviderRefused(
                f"{self.provider} answers every text with the same vector",
                next_step="check EMBEDDING_MODEL and OPENAI_BASE_URL, then run the same command again",
            )

    def _waits(self, stop: threading.Event, started: float) -> Generator[float, Any, None]:
        """Pauses between tries, for backoff. It waits here itself, so that a stop ends the wait at once.

        A rate limit needs no pause of its own: the pacer's gate holds every worker. Ends, and with it the tries,
        where waiting is no use any more.
        """
        failures = 0
        error = yield 0.0
        while not self._hopeless(error, started, failures):
            if isinstance(error, Transient):
                failures += 1
                longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**failures)
                stop.wait(random.uniform(longest / 2, longest))
            if stop.is_set():
                return
            error = yield 0.0

    def _hopeless(self, error: Exception, started: float, failures: int) -> bool:
        now, last = time.monotonic(), self._last_answer
        if isinstance(error, RateLimited):
            too_long = (error.wait_seconds or 0.0) > self._max_wait
            return too_long or now - max(started, last or started) >= self._max_wait
        if self._split_instead(error, started, failures):
            return True
        patience = self._max_wait if last is not None else min(FIRST_CONTACT_SECONDS, self._max_wait)
        return now - started >= patience

    def _split_instead(self, error: Exception, started: float, failures: int) -> bool:
        # Some servers answer 500 to a text they cannot take. While others are served, it is the batch.
        if getattr(error, "status", None) != 500 or failures < FAILURES_BEFORE_SPLIT:
            return False
        return self.answered_since(started) or self._takes_a_word()

    def _takes_a_word(self) -> bool:
        try:
            self._attempt([CONTROL_TEXT], threading.Event())
        except (RateLimited, Transient, BadInput):
            return False
        return True

    def _given_up(self, error: Exception, started: float) -> Exception:
        seconds = time.monotonic() - started
        if isinstance(error, RateLimited):
            return ProviderRefused(
                f"Rate limit exceeded during re-embedding ({self.provider}, for {seconds:.0f} s: {error})",
                next_step=f"wait for off-peak hours, raise the provider's limits, or lower --batch-size; {AGAIN}",
            )
        if self._split_instead(error, started, FAILURES_BEFORE_SPLIT) and seconds < self._max_wait:
            return BadInput(str(error))
        return ProviderRefused(
            f"{self.provider} gave no good answer for {seconds:.0f} s: {error}",
            next_step=f"check OPENAI_BASE_URL, the network and the provider's status page, {AGAIN}",
        )
