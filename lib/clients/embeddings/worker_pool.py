"""Embed many texts with several workers: batches, splitting of refused ones, results stored by the caller's thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lib.child_process import release_free_memory, unmap_large_blocks
from lib.clients.embeddings.answers import BadAnswer, BadInput, FloatArray, context_limit
from lib.clients.embeddings.cache import TextRow
from lib.clients.embeddings.client import CONTROL_TEXT, OLLAMA_INPUTS, EmbeddingClient
from lib.clients.embeddings.pricing import count_tokens, cut_to_tokens, input_limit
from lib.clients.embeddings.rate_limits import estimated_tokens
from lib.concurrency import Cancelled
from lib.dimensions import LOCAL, OLLAMA, OPENAI, SETTING_NAMES, VOYAGE, EmbeddingSpec, bare_model
from lib.errors import MigrationError, ProviderRefused

# Texts of one request (https://platform.openai.com/docs/api-reference/embeddings,
# https://docs.voyageai.com/reference/embeddings-api). Ollama and a local model compute one text after the other.
MAX_INPUTS = 2048
_MAX_INPUTS = {VOYAGE: 1000, OLLAMA: OLLAMA_INPUTS, LOCAL: 16}
SEQUENTIAL = frozenset([OLLAMA, LOCAL])
# Tokens of one request: five sixths of the published 300,000, and of Voyage's 120,000, 320,000 or 1,000,000. The
# provider's count and ours may differ.
MAX_TOKENS = 250_000
_VOYAGE_TOKENS = 100_000
_MODEL_TOKENS = {"voyage-4": 266_000, "voyage-3.5": 266_000, "voyage-4-lite": 833_000, "voyage-3.5-lite": 833_000}
GRACE_SECONDS = 3.0  # so long a run that ends waits for the requests in flight, which are paid for
TICK_SECONDS = 1.0
# Batches beyond one per worker, so that no worker waits for the disk. Fewer if the batches are large.
SPARE_BATCHES, SPARE_TEXTS = 16, 1600

Vectors = list[tuple[bytes, bytes]]


def texts_a_request(spec: EmbeddingSpec, batch_size: int) -> int:
    """Return how many of `batch_size` texts one request to this provider holds."""
    return max(1, min(batch_size, _MAX_INPUTS.get(spec.provider, MAX_INPUTS)))


@dataclass(frozen=True)
class Refused:
    """A text that has no vector, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class EmbedProgress:
    """How far a call of `embed_missing` is, or what it did.

    `tokens` are all billed ones, `discarded` those of them whose vectors are not stored yet (at the end: never).
    `waiting_seconds` is above 0 while a rate limit delays all requests. `cut` names texts embedded without their end.
    """

    embedded: int = 0
    tokens: int = 0
    requests: int = 0
    rate_limited: int = 0
    seconds: float = 0.0
    discarded: int = 0
    waiting_seconds: float = 0.0
    refused: list[Refused] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)


