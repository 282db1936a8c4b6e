"""Embed many texts with several workers: batches, splitting of refused ones, results stored by the caller's thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from lib.child_process import release_free_memory, unmap_large_blocks
from lib.clients.embeddings.cache import TextRow
from lib.clients.embeddings.client import CONTROL_TEXT, EmbeddingClient
from lib.clients.embeddings.pricing import CUT_TO_TOKENS, count_tokens, cut_to_tokens, input_limit
from lib.clients.embeddings.rate_limits import Stopped, estimated_tokens
from lib.clients.embeddings.refusals import BadAnswer, BadInput, context_limit
from lib.errors import MigrationError, ProviderRefused

MAX_INPUTS = 2048  # of one request (https://platform.openai.com/docs/api-reference/embeddings)
MAX_TOKENS = 250_000  # the provider takes 300,000; its count and ours may differ


@dataclass(frozen=True)
class Refused:
    """A row that has no vector, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class Caps:
    """The most of one request: texts, and tokens as the rate limiter estimates them."""

    inputs: int = MAX_INPUTS
    tokens: float = MAX_TOKENS


def batches(
    rows: Iterable[TextRow],
    model: str,
    caps: Callable[[], Caps],
    *,
    refused: Callable[[Refused], None],
    cut: Callable[[str], None],
) -> Iterator[list[TextRow]]:
    """Batches under the `caps` of the moment.

    Blank texts are told to `refused`: one would fail its whole request. Texts over the model's limit are cut and
    their labels told to `cut`; the key stays that of the whole text.
    """
    batch: list[TextRow] = []
    tokens, limits = 0, caps()
    for row in rows:
        if not row.text.strip():
            refused(Refused(row.label, "blank content"))
            continue
        sent = _fitting(row, model)
        if sent.text != row.text:
            cut(row.label)
        weight = max(sent.tokens, estimated_tokens([sent.text]))
        if batch and (len(batch) >= limits.inputs or tokens + weight > limits.tokens):
            yield batch
            batch, tokens, limits = [], 0, caps()
        batch.append(sent)
        tokens += weight
    if batch:
        yield batch


def _fitting(row: TextRow, model: str) -> TextRow:
    tokens = row.tokens or count_tokens([row.text])[0]
    limit = input_limit(model)
    if limit is None or tokens <= limit:
        return row if row.tokens == tokens else replace(row, tokens=tokens)
    return replace(row, text=cut_to_tokens(row.text, CUT_TO_TOKENS), tokens=CUT_TO_TOKENS)


Vectors = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Arrived:
    """From a worker: vectors, a refused row, the label of a text that was cut, an error, or the end of a batch."""

    vectors: Vectors
    tokens: int = 0
    refused: Refused | None = None
    cut: str | None = None
    error: BaseException | None = None
    batch_ended: bool = False


def embed_split(
    client: EmbeddingClient,
    batch: list[TextRow],
    stop: threading.Event,
    deliver: Callable[[Arrived], None],
    too_many: Callable[[int], None],
    since: float | None = None,
) -> bool:
    """Embed `batch` and deliver what comes of it, piece by piece; returns whether every row was taken.

    A refused batch is never sent again as it is: its halves are. Where both are taken whole, it was the number
    of texts, and `too_many` hears how many are fine. `since`: when the whole batch was first sent (monotonic).
    Raises what EmbeddingClient.embed raises, except BadInput.
    """
    since = time.monotonic() if since is None else since
    try:
        answer = client.embed([row.text for row in batch], stop=stop)
    except BadInput as problem:
        shorter = _cut_to_limit(batch[0], str(problem)) if len(batch) == 1 else None
        if shorter:
            taken = embed_split(client, [shorter], stop, deliver, too_many, since)
            if taken:
                deliver(Arrived([], cut=shorter.label))
            return taken
        if len(batch) == 1:
            _verify_endpoint(client, stop, since)
            deliver(Arrived([], refused=Refused(batch[0].label, str(problem))))
            return False
        middle = (len(batch) + 1) // 2
        halves = [
            embed_split(client, half, stop, deliver, too_many, since)
            for half in (batch[:middle], batch[middle:])
        ]
        if all(halves) and not isinstance(problem, BadAnswer):
            too_many(middle)
        return all(halves)
    rows = answer.vectors.astype("<f4", copy=False)
    pairs = [(row.key, vector.tobytes()) for row, vector in zip(batch, rows, strict=True)]
    deliver(Arrived(pairs, answer.tokens))
    return True


def _cut_to_limit(row: TextRow, problem: str) -> TextRow | None:
    """The row with its text cut to what the refusal says the model takes; None if it says nothing, or it fits.

    The provider may count other tokens than ours: each further refusal takes a tenth more off.
    """
    limit = context_limit(problem)
    if limit is None or limit < 2:
        return None
    tokens = count_tokens([row.text])[0]
    most = limit - 1 if tokens >= limit else int(tokens * 0.9)
    text = cut_to_tokens(row.text, most) if most else ""
    return replace(row, text=text, tokens=most) if text.strip() and text != row.text else None


def _verify_endpoint(client: EmbeddingClient, stop: threading.Event, since: float) -> None:
    """Before a row is called bad: has the endpoint taken any other text since, or does it take a plain word?

    One that has begun to refuse everything must not look like a graph full of bad memories.
    """
    if client.answered_since(since):
        return
    try:
        client.embed([CONTROL_TEXT], stop=stop)
    except BadInput as problem:
        raise ProviderRefused(
            f"{client.provider} does not even embed a plain word: {problem}",
            next_step="check EMBEDDING_MODEL, VECTOR_SIZE and OPENAI_BASE_URL, then run the same command again",
        ) from problem


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
    unmap_large_blocks()
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
        release_free_memory()
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
