"""Where a Qdrant server is: its URL as AutoMem reads it, and the paths under it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlsplit

from lib.errors import UsageProblem

if TYPE_CHECKING:
    from lib.vectors.transport import Qdrant

# What a URL without a port means to qdrant-client, hence to AutoMem
# (https://github.com/qdrant/qdrant-client, qdrant_remote.py).
DEFAULT_PORT = 6333

_EXAMPLE = "export QDRANT_URL=http://localhost:6333"


class Login(NamedTuple):
    """User and password of basic authentication, as a proxy before the server may want them."""

    user: str
    password: str


def split_login(url: str) -> tuple[str, Login | None]:
    """The URL without user and password and with a port, and these two. Raises UsageProblem."""
    parts = urlsplit(url.strip() if "://" in url else f"http://{url.strip()}")
    try:
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        raise UsageProblem("QDRANT_URL has a port that is none", next_step=_EXAMPLE) from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageProblem("QDRANT_URL is not an http(s) address", next_step=_EXAMPLE)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    login = Login(parts.username or "", parts.password or "") if parts.username or parts.password else None
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}", login


def check_key(api_key: str) -> None:
    """Raise UsageProblem for a key that no header can carry (the error of requests would show it)."""
    if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        raise UsageProblem(
            "QDRANT_API_KEY holds characters that no header can carry", next_step="set it anew"
        )


def collection_path(name: str, *parts: str) -> str:
    """The path of a collection, or of something in it; every part is quoted."""
    return "/".join(["/collections", quote(name, safe=""), *(quote(part, safe="") for part in parts)])


def curl_line(qdrant: Qdrant, method: str, *path: str, query: str = "") -> str:
    """The command that sends a request about a collection; the key stays in its variable."""
    key = ' -H "api-key: $QDRANT_API_KEY"' if qdrant.api_key else ""
    return f"curl -s -X {method}{key} {shlex.quote(qdrant.display + collection_path(*path) + query)}"
