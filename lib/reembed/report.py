"""The report of a finished re-embedding over all of its starts, as a JSON document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from lib.backup.phases import DELETING, STAGED_RESTORED
from lib.clients.embeddings.pricing import PRICES_AS_OF, price_of
from lib.dimensions import OPENAI, EmbeddingSpec, provider_fact, public_url
from lib.journal import Journal
from lib.reembed.context import Context
from lib.reembed.embed import EmbeddingTotals, PaidSums
from lib.reembed.plan import Scan
from lib.reembed.quality import compare_after
from lib.reembed.resume import accepted_backup
from lib.reembed.sync import SyncOutcome

FORMAT = 1
_MOST_STEPS = 200


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


def make_report(ctx: Context, journal: Journal, done: Finished, *, resumed_after_delete: bool) -> dict[str, Any]:
    """Put together what the journal, the cache and the last start of a re-embedding know of it.

    Times are ISO 8601 in UTC, prices in US dollars. `old` is None if no collection was replaced. `bought` includes
    the batches of dry runs and spot checks. `recall` is None if it could not be measured; `recall_note` says why.
    """
    sums = done.paid.log.sums
    recall, recall_note = compare_after(ctx.qdrant, ctx.collection, ctx.cache, journal)
    absent = _absent_by(journal) if resumed_after_delete else None
    size, model, scan = ctx.spec.size, ctx.spec.model, done.scan
    new = {"size": size, "points": done.points, "model": model, "model_known": "stamped"}
    new |= provider_fact(ctx.spec.provider)
    return {
        "format": FORMAT,
        "run": journal.run_id,
        "collection": ctx.collection,
        "targets": ctx.targets,
        "endpoint": public_url(ctx.spec.base_url),
        "started": _started(journal, sums),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "old": _old_vectors(ctx, journal),
        "new": new,
        "way": done.method or str(journal.fact("way") or ""),
        "absent_seconds": round(done.absent_seconds if absent is None else absent, 3),
        "absent_known": "measured" if absent is None else "at most, by the journal's times",
        "memories": scan.memories,
        "texts": ctx.cache.text_total().texts,
        "bought": _paid(sums, ctx.spec),
        "rates": [dataclasses.asdict(one) for one in sums.slots],
        "recall": recall and dataclasses.asdict(recall),
        "recall_note": recall_note,
        "skipped": {"counts": dict(scan.skipped), "examples": scan.examples},
        "cut": scan.too_long,
        "cut_examples": scan.too_long_examples,
        "refused": [dataclasses.asdict(one) for one in done.paid.refused],
        "rejected": [dataclasses.asdict(one) for one in done.outcome.rejected],
        "aliases_taken": done.aliases_taken,
        "indexed": done.indexed,
        "mended": done.repaired,
        "removed": done.removed,
        "backup": journal.fact("manifest"),
        "undo": done.undo,
        "steps": _steps(journal),
    }


def _paid(sums: PaidSums, spec: EmbeddingSpec) -> dict[str, Any]:
    return {
        "texts": sums.texts,
        "tokens": sums.tokens,
        "requests": sums.requests,
        "rate_limited": sums.rate_limited,
        "seconds": round(sums.seconds, 3),
        "price": price_of(sums.tokens, spec.model, spec.provider),
        "prices_as_of": PRICES_AS_OF,
        "discarded": sums.discarded,
    }


def _steps(journal: Journal) -> list[dict[str, str]]:
    """The last phases of the run, and when each was announced."""
    return [{"at": str(one["at"]), "phase": str(one["phase"])} for one in journal.entries[-_MOST_STEPS:]]


def _started(journal: Journal, sums: PaidSums) -> str:
    """The begin of embedding, which is before that of the journal."""
    began = _moment(journal.entries[0])
    if sums.slots:
        began = min(began, datetime.fromtimestamp(sums.slots[0].at, timezone.utc))
    return began.isoformat(timespec="seconds")


def _old_vectors(ctx: Context, journal: Journal) -> dict[str, Any] | None:
    """What was replaced; `model_known` is `stamped`, `configured` or `guessed`, or empty if no model is known."""
    settings: Mapping[str, Any] | None = journal.fact("settings")
    if not settings:
        return None
    manifest = accepted_backup(ctx, journal)
    component = manifest.collection if manifest else None
    return {
        "size": settings["config"]["params"]["vectors"].get("size", 0),
        "points": settings.get("points_count", component.points if component else None),
        "model": component.model if component else "",
        "model_known": component.model_known if component else "",
        **provider_fact(component.provider if component else OPENAI),
    }


def _absent_by(journal: Journal) -> float | None:
    """Seconds from the first announced delete to the last cutover, or if there was none to the journal's last entry."""
    began = [_moment(one) for one in journal.entries if one["phase"] == DELETING]
    if not began:
        return None
    placed = [_moment(one) for one in journal.entries if one["phase"] == STAGED_RESTORED]
    return ((placed[-1] if placed else _moment(journal.entries[-1])) - began[0]).total_seconds()


def _moment(entry: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(str(entry["at"]))
