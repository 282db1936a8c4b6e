"""The backup sets of a folder: found, claimed while they are written, retained, deleted; reports beside them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from shlex import quote
from typing import Any

from lib.backup.manifest import (
    CHECKED,
    COLLECTION_DIR,
    FULL,
    GRAPH_DIR,
    SAFETY,
    VERIFICATION_LEVELS,
    Manifest,
    read_manifest,
)
from lib.errors import BackupDamaged, BadFile, LockHeld, MissingData, UsageProblem
from lib.files import PARTIAL, lock_targets, private_dir, readable_bytes, sync_dir, write_atomic
from lib.journal import STAMP, STAMP_FORMAT, Journal, open_journals, read_journal
from lib.network import same_server

_STAMP = "stamp"
_WAIT_SECONDS = 0.2


def claim_stamp(folder: Path, journal: Journal) -> tuple[str, str]:
    """A stamp (UTC, to the second) that no set has and no unfinished run claimed, and the ISO time.

    It is in the journal when this returns, so that its files can be told from others'. Runs on other targets may
    write into the same folder at the same time: a taken second is waited out.
    """
    while True:
        with contextlib.suppress(LockHeld), lock_targets([f"stamps of {folder.resolve()}"]):
            now = datetime.now(timezone.utc).replace(microsecond=0)
            stamp = now.strftime(STAMP_FORMAT)
            taken = {_stamp_of(one) for one in open_journals(folder)}
            if stamp not in taken and not any(folder.rglob(f"*_{stamp}.*")):
                journal.append("backup begun", stamp=stamp)
                return stamp, now.isoformat()
        time.sleep(_WAIT_SECONDS)


def _stamp_of(journal: Journal) -> str:
    """The stamp that the run claimed; a re-embedding notes its model's by the same word, which is a dict."""
    stamp = journal.fact(_STAMP)
    return stamp if isinstance(stamp, str) else ""


def remove_unfinished(folder: Path, journal: Journal) -> list[Path]:
    """Remove the files of a set that its run did not finish; what a manifest names, and others' files, stay."""
    stamp = _stamp_of(journal)
    if not stamp:
        return []
    found = list(folder.rglob(f"*_{stamp}.*{PARTIAL}"))
    if not (folder / f"backup_{stamp}.json").exists():
        found += [path for name in (GRAPH_DIR, COLLECTION_DIR) for path in folder.glob(f"{name}/*_{stamp}.*")]
    for path in set(found):
        path.unlink(missing_ok=True)
    return sorted(set(found))


REPORT_DIR = "reports"


def write_document(folder: Path, run_id: str, document: Mapping[str, Any]) -> Path:
    """Write what a run did as JSON, 0600; one that was written for this run before is replaced."""
    path = private_dir(folder / REPORT_DIR) / f"reembed_{run_id}.json"
    # Escaped to ASCII: a text may hold half a character, which no UTF-8 can.
    write_atomic(path, json.dumps(document, indent=2).encode() + b"\n")
    return path


def write_page(document: Path, page: str) -> Path:
    """Write the page beside its document, 0600."""
    path = document.with_suffix(".html")
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


CACHE_DIR = "embeddings"
OUTGOING = "outgoing"  # encrypted files of sets whose copy is not whole elsewhere yet
_NAMED = 3


@dataclass(frozen=True)
class Deployment:
    """Whose sets: the graph and the collection by address and name. Several may share one backup folder."""

    graph_server: str
    graph: str
    collection_server: str
    collection: str

    def owns(self, manifest: Manifest) -> bool:
        """Whether every half of the set was taken here."""
        graph, collection = manifest.graph, manifest.collection
        return (graph is None or self._is(graph.graph, graph.server, self.graph, self.graph_server)) and (
            collection is None
            or self._is(collection.collection, collection.server, self.collection, self.collection_server)
        )

    @staticmethod
    def _is(name: str, server: dict[str, str], own_name: str, own_server: str) -> bool:
        return name == own_name and same_server(server["address"], own_server)


def manifest_paths(folder: Path) -> list[Path]:
    """Every file that is named as a manifest, newest first."""
    return sorted(folder.glob("backup_[0-9]*_[0-9]*.json"), reverse=True)


def backup_sets(folder: Path) -> list[Manifest]:
    """Every set whose manifest reads, newest first; broken manifests are passed over (see `--check all`)."""
    found, safety = [], safety_copies(folder)
    for path in manifest_paths(folder):
        try:
            found.append(with_purpose(read_manifest(path), safety))
        except (BackupDamaged, BadFile):
            continue
    return found


def safety_copies(folder: Path) -> set[str]:
    """The sets that restores took of what they replaced, as their journals say: older manifests do not."""
    journals = (read_journal(path) for path in folder.glob("journal_*_restore.jsonl"))
    return {name for one in journals if one for name in manifests_named(one)}


