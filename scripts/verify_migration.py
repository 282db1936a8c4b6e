#!/usr/bin/env python3
"""Verify a migration: size, ids, content, payloads, indexes, every vector, recall."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import cli
from lib.errors import DONE, REMAINING, VERIFICATION_FAILED, MigrationError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from lib.config import Config
    from lib.console import Console
    from lib.verify.checks import Check

Result = TypeVar("Result")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(__doc__ or "", "--recall 'database decision'", "--after-restart --record")
    add = parser.add_argument_group(cli.SAFE).add_argument
    add("--sample", type=cli.positive, default=10, metavar="N", help="memories to recall (10)")
    add("--recall", metavar="TEXT", help="also show what recalling TEXT brings")
    add("--after-restart", action="store_true", help="AutoMem was restarted: nothing may be pending any more")
    add = parser.add_argument_group(cli.DESTRUCTIVE).add_argument
    add("--record", action="store_true", help="store a migration record through POST /memory")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and run the command."""
    args = arguments().parse_args(argv)
    return cli.run(lambda: command(args), as_json=args.json)


def command(args: argparse.Namespace) -> int:
    """Load the configuration, open both stores, make every check."""
    from lib import connect
    from lib.backup.run import require_sources
    from lib.clients.automem import AutoMemApi
    from lib.config import config_of
    from lib.console import Console
    from lib.dimensions import provider_problem, reason_shown
    from lib.show_config import announce, show_config
    from lib.verify.checks import Stores, recall_lines, record, verify

    config = config_of(args.env_file, args.backup_dir)
    console = Console(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    if args.show_config:
        return show_config(config, console)
    announce(config, console)
    graph, collection = connect.open_graph(config, console.warn), connect.open_collection(config)
    require_sources(graph, collection)
    embed, reason = partial(connect.embed_few, config), reason_shown(config.settings, config.spec)
    if problem := provider_problem(config.settings, config.spec):
        reason = f"but a re-embed is refused: {one_line(str(problem))}"
    api = AutoMemApi(config.api_url, config.api_token)
    stores = Stores(graph, collection, api, config.backup_dir, config.targets(), embed, reason)
    with connect.open_cache(config) as cache:
        checks = verify(stores, cache, samples=args.sample, after_restart=args.after_restart, bar=console.progress)
    recalled = None
    if args.recall:
        recalled = attempt("--recall", lambda: recall_lines(stores.api, args.recall), console)
    recorded = attempt("--record", lambda: record(stores, checks), console) if args.record else None
    code = show_checks(checks, recalled or [], recorded, config, console)
    return code or (REMAINING if args.record and not recorded else DONE)


def attempt(flag: str, action: Callable[[], Result], console: Console) -> Result | None:
    """Do what `flag` asks for. A failure is a warning only: the checks are done, and their result is shown."""
    try:
        return action()
    except MigrationError as error:
        console.warn(f"{flag}: {error}\n{error.next_step}")
        return None


def show_checks(
    checks: list[Check], recalled: list[str], recorded: str | None, config: Config, console: Console
) -> int:
    """Print every check, and the commands that help if one failed. Returns exit code 4 then, else 0."""
    from lib.console import table
    from lib.verify.checks import FAILED, PENDING

    failed = [check for check in checks if check.status == FAILED]
    text = table([(check.status, check.name, check.detail) for check in checks], ("result", "check", "figures"))
    if recalled:
        text += "\n\nrecalled:\n" + "\n".join(recalled)
    if failed:
        remedies = dict.fromkeys(line for check in failed for line in check.remedy.splitlines())
        text += f"\n\n{len(failed)} of {len(checks)} checks FAILED. What helps:\n  " + "\n  ".join(remedies)
    elif any(check.status == PENDING for check in checks):
        text += "\n\nrestart AutoMem with the new settings, then:\n  python scripts/verify_migration.py --after-restart"
    if recorded:
        text += f"\n\nrecorded as memory {recorded}"
    document = {
        "collection": config.collection,
        "checks": [dataclasses.asdict(check) for check in checks],
        "failed": len(failed),
        "recalled": recalled,
        "recorded": recorded,
    }
    console.result(document, text)
    return VERIFICATION_FAILED if failed else DONE


if __name__ == "__main__":
    raise SystemExit(main())
