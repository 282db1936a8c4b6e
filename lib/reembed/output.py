"""What reembed_embeddings.py prints: the plan with its price, the result, the way back."""

from __future__ import annotations

import dataclasses
from shlex import quote
from typing import TYPE_CHECKING

from lib.console import Console, size_text, table
from lib.dimensions import UNKNOWN_MODEL, public_url
from lib.errors import DONE, REMAINING, listed, one_line
from lib.show_config import RESTART

if TYPE_CHECKING:
    from lib.backup.manifest import Manifest
    from lib.clients.embeddings.cache import Missing
    from lib.clients.embeddings.prune import Pruned
    from lib.clients.qdrant.collection import CollectionState
    from lib.config import Config
    from lib.reembed.assess import Found
    from lib.reembed.cutover import Callbacks
    from lib.reembed.embed import Tried
    from lib.reembed.migration import Migration
    from lib.reembed.only_missing import Drifted
    from lib.reembed.plan import Plan
    from lib.reembed.spot_check import SpotCheck
    from lib.reembed.sync import SyncOutcome


def prune(config: Config, console: Console, *, dry_run: bool) -> int:
    """Delete from the embedding cache what no plan needs."""
    from lib import connect
    from lib.clients.embeddings.prune import prune_cache

    with connect.open_cache(config) as cache:
        return show_pruned(prune_cache(cache, config.backup_dir, dry_run=dry_run), console, dry_run=dry_run)


def show_pruned(done: Pruned, console: Console, *, dry_run: bool) -> int:
    """The result of --prune-spool."""
    rows = [
        (
            one.spec.model,
            f"{one.spec.size}d",
            public_url(one.spec.base_url),
            f"{one.vectors:,}",
            f"{one.unneeded:,}",
        )
        for one in done.stored
    ]
    gone = sum(one.unneeded for one in done.stored) if dry_run else done.removed
    size = sum(one.unneeded_bytes for one in done.stored)
    text = f"{table(rows, ('model', 'size', 'endpoint', 'vectors', 'unneeded'))}\n\n" if rows else ""
    if dry_run:
        text += (
            f"dry run: {gone:,} vectors ({size_text(size)}) are needed by no plan here; nothing was deleted"
        )
    else:
        sizes = f"the embedding cache is {size_text(done.bytes_after)}, was {size_text(done.bytes_before)}"
        text += f"{gone:,} vectors deleted; {sizes}"
        if gone and not done.shrunk:
            text += (
                "\nthe disk has no room to shrink the file now: the next purchases fill what is free in it"
            )
    document = {
        "dry_run": dry_run,
        "removed": done.removed,
        "unneeded": sum(one.unneeded for one in done.stored),
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "stored": [dataclasses.asdict(one) for one in done.stored],
    }
    console.result(document, text)
    return DONE


_EXAMPLES = 10
_FEW = 3


def dollars(price: float | None) -> str:
    """A price in US dollars, or that none is known."""
    return "unknown (no list price for this model)" if price is None else f"${price:.4f}"


def show_plan(plan: Plan, kind: str, run: Migration, console: Console, *, limit: int | None = None) -> None:
    """Where an unfinished run is gone on with; what a re-embedding will do, cost and leave out."""
    from lib.clients.embeddings.pricing import PRICES_AS_OF
    from lib.reembed.assess import ABSENT, ADOPT, DEAD, REPLACE
    from lib.reembed.resume import going_on

    if run.journal:
        console.notice(going_on(run.journal))
    now = f"{plan.live_size}d, {plan.live_points:,} points" if plan.live_size else kind
    make = "delete it, make it anew" if run.in_place else f"stage {run.staged}, exchange the two"
    make = f"stage {run.staged}, stop there" if run.no_switch else make
    what = {ABSENT: "create it", ADOPT: "bring it level", REPLACE: make, DEAD: "delete it, make it anew"}[
        kind
    ]
    if limit:
        what = f"only read it: the check of {min(limit, plan.scan.usable):,} memories gets a collection of its own"
    rows = [
        ("memories", f"{plan.scan.memories:,} in the graph, {plan.scan.usable:,} to have a point"),
        ("collection", f"{now}; to do: {what} at {plan.spec.size}d with {plan.spec.model}"),
        ("to embed", f"{plan.texts:,} texts, {plan.tokens:,} tokens; {plan.cached:,} need no purchase"),
        ("price", f"{dollars(plan.price)} (list prices of {PRICES_AS_OF})"),
        ("embedding cache", f"{size_text(run.cache.size_bytes())} in {run.cache.path.parent}"),
        ("server's disk", f"up to {size_text(plan.disk_peak)}, the old collection among it"),
    ]
    console.say(table(rows))
    _show_left_out(plan, kind, run, console)


