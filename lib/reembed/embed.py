"""Embed the texts of the plan that the cache lacks, and count what was paid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from lib.clients.embeddings import worker_pool
from lib.clients.embeddings.cache import EmbeddingCache, Missing, TextRow
from lib.clients.embeddings.client import EmbeddingClient
from lib.clients.embeddings.pricing import Expected, count_tokens, expected, price_of, price_text
from lib.clients.embeddings.worker_pool import EmbedProgress, Refused, embed_few, embed_missing
from lib.concurrency import steps_of
from lib.dimensions import SETTING_NAMES, EmbeddingSpec, facts_of, model_fault, public_url
from lib.errors import GuardRefused, UsageProblem
from lib.journal import Journal
from lib.reembed.context import Context
from lib.reembed.plan import Scan, scan_graph
from lib.verify.compare import SAME_MODEL_COSINE, cosine

MOST_ROUNDS, FEW_TEXTS = 5, 100  # catching up ends with a round that embeds fewer texts, or with the last round
MOST_INTERVALS = 240
SAMPLES = 3  # texts that are embedded again to see that the model is the same
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
            pairs = [self.slots[at : at + 2] for at in range(0, len(self.slots), 2)]
            self.slots = [
                Interval(
                    at=pair[0].at,
                    seconds=sum(one.seconds for one in pair),
                    texts=sum(one.texts for one in pair),
                    rate_limited=sum(one.rate_limited for one in pair),
                    after_pause=any(one.after_pause for one in pair),
                )
                for pair in pairs
            ]


class EmbeddingTotals:
    """What this start of the command embedded and paid for; `refused` are texts that the provider does not take.

    `tokens` are all billed ones, `discarded` those that gave no usable vector. `sums` are those of all starts for one
    endpoint, model and size, stored in the embedding cache for the report. Sums that the report of another run than
    that of `journal` has are forgotten. Unless `logged`, the sums begin at zero and end with this process.
    """

    def __init__(self, cache: EmbeddingCache, spec: EmbeddingSpec, journal: Journal | None, *, logged: bool) -> None:
        self._cache, self._spec = cache, spec
        self._name = f"bought of {public_url(spec.base_url)} {spec.model} {spec.size}" if logged else ""
        self.texts = self.tokens = self.discarded = 0
        self.refused: list[Refused] = []
        self.cut: list[str] = []
        self.sums = PaidSums()
        if logged:
            with suppress(msgspec.DecodeError):  # written by another version of these scripts
                self.sums = msgspec.json.decode(cache.get_meta(self._name) or "{}", type=PaidSums)
        if self.sums.settled_by and self.sums.settled_by != (journal.run_id if journal else None):
            self.sums = PaidSums()

    @property
    def spent_tokens(self) -> int:
        """Tokens of this start, and those that earlier starts of this migration paid for without a usable vector."""
        return self.tokens + max(0, self.sums.discarded - self.discarded)

    @property
    def price(self) -> float | None:
        """In US dollars; None for a model without a known price."""
        return price_of(self.tokens, self._spec.model, self._spec.provider)

    def pay(self, tokens: int) -> None:
        """Count tokens of a request that only tested the endpoint."""
        self.tokens += tokens
        self.discarded += tokens
        self.sums.tokens += tokens
        self.sums.discarded += tokens
        self.save()

    def add(self, done: EmbedProgress) -> None:
        """Add what a call of `embed_missing` did."""
        self.texts += done.embedded
        self.tokens += done.tokens
        self.discarded += done.discarded
        self.cut += done.cut
        self.refused = list({one.label: one for one in [*self.refused, *done.refused]}.values())

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
            if (latest.requests, latest.embedded, latest.tokens) != (added.requests, added.embedded, added.tokens):
                add()
            self.sums.discarded += latest.discarded if stored else latest.tokens
            self.save()


@dataclass(frozen=True)
class EmbeddingRunner:
    """An opened provider, the workers and texts per request, and the most that may be spent (US dollars, or None).

    `say` gets the expected time when the first batch has arrived; `waiting` gets, with each progress report, the
    reason why nothing arrives. What is embedded is counted in `paid`.
    """

    client: EmbeddingClient
    spec: EmbeddingSpec
    workers: int
    batch_size: int
    max_cost: float | None
    say: Callable[[str], None]
    waiting: Callable[[str], None]
    paid: EmbeddingTotals

    def __post_init__(self) -> None:
        self.client.require_affordable = self._require_unspent

    def report_waiting(self, now: EmbedProgress) -> None:
        """Report that a rate limit delays the requests, if it does."""
        if now.waiting_seconds >= 1:
            self.waiting(f"embed: rate limited, next try in {now.waiting_seconds:.0f} s")

    def _require_unspent(self, tokens: int) -> None:
        """Raise UsageProblem if these tokens exceed `max_cost` with all billed ones: unusable answers cost, too."""
        if self.max_cost is not None:
            earlier = self.paid.spent_tokens - self.paid.tokens
            self._require_price(self.client.billed_tokens + earlier, tokens)

    def expected(self, left: Missing) -> Expected | None:
        """How long these texts will take; None before the first answer, or if there are none."""
        seconds = self.client.request_seconds
        if seconds is None or not left.texts:
            return None
        workers = 1 if self.spec.provider in worker_pool.SEQUENTIAL else self.workers
        limits = {"workers": workers, "batch_size": worker_pool.texts_a_request(self.spec, self.batch_size)}
        return expected(self.client.pacer, seconds, left.texts, left.tokens, **limits)

    def require_affordable(self, tokens: int) -> None:
        """Raise UsageProblem if these tokens and those spent cost more than `max_cost`, as an unknown price may."""
        self._require_price(self.paid.spent_tokens, tokens)

    def _require_price(self, spent_tokens: int, tokens: int) -> None:
        price = price_of(spent_tokens + tokens, self.spec.model, self.spec.provider)
        if self.max_cost is None or not tokens or (price is not None and price <= self.max_cost):
            return
        spent = f"${price_of(spent_tokens, self.spec.model) or 0:.4f}" if spent_tokens else "nothing"
        limit = f"--max-cost is ${self.max_cost:g}; {spent} was spent"
        setting = SETTING_NAMES[self.spec.provider].model
        if price is None:
            step = f"leave --max-cost out, or set {setting} to a model with a list price"
            raise UsageProblem(f"there is no list price for {self.spec.model}, {limit}", next_step=step)
        step = f"raise --max-cost (or leave it out), or set {setting} to a cheaper model"
        raise UsageProblem(f"this would cost {price_text(price)}, {limit}", next_step=step)


def embed_texts(ctx: Context, runner: EmbeddingRunner, rows: Iterable[TextRow], total: Missing) -> None:
    """Embed these texts and store each answer before the next request. Raises like `require_cached_model`."""
    if not total.texts:
        return
    if not runner.paid.texts:  # later, the cache also has vectors of this start
        require_cached_model(ctx, runner)
    require_room = partial(ctx.cache.require_room, size=ctx.spec.size)
    require_room(total.texts)
    with ctx.bar("embed", total.texts, "texts") as progress, runner.paid.recording() as record:
        advance, said = steps_of(progress), False

        def report(now: EmbedProgress) -> None:
            nonlocal said
            record(now)
            advance(now.embedded)
            runner.report_waiting(now)
            if now.embedded and not said:
                said = True
                left = total.texts - now.embedded
                if time_left := runner.expected(Missing(left, round(total.tokens * left / total.texts))):
                    runner.say(f"embedding the other {left:,} texts takes about {time_left.text}")

        done = embed_missing(
            runner.client,
            rows,
            ctx.cache.put_vectors,
            workers=runner.workers,
            batch_size=runner.batch_size,
            progress=report,
            require_room=require_room,
        )
    runner.paid.add(done)


def require_cached_model(ctx: Context, runner: EmbeddingRunner) -> None:
    """Embed three texts of the plan that have a vector again. Raises GuardRefused if the model makes other vectors now.

    Only for a model without a price: the name of a model that operators serve themselves does not fix its weights.
    """
    if price_of(1, ctx.spec.model, ctx.spec.provider):
        return
    rows = ctx.cache.embedded(SAMPLES)
    blobs = ctx.cache.get_vectors([row.key for row in rows])
    require_made_by(
        runner,
        "the vectors in the embedding cache",
        {str(row.point_id): row.content for row in rows},
        [np.frombuffer(blobs[row.key], "<f4") for row in rows],
        next_step="serve the model that made them, or embed every text again:\n"
        "python scripts/reembed_embeddings.py --fresh",
    )


def require_made_by(
    runner: EmbeddingRunner, what: str, texts: Mapping[str, str], vectors: Sequence[NDArray[np.float32]], next_step: str
) -> None:
    """Embed these texts (by id) again. Raises GuardRefused if `vectors` (`what` they are) are another model's."""
    if not texts:
        return
    runner.require_affordable(sum(count_tokens(list(texts.values()))))
    answers, done = embed_few(runner.client, list(texts.values()), runner.report_waiting)
    runner.paid.pay(done.tokens)
    if not answers:
        why = f"the provider refuses the texts of points ({done.refused[0].reason})"
        raise GuardRefused(f"the model of {what} cannot be checked: {why}", next_step=next_step)
    for (name, text), vector in zip(texts.items(), vectors, strict=True):
        if text in answers and (likeness := cosine(vector, answers[text])) < SAME_MODEL_COSINE:
            raise GuardRefused(
                f"{what} were not made by {runner.spec.model} at {runner.spec.size}d as it answers now"
                f" (memory {name}: cosine {likeness:.2f}): the collection would mix two models",
                next_step=next_step,
            )


def embed_uncached(ctx: Context, runner: EmbeddingRunner) -> None:
    """Embed every text of the plan that has no vector, identical texts once."""
    missing = ctx.cache.missing_total()
    runner.require_affordable(missing.tokens)
    embed_texts(ctx, runner, ctx.cache.missing_texts(ctx.spec), missing)


def catch_up(ctx: Context, runner: EmbeddingRunner, journal: Journal) -> Scan:
    """Read the graph again and embed new texts, until a round embeds fewer than 100 (at most 5 rounds)."""
    for _ in range(MOST_ROUNDS):
        before = runner.paid.texts
        scan = scan_graph(ctx, journal, title="read graph again")
        embed_uncached(ctx, runner)
        if runner.paid.texts - before < FEW_TEXTS:
            break
    return scan


def sample_spec(spec: EmbeddingSpec) -> EmbeddingSpec:
    """Return the spec, or the model's own size if the model cannot make this one."""
    native = facts_of(spec.model).native
    return replace(spec, size=native) if native and model_fault(spec.model, spec.size) else spec
