"""Which Qdrant server takes whose snapshot."""

from __future__ import annotations

import re

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def restorable(backup_version: str, server_version: str) -> str | None:
    """Why a server cannot take a snapshot of `backup_version`, or None where it can.

    The same minor version or the next one takes it (https://qdrant.tech/documentation/concepts/snapshots/); others
    leave a dead collection behind, or lose data (seen with 1.11.3 and 1.18.3).
    """
    backup, server = _VERSION.match(backup_version), _VERSION.match(server_version)
    if backup is None or server is None:
        return f"the version of the backup ('{backup_version}') or server ('{server_version}') is not known"
    if backup[1] == server[1] and int(server[2]) - int(backup[2]) in {0, 1}:
        return None
    minor = int(backup[2])
    return (
        f"a snapshot of Qdrant {backup_version} restores onto {backup[1]}.{minor} and {backup[1]}.{minor + 1} only, "
        f"this server is {server_version}"
    )