def _show_left_out(plan: Plan, kind: str, run: Migration, console: Console) -> None:
    """Memories whose text is not embedded as it is, and points that leave the collection."""
    from lib.clients.qdrant.transport import curl_line
    from lib.reembed.assess import REPLACE

    if plan.scan.too_long:
        some = listed(plan.scan.too_long_examples[:_EXAMPLES])
        console.warn(
            f"{plan.scan.too_long:,} longer than the model takes, embedded without their end: {some}"
        )
    for reason, count in plan.scan.skipped.items():
        names = [name for name, why in plan.scan.examples if why == reason][:_FEW]
        console.say(f"skipped, {reason}: {count:,} ({listed(names)}{', ...' if count > len(names) else ''})")
    for one, reason in plan.scan.odd[:_EXAMPLES]:
        console.say(f"memory {one}: {reason}; embedding the text that its point has, or what is readable")
    if run.unlike:
        drop = curl_line(run.target.qdrant, "DELETE", run.target.collection)
        console.warn(
            f"'{run.target.collection}' is empty, and its settings or indexes are not those of {run.unlike}: it keeps"
            f" its own. To have the backup's, delete it, then run this command again:\n  {drop}"
        )
    if run.textless and kind == REPLACE:
        console.warn(
            f"{len(run.textless)} point(s) leave the collection though their memory exists: neither has a text to"
            f" embed ({listed(run.textless[:_EXAMPLES])}); they stay in the backup"
        )
    if plan.only_live and kind == REPLACE:
        some = listed(plan.only_live_examples[:_EXAMPLES])
        console.warn(
            f"{plan.only_live} point(s) have no memory in the graph: they stay in the backup and leave the"
            f" collection ({some})"
        )


def warn_of_refusals(run: Migration, found: Found, console: Console) -> list[str]:
    """What the real run would be refused for: --dry-run says it before anything is paid for.

    Each is a warning, but for the model's, which was one before the stores were asked.
    """
    from lib.dimensions import model_fault
    from lib.errors import GuardRefused
    from lib.reembed.assess import protection

    fault = model_fault(run.spec.model, run.spec.size)
    reasons = [fault] if fault else []
    try:
        protection(run, *found)
    except GuardRefused as error:
        reasons.append(f"{error}\nfirst:  {error.next_step.splitlines()[0]}")
        console.warn(f"the run without --dry-run will be refused: {reasons[-1]}")
    return reasons


def _plan_document(plan: Plan, run: Migration) -> dict[str, object]:
    scan = plan.scan
    return {
        "memories": scan.memories,
        "usable": scan.usable,
        "skipped": dict(scan.skipped),
        "skipped_examples": [{"id": one, "reason": reason} for one, reason in scan.examples],
        "too_long": scan.too_long_examples,
        "odd": [{"id": one, "reason": reason} for one, reason in scan.odd],
        "textless": run.textless,
        "settings_unlike": run.unlike or None,
        "model": plan.spec.model,
        "size": plan.spec.size,
        "texts": plan.texts,
        "tokens": plan.tokens,
        "price": plan.price,
        "need_no_purchase": plan.cached,
        "spool_bytes": run.cache.size_bytes(),
        "live": {"size": plan.live_size, "points": plan.live_points},
        "only_live": plan.only_live,
        "disk_peak": plan.disk_peak,
    }


def show_tried(tried: Tried, plan: Plan, run: Migration, refused: list[str], console: Console) -> int:
    """The outcome of --dry-run."""
    text = f"dry run: {tried.texts} texts embedded at {tried.size}d, {tried.tokens:,} tokens ({tried.note})"
    if tried.expected:
        text += f"\nthe other {tried.left.texts:,} texts take about {tried.expected.text}"
    document = {
        "plan": _plan_document(plan, run),
        "dry_run": dataclasses.asdict(tried),
        "left": dataclasses.asdict(tried.left),
        "will_be_refused": refused,
    }
    console.result(document, text)
    return DONE


