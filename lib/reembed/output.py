"""What reembed_embeddings.py prints: the plan with its price, the result, how to undo it, the next steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.backup.catalog import newest_with
from lib.backup.manifest import UNVERIFIED
from lib.clients.embeddings.cache import Missing
from lib.clients.embeddings.cache_file import Pruned
from lib.clients.embeddings.pricing import FREE, price_basis, price_text
from lib.clients.qdrant.collection import CollectionState
from lib.clients.qdrant.transport import curl_line
from lib.console import Console, age_text, size_text, table
from lib.dimensions import EmbeddingSpec, model_fault, native_size_fault, public_url
from lib.errors import DONE, REMAINING, GuardRefused, listed, one_line
from lib.network import is_this_machine
from lib.reembed.assess import ABSENT, ADOPT, FAILED, REPLACE, Assessment, require_protection, require_removable
from lib.reembed.context import Context, other_settings_notices, resume_notice
from lib.reembed.embed import EmbeddingTotals
from lib.reembed.plan import Scan
from lib.reembed.quality import SpotCheck
from lib.reembed.report import Finished
from lib.reembed.sync import SyncOutcome
from lib.show_config import chosen, restart_lines

if TYPE_CHECKING:
    from lib.reembed.run import Synced, Tried

_EXAMPLES = 10
_FEW = 3
_COMMAND = "python scripts/reembed_embeddings.py"


def show_pruned(done: Pruned, console: Console, *, dry_run: bool) -> int:
    """Print the result of --prune-spool."""
    rows = [
        (one.spec.model, f"{one.spec.size}d", public_url(one.spec.base_url), f"{one.vectors:,}", f"{one.unneeded:,}")
        for one in done.stored
    ]
    unneeded = sum(one.unneeded for one in done.stored)
    text = f"{table(rows, ('model', 'size', 'endpoint', 'vectors', 'unneeded'))}\n\n" if rows else ""
    if dry_run:
        size = size_text(sum(one.unneeded_bytes for one in done.stored))
        text += f"dry run: {unneeded:,} vectors ({size}) are needed by no plan here; nothing was deleted"
    else:
        sizes = f"the embedding cache is {size_text(done.bytes_after)}, was {size_text(done.bytes_before)}"
        text += f"{done.removed:,} vectors deleted; {sizes}"
        if done.removed and not done.shrunk:
            text += "\nthe disk has no room to shrink the file now: new vectors will use the free space in it"
    document = {
        "dry_run": dry_run,
        "unneeded": unneeded,
        **_of(done, "removed", "bytes_before", "bytes_after"),
        "stored": [dataclasses.asdict(one) for one in done.stored],
    }
    console.result(document, text)
    return DONE


def show_plan(assessment: Assessment, ctx: Context, console: Console, *, limit: int | None = None) -> None:
    """Print how far an unfinished run came; what a run will do, cost and leave out."""
    if assessment.journal:
        console.notice(resume_notice(assessment.journal))
    if not assessment.repair:
        for text in other_settings_notices(ctx):
            console.warn(text)
    spec, live, missing, scan = ctx.spec, assessment.live.state, assessment.missing, assessment.scan
    now = f"{live.size}d, {live.points:,} points" if live else assessment.live.kind
    action = f"{_action(assessment, ctx, limit)} at {spec.size}d with {spec.model}"
    texts = f"{missing.texts:,} texts, {missing.tokens:,} tokens"
    stores = f"{ctx.graph.address.display}/{ctx.graph.graph} -> Qdrant {ctx.qdrant.display}/{ctx.collection}"
    rows = [
        ("stores", f"FalkorDB {stores}"),
        ("backup", _newest_backup(ctx)),
        ("model", chosen(spec, ctx.reason)),
        ("memories", f"{scan.memories:,} in the graph, {scan.usable:,} to have a point"),
        ("collection", f"{now}; plan: {action}"),
        ("to embed", f"{texts}; {assessment.cached:,} already cached or duplicates"),
        ("price", price_text(assessment.price, spec.provider) + price_basis(assessment.price, spec.provider)),
        ("embedding cache", f"{size_text(ctx.cache.size_bytes())} in {ctx.cache.path.parent}"),
        ("server's disk", f"up to {size_text(assessment.disk_peak)}, including the old collection"),
    ]
    console.say(table(rows))
    fault = native_size_fault(spec)
    if fault and is_this_machine(spec.base_url):
        console.warn(f"{fault}, unless this endpoint on this machine is a proxy that shortens them")
    _show_left_out(assessment, ctx, console)


def _newest_backup(ctx: Context) -> str:
    backup = newest_with(ctx.folder, ctx.collection, ctx.qdrant.display)
    if backup is None:
        return f"none of this collection in {ctx.folder}"
    unverified = ", not verified: no re-embed relies on it" if backup.proof == UNVERIFIED else ""
    return f"{backup.name}, {age_text(backup.age_hours)} old{unverified}"


def _action(assessment: Assessment, ctx: Context, limit: int | None) -> str:
    if limit:
        memories = min(limit, assessment.scan.usable)
        return f"only read it: the check of {memories:,} memories uses a temporary collection"
    recreate = "delete and recreate it"
    actions = {ABSENT: "create it", ADOPT: "sync it with the graph", FAILED: recreate}
    if assessment.live.kind in actions:
        return actions[assessment.live.kind]
    if ctx.no_switch:
        return f"build {ctx.staged}, stop there"
    return recreate if assessment.in_place else f"build {ctx.staged}, then swap it in"


def _show_left_out(assessment: Assessment, ctx: Context, console: Console) -> None:
    """Print memories whose text is not embedded as it is, and points that leave the collection."""
    scan = assessment.scan
    if scan.too_long:
        some = listed(scan.too_long_examples[:_EXAMPLES])
        console.warn(f"{scan.too_long:,} longer than the model takes, embedded without their end: {some}")
    for reason, count in scan.skipped.items():
        names = [name for name, why in scan.examples if why == reason][:_FEW]
        console.say(f"skipped, {reason}: {count:,} ({listed(names)}{', ...' if count > len(names) else ''})")
    for one, reason in scan.odd[:_EXAMPLES]:
        console.say(f"memory {one}: {reason}; embedding the text that its point has, or what is readable")
    if assessment.unlike:
        drop = curl_line(ctx.qdrant, "DELETE", ctx.collection)
        console.warn(
            f"'{ctx.collection}' is empty, and its settings or indexes are not those of {assessment.unlike}: it keeps"
            f" its own. To have the backup's, delete it, then run this command again:\n  {drop}"
        )
    if assessment.textless and assessment.live.kind == REPLACE:
        console.warn(
            f"points that leave the collection although their memory exists: {len(assessment.textless)}"
            f" ({listed(assessment.textless[:_EXAMPLES])}). Neither has a text to embed. They stay in the backup"
        )
    if assessment.only_live and (assessment.live.kind == REPLACE or assessment.repair):
        some = listed(assessment.only_live_examples[:_EXAMPLES])
        console.warn(
            f"points without a memory in the graph: {assessment.only_live} ({some}). They leave the collection and stay"
            f" in the {'embedding cache' if assessment.repair else 'backup'}"
        )


def warn_of_refusals(assessment: Assessment, ctx: Context, console: Console) -> list[str]:
    """Return what the run without --dry-run will be refused for; print all but the model's fault, which was printed."""
    fault = model_fault(ctx.spec.model, ctx.spec.size, ctx.spec.provider)
    reasons = [fault] if fault else []
    try:
        require_protection(ctx, assessment.journal, assessment.live)
        if assessment.repair and assessment.live.state:
            require_removable(ctx, assessment.live.state)
    except GuardRefused as error:
        reasons.append(f"{error}\nfirst:  {error.next_step.splitlines()[0]}")
        console.warn(f"the run without --dry-run will be refused: {reasons[-1]}")
    return reasons


