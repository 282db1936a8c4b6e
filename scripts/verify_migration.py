#!/usr/bin/env python3
"""Verify a migration: size, ids, content, payloads, indexes, vectors, and that recall finds what it should."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import cli

if TYPE_CHECKING:
    from lib.config import Config
    from lib.console import Console
    from lib.verify.checks import Check
    from lib.verify.run import Stores


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument(
        "--sample", type=cli.positive, default=10, metavar="N", help="memories to recall (10)"
    )
    parser.add_argument("--recall", metavar="TEXT", help="also show what recalling TEXT brings")
    parser.add_argument(
        "--after-restart",
        action="store_true",
        help="AutoMem was restarted: what was pending must be right now",
    )
    parser.add_argument("--record", action="store_true", help="store a migration record through POST /memory")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, then run behind the error boundary."""
    args = arguments().parse_args(argv)
    return cli.run(lambda: command(args), as_json=args.json)


def command(args: argparse.Namespace) -> int:
    """Read the settings, then verify."""
    from lib.config import config_of
    from lib.console import Console
    from lib.show_config import announce, show_config

    config = config_of(args.env_file, args.backup_dir)
    console = Console(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    if args.show_config:
        return show_config(config, console)
    announce(config, console)
    return verification(config, console, args)


def verification(config: Config, console: Console, args: argparse.Namespace) -> int:
    """Open both stores and ask every question."""
    from lib import connect
    from lib.backup.run import require_sources
    from lib.errors import DONE, REMAINING
    from lib.verify import output
    from lib.verify.run import Stores, verify

    graph, collection = connect.open_graph(config, console.warn), connect.open_collection(config)
    require_sources(graph, collection)
    stores = Stores(graph, collection, connect.automem_api(config), config.backup_dir, config.targets())
    with connect.open_cache(config) as cache:
        checks = verify(
            stores, cache, samples=args.sample, after_restart=args.after_restart, bar=console.progress
        )
    lines = recall_lines(config, console, args.recall) if args.recall else []
    recorded = record(stores, checks, console) if args.record else None
    code = output.show_checks(checks, lines, recorded, config, console)
    return code or (REMAINING if args.record and not recorded else DONE)


def recall_lines(config: Config, console: Console, query: str) -> list[str]:
    """What recalling `query` brings, for the operator to judge."""
    from lib import connect
    from lib.errors import MigrationError
    from lib.verify.checks import recall_lines

    try:
        return recall_lines(connect.automem_api(config), query)
    except MigrationError as error:
        console.warn(f"--recall: {error}")
        return []


def record(stores: Stores, checks: list[Check], console: Console) -> str | None:
    """Store the migration record once everything has passed; that it is not stored does not undo the verification."""
    from lib.errors import MigrationError
    from lib.verify.run import is_settled, record

    if not is_settled(checks):
        console.warn("--record: not stored before every check has passed")
        return None
    try:
        return record(stores)
    except MigrationError as error:
        console.warn(f"--record: {error}")
        return None


if __name__ == "__main__":
    raise SystemExit(main())