def _remaining(outcome: SyncOutcome, run: Migration, console: Console) -> int:
    for refused in run.bought.refused:
        console.warn(f"memory {refused.label} was not embedded: {refused.reason}")
    for rejected in outcome.rejected:
        console.warn(
            f"memory {one_line(str(rejected.id))} was rejected by Qdrant: {one_line(rejected.reason)}"
        )
    for label in run.bought.cut:
        console.warn(f"memory {label} is longer than the model takes: its end was cut for the vector")
    for identity, reason in run.odd:
        console.warn(
            f"memory {identity}: {reason}; its point keeps the text that it had, or holds what is readable"
        )
    for identity in run.textless:
        console.warn(f"memory {identity} exists, but neither it nor its point has a text: its point is gone")
    for alias in run.aliases_taken:
        console.warn(f"alias '{alias}' was taken by another collection meanwhile: it was left there")
    if not run.indexed:
        console.warn(
            "the index is not whole after an hour: look at the collection's status, search is slower"
        )
    left = run.bought.refused or outcome.rejected or run.odd or run.textless or run.aliases_taken
    return REMAINING if left or not run.indexed else DONE


def show_migrated(outcome: SyncOutcome, run: Migration, console: Console) -> int:
    """The result of a re-embedding, with the way back, the next steps and where the report is."""
    from lib.reembed.report import points_in_place

    code = _remaining(outcome, run, console)
    price = run.bought.price(run.spec.model)
    points = points_in_place(run, outcome)
    document = {
        "collection": run.target.collection,
        "size": run.spec.size,
        "model": run.spec.model,
        "points": points,
        "bought": {"texts": run.bought.texts, "tokens": run.bought.tokens, "price": price},
        "mended": run.mended,
        "removed": run.removed,
        "absent_seconds": round(run.absent_seconds, 3),
        "way": run.way,
        "refused": [dataclasses.asdict(one) for one in run.bought.refused],
        "cut": run.bought.cut,
        "rejected": [dataclasses.asdict(one) for one in outcome.rejected],
        "odd": [{"id": one, "reason": reason} for one, reason in run.odd],
        "textless": run.textless,
        "aliases_taken": run.aliases_taken,
        "indexed": run.indexed,
        "undo": run.undo,
        "report": run.report,
    }
    text = (
        f"'{run.target.collection}' is {run.spec.size}d now: {points:,} points, every vector compared.\n"
        f"Bought {run.bought.texts:,} texts, {run.bought.tokens:,} tokens, {dollars(price)}."
        f" The collection was absent or incomplete for {run.absent_seconds:.1f} s"
        f"{f' ({run.way})' if run.way else ''}.\n\n"
        f"undo:\n{run.undo}\n\nnext:\n{RESTART}\n"
        "  python scripts/reembed_embeddings.py --only-missing   # what was written meanwhile\n"
        "  python scripts/verify_migration.py --after-restart"
    )
    console.result(document, "\n\nreport:\n  ".join([text, *map(str, run.report[-1:])]))
    return code


def show_made(lacking: Missing, run: Migration, console: Console) -> int:
    """The collection already is what the settings ask for; exit code 3 if some memories have no point of their text."""
    name, what = run.target.collection, f"{run.spec.size}d {run.spec.model}"
    text = f"'{name}' is already {what}: nothing was bought, nothing was changed."
    if lacking.texts:
        text += f"\n{lacking.texts:,} texts of the graph are not in it (new or changed memories)."
    text += (
        "\n\nto add and repair points (pays only for what is new):\n"
        "  python scripts/reembed_embeddings.py --only-missing\n"
        "to buy every embedding again:\n"
        "  python scripts/reembed_embeddings.py --fresh"
    )
    document = {
        "collection": name,
        "already": True,
        "size": run.spec.size,
        "model": run.spec.model,
        "bought": {"texts": 0, "tokens": 0},
        "lacking": dataclasses.asdict(lacking),
    }
    console.result(document, text)
    return REMAINING if lacking.texts else DONE


