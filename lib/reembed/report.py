"""What a finished re-embedding did, over all of its starts, put together for the report beside the backups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from lib.backup.last_migration import DELETING, PLACED
from lib.clients.embeddings.pricing import PRICES_AS_OF, price_per_million
from lib.clients.embeddings.worker_pool import Refused
from lib.clients.qdrant.points import Rejected
from lib.dimensions import public_url
from lib.journal import Journal
from lib.reembed.context import Context
from lib.reembed.embed import EmbeddingTotals, Purchases, Slot
from lib.reembed.plan import Scan
from lib.reembed.quality import Recall, compare_after
from lib.reembed.resume import accepted_backup
from lib.reembed.sync import SyncOutcome

MEASURED, AT_MOST = "measured", "at most, by the journal's times"
_MOST_STEPS = 200


@dataclass(frozen=True)
class Vectors:
    """A collection's vectors; `model_known` is `stamped`, `configured` or `guessed`, or empty where none is known."""

    size: int
    points: int | None
    model: str
    model_known: str


@dataclass(frozen=True)
class Paid:
    """All that was bought for it, a dry run's batch and a spot check's sample included; `price` in US dollars.

    `discarded` are those of the `tokens` whose vectors were of no use.
    """

    texts: int
    tokens: int
    requests: int
    rate_limited: int
    seconds: float
    price: float | None
    prices_as_of: str
    discarded: int = 0


@dataclass(frozen=True)
class Skipped:
    """Memories that can have no point, by reason, with examples (id, reason)."""

    counts: dict[str, int]
    examples: list[tuple[str, str]]


@dataclass(frozen=True)
class Step:
    """A phase of the run, and when it was announced."""

    at: str
    phase: str


@dataclass(frozen=True)
class Report:
    """A finished re-embedding. Times are ISO 8601 in UTC.

    `old` is None where no collection was replaced. `recall` is None where it could not be measured, `recall_note`
    says why. `cut`: memories longer than the model takes, embedded without their end; `cut_examples` names some.
    """

    run: str
    collection: str
    targets: list[str]
    endpoint: str
    started: str
    finished: str
    old: Vectors | None
    new: Vectors
    way: str
    absent_seconds: float
    absent_known: str
    memories: int
    texts: int
    bought: Paid
    rates: list[Slot]
    recall: Recall | None
    recall_note: str
    skipped: Skipped
    cut: int
    cut_examples: list[str]
    refused: list[Refused]
    rejected: list[Rejected]
    aliases_taken: list[str]
    indexed: bool
    mended: int
    removed: int
    backup: str | None
    undo: str
    steps: list[Step]


@dataclass(frozen=True)
class Finished:
    """What the last start of a re-embedding did. `scan` is its last reading of the graph.

    `points` of the plan are in the collection. `absent_seconds`: how long it was absent or incomplete. `undo`: the
    commands that restore the old collection.
    """

    scan: Scan
    outcome: SyncOutcome
    points: int
    paid: EmbeddingTotals
    method: str
    absent_seconds: float
    aliases_taken: list[str]
    indexed: bool
    repaired: int
    removed: int
    undo: str


def make_report(ctx: Context, journal: Journal, done: Finished, *, resumed_after_delete: bool) -> Report:
    """Put together what the journal, the cache and the last start of a re-embedding know of it."""
    made = done.paid.log.made if done.paid.log else Purchases()
    recall, note = compare_after(ctx, journal)
    absent = _absent_by(journal) if resumed_after_delete else None
    return Report(
        run=journal.run_id,
        collection=ctx.collection,
        targets=ctx.targets,
        endpoint=public_url(ctx.spec.base_url),
        started=_started(journal, made.slots),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        old=_old_vectors(ctx, journal),
        new=Vectors(ctx.spec.size, done.points, ctx.spec.model, "stamped"),
        way=done.method or str(journal.fact("way") or ""),
        absent_seconds=round(done.absent_seconds if absent is None else absent, 3),
        absent_known=MEASURED if absent is None else AT_MOST,
        memories=done.scan.memories,
        texts=ctx.cache.text_total().texts,
        bought=_paid(made, ctx.spec.model),
        rates=made.slots,
        recall=recall,
        recall_note=note,
        skipped=Skipped(dict(done.scan.skipped), done.scan.examples),
        cut=done.scan.too_long,
        cut_examples=done.scan.too_long_examples,
        refused=done.paid.refused,
        rejected=list(done.outcome.rejected),
        aliases_taken=done.aliases_taken,
        indexed=done.indexed,
        mended=done.repaired,
        removed=done.removed,
        backup=journal.fact("manifest"),
        undo=done.undo,
        steps=[Step(str(one["at"]), str(one["phase"])) for one in journal.entries[-_MOST_STEPS:]],
    )


def _paid(made: Purchases, model: str) -> Paid:
    each = price_per_million(model)
    price = None if each is None else made.tokens * each / 1e6
    return Paid(
        made.texts,
        made.tokens,
        made.requests,
        made.rate_limited,
        round(made.seconds, 3),
        price,
        PRICES_AS_OF,
        made.discarded,
    )


def _started(journal: Journal, slots: list[Slot]) -> str:
    """Embedding begins before the journal does."""
    began = datetime.fromisoformat(str(journal.entries[0]["at"]))
    if slots:
        began = min(began, datetime.fromtimestamp(slots[0].at, timezone.utc))
    return began.isoformat(timespec="seconds")


def _old_vectors(ctx: Context, journal: Journal) -> Vectors | None:
    settings: Mapping[str, Any] | None = journal.fact("settings")
    if not settings:
        return None
    manifest = accepted_backup(ctx, journal)
    component = manifest.collection if manifest else None
    size = settings["config"]["params"]["vectors"].get("size", 0)
    points = settings.get("points_count", component.points if component else None)
    return Vectors(
        size, points, component.model if component else "", component.model_known if component else ""
    )


def _absent_by(journal: Journal) -> float | None:
    """From the first announced delete to the end of the last placing; without one, to the run's last entry."""
    began = [_moment(one) for one in journal.entries if one["phase"] == DELETING]
    if not began:
        return None
    placed = [_moment(one) for one in journal.entries if one["phase"] == PLACED]
    whole = placed[-1] if placed else _moment(journal.entries[-1])
    return (whole - began[0]).total_seconds()


def _moment(entry: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(str(entry["at"]))
