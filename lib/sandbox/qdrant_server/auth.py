"""API keys: who may send a request, judged from its head alone, as the real server does.

A refused request's body stays unread. https://qdrant.tech/documentation/guides/security/
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

from starlette.requests import Request

from lib.sandbox.qdrant_server.dialect import Dialect
from lib.sandbox.qdrant_server.errors import Refusal

OPEN_PATHS = ("/", "/healthz", "/readyz", "/livez")
READS = (
    "count",
    "scroll",
    "query",
    "search",
    "batch",
    "points",
)  # the last part of a POST that changes nothing


@dataclass(frozen=True)
class Keys:
    """The keys that the server knows; without the first, everything is allowed to everyone."""

    full: str | None = field(default=None, repr=False)
    read_only: str | None = field(default=None, repr=False)

    def check(self, request: Request, dialect: Dialect) -> None:
        """Refusal (401, 403) where the request may not be sent."""
        path = request.url.path
        if (self.full is None and self.read_only is None) or path in OPEN_PATHS:
            return
        given = _given(request)
        if given is None:
            raise Refusal(401, "Must provide an API key or an Authorization bearer token", plain=True)
        if _equal(given, self.full):
            return
        if not _equal(given, self.read_only):
            raise Refusal(401, "Invalid API key or JWT", plain=True)
        if _changes(request.method, path):
            plain = dialect.plain_upload_refusal and path.endswith("/snapshots/upload")
            raise Refusal(403, "Forbidden: Global manage access is required", plain=plain)


def _given(request: Request) -> str | None:
    key = request.headers.get("api-key")
    if key is not None:
        return key
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else None


def _equal(given: str, key: str | None) -> bool:
    return key is not None and hmac.compare_digest(given.encode(), key.encode())


def _changes(method: str, path: str) -> bool:
    if method == "POST" and "/points" in path:
        return path.rpartition("/")[2] not in READS
    return method not in ("GET", "HEAD")
