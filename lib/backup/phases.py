"""The phases of runs in their journals: of the snapshots that a backup has the server make, and of a re-embedding."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.backup import catalog
from lib.clients.qdrant import snapshots
from lib.clients.qdrant.collection import exists
from lib.clients.qdrant.transport import Qdrant, QdrantError, curl_line, server_time
from lib.dimensions import EmbeddingSpec, provider_fact, public_url
from lib.errors import AccessRefused, MigrationError, UsageProblem
from lib.journal import Journal, journals, names_in

if TYPE_CHECKING:
    from lib.backup.collection import CollectionSource

ANNOUNCED, MADE, REMOVED = "snapshot announced", "snapshot made", "snapshot removed"
AWAITED = "snapshot awaited"  # all else of the run is cleaned up, but the server may still make its snapshot
_OTHER_SECOND_SECONDS = 5.0  # how long a second is waited for in which no snapshot was begun
_MAKING = timedelta(hours=1)  # a server that has not made a snapshot by then makes it no more
_MOMENT = re.compile(r"-(\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d)\.snapshot$")
# From the announcement until the server begins; two clocks of whole seconds may differ by the first.
_ROUNDING, _ON_THE_WAY = timedelta(seconds=2), timedelta(seconds=60)


@contextmanager
def own_snapshot(
    qdrant: Qdrant, collection: str, journal: Journal, node: str | None = None
) -> Iterator[snapshots.Snapshot]:
    """A snapshot with its checksum for the block, announced in the journal before it is requested, deleted afterwards.

    `node` is the address of one of several nodes that make a snapshot each.
    """
    known = [one.name for one in snapshots.list_snapshots(qdrant, collection)]
    # A known snapshot that was begun in this second would be replaced by ours.
    latest = max(filter(None, map(_begun, known)), default=None)
    give_up = time.monotonic() + _OTHER_SECOND_SECONDS  # the clocks of a proxy and of the server may differ
    while True:
        now = server_time(qdrant)
        if latest is None or now > latest or time.monotonic() >= give_up:
            break
        qdrant.sleep(0.5)
    facts = {"collection": collection, "known_snapshots": known, "server_time": now.isoformat(), "snapshot": None}
    _append(journal, ANNOUNCED, node, **facts)
    ours = None
    try:
        try:
            made = snapshots.create(qdrant, collection)
        except (QdrantError, AccessRefused):
            _append(journal, REMOVED, node)  # the server reported that it made none
            raise
        if made.name in known:
            _append(journal, REMOVED, node)  # another client's, made in the same second: never deleted
        else:
            ours = made.name
            _append(journal, MADE, node, snapshot=ours)
        yield snapshots.with_checksum(qdrant, collection, made)
    finally:
        _remove_named(qdrant, journal, node, ours)


def _append(journal: Journal, phase: str, node: str | None, **facts: object) -> None:
    journal.append(phase, **facts, **({"node": node} if node else {}))


def _begun(name: str) -> datetime | None:
    """The second in which the server began to make the snapshot, or None if its name does not say."""
    found = _MOMENT.search(name)
    return datetime.strptime(f"{found[1]}+0000", "%Y-%m-%d-%H-%M-%S%z") if found else None


def _announced(journal: Journal) -> list[str | None]:
    """The nodes on which a snapshot of this run may be left; None means a server that is no cluster."""
    last = {one.get("node"): one["phase"] for one in journal.entries if one["phase"] in {ANNOUNCED, REMOVED}}
    return [node for node, phase in last.items() if phase == ANNOUNCED]


def removed(journal: Journal) -> bool:
    """Whether surely no snapshot of this run is left on any node."""
    return not _announced(journal)


def _remove_named(qdrant: Qdrant, journal: Journal, node: str | None, name: str | None = None) -> None:
    """Delete the run's snapshot on this node, by default the one that the journal names, if it is not deleted yet."""
    name = name or next((one["snapshot"] for one in _since_announced(journal, node) if one.get("snapshot")), None)
    if name and node in _announced(journal):
        with suppress(MigrationError):  # the backup itself is what counts; an open journal tries again
            snapshots.delete(qdrant, str(_since_announced(journal, node)[0]["collection"]), name)
            _append(journal, REMOVED, node, snapshot=name)


def remove_named_snapshots(source: CollectionSource, journal: Journal) -> None:
    """Delete the snapshots of a run that its journal names, on every node."""
    for qdrant, node in _nodes_left(source, journal):
        _remove_named(qdrant, journal, node)


def snapshot_deletions(source: CollectionSource, journal: Journal) -> list[str]:
    """Return the commands that delete snapshots that this run may have made and its journal does not name.

    They were begun right after the announcement. Another client may have made them, so none is deleted here.
    """
    commands = []
    for qdrant, node in _nodes_left(source, journal):
        entry = _since_announced(journal, node)[0]
        # The first versions wrote no server_time.
        collection, asked = str(entry["collection"]), datetime.fromisoformat(entry.get("server_time") or entry["at"])
        with suppress(MigrationError):  # a server that does not list its snapshots
            listed = sorted(one.name for one in snapshots.list_snapshots(qdrant, collection))
            fresh = [one for one in listed if one not in entry["known_snapshots"] and one.startswith(f"{collection}-")]
            ours = [one for one in fresh if (at := _begun(one)) and -_ROUNDING <= at - asked <= _ON_THE_WAY]
            commands += [curl_line(qdrant, "DELETE", collection, "snapshots", one) for one in ours]
    return commands


