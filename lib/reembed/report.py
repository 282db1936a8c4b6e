"""The report of a finished re-embedding over all of its starts, as a JSON document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from lib.backup.last_migration import DELETING, PLACED
from lib.clients.embeddings.pricing import PRICES_AS_OF, price_of
from lib.dimensions import public_url
from lib.journal import Journal
from lib.reembed.embed import PaidSums
from lib.reembed.migration import Migration, journal_of
from lib.reembed.plan import Scan
from lib.reembed.quality import compare_after
from lib.reembed.resume import manifest_of
from lib.reembed.sync import SyncOutcome

FORMAT = 1
_MOST_STEPS = 200


def points_in_place(run: Migration, outcome: SyncOutcome) -> int:
    """How many points the plan has in the collection."""
    return run.cache.memory_count() - outcome.unembedded - len(outcome.rejected)


def make_report(
    run: Migration, scan: Scan, outcome: SyncOutcome, *, went_on_after_delete: bool
) -> dict[str, Any]:
    """Put together what is known at the end of a run; `scan` is its last reading of the graph.

    Times are ISO 8601 in UTC, prices in US dollars. `old` is None if no collection was replaced. `bought` includes
    the batches of dry runs and spot checks. `recall` is None if it could not be measured; `recall_note` says why.
    """
    journal = journal_of(run)
    sums = run.bought.log.sums if run.bought.log else PaidSums()
    recall, recall_note = compare_after(run.target.qdrant, run.target.collection, run.cache, journal)
    absent = _absent_by(journal) if went_on_after_delete else None
    size, points, model = run.spec.size, points_in_place(run, outcome), run.spec.model
    return {
        "format": FORMAT,
        "run": journal.run_id,
        "collection": run.target.collection,
        "targets": run.targets,
        "endpoint": public_url(run.spec.base_url),
        "started": _started(journal, sums),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "old": _old_vectors(run),
        "new": {"size": size, "points": points, "model": model, "model_known": "stamped"},
        "way": run.way or str(journal.fact("way") or ""),
        "absent_seconds": round(run.absent_seconds if absent is None else absent, 3),
        "absent_known": "measured" if absent is None else "at most, by the journal's times",
        "memories": scan.memories,
        "texts": run.cache.text_total().texts,
        "bought": _paid(sums, model),
        "rates": [dataclasses.asdict(one) for one in sums.slots],
        "recall": recall and dataclasses.asdict(recall),
        "recall_note": recall_note,
        "skipped": {"counts": dict(scan.skipped), "examples": scan.examples},
        "cut": scan.too_long,
        "cut_examples": scan.too_long_examples,
        "refused": [dataclasses.asdict(one) for one in run.bought.refused],
        "rejected": [dataclasses.asdict(one) for one in outcome.rejected],
        "aliases_taken": run.aliases_taken,
        "indexed": run.indexed,
        "mended": run.mended,
        "removed": run.removed,
        "backup": journal.fact("manifest"),
        "undo": run.undo,
        "steps": _steps(journal),
    }


def _paid(sums: PaidSums, model: str) -> dict[str, Any]:
    return {
        "texts": sums.texts,
        "tokens": sums.tokens,
        "requests": sums.requests,
        "rate_limited": sums.rate_limited,
        "seconds": round(sums.seconds, 3),
        "price": price_of(sums.tokens, model),
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


def _old_vectors(run: Migration) -> dict[str, Any] | None:
    """What was replaced; `model_known` is `stamped`, `configured` or `guessed`, or empty if no model is known."""
    settings: Mapping[str, Any] | None = journal_of(run).fact("settings")
    if not settings:
        return None
    manifest = manifest_of(run.folder, run.journal)
    component = manifest.collection if manifest else None
    return {
        "size": settings["config"]["params"]["vectors"].get("size", 0),
        "points": settings.get("points_count", component.points if component else None),
        "model": component.model if component else "",
        "model_known": component.model_known if component else "",
    }


def _absent_by(journal: Journal) -> float | None:
    """Seconds from the first announced delete to the last cutover, or if there was none to the journal's last entry."""
    began = [_moment(one) for one in journal.entries if one["phase"] == DELETING]
    if not began:
        return None
    placed = [_moment(one) for one in journal.entries if one["phase"] == PLACED]
    return ((placed[-1] if placed else _moment(journal.entries[-1])) - began[0]).total_seconds()


def _moment(entry: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(str(entry["at"]))
