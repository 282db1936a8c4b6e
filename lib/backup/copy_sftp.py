"""SFTP for backups: known hosts only, silent servers noticed, reads ahead.

fsspec's own SFTP accepts any host key by default, so that a machine in between would get the password and the backup.
"""

from __future__ import annotations

import contextlib
from typing import Any

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem

_CONNECT_SECONDS = 30.0
_SILENT_SECONDS = 120.0
_IN_FLIGHT = 64  # requests of 32 KiB: 2 MiB on their way
_PRIVATE = 0o600


class KnownHostSFTP(SFTPFileSystem):  # type: ignore[misc]  # fsspec has no types
    """fsspec's file system over paramiko. Login: the URL's, else the keys of the agent or in `~/.ssh/id_*`."""

    cachable = False

    def _connect(self) -> None:
        self.client = paramiko.SSHClient()
        self.client.load_system_host_keys()
        self.client.set_missing_host_key_policy(paramiko.RejectPolicy())
        limits = dict.fromkeys(("timeout", "banner_timeout", "auth_timeout"), _CONNECT_SECONDS)
        self.client.connect(self.host, **{**limits, **self.ssh_kwargs})
        self.ftp = self.client.open_sftp()
        channel = self.ftp.get_channel()
        if channel is not None:
            channel.settimeout(_SILENT_SECONDS)

    def makedirs(self, path: str, exist_ok: bool = False, mode: int = 0o700) -> None:  # noqa: FBT001, FBT002 - fsspec's
        """Create folders that only their owner can read."""
        super().makedirs(path, exist_ok=exist_ok, mode=mode)

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **_: Any) -> None:
        """Send a file that only its owner can read. paramiko compares the server's size at the end."""
        self.ftp.open(rpath, "w").close()
        with contextlib.suppress(OSError):  # some servers let nobody change modes
            self.ftp.chmod(rpath, _PRIVATE)
        self.ftp.put(lpath, rpath, callback=lambda done, _total: callback.absolute_update(done) if callback else None)

    def mv(self, old: str, new: str, **_: Any) -> None:
        """Rename without replacing a file that exists (fsspec's replaces it)."""
        self.ftp.rename(old, new)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> Any:
        stream = self.ftp.open(path, mode, bufsize=block_size or -1)
        if mode == "rb":
            stream.prefetch(max_concurrent_requests=_IN_FLIGHT)
        return stream
