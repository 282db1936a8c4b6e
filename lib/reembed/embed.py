"""Embed the texts of the plan that the cache lacks, and count what was paid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice

import msgspec

from lib.backup.graph import GraphSource
from lib.clients.embeddings.cache import EmbeddingCache, Missing, TextRow
from lib.clients.embeddings.client import EmbeddingClient
from lib.clients.embeddings.pricing import Expected, expected, price_of, price_text
from lib.clients.embeddings.worker_pool import SEQUENTIAL, EmbedProgress, Refused, embed_missing, texts_a_request
from lib.concurrency import ProgressBar, steps_of
from lib.dimensions import SETTING_NAMES, EmbeddingSpec, model_fault, native_size, public_url
from lib.errors import UsageProblem
from lib.journal import Journal
from lib.reembed.plan import Payloads, Scan, scan_graph

MOST_INTERVALS = 240
_INTERVAL_SECONDS = 0.5  # the shortest interval; those of a long run are longer
_SAVE_SECONDS = 2.0  # a kill loses the statistics of so many seconds, and no vector


@dataclass(frozen=True)
class Interval:
    """A stretch of embedding: its begin (Unix seconds), its length, and the texts that arrived in it.

    `after_pause`: another start of the run, or a later round, began with it.
    """

    at: float
    seconds: float
    texts: int
    rate_limited: int = 0
    after_pause: bool = False


@dataclass
class PaidSums:
    """What all starts of one migration paid for; `discarded` tokens gave no usable vector.

    `settled_by` is the run whose report has these sums. Stored as JSON in the cache: the field names must stay.
    """

    texts: int = 0
    tokens: int = 0
    requests: int = 0
    rate_limited: int = 0
    seconds: float = 0.0
    slots: list[Interval] = field(default_factory=list)
    settled_by: str = ""
    discarded: int = 0

    def add(self, interval: Interval, tokens: int, requests: int) -> None:
        """Add an interval; if there are too many, join each two neighbouring ones."""
        self.texts += interval.texts
        self.tokens += tokens
        self.requests += requests
        self.rate_limited += interval.rate_limited
        self.seconds += interval.seconds
        self.slots.append(interval)
        if len(self.slots) > MOST_INTERVALS:
            self.slots = [_joined(self.slots[at : at + 2]) for at in range(0, len(self.slots), 2)]


def _joined(parts: list[Interval]) -> Interval:
    return Interval(
        parts[0].at,
        sum(one.seconds for one in parts),
        sum(one.texts for one in parts),
        sum(one.rate_limited for one in parts),
        any(one.after_pause for one in parts),
    )


class PaidLog:
    """The sums of one endpoint, model and size for one graph and collection, stored in the embedding cache.

    Sums that the report of another run than `run_id` (None: no run is open) has are forgotten. Unless `stored`, the
    sums begin at zero and end with this process: there will be no report.
    """

    def __init__(self, cache: EmbeddingCache, spec: EmbeddingSpec, run_id: str | None, *, stored: bool) -> None:
        self._cache = cache
        self._name = f"bought of {public_url(spec.base_url)} {spec.model} {spec.size}" if stored else ""
        self.sums = PaidSums()
        if stored:
            with suppress(msgspec.DecodeError):  # written by another version of these scripts
                self.sums = msgspec.json.decode(cache.get_meta(self._name) or "{}", type=PaidSums)
        if self.sums.settled_by and self.sums.settled_by != run_id:
            self.sums = PaidSums()

    def mark_reported(self, run_id: str) -> None:
        """Note that the report of this run has the sums."""
        self.sums.settled_by = run_id
        self.save()

    def save(self) -> None:
        """Store the sums; on the disk when it returns."""
        if self._name:
            self._cache.set_meta(self._name, msgspec.json.encode(self.sums).decode())

    @contextmanager
    def recording(self, *, stored: bool = True) -> Iterator[Callable[[EmbedProgress], None]]:
        """Yield a progress callback that adds one call of `embed_missing` to the sums, however the block ends.

        `stored`: False if the vectors are thrown away, so that all tokens count as discarded.
        """
        added = latest = EmbedProgress()
        after_pause, saved_at = bool(self.sums.slots), time.monotonic()

        def add() -> None:
            nonlocal added, after_pause
            seconds = latest.seconds - added.seconds
            interval = Interval(
                at=round(time.time() - seconds, 3),
                seconds=round(seconds, 3),
                texts=latest.embedded - added.embedded,
                rate_limited=latest.rate_limited - added.rate_limited,
                after_pause=after_pause,
            )
            self.sums.add(interval, latest.tokens - added.tokens, latest.requests - added.requests)
            added, after_pause = latest, False

        def progress(now: EmbedProgress) -> None:
            nonlocal latest, saved_at
            latest = now
            if now.seconds - added.seconds < max(_INTERVAL_SECONDS, 2 * self.sums.seconds / MOST_INTERVALS):
                return
            add()
            if time.monotonic() - saved_at >= _SAVE_SECONDS:
                self.save()
                saved_at = time.monotonic()

        try:
            yield progress
        finally:
            if (latest.requests, latest.embedded) != (added.requests, added.embedded):
                add()
            self.sums.discarded += latest.discarded if stored else latest.tokens
            self.save()


MOST_ROUNDS = 5
FEW_CONTENTS = 100


@dataclass
class EmbeddingTotals:
    """What this start of the command embedded and paid for; `refused` are texts that the provider does not take.

    `tokens` are all billed ones, `discarded` those that gave no usable vector. `log` adds them to the sums of all
    starts, for the report.
    """

    log: PaidLog
    texts: int = 0
    tokens: int = 0
    discarded: int = 0
    refused: list[Refused] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    @property
    def spent_tokens(self) -> int:
        """Tokens of this start, and those that earlier starts of this migration paid for without a usable vector."""
        return self.tokens + max(0, self.log.sums.discarded - self.discarded)

    def pay(self, tokens: int) -> None:
        """Count tokens of a request that only tested the endpoint."""
        self.tokens += tokens
        self.discarded += tokens
        self.log.sums.tokens += tokens
        self.log.sums.discarded += tokens
        self.log.save()

    def price(self, spec: EmbeddingSpec) -> float | None:
        """In US dollars; None for a model without a known price."""
        return price_of(self.tokens, spec.model, spec.provider)


def start_totals(
    cache: EmbeddingCache, spec: EmbeddingSpec, journal: Journal | None, *, logged: bool
) -> EmbeddingTotals:
    """Return empty totals; if `logged`, their log is the cache's, which continues for the run of `journal`."""
    return EmbeddingTotals(PaidLog(cache, spec, journal.run_id if journal else None, stored=logged))


