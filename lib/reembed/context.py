"""What one re-embedding works on: opened stores and settings, and the unfinished run that it resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from lib import dimensions
from lib.backup import phases
from lib.backup.graph import GraphSource
from lib.backup.manifest import Manifest, read_manifest
from lib.backup.points import TemporaryIdTable, orphan_ids
from lib.clients.embeddings.cache import EmbeddingCache
from lib.clients.qdrant.collection import exists
from lib.clients.qdrant.points import PointId
from lib.clients.qdrant.transport import Qdrant, curl_line
from lib.concurrency import ProgressBar
from lib.dimensions import EmbeddingSpec, model_settings, provider_of, public_url
from lib.errors import BackupDamaged, BadFile, GuardRefused
from lib.journal import Journal, names_in, open_journals
from lib.verify.compare import OTHER_MODEL

_FRESH = "fresh since"


@dataclass(frozen=True)
class Context:
    """The graph, the collection, the embedding cache, the backup folder, and what the operator asked for.

    `spec` describes the new vectors; `reason` is why its provider is used, "" if it is OpenAI and no other one has a
    setting. `targets` name both stores in journals. `store_lock` is held while the live collection changes: a backup
    excludes it. `again` is the command line, without secrets.
    """

    graph: GraphSource
    qdrant: Qdrant
    collection: str
    spec: EmbeddingSpec
    cache: EmbeddingCache
    folder: Path
    targets: list[str]
    bar: ProgressBar
    store_lock: Callable[[], AbstractContextManager[None]] = nullcontext
    again: str = "python scripts/reembed_embeddings.py"
    fresh: bool = False
    in_place: bool = False
    no_switch: bool = False
    reason: str = ""

    @property
    def staged(self) -> str:
        """The name of the collection that is built while the live one serves."""
        return f"{self.collection}__next"


def reached(journal: Journal | None, *wanted: str) -> bool:
    """Return whether the run that is resumed, if any, has announced one of the phases `wanted`."""
    return journal is not None and journal.has_reached(*wanted)


def is_fresh(ctx: Context) -> bool:
    """Return whether the cache holds only vectors that this migration paid for since it was started with `--fresh`."""
    return ctx.cache.get_meta(_FRESH) == _fresh_mark(ctx.spec)


def may_mix_models(ctx: Context) -> bool:
    """Return whether AutoMem may have written vectors of another model since the last migration to this `spec`.

    If that kept the size, AutoMem does so until it is restarted, and no dimension check notices. Otherwise, if a
    verification found such a vector, and no restore has replaced the collection since.
    """
    last = phases.last_migration(ctx.folder, ctx.targets)
    if last is None or last.fact("spec") != phases.spec_as_json(ctx.spec):
        return False
    has_same_size = last.fact("settings")["config"]["params"]["vectors"].get("size") == ctx.spec.size
    reported = ctx.cache.get_meta(OTHER_MODEL) == last.run_id
    return bool(has_same_size) or (reported and not phases.restored_since(last))


def must_forget(ctx: Context) -> bool:
    """Return whether `--fresh` was asked for and the earlier vectors are still in the cache."""
    return ctx.fresh and not is_fresh(ctx)


def mark_fresh(cache: EmbeddingCache, spec: EmbeddingSpec | None) -> None:
    """Note in the cache that the earlier vectors of `spec` are dropped; None: the migration has ended."""
    cache.set_meta(_FRESH, _fresh_mark(spec) if spec else "")


def _fresh_mark(spec: EmbeddingSpec) -> str:
    return f"{public_url(spec.base_url)} {spec.model} {spec.size}"


# The last phase first.
_PROGRESS = (
    (phases.VERIFIED, "the new collection is in place and verified; the clean-up is left"),
    (phases.STAGED_RESTORED, "the staged collection is in place; catching up and the verification are left"),
    (phases.CREATED, "the new collection is created; filling it and the verification are left"),
    (phases.RESTORING_STAGED, "the old collection is deleted; the staged one was being put in its place"),
    (phases.DELETED, "the old collection is deleted"),
    (phases.DELETING, "the old collection was about to be deleted"),
    (phases.STAGED, "the staged collection is verified, the live one is unchanged"),
    (phases.STAGING, "the staged collection is incomplete, the live one is unchanged"),
)


def open_run(ctx: Context) -> Journal | None:
    """Return the open journal of these stores and settings, or None. Nothing is written.

    Raises GuardRefused if a run with another model, size or endpoint has deleted the collection: it would be lost.
    """
    for journal in _open_here(ctx):
        if journal.fact("spec") == phases.spec_as_json(ctx.spec):
            return journal
        if journal.has_reached(phases.DELETING):
            raise _other_settings(journal, ctx)
    return None


def close_others(ctx: Context) -> None:
    """Before the first write: close runs with other settings that deleted nothing, drop what they staged."""
    for journal in _others(ctx):
        phases.remove_staged(ctx.qdrant, journal)
        journal.close("given up before anything was deleted: other settings now")


def other_settings_notices(ctx: Context) -> list[str]:
    """Return a line for each run that `close_others` gives up."""
    return [
        f"the unfinished run of {str(journal.entries[0]['at'])[:16]} UTC makes {spec['size']}d with {spec['model']} of"
        f" {spec['endpoint']}. It cannot be resumed with other settings: a re-embed with these gives it up"
        for journal in _others(ctx)
        for spec in [journal.fact("spec")]
    ]


def _others(ctx: Context) -> list[Journal]:
    """Return the open journals of these stores with other settings that deleted nothing."""
    spec = phases.spec_as_json(ctx.spec)
    return [one for one in _open_here(ctx) if one.fact("spec") != spec and not one.has_reached(phases.DELETING)]


def progress_of(journal: Journal) -> str:
    """Say how far an unfinished run came."""
    verified = bool(journal.fact("proved"))
    reached = [text for one, text in _PROGRESS if journal.has_reached(one) and (verified or one != phases.STAGED)]
    return reached[0] if reached else "nothing was changed on a server"


def resume_notice(journal: Journal) -> str:
    """Return one line that says how far an unfinished run came."""
    return f"resuming the run of {str(journal.entries[0]['at'])[:16]} UTC: {progress_of(journal)}"


def refuse_other_stores(ctx: Context) -> None:
    """Raise GuardRefused if an unfinished run deleted this collection at another address, or another one of this graph.

    For a collection that is absent or empty: its payloads may be only in that run's cache. The other address may be
    another spelling of the same one.
    """
    for journal in open_journals(ctx.folder, None, phases.COMMAND):
        if journal.targets == ctx.targets or not journal.has_reached(phases.DELETING):
            continue
        other, graph = names_in(journal.targets)[-1], journal.targets[0]
        if other == ctx.collection:
            raise GuardRefused(
                f"an unfinished run deleted '{other}' at another address: {journal.targets[1]}, graph {graph};"
                f" here it is {ctx.targets[1]}, graph {ctx.targets[0]}",
                next_step="if that is the same server, spell QDRANT_URL, FALKORDB_HOST and FALKORDB_GRAPH as that run"
                " did, then run the same command again;\nif it is another one, finish that run or undo it:\n"
                f"{journal.undo}",
            )
        if graph == ctx.targets[0]:
            raise GuardRefused(
                f"an unfinished run of this graph was making the collection '{other}';"
                f" QDRANT_COLLECTION is '{ctx.collection}' now, which is absent or empty",
                next_step=f"finish it:\nexport QDRANT_COLLECTION={quote(other)}\n"
                f"python scripts/reembed_embeddings.py\nor undo it:\n{journal.undo}",
            )


def refuse_foreign_staged(ctx: Context) -> None:
    """Raise GuardRefused if a staged collection exists that no open run of these stores has made."""
    made = [one.fact("staged_collection") for one in _open_here(ctx)]
    if ctx.staged in made or not exists(ctx.qdrant, ctx.staged):
        return
    spell = "spell QDRANT_URL, FALKORDB_HOST and FALKORDB_GRAPH as that run did, then run the same command again"
    for other in open_journals(ctx.folder):
        if other.fact("staged_collection") == ctx.staged:
            raise GuardRefused(
                f"'{ctx.staged}' was made by an unfinished run on other stores, or another spelling of these:"
                f" {' and '.join(other.targets)}; here it is {' and '.join(ctx.targets)}",
                next_step=spell,
            )
    drop = curl_line(ctx.qdrant, "DELETE", ctx.staged)
    raise GuardRefused(
        f"'{ctx.staged}' exists, and no unfinished run here made it: it is not overwritten",
        next_step=f"find out who made it, then delete it and run the same command again:\n{drop}",
    )


def accepted_backup(ctx: Context, journal: Journal | None) -> Manifest | None:
    """Return the backup that the guard last accepted for this run; None if there is none or it cannot be read."""
    path = ctx.folder / str(journal.fact("manifest") if journal else None)
    try:
        return read_manifest(path) if path.is_file() else None
    except (BackupDamaged, BadFile):
        return None


def _open_here(ctx: Context) -> list[Journal]:
    """Return the open journals of these stores, newest first."""
    return open_journals(ctx.folder, ctx.targets, phases.COMMAND)[::-1]


def _other_settings(journal: Journal, ctx: Context) -> GuardRefused:
    was, now = journal.fact("spec"), phases.spec_as_json(ctx.spec)
    provider = provider_of(was)
    names, endpoint = {"size": "VECTOR_SIZE"}, dimensions.ENDPOINT_SETTINGS.get(provider, "")
    if provider == ctx.spec.provider:
        names |= {"model": dimensions.MODEL_SETTINGS.get(provider, "model"), "endpoint": endpoint}
    else:
        names |= {"provider": dimensions.PROVIDER}
    changed = [name for key, name in names.items() if was.get(key) != now.get(key)]
    settings = model_settings(provider, was["model"], named=bool(ctx.reason))
    # The record has neither a login nor a query. If the endpoint that is set has one, an export would drop it.
    drops = was["endpoint"] == now["endpoint"] and now["endpoint"] != ctx.spec.base_url
    if endpoint and not drops:
        settings[endpoint] = was["endpoint"].removesuffix("/v1" if provider == dimensions.OLLAMA else "")
    exports = " ".join(f"{name}={quote(value)}" for name, value in settings.items())
    return GuardRefused(
        f"cannot resume the unfinished run of '{ctx.collection}': {' and '.join(changed)}"
        f" {'have' if len(changed) > 1 else 'has'} changed. It was making {was['size']}d with {was['model']} of"
        f" {was['endpoint']}; now it is {now['size']}d with {now['model']} of {now['endpoint']}",
        next_step=f"finish it:\nexport VECTOR_SIZE={was['size']} {exports}\npython scripts/reembed_embeddings.py\n"
        f"or undo it:\n{journal.undo}",
    )


def unplanned_ids(cache: EmbeddingCache, existing: TemporaryIdTable) -> Iterator[PointId]:
    """Yield the existing ids that the plan does not have."""
    return orphan_ids(existing, lambda ids: set(cache.memories_of(ids)))


def saved_payloads(cache: EmbeddingCache, ids: Sequence[PointId]) -> dict[PointId, dict[str, Any]]:
    """Return the payloads that the cache has saved of these points."""
    return {one: cache.decoded(row.payload) for one, row in cache.saved_points(ids).items()}
