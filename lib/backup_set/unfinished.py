"""A set that is being written: its stamp, claimed in the run's journal; its files while no manifest names them."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime, timezone
from pathlib import Path

from lib.backup_set.manifest import COLLECTION_DIR, GRAPH_DIR
from lib.errors import LockHeld
from lib.files import PARTIAL, TargetLock
from lib.journal import Journal, open_journals

_STAMP = "stamp"
_WAIT_SECONDS = 0.2


def claim_stamp(folder: Path, journal: Journal) -> tuple[str, str]:
    """A stamp (UTC, to the second) that no set has and no unfinished run claimed, and the ISO time.

    It is in the journal when this returns, so that its files can be told from others'. Runs on other targets may
    write into the same folder at the same time: a taken second is waited out.
    """
    while True:
        with contextlib.suppress(LockHeld), TargetLock([f"stamps of {folder.resolve()}"]):
            now = datetime.now(timezone.utc).replace(microsecond=0)
            stamp = now.strftime("%Y%m%d_%H%M%S")
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
