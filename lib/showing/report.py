"""The report of a finished re-embedding as files: its figures as JSON, and a page that needs nothing but itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.backup_set.reports import write_document, write_page
from lib.console import Console
from lib.errors import MigrationError
from lib.pasteable import pasteable
from lib.showing.plots import Plot, overlaps, rates, scores
from lib.showing.reembed import dollars

if TYPE_CHECKING:
    import jinja2

    from lib.steps.report import Report

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
