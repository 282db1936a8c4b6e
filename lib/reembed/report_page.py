"""The report of a finished re-embedding as files: JSON, and a page with plots that needs nothing but itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.backup.catalog import write_document, write_page
from lib.console import Console, pasteable
from lib.errors import MigrationError
from lib.reembed.output import dollars

if TYPE_CHECKING:
    import jinja2

    from lib.reembed.report import Report

WIDTH, HEIGHT = 720.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 12.0, 22.0, 38.0
_BINS = 30


@dataclass(frozen=True)
class Tick:
    """A place on an axis, and what is written there."""

    at: float
    label: str


@dataclass(frozen=True)
class Area:
    """A curve with the ground below it filled: `outline` and `ground` are SVG path data, `kind` its colour's name."""

    name: str
    kind: str
    outline: str
    ground: str


@dataclass(frozen=True)
class Bar:
    """A bar, and what it says when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Plot:
    """A plot of `width` x `height`; its inside is `left`..`right` and `top`..`bottom`. `marks`: broken lines."""

    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    areas: list[Area] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    width: float = WIDTH
    height: float = HEIGHT
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


class _Axis:
    """Values from `low` to `high` laid over a stretch of the drawing."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        self._low, self._high = low, high if high > low else low + 1
        self._begin, self._length = begin, end - begin

    def at(self, value: float) -> float:
        return round(self._begin + (value - self._low) / (self._high - self._low) * self._length, 2)

    def ticks(self, most: int) -> list[Tick]:
        """At round values: 1, 2 or 5 times a power of ten apart."""
        step = _round_step((self._high - self._low) / most)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self._low / step - 1e-9), math.floor(self._high / step + 1e-9)
        values = [number * step for number in range(first, last + 1)]
        return [Tick(self.at(value), f"{value:,.{digits}f}") for value in values]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= least * (1 - 1e-9))


def _across(low: float, high: float) -> _Axis:
    return _Axis(low, high, _LEFT, WIDTH - _RIGHT)


def _up(high: float) -> _Axis:
    return _Axis(0.0, high, HEIGHT - _BOTTOM, _TOP)


def _steps(name: str, kind: str, edges: Sequence[float], heights: Sequence[float]) -> Area:
    """A curve of steps: `heights` between neighbouring `edges`, in the drawing's units."""
    points = [f"{edges[0]},{heights[0]}"]
    for edge, height, following in zip(edges[1:], heights, [*heights[1:], None], strict=False):
        points.append(f"{edge},{height}")
        if following is not None:
            points.append(f"{edge},{following}")
    outline, ground = "M" + " L".join(points), HEIGHT - _BOTTOM
    return Area(name, kind, outline, f"{outline} L{edges[-1]},{ground} L{edges[0]},{ground} Z")


def rates(slots: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Texts a second over the time in which texts were embedded; pauses are left out and marked. None without any."""
    slots = [one for one in slots if one["seconds"] > 0]
    if not slots:
        return None
    seconds, speeds = [0.0], [one["texts"] / one["seconds"] for one in slots]
    for one in slots:
        seconds.append(seconds[-1] + one["seconds"])
    unit, word = (1.0, "seconds") if seconds[-1] < 180 else (60.0, "minutes")
    across, up = _across(0.0, seconds[-1] / unit), _up(1.1 * max([*speeds, 0.9]))
    edges = [across.at(one / unit) for one in seconds]
    area = _steps("texts a second", "new", edges, [up.at(one) for one in speeds])
    marks = [edge for edge, one in zip(edges, slots, strict=False) if one["after_pause"]]
    return Plot(f"{word} of embedding", "texts a second", across.ticks(8), up.ticks(5), [area], marks=marks)


def scores(before: Sequence[float], after: Sequence[float]) -> Plot | None:
    """How the scores of both collections are spread, one over the other; None without any."""
    if not before or not after:
        return None
    low, high = min(*before, *after), max(*before, *after)
    low, high = (low, high) if high > low else (low - 0.05, high + 0.05)
    shares = [_shares(one, low, high) for one in (before, after)]
    across, up = _across(low, high), _up(110 * max(max(one) for one in shares))
    edges = [across.at(low + (high - low) * number / _BINS) for number in range(_BINS + 1)]
    names = (("before", "old"), ("after", "new"))
    areas = [
        _steps(name, kind, edges, [up.at(100 * share) for share in one])
        for (name, kind), one in zip(names, shares, strict=True)
    ]
    return Plot("score of a neighbour", "% of the neighbours", across.ticks(8), up.ticks(5), areas)


def _shares(values: Sequence[float], low: float, high: float) -> list[float]:
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((value - low) / (high - low) * _BINS))] += 1
    return [count / len(values) for count in counts]


def overlaps(memories: Sequence[Mapping[str, Any]], most: int) -> Plot | None:
    """How many of the memories kept so many of their `most` neighbours; None without any."""
    if not memories:
        return None
    counts = [0] * (most + 1)
    for one in memories:
        counts[round(most * one["same"] / one["near"])] += 1
    across, up = _across(-0.5, most + 0.5), _up(1.1 * max(counts))
    ground = HEIGHT - _BOTTOM
    bars = [
        Bar(
            across.at(number - 0.4),
            up.at(count),
            round(across.at(number + 0.4) - across.at(number - 0.4), 2),
            round(ground - up.at(count), 2),
            f"{number} of {most} the same: {count} memories",
        )
        for number, count in enumerate(counts)
        if count
    ]
    ticks = [Tick(across.at(number), str(number)) for number in range(most + 1)]
    whole = [tick for tick in up.ticks(5) if "." not in tick.label]
    return Plot(f"neighbours kept, of {most}", "memories", ticks, whole, bars=bars)


FORMAT = 1
_TEMPLATES = Path(__file__).resolve().parent / "templates"


def write(report: Report, folder: Path, console: Console) -> list[Path]:
    """Write both below `folder`; those that are written. That one cannot be fails nothing: all is done by then."""
    document = {"format": FORMAT, **dataclasses.asdict(report)}
    document["undo"] = pasteable(report.undo)
    written: list[Path] = []
    try:
        written.append(write_document(folder, report.run, document))
        written.append(write_page(written[0], page(document)))
    except (MigrationError, OSError, ImportError) as error:
        console.warn(f"the report could not be written whole: {error}")
    return written


def page(document: Mapping[str, Any]) -> str:
    """The document as HTML: no script, nothing fetched from anywhere, every text in it escaped."""
    return _templates().get_template("report.html").render(**document, plots=_plots(document))


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
    templates.filters.update(count=_count, dollars=dollars, span=_span, moment=_moment)
    return templates


def _plots(document: Mapping[str, Any]) -> dict[str, Plot | None]:
    recall = document["recall"] or {"memories": [], "neighbours": 0}
    memories = recall["memories"]
    before = [score for one in memories for score in one["before"]]
    after = [score for one in memories for score in one["after"]]
    return {
        "rates": rates(document["rates"]),
        "scores": scores(before, after),
        "overlaps": overlaps(memories, recall["neighbours"]),
    }


def _count(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"


def _span(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _moment(text: str) -> str:
    """A time of the report, which is UTC."""
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S")