def show_tried(tried: Tried, assessment: Assessment, ctx: Context, refused: list[str], console: Console) -> int:
    """Print the outcome of --dry-run."""
    scan, spec, live = assessment.scan, ctx.spec, assessment.live.state
    plan = {
        **_of(scan, "memories", "usable"),
        "skipped": dict(scan.skipped),
        "skipped_examples": _reasons(scan.examples),
        "too_long": scan.too_long_examples,
        "odd": _reasons(scan.odd),
        "textless": assessment.textless,
        "settings_unlike": assessment.unlike or None,
        **_of(spec, "provider", "model", "size"),
        "endpoint": public_url(spec.base_url),
        "why": ctx.reason,
        **dataclasses.asdict(assessment.missing),
        "price": assessment.price,
        "need_no_purchase": assessment.cached,
        "spool_bytes": ctx.cache.size_bytes(),
        "live": {"size": live.size if live else None, "points": live.points if live else 0},
        **_of(assessment, "only_live", "disk_peak"),
    }
    text = f"dry run: {tried.texts} texts embedded at {tried.size}d, {tried.tokens:,} tokens ({tried.note})"
    if tried.expected:
        text += f"\nthe other {tried.left.texts:,} texts take about {tried.expected.text}"
    both = {"dry_run": dataclasses.asdict(tried), "left": dataclasses.asdict(tried.left)}
    console.result({"plan": plan, **both, "will_be_refused": refused}, text)
    return DONE


