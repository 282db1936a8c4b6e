"""Retention: which sets of a folder, or of the place of copies, a cleanup deletes; pins."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from shlex import quote

from lib.backup import catalog as catalogs
from lib.backup.age import SUFFIX, CopyKeys
from lib.backup.catalog import PIN, Deployment, delete_set, manifests_named, pinned_sets, safety_copies, with_purpose
from lib.backup.copies import Catalog, catalog_at, delete_copy, require_elsewhere
from lib.backup.copy_store import open_offsite
from lib.backup.manifest import UNVERIFIED, Manifest
from lib.errors import UsageProblem, did_you_mean
from lib.files import readable_bytes, require_own
from lib.journal import STAMP, Journal, read_journals

KEEP = "--keep"
# The rules besides --keep, and the format of the period of which each keeps the newest set. Days are UTC, weeks ISO's.
PERIODS = {"--keep-daily": "%Y-%m-%d", "--keep-weekly": "%G-%V", "--keep-monthly": "%Y-%m"}
DEFAULT_RULES = {KEEP: 5}
DELETE = "delete"
PROTECTED_DAYS = 30


@dataclass(frozen=True)
class Cleanup:
    """The sets of one deployment, newest first, each with what keeps it, or DELETE.

    `protected`: the names of the sets that are kept although no rule keeps them, with the reason.
    """

    verdicts: list[tuple[Manifest, str]]
    protected: dict[str, str]

    @property
    def delete(self) -> list[Manifest]:
        """The sets to delete, newest first."""
        return [one for one, verdict in self.verdicts if verdict == DELETE]


def clean_up(
    folder: Path,
    url: str,
    keys: CopyKeys,
    rules: Mapping[str, int],
    owner: Deployment,
    targets: list[str],
    *,
    dry_run: bool,
) -> Cleanup:
    """Delete the sets here, or the copies at `url`, that no rule keeps and nothing protects. Raises UsageProblem."""
    if folder.is_dir():  # its manifests, journals, reports and pins decide
        require_own(folder)
    if url:
        require_elsewhere(url, folder)
    plan = plan_cleanup(catalog_at(url, folder, keys), rules, owner, folder, targets)
    store = open_offsite(url, keys) if url else None
    for manifest in [] if dry_run else plan.delete:
        if store:
            delete_copy(store, manifest)
        else:
            delete_set(manifest)
    return plan


def plan_cleanup(
    catalog: Catalog, rules: Mapping[str, int], owner: Deployment, folder: Path, targets: list[str]
) -> Cleanup:
    """Choose the sets of this deployment that a cleanup deletes.

    `rules` maps KEEP or a flag of PERIODS to its number; each kind of sets has its own count. The journals and reports
    of `folder` name what is protected. Raises UsageProblem if a number is below 1.
    """
    for flag, count in rules.items():
        if count < 1:
            again = f"python scripts/backup_automem.py --cleanup {flag} 3 --dry-run"
            raise UsageProblem(f"{flag} must be at least 1", next_step=again)
    safety = safety_copies(folder)
    own = [(with_purpose(one, safety), complete) for one, complete in catalog.sets if owner.owns(one)]
    kept: dict[str, str] = {}
    for kind in {one.kind for one, _ in own}:
        kept |= _kept_of_kind([(one, complete) for one, complete in own if one.kind == kind], rules)
    pinned = catalog.pinned | pinned_sets(path.name for path in folder.glob(f"*{PIN}"))
    protected = {**_protected_sets(folder, _countable(own), targets), **dict.fromkeys(pinned, "pinned")}
    protected = {one.name: protected[one.name] for one, _ in own if one.name in protected and one.name not in kept}
    verdicts = [(one, kept.get(one.name) or protected.get(one.name) or DELETE) for one, _ in own]
    return Cleanup(verdicts, protected)


def _countable(sets: list[tuple[Manifest, bool]]) -> list[Manifest]:
    """The sets that count for a rule: complete, not dated in the future, and not taken after a store was lost."""
    return [one for one, complete in sets if complete and not one.is_from_future and not one.lost_store]


def _kept_of_kind(sets: list[tuple[Manifest, bool]], rules: Mapping[str, int]) -> dict[str, str]:
    """The names of the sets that a rule keeps, or that their state keeps, with the reason.

    `sets` are of one kind, newest first, each with whether it is complete.
    """
    counted = _countable(sets)
    found: dict[str, str] = {}
    for flag, count in rules.items():
        newest: dict[str, str] = {}  # the newest set of each period; for KEEP each set is one
        for one in counted:
            day = datetime.fromisoformat(one.created).astimezone(timezone.utc)
            newest.setdefault(one.name if flag == KEEP else day.strftime(PERIODS[flag]), one.name)
        for name in list(newest.values())[:count]:
            found[name] = f"{found[name]}, {flag} {count}" if name in found else f"{flag} {count}"
    if verified := next((one for one in counted if one.proof != UNVERIFIED), None):
        found.setdefault(verified.name, "the newest verified set of its kind")
    at_least = rules.get(KEEP, 1)
    oldest = counted[at_least - 1].name if len(counted) >= at_least else ""
    for one, complete in sets:
        if one.is_from_future:
            found.setdefault(one.name, "dated in the future, so its age is not known")
        elif one.name >= oldest:
            state = "one of its stores is empty" if complete else "incomplete"
            found.setdefault(one.name, f"{state}, but among the newest sets")
    return found


def _protected_sets(folder: Path, counted: list[Manifest], targets: list[str]) -> dict[str, str]:
    """The names of the sets that a run or an operator may still need, with the reason.

    They are named by an open journal, by an undo or a report of the last 30 days, or by the newest finished
    re-embedding of these targets if no newer verified set of the collection is among `counted` (newest first).
    """
    finished: set[str] = set()  # what the newest re-embedding names
    found: dict[str, str] = {}
    for path, journal in read_journals(folder).items():
        if journal is None:  # it may be of an unfinished run
            found |= dict.fromkeys(_sets_in(path), f"{path.name}, which is damaged, names it")
            continue
        if journal.command == "reembed" and journal.targets == targets:
            finished = _named(journal)
        if journal.is_open:
            found |= dict.fromkeys(_named(journal), f"the unfinished run {journal.run_id} needs it")
        elif journal.age_hours <= PROTECTED_DAYS * 24:
            why = f"the undo of {journal.command} run {journal.run_id} names it"
            found = dict.fromkeys(_named(journal), why) | found
    for path in (folder / catalogs.REPORT_DIR).glob("*.json"):
        if path.stat().st_mtime >= time.time() - PROTECTED_DAYS * 86400:
            found = dict.fromkeys(_sets_in(path), f"{catalogs.REPORT_DIR}/{path.name} names it") | found
    newest = next((one.name for one in counted if one.collection and one.proof != UNVERIFIED), "")
    if finished and newest <= max(finished):
        why = "it undoes the newest re-embedding, and no newer verified set of the collection exists"
        found = dict.fromkeys(finished, why) | found
    return found


def _named(journal: Journal) -> set[str]:
    """The sets that a journal names: as its backup, in its undo, or as the files to restore."""
    texts = (str(entry.get(name, "")) for entry in journal.entries for name in ("undo", "files"))
    return manifests_named(journal).union(*map(_manifests_in, texts))


def _sets_in(path: Path) -> set[str]:
    return _manifests_in(readable_bytes(path).decode(errors="replace"))


def _manifests_in(text: str) -> set[str]:
    """The manifests of all files that a text names."""
    return {f"backup_{stamp}.json" for stamp in re.findall(rf"_({STAMP})\.(?:json|tar\.gz|rdb)\b", text)}


def change_pin(place: str, stamp: str, *, pinned: bool) -> str:
    """Pin or unpin a set in the folder or at the URL `place`; returns that without secrets. Raises UsageProblem."""
    store = open_offsite(place)
    name, file = f"backup_{stamp}.json", f"backup_{stamp}{PIN}"
    existing = store.sizes()
    if not re.fullmatch(STAMP, stamp) or not {name, name + SUFFIX, file} & existing.keys():
        near = did_you_mean(stamp, re.findall(STAMP, " ".join(existing)))
        raise UsageProblem(
            f"no set {stamp} in {store.shown}{near}: STAMP is the time in the names of its files, as 20261126_220840",
            next_step=f"python scripts/backup_automem.py --list {quote(store.shown)}",
        )
    if pinned and file not in existing:
        with tempfile.NamedTemporaryFile() as empty:
            store.publish(store.send(Path(empty.name), file, lambda _step: None), file)
    elif not pinned and file in existing:
        store.delete(file)
    return store.shown
