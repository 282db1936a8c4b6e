"""Embed what the plan lacks into the cache, and count what was paid."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

from lib.backup.graph import GraphSource
from lib.clients.embeddings.cache import EmbeddingCache, Missing, TextRow
from lib.clients.embeddings.client import EmbeddingClient
from lib.clients.embeddings.pricing import Expected, expected, price_per_million
from lib.clients.embeddings.worker_pool import EmbedProgress, Refused, embed_missing
from lib.concurrency import ProgressBar, steps_of
from lib.dimensions import EmbeddingSpec, native_size, public_url
from lib.errors import UsageProblem
from lib.journal import Journal
from lib.reembed.plan import Payloads, Scan, scan_graph

MOST_SLOTS = 240
_SLOT_SECONDS = 0.5  # the shortest; those of a long run grow with it
_SAVE_SECONDS = 2.0  # so much of the figures a kill may take along; no vector


@dataclass(frozen=True)
class Slot:
    """A stretch of embedding: `at` its begin (Unix seconds), its length, and the texts that arrived in it.

    `after_pause`: embedding began anew with it, by another start or a later round.
    """

    at: float
    seconds: float
    texts: int
    rate_limited: int = 0
    after_pause: bool = False


@dataclass
class Purchases:
    """Sums over all slots; `settled_by` names the run whose report has told them.

    `discarded` are those of the `tokens` that were paid for vectors of no use.
    """

    texts: int = 0
    tokens: int = 0
    requests: int = 0
    rate_limited: int = 0
    seconds: float = 0.0
    slots: list[Slot] = field(default_factory=list)
    settled_by: str = ""
    discarded: int = 0

    def add(self, slot: Slot, tokens: int, requests: int) -> None:
        """Add one; where there are too many each two become one."""
        self.texts += slot.texts
        self.tokens += tokens
        self.requests += requests
        self.rate_limited += slot.rate_limited
        self.seconds += slot.seconds
        self.slots.append(slot)
        if len(self.slots) > MOST_SLOTS:
            pairs = zip(self.slots[::2], [*self.slots[1::2], None], strict=False)
            self.slots = [_joined(one, other) for one, other in pairs]


def _joined(one: Slot, other: Slot | None) -> Slot:
    if other is None:
        return one
    return Slot(
        one.at,
        one.seconds + other.seconds,
        one.texts + other.texts,
        one.rate_limited + other.rate_limited,
        one.after_pause or other.after_pause,
    )


class PurchaseLog:
    """The purchases of one endpoint, model and size for one graph and collection, as the embedding cache keeps them."""

    def __init__(self, cache: EmbeddingCache, spec: EmbeddingSpec) -> None:
        self._cache = cache
        self._name = f"bought of {public_url(spec.base_url)} {spec.model} {spec.size}"
        self.made = _read(cache.get_meta(self._name))

    def begin(self, run_id: str | None) -> None:
        """Forget what the report of another run than the one that is gone on with (None: none is) has told."""
        if self.made.settled_by and self.made.settled_by != run_id:
            self.made = Purchases()

    def settle(self, run_id: str) -> None:
        """Note that this run's report has told them."""
        self.made.settled_by = run_id
        self.save()

    def pay(self, tokens: int) -> None:
        """Count tokens of an answer that only tested the endpoint; on the disk when it returns."""
        self.made.tokens += tokens
        self.made.discarded += tokens
        self.save()

    def save(self) -> None:
        """On the disk when it returns."""
        self._cache.set_meta(self._name, json.dumps(dataclasses.asdict(self.made)))


def _read(stored: str | None) -> Purchases:
    if not stored:
        return Purchases()
    try:
        values = json.loads(stored)
        return Purchases(**{**values, "slots": [Slot(**one) for one in values["slots"]]})
    except (ValueError, KeyError, TypeError):  # figures of another version of these scripts
        return Purchases()


@contextmanager
def watched(log: PurchaseLog | None, *, kept: bool = True) -> Iterator[Callable[[EmbedProgress], None]]:
    """A callback that notes one purchase's progress; what it saw last counts however the block ends.

    `kept`: False if the vectors are thrown away, so that all tokens count as discarded.
    """
    if log is None:
        yield lambda _seen: None
        return
    watch = _Watch(log, kept=kept)
    try:
        yield watch.see
    finally:
        watch.end()