def _of(record: object, *names: str) -> dict[str, object]:
    return {name: getattr(record, name) for name in names}


def _reasons(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"id": one, "reason": reason} for one, reason in pairs]


def show_current(missing: Missing, ctx: Context, console: Console) -> int:
    """Print that the collection has the model and size already. Returns 3 if memories have no point of their text."""
    text = f"'{ctx.collection}' is already {ctx.spec.size}d {ctx.spec.model}: nothing was paid for or changed."
    if missing.texts:
        text += f"\n{missing.texts:,} texts of the graph are not in it (new or changed memories)."
    text += (
        f"\n\nto add and repair points (pays only for what is new):\n  {_COMMAND} --only-missing\n"
        f"to pay for every embedding again:\n  {_COMMAND} --fresh"
    )
    document = {
        **_of(ctx, "collection"),
        "already": True,
        **_of(ctx.spec, "size", "model"),
        "bought": {"texts": 0, "tokens": 0},
        "lacking": dataclasses.asdict(missing),
    }
    console.result(document, text)
    return REMAINING if missing.texts else DONE


def announce(ctx: Context, console: Console, undo: str) -> None:
    """Print, also when quiet, that the live collection is deleted now, and the commands that undo it."""
    console.notice(f"\nreplacing '{ctx.collection}' now. To undo:\n{undo}\nAfter a crash, run this command again.\n")


def show_reembedded(done: Finished, assessment: Assessment, report: list[Path], ctx: Context, console: Console) -> int:
    """Print the result, how to undo it, the next steps and where the report is."""
    left = _warn_of_memories(done.paid, done.outcome, done.scan.odd, assessment.textless, console)
    for alias in done.aliases_taken:
        console.warn(f"alias '{alias}' was taken by another collection meanwhile: it was left there")
    if not done.indexed:
        console.warn("the index is not complete: look at the collection's status, search is slower")
    spec = ctx.spec
    document = {
        "collection": ctx.collection,
        **_of(spec, "size", "model"),
        "points": done.points,
        "bought": _of(done.paid, "texts", "tokens", "price"),
        "mended": done.repaired,
        "removed": done.removed,
        "absent_seconds": round(done.absent_seconds, 3),
        "way": done.method,
        "skipped": dict(done.scan.skipped),
        **_left_out(done.paid, done.outcome),
        "cut": done.paid.cut,
        "odd": _reasons(done.scan.odd),
        "textless": assessment.textless,
        **_of(done, "aliases_taken", "indexed", "undo"),
        "report": report,
    }
    text = (
        f"'{ctx.collection}' is {spec.size}d now: {done.points:,} points, every vector compared.\n{_skipped(done.scan)}"
        f"{_paid_text(done.paid, spec)} The collection was absent or incomplete for"
        f" {'at most ' if done.absent_at_most else ''}{done.absent_seconds:,.1f} s"
        f"{f' ({done.method})' if done.method else ''}.\n\n"
        f"undo:\n{done.undo}\n\nnext:\n{restart_lines(spec.provider, named=bool(ctx.reason))}\n"
        f"  then add what was written meanwhile, and verify:\n  {_COMMAND} --only-missing\n"
        "  python scripts/verify_migration.py --after-restart"
    )
    console.result(document, "\n\nreport:\n  ".join([text, *map(str, report[-1:])]))
    return REMAINING if left or done.aliases_taken or not done.indexed else DONE


def _warn_of_memories(
    paid: EmbeddingTotals, outcome: SyncOutcome, odd: list[tuple[str, str]], textless: Sequence[str], console: Console
) -> bool:
    """Print the memories that got no point, or one of another text. Returns whether there are any."""
    for text in paid.refused:
        console.warn(f"memory {text.label} was not embedded: {text.reason}")
    for one in outcome.rejected:
        console.warn(f"memory {one_line(str(one.id))} was rejected by Qdrant: {one_line(one.reason)}")
    for label in paid.cut:
        console.warn(f"memory {label} is longer than the model takes: its end was cut for the vector")
    for identity, reason in odd:
        console.warn(f"memory {identity}: {reason}; its point keeps its text, or holds what is readable")
    for identity in textless:
        console.warn(f"memory {identity} exists, but neither it nor its point has a text: it gets no point")
    return bool(paid.refused or outcome.rejected or odd or textless)


