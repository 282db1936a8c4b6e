"""Many texts embedded by several workers; what arrives is stored by the caller's thread, at once and in order."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lib.embedding.batches import MAX_INPUTS, MAX_TOKENS, Caps, Refused, batches
from lib.embedding.client import EmbeddingClient
from lib.embedding.memory import give_back, return_large_blocks
from lib.embedding.pacing import Stopped
from lib.embedding.plan_table import TextRow
from lib.embedding.splitting import Arrived, Vectors, embed_split
from lib.errors import MigrationError

GRACE_SECONDS = 3.0  # what is in flight when the run ends is paid for: so long it may still arrive
TICK_SECONDS = 1.0
# Beyond one for each worker, so that none waits while the disk takes what others brought; fewer where they are large.
SPARE_BATCHES, SPARE_TEXTS = 16, 1600


@dataclass(frozen=True)
class EmbedProgress:
    """How far a run is; `waiting_seconds` is above 0 while a rate limit holds it.

    `tokens` are all billed ones, `discarded` those of them whose vectors are not stored (at the end: never will be).
    """

    embedded: int
    refused: int
    tokens: int
    requests: int
    rate_limited: int
    waiting_seconds: float
    seconds: float
    discarded: int = 0


@dataclass(frozen=True)
class EmbedOutcome:
    """What a run did. `tokens` are the billed ones; `cut` names texts embedded without their end."""

    embedded: int
    tokens: int
    requests: int
    rate_limited: int
    refused: list[Refused]
    cut: list[str]
    seconds: float
    discarded: int = 0


def embed_missing(
    client: EmbeddingClient,
    rows: Iterable[TextRow],
    store: Callable[[Vectors], None],
    *,
    workers: int,
    batch_size: int,
    progress: Callable[[EmbedProgress], None] | None = None,
    require_room: Callable[[int], None] | None = None,
) -> EmbedOutcome:
    """Embed `rows` (distinct keys) and hand (key, float32 little-endian) pairs to `store` as they arrive.

    `rows`, `store` and `progress` are used by the calling thread only, so all may share one SQLite connection.
    Memory holds a few batches a worker. When the run is interrupted or fails, workers stop before their next
    request, and all that was received is stored before the error leaves.

    `require_room` is asked before each batch whether so many more texts can be stored. If it raises, no further batch
    is sent, and its error leaves when all that was sent before is stored.

    Raises:
        ProviderRefused, WrongWidth: as EmbeddingClient.embed; and whatever `rows`, `store` or `require_room` raise.
    """
    return_large_blocks()
    run = _Run(client, store, progress, max(1, min(batch_size, MAX_INPUTS)), require_room)
    for _ in range(workers):
        threading.Thread(target=run.work, name="embedding", daemon=True).start()
    try:
        run.feed(rows, workers + min(SPARE_BATCHES, 1 + SPARE_TEXTS // batch_size))
    except BaseException:
        run.abandon()
        raise
    finally:
        run.dismiss(workers)
        give_back()
    return run.outcome()


class _Run:
    def __init__(
        self,
        client: EmbeddingClient,
        store: Callable[[Vectors], None],
        progress: Callable[[EmbedProgress], None] | None,
        batch_size: int,
        require_room: Callable[[int], None] | None,
    ) -> None:
        self._client = client
        self._require_room = require_room
        self._store = store
        self._progress = progress
        self._max_inputs = batch_size
        self._jobs: queue.SimpleQueue[list[TextRow] | None] = queue.SimpleQueue()
        self._arrived: deque[Arrived] = deque()
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._outstanding = self._texts_outstanding = 0
        self._no_room: MigrationError | None = None
        self._embedded = self._tokens = 0
        self._refused: list[Refused] = []
        self._cut: list[str] = []
        self._started = time.monotonic()
        self._before, self._billed_before = client.pacer.counts(), client.billed_tokens

    # The caller's thread

    def feed(self, rows: Iterable[TextRow], most_outstanding: int) -> None:
        """Hand out batches, never more than `most_outstanding` at a time, and store what arrives."""
        made = batches(
            rows, self._client.spec.model, self._caps, refused=self._refused.append, cut=self._cut.append
        )
        more = True
        while more or self._outstanding:
            while more and self._outstanding < most_outstanding:
                batch = next(made, None)
                if batch is None or not self._has_room(len(batch)):
                    more = False
                else:
                    self._outstanding += 1
                    self._texts_outstanding += len(batch)
                    self._jobs.put(batch)
            if self._outstanding:
                error = self._take(TICK_SECONDS)
                self._report()
                if error is not None:
                    raise error
        if self._no_room:
            raise self._no_room

    def _has_room(self, texts: int) -> bool:
        """Whether so many texts can be stored together with all that are sent; notes the error if not."""
        try:
            if self._require_room:
                self._require_room(self._texts_outstanding + texts)
        except MigrationError as error:
            self._no_room = error
        return self._no_room is None

    def abandon(self) -> None:
        """Stop the workers, give what is in flight a moment to arrive, and store it."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while self._jobs.get_nowait() is not None:
                self._outstanding -= 1
        deadline = time.monotonic() + GRACE_SECONDS
        # Where storing is what failed, the first error is the one to tell.
        with contextlib.suppress(MigrationError):
            while self._outstanding > 0 and time.monotonic() < deadline:
                self._take(0.1)
            self._take(0.0)
            self._report()

    def dismiss(self, workers: int) -> None:
        """Let the worker threads end."""
        for _ in range(workers):
            self._jobs.put(None)

    def outcome(self) -> EmbedOutcome:
        """The sums of the run."""
        told = self._status()
        return EmbedOutcome(
            told.embedded,
            told.tokens,
            told.requests,
            told.rate_limited,
            self._refused,
            self._cut,
            told.seconds,
            told.discarded,
        )

    def _take(self, seconds: float) -> BaseException | None:
        """Store what has arrived within `seconds`; the first error among it, if any."""
        with self._news:
            self._news.wait_for(lambda: self._arrived, timeout=seconds)
            items = list(self._arrived)
        vectors = [pair for item in items for pair in item.vectors]
        if vectors:
            self._store(vectors)
        # Only now: interrupted above, the same items are stored again, which changes nothing.
        for item in items:
            self._arrived.popleft()
            self._embedded += len(item.vectors)
            self._tokens += item.tokens
            self._outstanding -= item.batch_ended
            self._texts_outstanding -= len(item.vectors) + (item.refused is not None)
            if item.cut:
                self._cut.append(item.cut)
            if item.refused:
                self._refused.append(item.refused)
        return next((item.error for item in items if item.error), None)

    def _report(self) -> None:
        if self._progress:
            self._progress(self._status())

    def _status(self) -> EmbedProgress:
        now, billed = self._client.pacer.counts(), self._client.billed_tokens - self._billed_before
        return EmbedProgress(
            self._embedded,
            len(self._refused),
            billed,
            now.requests - self._before.requests,
            now.rate_limited - self._before.rate_limited,
            now.waiting_seconds,
            time.monotonic() - self._started,
            billed - self._tokens,
        )

    def _caps(self) -> Caps:
        # Half a bucket at most, so that two requests never wait for a full one.
        return Caps(self._max_inputs, min(MAX_TOKENS, self._client.pacer.token_limit / 2))

    # The workers' threads

    def work(self) -> None:
        """Embed batches until dismissed."""
        while (batch := self._jobs.get()) is not None:
            error: BaseException | None = None
            try:
                while batch:  # made before it was learnt how many the server takes, it may be too large
                    part, batch = batch[: self._max_inputs], batch[self._max_inputs :]
                    embed_split(self._client, part, self._stop, self._deliver, self._too_many)
            except Stopped:
                pass
            except BaseException as problem:  # noqa: BLE001 - raised again by the caller's thread
                error = problem
            self._deliver(Arrived([], error=error, batch_ended=True))

    def _too_many(self, inputs: int) -> None:
        self._max_inputs = min(self._max_inputs, inputs)

    def _deliver(self, item: Arrived) -> None:
        with self._news:
            self._arrived.append(item)
            self._news.notify()