class _Watch:
    def __init__(self, log: PurchaseLog, *, kept: bool) -> None:
        self._log, self._kept = log, kept
        self._seen = self._noted = EmbedProgress(0, 0, 0, 0, 0, 0.0, 0.0)
        self._pause = bool(log.made.slots)
        self._saved = time.monotonic()

    def see(self, seen: EmbedProgress) -> None:
        self._seen = seen
        width = max(_SLOT_SECONDS, 2 * self._log.made.seconds / MOST_SLOTS)
        if seen.seconds - self._noted.seconds < width:
            return
        self._note()
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self._log.save()
            self._saved = time.monotonic()

    def end(self) -> None:
        if self._seen.requests > self._noted.requests or self._seen.embedded > self._noted.embedded:
            self._note()
        self._log.made.discarded += self._seen.discarded if self._kept else self._seen.tokens
        self._log.save()

    def _note(self) -> None:
        seen, noted = self._seen, self._noted
        seconds = seen.seconds - noted.seconds
        slot = Slot(
            round(time.time() - seconds, 3),
            round(seconds, 3),
            seen.embedded - noted.embedded,
            seen.rate_limited - noted.rate_limited,
            after_pause=self._pause,
        )
        self._log.made.add(slot, seen.tokens - noted.tokens, seen.requests - noted.requests)
        self._noted, self._pause = replace(seen), False


MOST_ROUNDS = 5
FEW_CONTENTS = 100


@dataclass
class EmbeddingTotals:
    """What was embedded and paid for in this run; `refused` are texts that the provider does not take.

    `tokens` are all billed ones, `discarded` those of them whose vectors were of no use.
    `log` notes it for the report that is written when all is done; None: nothing is reported.
    """

    texts: int = 0
    tokens: int = 0
    discarded: int = 0
    requests: int = 0
    seconds: float = 0.0
    refused: list[Refused] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    log: PurchaseLog | None = None

    @property
    def discarded_before(self) -> int:
        """Tokens that earlier starts of this migration paid for answers of no use."""
        return max(0, self.log.made.discarded - self.discarded) if self.log else 0

    def pay(self, tokens: int) -> None:
        """Count tokens of an answer that only tested the endpoint."""
        self.tokens += tokens
        self.discarded += tokens
        if self.log:
            self.log.pay(tokens)

    def price(self, model: str) -> float | None:
        """In US dollars; None for a model without a known price."""
        each = price_per_million(model)
        return None if each is None else self.tokens * each / 1e6


def start_totals(
    cache: EmbeddingCache, spec: EmbeddingSpec, journal: Journal | None, *, logged: bool
) -> EmbeddingTotals:
    """Return empty totals; if `logged`, with the cache's log, which continues for the run of `journal`."""
    if not logged:
        return EmbeddingTotals()
    log = PurchaseLog(cache, spec)
    log.begin(journal.run_id if journal else None)
    return EmbeddingTotals(log=log)


@dataclass(frozen=True)
class EmbeddingRunner:
    """An opened provider, how hard to drive it, and the most that may be spent (US dollars; None: no limit).

    `tell` hears how long a purchase will take, when its first batch has arrived; `waiting` why nothing arrives, as
    often as progress is reported.
    """

    client: EmbeddingClient
    spec: EmbeddingSpec
    workers: int
    batch_size: int
    max_cost: float | None = None
    tell: Callable[[str], None] | None = None
    waiting: Callable[[str], None] | None = None

    def expected(self, texts: int, tokens: int) -> Expected | None:
        """How long so many more will take; None before the first answer."""
        seconds = self.client.request_seconds
        if seconds is None or not texts:
            return None
        pacer = self.client.pacer
        return expected(pacer, seconds, texts, tokens, workers=self.workers, batch_size=self.batch_size)

    def require_affordable(self, tokens: int, bought: EmbeddingTotals) -> None:
        """Raise UsageProblem where these tokens on top of what was bought would cost more than `max_cost`.

        What an earlier start of the same migration paid for and discarded counts, too. A model without a list price
        may cost anything.
        """
        each = price_per_million(self.spec.model)
        spent_tokens = bought.tokens + bought.discarded_before
        price = None if each is None else (spent_tokens + tokens) * each / 1e6
        if self.max_cost is None or not tokens or (price is not None and price <= self.max_cost):
            return
        shown = "unknown (no list price for this model)" if price is None else f"${price:.4f}"
        spent = f"${spent_tokens * (each or 0) / 1e6:.4f}" if spent_tokens else "nothing"
        raise UsageProblem(
            f"this would cost {shown}, --max-cost is ${self.max_cost:g}; {spent} was spent",
            next_step="raise --max-cost (or leave it out), or use a cheaper EMBEDDING_MODEL",
        )