def show_spot_check(done: SpotCheck, run: Migration, console: Console) -> int:
    """The result of --limit; the exit code says whether every memory of the sample got its point."""
    code = _remaining(done.outcome, run, console)
    document = {
        "memories": done.memories,
        "points": done.outcome.added,
        "bought": {"texts": run.bought.texts, "tokens": run.bought.tokens},
        "recall": done.compared and dataclasses.asdict(done.compared),
        "refused": [dataclasses.asdict(one) for one in run.bought.refused],
        "rejected": [dataclasses.asdict(one) for one in done.outcome.rejected],
    }
    seen, name = done.compared, run.target.collection
    recall = f"nothing to compare, '{name}' holds no vectors of these memories"
    if seen:
        recall = (
            f"of the {seen.neighbours} nearest in the sample {seen.overlap:.0%} are the same as in '{name}'"
            f" ({seen.queries} queries); median score of the nearest {seen.live_score:.3f} there,"
            f" {seen.side_score:.3f} here"
        )
    text = (
        f"spot check: {done.outcome.added} of {done.memories} memories at {run.spec.size}d with {run.spec.model};"
        f" {run.bought.texts} texts bought, {run.bought.tokens:,} tokens\nrecall: {recall}\n"
        f"The side collection is gone, '{name}' was only read. What was bought is in the embedding cache."
    )
    console.result(document, text)
    return code


def show_drift(done: Drifted, run: Migration, console: Console) -> int:
    """The result of --only-missing."""
    code = _remaining(done.outcome, run, console)
    one = done.outcome
    text = (
        f"'{run.target.collection}': {one.added} point(s) added, {one.changed} renewed,"
        f" {one.payloads} payload(s) renewed, {run.mended} vector(s) mended, {done.removed} surplus removed"
    )
    document = {
        "added": one.added,
        "changed": one.changed,
        "payloads": one.payloads,
        "mended": run.mended,
        "removed": done.removed,
        "bought": {"texts": run.bought.texts, "tokens": run.bought.tokens},
    }
    console.result(document, text)
    return code


_ONLY_MISSING = "python scripts/reembed_embeddings.py --only-missing"


def callbacks(run: Migration, console: Console) -> Callbacks:
    """What is said right before the live collection is deleted, also when quiet; and how the report is written."""
    from lib.reembed.cutover import Callbacks
    from lib.reembed.report_page import write

    def announce(undo: str) -> None:
        name = run.target.collection
        console.notice(f"\nreplacing '{name}' now. To undo:\n{undo}\nTo go on after a crash: this command.\n")

    return Callbacks(undo_of, announce, lambda report: write(report, run.folder, console))


def show_staged(state: CollectionState | None, run: Migration, console: Console) -> int:
    """The result of --no-switch, with the way on and the way back."""
    if state is None:
        console.result(
            {"staged": None}, f"'{run.target.collection}' is what it should be: nothing was staged"
        )
        return DONE
    drop = "  python scripts/reembed_embeddings.py --abort"
    price = run.bought.price(run.spec.model)
    document = {
        "staged": run.staged,
        "size": run.spec.size,
        "model": run.spec.model,
        "points": state.points,
        "bought": {"texts": run.bought.texts, "tokens": run.bought.tokens, "price": price},
        "refused": [dataclasses.asdict(one) for one in run.bought.refused],
        "undo": drop,
    }
    text = (
        f"'{run.staged}' stands beside '{run.target.collection}': {state.points:,} points, {run.spec.size}d, every"
        f" vector compared. Bought {run.bought.texts:,} texts, {run.bought.tokens:,} tokens, {dollars(price)}.\n\n"
        f"to go on (after days, too; what changes meanwhile is caught up):\n"
        f"  python scripts/reembed_embeddings.py\nto drop it (what was bought stays in the embedding cache):\n{drop}"
    )
    console.result(document, text)
    return REMAINING if run.bought.refused else DONE


def undo_of(manifest: Manifest | None) -> str:
    """The way back from a re-embedding: the collection's half of the backup; the graph was not changed."""
    if manifest is None or manifest.collection is None:
        return "  (none: no collection was replaced)"
    component = manifest.collection
    lines = [
        f"  python scripts/restore_from_backup.py {quote(str(manifest.file_of(component)))}",
        f"  export VECTOR_SIZE={component.size}",
        f"  export EMBEDDING_MODEL={quote(component.model)}",
        f"  {_ONLY_MISSING}",
    ]
    if (
        component.model == UNKNOWN_MODEL
    ):  # with the model of the new vectors it would add vectors of another kind
        lines[2:] = [
            "  # The backup does not know the model of the old vectors. Set it, then add newer memories:",
            "  # export EMBEDDING_MODEL=...",
            f"  # {_ONLY_MISSING}",
        ]
    return "\n".join(lines)