def embed_missing(
    client: EmbeddingClient,
    rows: Iterable[TextRow],
    store: Callable[[Vectors], None],
    *,
    workers: int,
    batch_size: int,
    progress: Callable[[EmbedProgress], None] | None = None,
    require_room: Callable[[int], None] | None = None,
) -> EmbedProgress:
    """Embed `rows` (distinct keys) and pass (key, float32 little-endian) pairs to `store` as they arrive.

    `rows`, `store` and `progress` are used by the calling thread only, so all may share one SQLite connection. If the
    run is interrupted or fails, workers stop before their next request, and all that was received is stored before the
    error is raised. `require_room` is called before each batch with the number of texts that are not stored yet; if it
    raises, no further batch is sent, and its error is raised when the others are stored.
    Raises ProviderRefused and WrongWidth as EmbeddingClient.embed, and whatever `rows`, `store` or `require_room`
    raise.
    """
    unmap_large_blocks()
    run = _Run(client, store, progress, texts_a_request(client.spec, batch_size), require_room)
    for _ in range(workers):
        threading.Thread(target=run.work, name="embedding", daemon=True).start()
    try:
        run.feed(rows, workers + min(SPARE_BATCHES, 1 + SPARE_TEXTS // batch_size))
    except BaseException:
        run.abandon()
        raise
    finally:
        for _ in range(workers):
            run.jobs.put(None)
        release_free_memory()
    return run.status()


def embed_few(
    client: EmbeddingClient, texts: Sequence[str], progress: Callable[[EmbedProgress], None] | None = None
) -> tuple[dict[str, FloatArray], EmbedProgress]:
    """Embed a few texts for a comparison. Returns the vectors by text, without refused texts, and what was done.

    Raises like `embed_missing`, and so ProviderRefused if the endpoint accepts no text at all.
    """
    rows = [TextRow(text.encode(), text, text) for text in dict.fromkeys(texts)]
    found: Vectors = []
    done = embed_missing(client, rows, found.extend, workers=1, batch_size=len(rows), progress=progress)
    return {key.decode(): np.frombuffer(vector, "<f4") for key, vector in found}, done


@dataclass(frozen=True)
class _Result:
    """From a worker: vectors, a refused text, the label of a text that was cut, an error, or the end of a batch."""

    vectors: Vectors = field(default_factory=list)
    tokens: int = 0
    refused: list[Refused] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    error: BaseException | None = None
    batch_ended: bool = False


class _Run:
    def __init__(
        self,
        client: EmbeddingClient,
        store: Callable[[Vectors], None],
        progress: Callable[[EmbedProgress], None] | None,
        batch_size: int,
        require_room: Callable[[int], None] | None,
    ) -> None:
        self._client, self._store, self._progress, self._require_room = client, store, progress, require_room
        self._max_inputs = batch_size
        self.jobs: queue.SimpleQueue[list[TextRow] | None] = queue.SimpleQueue()
        self._results: deque[_Result] = deque()
        self._arrival = threading.Condition()
        self._stop = threading.Event()
        self._batches_sent = self._texts_sent = 0  # and not stored yet
        self._embedded = self._tokens = 0
        self._refused: list[Refused] = []
        self._cut: list[str] = []
        self._started = time.monotonic()
        self._before = (client.pacer.requests, client.pacer.rate_limited, client.billed_tokens)

    # --- the caller's thread

    def feed(self, rows: Iterable[TextRow], most_sent: int) -> None:
        """Hand out batches, never more than `most_sent` at a time, and store what arrives."""
        batches, more = self._batches(rows), True
        no_room: MigrationError | None = None  # raised when all that was sent is stored
        while more or self._batches_sent:
            while more and self._batches_sent < most_sent:
                batch = next(batches, [])
                try:
                    if batch and self._require_room:
                        self._require_room(self._texts_sent + len(batch))
                except MigrationError as error:
                    no_room, batch = error, []
                more = bool(batch)
                if more:
                    self._batches_sent += 1
                    self._texts_sent += len(batch)
                    self.jobs.put(batch)
            if self._batches_sent and (failed := self._take(TICK_SECONDS)):
                raise failed
        if no_room:
            raise no_room

    def _batches(self, rows: Iterable[TextRow]) -> Iterator[list[TextRow]]:
        """Batches under the limits of the moment. Blank texts are refused here: one would fail its whole request.

        Texts over the limit of OpenAI's models are cut; the key stays that of the whole text.
        """
        batch: list[TextRow] = []
        spec, tokens, token_limit = self._client.spec, 0, self._token_limit()
        limit = input_limit(spec.model, spec.provider)
        for row in rows:
            if not row.text.strip():
                self._refused.append(Refused(row.label, "blank content"))
                continue
            sent = replace(row, tokens=row.tokens or count_tokens([row.text])[0])
            if limit and sent.tokens > limit:
                self._cut.append(row.label)
                most = limit - 1  # one token under the limit, as in OpenAI's own recipes
                # OpenAI's models would refuse it, the others cut it themselves.
                text = cut_to_tokens(row.text, most) if spec.provider == OPENAI else row.text
                sent = replace(row, text=text, tokens=most)
            weight = max(sent.tokens, estimated_tokens([sent.text]))
            if batch and (len(batch) >= self._max_inputs or tokens + weight > token_limit):
                yield batch
                batch, tokens, token_limit = [], 0, self._token_limit()
            batch.append(sent)
            tokens += weight
        if batch:
            yield batch

    def _token_limit(self) -> float:
        # At most half a bucket, so that two requests never wait for a full one.
        spec = self._client.spec
        most = MAX_TOKENS if spec.provider != VOYAGE else _MODEL_TOKENS.get(bare_model(spec.model), _VOYAGE_TOKENS)
        return min(most, self._client.pacer.token_limit / 2)

    def abandon(self) -> None:
        """Stop the workers, wait a moment for the requests in flight, and store their results."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while self.jobs.get_nowait() is not None:
                self._batches_sent -= 1
        deadline = time.monotonic() + GRACE_SECONDS
        # If storing is what failed, the first error is the one to report.
        with contextlib.suppress(MigrationError):
            while self._batches_sent > 0 and time.monotonic() < deadline:
                self._take(0.1)
            self._take(0.0)

    def _take(self, seconds: float) -> BaseException | None:
        """Store what arrives within `seconds`, and report progress; returns the first error among it, if any."""
        with self._arrival:
            self._arrival.wait_for(lambda: self._results, timeout=seconds)
            results = list(self._results)
        vectors = [pair for result in results for pair in result.vectors]
        if vectors:
            self._store(vectors)
        # Removed only now: if the run is interrupted above, they are stored again, which changes nothing.
        for result in results:
            self._results.popleft()
            self._embedded += len(result.vectors)
            self._tokens += result.tokens
            self._batches_sent -= result.batch_ended
            self._texts_sent -= len(result.vectors) + len(result.refused)
            self._cut += result.cut
            self._refused += result.refused
        if self._progress:
            self._progress(self.status())
        return next((result.error for result in results if result.error), None)

    def status(self) -> EmbedProgress:
        """The sums so far."""
        pacer, (requests, rate_limited, billed_before) = self._client.pacer, self._before
        billed = self._client.billed_tokens - billed_before
        counts = self._embedded, billed, pacer.requests - requests, pacer.rate_limited - rate_limited
        seconds, discarded = time.monotonic() - self._started, billed - self._tokens
        return EmbedProgress(*counts, seconds, discarded, pacer.waiting_seconds(), self._refused, self._cut)

    # --- the workers' threads

    def work(self) -> None:
        """Embed batches until dismissed."""
        while (batch := self.jobs.get()) is not None:
            error: BaseException | None = None
            try:
                while batch:  # it may be larger than what the server turned out to take meanwhile
                    part, batch = batch[: self._max_inputs], batch[self._max_inputs :]
                    self._embed(part, time.monotonic())
            except Cancelled:
                pass
            except BaseException as problem:  # noqa: BLE001 - raised again by the caller's thread
                error = problem
                self._stop.set()  # the run has failed: nothing more is paid for
            self._deliver(_Result(error=error, batch_ended=True))

    def _embed(self, batch: list[TextRow], first_sent: float, *, half: bool = False) -> bool:
        """Embed `batch` and deliver the results piece by piece; returns whether every text was accepted.

        A refused batch is never sent again as it is, but in halves. If both are accepted whole, the number of texts
        was the cause, and later batches are smaller. One answer that does not fit is chance; one to a `half`, too, is
        not, and each is paid for. `first_sent`: when the whole batch was first sent (monotonic). Raises what
        EmbeddingClient.embed raises, except BadInput.
        """
        try:
            tokens = sum(row.tokens for row in batch)
            answer = self._client.embed([row.text for row in batch], tokens=tokens, stop=self._stop)
        except BadInput as problem:
            if len(batch) == 1:
                return self._embed_refused(batch[0], str(problem), first_sent)
            middle = (len(batch) + 1) // 2
            unfit = isinstance(problem, BadAnswer)
            accepted = [self._embed(part, first_sent, half=unfit) for part in (batch[:middle], batch[middle:])]
            if all(accepted) and (half or not unfit):
                self._max_inputs = min(self._max_inputs, middle)
            return all(accepted)
        vectors = answer.vectors.astype("<f4", copy=False)
        pairs = [(row.key, vector.tobytes()) for row, vector in zip(batch, vectors, strict=True)]
        self._deliver(_Result(pairs, answer.tokens))
        return True

    def _embed_refused(self, row: TextRow, problem: str, first_sent: float) -> bool:
        """Cut a text that was refused as too long and embed it; deliver any other one as refused."""
        shorter = _cut_to_limit(row, problem)
        if shorter is None:
            if not self._client.answered_since(first_sent):  # if it accepts no text at all, this one is not to blame
                try:
                    self._client.embed([CONTROL_TEXT], stop=self._stop)
                except BadInput as refusal:
                    names = SETTING_NAMES[self._client.spec.provider]
                    step = f"check {names.model}, VECTOR_SIZE and {names.endpoint}, then run the same command again"
                    text = f"{self._client.provider} cannot embed even a plain word: {refusal}"
                    raise ProviderRefused(text, next_step=step) from refusal
            self._deliver(_Result(refused=[Refused(row.label, problem)]))
            return False
        accepted = self._embed([shorter], first_sent)
        if accepted:
            self._deliver(_Result(cut=[shorter.label]))
        return accepted

    def _deliver(self, result: _Result) -> None:
        with self._arrival:
            self._results.append(result)
            self._arrival.notify()


def _cut_to_limit(row: TextRow, problem: str) -> TextRow | None:
    """The row with its text cut to the limit that the refusal names; None if it names none, or the text fits.

    The provider may count other tokens than ours: each further refusal takes a tenth more off.
    """
    limit = context_limit(problem)
    if limit is None or limit < 2:
        return None
    tokens = count_tokens([row.text])[0]
    most = limit - 1 if tokens >= limit else int(tokens * 0.9)
    text = cut_to_tokens(row.text, most) if most else ""
    return replace(row, text=text, tokens=most) if text.strip() and text != row.text else None
