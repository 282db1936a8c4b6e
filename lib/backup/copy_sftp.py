"""SFTP as backups need it: hosts that are known, a peer that falls silent noticed, transfers not a packet at a time.

fsspec's own SFTP trusts any host key (AutoAddPolicy), so that whoever stands in between would get password and backup.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem

_CONNECT_SECONDS = 30.0
_SILENT_SECONDS = 120.0
_IN_FLIGHT = 64  # requests of 32 KiB: 2 MiB on their way
_PRIVATE = 0o600


class KnownHostSFTP(SFTPFileSystem):  # type: ignore[misc]  # fsspec has no types
    """fsspec's file system over paramiko. Login: the URL's, else the agent's or `~/.ssh/id_*`'s keys."""

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
        """Folders that are their owner's alone."""
        super().makedirs(path, exist_ok=exist_ok, mode=mode)

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **_: Any) -> None:
        """Pipelined, readable by its owner alone; the server's size is compared at the end."""
        with Path(lpath).open("rb") as source, self.ftp.open(rpath, "wb") as there:
            with contextlib.suppress(OSError):  # some servers let nobody change modes
                there.chmod(_PRIVATE)
            there.set_pipelined(True)
            while data := source.read(1 << 15):
                there.write(data)
                if callback is not None:
                    callback.relative_update(len(data))

    def mv(self, old: str, new: str, **_: Any) -> None:
        """A rename that replaces nothing (fsspec's replaces what is there)."""
        self.ftp.rename(old, new)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> Any:
        stream = self.ftp.open(path, mode, bufsize=block_size or -1)
        if mode == "rb":
            stream.prefetch(max_concurrent_requests=_IN_FLIGHT)
        return stream
