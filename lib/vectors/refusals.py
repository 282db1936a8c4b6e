"""What goes wrong with a Qdrant server, as errors: refusals it sends, and answers that never come."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

import orjson
import requests

from lib.addresses import container_hint
from lib.errors import AccessRefused, MissingData, StoreFailed, StoreUnreachable
from lib.shown import one_line

TEXT_LIMIT = 600  # characters of a server's error text that are worth showing

_NOT_CONNECTED = {
    "Connection refused": "connection refused",
    "NameResolutionError": "its name is not known",
    "Name or service not known": "its name is not known",
    "ConnectTimeoutError": "connecting timed out",
    "No route to host": "no route to the host",
    "Network is unreachable": "the network is unreachable",
    "Failed to establish a new connection": "no connection can be made",
    "Tunnel connection failed": "the proxy refuses",
}
_UNRESOLVED = {"NameResolutionError", "Name or service not known"}


_FULL = (
    "No space left",
    "Not enough space available",
    # How a full disk is told over a snapshot and over a restore, and hardly anything else.
    "Error while copy WAL",
    "failed to unpack `",
)


class QdrantError(StoreFailed):
    """The server answered with an error status.

    `status` is the HTTP status, `text` the server's own words, `waitable` whether it said when to come again.
    """

    def __init__(
        self, display: str, status: int, text: str, *, waitable: bool = False, next_step: str = ""
    ) -> None:
        super().__init__(f"Qdrant at {display} answered {status}: {text}", next_step=next_step)
        self.status = status
        self.text = text
        self.waitable = waitable


class NotFound(QdrantError, MissingData):
    """404: the collection, point or snapshot is not there."""


class NoAnswer(StoreUnreachable):
    """The request may have reached the server, but no answer came: it may have been carried out."""


def is_disk_full(error: Exception) -> bool:
    """Whether the server refused because its disk has no room."""
    return isinstance(error, QdrantError) and tells_full(error.text)


def tells_full(text: str) -> bool:
    """Whether the server says here that its disk has no room (its words on 1.11.3 and 1.18.3)."""
    return any(sign in text for sign in _FULL)


def _hint(display: str) -> str:
    host = urlsplit(display).hostname or ""
    return container_hint(host, "QDRANT_URL=http://localhost:6333")


def lost(display: str, error: Exception) -> StoreUnreachable:
    """What a broken connection means: StoreUnreachable where none was made, else NoAnswer."""
    text = str(error)
    if isinstance(error, requests.exceptions.SSLError):
        return StoreUnreachable(
            f"Qdrant at {display}: TLS failed", next_step="check QDRANT_URL (http or https)"
        )
    for sign, meaning in _NOT_CONNECTED.items():
        if sign in text:
            return StoreUnreachable(
                f"Qdrant at {display} is unreachable: {meaning}",
                next_step=(_hint(display) if sign in _UNRESOLVED else "")
                + "start it (docker compose up -d qdrant) or check QDRANT_URL",
            )
    meaning = "timed out" if "timed out" in text else "the connection broke"
    return NoAnswer(
        f"Qdrant at {display} gave no answer: {meaning}", next_step="look at the server's log, then run again"
    )


def refusal(display: str, response: requests.Response, secrets: Iterable[str]) -> AccessRefused | QdrantError:
    """The error that an answer of status 300 and above stands for; `secrets` are cut out of its text."""
    status, text = response.status_code, _error_text(response)
    for secret in secrets:
        text = text.replace(secret, "***") if secret else text
    if status in {401, 403}:
        return AccessRefused(
            f"Qdrant at {display} refuses access: {status} {text}",
            next_step="export QDRANT_API_KEY=... (a key that may manage the whole server)",
        )
    if status == 404:
        return NotFound(display, status, text)
    step = "free disk space on the Qdrant server" if tells_full(text) else ""
    waitable = "Retry-After" in response.headers
    return QdrantError(display, status, text, waitable=waitable, next_step=step)


def not_qdrant(display: str) -> StoreFailed:
    """Something else answers at this address."""
    return StoreFailed(f"what answers at {display} is not Qdrant", next_step="check QDRANT_URL")


def _error_text(response: requests.Response) -> str:
    try:
        text = str(orjson.loads(response.content)["status"]["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        text = response.text.strip()  # the middleware and the download route answer in plain text
    except requests.RequestException:
        text = "(the text of the answer broke off)"
    return one_line(text[:TEXT_LIMIT] or response.reason or "no text")
