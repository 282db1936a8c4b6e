"""Where embeddings are asked for, written so that it can be shown and compared."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

OPENAI_BASE_URL = "https://api.openai.com/v1"


def public_url(base_url: str) -> str:
    """`base_url` without credentials, query and closing slash; OpenAI's own where it is empty."""
    parts = urlsplit(base_url.strip() or OPENAI_BASE_URL)
    host = parts.netloc.rpartition("@")[2].lower()
    return urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), "", ""))
