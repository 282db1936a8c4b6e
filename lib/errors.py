"""Errors an operator can act on: each carries a next step and the exit code of the command."""

from __future__ import annotations

from collections.abc import Sequence

DONE = 0
FAILED = 1
USAGE = 2
REMAINING = 3
VERIFICATION_FAILED = 4
LOCKED = 5
PROVIDER_REFUSED = 6
INTERRUPTED = 130


class MigrationError(Exception):
    """A known failure: the message names the thing and the cause, `next_step` what to do now."""

    exit_code = FAILED

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.next_step = next_step


class UsageProblem(MigrationError):
    """Bad arguments, configuration or files: nothing was touched."""

    exit_code = USAGE


class ConfigError(UsageProblem):
    """Every fault of the configuration, told in one go."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(
            f"the configuration has {len(self.faults)} fault(s):\n{lines}",
            next_step="correct them and look again with --show-config",
        )


class DimensionMismatch(UsageProblem, ValueError):
    """The collection's size is not the configured VECTOR_SIZE."""


class GuardRefused(UsageProblem):
    """A destructive step without a proved backup."""


class BadFile(UsageProblem):
    """A FILE argument that is missing, empty, a directory or of an unknown kind."""


class AccessRefused(UsageProblem):
    """A wrong password, key or permission."""


class StoreUnreachable(MigrationError):
    """A server does not answer at its address."""


class StoreFailed(MigrationError):
    """A server answered with an error."""


class MissingData(MigrationError):
    """The graph or the collection that is to be read does not exist."""


class BackupDamaged(MigrationError):
    """A backup file does not prove: its checksum, structure or counts are off."""

    exit_code = VERIFICATION_FAILED


class VerificationFailed(MigrationError):
    """What stands in the stores is not what should."""

    exit_code = VERIFICATION_FAILED


class LockHeld(MigrationError):
    """Another run works on the same target."""

    exit_code = LOCKED


class ProviderRefused(MigrationError):
    """The embeddings provider refused (key, quota, credit) or stayed silent for too long."""

    exit_code = PROVIDER_REFUSED