def report_snapshots(source: CollectionSource, left: Sequence[Journal], notice: Callable[[str], None]) -> None:
    """Name the snapshots that killed runs may have left, each with the command that deletes it.

    Closes the journals for which one was found, or none can appear any more. The others stay open for the next run.
    """
    commands: list[str] = []
    for journal in left:
        found = snapshot_deletions(source, journal)
        commands += found
        if found or datetime.now(timezone.utc) - journal.times(ANNOUNCED)[-1] > _MAKING:
            journal.close("cleaned up by the next run")
        elif journal.phase != AWAITED:
            journal.append(AWAITED)
    if commands:
        notice(
            "warning: a killed run may have left a snapshot on the Qdrant server. Delete it, unless somebody else made"
            " it:\n  " + "\n  ".join(dict.fromkeys(commands))
        )


def _nodes_left(source: CollectionSource, journal: Journal) -> Iterator[tuple[Qdrant, str | None]]:
    """Each node on which a snapshot of the run may be left, opened; and its address in the journal.

    Raises UsageProblem if the node is not listed any more: only the operator knows how to reach it.
    """
    clients = {one.display: one for one in (source.qdrant, *source.nodes)}
    for node in _announced(journal):
        if node is not None and node not in clients:
            raise UsageProblem(
                f"a killed run ({journal.run_id}) may have left a snapshot on the Qdrant node {node}, which "
                "QDRANT_NODE_URLS does not list now",
                next_step=f"list it again; or, if it no longer exists, delete {journal.path}",
            )
        yield (clients[node] if node else source.qdrant), node


def _since_announced(journal: Journal, node: str | None) -> list[dict[str, Any]]:
    """The latest announcement of a snapshot on this node, and what follows it about this node."""
    own = [one for one in journal.entries if one.get("node") == node]
    return own[max(at for at, one in enumerate(own) if one["phase"] == ANNOUNCED) :]


COMMAND = "reembed"
# While the live collection serves; the cutover; the end.
STAGING, READ, STAGED = "staging", "live payloads read", "staged and proved"
SNAPSHOT_MADE = "snapshot of the staged collection made"
SETTINGS_RECOVERED, PAYLOADS_SAVED = "settings taken from the backup", "payloads kept"
DELETING, DELETED = "deleting the live collection", "live collection deleted"
RESTORING_STAGED, STAGED_RESTORED = "putting the staged collection in place", "staged collection in place"
CREATED, VERIFIED, DROPPING_STAGED = "collection created", "proved", "removing the staged collection"
SENT = "sent"  # of the cutover methods, the one that leaves a snapshot on the server


def snapshot_file(folder: Path, staged: str) -> Path:
    """Where in the backup folder a staged collection's snapshot is while it is sent."""
    return folder / catalog.CACHE_DIR / f"{staged}.snapshot.partial"


def sent_name(journal: Journal) -> str:
    """Under which name the server stores the snapshot that a re-embedding sends."""
    return f"{journal.fact('staged_collection')}-{journal.run_id}.snapshot"


def delete_sent(qdrant: Qdrant, journal: Journal) -> None:
    """Delete the snapshot that a re-embedding sent. The server keeps it, also if it could not restore it."""
    if journal.fact("way") == SENT:
        snapshots.delete(qdrant, names_in(journal.targets)[-1], sent_name(journal))


def remove_staged(qdrant: Qdrant, journal: Journal) -> list[str]:
    """Delete what a re-embedding staged, with its snapshot in the backup folder, or a spot check's collection.

    The snapshot that it sent is deleted, too. Returns what was removed.
    """
    delete_sent(qdrant, journal)
    staged = journal.fact("staged_collection") or journal.fact("side")
    if not staged:
        return []
    found = exists(qdrant, staged)
    snapshots.delete_with_snapshots(qdrant, staged)
    snapshot_file(journal.folder, staged).unlink(missing_ok=True)
    return [f"collection {staged}"] if found else []


def spec_as_json(spec: EmbeddingSpec) -> dict[str, Any]:
    """What a journal records of the vectors that its run makes; no secret."""
    facts = {"model": spec.model, "size": spec.size, "endpoint": public_url(spec.base_url)}
    return facts | provider_fact(spec.provider)


def last_migration(folder: Path, targets: list[str]) -> Journal | None:
    """The journal of the newest re-embedding of these stores that recreated the collection."""
    made = (one for one in journals(folder, COMMAND) if one.targets == targets and one.fact("settings"))
    return next(made, None)


def restored_since(migration: Journal) -> bool:
    """Whether a restore of the collection finished after this migration."""
    return any(
        one.run_id > migration.run_id and one.fact("temporary_collection") and not one.is_open
        for one in journals(migration.folder, "restore")
        if one.targets == migration.targets
    )


def journalled_stamp(folder: Path, collection: str, size: int) -> dict[str, Any]:
    """The model stamp in the journal of the newest run that recreated this collection (address and name).

    For servers that store no metadata (before 1.16). Empty if that run was no migration, did not finish, or made
    vectors of another size.
    """
    for journal in journals(folder):
        if journal.targets[-1:] == [collection] and journal.has_reached(DELETING, RESTORING_STAGED, CREATED):
            finished = journal.command == COMMAND and journal.has_reached(VERIFIED)
            stamp = journal.fact("stamp") if finished else None
            made = next(iter(stamp.values())) if isinstance(stamp, dict) else {}
            return made if made.get("size") == size else {}
    return {}
