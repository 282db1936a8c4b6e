"""Which sets `--cleanup` deletes: each kind is counted apart, and what a run may still need is protected."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.backup_set.manifest import CHECKED, PROOF_LEVELS, Manifest
from lib.backup_set.reports import REPORT_DIR
from lib.backup_set.sets import Deployment, all_sets, is_complete, manifests_named
from lib.errors import UsageProblem
from lib.files import readable_bytes
from lib.journal import Journal, read_journal

PROTECTED_DAYS = 30
_SET_FILE = re.compile(r"_(\d{8}_\d{6})\.(?:json|tar\.gz|rdb)\b")


@dataclass(frozen=True)
class Cleanup:
    """The sets to delete, newest first; and those beyond `keep` that stay, by name, with the reason."""

    delete: list[Manifest]
    protected: dict[str, str]


def plan_cleanup(folder: Path, keep: int, owner: Deployment, targets: list[str]) -> Cleanup:
    """What a cleanup of this deployment's sets deletes. Raises UsageProblem if `keep` is below 1."""
    if keep < 1:
        raise UsageProblem("--keep must be at least 1", next_step="--cleanup --keep 3")
    own = [one for one in all_sets(folder) if owner.owns(one)]
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
    return is_complete(manifest) and PROOF_LEVELS.index(manifest.proof) >= PROOF_LEVELS.index(CHECKED)


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
