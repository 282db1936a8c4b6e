"""The report of a finished re-embedding over all of its starts: JSON, and an HTML page that loads nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.backup.catalog import REPORT_DIR
from lib.backup.phases import DELETING, STAGED_RESTORED
from lib.clients.embeddings.pricing import PRICES_AS_OF, price_of, price_text
from lib.console import Console, pasteable
from lib.dimensions import OPENAI, EmbeddingSpec, provider_fact, public_url
from lib.errors import MigrationError
from lib.files import private_dir, write_atomic
from lib.journal import Journal
from lib.reembed.context import Context, accepted_backup
from lib.reembed.embed import EmbeddingTotals, PaidSums
from lib.reembed.plan import Scan
from lib.reembed.quality import compare_after
from lib.reembed.sync import SyncOutcome

if TYPE_CHECKING:
    import jinja2

FORMAT = 1
_MOST_STEPS, _BINS = 200, 30
_TEMPLATES = Path(__file__).resolve().parent / "templates"


class Finished(NamedTuple):
    """What the last start of a re-embedding did. `scan` is its last reading of the graph.

    `points` of the plan are in the collection. `absent_seconds`: how long it was absent or incomplete; if an earlier
    start deleted it, at most that long by the journal's times. `undo`: the commands that restore the old collection.
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
    absent_at_most: bool = False


def make_report(ctx: Context, journal: Journal, done: Finished) -> dict[str, Any]:
    """Put together what the journal, the cache and the last start of a re-embedding know of it.

    Times are ISO 8601 in UTC, prices in US dollars. `old` is None if no collection was replaced. `bought` includes
    the batches of dry runs and spot checks. `recall` is None if it could not be measured; `recall_note` says why.
    """
    sums = done.paid.sums
    recall, recall_note = compare_after(ctx, journal)
    scan, new = done.scan, {"size": ctx.spec.size, "points": done.points, "model": ctx.spec.model}
    new |= {"model_known": "stamped", **provider_fact(ctx.spec.provider)}
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
        "absent_seconds": round(done.absent_seconds, 3),
        "absent_known": "at most, by the journal's times" if done.absent_at_most else "measured",
        "memories": scan.memories,
        "texts": ctx.cache.text_total().texts,
        "bought": _paid(sums, ctx.spec),
        "rates": [dataclasses.asdict(one) for one in sums.slots],
        "recall": recall,
        "recall_note": recall_note,
        "skipped": {"counts": dict(scan.skipped), "examples": scan.examples},
        "cut": scan.too_long,
        "cut_examples": scan.too_long_examples,
        "refused": [dataclasses.asdict(one) for one in done.paid.refused],
        "rejected": [dataclasses.asdict(one) for one in done.outcome.rejected],
        **{name: getattr(done, name) for name in ("aliases_taken", "indexed", "removed", "undo")},
        "mended": done.repaired,
        "backup": journal.fact("manifest"),
        "steps": [{"at": str(one["at"]), "phase": str(one["phase"])} for one in journal.entries[-_MOST_STEPS:]],
    }


def _paid(sums: PaidSums, spec: EmbeddingSpec) -> dict[str, Any]:
    counts = {name: getattr(sums, name) for name in ("texts", "tokens", "requests", "rate_limited", "discarded")}
    price = price_of(sums.tokens, spec.model, spec.provider)
    return {**counts, "seconds": round(sums.seconds, 3), "price": price, "prices_as_of": PRICES_AS_OF}


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


def absent_by(journal: Journal) -> float:
    """Seconds from the first announced delete to the last cutover, or if there was none to the journal's last entry."""
    began, placed = journal.times(DELETING), journal.times(STAGED_RESTORED)
    return ((placed[-1] if placed else _moment(journal.entries[-1])) - began[0]).total_seconds()


def _moment(entry: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(str(entry["at"]))


class Tick(NamedTuple):
    """A position on an axis."""

    at: float
    label: str


class Area(NamedTuple):
    """A curve from the left to the right end, filled below: `outline` is SVG path data, `kind` names its colour."""

    name: str
    kind: str
    outline: str


class Bar(NamedTuple):
    """A bar, and the label that is shown when the pointer is over it."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Plot:
    """A drawing; its axes go from `left` to `right` and from `bottom` to `top`. `marks`: x of broken lines."""

    width, height = 720.0, 240.0
    left, right, top, bottom = 56.0, 708.0, 22.0, 202.0

    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    areas: list[Area] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)


class _Axis:
    """Maps values from `low` to `high` to positions from `begin` to `end`."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        self._low, self._high = low, high if high > low else low + 1
        self._begin, self._length = begin, end - begin

    def at(self, value: float) -> float:
        return round(self._begin + (value - self._low) / (self._high - self._low) * self._length, 2)

    def ticks(self, most: int) -> list[Tick]:
        """Ticks at round values, 1, 2 or 5 times a power of ten apart."""
        least = (self._high - self._low) / most
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * times for times in (1, 2, 5, 10) if power * times >= least * (1 - 1e-9))
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self._low / step - 1e-9), math.floor(self._high / step + 1e-9)
        values = [number * step for number in range(first, last + 1)]
        return [Tick(self.at(value), f"{value:,.{digits}f}") for value in values]