@dataclass(frozen=True)
class EmbeddingRunner:
    """An opened provider, the workers and texts per request, and the most that may be spent (US dollars, or None).

    `say` gets the expected time when the first batch has arrived; `waiting` gets, with each progress report, the
    reason why nothing arrives.
    """

    client: EmbeddingClient
    spec: EmbeddingSpec
    workers: int
    batch_size: int
    max_cost: float | None
    say: Callable[[str], None]
    waiting: Callable[[str], None]

    def expected(self, left: Missing) -> Expected | None:
        """How long these texts will take; None before the first answer, or if there are none."""
        seconds = self.client.request_seconds
        if seconds is None or not left.texts:
            return None
        workers = 1 if self.spec.provider in SEQUENTIAL else self.workers
        limits = {"workers": workers, "batch_size": texts_a_request(self.spec, self.batch_size)}
        return expected(self.client.pacer, seconds, left.texts, left.tokens, **limits)

    def require_affordable(self, tokens: int, totals: EmbeddingTotals) -> None:
        """Raise UsageProblem if these tokens and those spent so far cost more than `max_cost`.

        A model without a list price may cost anything.
        """
        spent_tokens = totals.spent_tokens
        price = price_of(spent_tokens + tokens, self.spec.model, self.spec.provider)
        if self.max_cost is None or not tokens or (price is not None and price <= self.max_cost):
            return
        spent = f"${price_of(spent_tokens, self.spec.model) or 0:.4f}" if spent_tokens else "nothing"
        setting = SETTING_NAMES[self.spec.provider].model
        if price is None:
            raise UsageProblem(
                f"there is no list price for {self.spec.model}, --max-cost is ${self.max_cost:g}; {spent} was spent",
                next_step=f"leave --max-cost out, or set {setting} to a model with a list price",
            )
        raise UsageProblem(
            f"this would cost {price_text(price)}, --max-cost is ${self.max_cost:g}; {spent} was spent",
            next_step=f"raise --max-cost (or leave it out), or set {setting} to a cheaper model",
        )


