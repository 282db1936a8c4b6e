#!/usr/bin/env python3
"""Run the whole guide in a sandbox on this machine: real FalkorDB, stand-ins for the rest, sample memories."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import cli


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(__doc__ or "", "--memories 200", "serve")
    parser.add_argument(
        "action",
        nargs="?",
        choices=["serve", "automem", "provider"],
        help="serve: run the sandbox on the guide's ports 6379, 6333, 8001 until Ctrl-C; the others control it",
    )
    parser.add_argument(
        "word", nargs="?", help="automem: stop, start, restart; provider: ok, slow, 429, quota, key, 500"
    )
    parser.add_argument("--memories", type=cli.positive, default=1000, metavar="N", help="how many (1000)")
    parser.add_argument("--keep", action="store_true", help="keep the folder with data, logs and backups")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, then run behind the error boundary."""
    args = arguments().parse_args(argv)
    return cli.run(lambda: command(args))


def command(args: argparse.Namespace) -> int:
    """Run in a temporary folder. It is removed at the end, except after a failure or with --keep."""
    require_sandbox()
    from tests.sandbox.stack import GUIDE_PORTS, require_free

    if args.word is not None or args.action in {"automem", "provider"}:
        return control(args.action, args.word)
    if args.action:
        require_free(GUIDE_PORTS)
    folder, keep = Path(tempfile.mkdtemp(prefix="automem-sandbox-")), True
    try:
        code = serve(folder, args.memories) if args.action else tour(folder, args.memories)
        keep = args.keep
    except KeyboardInterrupt:
        keep = args.keep
        raise
    finally:
        if keep:
            print(f"\nkept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return code


def tour(folder: Path, memories: int) -> int:
    """Run the guide and print a table of what was checked."""
    from lib.console import pasteable, table
    from tests.sandbox.stack import Stack
    from tests.sandbox.tour import SMALL, Tour, walk

    began = time.monotonic()
    print("starting the sandbox: FalkorDB, Qdrant (stand-in), an embeddings endpoint, AutoMem (stand-in)", flush=True)
    with Stack(folder) as stack:
        nodes, points = stack.load(memories, SMALL[1], SMALL[0])
        print(f"loaded {nodes:,} nodes and {points:,} points of 768d in {time.monotonic() - began:.1f} s", flush=True)
        stack.start_automem(SMALL[1], SMALL[0])
        guide = Tour(stack, folder / "backups", lambda text: print(text, flush=True))
        walk(guide)
    print("\n" + table(guide.checked, ("checked", "figures")))
    print(f"\nthe whole guide, {memories:,} memories, in {time.monotonic() - began:.0f} s")
    print(pasteable("next: type it yourself in a sandbox that stays:  python scripts/quickstart.py serve"))
    print("      or follow MIGRATION.md with your own data")
    return 0


def require_sandbox() -> None:
    """Raise UsageProblem if a package of the sandbox is missing."""
    import importlib.util

    from lib.errors import UsageProblem

    missing = [name for name in ("qdrant_edge", "uvicorn", "starlette") if not importlib.util.find_spec(name)]
    if missing:
        raise UsageProblem(
            f"the sandbox needs packages that are not installed: {', '.join(missing)}",
            next_step=cli.INSTALL.replace("requirements.txt", "requirements-dev.txt"),
        )


def serve(folder: Path, memories: int) -> int:
    """Run the sandbox on the guide's own ports until Ctrl-C or SIGTERM."""
    from tests.sandbox import serving

    try:
        serving.serve(folder, memories, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("stopping the sandbox", flush=True)
    return 0


def control(server: str, word: str | None) -> int:
    """Stop, start or restart the AutoMem of a sandbox that is served, or change what its embeddings endpoint does."""
    from lib.config import config_of
    from tests.sandbox.serving import ask, require_word

    require_word(server, word)
    config = config_of(None, None)
    print(ask(server, word, config.vector_size, config.embedding_model))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