def _axes(low: float, high: float, top: float) -> tuple[_Axis, _Axis]:
    """Return the x axis from `low` to `high`, and the y axis from 0 to `top`."""
    return _Axis(low, high, Plot.left, Plot.right), _Axis(0.0, top, Plot.bottom, Plot.top)


def _step_curve(edges: Sequence[float], heights: Sequence[float]) -> str:
    """SVG path data of a step curve: one height between each two neighbouring edges."""
    ends = zip(edges, edges[1:], heights, strict=False)
    return "M" + " L".join(f"{left},{height} L{right},{height}" for left, right, height in ends)


def rates(slots: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Texts per second over the time of embedding, with marks for the pauses, which are left out. None if empty."""
    slots = [one for one in slots if one["seconds"] > 0]
    if not slots:
        return None
    seconds, speeds = [0.0], [one["texts"] / one["seconds"] for one in slots]
    for one in slots:
        seconds.append(seconds[-1] + one["seconds"])
    unit, word = (1.0, "seconds") if seconds[-1] < 180 else (60.0, "minutes")
    x, y = _axes(0.0, seconds[-1] / unit, 1.1 * max([*speeds, 0.9]))
    edges = [x.at(one / unit) for one in seconds]
    area = Area("texts per second", "new", _step_curve(edges, [y.at(one) for one in speeds]))
    marks = [edge for edge, one in zip(edges, slots, strict=False) if one["after_pause"]]
    return Plot(f"{word} of embedding", "texts per second", x.ticks(8), y.ticks(5), [area], marks=marks)


def scores(before: Sequence[float], after: Sequence[float]) -> Plot | None:
    """The distribution of the scores in both collections, one over the other. None if empty."""
    if not before or not after:
        return None
    low, high = min(*before, *after), max(*before, *after)
    low, high = (low, high) if high > low else (low - 0.05, high + 0.05)
    shares = {"old": _shares(before, low, high), "new": _shares(after, low, high)}
    x, y = _axes(low, high, 110 * max(map(max, shares.values())))
    edges = [x.at(low + (high - low) * number / _BINS) for number in range(_BINS + 1)]
    curves = {kind: _step_curve(edges, [y.at(100 * share) for share in found]) for kind, found in shares.items()}
    areas = [Area("before", "old", curves["old"]), Area("after", "new", curves["new"])]
    return Plot("score of a neighbour", "% of the neighbours", x.ticks(8), y.ticks(5), areas)


def _shares(values: Sequence[float], low: float, high: float) -> list[float]:
    counts = Counter(min(_BINS - 1, int((value - low) / (high - low) * _BINS)) for value in values)
    return [counts[number] / len(values) for number in range(_BINS)]


def overlaps(memories: Sequence[Mapping[str, Any]], most: int) -> Plot | None:
    """How many memories have how many of their `most` nearest neighbours in common. None if empty."""
    if not memories:
        return None
    counts = Counter(round(most * one["same"] / one["near"]) for one in memories)
    x, y = _axes(-0.5, most + 0.5, 1.1 * max(counts.values()))
    width = round(x.at(0.4) - x.at(-0.4), 2)
    bars = []
    for number, count in sorted(counts.items()):
        height, label = round(Plot.bottom - y.at(count), 2), f"{number} of {most} the same: {count} memories"
        bars.append(Bar(x.at(number - 0.4), y.at(count), width, height, label))
    ticks = [Tick(x.at(number), str(number)) for number in range(most + 1)]
    whole = [tick for tick in y.ticks(5) if "." not in tick.label]
    return Plot(f"neighbours in common, of {most}", "memories", ticks, whole, bars=bars)


def write(report: Mapping[str, Any], folder: Path, console: Console) -> list[Path]:
    """Write both files (0600) in place of this run's earlier ones; return their paths. A failure is a warning only."""
    document = {**report, "undo": pasteable(report["undo"])}
    written: list[Path] = []
    try:
        path = private_dir(folder / REPORT_DIR) / f"reembed_{document['run']}.json"
        # JSON is escaped to ASCII: a text may hold a lone surrogate, which UTF-8 cannot encode.
        write_atomic(path, json.dumps(document, indent=2).encode() + b"\n")
        written.append(path)
        write_atomic(path.with_suffix(".html"), page(document).encode("utf-8", "replace"))
        written.append(path.with_suffix(".html"))
    except (MigrationError, OSError, ImportError) as error:
        console.warn(f"the report could not be written completely: {error}")
    return written


def page(document: Mapping[str, Any]) -> str:
    """The document as HTML: no script, no external resource, all text escaped."""
    recall = document["recall"] or {"memories": [], "neighbours": 0}
    memories = recall["memories"]
    before, after = ([score for one in memories for score in one[when]] for when in ("before", "after"))
    plots = {
        "rates": rates(document["rates"]),
        "scores": scores(before, after),
        "overlaps": overlaps(memories, recall["neighbours"]),
    }
    return _templates().get_template("report.html").render(**document, plots=plots)


@cache
def _templates() -> jinja2.Environment:
    import jinja2

    loader, undefined = jinja2.FileSystemLoader(_TEMPLATES), jinja2.StrictUndefined
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(dollars=price_text, duration=_duration)
    templates.filters["count"] = lambda number: f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"
    templates.filters["moment"] = lambda text: datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S")
    return templates


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
