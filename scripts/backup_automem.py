#!/usr/bin/env python3
"""Back up both stores of AutoMem as one set, and verify it."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import cli

if TYPE_CHECKING:
    from lib.config import Config
    from lib.console import Console

KEEP = 5


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--only", choices=["falkordb", "qdrant"], help="back up one store alone")
    parser.add_argument("--no-verify", action="store_true", help="do not verify (re-embed will not rely on it)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", metavar="FILE|MANIFEST|all|URL", help="verify existing backups again")
    instead.add_argument("--list", nargs="?", const="", metavar="URL", help="list the sets, here or at URL")
    instead.add_argument("--cleanup", action="store_true", help="delete old sets, see --keep")
    parser.add_argument(
        "--keep", type=int, metavar="N", help=f"with --cleanup: sets of each kind to keep (default {KEEP})"
    )
    parser.add_argument("--upload", metavar="URL", help="also copy the set there; with --check: existing sets")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, change nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, then run behind the error boundary."""
    args = arguments().parse_args(argv)
    return cli.run(lambda: command(args), as_json=args.json)


def command(args: argparse.Namespace) -> int:
    """Open what is needed and run the one action."""
    from lib.backup import output
    from lib.backup.copies import catalog_at
    from lib.config import config_of
    from lib.console import Console
    from lib.show_config import announce, show_config

    config = config_of(args.env_file, args.backup_dir)
    console = Console(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    if args.show_config:
        return show_config(config, console)
    cli.require_with(args, "--keep", "--cleanup")
    for flag in ("--only", "--no-verify"):
        cli.refuse_together(args, flag, "--check", "--list", "--cleanup")
    cli.refuse_together(args, "--upload", "--list", "--cleanup")
    cli.refuse_together(args, "--check", "--dry-run")
    announce(config, console)
    if args.list is not None:
        return output.show_sets(catalog_at(args.list, config.backup_dir, config.copies), console)
    if args.check:
        return check(config, console, args.check, args.upload)
    if args.cleanup:
        return cleanup(config, console, KEEP if args.keep is None else args.keep, dry_run=args.dry_run)
    return backup(config, console, args)


def backup(config: Config, console: Console, args: argparse.Namespace) -> int:
    """Take the backup, or with --dry-run show what it would hold."""
    from lib import connect
    from lib.abort import clean_up_untouched
    from lib.backup import output
    from lib.backup.check import require_upload_url
    from lib.backup.collection import require_whole
    from lib.backup.run import require_sources, run_backup
    from lib.errors import LockHeld
    from lib.files import private_dir

    folder, shown = config.backup_dir, ""
    if args.upload:
        name = config.graph if args.only != "qdrant" else ""
        shown = require_upload_url(args.upload, folder, config.copies, graph=name, write=not args.dry_run)
    graph = connect.open_graph(config, console.warn) if args.only != "qdrant" else None
    collection = connect.open_collection(config) if args.only != "falkordb" else None
    if collection:
        require_whole(collection)
    require_sources(graph, collection)
    if args.dry_run:
        return output.show_sources(graph, collection, folder, console, shown)
    private_dir(folder)
    with connect.store_lock(config):
        with suppress(LockHeld), connect.run_lock(config):  # a run that has not touched a live store yet is left alone
            clean_up_untouched(graph, collection, folder, config.targets())
        manifest = run_backup(
            graph,
            collection,
            folder,
            config.targets(),
            connect.engines(config) if graph else [],
            console.progress,
            verify=not args.no_verify,
            notice=console.notice,
        )
    uploaded = None
    if args.upload:
        from lib.backup.copies import upload, upload_command

        assert manifest.path is not None
        console.say(f"backup set: {manifest.path}\nif its upload stops: {upload_command(manifest.path, shown)}")
        uploaded = upload(args.upload, manifest, console.progress, config.copies)
    return output.show_backup(manifest, console, uploaded)


def check(config: Config, console: Console, word: str, url: str | None) -> int:
    """Verify existing backups again and upload those without a fault; exit code 4 if one is damaged."""
    from lib import connect
    from lib.backup import output
    from lib.backup.check import verify_and_upload

    engines, owner = connect.engines(config), config.deployment()
    found, uploaded = verify_and_upload(config.backup_dir, owner, word, url, engines, console.progress, config.copies)
    return output.show_verifications(found, uploaded, console)


def cleanup(config: Config, console: Console, keep: int, *, dry_run: bool) -> int:
    """Delete the sets beyond the newest `keep` of each kind."""
    from lib import connect
    from lib.backup import output
    from lib.backup.catalog import delete_set, plan_cleanup

    with connect.store_lock(config):
        plan = plan_cleanup(config.backup_dir, keep, config.deployment(), config.targets())
        for manifest in [] if dry_run else plan.delete:
            delete_set(manifest)
    return output.show_deleted(plan, console, dry_run=dry_run)


if __name__ == "__main__":
    raise SystemExit(main())