def manifests_named(journal: Journal) -> set[str]:
    """The manifests that a run took or relied on, by name."""
    return {str(entry["manifest"]) for entry in journal.entries if entry.get("manifest")}


def with_purpose(manifest: Manifest, safety: Collection[str]) -> Manifest:
    """The manifest; marked as a safety copy if its name is in `safety`."""
    return replace(manifest, purpose=SAFETY) if manifest.name in safety else manifest


def latest(folder: Path, owner: Deployment | None) -> Manifest:
    """The newest full set of this deployment (None: of anybody) that is no safety copy.

    Raises MissingData where there is none, BackupDamaged where a newer manifest does not read: never an older set
    in silence.
    """
    safety = safety_copies(folder)
    found = (with_purpose(read_manifest(path), safety) for path in manifest_paths(folder))
    return newest_full(found, owner, str(folder))


def newest_full(manifests: Iterable[Manifest], owner: Deployment | None, where: str) -> Manifest:
    """The first of `manifests` that is a full set of `owner` (None: of anybody) and no safety copy.

    Raises MissingData, naming the halves and safety copies: these are taken only by name. Raises UsageProblem where
    the first is dated in the future: it need not be the newest.
    """
    others = []
    for manifest in manifests:
        if owner and not owner.owns(manifest):
            continue
        if manifest.kind == FULL:
            _require_past(manifest, where)
            return manifest
        others.append(f"{manifest.name} ({manifest.kind})")
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise MissingData(
            f"no full backup in {where}: `latest` takes neither one half alone nor a safety copy of a restore. There"
            f" are: {', '.join(others[:_NAMED])}{more}",
            next_step=f"name one: python scripts/restore_from_backup.py {quote(f'{where}/{others[0].split()[0]}')}",
        )
    whose = (
        f" is of graph '{owner.graph}' or collection '{owner.collection}' at these addresses" if owner else ""
    )
    raise MissingData(
        f"no backup in {where}{whose}",
        next_step="python scripts/backup_automem.py   or name the file:  python scripts/backup_automem.py --list",
    )


def _require_past(manifest: Manifest, where: str) -> None:
    if manifest.is_from_future:
        raise UsageProblem(
            f"{manifest.name} is dated {-manifest.age_hours:.0f} hours in the future: a clock was or is wrong, and it"
            " cannot be told which set is the newest",
            next_step="date -u   (is this clock right?)   then name the set:  python scripts/restore_from_backup.py"
            f" {quote(f'{where}/{manifest.name}')}",
        )


def dated_later(manifest: Manifest) -> list[Manifest]:
    """The sets beside this new one that are of the same stores and dated later: a clock went back."""
    assert manifest.path is not None
    owner = _owner(manifest)
    others = [one for one in backup_sets(manifest.path.parent) if one.stamp > manifest.stamp]
    return [
        one
        for one in others
        if any(
            theirs[1] == ours[1] and same_server(theirs[0], ours[0])
            for theirs in _owner(one)
            for ours in owner
        )
    ]


def _owner(manifest: Manifest) -> list[tuple[str, str]]:
    graph, collection = manifest.graph, manifest.collection
    named = [(graph.server["address"], graph.graph)] if graph else []
    return named + ([(collection.server["address"], collection.collection)] if collection else [])


def newest_with(folder: Path, collection: str, server: str) -> Manifest | None:
    """The newest whole set that holds this collection of this server."""
    for manifest in backup_sets(folder):
        component = manifest.collection
        here = (
            component
            and component.collection == collection
            and same_server(component.server["address"], server)
        )
        if here and is_complete(manifest):
            return manifest
    return None


def find_set(folder: Path, path: Path) -> Manifest | None:
    """The set that names `path` as one of its files: in `folder`, or beside the file itself."""
    for manifest in [*backup_sets(folder), *backup_sets(path.absolute().parent.parent)]:
        if any(manifest.file_of(component).resolve() == path.resolve() for component in manifest.components):
            return manifest
    return None


def broken_manifests(folder: Path, path: Path) -> list[Path]:
    """Manifests that do not read and may be of `path`: of the same time, or with its name in them."""
    found = []
    paths = {*manifest_paths(folder), *manifest_paths(path.absolute().parent.parent)}
    for one in sorted(paths):
        stamp = one.stem.removeprefix("backup_")
        try:
            read_manifest(one)
        except (BackupDamaged, BadFile):
            if stamp in path.name or path.name.encode() in readable_bytes(one):
                found.append(one)
    return found


