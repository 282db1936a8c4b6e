"""The whole re-embedding, from the plan in the spool to a proved collection, killed anywhere and gone on with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.backup_set.manifest import Manifest
from lib.backup_set.sets import newest_with
from lib.dimensions import EmbeddingSpec
from lib.embedding.spool import Spool
from lib.errors import GuardRefused, MissingData, VerificationFailed
from lib.graph.client import require_graph
from lib.journal import Journal, open_journals, start_journal
from lib.steps.embed import Bought, Buyer, catch_up
from lib.steps.guard import Wanted, require_backup
from lib.steps.last_run import COMMAND, spec_as_json
from lib.steps.mend import mend_vectors, vectors_agree
from lib.steps.plan import Plan, only_live_ids, read_plan, whole_plan
from lib.steps.present import points_present
from lib.steps.progress import ProgressBar
from lib.steps.switch import (
    CREATED,
    DELETED,
    DELETING,
    RECOVERED,
    Target,
    drop_live,
    fill,
    make_collection,
    stamp,
)
from lib.steps.sync import SyncOutcome, missing_of
from lib.steps.take_graph import GraphSource
from lib.vectors.collection import CollectionState, exists, get_state, is_dead, set_metadata

ABSENT, ADOPT, REPLACE = "absent", "adopt", "replace"


@dataclass
class Migration:
    """One run's opened stores and what it has done so far; `fresh`: what was bought earlier does not count."""

    graph: GraphSource
    target: Target
    spool: Spool
    folder: Path
    targets: list[str]
    bar: ProgressBar
    fresh: bool = False
    journal: Journal | None = None
    bought: Bought = field(default_factory=Bought)
    mended: int = 0
    absent_seconds: float = 0.0

    @property
    def spec(self) -> EmbeddingSpec:
        """What the new vectors are."""
        return self.target.spec


def find_open_run(run: Migration) -> Journal | None:
    """The journal of a re-embedding of this target that never ended.

    Raises GuardRefused where it had deleted the collection for another model, size or endpoint: going on with
    this one's settings would throw away what it had begun.
    """
    for journal in reversed(open_journals(run.folder)):
        if journal.command != COMMAND or journal.targets != run.targets:
            continue
        spec = journal.fact("spec")
        if spec == spec_as_json(run.spec):
            run.fresh = run.fresh and not journal.has_reached(DELETING)
            return journal
        if journal.has_reached(DELETING):
            raise GuardRefused(
                f"an unfinished run was making '{run.target.collection}' {spec['size']}d with {spec['model']} of"
                f" {spec['endpoint']}; VECTOR_SIZE is {run.spec.size} and EMBEDDING_MODEL {run.spec.model} of"
                f" {spec_as_json(run.spec)['endpoint']} now",
                next_step=f"finish it:  export VECTOR_SIZE={spec['size']} EMBEDDING_MODEL={spec['model']}"
                f" OPENAI_BASE_URL={spec['endpoint']} && python scripts/reembed_embeddings.py\n"
                f"or go back:\n{journal.undo}",
            )
        journal.close("given up before anything was deleted: other settings now")
    return None


def look(run: Migration, *, level: bool = False) -> tuple[Plan, str, CollectionState | None]:
    """Read the graph into the plan and look at the live collection; nothing is changed on a server.

    `level`: what stands there is to be brought level with the graph, not to be made anew.
    """
    require_graph(run.graph.conn, run.graph.graph, run.graph.address)
    scan = read_plan(run.graph.conn, run.graph.graph, run.spool, run.spec, run.bar)
    kind, state = situation(run)
    if scan.usable == 0 and (state is None or state.points):
        raise MissingData(
            f"graph '{run.graph.graph}' holds no memory that can be embedded ({scan.memories} Memory nodes):"
            f" '{run.target.collection}' is not touched",
            next_step="check FALKORDB_GRAPH, FALKORDB_HOST and FALKORDB_PORT with --show-config",
        )
    missing = run.spool.text_total() if run.fresh else run.spool.missing_total()
    if state is None:
        return whole_plan(scan, missing, run.spec, None, None), kind, None
    if level:
        kind = ADOPT
        with points_present(run.target.qdrant, state.name) as present:
            missing = missing_of(run.spool, present)
    with only_live_ids(run.target.qdrant, state.name, run.spool) as only_live:
        return whole_plan(scan, missing, run.spec, state, only_live), kind, state


