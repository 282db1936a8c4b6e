"""How fast the steps are, compared with a bare implementation of the same: a table, and bench.json.

    python -m tests.bench.bench [GROUP or FIGURE ...]

A word names all figures that begin with it, such as `backup` or `backup.vectors`; without one all are measured, and
what is not measured stays in bench.json as it was. Each figure is the median of five alternated pairs, ours and the
reference, on this machine, in one run. Nothing is asserted: on another machine times differ, ratios less. Qdrant is
the stand-in, or a real one: QDRANT_TEST_URL (an address) or QDRANT_TEST_SERVER (a binary to start).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from lib.console import table
from lib.files import private_dir
from tests.bench import absent_bench, backup_bench, far_bench, reembed_bench, restore_bench
from tests.bench.figures import Figure

RESULTS = Path(__file__).resolve().parents[2] / "bench.json"
BENCHES = {
    **backup_bench.BENCHES,
    **restore_bench.BENCHES,
    **reembed_bench.BENCHES,
    **absent_bench.BENCHES,
    **far_bench.BENCHES,
}


def measured(words: list[str]) -> list[Figure]:
    """The figures whose benches begin with one of the words, printed as they are measured."""
    figures: list[Figure] = []
    chosen = [name for name in BENCHES if not words or any(name.startswith(word) for word in words)]
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            for figure in BENCHES[name](private_dir(Path(folder) / "bench")):
                print(f"{figure.figure}: {figure.ratio}", file=sys.stderr, flush=True)
                figures.append(figure)
    return figures


def earlier() -> list[Figure]:
    """What bench.json holds from the last run."""
    return [Figure(**one) for one in json.loads(RESULTS.read_text())] if RESULTS.exists() else []


def main() -> int:
    """Measure, print, write bench.json."""
    words = sys.argv[1:]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each script that is timed compiles the library anew
    figures = measured(words)
    if not figures:
        print(f"no figure begins with {' or '.join(words)}: {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    new = {one.figure for one in figures}
    rest = [one for one in earlier() if one.figure not in new] if words else []
    lines = [asdict(one) for one in [*rest, *figures]]
    RESULTS.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    print(table([tuple(asdict(one).values()) for one in figures], tuple(asdict(figures[0]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
