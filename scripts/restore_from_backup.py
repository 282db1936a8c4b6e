#!/usr/bin/env python3
"""Restore a graph, a collection or both from backup files: verified first, cut over last, the old state backed up."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import cli
from lib.console import command_line

if TYPE_CHECKING:
    from lib.config import Config
    from lib.console import Console
    from lib.restore.inputs import Inputs


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(__doc__ or "", "latest --dry-run", "20261126_220840")
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help="an .rdb, qdrant_snapshot_*.tar.gz or a bare .snapshot, backup_*.json or its time, `latest`,"
        " a URL, or AutoMem's own backup: falkordb_*.json.gz, qdrant_*.json.gz, their folder, or its GET /backup",
    )
    safe, destructive = map(parser.add_argument_group, (cli.SAFE, cli.DESTRUCTIVE))
    safe.add_argument("--dry-run", action="store_true", help="verify the files and print the plan, touch nothing")
    destructive.add_argument("--no-safety-backup", action="store_true", help="do not back up what is replaced")
    destructive.add_argument("--force-version", action="store_true", help="try a snapshot of another Qdrant version")
    destructive.add_argument(
        "--force-incomplete", action="store_true", help="restore what a cut backup of AutoMem's own still holds"
    )
    destructive.add_argument(
        "--abort", action="store_true", help="give up an unfinished restore: remove what it made, close its journal"
    )
    destructive.add_argument(
        "--while-running", action="store_true", help="replace the graph while AutoMem runs, if that is safe"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, then run behind the error boundary."""
    args = arguments().parse_args(argv)
    return cli.run(lambda: command(args), as_json=args.json)


def command(args: argparse.Namespace) -> int:
    """Identify the files, open the stores that they need, restore under the lock."""
    from lib import connect
    from lib.abort import abort
    from lib.config import config_of
    from lib.console import Console
    from lib.errors import UsageProblem
    from lib.show_config import announce, show_config

    config = config_of(args.env_file, args.backup_dir)
    console = Console(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    if args.show_config:
        return show_config(config, console)
    announce(config, console, runs=not args.abort)
    cli.refuse_together(args, "--abort", "--dry-run")
    if args.abort and args.files:
        raise UsageProblem("--abort takes no FILE", next_step="python scripts/restore_from_backup.py --abort")
    if args.abort:
        with connect.target_lock(config):
            return abort(config, console, "restore")
    if not args.files:
        raise UsageProblem(
            "no FILE is named",
            next_step="name one; this lists the backup sets:\npython scripts/backup_automem.py --list",
        )
    from lib.backup.check import fetched
    from lib.files import private_dir
    from lib.restore.inputs import read_inputs

    owner = config.deployment()
    engines = partial(connect.engines, config)
    bar, keys = console.progress, config.copies
    files = [fetched(word, config.backup_dir, owner, engines, bar, keys) for word in args.files]
    inputs = read_inputs(files, config.backup_dir, owner)
    private_dir(config.backup_dir)
    with connect.target_lock(config):
        return restore(config, console, inputs, args)


def restore(config: Config, console: Console, inputs: Inputs, args: argparse.Namespace) -> int:
    """Verify all files, then restore; with --dry-run stop before the first write."""
    from lib import connect
    from lib.errors import UsageProblem
    from lib.restore import output
    from lib.restore.preflight import notify_other_clients, require_quiet, verify_files
    from lib.restore.run import restore as restore_all

    site = connect.open_site(
        config,
        console,
        inputs,
        command_line("restore_from_backup", sys.argv[1:]),
        safety=not args.no_safety_backup,
        force_version=args.force_version,
        force_incomplete=args.force_incomplete,
        while_running=args.while_running,
    )
    with ExitStack() as stack:
        verified = verify_files(site, inputs, stack)
        try:
            if verified.graph:
                notify_other_clients(site, verified.graph.target)
                require_quiet(site, verified.graph)
        except UsageProblem as error:
            if not args.dry_run:
                raise
            console.warn(str(error))
        if args.dry_run:
            return output.show_restore_plan(site, verified, console)
        done = restore_all(site, verified, output.undo_restore)
        return output.show_restored(done, verified, config, console)


if __name__ == "__main__":
    raise SystemExit(main())
