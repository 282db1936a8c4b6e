#!/usr/bin/env python3
"""Re-embed every memory with EMBEDDING_MODEL at VECTOR_SIZE: planned, resumable, never paid for twice."""

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
    from lib.steps.embed import Buyer
    from lib.steps.migration import Migration
    from lib.vectors.collection import CollectionState


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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, then run behind the error boundary."""
    args = arguments().parse_args(argv)
    return cli.run(lambda: command(args), as_json=args.json)


def command(args: argparse.Namespace) -> int:
    """Check the settings without a network, then do the work under the lock."""
    from lib.config import config_of, require_openai_key
    from lib.console import Console
    from lib.dimensions import check_model, model_fault
    from lib.showing.settings import announce, show_config

    config = config_of(args.env_file, args.backup_dir)
    console = Console(as_json=args.json, quiet=args.quiet, verbose=args.verbose)
    if args.show_config:
        return show_config(config, console)
    announce(config, console)
    cli.refuse_together(args, "--only-missing", "--limit", "--prune-spool", "--fresh")
    cli.refuse_together(args, "--dry-run", "--limit", "--fresh")
    cli.refuse_together(args, "--no-switch", "--in-place", "--only-missing", "--limit")
    if args.prune_spool:
        return prune(config, console, dry_run=args.dry_run)
    require_openai_key(config)
    fault = model_fault(config.embedding_model, config.vector_size)
    if fault and args.dry_run:
        console.warn(fault)
    else:
        check_model(config.embedding_model, config.vector_size)
    from lib import opening

    with opening.target_lock(config):
        return reembed(config, console, args)


def prune(config: Config, console: Console, *, dry_run: bool) -> int:
    """Delete from the spool what no plan needs."""
    from lib import opening
    from lib.showing.spool import show_pruned
    from lib.steps.prune_spool import prune_spool

    with opening.target_lock(config), opening.open_spool(config) as spool:
        return show_pruned(prune_spool(spool, config.backup_dir, dry_run=dry_run), console, dry_run=dry_run)


def reembed(config: Config, console: Console, args: argparse.Namespace) -> int:
    """Open, plan, and go the way that was asked for."""
    from lib import opening
    from lib.dimensions import check_dimension
    from lib.showing import reembed as showing
    from lib.steps import migrate, situation, spot_check
    from lib.steps.drift import only_missing
    from lib.steps.embed import try_one_batch
    from lib.steps.migration import Migration
    from lib.steps.open_run import open_run
    from lib.steps.switch import Target
    from lib.steps.take_collection import require_whole
    from lib.steps.take_pair import require_sources
    from lib.vectors.collection import get_state

    graph, source = opening.open_graph(config, console.warn), opening.open_collection(config)
    require_sources(graph, source if args.only_missing else None)
    if args.only_missing:
        now = get_state(source.qdrant, config.collection)
        check_dimension(config.collection, now.size, config.vector_size)
    with opening.open_spool(config) as spool:
        target, bar = Target(source.qdrant, config.collection, config.spec), console.progress
        run = Migration(graph, target, spool, config.backup_dir, config.targets(), bar)
        spot_check.clear_up(run)
        run.in_place, run.no_switch = args.in_place, args.no_switch
        run.journal = open_run(run.folder, run.targets, run.spec)
        run.fresh = args.fresh and not migrate.is_fresh(run)
        plan, kind, live = situation.look(run, repair=args.only_missing)
        if live is not None:
            require_whole(source)
        showing.show_plan(plan, kind, run, console)
        pace = (args.workers, args.batch_size, args.max_cost, console.say)
        buyer = opening.open_buyer(config, *pace, sample=args.dry_run)
        if args.dry_run:
            return showing.show_tried(try_one_batch(buyer, spool, run.bought.log), plan, run, console)
        if args.limit:
            return showing.show_spot_check(spot_check.spot_check(run, buyer, live, args.limit), run, console)
        buyer.require_affordable(plan.tokens, run.bought)
        if args.only_missing:
            return showing.show_drift(only_missing(run, buyer, live or now), run, console)
        return replace(run, buyer, (kind, live), console)


def replace(run: Migration, buyer: Buyer, found: tuple[str, CollectionState | None], console: Console) -> int:
    """Embed, then make the collection anew."""
    from lib.showing import exchange
    from lib.showing import reembed as showing
    from lib.steps import migrate
    from lib.steps.embed import buy_missing
    from lib.steps.situation import protection

    manifest = None if run.no_switch else protection(run, *found)
    if run.fresh:
        migrate.forget_bought(run, buyer)
    buy_missing(buyer, run.spool, run.bar, run.bought)
    migrate.begin(run, manifest, voice := exchange.voice(run, console))
    if run.no_switch:
        return exchange.show_staged(migrate.only_stage(run, buyer), run, console)
    return showing.show_migrated(migrate.migrate(run, buyer, manifest, voice).outcome, run, console)


if __name__ == "__main__":
    raise SystemExit(main())