def embed_texts(
    runner: EmbeddingRunner,
    cache: EmbeddingCache,
    rows: Iterable[TextRow],
    total: Missing,
    bar: ProgressBar,
    into: EmbeddingTotals,
) -> None:
    """Embed these texts and store each answer before the next request; adds to `into`."""
    if not total.texts:
        return
    size = runner.spec.size
    cache.require_room(total.texts, size)
    with bar("embed", total.texts, "texts") as progress, into.log.recording() as record:
        done = embed_missing(
            runner.client,
            rows,
            cache.put_vectors,
            workers=runner.workers,
            batch_size=runner.batch_size,
            progress=_reporting(runner, total, steps_of(progress), record),
            require_room=lambda texts: cache.require_room(texts, size),
        )
    into.texts += done.embedded
    into.tokens += done.tokens
    into.discarded += done.discarded
    into.cut += done.cut
    into.refused = list({one.label: one for one in [*into.refused, *done.refused]}.values())


def _reporting(
    runner: EmbeddingRunner,
    total: Missing,
    advance: Callable[[int, int], None],
    record: Callable[[EmbedProgress], None],
) -> Callable[[EmbedProgress], None]:
    """A progress callback for the bar and the log, which says the expected time once."""
    said = False

    def progress(now: EmbedProgress) -> None:
        nonlocal said
        record(now)
        advance(now.embedded, total.texts)
        if now.waiting_seconds >= 1:
            runner.waiting(f"embed: rate limited, next try in {now.waiting_seconds:.0f} s")
        if now.embedded and not said:
            said = True
            left = total.texts - now.embedded
            if time_left := runner.expected(Missing(left, round(total.tokens * left / total.texts))):
                runner.say(f"embedding the other {left:,} texts takes about {time_left.text}")

    return progress


def embed_uncached(runner: EmbeddingRunner, cache: EmbeddingCache, bar: ProgressBar, into: EmbeddingTotals) -> None:
    """Embed every text of the plan that has no vector, identical texts once."""
    missing = cache.missing_total()
    runner.require_affordable(missing.tokens, into)
    embed_texts(runner, cache, cache.missing_texts(runner.spec), missing, bar, into)


def catch_up(
    runner: EmbeddingRunner,
    graph: GraphSource,
    cache: EmbeddingCache,
    bar: ProgressBar,
    into: EmbeddingTotals,
    payloads: Payloads,
) -> Scan:
    """Read the graph again and embed new texts, until a round embeds fewer than 100 (at most 5 rounds).

    `payloads`: see `scan_graph`.
    """
    for _ in range(MOST_ROUNDS):
        before = into.texts
        scan = scan_graph(graph, cache, runner.spec, bar, payloads, title="read graph again")
        embed_uncached(runner, cache, bar, into)
        if into.texts - before < FEW_CONTENTS:
            break
    return scan


@dataclass(frozen=True)
class Tried:
    """One real batch: size and speed of its answer, what is left to embed, and how long that would take."""

    size: int
    texts: int
    tokens: int
    seconds: float
    note: str
    left: Missing
    expected: Expected | None = None


def sample_spec(spec: EmbeddingSpec) -> EmbeddingSpec:
    """The spec, or the model's own size if the model cannot make this one."""
    native = native_size(spec.model)
    return replace(spec, size=native) if native and model_fault(spec.model, spec.size) else spec


def try_one_batch(runner: EmbeddingRunner, cache: EmbeddingCache, totals: EmbeddingTotals) -> Tried:
    """Embed one real batch. It is stored in the embedding cache, so that it is not paid for again.

    If the client's size is not the plan's (see `sample_spec`), the vectors are thrown away. A text that the provider
    refuses is found, and left out.
    """
    first = list(islice(cache.missing_texts(runner.spec), runner.batch_size))
    size = runner.client.spec.size
    if not first:
        note = "every text is in the embedding cache already"
        return Tried(runner.spec.size, 0, 0, 0.0, note, cache.missing_total())
    runner.require_affordable(sum(row.tokens for row in first), totals)
    stored = size == runner.spec.size
    if stored:
        cache.require_room(len(first), size)
    note = "stored in the embedding cache" if stored else f"sampled at the model's own {size}d, not stored"
    with totals.log.recording(stored=stored) as record:
        done = embed_missing(
            runner.client,
            first,
            cache.put_vectors if stored else lambda _vectors: None,
            workers=1,
            batch_size=runner.batch_size,
            progress=record,
        )
    if done.refused:
        note += f"; {len(done.refused)} refused: {done.refused[0].label} ({done.refused[0].reason})"
    left = cache.missing_total()
    seconds = runner.client.request_seconds or 0.0
    return Tried(size, done.embedded, done.tokens, seconds, note, left, runner.expected(left))
