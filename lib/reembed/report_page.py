"""The report of a finished re-embedding as files: JSON, and an HTML page with plots that loads nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.backup.catalog import REPORT_DIR
from lib.clients.embeddings.pricing import price_text
from lib.console import Console, pasteable
from lib.errors import MigrationError
from lib.files import private_dir, write_atomic

if TYPE_CHECKING:
    import jinja2

_BINS = 30
_TEMPLATES = Path(__file__).resolve().parent / "templates"


class Tick(NamedTuple):
    """A position on an axis, and its label."""

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


def _x_axis(low: float, high: float) -> _Axis:
    return _Axis(low, high, Plot.left, Plot.right)


def _y_axis(high: float) -> _Axis:
    return _Axis(0.0, high, Plot.bottom, Plot.top)


def _steps(edges: Sequence[float], heights: Sequence[float]) -> str:
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
    x, y = _x_axis(0.0, seconds[-1] / unit), _y_axis(1.1 * max([*speeds, 0.9]))
    edges = [x.at(one / unit) for one in seconds]
    area = Area("texts per second", "new", _steps(edges, [y.at(one) for one in speeds]))
    marks = [edge for edge, one in zip(edges, slots, strict=False) if one["after_pause"]]
    return Plot(f"{word} of embedding", "texts per second", x.ticks(8), y.ticks(5), [area], marks=marks)


def scores(before: Sequence[float], after: Sequence[float]) -> Plot | None:
    """The distribution of the scores in both collections, one over the other. None if empty."""
    if not before or not after:
        return None
    low, high = min(*before, *after), max(*before, *after)
    low, high = (low, high) if high > low else (low - 0.05, high + 0.05)
    shares = {"old": _shares(before, low, high), "new": _shares(after, low, high)}
    x, y = _x_axis(low, high), _y_axis(110 * max(map(max, shares.values())))
    edges = [x.at(low + (high - low) * number / _BINS) for number in range(_BINS + 1)]
    areas = [
        Area(name, kind, _steps(edges, [y.at(100 * share) for share in shares[kind]]))
        for name, kind in (("before", "old"), ("after", "new"))
    ]
    return Plot("score of a neighbour", "% of the neighbours", x.ticks(8), y.ticks(5), areas)


def _shares(values: Sequence[float], low: float, high: float) -> list[float]:
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((value - low) / (high - low) * _BINS))] += 1
    return [count / len(values) for count in counts]


def overlaps(memories: Sequence[Mapping[str, Any]], most: int) -> Plot | None:
    """How many memories have how many of their `most` nearest neighbours in common. None if empty."""
    if not memories:
        return None
    counts = [0] * (most + 1)
    for one in memories:
        counts[round(most * one["same"] / one["near"])] += 1
    x, y = _x_axis(-0.5, most + 0.5), _y_axis(1.1 * max(counts))
    width = round(x.at(0.4) - x.at(-0.4), 2)
    bars = [
        Bar(
            x.at(number - 0.4),
            y.at(count),
            width,
            round(Plot.bottom - y.at(count), 2),
            f"{number} of {most} the same: {count} memories",
        )
        for number, count in enumerate(counts)
        if count
    ]
    ticks = [Tick(x.at(number), str(number)) for number in range(most + 1)]
    whole = [tick for tick in y.ticks(5) if "." not in tick.label]
    return Plot(f"neighbours in common, of {most}", "memories", ticks, whole, bars=bars)


def write(report: Mapping[str, Any], folder: Path, console: Console) -> list[Path]:
    """Write both files (0600) below `folder`, in place of earlier ones of this run, and return their paths.

    A failure is only a warning: the work is done.
    """
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
    before = [score for one in memories for score in one["before"]]
    after = [score for one in memories for score in one["after"]]
    plots = {
        "rates": rates(document["rates"]),
        "scores": scores(before, after),
        "overlaps": overlaps(memories, recall["neighbours"]),
    }
    return _templates().get_template("report.html").render(**document, plots=plots)


@cache
def _templates() -> jinja2.Environment:
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(count=_count, dollars=price_text, duration=_duration, moment=_moment)
    return templates


def _count(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _moment(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S")
