"""Where a copy of the backups is kept: the URL taken apart, what may be shown of it, and the package that speaks it.

A password may stand in an sftp URL alone; every other login comes from where the library itself looks for it.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from lib.errors import UsageProblem

FILE, SFTP, S3 = "file", "sftp", "s3"
# Scheme: the module that speaks it, the package that brings it.
_LIBRARIES = {
    FILE: ("fsspec", "fsspec"),
    SFTP: ("paramiko", "paramiko"),
    S3: ("s3fs", "s3fs"),
    "gs": ("gcsfs", "gcsfs"),
    "az": ("adlfs", "adlfs"),
    "abfs": ("adlfs", "adlfs"),
    "abfss": ("adlfs", "adlfs"),
}
_AZURE = {"az", "abfs", "abfss"}
_FORMS = "s3://bucket/folder, gs://bucket/folder, az://container/folder, sftp://user@host/folder, or a local folder"
_MASK = "***"


@dataclass(frozen=True)
class OffsiteAddress:
    """A folder elsewhere. `url` and `password` are never to be shown; `shown` and `clean()` are for that."""

    scheme: str
    shown: str
    url: str = field(repr=False)
    host: str = ""
    port: int | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    path: str = ""

    @property
    def has_folders(self) -> bool:
        """Whether a file grows under its name there; in an object store it appears when it is whole."""
        return self.scheme in {FILE, SFTP}

    def clean(self, text: str) -> str:
        """The text without the password, however it is written."""
        for secret in {self.password, unquote(self.password or "")} - {None, ""}:
            text = text.replace(str(secret), _MASK)
        return text

    def require_package(self) -> None:
        """Raise UsageProblem where what speaks this scheme is not installed."""
        module, package = _LIBRARIES[self.scheme]
        for name, brings in (("fsspec", "fsspec"), (module, package)):
            if importlib.util.find_spec(name) is None:
                raise UsageProblem(
                    f"{self.scheme}:// needs the Python package '{brings}', which is not installed here",
                    next_step=f"pip install {brings}   (all of them: pip install -r requirements-offsite.txt)",
                )


def is_url(word: str) -> bool:
    """Whether a FILE argument is a URL."""
    return "://" in word


def offsite_address(text: str) -> OffsiteAddress:
    """Take a URL or the path of a local folder apart; raises UsageProblem, which shows no part that may be secret."""
    if not is_url(text):
        if ":" in text.partition("/")[0]:  # as scp, rsync, restic and rclone write it; or a slash is missing
            raise _unusable(
                "a word with ':' before its first slash is neither a URL nor plainly a local folder (./a:b is)"
            )
        return _local(Path(text))
    scheme = text.partition("://")[0].lower()
    if scheme not in _LIBRARIES:
        name = f"{scheme}://" if re.fullmatch(r"[a-z0-9+.-]{1,20}", scheme) else "this URL"
        raise _unusable(f"{name} is not a place that backups are uploaded to")
    if "?" in text or "#" in text:
        raise _unusable(f"a {scheme}:// URL ends with its folder: no '?' and no '#', and no key behind them")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # its text would show a piece of the URL
        raise _unusable(f"the port in the {scheme}:// URL is no number") from None
    if scheme == FILE:
        if parts.netloc not in {"", "localhost"}:
            raise _unusable("file:// has three slashes before the folder: file:///mnt/folder")
        return _local(Path(unquote(parts.path)))
    if not parts.hostname:
        raise _unusable(f"the {scheme}:// URL names no {'host' if scheme == SFTP else 'bucket'}")
    return _sftp(text, parts, port) if scheme == SFTP else _objects(scheme, text, parts)


def _unusable(message: str) -> UsageProblem:
    return UsageProblem(message, next_step=f"name {_FORMS}")


def _local(folder: Path) -> OffsiteAddress:
    path = str(folder.expanduser().absolute())
    try:
        Path(path).resolve()
    except (OSError, RuntimeError):  # Python 3.13 no longer raises for a loop
        raise _unusable("the folder is behind a link that leads to itself") from None
    return OffsiteAddress(FILE, path, path, path=path)


def _sftp(text: str, parts: SplitResult, port: int | None) -> OffsiteAddress:
    path = unquote(parts.path).rstrip("/") or "/"
    login = f"{parts.username}{f':{_MASK}' if parts.password else ''}@" if parts.username else ""
    place = f"{parts.hostname}:{port}" if port else parts.hostname
    return OffsiteAddress(
        SFTP,
        f"sftp://{login}{place}{parts.path.rstrip('/')}",
        text,
        host=parts.hostname or "",
        port=port,
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        path=path,
    )


def _objects(scheme: str, text: str, parts: SplitResult) -> OffsiteAddress:
    if parts.password or ("@" in parts.netloc and scheme not in _AZURE):
        raise _unusable(f"a {scheme}:// URL holds no login: it comes from the environment, see the README")
    return OffsiteAddress(scheme, text.rstrip("/"), text.rstrip("/"))
