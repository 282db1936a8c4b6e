"""What verify_migration.py tells: every check with its figures."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lib.console import Console, table
from lib.errors import DONE, VERIFICATION_FAILED

if TYPE_CHECKING:
    from lib.config import Config
    from lib.steps.checks import Check


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
