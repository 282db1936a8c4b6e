"""A figure: our time and that of a bare implementation, as a line of bench.json."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

PAIRS = 5


@dataclass(frozen=True)
class Figure:
    """Seconds (texts a second for a rate, MB for a peak) and their ratio; no goal if the figure is only informative."""

    figure: str
    ours: float
    reference: float
    ratio: float
    goal: float | None
    met: bool | None
    on: str


def at_most(name: str, ours: float, reference: float, goal: float | None, on: str) -> Figure:
    """A figure whose ratio should not be above `goal`."""
    ratio = ours / reference
    met = None if goal is None else ratio <= goal
    return Figure(name, round(ours, 3), round(reference, 3), round(ratio, 2), goal, met, on)


def at_least(name: str, ours: float, reference: float, goal: float, on: str) -> Figure:
    """A figure whose ratio should not be below `goal`."""
    ratio = ours / reference
    return Figure(name, round(ours, 1), round(reference, 1), round(ratio, 2), goal, ratio >= goal, on)


def seconds_of(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def pairs(
    ours: Callable[[], object], reference: Callable[[], object], *, rest_seconds: float = 0.0
) -> tuple[float, float]:
    """Medians of both in seconds, alternated so that both meet the same load, each after a pause of the server."""
    taken: list[tuple[float, float]] = []
    for _ in range(PAIRS):
        time.sleep(rest_seconds)
        first = seconds_of(ours)
        time.sleep(rest_seconds)
        taken.append((first, seconds_of(reference)))
    return median(one[0] for one in taken), median(one[1] for one in taken)


def load() -> str:
    """How busy the machine is."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
