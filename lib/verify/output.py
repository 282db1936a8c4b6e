"""What verify_migration.py prints: every check with its figures, and what helps."""

from __future__ import annotations

import dataclasses

from lib.config import Config
from lib.console import Console, table
from lib.errors import DONE, VERIFICATION_FAILED
from lib.verify.checks import FAILED, PENDING, Check


def show_checks(
    checks: list[Check], recalled: list[str], recorded: str | None, config: Config, console: Console
) -> int:
    """Print every check, and the commands that help if one failed. Returns exit code 4 then, else 0."""
    failed = [check for check in checks if check.status == FAILED]
    text = table([(check.status, check.name, check.detail) for check in checks], ("result", "check", "figures"))
    if recalled:
        text += "\n\nrecalled:\n" + "\n".join(recalled)
    if failed:
        remedies = dict.fromkeys(line for check in failed for line in check.remedy.splitlines())
        text += f"\n\n{len(failed)} of {len(checks)} checks FAILED. What helps:\n  " + "\n  ".join(remedies)
    elif any(check.status == PENDING for check in checks):
        text += "\n\nrestart AutoMem with the new settings, then:\n  python scripts/verify_migration.py --after-restart"
    if recorded:
        text += f"\n\nrecorded as memory {recorded}"
    document = {
        "collection": config.collection,
        "checks": [dataclasses.asdict(check) for check in checks],
        "failed": len(failed),
        "recalled": recalled,
        "recorded": recorded,
    }
    console.result(document, text)
    return VERIFICATION_FAILED if failed else DONE