def _skipped(scan: Scan) -> str:
    """Return a line about the memories that cannot be embedded, which no exit code reports; "" if there is none."""
    counts = listed(f"{count:,} ({reason})" for reason, count in scan.skipped.items())
    return f"Not embedded: {counts}. The report lists them.\n" if counts else ""


def _left_out(paid: EmbeddingTotals, outcome: SyncOutcome) -> dict[str, object]:
    refused = [dataclasses.asdict(one) for one in paid.refused]
    return {"refused": refused, "rejected": [dataclasses.asdict(one) for one in outcome.rejected]}


def _paid_text(paid: EmbeddingTotals, spec: EmbeddingSpec) -> str:
    verb, price = "Embedded" if spec.provider in FREE else "Paid for", price_text(paid.price, spec.provider)
    return f"{verb} {paid.texts:,} texts, {paid.tokens:,} tokens, {price}."


def show_staged(state: CollectionState | None, paid: EmbeddingTotals, ctx: Context, console: Console) -> int:
    """Print the result of --no-switch, how to continue and how to undo it."""
    if state is None:
        text = f"'{ctx.collection}' has this model and size already: nothing was staged"
        text += f". {_paid_text(paid, ctx.spec)}" if paid.tokens else ""
        console.result({"staged": None, "bought": _of(paid, "texts", "tokens", "price")}, text)
        return DONE
    drop = f"  {_COMMAND} --abort"
    document = {
        "staged": ctx.staged,
        **_of(ctx.spec, "size", "model"),
        "points": state.points,
        "bought": _of(paid, "texts", "tokens", "price"),
        "refused": [dataclasses.asdict(one) for one in paid.refused],
        "undo": drop,
    }
    text = (
        f"'{ctx.staged}' is complete: {state.points:,} points, {ctx.spec.size}d, every vector compared;"
        f" '{ctx.collection}' is unchanged. {_paid_text(paid, ctx.spec)}\n\n"
        f"to continue (also after days; changes meanwhile are caught up):\n  {_COMMAND}\n"
        f"to drop it (its vectors stay in the embedding cache):\n{drop}"
    )
    console.result(document, text)
    return REMAINING if paid.refused else DONE


def show_spot_check(
    done: SpotCheck, assessment: Assessment, paid: EmbeddingTotals, ctx: Context, console: Console
) -> int:
    """Print the result of --limit."""
    left = _warn_of_memories(paid, done.outcome, assessment.scan.odd, assessment.textless, console)
    document = {
        "memories": done.memories,
        "points": done.outcome.added,
        "bought": _of(paid, "texts", "tokens"),
        "recall": done.compared and dataclasses.asdict(done.compared),
        **_left_out(paid, done.outcome),
    }
    seen, name = done.compared, ctx.collection
    recall = f"nothing to compare, '{name}' holds no vectors of these memories"
    if seen:
        recall = (
            f"of the {seen.neighbours} nearest in the sample {seen.overlap:.0%} are the same as in '{name}'"
            f" ({seen.queries} queries); median score of the nearest {seen.live_score:.3f} there,"
            f" {seen.side_score:.3f} here"
        )
    text = (
        f"spot check: {done.outcome.added} of {done.memories} memories at {ctx.spec.size}d with {ctx.spec.model};"
        f" paid for {paid.texts} texts, {paid.tokens:,} tokens\nrecall: {recall}\n"
        f"The temporary collection is deleted, '{name}' was only read. The vectors are in the embedding cache."
    )
    console.result(document, text)
    return REMAINING if left else DONE


def show_synced(done: Synced, paid: EmbeddingTotals, ctx: Context, console: Console) -> int:
    """Print the result of --only-missing."""
    left = _warn_of_memories(paid, done.outcome, [], [], console)
    one = done.outcome
    text = (
        f"'{ctx.collection}': points added: {one.added}, updated: {one.changed}; payloads updated: {one.payloads};"
        f" vectors repaired: {done.repaired}; orphan points removed: {done.removed}"
    )
    document = {
        **_of(one, "added", "changed", "payloads"),
        "mended": done.repaired,
        "removed": done.removed,
        "bought": _of(paid, "texts", "tokens"),
    }
    console.result(document, text)
    return REMAINING if left else DONE
