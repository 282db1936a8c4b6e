#!/usr/bin/env python3
"""Back up both stores of AutoMem as one set, and verify it."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import cli

if TYPE_CHECKING:
    from lib.config import Config
    from lib.console import Console

ACTIONS = ("--check", "--list", "--cleanup", "--pin", "--unpin")
RULES = ("--keep", "--keep-daily", "--keep-weekly", "--keep-monthly")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(
        __doc__ or "", "--upload s3://bucket/folder", "--cleanup --keep-daily 7 --keep-weekly 4 --dry-run"
    )
    add = parser.add_argument_group(cli.SAFE).add_argument
    add("--only", choices=["falkordb", "qdrant"], help="back up one store alone")
    add("--no-verify", action="store_true", help="do not verify (re-embed will not rely on it)")
    add("--upload", metavar="URL", help="also copy the set (--check: existing sets) there; --cleanup, --pin: act there")
    add("--metrics", metavar="PATH", help="write metrics of the backup for Prometheus, also if it fails")
    add("--check", metavar="FILE|TIME|all|URL", help="verify existing backups again")
    add("--list", nargs="?", const="", metavar="URL", help="list the sets, here or at URL")
    add("--pin", metavar="STAMP", help="no cleanup deletes this set")
    add("--dry-run", action="store_true", help="show what would be done, change nothing")
    add = parser.add_argument_group(cli.DESTRUCTIVE).add_argument
    add("--cleanup", action="store_true", help="delete the sets that no --keep rule keeps (default: --keep 5)")
    add("--keep", type=int, metavar="N", help="with --cleanup: keep the newest N sets of each kind")
    for flag, period in (("--keep-daily", "days"), ("--keep-weekly", "weeks"), ("--keep-monthly", "months")):
        add(flag, type=int, metavar="N", help=f"... and the newest set of each of the last N {period} that have one")
    add("--unpin", metavar="STAMP", help="a cleanup may delete this set again")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, then run behind the error boundary."""
    args = arguments().parse_args(argv)
    return cli.run(lambda: command(args), as_json=args.json)


def command(args: argparse.Namespace) -> int:
    """Open what is needed and run the one action."""
    from lib.backup import output
    from lib.backup.copies import catalog_at
    from lib.backup.output import recorded
    from lib.config import config_of
    from lib.console import Console
    from lib.show_config import announce, show_config

    config = config_of(args.env_file, args.backup_dir)
    console = Console(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    if args.show_config:
        return show_config(config, console)
    for flag in RULES:
        cli.require_with(args, flag, "--cleanup")
    for flag in ("--only", "--no-verify", "--metrics"):
        cli.refuse_together(args, flag, *ACTIONS)
    cli.refuse_together(args, "--upload", "--list")
    for flag in ("--check", "--pin", "--unpin", "--metrics"):
        cli.refuse_together(args, flag, "--dry-run")
    announce(config, console)
    if args.list is not None:
        return output.show_sets(catalog_at(args.list, config.backup_dir, config.copies), console)
    if args.check:
        return check(config, console, args.check, args.upload)
    if args.cleanup or args.pin or args.unpin:
        return retain(config, console, args)
    run = partial(backup, config, console, args)
    if args.metrics:
        return recorded(run, Path(args.metrics), config.backup_dir, config.deployment(), args.only, console.warn)
    return run()


def backup(config: Config, console: Console, args: argparse.Namespace) -> int:
    """Take the backup, or with --dry-run show what it would hold."""
    from lib import connect
    from lib.backup import output
    from lib.backup.check import require_upload_url
    from lib.backup.collection import require_whole
    from lib.backup.copies import upload_new
    from lib.backup.run import require_sources, run_backup
    from lib.errors import LockHeld
    from lib.files import private_dir
    from lib.restore.run import clean_up_untouched

    folder, targets, shown = config.backup_dir, config.targets(), ""
    if args.upload:
        name = config.graph if args.only != "qdrant" else ""
        shown = require_upload_url(args.upload, folder, config.copies, graph=name, write=not args.dry_run)
    if not args.dry_run:
        private_dir(folder)
    graph = connect.open_graph(config, console.warn) if args.only != "qdrant" else None
    collection = connect.open_collection(config) if args.only != "falkordb" else None
    with nullcontext() if args.dry_run else connect.store_lock(config):  # during a cutover a store is incomplete
        if collection:
            require_whole(collection)
        require_sources(graph, collection)
        if args.dry_run:
            return output.show_sources(graph, collection, folder, console, shown)
        with suppress(LockHeld), connect.run_lock(config):  # a run that has not touched a live store yet is left alone
            clean_up_untouched(graph, collection, folder, targets)
        engines, bar, verify = connect.engines(config) if graph else [], console.progress, not args.no_verify
        manifest = run_backup(graph, collection, folder, targets, engines, bar, verify=verify, notice=console.notice)
    uploaded = upload_new(args.upload, manifest, console.progress, config.copies, console.say)
    return output.show_backup(manifest, console, uploaded)


def check(config: Config, console: Console, word: str, url: str | None) -> int:
    """Verify existing backups again and upload those without a fault; exit code 4 if one is damaged."""
    from lib import connect
    from lib.backup import output
    from lib.backup.check import verify_and_upload

    engines, owner = connect.engines(config), config.deployment()
    found, uploaded = verify_and_upload(config.backup_dir, owner, word, url, engines, console.progress, config.copies)
    return output.show_verifications(found, uploaded, console)


def retain(config: Config, console: Console, args: argparse.Namespace) -> int:
    """Pin or unpin a set, or delete the sets that no rule keeps; here or at the place of copies."""
    from lib import connect
    from lib.backup import output
    from lib.backup.retention import DEFAULT_RULES, change_pin, clean_up

    folder, url, rules = config.backup_dir, args.upload or "", cli.given(args, RULES) or DEFAULT_RULES
    with connect.store_lock(config):
        if not args.cleanup:
            stamp, pinned = args.pin or args.unpin, bool(args.pin)
            where = change_pin(url or str(folder), stamp, pinned=pinned)
            return output.show_pin(stamp, where, console, pinned=pinned)
        plan = clean_up(folder, url, config.copies, rules, config.deployment(), config.targets(), dry_run=args.dry_run)
    return output.show_deleted(plan, console, dry_run=args.dry_run)


if __name__ == "__main__":
    raise SystemExit(main())
