"""What each command tells: plans, results, the way back, and the exit code that goes with them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lib.console import Console, size_text, table
from lib.errors import DONE, REMAINING, VERIFICATION_FAILED, UsageProblem
from lib.undo import settings_lines

if TYPE_CHECKING:
    from lib.backup_set.manifest import Manifest
    from lib.config import Config
    from lib.steps.checks import Check
    from lib.steps.drift import Drifted
    from lib.steps.embed import Tried
    from lib.steps.migrate import Migration
    from lib.steps.plan import Plan
    from lib.steps.restore import Proved, Restored, Site
    from lib.steps.sync import SyncOutcome

_EXAMPLES = 10


def announce_open(config: Config, console: Console) -> None:
    """Tell of runs on this target that never came to their end."""
    from lib.journal import open_journals

    for journal in open_journals(config.backup_dir):
        if journal.targets == config.targets():
            command = {"reembed": "reembed_embeddings.py", "restore": "restore_from_backup.py"}.get(
                journal.command
            )
            if command:
                console.say(
                    f"an earlier run of {command} is unfinished ({journal.run_id}, at: {journal.phase})"
                )


# --- re-embed ---------------------------------------------------------------------------------------------------


def _dollars(price: float | None) -> str:
    return "unknown (no list price for this model)" if price is None else f"${price:.4f}"


def show_plan(plan: Plan, kind: str, console: Console) -> None:
    """What a re-embedding will do, cost and leave out."""
    from lib.embedding.pricing import PRICES_AS_OF

    now = f"{plan.live_size}d, {plan.live_points:,} points" if plan.live_size else "absent"
    what = {"absent": "create it", "adopt": "bring it level", "replace": "delete it, make it anew"}[kind]
    rows = [
        ("memories", f"{plan.scan.memories:,} in the graph, {plan.scan.usable:,} to have a point"),
        ("collection", f"{now}; to do: {what} at {plan.spec.size}d with {plan.spec.model}"),
        ("to embed", f"{plan.texts:,} texts, {plan.tokens:,} tokens; {plan.spooled:,} need no purchase"),
        ("price", f"{_dollars(plan.price)} (list prices of {PRICES_AS_OF})"),
        ("server's disk", f"up to {size_text(plan.disk_peak)}"),
    ]
    console.say(table(rows))
    for reason, count in plan.scan.skipped.items():
        names = [name for name, why in plan.scan.examples if why == reason][:_EXAMPLES]
        console.say(
            f"skipped, {reason}: {count:,} ({', '.join(names)}{', ...' if count > len(names) else ''})"
        )
    if plan.only_live and kind == "replace":
        some = ", ".join(plan.only_live_examples[:_EXAMPLES])
        console.warn(
            f"{plan.only_live} point(s) have no memory in the graph: they stay in the backup and leave the"
            f" collection ({some})"
        )


def too_dear(plan: Plan, most: float) -> UsageProblem:
    """The refusal of --max-cost."""
    return UsageProblem(
        f"this would cost {_dollars(plan.price)}, --max-cost is ${most:g}; nothing was spent",
        next_step="raise --max-cost, or use a cheaper EMBEDDING_MODEL",
    )


def show_tried(tried: Tried, run: Migration, console: Console) -> int:
    """The outcome of --dry-run."""
    left = run.spool.missing_total()
    rate = tried.texts / tried.seconds if tried.seconds else 0.0
    text = f"dry run: {tried.texts} texts embedded at {tried.size}d, {tried.tokens:,} tokens ({tried.note})"
    if rate:
        text += f"; one request at a time does {rate:.0f} texts/s, {left.texts:,} are left"
    console.result({"dry_run": dataclasses.asdict(tried), "left": dataclasses.asdict(left)}, text)
    return DONE


def _remaining(outcome: SyncOutcome, run: Migration, console: Console) -> int:
    for refused in run.bought.refused[:_EXAMPLES]:
        console.warn(f"memory {refused.label} was not embedded: {refused.reason}")
    for rejected in outcome.rejected[:_EXAMPLES]:
        console.warn(f"memory {rejected.id} was rejected by Qdrant: {rejected.reason}")
    for label in run.bought.cut[:_EXAMPLES]:
        console.warn(f"memory {label} is longer than the model takes: its end was cut for the vector")
    return REMAINING if run.bought.refused or outcome.rejected else DONE


def show_migrated(outcome: SyncOutcome, run: Migration, undo: str, console: Console) -> int:
    """The result of a re-embedding, with the way back and the next steps."""
    from lib.restarting import RESTART

    code = _remaining(outcome, run, console)
    price = run.bought.price(run.spec.model)
    points = run.spool.memory_count() - len(run.bought.refused) - len(outcome.rejected)
    document = {
        "collection": run.target.collection,
        "size": run.spec.size,
        "model": run.spec.model,
        "points": points,
        "bought": {"texts": run.bought.texts, "tokens": run.bought.tokens, "price": price},
        "mended": run.mended,
        "absent_seconds": round(run.absent_seconds, 3),
        "refused": [dataclasses.asdict(one) for one in run.bought.refused],
        "rejected": [dataclasses.asdict(one) for one in outcome.rejected],
        "undo": undo,
    }
    text = (
        f"'{run.target.collection}' is {run.spec.size}d now: {points:,} points, every vector compared.\n"
        f"Bought {run.bought.texts:,} texts, {run.bought.tokens:,} tokens, {_dollars(price)}."
        f" The collection was absent or incomplete for {run.absent_seconds:.1f} s.\n\n"
        f"undo:\n{undo}\n\nnext:\n{RESTART}\n"
        "  python scripts/reembed_embeddings.py --only-missing   # what was written meanwhile\n"
        "  python scripts/verify_migration.py --after-restart"
    )
    console.result(document, text)
    return code


def show_drift(done: Drifted, run: Migration, console: Console) -> int:
    """The result of --only-missing."""
    code = _remaining(done.outcome, run, console)
    one = done.outcome
    text = (
        f"'{run.target.collection}': {one.added} point(s) added, {one.changed} renewed,"
        f" {one.payloads} payload(s) renewed, {done.removed} surplus removed"
    )
    document = {"added": one.added, "changed": one.changed, "payloads": one.payloads, "removed": done.removed}
    console.result(document, text)
    return code


# --- verify -----------------------------------------------------------------------------------------------------


def show_checks(checks: list[Check], recalled: list[str], config: Config, console: Console) -> int:
    """Every check with its figures; exit code 4 where one failed."""
    from lib.steps.checks import FAILED, PENDING

    failed = [check for check in checks if check.status == FAILED]
    text = table(
        [(check.status, check.name, check.detail) for check in checks], ("result", "check", "figures")
    )
    if recalled:
        text += "\n\nrecalled:\n" + "\n".join(recalled)
    if failed:
        text += f"\n\n{len(failed)} check(s) FAILED: repair with  python scripts/reembed_embeddings.py --only-missing"
    elif any(check.status == PENDING for check in checks):
        text += "\n\nrestart AutoMem with the new settings, then:  python scripts/verify_migration.py --after-restart"
    document = {"checks": [dataclasses.asdict(check) for check in checks], "recalled": recalled}
    console.result({**document, "collection": config.collection, "failed": len(failed)}, text)
    return VERIFICATION_FAILED if failed else DONE


# --- restore ----------------------------------------------------------------------------------------------------


def show_restore_plan(site: Site, proved: Proved, console: Console) -> int:
    """What a restore would do: --dry-run stops before the first write."""
    from lib.vectors.collection import exists, get_state

    lines = []
    document: dict[str, object] = {}
    if proved.graph and proved.graph.proof.counts:
        counts = proved.graph.proof.counts
        lines.append(
            f"graph '{proved.graph.graph}': {counts.nodes:,} nodes, {counts.relationships:,} relationships"
        )
        document["graph"] = {"nodes": counts.nodes, "relationships": counts.relationships}
    if proved.collection and site.collection:
        one, name, qdrant = proved.collection, site.collection.collection, site.collection.qdrant
        live = (
            f"{get_state(qdrant, name).points:,} points stand there" if exists(qdrant, name) else "absent now"
        )
        lines.append(f"collection '{name}': {one.proof.archive.ids:,} points of {one.size}d ({live})")
        document["collection"] = {"points": one.proof.archive.ids, "size": one.size}
    console.result(document, "would restore, after a safety backup:\n" + "\n".join(lines))
    return DONE


def show_restored(done: Restored, proved: Proved, config: Config, console: Console) -> int:
    """What was restored, where the old state is, and the settings that go with it."""
    from lib.restarting import RESTART

    lines = [*done.notes]
    document: dict[str, object] = {"safety_backup": done.safety.name if done.safety else None}
    if proved.graph:
        lines.append(f"graph '{proved.graph.graph}' restored from {proved.graph.path}, digest equal")
        document["graph"] = {"file": str(proved.graph.path), "digest": proved.graph.digest.digest}
    if proved.collection:
        one = proved.collection
        lines.append(
            f"collection '{config.collection}' restored: {one.proof.archive.ids:,} points of {one.size}d"
        )
        document["collection"] = {"file": str(one.path), "points": one.proof.archive.ids, "size": one.size}
    if done.safety:
        lines.append(f"what stood there before: {done.safety.path}")
    if done.late_writes:
        lines.append(f"writes after the safety backup: {done.late_writes}")
    if proved.collection:
        lines += settings_lines(proved.collection.size, str(proved.collection.facts["model"]), config)
    lines += ["", "next:", RESTART, "  python scripts/verify_migration.py"]
    console.result(document, "\n".join(lines))
    return DONE


def undo_restore(safety: Manifest | None) -> str:
    """The way back from a restore."""
    if safety is None:
        return "  (none: there was nothing before, or --no-safety-backup was given)"
    return f"  python scripts/restore_from_backup.py {safety.path}"


def undo_of(manifest: Manifest | None) -> str:
    """The way back from a re-embedding: the collection's half of the backup; the graph was not changed."""
    if manifest is None or manifest.collection is None:
        return "  (none: there was no collection before)"
    half = manifest.collection
    return (
        f"  python scripts/restore_from_backup.py {manifest.file_of(half)}\n"
        f"  export VECTOR_SIZE={half.size}\n"
        f"  export EMBEDDING_MODEL={half.model}\n"
        "  python scripts/reembed_embeddings.py --only-missing"
    )