def is_complete(manifest: Manifest) -> bool:
    """Whether every file of the set is in place with its size."""
    files = [(manifest.file_of(component), component.file.size) for component in manifest.components]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def delete_set(manifest: Manifest) -> None:
    """Delete a set whole: the manifest first, so that no set is ever left with a missing file."""
    assert manifest.path is not None
    manifest.path.unlink(missing_ok=True)
    sync_dir(manifest.path.parent)
    for component in manifest.components:
        manifest.file_of(component).unlink(missing_ok=True)
    for folder in (manifest.path.parent / OUTGOING).glob(f"{manifest.stamp}_*"):
        shutil.rmtree(folder)


PROTECTED_DAYS = 30
_SET_FILE = re.compile(rf"_({STAMP})\.(?:json|tar\.gz|rdb)\b")


@dataclass(frozen=True)
class Cleanup:
    """The sets to delete, newest first; and those beyond `keep` that stay, by name, with the reason."""

    delete: list[Manifest]
    protected: dict[str, str]


def plan_cleanup(folder: Path, keep: int, owner: Deployment, targets: list[str]) -> Cleanup:
    """What a cleanup of this deployment's sets deletes. Raises UsageProblem if `keep` is below 1."""
    if keep < 1:
        raise UsageProblem("--keep must be at least 1", next_step="--cleanup --keep 3")
    own = [one for one in backup_sets(folder) if owner.owns(one)]
    needed = protected_sets(folder, own, targets)
    beyond = beyond_newest(own, keep)
    return Cleanup(
        [one for one in beyond if one.name not in needed],
        {one.name: needed[one.name] for one in beyond if one.name in needed},
    )


def beyond_newest(sets: list[Manifest], keep: int) -> list[Manifest]:
    """The sets (newest first) beyond the newest `keep` of their kind, without the newest verified one of each kind.

    Sets with a missing file do not count towards `keep`, nor those that are dated in the future; the latter all stay.
    """
    stay: set[str] = set()
    for kind in {one.kind for one in sets}:
        same = [one for one in sets if one.kind == kind]
        whole = [one.name for one in same if is_complete(one) and not one.is_from_future][:keep]
        oldest = whole[-1] if len(whole) == keep else ""
        stay |= {one.name for one in same if one.name >= oldest}
        stay |= {one.name for one in [one for one in same if _verified(one)][:1]}
    return [one for one in sets if one.name not in stay]


def _verified(manifest: Manifest) -> bool:
    if manifest.is_from_future:
        return False
    return is_complete(manifest) and VERIFICATION_LEVELS.index(manifest.proof) >= VERIFICATION_LEVELS.index(
        CHECKED
    )


def protected_sets(folder: Path, own: list[Manifest], targets: list[str]) -> dict[str, str]:
    """The sets that a run or an operator may still need, by name, each with the reason; `own` are newest first.

    All that an open journal names, that an undo or a report of the last 30 days names, and that the newest finished
    re-embedding of these targets names until a newer verified set of the collection exists.
    """
    journals: list[Journal] = []
    found: dict[str, str] = {}
    for path in sorted(folder.glob("journal_*.jsonl")):
        journal = read_journal(path)
        if journal is None:  # it may be of an unfinished run
            named = _sets_in(readable_bytes(path).decode(errors="replace"))
            found |= dict.fromkeys(named, f"{path.name}, which is damaged, names it")
            continue
        journals.append(journal)
        if journal.is_open:
            found |= dict.fromkeys(_named(journal), f"the unfinished run {journal.run_id} needs it")
        elif journal.age_hours <= PROTECTED_DAYS * 24:
            why = f"the undo of {journal.command} run {journal.run_id} names it"
            found = dict.fromkeys(_named(journal), why) | found
    for path in _recent_reports(folder):
        named = _sets_in(readable_bytes(path).decode(errors="replace"))
        found = dict.fromkeys(named, f"{REPORT_DIR}/{path.name} names it") | found
    why = "it undoes the newest re-embedding, and no newer verified set of the collection exists"
    return dict.fromkeys(_last_reembedding(own, targets, journals), why) | found


def _last_reembedding(own: list[Manifest], targets: list[str], journals: list[Journal]) -> set[str]:
    finished = [one for one in journals if one.command == "reembed" and one.targets == targets]
    named = _named(finished[-1]) if finished else set()
    newer = (one.name for one in own if one.collection and _verified(one))
    return named if named and next(newer, "") <= max(named) else set()


def _named(journal: Journal) -> set[str]:
    """The sets that a journal names: as its backup, in its undo, or as the files to restore."""
    texts = (entry.get(name, "") for entry in journal.entries for name in ("undo", "files"))
    return manifests_named(journal) | {name for text in texts for name in _sets_in(str(text))}


def _sets_in(text: str) -> Iterable[str]:
    return {f"backup_{stamp}.json" for stamp in _SET_FILE.findall(text)}


def _recent_reports(folder: Path) -> Iterator[Path]:
    oldest = time.time() - PROTECTED_DAYS * 86400
    return (path for path in (folder / REPORT_DIR).glob("*.json") if path.stat().st_mtime >= oldest)
