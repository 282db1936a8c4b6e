#!/usr/bin/env python3
"""Re-embed every memory with EMBEDDING_MODEL at VECTOR_SIZE: planned, resumable, never paid for twice."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import cli
from lib.console import command_line

if TYPE_CHECKING:
    from lib.config import Config
    from lib.console import Console
    from lib.reembed.assess import Assessment
    from lib.reembed.context import Context


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser(__doc__ or "", "--dry-run", "--max-cost 5 --no-switch")
    add = parser.add_argument_group(cli.SAFE).add_argument
    add("--dry-run", action="store_true", help="plan, price, one real batch; nothing is changed")
    add("--limit", type=cli.positive, metavar="N", help="spot check: N memories in a temporary collection")
    add("--no-switch", action="store_true", help="stop when the staged collection is verified")
    add("--max-cost", type=cli.dollars, metavar="USD", help="refuse to spend more than this")
    add("--batch-size", type=cli.positive, default=100, metavar="N", help="texts a request (100)")
    add("--workers", type=cli.positive, default=16, metavar="N", help="requests at once (16)")
    add = parser.add_argument_group(cli.DESTRUCTIVE).add_argument
    add("--in-place", action="store_true", help="stage nothing: delete, create, fill")
    add("--only-missing", action="store_true", help="repair drift: add, update and remove points")
    add("--fresh", action="store_true", help="drop the vectors in the cache and pay for them again")
    add("--prune-spool", action="store_true", help="delete cached vectors that no plan needs")
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
    from lib.clients.embeddings.cache_file import prune_cache
    from lib.config import config_of, require_embedding
    from lib.console import Console
    from lib.dimensions import model_fault
    from lib.show_config import announce, require_provider, show_config

    config = config_of(args.env_file, args.backup_dir)
    console = Console(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    if args.show_config:
        return show_config(config, console)
    announce(config, console, runs=not (args.abort or args.prune_spool))
    cli.refuse_together(args, "--only-missing", "--limit", "--prune-spool", "--fresh", "--abort")
    cli.refuse_together(args, "--dry-run", "--limit", "--fresh", "--abort")
    cli.refuse_together(args, "--no-switch", "--in-place", "--only-missing", "--limit", "--abort", "--prune-spool")
    spec = config.spec
    if args.dry_run and (fault := model_fault(spec.model, spec.size, spec.provider)):
        console.warn(fault)
    if args.prune_spool:
        from lib.reembed.output import show_pruned

        with connect.target_lock(config), connect.open_cache(config) as cache:
            pruned = prune_cache(cache, config.backup_dir, dry_run=args.dry_run)
        return show_pruned(pruned, console, dry_run=args.dry_run)
    if args.abort:
        with connect.target_lock(config):
            return abort(config, console, "reembed")
    with connect.run_lock(config):
        require_provider(config, console)
        if not args.dry_run:
            require_embedding(config)
        return prepare(config, console, args)


def prepare(config: Config, console: Console, args: argparse.Namespace) -> int:
    """Open both stores, assess them, and do what was asked for."""
    from lib import connect
    from lib.backup.collection import require_whole
    from lib.reembed import quality
    from lib.reembed.assess import assess
    from lib.reembed.context import open_run

    graph, source = connect.open_stores(config, console, repair=args.only_missing)
    with connect.open_cache(config) as cache:
        ctx = dataclasses.replace(
            connect.open_reembed(config, graph, source, cache, console),
            again=command_line("reembed_embeddings", sys.argv[1:]),
            fresh=args.fresh,
            in_place=args.in_place,
            no_switch=args.no_switch,
        )
        journal = open_run(ctx)
        quality.clear_up(ctx)
        found = assess(ctx, journal, repair=args.only_missing)
        if found.live.state is not None:
            require_whole(source)
        return execute(ctx, found, config, console, args)


def execute(ctx: Context, found: Assessment, config: Config, console: Console, args: argparse.Namespace) -> int:
    """Show the plan; then sample, sync or replace."""
    from lib import connect
    from lib.config import require_embedding_key
    from lib.reembed import output, quality, report
    from lib.reembed.assess import missing_if_current
    from lib.reembed.context import is_fresh
    from lib.reembed.embed import EmbeddingTotals
    from lib.reembed.run import only_missing, only_stage, reembed, try_one_batch

    explicit = args.fresh or args.only_missing or args.limit or is_fresh(ctx)
    if not explicit and (missing := missing_if_current(ctx, found)):
        return output.show_current(missing, ctx, console)
    output.show_plan(found, ctx, console, limit=args.limit)
    refused = output.warn_of_refusals(found, ctx, console) if args.dry_run else []
    require_embedding_key(config)
    paid = EmbeddingTotals(ctx.cache, ctx.spec, found.journal, logged=not args.only_missing)
    pace = (args.workers, args.batch_size, args.max_cost)
    with connect.open_runner(config, paid, pace, console, sample=args.dry_run) as runner:
        if args.dry_run:
            tried = try_one_batch(ctx, runner, repair=args.only_missing)
            return output.show_tried(tried, found, ctx, refused, console)
        if args.limit:
            done = quality.spot_check(ctx, runner, found.live.state, args.limit)
            return output.show_spot_check(done, found, paid, ctx, console)
        runner.require_affordable(found.missing.tokens)
        if args.only_missing:
            return output.show_synced(only_missing(ctx, runner), paid, ctx, console)
        if args.no_switch:
            return output.show_staged(only_stage(ctx, found, runner), paid, ctx, console)
        announce = partial(output.announce, ctx, console)
        write = partial(report.write, folder=ctx.folder, console=console)
        finished, files = reembed(ctx, found, runner, announce, write)
        return output.show_reembedded(finished, found, files, ctx, console)


if __name__ == "__main__":
    raise SystemExit(main())
