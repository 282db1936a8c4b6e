#!/usr/bin/env python3
"""Re-embed every memory with EMBEDDING_MODEL at VECTOR_SIZE: planned, resumable, never paid for twice."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import cli
from lib.console import command_line

if TYPE_CHECKING:
    from lib.config import Config
    from lib.console import Console
    from lib.reembed.assess import Found
    from lib.reembed.embed import EmbeddingRunner
    from lib.reembed.migration import Migration
    from lib.reembed.plan import Plan


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    add = parser.add_argument
    add("--batch-size", type=cli.positive, default=100, metavar="N", help="texts a request (100)")
    add("--workers", type=cli.positive, default=16, metavar="N", help="requests at once (16)")
    add("--dry-run", action="store_true", help="plan, price, one real batch; nothing is changed")
    add("--max-cost", type=cli.dollars, metavar="USD", help="refuse to spend more than this")
    add("--limit", type=cli.positive, metavar="N", help="spot check: N memories beside the live collection")
    add("--no-switch", action="store_true", help="stop when the staged collection is proved")
    add("--in-place", action="store_true", help="stage nothing: delete, create, fill")
    add("--only-missing", action="store_true", help="repair drift: add, renew and remove points")
    add("--fresh", action="store_true", help="forget vectors bought earlier and buy them again")
    add("--prune-spool", action="store_true", help="delete bought vectors that no plan needs")
    add("--abort", action="store_true", help="give up an unfinished run: remove what it made, close it")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, then run behind the error boundary."""
    args = arguments().parse_args(argv)
    return cli.run(lambda: command(args), as_json=args.json)


def command(args: argparse.Namespace) -> int:
    """Check the settings without a network, then do the work under the lock."""
    from lib import connect
    from lib.abort import abort
    from lib.config import config_of, require_embedding
    from lib.console import Console
    from lib.dimensions import model_fault
    from lib.reembed.output import prune
    from lib.show_config import announce, show_config

    config = config_of(args.env_file, args.backup_dir)
    console = Console(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    if args.show_config:
        return show_config(config, console)
    announce(config, console)
    cli.refuse_together(args, "--only-missing", "--limit", "--prune-spool", "--fresh", "--abort")
    cli.refuse_together(args, "--dry-run", "--limit", "--fresh", "--abort")
    cli.refuse_together(
        args, "--no-switch", "--in-place", "--only-missing", "--limit", "--abort", "--prune-spool"
    )
    if args.dry_run and (fault := model_fault(config.embedding_model, config.vector_size)):
        console.warn(fault)
    with connect.target_lock(config):
        if args.prune_spool:
            return prune(config, console, dry_run=args.dry_run)
        if args.abort:
            return abort(config, console, "reembed")
        if not args.dry_run:
            require_embedding(config)
        return reembed(config, console, args, command_line("reembed_embeddings", sys.argv[1:]))


def reembed(config: Config, console: Console, args: argparse.Namespace, again: str) -> int:
    """Open both stores, plan, and do what was asked for."""
    from lib import connect
    from lib.backup.collection import require_whole
    from lib.reembed import spot_check
    from lib.reembed.assess import look
    from lib.reembed.run import is_fresh

    graph, source = connect.open_stores(config, console, repair=args.only_missing)
    with connect.open_cache(config) as cache:
        run = connect.open_migration(config, graph, source, cache, console.progress)
        spot_check.clear_up(run)
        run.in_place, run.no_switch, run.again = args.in_place, args.no_switch, again
        run.fresh = args.fresh and not is_fresh(run)
        plan, kind, live = look(run, repair=args.only_missing)
        if live is not None:
            require_whole(source)
        return embed(run, plan, (kind, live), config, console, args)


def embed(
    run: Migration, plan: Plan, found: Found, config: Config, console: Console, args: argparse.Namespace
) -> int:
    """Show the plan; then sample, repair or replace."""
    from lib import connect
    from lib.config import require_openai_key
    from lib.reembed import output, spot_check
    from lib.reembed.assess import lacking_of_made
    from lib.reembed.embed import try_one_batch
    from lib.reembed.only_missing import only_missing
    from lib.reembed.run import is_fresh

    explicit = args.fresh or args.only_missing or args.limit or is_fresh(run)
    if not explicit and (lacking := lacking_of_made(run, plan, found[1])):
        return output.show_made(lacking, run, console)
    output.show_plan(plan, found[0], run, console, limit=args.limit)
    refused = output.warn_of_refusals(run, found, console) if args.dry_run else []
    require_openai_key(config)
    pace = (args.workers, args.batch_size, args.max_cost, console)
    runner = connect.open_runner(config, *pace, sample=args.dry_run)
    if args.dry_run:
        return output.show_tried(try_one_batch(runner, run.cache, run.bought), plan, run, refused, console)
    if args.limit:
        return output.show_spot_check(spot_check.spot_check(run, runner, found[1], args.limit), run, console)
    runner.require_affordable(plan.tokens, run.bought)
    if args.only_missing:
        return output.show_drift(only_missing(run, runner), run, console)
    return replace(run, runner, found, console)


def replace(run: Migration, runner: EmbeddingRunner, found: Found, console: Console) -> int:
    """Embed, then make the collection anew."""
    from lib.reembed import output
    from lib.reembed.assess import protection
    from lib.reembed.embed import embed_uncached
    from lib.reembed.run import begin, forget_paid, migrate, only_stage

    manifest = None if run.no_switch else protection(run, *found)
    if run.fresh:
        forget_paid(run, runner)
    embed_uncached(runner, run.cache, run.bar, run.bought)
    begin(run, manifest, callbacks := output.callbacks(run, console))
    if run.no_switch:
        return output.show_staged(only_stage(run, runner), run, console)
    return output.show_migrated(migrate(run, runner, manifest, callbacks).outcome, run, console)


if __name__ == "__main__":
    raise SystemExit(main())
