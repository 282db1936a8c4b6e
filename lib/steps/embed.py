"""Buy what the plan misses, into the spool; catch up with what changed meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

from lib.dimensions import EmbeddingSpec, native_size
from lib.embedding.batches import Refused
from lib.embedding.client import EmbeddingClient
from lib.embedding.plan_table import TextRow
from lib.embedding.pricing import price_per_million
from lib.embedding.spool import Spool
from lib.embedding.workers import embed_missing
from lib.errors import UsageProblem
from lib.steps.memories import Scan, scan_graph
from lib.steps.progress import ProgressBar, steps_of
from lib.steps.take_graph import GraphSource

MOST_ROUNDS = 5
FEW_CONTENTS = 100


@dataclass
class Bought:
    """What was embedded and paid for in this run; `refused` are texts that the provider does not take."""

    texts: int = 0
    tokens: int = 0
    requests: int = 0
    seconds: float = 0.0
    refused: list[Refused] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def price(self, model: str) -> float | None:
        """In US dollars; None for a model without a known price."""
        each = price_per_million(model)
        return None if each is None else self.tokens * each / 1e6


@dataclass(frozen=True)
class Buyer:
    """An opened provider, how hard to drive it, and the most that may be spent (US dollars; None: no limit)."""

    client: EmbeddingClient
    spec: EmbeddingSpec
    workers: int
    batch_size: int
    max_cost: float | None = None

    def require_affordable(self, tokens: int, bought: Bought) -> None:
        """Raise UsageProblem where these tokens on top of what was bought would cost more than `max_cost`.

        A model without a list price may cost anything.
        """
        each = price_per_million(self.spec.model)
        price = None if each is None else (bought.tokens + tokens) * each / 1e6
        if self.max_cost is None or not tokens or (price is not None and price <= self.max_cost):
            return
        shown = "unknown (no list price for this model)" if price is None else f"${price:.4f}"
        spent = f"${bought.price(self.spec.model) or 0:.4f}" if bought.tokens else "nothing"
        raise UsageProblem(
            f"this would cost {shown}, --max-cost is ${self.max_cost:g}; {spent} was spent",
            next_step="raise --max-cost (or leave it out), or use a cheaper EMBEDDING_MODEL",
        )


def buy(
    buyer: Buyer, spool: Spool, rows: Iterable[TextRow], total: int, bar: ProgressBar, into: Bought
) -> None:
    """Embed these texts and store each answer before the next is asked for; adds to `into`."""
    if not total:
        return
    with bar("embed", total, "texts") as progress:
        tell = steps_of(progress)
        outcome = embed_missing(
            buyer.client,
            rows,
            spool.put_vectors,
            workers=buyer.workers,
            batch_size=buyer.batch_size,
            progress=lambda seen: tell(seen.embedded, total),
        )
    into.texts += outcome.embedded
    into.tokens += outcome.tokens
    into.requests += outcome.requests
    into.seconds += outcome.seconds
    into.cut += outcome.cut
    into.refused = list({one.label: one for one in [*into.refused, *outcome.refused]}.values())


def buy_missing(buyer: Buyer, spool: Spool, bar: ProgressBar, into: Bought) -> None:
    """Embed every text of the plan that has no vector, identical texts once."""
    missing = spool.missing_total()
    buyer.require_affordable(missing.tokens, into)
    buy(buyer, spool, spool.missing_texts(buyer.spec), missing.texts, bar, into)


def catch_up(buyer: Buyer, graph: GraphSource, spool: Spool, bar: ProgressBar, into: Bought) -> Scan:
    """Read the graph again and embed what is new, until a round buys fewer than 100 contents (at most 5 rounds)."""
    scan = Scan()
    for _ in range(MOST_ROUNDS):
        before = into.texts
        with bar("read graph again", None, "memories") as progress:
            scan = scan_graph(graph.conn, graph.graph, spool, buyer.spec, progress=progress)
        spool.derive_missing(buyer.spec)
        buy_missing(buyer, spool, bar, into)
        if into.texts - before < FEW_CONTENTS:
            break
    return scan


@dataclass(frozen=True)
class Tried:
    """One real batch: what it says of key, model, size and speed."""

    size: int
    texts: int
    tokens: int
    seconds: float
    note: str


def sample_spec(spec: EmbeddingSpec) -> EmbeddingSpec:
    """The spec, or the model's own size where it cannot make this one."""
    native = native_size(spec.model)
    return replace(spec, size=native) if native is not None and spec.size > native else spec


def try_one_batch(buyer: Buyer, spool: Spool) -> Tried:
    """Embed one batch for real; it lands in the spool, so that it is not paid for again.

    Where the client's size is not the plan's (see `sample_spec`) the vectors are thrown away.
    """
    rows = list(islice(spool.missing_texts(buyer.spec), buyer.batch_size))
    if not rows:
        return Tried(buyer.spec.size, 0, 0, 0.0, "every text is in the spool already")
    began, size = time.monotonic(), buyer.client.spec.size
    answer = buyer.client.embed([row.text for row in rows])
    seconds = time.monotonic() - began
    if size != buyer.spec.size:
        return Tried(size, len(rows), answer.tokens, seconds, f"sampled at the model's own {size}d, not kept")
    blobs = [vector.astype("<f4").tobytes() for vector in answer.vectors]
    spool.put_vectors([(row.key, blob) for row, blob in zip(rows, blobs, strict=True)])
    return Tried(size, len(rows), answer.tokens, seconds, "kept in the spool")