def _told(
    runner: EmbeddingRunner,
    total: Missing,
    advance: Callable[[int, int], None],
    note: Callable[[EmbedProgress], None],
) -> Callable[[EmbedProgress], None]:
    """Progress for the bar and the log; once, when the first batch has arrived, what is left of the time."""
    left = [runner.tell] if runner.tell else []

    def tell(seen: EmbedProgress) -> None:
        note(seen)
        advance(seen.embedded, total.texts)
        if runner.waiting and seen.waiting_seconds >= 1:
            runner.waiting(f"embed: rate limited, next try in {seen.waiting_seconds:.0f} s")
        if left and seen.embedded:
            share = 1 - seen.embedded / total.texts
            rest = runner.expected(total.texts - seen.embedded, round(total.tokens * share))
            speak = left.pop()
            if rest:
                speak(f"embedding the other {total.texts - seen.embedded:,} texts takes about {rest.text}")

    return tell


def embed_texts(
    runner: EmbeddingRunner,
    cache: EmbeddingCache,
    rows: Iterable[TextRow],
    total: Missing,
    bar: ProgressBar,
    into: EmbeddingTotals,
) -> None:
    """Embed these texts and store each answer before the next is asked for; adds to `into`."""
    if not total.texts:
        return
    cache.require_room(total.texts, runner.spec.size)
    with bar("embed", total.texts, "texts") as progress, watched(into.log) as note:
        outcome = embed_missing(
            runner.client,
            rows,
            cache.put_vectors,
            workers=runner.workers,
            batch_size=runner.batch_size,
            progress=_told(runner, total, steps_of(progress), note),
            require_room=lambda texts: cache.require_room(texts, runner.spec.size),
        )
    into.texts += outcome.embedded
    into.tokens += outcome.tokens
    into.discarded += outcome.discarded
    into.requests += outcome.requests
    into.seconds += outcome.seconds
    into.cut += outcome.cut
    into.refused = list({one.label: one for one in [*into.refused, *outcome.refused]}.values())


def embed_uncached(
    runner: EmbeddingRunner, cache: EmbeddingCache, bar: ProgressBar, into: EmbeddingTotals
) -> None:
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
    payloads: Payloads | None = None,
) -> Scan:
    """Read the graph again and embed what is new, until a round buys fewer than 100 contents (at most 5 rounds).

    `payloads`: see `scan_graph`.
    """
    scan = Scan()
    for _ in range(MOST_ROUNDS):
        before = into.texts
        with bar("read graph again", None, "memories") as progress:
            scan = scan_graph(
                graph.conn, graph.graph, cache, runner.spec, payloads=payloads, progress=progress
            )
        cache.derive_missing(runner.spec)
        embed_uncached(runner, cache, bar, into)
        if into.texts - before < FEW_CONTENTS:
            break
    return scan


@dataclass(frozen=True)
class Tried:
    """One real batch: what it says of key, model, size and speed, and how long the rest would take."""

    size: int
    texts: int
    tokens: int
    seconds: float
    note: str
    left: Missing
    expected: Expected | None = None


def sample_spec(spec: EmbeddingSpec) -> EmbeddingSpec:
    """The spec, or the model's own size where it cannot make this one."""
    native = native_size(spec.model)
    return replace(spec, size=native) if native is not None and spec.size > native else spec


def try_one_batch(runner: EmbeddingRunner, cache: EmbeddingCache, bought: EmbeddingTotals) -> Tried:
    """Embed one batch for real; it lands in the embedding cache, so that it is not paid for again.

    Where the client's size is not the plan's (see `sample_spec`) the vectors are thrown away. A row that the provider
    refuses is found, and left out.
    """
    first = list(islice(cache.missing_texts(runner.spec), runner.batch_size))
    if not first:
        return Tried(
            runner.spec.size, 0, 0, 0.0, "every text is in the embedding cache already", cache.missing_total()
        )
    runner.require_affordable(sum(row.tokens for row in first), bought)
    size = runner.client.spec.size
    kept = size == runner.spec.size
    if kept:
        cache.require_room(len(first), size)
    note = "kept in the embedding cache" if kept else f"sampled at the model's own {size}d, not kept"
    with watched(bought.log, kept=kept) as seen:
        done = embed_missing(
            runner.client,
            first,
            cache.put_vectors if kept else lambda _vectors: None,
            workers=1,
            batch_size=runner.batch_size,
            progress=seen,
        )
    if done.refused:
        note += f"; {len(done.refused)} refused: {done.refused[0].label} ({done.refused[0].reason})"
    left = cache.missing_total()
    rest = runner.expected(left.texts, left.tokens)
    return Tried(size, done.embedded, done.tokens, runner.client.request_seconds or 0.0, note, left, rest)
