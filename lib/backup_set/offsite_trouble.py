"""What the libraries of other places raise, as errors of ours: refused, unreachable, absent, or failed."""

from __future__ import annotations

from lib.backup_set.offsite_address import OffsiteAddress
from lib.errors import AccessRefused, MigrationError, MissingData, StoreFailed, StoreUnreachable

# The libraries' own families of errors, by name so that none has to be imported.
_REFUSED = {
    "PermissionError",
    "AuthenticationException",  # paramiko
    "BadHostKeyException",
    "NoCredentialsError",  # botocore
    "PartialCredentialsError",
    "ClientAuthenticationError",  # azure.core
    "DefaultCredentialsError",  # google.auth
    "RefreshError",
}
_UNREACHABLE = {
    "ConnectionError",
    "TimeoutError",
    "gaierror",
    "EndpointConnectionError",  # botocore
    "HTTPClientError",
    "ClientConnectionError",  # aiohttp
    "ServiceRequestError",  # azure.core
    "TransportError",  # google.auth
    "NoValidConnectionsError",  # paramiko
}


def trouble(address: OffsiteAddress, what: str, error: Exception) -> MigrationError:
    """The library's error as one of ours, without a password."""
    families = {one.__name__ for one in type(error).__mro__}
    text = address.clean(" ".join(str(error).split())) or type(error).__name__
    message = f"{what}: {text}"
    if "not found in known_hosts" in text:
        return AccessRefused(f"{what}: the host's key is not known here", next_step=_look_at_key(address))
    if "BadHostKeyException" in families:
        return AccessRefused(
            f"{what}: the host's key is not the one in ~/.ssh/known_hosts: another machine may stand in between",
            next_step=_look_at_key(address),
        )
    if isinstance(error, FileNotFoundError):
        return MissingData(message, next_step="see whether the bucket, container or folder is spelled right")
    if families & _REFUSED:
        return AccessRefused(
            message,
            next_step="give the login in the environment, with rights to list, read and write: see the README",
        )
    if families & _UNREACHABLE:
        return StoreUnreachable(message, next_step="check host, port and network")
    return StoreFailed(message)


def _look_at_key(address: OffsiteAddress) -> str:
    port = f"-p {address.port} " if address.port else ""
    return f"ssh {port}{address.host}   shows its key, to be compared with the host's own"
