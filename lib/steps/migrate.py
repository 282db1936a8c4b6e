"""The whole re-embedding, from a bought plan to a proved collection, killed anywhere and gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lib.backup_set.manifest import Manifest
from lib.errors import VerificationFailed
from lib.journal import start_journal
from lib.steps.embed import Buyer, catch_up
from lib.steps.last_run import COMMAND, PROVED, spec_as_json
from lib.steps.mend import mend_vectors
from lib.steps.migration import Migration
from lib.steps.situation import (
    ABSENT,
    ADOPT,
    DEAD,
    REPLACE,
    journal_of,
    protection,
    require_whole_graph,
    situation,
)
from lib.steps.switch import DELETING, RECOVERED, Filled, drop_live, fill, make_collection, stamp
from lib.vectors.collection import set_metadata

UndoOf = Callable[[Manifest | None], str]
Announce = Callable[[str], None]
_FRESH = "fresh since"


def is_fresh(run: Migration) -> bool:
    """Whether `--fresh` was begun by an earlier start of this migration: what was bought since then counts."""
    return run.spool.get_meta(_FRESH) == _fresh_mark(run)


def forget_bought(run: Migration, buyer: Buyer) -> None:
    """`--fresh`: drop the vectors of the plan's texts, so that they are bought anew, once.

    The provider must answer first: with a refused key nothing that was paid for is thrown away.
    """
    buyer.client.embed(["hello"])
    run.spool.forget_planned()
    run.spool.set_meta(_FRESH, _fresh_mark(run))
    run.fresh = False


def _fresh_mark(run: Migration) -> str:
    spec = spec_as_json(run.spec)
    return f"{spec['endpoint']} {spec['model']} {spec['size']}"


def migrate(
    run: Migration, buyer: Buyer, first: Manifest | None, undo_of: UndoOf, announce: Announce
) -> Filled:
    """Catch up, replace (or adopt) the collection, fill it, catch up again, prove it.

    `first` is the backup that protected the plan; the guard is asked again right before the delete, and what it
    accepts then is what the journal names and `announce` is told the way back to.
    """
    if run.journal is None:
        facts = {"spec": spec_as_json(run.spec), "manifest": first.name if first else None}
        run.journal = start_journal(run.folder, COMMAND, run.targets, **facts)
    run.undo = run.journal.undo or undo_of(first)
    scan = catch_up(buyer, run.graph, run.spool, run.bar, run.bought)
    kind, state = situation(run)
    manifest = protection(run, kind, state) if kind in {REPLACE, DEAD} else first
    began = time.monotonic()
    if kind == REPLACE:
        require_whole_graph(run, scan.usable)
        began = _drop(run, manifest, undo_of, announce)
    if kind == ABSENT and not run.journal.fact("settings") and manifest:
        run.journal.append(RECOVERED, **_settings_of(manifest))
    if kind != ADOPT:
        make_collection(run.target, run.journal.fact("settings"), run.journal)
    filled = _fill(run)
    run.absent_seconds = time.monotonic() - began if kind != ADOPT else 0.0
    catch_up(buyer, run.graph, run.spool, run.bar, run.bought)
    late = _fill(run)
    late.outcome.added += filled.outcome.added
    _prove(run)
    set_metadata(run.target.qdrant, run.target.collection, stamp(run.spec))
    run.spool.set_meta(_FRESH, "")
    run.journal.append(PROVED, points=late.outcome.added)
    run.journal.close("done")
    return late


def _drop(run: Migration, manifest: Manifest | None, undo_of: UndoOf, announce: Announce) -> float:
    """Delete the live collection; the way back is journalled and told before. Monotonic seconds of the delete."""
    journal = journal_of(run)
    if manifest and manifest.name != journal.fact("manifest"):
        journal.append("backup accepted by the guard", manifest=manifest.name)
    if manifest or not journal.undo:
        run.undo = undo_of(manifest)
    announce(run.undo)
    return drop_live(run.target, run.spool, journal, run.bar, undo=run.undo)


def _settings_of(manifest: Manifest) -> dict[str, Any]:
    """The collection's settings and aliases from a backup, where the collection itself is gone."""
    from lib.backup_set.archive import peek_facts

    assert manifest.collection is not None
    facts = peek_facts(manifest.file_of(manifest.collection))
    settings = {"config": facts["config"], "payload_schema": facts["payload_schema"]}
    return {"settings": settings, "aliases": manifest.collection.aliases}


def _fill(run: Migration) -> Filled:
    aliases = journal_of(run).fact("aliases") or []
    whole = run.reached(DELETING)
    filled = fill(run.target, run.spool, run.spool.memory_count(), run.bar, aliases, whole=whole)
    run.aliases_taken, run.indexed = filled.aliases_taken, filled.indexed
    return filled


def _prove(run: Migration) -> None:
    """Every vector equal to the spool's; what the old service wrote meanwhile is renewed, then compared again."""
    run.mended = mend_vectors(run.target.qdrant, run.target.collection, run.spool, run.spec, run.bar)
    if run.mended and mend_vectors(run.target.qdrant, run.target.collection, run.spool, run.spec, run.bar):
        raise VerificationFailed(
            f"points of '{run.target.collection}' keep changing to other vectors: something else writes to it",
            next_step="stop AutoMem, then python scripts/reembed_embeddings.py   (goes on from the spool)",
        )