def situation(run: Migration) -> tuple[str, CollectionState | None]:
    """What stands under the collection's name: nothing, this migration's own result, or what is to be replaced."""
    target = run.target
    if not exists(target.qdrant, target.collection):
        return ABSENT, None
    if is_dead(target.qdrant, target.collection):
        return REPLACE, None
    state = get_state(target.qdrant, target.collection)
    if state.size != run.spec.size:
        return REPLACE, state
    deleted, created = _reached(run, DELETING), _reached(run, CREATED)
    fresh = state.points == 0 and not deleted
    if created or fresh:
        return ADOPT, state
    if not run.fresh and vectors_agree(target.qdrant, state, run.spool, run.spec):
        return ADOPT, state
    return REPLACE, state


def _reached(run: Migration, phase: str) -> bool:
    return run.journal is not None and run.journal.has_reached(phase)


def guard(run: Migration, state: CollectionState | None) -> Manifest | None:
    """The backup that protects what is to be deleted; None where nothing is at stake. Raises GuardRefused."""
    if state is None:
        raise GuardRefused(
            f"Collection '{run.target.collection}' is dead: it answers with errors only and cannot be read",
            next_step="put a backup back first: python scripts/restore_from_backup.py latest",
        )
    if state.points == 0:
        return None
    with only_live_ids(run.target.qdrant, state.name, run.spool) as only_live:
        if _reached(run, DELETED) and not len(only_live):
            return None  # made anew meanwhile, every id of it in the graph: its payloads are kept
        wanted = Wanted(run.target.qdrant.display, state, only_live)
        return require_backup(run.folder, wanted, run.spec.size)


def protect(run: Migration, kind: str, live: CollectionState | None) -> Manifest | None:
    """The backup that a run goes back to: asked of the guard where something is to be replaced, before any purchase."""
    newest = newest_with(run.folder, run.target.collection)
    return guard(run, live) or newest if kind == REPLACE else newest


def forget_bought(run: Migration) -> None:
    """`--fresh`: drop the vectors of the plan's texts, so that they are bought anew."""
    run.spool.forget_planned()
    run.fresh = False


def migrate(run: Migration, buyer: Buyer, undo: str, manifest: Manifest | None) -> SyncOutcome:
    """From a bought plan to a proved collection. The guard is asked again right before the delete."""
    if run.journal is None:
        facts = {"spec": spec_as_json(run.spec), "manifest": manifest.name if manifest else None}
        run.journal = start_journal(run.folder, COMMAND, run.targets, **facts)
    catch_up(buyer, run.graph, run.spool, run.bar, run.bought)
    kind, state = situation(run)
    began = time.monotonic()
    if kind == REPLACE:
        guard(run, state)
        began = drop_live(run.target, run.spool, run.journal, run.bar, undo=undo)
    if kind == ABSENT and not run.journal.fact("settings") and manifest:
        run.journal.append(RECOVERED, **_settings_of(manifest))
    if kind != ADOPT:
        make_collection(run.target, run.journal.fact("settings"), run.journal)
    outcome = _fill(run)
    run.absent_seconds = time.monotonic() - began if kind != ADOPT else 0.0
    catch_up(buyer, run.graph, run.spool, run.bar, run.bought)
    late = _fill(run)
    outcome.added += late.added
    outcome.unembedded, outcome.rejected = late.unembedded, late.rejected
    _prove(run)
    set_metadata(run.target.qdrant, run.target.collection, stamp(run.spec))
    run.journal.append("proved", points=outcome.added)
    run.journal.close("done")
    return outcome


def _settings_of(manifest: Manifest) -> dict[str, Any]:
    """The collection's settings and aliases from a backup, where the collection itself is gone."""
    from lib.backup_set.archive import peek_facts

    assert manifest.collection is not None
    facts = peek_facts(manifest.file_of(manifest.collection))
    settings = {"config": facts["config"], "payload_schema": facts["payload_schema"]}
    return {"settings": settings, "aliases": manifest.collection.aliases}


def _fill(run: Migration) -> SyncOutcome:
    assert run.journal is not None
    aliases = run.journal.fact("aliases") or []
    return fill(run.target, run.spool, run.spool.memory_count(), run.bar, aliases)


def _prove(run: Migration) -> None:
    """Every vector equal to the spool's; what the old service wrote meanwhile is renewed, then compared again."""
    run.mended = mend_vectors(run.target.qdrant, run.target.collection, run.spool, run.spec, run.bar)
    if run.mended and mend_vectors(run.target.qdrant, run.target.collection, run.spool, run.spec, run.bar):
        raise VerificationFailed(
            f"points of '{run.target.collection}' keep changing to other vectors: something else writes to it",
            next_step="stop AutoMem, then python scripts/reembed_embeddings.py   (goes on from the spool)",
        )
