"""The largest resident size of one of our scripts, run as a separate process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_UNIT = 1 << 20 if sys.platform == "darwin" else 1 << 10  # of ru_maxrss, in bytes: macOS counts those

# A process begins with the peak of the one that it was forked from: so from a small one. Its own peak alone is
# asked: the process that opens segments, and a scratch server, are others.
_STARTER = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
_RUNNER = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


def peak_mb(script: str, *words: str, env: Mapping[str, str], folder: Path, codes: Collection[int] = (0,)) -> float:
    """MiB (ru_maxrss) of `scripts/<script>.py` with these words; raises RuntimeError with its output if it fails."""
    own = [sys.executable, "-c", _RUNNER, str(ROOT / "scripts" / f"{script}.py"), *words]
    done = subprocess.run(
        [sys.executable, "-c", _STARTER, *own],
        env=dict(env),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in codes:
        raise RuntimeError(f"{script}.py: exit code {done.returncode}\n{done.stderr}")
    return int(done.stdout.splitlines()[-1]) * _UNIT / (1 << 20)
